"""Labels in names that need more than names: what a model reads in the images, points, letters of careless case."""

import re
import shutil

import pytest
from conftest import flags
from test_labels import HASHES, NUMBERS, TEXTS, make, named, said_of
from test_training import train

from lstm_ctc_ocr import LstmCtcOcr, main


@pytest.fixture(scope="module")
def captchas(tmp_path_factory):
    """Captchas that cnn_lstm reads, by their texts."""
    folder = tmp_path_factory.mktemp("captchas")
    assert main(["create_dataset", *flags(dataset=folder, im_total_num=40, words_max_num=5, workers=1, seed=7)]) == 0
    return {path.stem.split("_")[1]: path for path in folder.glob("*_??*.png")}


def copies(folder, captchas, template):
    """The captchas under other names, of which {0} is the text, {i} a number, and {x} an id."""
    for i, (text, path) in enumerate(captchas.items()):
        shutil.copy(path, folder / template.format(text, i=i, x=HASHES[i]))
    return folder


@pytest.mark.parametrize("template, way", [
    ("captcha{x}_{0}.png", "*_LABEL"), ("{0}_{x}.png", "LABEL_*"), ("{i:04}_{0}.png", "*_LABEL")])
def test_the_part_that_a_model_reads_is_the_label(template, way, captchas, tmp_path):
    labels, said = said_of(copies(tmp_path, captchas, template), start_from="cnn_lstm")
    assert labels == {template.format(text, i=i, x=HASHES[i]): text for i, text in enumerate(captchas)}
    right, count = re.search(rf"labels as in {re.escape(way)}, as cnn_lstm reads (\d+) of (\d+) \(", said).groups()
    assert int(right) > 20 and int(count) == 30 < len(captchas)


def test_training_takes_the_part_that_is_read_and_says_why(dataset, trained, tmp_path, capfd):
    for path, x in zip(sorted(dataset.glob("*.png")), HASHES):
        shutil.copy(path, tmp_path / f"captcha{x}_{path.stem.split('_')[1]}.png")
    assert main(["train", *flags(dataset=tmp_path, model=tmp_path / "model", start_from=trained, epoch_max=1)]) == 0
    messages = capfd.readouterr().err
    assert re.search(rf'labels as in \*_LABEL, as {trained} reads \d+ of 30 \("captcha.*_(\w+).png" is \1\)\n'
                     "1 to 3 letters of AX in", messages)


def stub(monkeypatch, reads):
    """Has every model read what a function of an image's path says; returns the paths that were read."""
    asked = []

    def recognise_files(_, paths):
        asked.extend(paths)
        return [(path, reads(path), 0.9, None) for path in paths]

    monkeypatch.setattr(LstmCtcOcr, "recognise_files", recognise_files)
    return asked


COUNTS = {
    "five digits with zeros": [f"{i:05}.png" for i in range(4, 300, 7)],
    "four digits": [f"{i}.bmp" for i in range(1000, 1200, 5)],
    "behind the same word": [f"captcha_{i}.png" for i in range(0, 99, 2)],
    "behind the same word, joined": [f"captcha{i}.png" for i in range(0, 99, 2)],
}


@pytest.mark.parametrize("names", COUNTS.values(), ids=COUNTS)
def test_what_looks_like_a_count_is_the_label_if_it_is_read_in_the_images(names, monkeypatch, tmp_path, capfd):
    folder = make(tmp_path, names)
    stub(monkeypatch, lambda path: "K7")
    assert main(train(folder, tmp_path / "model")) == 2
    assert "names that look like a count are labels only with --labels LABEL" in capfd.readouterr().err
    asked = stub(monkeypatch, lambda path: re.sub(r".*[_ ]", "", path.stem).lower() if int(path.stem[-1]) % 3 else "8")
    labels, said = said_of(folder)
    assert labels == {name: re.sub(r".*_|\.\w+$", "", name) for name in names}
    assert re.search(r", as general reads \d+ of 30 \(", said)
    assert len(asked) == 30 and max(asked) > folder / names[-9] and min(asked) < folder / names[9]  # from all over


def test_names_that_decide_alone_are_not_read(monkeypatch, tmp_path):
    asked = stub(monkeypatch, lambda path: path.stem)
    for number, template in enumerate(["{0}.png", "{0}_{i}.png", "{i}_{0}.png", "{0}.{i}.png", "captcha_{0}.png",
                                     "{x}{x}{x}_{0}.png"]):
        (tmp_path / str(number)).mkdir()
        assert said_of(make(tmp_path / str(number), list(named(template))))[0] == named(template)
    assert not asked


@pytest.mark.parametrize("template", ["{x}_{0}.png", "captcha{x}_{0}.png"])
def test_what_is_not_read_is_asked_for(template, monkeypatch, tmp_path, capfd):
    folder = make(tmp_path, list(named(template)))
    stub(monkeypatch, lambda path: "K7")
    assert main(train(folder, tmp_path / "model")) == 2
    message, = capfd.readouterr().err.splitlines()
    assert "can be read in two ways" in message and "--labels '*_LABEL'" in message


@pytest.mark.parametrize("parts", [("train", "val"), ("siteA", "siteB"), ("a", "b", "c", "d")], ids=str)
@pytest.mark.parametrize("template", ["{part}_{0}.png", "{part}_{i}.png", "{i}_{part}.png"])
@pytest.mark.parametrize("count", [10, 30])
def test_two_to_four_texts_for_all_images_are_no_labels_unasked(parts, template, count, monkeypatch, tmp_path, capfd):
    names = [template.format(text, i=i, part=parts[i % len(parts)]) for i, text in enumerate(TEXTS[:count])]
    stub(monkeypatch, lambda path: "")
    assert main(train(make(tmp_path, names), tmp_path / "model")) == 2
    message, = capfd.readouterr().err.splitlines()
    assert "can be read in two ways: give --labels 'LABEL_*' (" in message and "or --labels '*_LABEL' (" in message
    if count == 30:  # what a model reads decides
        stub(monkeypatch, lambda path: path.stem.split("_")[1].lower())
        assert said_of(tmp_path / "captchas")[0] == {name: name[:-4].split("_")[1] for name in names}


def test_a_few_images_of_few_texts_are_not_asked_about(tmp_path):
    for number, names in enumerate([["AX_1.png", "B_2.png"], ["AX_x.png", "B_y.png", "AX_z.png", "C_w.png"]]):
        (tmp_path / str(number)).mkdir()
        labels, _ = said_of(make(tmp_path / str(number), names))
        assert labels == {name: name.split("_")[0] for name in names}


def test_a_count_behind_a_text_is_no_label_though_nothing_is_read(monkeypatch, tmp_path):
    stub(monkeypatch, lambda path: "K7")
    assert said_of(make(tmp_path, list(named("{0}_{i:03}.png"))))[0] == named("{0}_{i:03}.png")


@pytest.mark.parametrize("start", ["", "nowhere"])
def test_without_a_model_names_decide_as_far_as_they_can(start, monkeypatch, tmp_path):
    monkeypatch.setattr("lstm_ctc_ocr.MODELS", tmp_path)
    assert said_of(make(tmp_path, [f"{i:05}.png" for i in range(40)]), start_from=start)[0] == {}
    (tmp_path / "other").mkdir()
    files = named("{0}_{x}.png")
    assert said_of(make(tmp_path / "other", list(files)), start_from=start)[0] == files


@pytest.mark.parametrize("pattern, template", [
    ("*.LABEL", "{i}.{0}.png"), ("*.LABEL", "{i}.{0}.JPeG"), ("*.LABEL", "{i}.{0} (1).png"),
    ("*.LABEL.png", "{i}.{0}.png"), ("*.LABEL.*", "{i}.{0}.png")])
def test_the_suffix_is_no_label(pattern, template, tmp_path):
    files = named(template)
    assert said_of(make(tmp_path, [*files, "logo.png"]), labels=pattern)[0] == files


def test_a_point_in_a_number_is_never_cut_off(tmp_path, capfd):
    names = {f"{number[:2]}.{number[2:]}.png": f"{number[:2]}.{number[2:]}" for number in NUMBERS}
    folder = make(tmp_path, list(names))
    assert said_of(folder)[0] == {} and said_of(folder, labels="LABEL")[0] == names
    assert main(train(folder, tmp_path / "model")) == 2
    assert "say with --labels how they are called" in capfd.readouterr().err
    (tmp_path / "counted").mkdir()
    folder = make(tmp_path / "counted", [f"{i}_{name}" for i, name in enumerate(names)])
    assert said_of(folder)[0] == {}
    counted = {f"{i}_{name}": label for i, (name, label) in enumerate(names.items())}
    assert said_of(folder, labels="*_LABEL")[0] == counted


def test_points_of_captchas_rendered_here_are_kept_without_a_word(tmp_path):
    settings = dict(words="0123456789.A", im_total_num=30, workers=1, im_width=96, words_max_num=6)
    assert main(["create_dataset", *flags(dataset=tmp_path, **settings)]) == 0
    labels = LstmCtcOcr().find_labels(tmp_path)[0]
    assert labels == {path.name: path.name.split("_", 1)[1][:-4] for path in tmp_path.glob("*.png")}
    assert len(labels) == 30 and any("." in label for label in labels.values())


def careless(folder, share, change=str.upper):
    """A folder of labels in small letters, but for a share of them."""
    return make(folder, [f"{change(text.lower()) if i < share * len(TEXTS) else text.lower()}.png"
                         for i, text in enumerate(text.replace("2", "z") for text in TEXTS)])


def test_labels_of_careless_case_are_told_and_folded(tmp_path, capfd):
    folder = careless(tmp_path, 0.2)
    labels, said = said_of(folder)
    assert "8 labels are in capitals, 32 in small letters: " in said and "--case lower" in said
    assert main(["train", *flags(dataset=folder, model=tmp_path / "model", case="lower")]) == 2  # they are no images
    said = capfd.readouterr().err
    assert "in capitals" not in said and not re.search("letters of .*[A-Z]", said)
    folded, said = said_of(folder, case="upper")
    assert folded == {name: label.upper() for name, label in labels.items()} and "\n" not in said


def test_letters_that_are_of_both_cases_in_truth_are_not_called_careless(tmp_path):
    for number, labels in enumerate([named("{0}.png"), named("{0}.png", [text.lower() for text in TEXTS])]):
        (tmp_path / str(number)).mkdir()
        assert "case" not in said_of(make(tmp_path / str(number), list(labels)))[1]
