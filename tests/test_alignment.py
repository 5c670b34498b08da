"""Each letter's own confidence and place, against the enumeration of all paths and letters drawn at known places."""

import base64
import itertools
import json
import math

import numpy as np
import pytest
from captcha.image import DEFAULT_FONTS
from conftest import PRETRAINED, ROOT, SHIPPED, main
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageDraw, ImageFont

from lstm_ctc_ocr import LstmCtcOcr

SAMPLE = ROOT / "dataset" / "test" / "0_PIY.png"


def paths_of(p):
    """(path, probability) of every path through p (T, C)."""
    for path in itertools.product(range(p.shape[1]), repeat=len(p)):
        yield path, math.prod(step[c] for step, c in zip(p.tolist(), path))


def runs(path, blank):
    """The classes of a path that are no blanks, each with its [first, last) steps."""
    steps, found = 0, []
    for c, group in itertools.groupby(path):
        begin, steps = steps, steps + len(list(group))
        found += [(c, begin, steps)] * (c != blank)
    return found


def probabilities(logits):
    p = np.exp(logits.astype(float) - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.sampled_from([.1, 1, 4, 30]),
       st.sampled_from(["", "A", "aB", "Aa"]))
def test_letters_have_the_confidence_and_the_steps_that_all_paths_say(seed, steps, scale, letters):
    logits = np.random.default_rng(seed).normal(scale=scale, size=(steps, 1, 4)).astype(np.float32)
    ocr = LstmCtcOcr(words="AaB", words_max_num=5, im_width=9)
    (text, confidence, aligned), = ocr.texts(logits, ocr.known(letters, align="1"))
    assert ocr.texts(logits, ocr.known(letters)) == [(text, confidence)]
    words = letters or ocr.words
    every, p = {}, probabilities(logits[:, 0])
    read = {word: [n for n, one in enumerate("AaB") if one == word or one.swapcase() == word and one not in words]
            for word in words}
    p = np.stack([*(p[:, classes].sum(axis=1) for classes in read.values()), p[:, 3]], axis=1)
    for path, probability in paths_of(p):
        found = runs(path, len(words))
        every.setdefault("".join(words[c] for c, *_ in found), []).append((probability, found))
    best = max(probability for probability, _ in every[text])
    likeliest = [[(words[c], begin, end) for c, begin, end in found] for probability, found in every[text]
                 if probability > best * .999999]
    assert [(letter, begin, end) for letter, _, begin, end in aligned] in likeliest
    total = {text: sum(probability for probability, _ in found) for text, found in every.items()}
    for i, (letter, own, *_) in enumerate(aligned):
        others = {text[:i] + other + text[i + 1:] for other in [*words, ""]}
        assert own == pytest.approx(total[text] / sum(total.get(other, 0) for other in others), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 4]))
def test_a_letter_of_parts_is_read_from_its_first_part_to_its_last(seed, scale):
    logits = np.random.default_rng(seed).normal(scale=scale, size=(6, 1, 4)).astype(np.float32)
    ocr = LstmCtcOcr(words="A", words_max_num=2, im_width=6, label_parts=3)
    (text, _, aligned), = ocr.texts(logits, ocr.known(length="1", align="1"))
    found = [(probability, runs(path, 3)) for path, probability in paths_of(probabilities(logits[:, 0]))]
    whole = [(probability, run) for probability, run in found if [c for c, *_ in run] == [0, 1, 2]]
    _, best = max(whole)
    own = sum(probability for probability, _ in whole)
    none = sum(probability for probability, run in found if not run)
    assert aligned == [("A", pytest.approx(own / (own + none), rel=1e-5), best[0][1], best[-1][2])]


def test_what_cannot_be_aligned_has_no_steps(ocr):
    """AXA, A-A and AA in one and two steps: nothing breaks."""
    p = np.full((2, 3), 1 / 3)
    assert [letter for letter, *_ in ocr._align("AXA", "AX", p)] == ["A", "X", "A"]
    assert ocr._align("AA", "AX", p[:1])[0][1] == 0 and ocr._align("", "AX", p) == []


def draw(text, lefts, size, path):
    """Draws letters at known places; returns each one's columns, [first, last)."""
    image, places = Image.new("L", size, 255), []
    font = ImageFont.truetype(DEFAULT_FONTS[0], int(size[1] * .7))
    for letter, left in zip(text, lefts):
        layer = Image.new("L", size, 0)
        ImageDraw.Draw(layer).text((left, size[1] * .1), letter, fill=255, font=font)
        image.paste(40, mask=layer)
        places.append(layer.getbbox()[::2])
    image.save(path)
    return places


def test_letters_are_read_where_they_are(tmp_path, capfd):
    """Of the network's own size, half and twice it, and squeezed; letters as a captcha has them, and far apart."""
    drawn = {}
    for name, text, lefts, size in [
            ("own", "KMTE", (20, 80, 140, 200), (256, 64)), ("near", "HXEA", (4, 44, 84, 124), (192, 64)),
            ("half", "KMTE", (10, 40, 70, 100), (128, 32)), ("twice", "KMTE", (40, 160, 280, 400), (512, 128)),
            ("squeezed", "KMTE", (15, 95, 175, 255), (320, 64))]:
        drawn[f"{name}.png"] = text, draw(text, lefts, size, tmp_path / f"{name}.png")
    assert main(["test", "--json", "--align", "--model", str(PRETRAINED / "general"), str(tmp_path)]) == 0
    answers = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert len(answers) == len(drawn)
    for answer in answers:
        text, places = drawn[answer["img_path"].rpartition("/")[2]]
        assert answer["ocr_ret"] == text == "".join(letter["letter"] for letter in answer["alignment"])
        for (left, right), letter in zip(places, answer["alignment"]):
            first, last = letter["columns"]
            assert left <= (first + last) / 2 <= right and last - first <= right - left and letter["confidence"] > .5


def test_the_service_aligns_where_it_is_asked_to():
    app = LstmCtcOcr(model=str(SHIPPED)).create_app()
    client, data = app.test_client(), SAMPLE.read_bytes()
    encoded = {"image": base64.b64encode(data).decode()}
    path, png = "/captchaOcr?img_path=test/0_PIY.png", {"Content-Type": "image/png"}
    answers = [
        client.get(path + "&align=1"), client.post("/captchaOcr?align=1", data=data, headers=png),
        client.post("/captchaOcr", json={**encoded, "align": 1}),
        client.post("/captchaOcr", data={"image": [(SAMPLE.open("rb"), "a.png")], "align": "1"})]
    for answer in answers:
        letters = answer.json["alignment"]
        assert [letter["letter"] for letter in letters] == list("PIY") == list(answer.json["ocr_ret"])
        edges = [edge for letter in letters for edge in letter["columns"]]
        assert edges == sorted(edges) and 0 <= edges[0] and edges[-1] <= Image.open(SAMPLE).width
        assert all(answer.json["confidence"] <= letter["confidence"] <= 1 for letter in letters)
    assert "alignment" not in client.get(path + "&align=0").json and "alignment" not in client.get(path).json
    assert client.get(path + "&align=yes").status_code == 422
    app.extensions["lstm_ctc_ocr"].close()


def test_without_json_there_is_nowhere_to_say_it(capfd):
    assert main(["test", "--align", str(SAMPLE)]) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
