"""The real `test` command, on a small model and on the one that ships."""

import functools
import json
import os
import random
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from captcha.image import ImageCaptcha
from conftest import IMAGES, PRETRAINED, ROOT, SHIPPED, flags
from train_general import publish

import lstm_ctc_ocr
from lstm_ctc_ocr import LstmCtcOcr, main


def read(capfd, *arguments):
    """Runs `test`; returns its exit code, its lines and its messages."""
    code = main(["test", *map(str, arguments)])
    output, messages = capfd.readouterr()
    assert "Traceback" not in messages
    return code, output.splitlines(), messages


shipped = pytest.mark.parametrize("net", ["lstm", "cnn_lstm"])


@shipped
def test_the_shipped_models_read_the_samples(net, capfd):
    code, lines, _ = read(capfd, "--model", PRETRAINED / net)
    assert code == 0
    assert [line.split()[0] for line in lines[:3]] == ["PIY", "BCAVDPXT", "N"]
    assert all(line.endswith("right") for line in lines[:3]) and "accuracy 100.00% (3 of 3)" in lines[4]


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unseen")
    assert main(["create_dataset", *flags(dataset=folder, im_total_num=400, seed=77)]) == 0
    return folder


@pytest.mark.parametrize("bfloat16", [False, pytest.param(True, marks=pytest.mark.skipif(
    not lstm_ctc_ocr._has_bfloat16(), reason="this processor has no bfloat16 instructions"))])
@pytest.mark.parametrize("net, share", [("lstm", 0.94), ("cnn_lstm", 0.98)])
def test_the_shipped_models_read_what_they_never_saw(net, share, bfloat16, unseen, capfd, monkeypatch):
    monkeypatch.setattr(lstm_ctc_ocr, "_has_bfloat16", lambda: bfloat16)
    code, lines, _ = read(capfd, "--model", PRETRAINED / net, "--json", unseen)
    answers = [json.loads(line) for line in lines]
    assert code == 0 and len(answers) == 400
    right = sum(answer["img_path"].endswith(f"_{answer['ocr_ret']}.png") for answer in answers)
    assert right >= share * 400  # the article: 0.84
    assert sum(answer["confidence"] for answer in answers) == pytest.approx(right, abs=16)  # it means what it says


@shipped
def test_the_shipped_models_are_small_and_hold_no_optimiser_slots(net):
    names = [name for name, _ in tf.train.list_variables(str(PRETRAINED / net))]
    assert names and all(name.endswith("/ExponentialMovingAverage") for name in names)
    assert sum(file.stat().st_size for file in (PRETRAINED / net).iterdir()) < 2e6
    assert json.loads((PRETRAINED / net / "config.json").read_text())["accuracy"] > 0.95


def test_lines_figures_and_order(trained, dataset, engine, capfd):
    """A line an image in the order of their numbers, whatever batch it was in; the figures follow from the lines."""
    code, lines, _ = read(capfd, "--model", engine(trained), dataset)
    assert code == 0
    rows = [line.split() for line in lines[:IMAGES]]
    assert [row[-2] for row in rows] == [path.stem.split("_")[1] for path in
                                         sorted(dataset.glob("*.png"), key=lambda path: int(path.name.split("_")[0]))]
    assert all((row[-1] == "right") == (row[0] == row[-2]) for row in rows)
    right = sum(row[-1] == "right" for row in rows)
    assert f"accuracy {right / IMAGES:.2%} ({right} of {IMAGES})" in lines[IMAGES + 1]
    assert lines[IMAGES + 2].startswith("by length") and lines[IMAGES + 3].startswith("by repeats")


@pytest.mark.parametrize("net, width", [("lstm", 64), ("cnn_lstm", 128)])  # 19 steps take 19 and 76 columns
def test_the_network_is_given_no_more_paper_than_fills_a_square(net, width):
    def read_width(ocr, size):
        data = cv2.imencode(".png", np.zeros(size, np.uint8))[1].tobytes()
        return ocr._read_width(ocr.load_colours(data).shape[1])

    ocr = LstmCtcOcr(net=net).resolve()
    sizes = {(64, 10): width, (64, 128): 128, (64, 129): 192, (60, 160): 192, (90, 180): 128, (64, 256): 256,
             (40, 400): 256}
    assert {size: read_width(ocr, size) for size in sizes} == sizes
    assert read_width(LstmCtcOcr(net=net, im_width=100).resolve(), (64, 90)) == 100


@pytest.mark.parametrize("width, afar, near", [(128, 111, 166), (192, 167, 250), (256, 223, 256)])
def test_a_doubtful_image_is_viewed_from_afar_and_from_near(width, afar, near):
    """Narrower, and as much larger as there is room for, in the squares that hold it; its strokes at full strength."""
    ink = np.zeros((64, width, 2), np.uint8)
    ink[24:40, 8:width, 0] = 200
    ocr = LstmCtcOcr(net="wide_cnn_lstm").resolve()
    smaller = width * 0.8
    views = ocr._from_afar, functools.partial(ocr._zoomed, 1.3), functools.partial(ocr._zoomed, 0.8)
    viewed = [ocr._viewed(view, [ink]) for view in views]
    assert [images.shape for images in viewed] == [(1, 64, -(-seen // 64) * 64, 2) for seen in (afar, near, smaller)]
    for (image,), seen, high in zip(viewed, (afar, near, smaller), (16, 16 * 1.3, 16 * 0.8)):
        assert image.max() == 255 and not image[..., 1].any()
        down, right = np.nonzero(image[..., 0] > 127)
        assert abs(right.max() + 1 - seen) <= 2 and abs(down.max() + 1 - down.min() - high) <= 2
        assert abs((down.min() + down.max() + 1) / 2 - 32) <= 1


def test_dots_run_together_from_afar_and_strokes_that_touch_part_from_near():
    dots, strokes = np.zeros((2, 64, 128, 2), np.uint8)
    dots[8:56:3, 20:100:3] = 255
    strokes[8:56, 20:60] = strokes[8:56, 61:100] = 255
    strokes[30, 60] = 255  # they touch by a hair
    ocr = LstmCtcOcr(net="wide_cnn_lstm").resolve()
    afar = ocr._viewed(ocr._from_afar, [dots])
    assert afar[0, 16:48, 26:80].min() > 150
    near = ocr._viewed(functools.partial(ocr._zoomed, 1.3), [strokes])
    assert near[0, :, 60:100].max(axis=0).min() < 150


@pytest.mark.parametrize("net, views", [("lstm", 1), ("cnn_lstm", 1), ("wide_cnn_lstm", 6)])
def test_only_the_net_that_knows_captchas_of_many_kinds_views_them_again(net, views):
    ocr, seen = LstmCtcOcr(net=net).resolve(), []

    def infer(images):
        seen.append(images)
        return np.zeros((12, len(images), len(ocr.words) + 1))  # every class as likely as any other

    ocr._read(infer, np.zeros((1, *ocr._shape), np.uint8), ocr.restrict())
    assert len(seen) == views


@pytest.mark.parametrize("paper, clutter, letter", [
    ((1, 1, .9), (.2, .5, .2), (.3, .2, .7)), ((.1, .1, .1), (.1, .6, .9), (.9, .5, .2))])
def test_without_clutter_a_grid_of_another_colour_goes_and_pale_letters_stay(paper, clutter, letter):
    colours = np.full((64, 128, 3), paper, np.float32)
    colours[:, 5::12] = colours[3::12] = clutter
    letters = np.zeros((64, 128), bool)
    letters[20:44, 20:26] = letters[20:44, 70:76] = letters[38:44, 20:50] = True
    colours[letters] = letter
    colours[:, 64:][letters[:, 64:]] = .4 * np.array(paper) + .6 * np.array(letter)  # the second is paler
    ink, clear = np.moveaxis(LstmCtcOcr(net="wide_cnn_lstm").resolve().ink_of(colours)[:, :128], 2, 0)
    np.testing.assert_array_equal(clear > 127, letters)
    assert (ink > 127).sum() > 2 * letters.sum()
    np.testing.assert_array_equal(LstmCtcOcr(net="lstm").resolve().ink_of(colours)[:, :128], ink)


@pytest.mark.parametrize("channels", [1, 3])
def test_without_clutter_ink_of_one_colour_stays(channels):
    colours = np.full((64, 128, channels), .9, np.float32)
    colours[10:50, 20:28] = colours[30, :] = .2
    colours[10:50, 60:68] = .5
    ink, clear = np.moveaxis(LstmCtcOcr(net="wide_cnn_lstm").resolve().ink_of(colours), 2, 0)
    np.testing.assert_array_equal(ink, clear)


def test_blank_paper_stays_blank_in_every_view():
    ocr = LstmCtcOcr(net="wide_cnn_lstm").resolve()
    colours = np.full((64, 128, 3), .5, np.float32)
    zoomed = [functools.partial(ocr._zoomed, factor) for factor in (0.8, 1.5)]
    for view in ocr._from_afar, ocr._clear, *zoomed:
        assert not ocr._viewed(view, [ocr.ink_of(colours)[:, :128]]).any()


def test_images_of_many_widths_are_read_as_each_alone(engine):
    """Their order is kept, although those of one width are read together."""
    ocr = LstmCtcOcr(model=str(engine(PRETRAINED / "general")))
    random.seed(0)  # captcha draws from there
    images = [ImageCaptcha(width, 64).generate(text).read() for text in ("PIY", "X7", "ABCD") for width in
              (256, 120, 190)]
    restrictions = [ocr._reader.ocr.restrict(length="3")] * 3 + [ocr._reader.restriction] * 6
    together = ocr._read_each(images, restrictions)
    for image, each, (text, confidence) in zip(images, restrictions, together):
        (expected, sure), = ocr._read_each([image], [each])
        assert text == expected and confidence == pytest.approx(sure, abs=.02)
    assert {text.upper() for text, _ in together} >= {"PIY", "ABCD"}


def test_an_unreadable_file_does_not_stop_the_others(trained, dataset, engine, tmp_path, capfd):
    model = engine(trained)
    good = sorted(dataset.glob("*.png"))[:2]
    bad = tmp_path / "5_AX.png"
    bad.write_bytes(b"not an image")
    code, lines, messages = read(capfd, "--model", model, good[0], bad, tmp_path / "gone.png", good[1])
    assert code == 1 and "5_AX.png: not a whole image" in messages and "gone.png: No such file" in messages
    assert [line.split()[2] for line in lines[:2]] == [str(path) for path in good] and "of 2)" in lines[3]
    code, lines, _ = read(capfd, "--model", model, "--json", good[0], bad)
    first, second = map(json.loads, lines)
    assert code == 1 and list(first) == ["img_path", "ocr_ret", "confidence"] and list(second) == ["img_path", "error"]


def test_a_file_without_a_label_is_read_all_the_same(trained, dataset, tmp_path, capfd):
    shutil.copy(next(dataset.glob("*.png")), tmp_path / "captcha.png")
    code, lines, _ = read(capfd, "--model", trained, tmp_path)
    assert code == 0 and len(lines) == 1 and lines[0].endswith("captcha.png")
    (tmp_path / "captcha.png").rename(tmp_path / "a\nb\x1b[31m.png")
    (tmp_path / "c\nd.png").touch()
    code, lines, messages = read(capfd, "--model", trained, tmp_path)
    assert code == 1 and lines[0].endswith('a\\nb\\u001b[31m.png') and len(lines) == 1
    assert 'c\\nd.png: not a whole image' in messages.splitlines()[1]


def test_the_architecture_comes_from_the_model(trained, dataset, engine):
    """Not from the defaults: the small model has other letters, sizes and cells."""
    ocr = LstmCtcOcr(model=str(engine(trained)))
    path = next(dataset.glob("*.png"))
    (_, text, confidence, fault), = ocr.recognise_files([path])
    assert fault is None and set(text) <= set("AX") and 0 < confidence <= 1
    known = ocr._reader.ocr
    assert (known.words, known.im_width, known.n_hidden) == ("AX", 96, 48)


def cut_in_half(folder):
    for data in folder.glob("*.data-*"):
        data.write_bytes(data.read_bytes()[:data.stat().st_size // 2])


def changed(**settings):
    """Gives a model folder other settings than its weights were trained with."""
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))

    return change


@pytest.mark.parametrize("harm, complaint", [
    (changed(n_hidden=32), "not those of the network that its config.json"),
    (changed(words="AXY"), "not those of the network that its config.json"),
    (changed(net="cnn_lstm"), "not those of the network that its config.json"),
    (lambda folder: shutil.rmtree(folder), "no model in"),
    (lambda folder: (folder / "config.json").write_text('{"format": 1,'), "config.json cannot be read"),
    (changed(paper="brightest"), "config.json is not what this version writes"),
    (changed(format=99), "config.json is not what this version writes"),
    (lambda folder: (folder / "config.json").write_text('[]'), "config.json is not what this version writes"),
    (cut_in_half, "missing, torn or of another network"),
    (lambda folder: [path.unlink() for path in folder.glob("LstmCtcOcr-*")], "missing, torn or of another network"),
])
def test_a_harmed_model_is_one_clear_line(trained, tmp_path, capfd, harm, complaint):
    folder = tmp_path / "model"
    shutil.copytree(trained, folder)
    harm(folder)
    code, lines, messages = read(capfd, "--model", folder)
    assert code == 2 and lines == [] and len(messages.splitlines()) == 1
    assert re.search(complaint, messages)


def test_what_the_user_trained_is_read_with_from_then_on(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("lstm_ctc_ocr.MODELS", tmp_path)
    def read_with(**settings):
        return str(LstmCtcOcr(**settings)._model_to_read().relative_to(tmp_path))

    assert read_with() == "pretrained/general" and read_with(net="lstm") == "pretrained/lstm"
    (tmp_path / "lstm").mkdir()
    assert read_with() == "pretrained/general"  # nothing in it yet
    shutil.copytree(trained, tmp_path / "lstm", dirs_exist_ok=True)
    assert read_with() == read_with(net="lstm") == "lstm" and read_with(net="cnn_lstm") == "pretrained/cnn_lstm"
    shutil.copytree(trained, tmp_path / "cnn_lstm")
    os.utime(tmp_path / "cnn_lstm" / "checkpoint", (0, 0))
    assert read_with() == "lstm" and read_with(net="cnn_lstm") == "cnn_lstm"  # the last one trained, or the one named


def test_a_model_that_never_learnt_does_not_take_over_silently(trained, tmp_path, monkeypatch, capfd):
    shutil.copytree(PRETRAINED, tmp_path / "pretrained")
    shutil.copytree(trained, tmp_path / "lstm")
    path = tmp_path / "lstm" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "accuracy": 0.03}))
    monkeypatch.setattr("lstm_ctc_ocr.MODELS", tmp_path)
    assert main(["test"]) == 0
    passed, reading, _ = capfd.readouterr().err.splitlines()
    assert "lstm is passed over: it read only 3.0% of its held-out images" in passed
    assert "reading with" in reading and "pretrained/general" in reading
    assert main(["test", "--model", str(tmp_path / "lstm")]) == 0  # asked for, it reads
    assert "3.0% of" in capfd.readouterr().err


def test_a_shipped_model_is_had_by_its_name(capfd):
    assert main(["test", "--model", "lstm"]) == 0
    captured = capfd.readouterr()
    assert "my-model/pretrained/lstm" in captured.err and "3 of 3" in captured.out


@pytest.mark.parametrize("name, value", [("n_hidden", "48"), ("words", 7), ("length", 4)])
def test_a_config_of_another_type_is_one_line(name, value, trained, tmp_path, capfd):
    shutil.copytree(trained, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    assert main(["test", "--model", str(tmp_path / "model")]) == 2
    message, = capfd.readouterr().err.splitlines()
    assert "config.json" in message


def test_the_config_is_read_once_before_the_weights(trained, tmp_path, monkeypatch):
    """A training beside it writes a newer one meanwhile: its accuracy and step are not those of what was loaded."""
    shutil.copytree(trained, tmp_path / "model")
    restore = LstmCtcOcr._restore

    def train_on(self, *args):
        path = tmp_path / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "accuracy": 1.0, "best_step": 999, "words": "QY"}))
        return restore(self, *args)

    monkeypatch.setattr(LstmCtcOcr, "_restore", train_on)
    reader = LstmCtcOcr(model=str(tmp_path / "model"))._reader
    assert reader.config["accuracy"] < 1 and reader.config["best_step"] != 999 and reader.ocr.words == "AX"


def test_publishing_over_a_training_is_refused(trained, tmp_path):
    with LstmCtcOcr()._alone_in(tmp_path / "other"):
        before = sorted(path.name for path in (tmp_path / "other").iterdir())
        with pytest.raises(LstmCtcOcr.Error, match="another training is at work"):
            publish(trained, tmp_path / "other")
        assert sorted(path.name for path in (tmp_path / "other").iterdir()) == before


def test_letters_and_length_that_are_known_restrict_the_reading(engine, capfd):
    sample = ROOT / "dataset" / "test" / "0_PIY.png"

    def answer(*arguments):
        code, (line,), _ = read(capfd, "--model", engine(SHIPPED), "--json", *arguments, sample)
        assert code == 0
        return json.loads(line)["ocr_ret"], json.loads(line)["confidence"]

    text, confidence = answer()
    assert text == "PIY" and confidence > 0.9
    assert answer("--length", "3") == answer("--letters", "YIP", "--length", "2-4") == (text, confidence)
    assert answer("--letters", "ipy") == ("piy", confidence)  # the model knows capitals
    for length in (1, 2, 4, 10):
        text, confidence = answer("--length", length)
        assert len(text) == length and confidence < 0.1  # found, and honest
    text, confidence = answer("--letters", "ABC")
    assert set(text) <= set("ABC") and confidence < 0.1


def test_images_unlike_what_was_learnt_are_named_as_such(capfd):
    """The remedy too."""
    assert len(read(capfd, "--model", SHIPPED)[2].splitlines()) == 2  # what it reads with, and how files are labelled
    _, lines, messages = read(capfd, "--model", SHIPPED, "--length", 5)  # the samples have 1, 3 and 8 letters
    assert len(messages.splitlines()) == 3 and "do not look like what this model has learnt" in messages
    assert "--model general" in messages and "--start-from general" in messages
    assert "accuracy 0.00% (0 of 3)" in lines[4]


def test_a_temperature_in_the_model_makes_it_less_sure(tmp_path, engine, capfd):
    shutil.copytree(SHIPPED, tmp_path / "model")
    config = json.loads((SHIPPED / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "temperature": 3.0}))
    sure, unsure = ([json.loads(line) for line in read(capfd, "--model", engine(folder), "--json")[1]]
                    for folder in (SHIPPED, tmp_path / "model"))
    assert [answer["ocr_ret"] for answer in sure] == [answer["ocr_ret"] for answer in unsure]
    assert all(a["confidence"] > b["confidence"] + 0.1 for a, b in zip(sure, unsure))


def test_publishing_keeps_the_readings_and_drops_the_rest(trained, dataset, tmp_path):
    files = sorted(dataset.glob("*.png"))[:20]
    publish(trained, tmp_path / "small")
    before, after = (list(LstmCtcOcr(model=str(folder)).recognise_files(files))
                     for folder in (trained, tmp_path / "small"))
    assert before == after
    size = lambda folder: sum(path.stat().st_size for path in folder.glob("*.data-*"))  # noqa: E731
    assert size(tmp_path / "small") < size(trained) / 2


@pytest.mark.parametrize("arguments, complaint", [
    (["test", "--model", str(SHIPPED), "tests/tools"], "no images in"),
    (["test", "--beam-width", "0"], "--beam-width must be 1 to 100"),
    (["test", "--model", str(SHIPPED), "--letters", "AB7"], "this model does not know '7'"),
    (["test", "--model", str(SHIPPED), "--length", "9-11"], "from 1 to this model's 10, not '9-11'"),
    (["start", "--model", str(SHIPPED), "--port", "0", "--length", "some"], "length must be N or MIN-MAX"),
    (["create_dataset", "--words", "AA"], "each of them once"),
    (["start", "--image-root", "nowhere"], "--image-root nowhere is not a folder"),
    (["start", "--model", str(SHIPPED), "--port", "70000"], "--port must be 0 to 65,535, not 70000"),
])
def test_wrong_use_is_one_line_and_exit_code_2(arguments, complaint, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    messages = capfd.readouterr().err
    assert complaint in messages and len(messages.splitlines()) == 1


def test_it_reads_with_its_messages_closed():
    code = f"exec {sys.executable} lstm_ctc_ocr.py test --model cnn_lstm --json 2>&-"
    process = subprocess.run(["sh", "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.returncode == 0 and len([json.loads(line) for line in process.stdout.splitlines()]) == 3


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train", "--epoch-max", "many"], ["test", "--n-hidden", "3"]])
def test_unknown_words_on_the_command_line_exit_with_2(arguments, capfd):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_constructing_is_free():
    """No TensorFlow, no file, no font: rendering's worker processes rely on it."""
    code = "import sys, lstm_ctc_ocr; lstm_ctc_ocr.LstmCtcOcr(); assert 'tensorflow' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
