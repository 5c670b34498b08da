"""Lists of labels and names as other programs and systems write them: cells, encodings, scripts, links."""

import json
import re
import shutil
import unicodedata

import pytest
from conftest import flags
from test_label_page import SAMPLES, client_of
from test_labels import make, said_of
from test_training import train

from lstm_ctc_ocr import LstmCtcOcr, main

ocr = LstmCtcOcr()


def found(tmp_path, files):
    """The labels of images 0.png to 3.png, and what is said, in a folder of these files as well, {name: bytes}."""
    folder = make(tmp_path, [f"{i}.png" for i in range(4)])
    for name, data in files.items():
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    labels, said = said_of(folder)
    return {name.removesuffix(".png"): label for name, label in labels.items()}, said


# ---------------------------------------------------------------------- cells

@pytest.mark.parametrize("text, line", [
    ("0.png,17\n1.png,1,234\n2.png,5\n", 2), ("0.png,1,234\n1.png,5,678\n", 1), ("0.png,A\n\n1.png,B,C\n", 3),
    ("file,label\n0.png,A,B\n1.png,C,D\n", 2), ("file,label\n0.png,\"A,B\"\n1.png,$1,234.50\n", 3),
    ("0.png,1,234,0.9\n1.png,7,0.8\n", 1), ("0.png,7KQ2,train\n1.png,8,test\n", 1), ("file;label\n0.png;A;B\n", 2),
    ("0.png,1.234,50\n", 1), ("0.png,EUR 1,234\n", 1), ("0.png,1 234,50\n", 1), ("1.png,A\n0.png,1.234,50\n", 2),
    ("elsewhere.PNG,1,50\n0.png,3,40\n", 1)])
def test_a_label_that_a_comma_would_cut_is_refused_by_its_line(text, line, tmp_path, capfd):
    folder = make(tmp_path, ["0.png", "1.png", "2.png"])
    (folder / "labels.csv").write_text(text)
    assert main(["train", *flags(dataset=folder, model=tmp_path / "model")]) == 2
    message, = capfd.readouterr().err.splitlines()
    assert f"labels.csv, line {line} holds more than a name and a label: put a label with commas in quotes" in message


@pytest.mark.parametrize("text, labels", [
    ("file,label,width\n0.png,123,456\n1.png,7\n", {"0": "123", "1": "7"}), ("0.png,1234,0.97\n", {"0": "1234"}),
    ("name,text,set\n0.png,7KQ2,train\n", {"0": "7KQ2"}),
    ("0.png;1,234\n1.png;5\n", {"0": "1,234", "1": "5"}),
    ('0.png, "1,234"\n1.png,"5,678"\n', {"0": "1,234", "1": "5,678"}), ("0.png\t,1;234\t\n", {"0": ",1;234"}),
    ("0.png,A,,\n1.png,B\n", {"0": "A", "1": "B"}), ("0.png,$5;6\n", {"0": "$5;6"}),
    ('0.png,"b,""c"\n"1.png";"d;""e"""\n', {"0": 'b,"c', "1": 'd;"e"'}), ("0.png,A\r1.png,B\r", {"0": "A", "1": "B"}),
    ("0.png\n1.png\n2.png\n3.png\n", {}), (f"0.png,A\n{200_000 * 'x'},B\n", {"0": "A"}), ("", {}), ("\n\n", {})])
def test_what_is_clear_is_read_whole(text, labels, tmp_path):
    assert found(tmp_path, {"labels.csv": text})[0] == labels


@pytest.mark.parametrize("text", ['0.png\t"AB\n1.png\tC"D\n2.png\t"E"\n3.png\t""\n',
                                  '0.png,"""AB"\n1.png,C"D\n2.png,"""E"""\n3.png,""""""\n'])
def test_quotation_marks_are_letters_between_tabs(text, tmp_path):
    assert found(tmp_path, {"labels.txt": text})[0] == {"0": '"AB', "1": 'C"D', "2": '"E"', "3": '""'}


def test_a_stray_quotation_mark_swallows_no_other_line(tmp_path):
    assert found(tmp_path, {"labels.csv": '0.png,"AB\n1.png,C,0.8\n2.png,E"F\n'})[0] == {
        "0": "AB", "1": "C", "2": 'E"F'}


def test_a_name_may_hold_what_separates_other_lists(tmp_path):
    folder = make(tmp_path, {"a,1.png": "", "b;1.5.png": "", "labels.csv": "file;text\na,1.png;X\nb;1.5.png,Y\n"})
    assert said_of(folder)[0] == {"a,1.png": "X", "b;1.5.png": "Y"}


def test_each_line_has_its_own_separator(tmp_path):
    assert found(tmp_path, {"labels.csv": 'file,label\n0.png,A\n1.png;B\n2.png\tC\n"3.png";"D"\n'})[0] == {
        "0": "A", "1": "B", "2": "C", "3": "D"}


@pytest.mark.parametrize("first", [0, 1])
def test_labels_alone_are_those_of_the_images_in_order(first, tmp_path):
    labels = [f"{n ** 5 % 7919}" for n in range(120)]
    names = [f"captcha{n}.jpg" for n in range(first, first + 120)]
    folder = make(tmp_path, {**dict.fromkeys(names, ""), "labels.txt": "\n".join(labels) + "\n"})
    assert said_of(folder)[0] == dict(zip(names, labels))
    for name in names[:1], names[:40]:  # now numbers and lines do not fit
        (folder / name[-1]).unlink()
        labels, said = said_of(folder)
        assert not labels and "119 lines of lists that name no image" in said


@pytest.mark.parametrize("form", ["{} KHOR", "{}=KHOR", "{}: KHOR", "{} | KHOR", "train/{}"])
def test_each_line_that_is_no_name_and_no_label_is_told(form, tmp_path):
    """The first as well, though a first line may name the columns."""
    labels, said = found(tmp_path, {"labels.txt": "\n".join(form.format(f"{i}.png") for i in range(4))})
    first = form.format("0.png")
    assert not labels and f'4 lines of lists that name no image, such as "{first}"' in said


@pytest.mark.parametrize("head", ["label", "Text", "LABELS"])
def test_a_head_is_not_the_label_of_the_first_image(head, tmp_path):
    """Though a label is missing, so that there are as many lines as images."""
    labels, said = found(tmp_path, {"labels.txt": f"{head}\nAB\nCD\nEF\n"})
    assert not labels and '3 lines of lists that name no image, such as "AB"' in said
    assert found(tmp_path, {"labels.txt": f"AB\n{head}\nlabel7\nEF\n"})[0] == {
        "0": "AB", "1": head, "2": "label7", "3": "EF"}


# ---------------------------------------------------------------------- encodings, forms and scripts

@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-8"])
@pytest.mark.parametrize("files", [{"labels.csv": "file;label\r\n0.png;天地\r\n"}, {"0.gt.txt": "天地\r\n"}])
def test_a_mark_says_the_encoding(encoding, files, tmp_path):
    assert found(tmp_path, {name: text.encode(encoding) for name, text in files.items()})[0] == {"0": "天地"}


@pytest.mark.parametrize("data", ["0.png,天\n1.png,地".encode("gbk"), "0.png,天\n".encode("utf-16")[:-1]])
def test_a_label_in_another_encoding_is_one_line(data, tmp_path):
    with pytest.raises(LstmCtcOcr.Error, match="the label '.*' is no text in UTF-8 but perhaps in GBK"):
        found(tmp_path, {"labels.csv": data})


@pytest.mark.parametrize("encoding", ["gbk", "utf-16-le"])
def test_names_in_another_encoding_are_told(encoding, tmp_path):
    labels, said = found(tmp_path, {"labels.csv": "名,字\n天.png,A\n地.png,B\n".encode(encoding)})
    assert not labels and re.search(r"\d lines of lists that are no text in UTF-8", said)


FORMS = "Caf\u00e9", "Cafe\u0301", "C\u00adaf\u200de\u0301\u200b"  # composed, decomposed, with what is not seen


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("text", FORMS)
def test_names_and_labels_have_one_form(name, text, tmp_path):
    folder, label = make(tmp_path, [f"{name}_1.png", "X_1.png"]), {f"{name}_1.png": "Caf\u00e9"}
    for way in "LABEL_*", "":
        assert said_of(folder, labels=way)[0] == {**label, "X_1.png": "X"}
    assert said_of(folder, labels=f"{text}_LABEL")[0] == {f"{name}_1.png": "1"}
    (folder / f"{name}_1.gt.txt").write_text(text)
    assert said_of(folder)[0] == label
    (folder / "labels.csv").write_text(f"X_1.png,Z\n{text}_1.png,{text}\n")
    assert said_of(folder)[0] == {**label, "X_1.png": "Z"}


@pytest.mark.parametrize("texts", [
    ["ที่นี่", "น้ำ", "กุ้ง"], ["हिन्दी", "क्षि", "की"], ["שָׁלוֹם", "אֵם", "בּ"], ["தமிழ்", "பூ", "கி"]])
@pytest.mark.parametrize("template, way", [
    ("{0}.png", "LABEL"), ("{1}_{0}.png", "*_LABEL"), ("{0}_{1}.png", "LABEL_*")])
def test_marks_are_letters(texts, template, way, tmp_path):
    names = {template.format(text, i): text for i, text in enumerate(texts)}
    labels, said = said_of(make(tmp_path, list(names)))
    assert labels == {name: unicodedata.normalize("NFC", text) for name, text in names.items()}
    assert f"labels as in {way} (" in said


@pytest.mark.parametrize("typed, seen", [
    ("שלום", "םולש"), ("אב12", "12בא"), ("12.50ש", "ש12.50"), ("مرحبا", "ابحرم"), ("س٢٣ص", "ص٢٣س"),
    ("בָּא", "אבָּ"), ("אBC-ד", "ד-BCא"), ("ABC12", "ABC12"), ("ที่1", "ที่1"), ("", "")])
def test_right_to_left_letters_are_learnt_as_seen_and_told_as_typed(typed, seen):
    """A mark stays behind its letter, as in ב with a dagesh and a qamats."""
    reader = LstmCtcOcr(words="".join(sorted(set(typed + "A")))).resolve()
    sequence = reader.text_to_sequence(typed)
    assert "".join(reader.words[number] for number in sequence) == seen
    assert reader.sequence_to_text(sequence) == typed


def test_a_model_of_right_to_left_letters_reads_as_one_types(trained, dataset, tmp_path, capfd):
    """The small task in Hebrew: its model with other letters, on its images with labels as one types them."""
    model, folder = tmp_path / "model", tmp_path / "hebrew"
    shutil.copytree(trained, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "words": "אב"}))
    paths = sorted(dataset.glob("*.png"))[:60]
    folder.mkdir()
    for path in paths:
        label = path.stem.split("_")[1].translate({65: "א", 88: "ב"})[::-1]
        shutil.copy(path, folder / path.name.replace(path.stem.split("_")[1], label))
    outputs = []
    for reader, images in (trained, paths), (model, [folder]):
        assert main(["test", *flags(model=reader), *map(str, images)]) == 0
        output, messages = capfd.readouterr()
        outputs.append([line for line in output.splitlines() if "accuracy" in line])
    assert outputs[0] == outputs[1] and ", typed from right to left)" in messages


def test_a_captcha_is_named_as_one_types_it(tmp_path, monkeypatch):
    monkeypatch.setattr(LstmCtcOcr, "_draw", lambda self, plain, label: label.encode())  # from the left
    LstmCtcOcr(dataset=str(tmp_path), words="אבג1").resolve()._render(range(20))
    drawn = {path.stem.split("_")[1]: path.read_text() for path in tmp_path.glob("*.png")}
    assert len(drawn) > 15 and {text[::-1] for text in drawn if "1" not in text} <= {*drawn.values()}


# ---------------------------------------------------------------------- files and links

def test_a_text_that_is_beside_no_image_is_named(tmp_path):
    images = ["x.nrm.png", "a/y.png", "a/y.2.png", "v1.2/z.png"]
    folder = make(tmp_path, {**dict.fromkeys(images, ""), "x.gt.txt": "AB\r\n", "a/y.gt.txt": "C", "a/y.2.gt.txt": "D",
                             "v1.2/z.gt.txt": "E"})
    labels, said = said_of(folder)
    assert labels == {"a/y.png": "C", "a/y.2.png": "D", "v1.2/z.png": "E"}
    assert '1 lines of lists that name no image, such as "x.gt.txt"; 1 images without a label' in said


def test_links_are_followed_once(tmp_path):
    """Into folders elsewhere, but not round in circles, and not to what has its place in the folder."""
    folder = make(tmp_path, ["b/B_1.png", "z/Z_1.png"])
    (tmp_path / "else" / "deep").mkdir(parents=True)
    (tmp_path / "else" / "deep" / "E_1.png").touch()
    (tmp_path / "single.png").touch()
    for link, target in {"a": folder / "z", "b/up": folder, "b/z": folder / "z", "c": tmp_path / "else",
                         "d": tmp_path / "else" / "deep", "S_1.png": tmp_path / "single.png"}.items():
        (folder / link).symlink_to(target)
    (tmp_path / "else" / "back").symlink_to(folder)
    assert said_of(folder)[0] == {"b/B_1.png": "B", "z/Z_1.png": "Z", "S_1.png": "S", "c/deep/E_1.png": "E"}


# ---------------------------------------------------------------------- the labelling page

@pytest.fixture
def page(tmp_path):
    """A function that opens the page on a folder of two images and returns it and the client, and closes it."""
    folder, services = tmp_path / "mine", []
    folder.mkdir()
    for name in ("0.png", "1\u200d.png"):
        (folder / name).write_bytes(SAMPLES["PIY"])

    def opened():
        client, service = client_of(folder)
        services.append(service)
        return folder, client

    yield opened
    for service in services:
        service.pool.shutdown()


@pytest.mark.parametrize("rewritten, added", [
    ("file;label\r\n0.png;A\r\n", "1\u200d.png;B,C\n"), ("\ufefffile,label\n0.png,A", '\n1\u200d.png,"B,C"\n'),
    ("0.png\tA\n", '1\u200d.png,"B,C"\n')])
def test_the_page_goes_on_with_a_list_that_another_program_has_rewritten(rewritten, added, page):
    folder, client = page()
    assert client.post("/label", json={"path": "0.png", "label": "A"}).status_code == 200
    (folder / "labels.csv").write_bytes(rewritten.encode())
    assert client.post("/label", json={"path": "1\u200d.png", "label": "\u00adB,C\u200b"}).status_code == 200
    assert (folder / "labels.csv").read_bytes() == (rewritten + added).encode()
    assert ocr.find_labels(folder)[0] == {"0.png": "A", "1\u200d.png": "B,C"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "gbk"])
def test_the_page_adds_nothing_to_a_list_that_is_no_utf_8(encoding, page, capfd):
    folder, client = page()
    data = "0.png,天\n".encode(encoding)
    (folder / "labels.csv").write_bytes(data)
    answer = client.post("/label", json={"path": "0.png", "label": "A"})
    assert answer.status_code == 422 and "no CSV file in UTF-8 but perhaps in GBK" in answer.json["error"]
    assert (folder / "labels.csv").read_bytes() == data and client.get("/label/image").json["labelled"] == 0
    with pytest.raises(LstmCtcOcr.Error, match="no CSV file in UTF-8"):
        page()


def test_the_page_says_how_many_images_it_does_not_show(page, tmp_path, capfd):
    folder = tmp_path / "mine"
    (tmp_path / "outside").mkdir()
    for name in "2.png", "3.png":
        (tmp_path / "outside" / name).write_bytes(SAMPLES["N"])
    (folder / "linked").symlink_to(tmp_path / "outside")
    (folder / "inside.png").symlink_to(folder / "0.png")
    _, client = page()
    assert "2 images are not shown on the page: links that lead out of" in capfd.readouterr().err
    assert client.get("/label/image").json["images"] == 3
