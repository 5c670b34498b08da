"""Rendering, and the one way in which images are loaded."""

import os
import re

import captcha
import cv2
import numpy as np
import pytest
from conftest import TASK, flags, spawn

from lstm_ctc_ocr import LstmCtcOcr, main


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_seed_alone_decides_every_byte(dataset, tmp_path):
    """One worker or several, here or there; the beginning of a larger dataset included."""
    for workers in (1, 3):
        folder = tmp_path / str(workers)
        assert main(["create_dataset", *flags(dataset=folder, im_total_num=30, workers=workers, **TASK)]) == 0
        files = contents(folder)
        assert len(files) == 30 and files.items() <= contents(dataset).items()


def test_rendering_goes_on_and_leaves_whole_files_alone(tmp_path):
    arguments = ["create_dataset", *flags(dataset=tmp_path, im_total_num=12, **TASK)]
    assert main(arguments) == 0
    first = contents(tmp_path)
    gone, torn, kept = sorted(tmp_path.iterdir())[:3]
    gone.unlink()
    torn.write_bytes(first[torn.name][:100])
    os.utime(kept, (1, 1))
    assert main(arguments) == 0
    assert contents(tmp_path) == first
    assert kept.stat().st_mtime == 1


def test_shards_are_parts_of_the_same_dataset(dataset, tmp_path):
    """Rendered into one folder at the same time; what another one is writing just now is left alone."""
    (tmp_path / ".9-ab.part").write_bytes(b"half of")
    (tmp_path / ".8-ab.part").touch()
    os.utime(tmp_path / ".8-ab.part", (1, 1))
    settings = flags(dataset=tmp_path, im_total_num=31, workers=1, **TASK)
    processes = [spawn("create_dataset", *settings, "--shard", shard) for shard in ("1/3", "2/3", "3/3", "3/3")]
    counts = [int(re.search(r"(\d+) images in", process.communicate()[1])[1]) for process in processes]
    assert counts == [11, 10, 10, 10]
    (tmp_path / ".9-ab.part").unlink()
    files = contents(tmp_path)
    assert len(files) == 31 and files.items() <= contents(dataset).items()


@pytest.mark.parametrize("shard", ["0/3", "4/3", "2", "1/3/", "a/b", ""])
def test_a_shard_that_is_none_is_one_line(shard, capfd):
    assert main(["create_dataset", "--shard", shard]) == 2
    message, = capfd.readouterr().err.splitlines()
    assert "--shard must be I/N" in message


@pytest.mark.parametrize("other", [dict(seed=1), dict(words="AY"), dict(words_max_num=1), dict(im_width=128)])
def test_a_folder_of_other_images_is_not_mixed_into(dataset, capfd, other):
    before = contents(dataset)
    assert main(["create_dataset", *flags(**{**TASK, "dataset": dataset, "im_total_num": 810, **other})]) == 2
    assert contents(dataset) == before
    assert "another --dataset" in capfd.readouterr().err


# ---- captchas of every look

FONTS = os.path.join(os.path.dirname(captcha.__file__), "data")


def varied(folder, **settings):
    return main(["create_dataset", "--look", "varied", "--fonts", FONTS, *flags(dataset=folder, **settings)])


def test_the_seed_decides_every_byte_of_varied_captchas(tmp_path):
    """Whatever renders them: one worker, two, or two shards at a time that go on where others stopped."""
    assert varied(tmp_path / "1", im_total_num=40, workers=1) == 0
    for shard in ("2/2", "1/2"):
        assert varied(tmp_path / "2", im_total_num=40, workers=2, shard=shard) == 0
    files = contents(tmp_path / "1")
    assert len(files) == 41 and contents(tmp_path / "2") == files  # the images, and what they were drawn with
    assert varied(tmp_path / "3", im_total_num=5, seed=1) == 0
    assert not set(contents(tmp_path / "3").values()) <= set(files.values())


def test_varied_captchas_vary(tmp_path):
    """Letters of both cases and digits, heights as others have them, paper light and dark, and no two alike."""
    assert varied(tmp_path, im_total_num=120) == 0
    images = [cv2.imread(str(path)) for path in tmp_path.glob("*.png")]
    labels = [path.stem.split("_")[1] for path in tmp_path.glob("*.png")]
    assert {len(label) for label in labels} == set(range(1, 11))
    assert len(set("".join(labels))) > 55 and any(label.isdigit() for label in labels)
    heights = {image.shape[0] for image in images}
    assert min(heights) < 30 and max(heights) > 80 and all(22 <= height <= 90 for height in heights)
    papers = [np.median(image[:3]) for image in images]
    assert min(papers) < 60 and max(papers) > 240
    assert all(image.std() > 2 for image in images)  # there is something to see on each


@pytest.mark.parametrize("other", [dict(look="plain"), dict(look="varied", words="ÄÖ"), dict(look="varied", fonts="no")])
def test_varied_captchas_are_not_mixed_with_others(other, tmp_path, capfd):
    assert varied(tmp_path, im_total_num=3, words="ABC") == 0
    before = contents(tmp_path)
    settings = dict(dict(look="varied", fonts=FONTS, words="ABC", dataset=tmp_path, im_total_num=9), **other)
    if settings["look"] == "plain":
        del settings["fonts"]
    assert main(["create_dataset", *flags(**settings)]) == 2
    assert len(capfd.readouterr().err.splitlines()[-1]) < 400 and contents(tmp_path) == before


# ---- loading

def png(pixels, suffix=".png"):
    return cv2.imencode(suffix, pixels)[1].tobytes()


@pytest.fixture(scope="module")
def colour():
    """A captcha's pixels: dark strokes on white, (64, 256, 3) uint8."""
    pixels = np.full((64, 256, 3), 255, np.uint8)
    cv2.putText(pixels, "PIY", (5, 50), cv2.FONT_HERSHEY_SIMPLEX, 1.5, (90, 40, 20), 4)
    return pixels


def variants(colour):
    grey = cv2.cvtColor(colour, cv2.COLOR_BGR2GRAY)
    alpha = np.where(grey < 255, 255, 0).astype(np.uint8)
    black_below = np.dstack([colour * (alpha > 0)[..., np.newaxis], alpha])  # what is transparent is black underneath
    return {
        "grey": png(grey), "16 bit": png(grey.astype(np.uint16) * 257),
        "RGB 16 bit": png(colour.astype(np.uint16) * 257),
        "RGBA": png(np.dstack([colour, np.full_like(grey, 255)])), "transparent": png(black_below),
        "transparent 16 bit": png(black_below.astype(np.uint16) * 257), "BMP": png(colour, ".bmp"),
        "TIFF": png(colour, ".tiff"), "float TIFF": png(grey.astype(np.float32) / 255, ".tiff"),
        "twice as large": png(cv2.resize(colour, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)),
        "narrow": png(colour[:, :150]), "JPEG": png(colour, ".jpg"),
    }


@pytest.mark.parametrize("kind", sorted(variants(np.zeros((64, 256, 3), np.uint8))))
def test_the_same_picture_in_any_file_gives_the_same_input(colour, kind):
    ink = LstmCtcOcr().load_image(png(colour))
    assert ink.shape == (64, 256) and ink.dtype == np.uint8 and ink.max() == 255 and ink[0, -1] == 0
    loaded = LstmCtcOcr().load_image(variants(colour)[kind])
    difference = np.abs(loaded.astype(int) - ink)
    assert difference.mean() < 1 and difference.max() < (40 if kind in ("JPEG", "twice as large") else 3)


def test_a_palette_is_looked_up(colour, tmp_path):
    from PIL import Image
    Image.fromarray(colour[..., ::-1]).convert("P").save(tmp_path / "palette.png")
    ink, palette = (LstmCtcOcr().load_image(source) for source in (png(colour), tmp_path / "palette.png"))
    assert np.abs(palette.astype(int) - ink).mean() < 4


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (64, 256), (20, 2000), (700, 90)])
def test_any_size_gives_the_networks_size(size):
    assert LstmCtcOcr().load_image(png(np.full((*size, 3), 200, np.uint8))).tolist() == np.zeros((64, 256)).tolist()


def broken(colour):
    whole = png(colour)
    return {"empty": b"", "text": b"hello", "cut": whole[:len(whole) // 2], "no end": whole[:-12],
            "cut JPEG": png(colour, ".jpg")[:900], "damaged": whole[:200] + b"\0" * 50 + whole[250:]}


@pytest.mark.parametrize("kind", sorted(broken(np.zeros((64, 256, 3), np.uint8))))
def test_what_is_no_whole_image_is_one_error_that_names_the_file(colour, kind, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(broken(colour)[kind])
    with pytest.raises(LstmCtcOcr.Error, match="broken.png: not a whole image"):
        LstmCtcOcr().load_image(path)
    with pytest.raises(LstmCtcOcr.Error, match="the image: not a whole image"):
        LstmCtcOcr().load_image(path.read_bytes())


@pytest.mark.parametrize("name, fault", [("gone.png", "No such file"), ("", "Is a directory"), ("a\0b", "null")])
def test_an_unreadable_path_is_one_error(name, fault, tmp_path):
    with pytest.raises(LstmCtcOcr.Error, match=fault):
        LstmCtcOcr().load_image(tmp_path / name)
