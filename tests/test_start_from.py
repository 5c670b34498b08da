"""Training on a few images of one's own: what follows from them, and from the model that it starts from."""

import json
import shutil

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from conftest import TASK, flags

import lstm_ctc_ocr
from lstm_ctc_ocr import LstmCtcOcr, main


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """60 labelled captchas that no model has seen, named as `create_dataset` does."""
    folder = tmp_path_factory.mktemp("own") / "my-captchas"
    assert main(["create_dataset", *flags(dataset=folder, im_total_num=60, seed=5, **TASK)]) == 0
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def train(few, trained, model, **settings):
    return main(["train", *flags(**{**dict(dataset=few, start_from=trained, model=model, epoch_max=10), **settings})])


def test_it_goes_on_from_what_the_other_model_knows(few, trained, tmp_path, capfd, monkeypatch):
    assert train(few, trained, tmp_path / "model") == 0
    config, base = config_of(tmp_path / "model"), config_of(trained)
    assert config["start_from"] == str(trained)
    assert [config[name] for name in ("net", "n_hidden", "im_height")] == ["lstm", 48, 64]
    assert [config[name] for name in ("words", "words_max_num", "im_width")] == ["AX", 3, 96]
    assert config["validated_on"] >= 20  # rather than a tenth of 60
    assert config["accuracy"] >= base["accuracy"] - 0.15  # ten steps or so from nothing read nothing
    said = capfd.readouterr().err
    assert "60 images, labels as in *_LABEL" in said and "1 to 3 letters of AX in 96 x 64 pixels" in said
    assert "few to learn" not in said
    monkeypatch.setattr(LstmCtcOcr, "_start_weights", None)  # goes on, and not from the start again
    assert train(few, trained, tmp_path / "model", epoch_max=12) == 0
    assert config_of(tmp_path / "model")["step"] > config["step"]


def test_letters_keep_their_classes_and_take_those_of_their_other_case(trained):
    """Against the checkpoint itself: a known letter, one whose other case is known, one that is new, and the blank."""
    settings = {**TASK, "words": "Xa7", "n_hidden": 48, "net": "lstm", "start_from": str(trained)}
    weights = LstmCtcOcr(**settings).resolve()._start_weights()
    checkpoint = tf.train.load_checkpoint(str(trained / f"LstmCtcOcr-{config_of(trained)['best_step']}"))
    kernel, bias = (checkpoint.get_tensor(f"dense/{name}/ExponentialMovingAverage") for name in ("kernel", "bias"))
    a, x, blank = 0, 1, 2  # of the words AX
    np.testing.assert_array_equal(weights["dense/kernel"][:, [0, 1, 3]], kernel[:, [x, a, blank]])
    np.testing.assert_array_equal(weights["dense/bias"][[0, 1, 3]], bias[[x, a, blank]])
    new = weights["dense/kernel"][:, 2]
    assert 0 < np.abs(new).max() < np.abs(kernel).max()
    np.testing.assert_array_equal(weights["lstm/kernel"], checkpoint.get_tensor("lstm/kernel/ExponentialMovingAverage"))


@pytest.mark.parametrize("settings, complaint", [
    (dict(net="cnn_lstm"), "has --net lstm, not cnn_lstm"), (dict(n_hidden=64), "has --n-hidden 48, not 64"),
    (dict(im_height=32), "has --im-height 64, not 32"), (dict(start_from="nowhere"), "no model in nowhere")])
def test_what_contradicts_the_start_is_one_line(few, trained, tmp_path, capfd, settings, complaint):
    assert train(few, trained, tmp_path / "model", **settings) == 2
    assert complaint in capfd.readouterr().err.splitlines()[-1] and not (tmp_path / "model" / "checkpoint").exists()


@pytest.mark.parametrize("harm", [lambda file: file.unlink(), lambda file: file.write_bytes(b"torn")])
def test_a_start_without_a_whole_checkpoint_is_one_line(few, trained, tmp_path, capfd, harm):
    shutil.copytree(trained, tmp_path / "start")
    for file in (tmp_path / "start").glob("LstmCtcOcr-*.index"):
        harm(file)
    assert train(few, tmp_path / "start", tmp_path / "model") == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert "is missing, torn or of another network, and there is no other: restore it" in message


def test_another_start_than_before_is_refused(few, trained, tmp_path, capfd):
    shutil.copytree(trained, tmp_path / "model")
    assert train(few, trained, tmp_path / "model") == 2
    assert "was trained with --start-from , not" in capfd.readouterr().err.splitlines()[-1]


def test_the_model_goes_to_the_folder_of_the_datasets_name(few, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("lstm_ctc_ocr.MODELS", tmp_path)
    assert main(["train", *flags(dataset=few, start_from=trained, epoch_max=2)]) == 0
    assert (tmp_path / "my-captchas" / "checkpoint").exists()


def test_all_images_are_trained_on_once_nothing_is_held_out(few, trained, tmp_path, capfd):
    assert train(few, trained, tmp_path / "model", val_num=0, epoch_max=2) == 0
    assert "60 images to train on, 0 held out" in capfd.readouterr().err
    config = config_of(tmp_path / "model")
    assert "accuracy" not in config and config["step"] > 0
    assert main(["test", "--model", str(tmp_path / "model"), str(few)]) == 0


def test_images_of_one_name_are_held_out_by_their_folders(few, trained, tmp_path, capfd):
    lines = []
    for path in few.glob("*.png"):
        number, label = path.stem.split("_")
        (tmp_path / "own" / number).mkdir(parents=True)
        shutil.copy(path, tmp_path / "own" / number / "captcha.png")
        lines.append(f"{number}/captcha.png,{label}\n")
    (tmp_path / "own" / "labels.csv").write_text("".join(lines))
    assert train(tmp_path / "own", trained, tmp_path / "model", epoch_max=1) == 0
    assert "40 images to train on, 20 held out" in capfd.readouterr().err


def test_a_training_that_has_ended_keeps_what_it_knows_and_tells_of_new_images(few, trained, tmp_path, capfd):
    folder = tmp_path / "own"
    shutil.copytree(few, folder)
    assert train(folder, trained, tmp_path / "model") == 0
    before = config_of(tmp_path / "model")
    shutil.copy(tmp_path / "model" / f"LstmCtcOcr-{before['step']}.index",
                tmp_path / "model" / f"LstmCtcOcr-{before['step']} copy.index")
    for number in range(3):
        shutil.copy(next(few.glob("*_A.png")), folder / f"{1000 + number}_A.png")
    assert train(folder, trained, tmp_path / "model", val_num=5, epoch_max=5) == 0
    assert "to learn images that are new too, another --model" in capfd.readouterr().err
    assert all(config_of(tmp_path / "model")[name] == before[name] for name in ("accuracy", "best_step", "step"))


def test_a_training_that_came_to_nothing_says_so(few, tmp_path, capfd):
    assert main(["train", *flags(dataset=few, model=tmp_path, net="lstm", n_hidden=8, epoch_max=1, lr=1e-6)]) == 0
    said = capfd.readouterr().err
    assert "few to learn from nothing" in said and "--start-from general" in said.splitlines()[-1]
    assert "nothing has been learnt yet" in said


def test_distorted_images_stay_images_of_the_same_text():
    """A black disc stays about where it was and about as large; the same draw gives the same; blank stays blank."""
    y, x = np.mgrid[:64, :96]
    disc = np.uint8(255 * ((x - 40) ** 2 + (y - 32) ** 2 < 15 ** 2))
    images = np.stack([disc] * 50)
    first, again = (lstm_ctc_ocr.distort(images, np.random.default_rng(1)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == images.shape and first.dtype == np.uint8
    weights = np.where(first > 100, 1.0, 0)
    assert ((0.6 < weights.sum((1, 2)) / (disc > 100).sum()) & (weights.sum((1, 2)) / (disc > 100).sum() < 1.6)).all()
    centres = np.stack([(weights * axis).sum((1, 2)) / weights.sum((1, 2)) for axis in (x, y)])
    assert (abs(centres - [[40], [32]]) < 14).all() and centres.std(axis=1).min() > 1
    blank = lstm_ctc_ocr.distort(np.zeros((20, 64, 96), np.uint8), np.random.default_rng(2))
    assert np.median(blank) == 0
