"""Model folders: any path will do, each knows its images, the best checkpoint is kept, and training ends in time."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import NET, ROOT, TASK, flags

from lstm_ctc_ocr import LstmCtcOcr, main

SAMPLE = str(ROOT / "dataset" / "test" / "0_PIY.png")


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """60 labelled captchas."""
    folder = tmp_path_factory.mktemp("own") / "my-captchas"
    assert main(["create_dataset", *flags(dataset=folder, im_total_num=60, seed=5, **TASK)]) == 0
    return folder


# ---- any path

@pytest.mark.parametrize("name", ["code [work]", r"a\b *?", os.fsdecode(b"caf\xe9[1]")])
def test_models_are_read_trained_and_exported_in_any_path(name, few, trained, tmp_path, capfd):
    """TensorFlow takes the path of a checkpoint for a pattern, and knows no other paths than those in UTF-8."""
    place = tmp_path / name
    shutil.copytree(few, place / "few")
    shutil.copytree(trained, place / "model")
    assert main(["test", "--model", str(place / "model"), SAMPLE]) == 0
    assert main(["train", *flags(dataset=place / "few", start_from=place / "model", model=place / "new",
                                 epoch_max=1)]) == 0
    assert main(["train", *flags(dataset=place / "few", start_from=place / "model", model=place / "new",
                                 epoch_max=2)]) == 0
    assert re.search("from step [1-9]", capfd.readouterr().err)
    assert main(["test", "--model", str(place / "new"), SAMPLE]) == 0
    assert main(["export", "--model", str(place / "new"), str(place / "exported")]) == 0
    assert (place / "exported" / "saved_model.pb").stat().st_size > 10_000
    assert "missing" not in capfd.readouterr().err and not list(place.glob("*/.*.part"))


# ---- whose model it is

def test_a_model_folder_knows_its_images_wherever_they_are_and_refuses_others(few, trained, tmp_path, capfd,
                                                                             monkeypatch):
    monkeypatch.setattr("lstm_ctc_ocr.MODELS", tmp_path / "models")
    model = tmp_path / "models" / "train"

    def train(site, **settings):
        return main(["train", *flags(dataset=tmp_path / site / "train", start_from=trained, epoch_max=1, **settings)])

    shutil.copytree(few, tmp_path / "a" / "train")
    assert main(["create_dataset", *flags(dataset=tmp_path / "b" / "train", im_total_num=60, seed=6, **TASK)]) == 0
    assert train("a") == 0
    (tmp_path / "a").rename(tmp_path / "moved")
    for path in sorted((tmp_path / "b" / "train").glob("*.png"))[:30]:
        shutil.copy(path, tmp_path / "moved" / "train" / f"9{path.name}")
    before = config_of(model)
    assert train("moved") == 0  # moved and grown, it is still the same
    capfd.readouterr()
    shutil.copytree(few, tmp_path / "c" / "train")
    for number, path in enumerate((tmp_path / "c" / "train").glob("*.png")):
        path.rename(path.with_name(f"{number}.png"))
    (tmp_path / "c" / "train" / "labels.csv").write_text("".join(f"{number}.png,AX\n" for number in range(60)))
    assert train("c") == 2
    message, = capfd.readouterr().err.splitlines()
    assert str(model) in message and "other images than those in" in message and "with --model" in message
    assert config_of(model)["step"] >= before["step"]
    assert train("c", model=model) == 0 and "of the held-out" not in capfd.readouterr().err  # no figure of others


def test_a_model_without_held_out_images_is_read_with(trained, tmp_path, monkeypatch, capfd):
    shutil.copytree(trained, tmp_path / "lstm")
    config = {**config_of(trained), "held_share": 0}
    del config["accuracy"]
    (tmp_path / "lstm" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("lstm_ctc_ocr.MODELS", tmp_path)
    assert main(["test", SAMPLE]) == 0
    assert "passed over" not in capfd.readouterr().err


def test_of_a_shipped_model_is_said_what_it_reads(capfd):
    assert main(["test", "--model", "lstm", SAMPLE]) == 0
    assert "pretrained/lstm (1 to 10 capitals, as create_dataset draws them)" in capfd.readouterr().err
    assert "letters and digits" in config_of(ROOT / "my-model" / "pretrained" / "general")["about"]


# ---- the best one, and the end

@pytest.fixture
def validate(monkeypatch):
    """Makes a training validate at every second step, and find so many of 20 images right and such losses."""
    def set_up(*rights, train_loss=1.0):
        monkeypatch.setattr(LstmCtcOcr, "REPORT_STEPS", 2)
        monkeypatch.setattr(LstmCtcOcr, "VALIDATION_SHARE", 1e9)
        monkeypatch.setattr(LstmCtcOcr, "LEARNT", 1e9 if train_loss == 0 else 0)
        left = list(rights)

        def found(self, run):
            right = left.pop(0) if left else rights[-1]
            return ["A"] * 20, ["A"] * right + ["X"] * (20 - right), 1.0, 1.0

        monkeypatch.setattr(LstmCtcOcr, "_validate", found)

    return set_up


def test_the_most_accurate_checkpoint_is_the_best_and_of_equal_ones_the_later(few, trained, tmp_path, capfd, validate):
    validate(10, 15, 12, 15, 14)
    assert main(["train", *flags(dataset=few, start_from=trained, model=tmp_path, epoch_max=10)]) == 0
    config = config_of(tmp_path)
    assert (config["best_step"], config["accuracy"], config["step"]) == (8, 0.75, 10)
    assert "held-out images it reads 15 of 20" in capfd.readouterr().err


@pytest.mark.parametrize("right, train_loss, steps", [(20, 0, 2), (20, 1, 10), (19, 0, 10)])
def test_training_ends_once_all_is_read_right_and_learnt(right, train_loss, steps, few, trained, tmp_path, capfd,
                                                         validate):
    validate(right, train_loss=train_loss)
    assert main(["train", *flags(dataset=few, start_from=trained, model=tmp_path, epoch_max=10)]) == 0
    assert config_of(tmp_path)["step"] == steps
    assert ("it has ended early: it reads all of them" in capfd.readouterr().err) == (steps < 10)


def test_train_says_how_long_it_took_and_will_take(few, trained, tmp_path, capfd, validate):
    validate(10)
    minutes = []
    for epochs in 4, 8:
        assert main(["train", *flags(dataset=few, start_from=trained, model=tmp_path, epoch_max=epochs)]) == 0
        said = capfd.readouterr().err
        assert re.search(r"step 2 .* images/s  \d+\.\d CPU minutes, \d+\.\d minutes left", said) or minutes
        assert re.search(fr"^{epochs} steps done in \d+\.\d CPU minutes;", said, re.MULTILINE)
        minutes.append(config_of(tmp_path)["cpu_minutes"])
    assert 0 < minutes[0] < minutes[1]


# ---- where almost nothing may be written

def test_a_read_only_dataset_trains_where_there_is_no_folder_for_temporary_files(few, trained, tmp_path):
    folder = tmp_path / "closed"
    shutil.copytree(few, folder)
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555)
    command = ["train", *flags(dataset=folder, model=tmp_path / "model", **{**NET, "epoch_max": 0.1, "batch_size": 8})]
    code = ("import sys, tempfile; tempfile._candidate_tempdir_list = lambda: []\n"
            f"from lstm_ctc_ocr import main; sys.exit(main({command}))")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
