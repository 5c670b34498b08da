"""What there is to look at: the report of a test, and the learning curve of a training."""

import html.parser
import json
import os
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from conftest import NET, PRETRAINED, SHIPPED, TASK, flags
from PIL import Image

import lstm_ctc_ocr
from lstm_ctc_ocr import main

SAMPLES = PRETRAINED.parent.parent / "dataset" / "test"
VOID = {"meta", "img", "br"}


class Page(html.parser.HTMLParser):
    """Whether tags match, what the text is, and what is loaded from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.sources = [], [], [], []
        self.feed(text)
        assert not self.open or self.open == ["html"]  # which need not be closed

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.open += [tag] * (tag not in VOID)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_report_counts_what_was_read(tmp_path, capfd):
    """The three samples, and each again under a label that it does not have: three right, three wrong."""
    for number, (label, wrong) in enumerate((("PIY", "PIX"), ("BCAVDPXT", "BCAVDPX"), ("N", "NN"))):
        data = next(SAMPLES.glob(f"*_{label}.png")).read_bytes()
        for name in (label, wrong):
            (tmp_path / f"{name}_<b>{number}.png").write_bytes(data)
    report = tmp_path / "report.html"
    assert main(["test", "--model", str(SHIPPED), "--report", str(report), str(tmp_path)]) == 0
    page = Page(report.read_text())
    text = " ".join(page.texts)
    assert "3 of 6, 19 to 81 %" in text  # Wilson's interval of 3 of 6 is 0.188 to 0.812
    assert "script" not in page.tags and len(page.sources) == 3
    assert all(source.startswith("data:image;base64,") for source in page.sources)
    rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", report.read_text())
    assert {("X", "Y", "1"), ("(nothing)", "T", "1"), ("N", "(nothing)", "1")} <= set(rows)
    assert "PIX_<b>0.png" in text and "3 of 3" not in text
    assert main(["test", "--model", str(SHIPPED), "--report", str(report), str(SAMPLES / "no such.png")]) == 2
    assert "--report wants labelled images" in capfd.readouterr().err.splitlines()[-1]


def test_a_report_is_of_any_image_and_overwrites_none(tmp_path, capfd):
    """A TIFF of floats too, and names that are no UTF-8."""
    pixels = np.full((64, 100), 1, np.float32)
    pixels[20:40, 30:60] = 0
    path = tmp_path / "0_XYZ_1.tif"
    Image.fromarray(pixels).save(path)
    for report in (path, tmp_path / "nowhere" / "it.html"):
        assert main(["test", "--report", str(report), str(path)]) == 2
        message, = capfd.readouterr().err.splitlines()
        assert "name an .html file in a folder that exists" in message
    assert main(["test", "--model", str(SHIPPED), "--labels", "*_LABEL_*", "--report", str(tmp_path / "it.html"),
                 str(tmp_path)]) == 0
    assert "<h2>Read wrong: 1" in (tmp_path / "it.html").read_text()
    lstm_ctc_ocr._replace(tmp_path / "it.html", os.fsdecode(b"caf\xe9.tif"))
    assert (tmp_path / "it.html").read_text() == "caf\\udce9.tif"


def test_texts_with_a_repeated_letter_are_counted_apart():
    said = lstm_ctc_ocr.describe(lstm_ctc_ocr.score(["AA", "AAB", "ABC", "ABD"], ["AA", "AB", "ABC", "ABD"]))
    assert said.endswith("by repeats  none: 100.0%  some: 50.0%")


@pytest.mark.parametrize("right, count, low, high", [
    (96, 100, 0.9016, 0.9843), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (1, 2, 0.0945, 0.9055)])
def test_the_interval_is_wilsons(right, count, low, high):
    """Against values of published tables."""
    assert lstm_ctc_ocr.interval(right, count) == pytest.approx((low, high), abs=2e-4)


@pytest.mark.parametrize("truth, reading, edits", [
    ("ABC", "ABC", []), ("ABC", "AXC", [("B", "X")]), ("AABB", "ABB", [("A", "")]), ("", "A", [("", "A")]),
    ("ABC", "BC", [("A", "")]), ("AB", "BA", 2)])
def test_confusions_are_the_fewest_edits(truth, reading, edits):
    found = lstm_ctc_ocr.edits(truth, reading)
    assert len(found) == edits if isinstance(edits, int) else found == edits


def points(folder):
    lines = ElementTree.parse(folder / "curve.svg").getroot().findall("{http://www.w3.org/2000/svg}polyline")
    return [len(line.attrib["points"].split()) for line in lines]


def test_the_learning_curve_goes_on_where_a_training_does(dataset, tmp_path):
    settings = {**TASK, **NET, "dataset": dataset, "model": tmp_path, "n_hidden": 16}
    assert main(["train", *flags(**{**settings, "epoch_max": 1})]) == 0
    assert points(tmp_path) == [1, 1]
    assert main(["train", *flags(**{**settings, "epoch_max": 2})]) == 0
    curve = json.loads((tmp_path / "config.json").read_text())["curve"]
    assert points(tmp_path) == [2, 2] and [step for step, *_ in curve] == [45, 90]


def test_a_long_curve_keeps_its_ends_and_no_more_than_it_can_show():
    curve = []
    for step in range(1, 1001):
        curve = lstm_ctc_ocr.thin_curve([*curve, (step, 1 / step, 0.5)])
        assert len(curve) <= 200 and curve[-1][0] == step
    ElementTree.fromstring(lstm_ctc_ocr.draw_curve(curve))
