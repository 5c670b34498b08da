"""The real `train` command on a small task: it learns, it reports, it resumes, it never loses work."""

import json
import os
import re
import shutil
import signal

import pytest
import tensorflow.compat.v1 as tf
from conftest import NET, TASK, flags, needs_warp, spawn

import lstm_ctc_ocr
from lstm_ctc_ocr import LstmCtcOcr, main


def train(dataset, model, **settings):
    return ["train", *flags(**{**TASK, **NET, **dict(dataset=dataset, model=model), **settings})]


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def step_of(folder):
    """The step stored in the checkpoint that `checkpoint` names: it loads, and is whole."""
    return int(tf.train.load_checkpoint(str(folder)).get_tensor("global_step"))


def until(process, pattern):
    """Reads a process's messages up to the first line that matches."""
    for line in process.stderr:
        if re.search(pattern, line):
            return line
    raise AssertionError(f"ended with {process.wait()} and never said {pattern}")


def test_it_learns(trained):
    """Chance is one in seven, and the field's usual fault, stuck on all blanks, reads nothing at all."""
    assert config_of(trained)["accuracy"] > 0.5


@pytest.mark.parametrize("settings", [
    dict(label_parts=3), pytest.param(dict(ctc="warp"), marks=needs_warp())], ids=str)
def test_convolutions_learn_sooner(settings, dataset, tmp_path, capfd):
    """The article's follow-ups: convolutions, and with them letters in three parts, or Baidu's CTC."""
    assert main(train(dataset, tmp_path, net="cnn_lstm", epoch_max=6, **settings)) == 0
    assert config_of(tmp_path)["accuracy"] > 0.8
    assert main(["test", "--model", str(tmp_path), str(dataset)]) == 0
    right, count = re.search(r"\((\d+) of (\d+)\)", capfd.readouterr().out).groups()
    assert int(right) > 0.8 * int(count)


def test_a_missing_warp_ctc_is_said_before_anything_is_trained(dataset, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("lstm_ctc_ocr.importlib.util.find_spec", lambda name: None)
    lstm_ctc_ocr._warp_library.cache_clear()
    assert main(train(dataset, tmp_path / "model", ctc="warp")) == 2
    assert "pip install --no-deps paddlepaddle" in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "model").exists()


def test_a_model_folder_says_what_it_is_and_where_it_came_from(trained):
    config = config_of(trained)
    assert {**TASK, "net": "lstm", "n_hidden": NET["n_hidden"]}.items() <= config.items()
    assert config["images"] == 720 and config["images_seen"] == config["step"] * 16 and config["seed"] == 0
    assert config["tensorflow"] == tf.__version__ and config["step"] == step_of(trained) == 15 * 45


def test_the_best_and_the_newest_two_checkpoints_are_kept_and_no_other(trained):
    config = config_of(trained)
    steps = {int(re.search(r"\d+", path.name)[0]) for path in trained.glob("LstmCtcOcr-*")}
    assert steps == {config["step"], 672, config["best_step"]}  # 672 is the last multiple of a tenth of an epoch


def test_the_report_is_the_articles(dataset, tmp_path, capfd):
    assert main(train(dataset, tmp_path, epoch_max=0.2)) == 0
    report = capfd.readouterr().err
    for part in (r"720 images to train on, 80 held out", r"epoch 0  batch 9 of 45  step 9  lr [\d.e+-]+  \d+ images/s",
                 r"train +loss [\d.]+  edit distance [\d.]+",
                 r"validation +loss [\d.]+  edit distance [\d.]+  accuracy [\d.]+%",
                 r"accuracy by length  1: [\d.]+%  2: [\d.]+%  3: [\d.]+%", r"True \[[AX, ]+\] <====> \[[AX, ]*\]"):
        assert re.search(part, report), part


def test_tensorboard_has_the_figures_and_the_wrong_readings(dataset, tmp_path):
    assert main(train(dataset, tmp_path, epoch_max=0.2)) == 0
    file, = (tmp_path / "events").iterdir()
    values = {value.tag: value for event in tf.train.summary_iterator(str(file)) for value in event.summary.value}
    assert {"train/loss", "validation/loss", "validation/accuracy", "validation/edit_distance", "lr"} <= values.keys()
    assert values["validation/wrong"].image.encoded_image_string.startswith(b"\x89PNG")


def test_running_it_again_resumes(trained, dataset, tmp_path, capfd):
    shutil.copytree(trained, tmp_path / "model")
    assert main(train(dataset, tmp_path / "model")) == 0  # nothing is left to do
    assert step_of(tmp_path / "model") == 675
    assert main(train(dataset, tmp_path / "model", epoch_max=16)) == 0
    assert step_of(tmp_path / "model") == 720 and "from step 675 to 720" in capfd.readouterr().err


@pytest.fixture
def losses(monkeypatch):
    """The loss and the gradient's norm of every training step, and the steps at which a SIGTERM shall come."""
    seen, stops, require_finite = [], [], LstmCtcOcr._require_finite

    def watch(self, run, *values):
        if len(values) == 2:
            seen.append(tuple(map(float, values)))
            if len(seen) in stops:
                os.kill(os.getpid(), signal.SIGTERM)
        require_finite(self, run, *values)

    monkeypatch.setattr(LstmCtcOcr, "_require_finite", watch)
    return seen, stops


@pytest.mark.parametrize("net, times", [
    ("lstm", 2), *(pytest.param(net, 10, marks=pytest.mark.long) for net in ("lstm", "cnn_lstm"))])
def test_a_run_resumed_again_and_again_is_the_same_to_the_last_bit(net, times, dataset, tmp_path, losses):
    """Weights, optimiser, averages, schedule and the order of the images go on; and the seed fixes all of them."""
    settings = dict(net=net, n_hidden=16, epoch_max=60 / 49, val_num=16, save_epoch=1)  # into the second epoch
    seen, stops = losses
    assert main(train(dataset, tmp_path / "whole", **settings)) == 0
    whole = seen.copy()
    seen.clear()
    stops += [60 * (time + 1) // (times + 1) for time in range(times)]
    codes = [main(train(dataset, tmp_path / "parts", **settings)) for _ in range(times + 1)]
    assert codes == [128 + signal.SIGTERM] * times + [0]
    assert len(set(whole)) == 60 and seen == whole
    before, after = (tf.train.load_checkpoint(str(tmp_path / name)) for name in ("whole", "parts"))
    assert all((before.get_tensor(name) == after.get_tensor(name)).all() for name in before.get_variable_to_shape_map())


def test_ctrl_c_saves_first(dataset, tmp_path):  # SIGTERM: see test_faults.py
    process = spawn(*train(dataset, tmp_path, epoch_max=1000, save_epoch=900))
    until(process, "from step 0")
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate()
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in messages
    assert f"stopped and saved at step {step_of(tmp_path)} of 45000" in messages


def test_a_loss_that_is_not_a_number_stops_with_the_last_checkpoint_intact(trained, dataset, tmp_path, capfd):
    shutil.copytree(trained, tmp_path / "model")
    assert main(train(dataset, tmp_path / "model", epoch_max=30, lr=1e30)) == 2
    assert "lower --lr" in capfd.readouterr().err
    assert step_of(tmp_path / "model") == 675
    assert main(["test", "--model", str(tmp_path / "model"), str(dataset)]) == 0


@pytest.mark.parametrize("settings, complaint", [
    (dict(words="AY"), "which is not in --words AY"),
    (dict(words_max_num=1), "1 to 1 letters"),
    (dict(batch_size=1000), "fewer than one batch of 1000"),
    (dict(dataset="nowhere"), "no images <i>_<LABEL>.png in nowhere"),
])
def test_what_cannot_be_trained_is_one_line(dataset, tmp_path, capfd, settings, complaint):
    assert main(train(**{**dict(dataset=dataset, model=tmp_path / "model"), **settings})) == 2
    message, = capfd.readouterr().err.splitlines()[-1:]
    assert re.search(complaint, message)
    assert not (tmp_path / "model").exists()


def test_a_model_of_other_settings_is_not_trained_on(trained, dataset, capfd):
    for settings in (dict(n_hidden=8), dict(net="cnn_lstm"), dict(label_parts=3), dict(seed=1), dict(words="AXY"),
                     dict(batch_size=8)):
        before = (trained / "config.json").read_bytes()
        assert main(train(dataset, trained, **settings)) == 2
        assert "another folder with --model" in capfd.readouterr().err
        assert (trained / "config.json").read_bytes() == before
