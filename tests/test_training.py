"""The real `train` command on a small task: it learns, it reports, it resumes, it never loses work."""

import dataclasses
import json
import os
import re
import shutil
import signal
from multiprocessing.pool import ThreadPool

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
    settings = dict(net=net, n_hidden=16, epoch_max=60 / 45, val_num=16, save_epoch=1)  # into the second epoch
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
    (dict(words="AY"), "letters of --words AY"),
    (dict(words_max_num=1), "not 1 to 1 letters"),
    (dict(batch_size=1000), "leaves 720 images to train on, fewer than 1000"),
    (dict(dataset="nowhere"), "nowhere is no folder: render"),
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


# ---- what is held out

def held_out(patch, dataset, model, **settings):
    """The names of the images that such a training trains on, and of those that it validates on."""
    runs = []
    patch.setattr(LstmCtcOcr, "_train_loop", lambda self, run: runs.append(run) or 0)
    assert main(train(dataset, model, **settings)) == 0
    run = runs[0]
    names = [os.path.basename(path) for path, _ in run.files]
    return {names[row] for row in run.rows}, {names[row] for row in run.held}


def test_what_was_trained_on_is_never_validated_on(dataset, tmp_path, monkeypatch):
    """Whatever --val-num, --seed, the model, and while the folder grows, even far beyond."""
    files, trained = sorted(dataset.glob("*.png")), set()
    for number, count in enumerate((300, 500, 806)):
        folder = tmp_path / str(count)
        folder.mkdir()
        for path in files[:count]:
            shutil.copy2(path, folder)
        for settings in (dict(), dict(val_num=7), dict(val_num=30, seed=3), dict(model=tmp_path / "same")):
            with monkeypatch.context() as patch:
                patch.setattr(LstmCtcOcr, "HELD_NUM", 40)  # from 400 images on, the share shrinks
                rows, held = held_out(patch, folder, **{"model": tmp_path / f"{number}{len(settings)}", **settings})
            assert held and not held & rows
            trained |= rows
            assert not held & trained


def test_a_best_accuracy_on_other_images_is_forgotten(dataset, tmp_path):
    """It would otherwise keep a later, better model from being read with."""
    folder = tmp_path / "train"
    folder.mkdir()
    files = sorted(dataset.glob("*.png"))
    for path in files[:400]:
        shutil.copy2(path, folder)
    assert main(train(folder, tmp_path / "model", epoch_max=0.5)) == 0
    config = config_of(tmp_path / "model")
    config["accuracy"] = 1.0
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    for path in files[400:]:
        shutil.copy2(path, folder)
    assert main(train(folder, tmp_path / "model", epoch_max=0.5)) == 0
    assert config_of(tmp_path / "model")["accuracy"] < 1 and config_of(tmp_path / "model")["best_step"] > config["step"]


# ---- one object for everything

def test_one_object_reads_and_then_trains_and_renders_what_was_asked_for(dataset, tmp_path):
    ocr = LstmCtcOcr(**TASK, **{**NET, "epoch_max": 0.1}, dataset=str(dataset), model="")
    before = dataclasses.asdict(ocr)
    assert ocr.recognise([next(dataset.glob("*.png"))])  # with a shipped model, of another alphabet and net
    own = dataclasses.replace(ocr, model=str(tmp_path / "model"))
    assert own.train() == 0 and config_of(tmp_path / "model")["net"] == "lstm"
    ocr.create_app()
    fresh = dataclasses.replace(ocr, dataset=str(tmp_path / "new"), im_total_num=3)
    fresh._reader
    assert fresh.create_dataset() == 0 and len(list((tmp_path / "new").glob("*.png"))) == 3
    assert dataclasses.asdict(ocr) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        ocr.net = "cnn_lstm"


def test_many_threads_open_one_model_once(trained, dataset):
    ocr, image = LstmCtcOcr(model=str(trained)), next(dataset.glob("*.png"))
    with ThreadPool(8) as pool:
        readers = pool.map(lambda _: (ocr.recognise([image]), id(ocr._reader))[1], range(8))
    assert len(set(readers)) == 1


def test_a_net_that_is_not_the_models_is_refused(trained, dataset, capfd):
    assert main(["test", "--model", str(trained), "--net", "cnn_lstm", str(dataset)]) == 2
    assert "of --net lstm, not cnn_lstm" in capfd.readouterr().err.splitlines()[-1]


def test_training_outside_the_main_thread_works(dataset, tmp_path):
    ocr = LstmCtcOcr(**TASK, **{**NET, "epoch_max": 0.1}, dataset=str(dataset), model=str(tmp_path))
    with ThreadPool(1) as pool:
        assert pool.apply(ocr.train) == 0


def test_fewer_images_than_workers_are_refused(dataset, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(LstmCtcOcr, "_join_cluster", staticmethod(lambda: LstmCtcOcr._Place(workers=3, servers=1)))
    few = tmp_path / "few"
    few.mkdir()
    for path in list(dataset.glob("*.png"))[:2]:
        shutil.copy(path, few)
    assert main(train(few, tmp_path / "model")) == 2
    assert "image" in capfd.readouterr().err.splitlines()[-1]
