"""Learning from images without labels: what is read surely is learnt, and read again, round by round."""

import csv
import json
import random
import shutil

import numpy as np
import pytest
from captcha.image import ImageCaptcha
from conftest import SHIPPED, TASK, flags

import lstm_ctc_ocr
from lstm_ctc_ocr import LstmCtcOcr, main


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """150 captchas whose names say nothing, and what they show: (folder, {name: text})."""
    drawn, folder = tmp_path_factory.mktemp("drawn"), tmp_path_factory.mktemp("own") / "captchas"
    assert main(["create_dataset", *flags(dataset=drawn, im_total_num=150, seed=6, **TASK)]) == 0
    folder.mkdir()
    texts = {f"image-{number:05}.png": path.stem.split("_")[1] for number, path in
             enumerate(sorted(drawn.glob("*.png")))}
    for name, path in zip(texts, sorted(drawn.glob("*.png"))):
        shutil.copy(path, folder / name)
    return folder, texts


def train(folder, trained, model, *more, **settings):
    return main(["train", *flags(dataset=folder, start_from=trained, model=model, epoch_max=4, **settings), *more])


def taught(model):
    with open(model / "taught.csv", newline="") as file:
        return [*csv.DictReader(file)]


def test_it_learns_from_what_it_reads_surely_and_from_nothing_else(images, trained, tmp_path, capfd):
    (folder, texts), model = images, tmp_path / "model"
    before = sorted(folder.iterdir())
    assert train(folder, trained, model, rounds=2) == 0
    rows, config, said = taught(model), json.loads((model / "config.json").read_text()), capfd.readouterr().err
    assert {row["round"] for row in rows} == {"2"} and 20 <= len(rows) < 150
    assert all(float(row["confidence"]) >= .7 for row in rows)
    assert sum(row["text"] == texts[row["path"]] for row in rows) > .8 * len(rows)
    assert f"round 2 of 2: {len(rows)} of " in said and "accuracy" not in config
    assert 0 < config["expected"] <= 1 and f"{config['expected']:.0%} right" in said
    assert sorted(folder.iterdir()) == before
    assert main(["test", "--model", str(model), str(folder)]) == 0


def test_labels_count_more_and_are_never_read_anew(images, trained, tmp_path, capfd, monkeypatch):
    (folder, texts), own, shown = images, tmp_path / "own", []
    shutil.copytree(folder, own)
    labelled = dict(list(texts.items())[:40])
    (own / "labels.csv").write_text("".join(f"{name},{text}\n" for name, text in labelled.items()))
    feeds = LstmCtcOcr._feeds
    monkeypatch.setattr(LstmCtcOcr, "_feeds", lambda self, run, rows: [
        shown.extend(run.files[row] for row in rows), feeds(self, run, rows)][1])
    assert train(own, trained, tmp_path / "model", rounds=1) == 0
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["validated_on"] == 20 and 0 < config["accuracy"] <= 1 and 0 < config["expected"] <= 1
    names = {row["path"] for row in taught(tmp_path / "model")}
    assert names and not names & {*labelled}
    counts = {True: 0, False: 0}
    for path, text in shown:
        name = path.rpartition("/")[2]
        counts[name in labelled] += 1
        assert text == labelled.get(name, text) and (name in labelled or name in names)
    assert counts[True] >= .25 * counts[False]  # 20 labels beside some 100 readings


@pytest.mark.parametrize("number", [1, 2])
def test_an_interrupted_round_goes_on_with_what_it_had_read(images, trained, tmp_path, number, monkeypatch, capfd):
    (folder, _), model, step = images, tmp_path / "model", LstmCtcOcr._between_steps

    def killed(self, run, before, feeds):
        step(self, run, before, feeds)
        if json.loads((model / "config.json").read_text()).get("step", 0) and len(starts) == number:
            raise RuntimeError("killed")

    starts, note = [], LstmCtcOcr._note_guesses
    monkeypatch.setattr(LstmCtcOcr, "_note_guesses", lambda self, folder, rows: [
        starts.append(rows[0][-1]), note(self, folder, rows)])
    monkeypatch.setattr(LstmCtcOcr, "_between_steps", killed)
    with pytest.raises(RuntimeError):
        train(folder, trained, model, rounds=2)
    before = json.loads((model / "config.json").read_text())
    assert starts == [*range(1, number + 1)] and before["round"] == number
    monkeypatch.setattr(LstmCtcOcr, "_between_steps", step)
    assert train(folder, trained, model, rounds=2) == 0
    after = json.loads((model / "config.json").read_text())
    assert starts == [*range(1, number + 1), *range(number, 3)]
    assert after["round"] == 2 and after["step"] > before["step"] and after["words"] == before["words"]


def test_what_cannot_be_read_at_all_is_one_line(trained, tmp_path, capfd):
    noise = np.random.default_rng(0)
    (tmp_path / "noise").mkdir()
    for number in range(40):
        lstm_ctc_ocr.cv2.imwrite(str(tmp_path / "noise" / f"image-{number:05}.png"),
                                 noise.integers(0, 255, (64, 96, 3), np.uint8))
    assert train(tmp_path / "noise", trained, tmp_path / "model") == 2
    *_, said, few, message = capfd.readouterr().err.splitlines()
    assert "round 1 of 3: 0 of 36 images without a label are read surely" in said
    assert few == "these are too few to learn from" and "no labelled images" in message
    assert not [*(tmp_path / "model").glob("*.index")]


def test_a_folder_of_several_kinds_is_told(images, trained, tmp_path, capfd, monkeypatch):
    own = tmp_path / "own"
    shutil.copytree(images[0], own)
    for number, path in enumerate(sorted(own.iterdir())[::3]):
        lstm_ctc_ocr.cv2.imwrite(str(path), lstm_ctc_ocr.cv2.imread(str(path))[4:-4])
    monkeypatch.setattr(LstmCtcOcr, "_train", lambda *args: 1)
    assert train(own, trained, tmp_path / "model") == 1
    assert "the images have several heights" in capfd.readouterr().err


def test_rounds_0_learns_from_labels_alone(images, trained, tmp_path, capfd):
    assert train(images[0], trained, tmp_path / "model", rounds=0) == 2
    assert "no labelled images" in capfd.readouterr().err


def sure(*texts):
    return [(text, .9) for text in texts]


@pytest.mark.parametrize("readings, expected", [
    (sure(*["12345", "67890"] * 20), ("0123456789", "5-5")),
    (sure(*["AB12C", "QR3T"] * 20), (lstm_ctc_ocr.CAPITALS + "0123456789", "4-5")),
    (sure(*["abcde"] * 95, *["abcdef"] * 5), (lstm_ctc_ocr.CAPITALS.lower(), "5-5")),  # one letter too many
    (sure(*["ABQT"] * 95, "cOsO", "OO0O", "ABgT"), (lstm_ctc_ocr.CAPITALS, "4-4")),  # look like capitals
    (sure(*["1234"] * 19) + [("ABC", .6)] * 50, ("", "")),
], ids=["digits", "capitals and digits", "lengths", "letters of one shape", "too few"])
def test_what_texts_have_in_common(readings, expected):
    ocr = LstmCtcOcr(words=lstm_ctc_ocr.CAPITALS + lstm_ctc_ocr.CAPITALS.lower() + "0123456789").resolve()
    assert ocr.alike(readings) == LstmCtcOcr.Restriction(*expected)


def test_images_read_alike_say_what_they_have_in_common(tmp_path, capfd):
    random.seed(0)  # captcha draws from there
    for number in range(24):
        (tmp_path / f"{number}.png").write_bytes(ImageCaptcha(256, 64).generate("KMXT").read())
    assert main(["test", "--alike", "--model", str(SHIPPED), str(tmp_path)]) == 0
    out, err = capfd.readouterr()
    assert f"expecting 4-4 letters, of {lstm_ctc_ocr.CAPITALS}" in err
    assert [line.split()[0] for line in out.splitlines()] == ["KMXT"] * 24
