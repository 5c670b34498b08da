"""Learning from images without labels: what is read surely is learnt, and read again, round by round."""

import csv
import json
import random
import re
import shutil

import numpy as np
import pytest
from captcha.image import ImageCaptcha
from conftest import PRETRAINED, SHIPPED, TASK, flags

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


@pytest.fixture
def two_rounds(monkeypatch):
    monkeypatch.setattr(LstmCtcOcr, "ROUNDS", 2)


def train(folder, trained, model, *more, **settings):
    return main(["train", *flags(dataset=folder, start_from=trained, model=model, epoch_max=4, **settings), *more])


def taught(model):
    with open(model / "taught.csv", newline="") as file:
        return [*csv.DictReader(file)]


def test_it_learns_from_what_it_reads_surely_and_from_nothing_else(images, trained, tmp_path, capfd, two_rounds):
    (folder, texts), model = images, tmp_path / "model"
    before = sorted(folder.iterdir())
    assert train(folder, trained, model) == 0
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
    monkeypatch.setattr(LstmCtcOcr, "ROUNDS", 1)
    monkeypatch.setattr(LstmCtcOcr, "_feeds", lambda self, run, rows: [
        shown.extend(run.files[row] for row in rows), feeds(self, run, rows)][1])
    assert train(own, trained, tmp_path / "model") == 0
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
    monkeypatch.setattr(LstmCtcOcr, "_feeds", feeds)
    assert train(own, trained, tmp_path / "model") == 0  # there is nothing left to do
    again = json.loads((tmp_path / "model" / "config.json").read_text())
    assert [again[name] for name in ("accuracy", "validated_on", "expected")] == [
        config[name] for name in ("accuracy", "validated_on", "expected")]


def test_it_keeps_three_tenths_of_what_it_started_from(images, trained, tmp_path, monkeypatch, two_rounds):
    (folder, _), rounds, keep = images, [], LstmCtcOcr._keep_of_start

    def weights(run):
        variables = lstm_ctc_ocr._tensorflow().global_variables()
        return {name: run.session.run(variable) for variable in variables
                if (name := variable.op.name).startswith("lstm") and name.endswith(LstmCtcOcr.AVERAGE)}

    def watch(self, run):
        before = weights(run)
        keep(self, run)
        rounds.append((before, weights(run)))

    monkeypatch.setattr(LstmCtcOcr, "_keep_of_start", watch)
    assert train(folder, trained, tmp_path / "model") == 0
    start = lstm_ctc_ocr._tensorflow().train.load_checkpoint(str(trained))
    assert len(rounds) == 2
    for before, after in rounds:
        assert before
        for name, learnt in before.items():
            np.testing.assert_allclose(after[name], .7 * learnt + .3 * start.get_tensor(name), atol=1e-6)


@pytest.mark.parametrize("number", [1, 2])
def test_an_interrupted_round_goes_on_with_what_it_had_read(images, trained, tmp_path, number, monkeypatch, capfd, two_rounds):
    (folder, _), model, step = images, tmp_path / "model", LstmCtcOcr._between_steps

    def killed(self, run, before, feeds):
        step(self, run, before, feeds)
        config = json.loads((model / "config.json").read_text())
        if config.get("step") and config["round"] == number:
            raise RuntimeError("killed")

    def rounds():
        return [int(said) for said in re.findall(r"^round (\d)", capfd.readouterr().err, re.MULTILINE)]

    monkeypatch.setattr(LstmCtcOcr, "_between_steps", killed)
    with pytest.raises(RuntimeError):
        train(folder, trained, model)
    before = json.loads((model / "config.json").read_text())
    assert rounds() == [*range(1, number + 1)] and before["round"] == number
    monkeypatch.setattr(LstmCtcOcr, "_between_steps", step)
    assert train(folder, trained, model) == 0
    after = json.loads((model / "config.json").read_text())
    assert rounds() == [*range(number, 3)]
    assert after["round"] == 2 and after["step"] > before["step"] and after["words"] == before["words"]


@pytest.mark.parametrize("images", [40, 3])
def test_what_cannot_be_read_at_all_is_one_line(images, trained, tmp_path, capfd):
    noise = np.random.default_rng(0)
    (tmp_path / "noise").mkdir()
    for number in range(40):
        path = tmp_path / "noise" / f"image-{number:05}.png"
        lstm_ctc_ocr.cv2.imwrite(str(path), noise.integers(0, 255, (64, 96, 3), np.uint8))
        if number >= images:
            path.write_bytes(path.read_bytes()[:40])
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


def test_labels_tell_which_case_is_read(tmp_path):
    random.seed(0)  # captcha draws from there
    for number in range(24):
        (tmp_path / f"{number}.png").write_bytes(ImageCaptcha(256, 64).generate("KMXT").read())
    names, labels = [f"{number}.png" for number in range(24)], {str(number): "abdm" for number in range(20)}
    for typed, text in (({}, "KMXT"), (labels, "kmxt")):
        readings, kind = LstmCtcOcr(dataset=str(tmp_path))._read_unlabelled(PRETRAINED / "general", names, typed)
        assert [name for name, *_ in readings] == names
        assert sum(read == text and sure >= .7 for _, read, sure in readings) > 20
        assert (set(kind["letters"]) >= set(text)) and not set(kind["letters"]) & set(text.swapcase())


def test_a_training_on_labels_alone_goes_on_as_it_began(images, trained, tmp_path, capfd):
    (folder, texts), own, model = images, tmp_path / "own", tmp_path / "model"
    own.mkdir()
    for name, text in list(texts.items())[:40]:
        shutil.copy(folder / name, own)
    (own / "labels.csv").write_text("".join(f"{name},{text}\n" for name, text in list(texts.items())[:40]))
    assert train(own, trained, model) == 0
    before = (model / "config.json").read_text()
    for name in list(texts)[40:]:
        shutil.copy(folder / name, own)
    assert train(own, trained, model) == 0
    said = capfd.readouterr().err
    assert "are read surely" not in said and "to learn images that are new too, another --model" in said
    config = json.loads((model / "config.json").read_text())
    assert config["accuracy"] == json.loads(before)["accuracy"] and "expected" not in config
    assert not (model / "taught.csv").exists()


def test_only_labels_are_learnt_if_asked_for(images, trained, tmp_path, capfd):
    assert train(images[0], trained, tmp_path / "model", "--labelled-only") == 2
    assert "no labelled images" in capfd.readouterr().err


def sure(*texts):
    return [(text, .9) for text in texts]


@pytest.mark.parametrize("readings, expected", [
    (sure(*["12345", "67890"] * 20), ("0123456789", "5-5")),
    (sure(*["AB12C", "QR3T"] * 20), (lstm_ctc_ocr.CAPITALS + "0123456789", "4-5")),
    (sure(*["abcde"] * 95, *["abcdef"] * 5), (lstm_ctc_ocr.CAPITALS.lower(), "5-5")),  # one letter too many
    (sure(*["ABQT"] * 95, "cOsO", "OO0O", "ABgT"), (lstm_ctc_ocr.CAPITALS, "4-4")),  # look like capitals
    (sure(*["1234"] * 19) + [("ABC", .6)] * 50, ("", "")),
    (sure(*["12345"] * 20, *["1" * 11] * 10) + [(None, None)], ("0123456789", "5-5")),
], ids=["digits", "capitals and digits", "lengths", "letters of one shape", "too few", "longer than it can learn"])
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
