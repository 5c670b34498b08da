"""How the files of a folder are labelled: every convention, what can be confused, and dirt."""

import os
import random
import re

import pytest
from conftest import TASK, flags
from test_training import train

from lstm_ctc_ocr import LstmCtcOcr, main

DRAW = random.Random(14)


def drawn(letters, count=40, length=4):
    """Different labels; the first letter of the first is the first letter."""
    labels = {letters[0] + "".join(DRAW.choices(letters, k=length - 1))}
    while len(labels) < count:
        labels.add("".join(DRAW.choices(letters, k=length)))
    return sorted(labels, key=lambda _: DRAW.random())


TEXTS, NUMBERS = drawn("ABCDEFGHKMNPQRSTabcdefghk23456789"), drawn("0123456789")
HASHES = drawn("abcdef0123456789", length=8)


def make(folder, files):
    """Writes a folder's files, {name: text}; of names alone, empty ones."""
    for name in files:
        path = folder / "captchas" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[name] if isinstance(files, dict) else "", "utf-8")
    return folder / "captchas"


def said_of(folder, **settings):
    """The labels of a folder by their images' names, and what is said of it."""
    labels, _, said = LstmCtcOcr(**settings).find_labels(folder)
    return labels, "\n".join(said)


def named(template, texts=TEXTS):
    """{name: label} by a template, in which {i} is the image's number and {x} some text."""
    return {template.format(t, i=i, x=HASHES[i]): t for i, t in enumerate(texts)}


CONVENTIONS = {
    "LABEL.png": (named("{0}.png"), "LABEL"),
    "other suffixes": (named("{0}.JPeG"), "LABEL"),
    "LABEL_i.png": (named("{0}_{i}.png"), "LABEL_*"),
    "LABEL_anything.png": (named("{0}_{x} and _more-.png"), "LABEL_*"),
    "LABEL.i.png": (named("{0}.{i}.png"), "LABEL"),
    "LABEL (i).png": (named("{0} ({i}).png"), "LABEL"),
    "copies of some": ({**named("{0}.png"), f"{TEXTS[0]} (1).png": TEXTS[0], f"{TEXTS[1]}.2.png": TEXTS[1]}, "LABEL"),
    "of some more than one": ({**named("{0}.png"), **named("{0}_1.png")}, "LABEL_*"),
    "i_LABEL.png": (named("{i}_{0}.png"), "*_LABEL"),
    "i_LABEL (1).png": (named("{i}_{0} (1).png"), "*_LABEL"),
    "subfolders": ({**named("{i}_{0}.png"), **named("a/{i}_{0}.png"), **named("a/b/{i}_{0}.png")}, "*_LABEL"),
    "Chinese": (named("{0}.png", drawn("天地玄黄宇宙洪荒", length=2)), "LABEL"),
    "numbers": (named("{0}.png", NUMBERS), "LABEL"),
    "numbers, numbered behind": (named("{0}_{i}.png", NUMBERS), "LABEL_*"),
    "numbers, numbered in front": (named("{i}_{0}.png", NUMBERS), "*_LABEL"),
    "only one": ({"7_AX.png": "AX"}, "*_LABEL"),
    "a part of many": ({f"{i}_{text}.png": text for i, text in zip(range(7, 70_000, 1733), TEXTS)}, "*_LABEL"),
}


@pytest.mark.parametrize("files, way", CONVENTIONS.values(), ids=CONVENTIONS)
def test_every_convention_is_found_and_said_in_one_line(files, way, tmp_path):
    labels, line = said_of(make(tmp_path, list(files)))
    assert labels == files
    name, label = re.fullmatch(rf'captchas: {len(files)} images, labels as in {re.escape(way)} \("(.*)" is (\w+)\)',
                               line).groups()
    assert files[name] == label


IMAGES = ["a.png", "b c.png", "sub/a.png"]
LISTS = {
    "csv": {"labels.csv": "a.png,7KQ2\nb c.png,x\nsub/a.png,Z\n"},
    "header": {"labels.csv": "file,label\na.png,7KQ2\nb c.png,x\nsub/a.png,Z"},
    "quotes, spaces, other columns": {"labels.csv": '"a.png", 7KQ2 ,0.9\r\n"b c.png","x"\r\n\r\n./sub/a.png,Z,0\r\n'},
    "Windows": {"labels.csv": "\ufeffName;Text\r\na.png;7KQ2\r\nb c.png;x\r\nsub\\a.png;Z\r\n"},
    "tabs": {"labels.txt": "a.png\t7KQ2\nb c.png\tx\nsub/a.png\tZ\n"},
    "commas": {"labels.txt": "a.png,7KQ2\nb c.png,x\nsub/a.png,Z\n"},
    "beside": {"a.gt.txt": "7KQ2\n", "b c.gt.txt": "\ufeffx", "sub/a.gt.txt": " Z \n\n"},
    "both lists": {"labels.txt": "a.png\tno\nb c.png\tx\n", "labels.csv": "a.png,7KQ2\nsub/a.png,Z\n"},
    "a list and texts beside": {"labels.csv": "a.png,7KQ2\nsub/a.png,Z\n", "a.gt.txt": "no", "b c.gt.txt": "x"},
    "a stray quote": {"labels.csv": 'a.png,"7KQ2\nb c.png,x\nsub/a.png,Z\n'},
    "corrected": {"labels.csv": "a.png,7KQ\na.png,7KQ2\nb c.png,x\nsub/a.png,Z\n"},
}


@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
def test_every_kind_of_list_is_read(lists, tmp_path):
    labels, said = said_of(make(tmp_path, {**dict.fromkeys(IMAGES, ""), **lists}))
    assert labels == {"a.png": "7KQ2", "b c.png": "x", "sub/a.png": "Z"}
    assert said.startswith("captchas: 3 images, labels as in ") and '("a.png" is 7KQ2)' in said
    replaced = any("no" in text or "7KQ\n" in text for text in lists.values())
    assert said.splitlines()[1:] == ['besides: 1 labels that a later line replaces, such as "a.png"'] * replaced


def test_a_label_of_any_letters_may_stand_in_a_list(tmp_path):
    folder = make(tmp_path, {"1.png": "", "2.png": "", "labels.csv": '1.png,"a,b ""c"""\n2.png,ж_(1)\n'})
    assert said_of(folder)[0] == {"1.png": 'a,b "c"', "2.png": "ж_(1)"}


@pytest.mark.parametrize("files", [
    {"1.png": "", "labels.csv": b"1.png,caf\xe9\n"}, {"1.png": "", "1.gt.txt": b"caf\xe9"}])
def test_a_label_that_is_no_utf_8_is_one_line(files, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content or b"")
    with pytest.raises(LstmCtcOcr.Error, match="1.png: the label 'caf.*' is no text in UTF-8"):
        LstmCtcOcr().find_labels(tmp_path)


CONFUSED = {
    "numbers with zeros in front": "{i:04}_{0}.png",
    "what may be a number of six letters": "{0}_{x}.png",
    "numbers on both sides": "{i}_{i}.png",
    "numbers far apart on both sides": None,
}


@pytest.mark.parametrize("template", CONFUSED.values(), ids=CONFUSED)
def test_what_can_be_read_in_two_ways_is_asked_for(template, tmp_path):
    names = list(named(template, NUMBERS)) if template else [f"{a}_{b}.png" for a, b in zip(NUMBERS, reversed(NUMBERS))]
    if template and template.startswith("{i:04}"):
        names = list(named(template))
    folder = make(tmp_path, names)
    with pytest.raises(LstmCtcOcr.Error) as caught:
        said_of(folder)
    question = re.search(r"""--labels 'LABEL_\*' \("(\w+\.png)" is (\w+)\) or --labels '\*_LABEL' \("(\w+\.png)" is """
                         r"""(\w+)\)$""", str(caught.value))
    one, before, other, after = question.groups()
    assert one == other and one in names and f"{before}_{after}.png" == one and "\n" not in str(caught.value)
    for pattern, part in ("LABEL_*", 0), ("*_LABEL", 1), ("*_LABEL.png", 1):
        labels, line = said_of(folder, labels=pattern)
        assert labels == {name: name.removesuffix(".png").split("_")[part] for name in names}
        assert f"labels as in {pattern} (" in line


@pytest.mark.parametrize("names", [
    [f"{i}.png" for i in range(30)], [f"{i:04}.png" for i in range(30)], [f"captcha{i}.png" for i in range(1, 30)],
    [f"img_{i}.png" for i in range(30)], [f"captcha ({i}).png" for i in range(30)], ["captcha.png"],
    [f"{text}{text}{text}{text}.png" for text in HASHES], [f"new captcha-{i}.jpg" for i in range(9)], []], ids=str)
def test_names_that_only_tell_images_apart_are_no_labels(names, tmp_path):
    (tmp_path / "captchas").mkdir()
    assert said_of(make(tmp_path, names))[0] == {}


def test_a_list_beats_names_and_the_flag_beats_both(tmp_path):
    names = dict.fromkeys(named("{0}.png"), "")
    folder = make(tmp_path, {**names, "labels.csv": f"file,label\n{TEXTS[3]}.png,XYZ\n"})
    labels, said = said_of(folder)
    assert labels == {f"{TEXTS[3]}.png": "XYZ"} and "besides: 39 images without a label" in said
    assert said_of(folder, labels="LABEL")[0] == named("{0}.png")
    assert said_of(folder, labels="list")[0] == labels
    (folder / "labels.csv").write_text("file,label\n")  # as a list begins
    assert said_of(folder)[0] == named("{0}.png") and said_of(folder, labels="list")[0] == {}
    (folder / "labels.csv").write_text("file,label\nelsewhere.png,A\n../captchas.png,B\n")  # guessing would be worse
    labels, said = said_of(folder)
    assert labels == {} and '2 lines of lists that name no image, such as "elsewhere.png"' in said


@pytest.mark.parametrize("pattern, name, label", [
    ("captcha-LABEL-*", "captcha-7KQ2-1-2.png", "7KQ2"), ("*-LABEL", "2024-01-7KQ2.png", "7KQ2"),
    ("LABEL.*", "7KQ2.x.y.png", "7KQ2"), ("LABEL (*)", "7KQ2 (new).png", "7KQ2"), ("LABEL", "3+4=.png", "3+4=")])
def test_the_flag_takes_any_pattern(pattern, name, label, tmp_path):
    assert said_of(make(tmp_path, [name, ".hidden.png", "an other_name of 1.png"]), labels=pattern)[0] == {name: label}


@pytest.mark.parametrize("pattern", ["label", "LABEL_LABEL", "*"])
def test_a_pattern_without_one_label_is_one_line(pattern, capfd):
    assert main(["train", "--labels", pattern]) == 2
    message, = capfd.readouterr().err.splitlines()
    assert f"--labels must be list, or hold LABEL once, such as '*_LABEL', not '{pattern}'" in message


@pytest.mark.parametrize("words, count", [("0123456789", 3), ("0123456789", 30), ("AB_+ (1", 5)])
def test_what_this_program_renders_is_never_asked_about(words, count, tmp_path):
    settings = dict(words=words, words_max_num=6, im_width=96)
    assert main(["create_dataset", *flags(dataset=tmp_path, im_total_num=count, workers=1, **settings)]) == 0
    files = LstmCtcOcr(**settings).resolve().labelled_files(tmp_path)
    names = {path.name for path in tmp_path.glob("*.png")}
    assert len(files) == count and {os.path.basename(path) for path, _ in files} == names
    assert all(re.fullmatch(rf"\d+_{re.escape(text)}\.png", os.path.basename(path)) for path, text in files)


@pytest.mark.parametrize("template", ["{0}_{x}.png", "{i}_{0}.png", "{i}/{0}.png"])
def test_workers_share_out_images_of_any_name(template, tmp_path):
    folder = make(tmp_path, list(named(template)))
    ocr = LstmCtcOcr(words="".join(set("".join(TEXTS)))).resolve()
    parts = [ocr.labelled_files(folder, number=n, workers=3) for n in range(3)]
    assert all(len(part) > 4 for part in parts) and sorted(sum(parts, [])) == sorted(ocr.labelled_files(folder))


def dirt():
    """A hundred names of files that no folder of captchas needs, and what is in them; none has a label."""
    texts = ["notes.txt", "README", "Thumbs.db", "desktop.ini", ".DS_Store", ".hidden_1.png", "._AX_1.png", "page.html",
             "AX_1.svg", "AX_1.heic", "AX_1.png.part", "AX_1.zip", "model.onnx", "empty/.keep", "more/notes.md",
             "labels.json", "labels", "sub/labels.csv", "orphan.gt.json", "script.py", "AX_1", "AX_1.pdf", "AX_1.xcf"]
    images = ["_.png", "_AX.png", " .png", "-.png", "a b.png", "a-b.png", "(1).png", " (1).png", ",.png",
              "new image.png", "Screenshot 2026-11-23 at 10.10.10.png", "%41%58.png", "'.png", '".png', "$HOME.png",
              "*.png", "a\nb.png", "tab\t.png", "\\.png", "😀.png", "\u202e.png", "a+b_1.png", "#1.png", "~AX.png",
              "-AX.png", "AX-.png", "[AX]_1.png", "AX,1.png", "AX;1.png", "AX=1.png", "AX@2x.png", "A X_1.png",
              "https:__x.png", "?.png", "AX .1.png", "x" * 250 + ".png", "x" * 40 + "_1.png", "__.png", "_1_AX.png",
              "AX .png", "sub/_.png", "logo.png"]
    return ({f"{name}": "not an image" for name in texts + images} |
            {f"junk-{i}.{suffix}": "" for i in range(6) for suffix in ("txt", "png", "tmp", "GIF", "log", "bak")})


@pytest.fixture(scope="module")
def dirty(dataset, tmp_path_factory):
    """The captchas of the small task, called LABEL_anything.png in two folders, among dirt of a hundred kinds."""
    files, folder = dirt(), tmp_path_factory.mktemp("dirty")
    make(folder, files)
    folder /= "captchas"
    assert len(files) >= 100
    for number, path in enumerate(sorted(dataset.glob("*.png"))):
        copy = folder / ("more" if number % 2 else "") / f"{path.stem.split('_')[1]}_of {number}.png"
        copy.write_bytes(path.read_bytes())
    for name, data in {"AX_empty.png": b"", "AX_cut.png": path.read_bytes()[:99], "AX_html.png": b"<html>"}.items():
        (folder / name).write_bytes(data)
    (folder / "AX_folder.png").mkdir()
    (folder / "AX_broken.png").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder)
    (folder / "nothing").mkdir()
    with open(os.path.join(os.fsencode(folder), b"\xff_\xfe.png"), "wb"):
        pass
    return folder, number + 1


def test_a_hundred_kinds_of_dirt_do_not_stop_training_and_testing(dirty, tmp_path, capfd):
    """One line says what was left out, and others name what has a label and is no image."""
    folder, count = dirty
    settings = dict(n_hidden=16, val_num=16, epoch_max=0.1)
    assert main(train(folder, tmp_path / "model", **settings)) == 0
    messages = capfd.readouterr().err
    shown = [name for name in dirt() if not name.split("/")[-1].startswith(".")]
    images = [name for name in shown if name.lower().endswith((".png", ".gif"))]
    others = [name for name in shown if name not in images]
    assert f"captchas: {count + 5} images, labels as in LABEL_* (" in messages and "Traceback" not in messages
    left, *faults = re.findall("^(?:besides|left out): (.*)", messages, re.MULTILINE)
    assert re.fullmatch(rf'{len(images) + 1} images without a label, such as ".*"; {len(others)} files that are no '
                        'images, such as ".*"', left)
    assert sorted(re.findall(r"AX_(\w+)\.png: ", " ".join(faults))) == ["broken", "cut", "empty", "folder", "html"]
    held, = re.findall(r"^(\d+) images to train on, 16 held out", messages, re.MULTILINE)
    assert 0 < int(held) < count

    assert main(["test", *flags(model=tmp_path / "model"), str(folder)]) == 1  # not all are images
    output, messages = capfd.readouterr()
    assert "Traceback" not in messages and f"captchas: {count + 5} images, labels as in LABEL_*" in messages
    right = sum(line.endswith("right") for line in output.splitlines())
    assert f"({right} of {count}), " in output and "% with case ignored" in output


def test_accuracy_with_case_ignored_on_a_list(dataset, trained, tmp_path, capfd):
    """In a folder whose names say nothing, of labels of which half are in the other case."""
    paths = sorted(dataset.glob("*.png"))[:40]
    for number, path in enumerate(paths):
        (tmp_path / f"{number}.png").write_bytes(path.read_bytes())
    labels = [path.stem.split("_")[1] for path in paths]
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(
        f"{i}.png,{label.lower() if i % 2 else label}\n" for i, label in enumerate(labels)))
    assert main(["test", *flags(model=trained), str(tmp_path)]) == 0
    lines = capfd.readouterr().out.splitlines()
    read = [line.split()[0] if not line.startswith(" ") else "" for line in lines[:40]]
    exact = sum(text == label for text, label in list(zip(read, labels))[::2])
    caseless = sum(text == label for text, label in zip(read, labels))
    assert exact < caseless and f"accuracy {exact / 40:.2%} ({exact} of 40), {caseless / 40:.2%} with case" in lines[41]


def test_an_ambiguous_folder_stops_training_but_not_reading(dataset, trained, tmp_path, capfd):
    for number, path in enumerate(sorted(dataset.glob("*.png"))[:12]):
        (tmp_path / f"{number:04}_{path.stem.split('_')[1]}.png").write_bytes(path.read_bytes())
    assert main(train(tmp_path, tmp_path / "model")) == 2
    message, = capfd.readouterr().err.splitlines()
    assert "--labels 'LABEL_*'" in message and not (tmp_path / "model").exists()
    assert main(["test", *flags(model=trained), str(tmp_path)]) == 0
    output, messages = capfd.readouterr()
    assert "--labels '*_LABEL'" in messages and "accuracy" not in output and len(output.splitlines()) == 12
    assert main(["test", *flags(model=trained, labels="*_LABEL"), str(tmp_path)]) == 0
    assert "of 12)" in capfd.readouterr().out


def test_images_of_one_name_in_two_folders_are_two(tmp_path):
    import cv2
    import numpy as np
    for folder, column in ("a", 20), ("b", 60):
        (tmp_path / folder).mkdir()
        pixels = np.full((64, 96), 255, np.uint8)
        pixels[20:40, column:column + 9] = 0
        cv2.imwrite(str(tmp_path / folder / "1.bmp"), pixels)
    (tmp_path / "labels.csv").write_text("a/1.bmp,A\nb/1.bmp,X\n")
    ocr = LstmCtcOcr(**TASK).resolve()
    images, files = ocr.load_images(ocr.labelled_files(tmp_path), tmp_path)
    first, second = (image.any(axis=0).nonzero()[0][0] for image in images[np.arange(2)])
    assert {text: first for (_, text), first in zip(files, (first, second))} == {"A": 20, "X": 60}
