"""Rendering, and the one way in which images are loaded."""

import collections
import hashlib
import io
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from multiprocessing.pool import ThreadPool

import captcha
import cv2
import numpy as np
import pytest
from conftest import ROOT, SHIPPED, TASK, flags, spawn
from PIL import ExifTags, Image, ImageDraw, ImageOps

import lstm_ctc_ocr
from lstm_ctc_ocr import LstmCtcOcr, main


def contents(folder):
    """The visible files of a folder: its images, not what rendering and training note there."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


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
    gone, torn, kept = sorted(tmp_path.glob("*.png"))[:3]
    gone.unlink()
    torn.write_bytes(first[torn.name][:100])
    os.utime(kept, (1, 1))
    assert main(arguments) == 0
    assert contents(tmp_path) == first
    assert kept.stat().st_mtime == 1


def test_shards_are_parts_of_the_same_dataset(dataset, tmp_path):
    """Rendered into one folder at the same time."""
    settings = flags(dataset=tmp_path, im_total_num=31, workers=1, **TASK)
    processes = [spawn("create_dataset", *settings, "--shard", shard) for shard in ("1/3", "2/3", "3/3", "3/3")]
    counts = [int(re.search(r"(\d+) images in", process.communicate()[1])[1]) for process in processes]
    assert counts == [11, 10, 10, 10]
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
    message, = capfd.readouterr().err.splitlines()
    (flag, _), = [flags(**other)]
    assert f"images of other {flag}, see" in message and "another --dataset" in message


def test_images_that_somebody_else_has_labelled_are_left_alone(tmp_path, capfd):
    (tmp_path / "7_XA.png").write_bytes(b"mine")
    assert main(["create_dataset", *flags(dataset=tmp_path, im_total_num=9, **TASK)]) == 2
    message, = capfd.readouterr().err.splitlines()
    assert "holds images not rendered here: give another --dataset" in message
    assert contents(tmp_path) == {"7_XA.png": b"mine"}


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
    assert len(files) == 40 and contents(tmp_path / "2") == files
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
    assert min(heights) < 30 and max(heights) > 80 and all(15 <= height <= 90 for height in heights)
    papers = [np.median(image[:3]) for image in images]
    assert min(papers) < 60 and max(papers) > 240
    assert all(image.std() > 2 for image in images)  # there is something to see on each
    assert len({image.tobytes() for image in images}) == len(images)


def test_some_varied_captchas_are_sums_if_words_have_the_signs():
    """Their signs are in no other label; without digits there is no sum, and a sign is a letter like others."""
    def drawn(words, count=3000, **settings):
        random.seed(1)
        ocr = LstmCtcOcr(look="varied", words=words, **settings).resolve()
        return [ocr._draw_label()[1] for _ in range(count)]

    everything = drawn("AbC0123456789+-*×/÷=?")
    sums = [label for label in everything if not set(label) <= set("AbC0123456789")]
    assert all(re.fullmatch(r"\d{1,2}[-+*×/÷]\d{1,2}(=\??)?", label) for label in sums)
    assert .12 < len(sums) / len(everything) < .19 and set("".join(sums)) == set("0123456789+-*×/÷=?")
    assert max(map(len, drawn("0123456789+=?", words_max_num=5))) == 5
    assert {"1", "+"} <= set("".join(drawn("01+", 100)))
    fonts = LstmCtcOcr(look="varied", fonts=FONTS, words="0123456789+-*×/÷=?")._fonts_found()
    assert lstm_ctc_ocr.draw_varied("8÷2=?", 1, fonts).std() > 2


def test_kinds_of_captchas_occur_as_often_as_their_tables_say(monkeypatch):
    """And what they draw has the size of the image and values within bounds."""
    drawn, number = collections.Counter(), 400

    def watch(name, low, high):
        def watched(kind):
            def draw(look, *others):
                result = kind(look, *others)
                assert np.broadcast_shapes(result.shape, look.shape)[-2:] == look.shape
                assert low <= result.min() and result.max() <= high
                drawn[name, kind] += 1
                return result
            return draw
        table = getattr(lstm_ctc_ocr, name)
        monkeypatch.setattr(lstm_ctc_ocr, name, [(kind and watched(kind), share) for kind, share in table])
        return {(name, kind): share for kind, share in table if kind}

    papers = watch("PAPERS", -.3, 1.3)
    degradations = watch("DEGRADATIONS", -300, 600)
    relative = [watch("CLUTTER", 0, 1), watch("WARPS", -.6, .6)]
    patterns = watch("LETTER_PATTERNS", 0, 256)
    fonts = LstmCtcOcr(look="varied", fonts=FONTS, words="aB3dE")._fonts_found()
    for seed in range(number):
        lstm_ctc_ocr.draw_varied("aB3dE"[:1 + seed % 5], seed, fonts)
    assert {row: drawn[row] / number for row in papers} == pytest.approx(
        {row: weight / 100 for row, weight in papers.items()}, abs=.07)
    assert {row: drawn[row] / number for row in degradations} == pytest.approx(degradations, abs=.08)
    for table in relative:
        total, weights = sum(drawn[row] for row in table), sum(table.values())
        assert {row: drawn[row] / total for row in table} == pytest.approx(
            {row: weight / weights for row, weight in table.items()}, abs=.07)
    assert all(drawn[row] for row in patterns)


def test_a_font_of_symbols_draws_no_letters(tmp_path):
    """It would teach that a star is an A. Its name is all there is to tell it by."""
    (tmp_path / "fonts").mkdir()
    for name in "Letters.ttf", "D050000L.otf", "StandardSymbolsPS.otf", "Wingding.ttf":
        shutil.copy(os.path.join(FONTS, "DroidSansMono.ttf"), tmp_path / "fonts" / name)
    assert main(["create_dataset", *flags(look="varied", fonts=tmp_path / "fonts", dataset=tmp_path / "images",
                                          im_total_num=1)]) == 0
    assert (tmp_path / "images" / ".rendering.txt").read_text().endswith("\n--fonts Letters.ttf")


@pytest.mark.parametrize("other", [dict(look="plain"), dict(look="varied", words="ÄÖ"),
                                   dict(look="varied", fonts="no")])
def test_varied_captchas_are_not_mixed_with_others(other, tmp_path, capfd):
    assert varied(tmp_path, im_total_num=3, words="ABC") == 0
    before = contents(tmp_path)
    settings = dict(dict(look="varied", fonts=FONTS, words="ABC", dataset=tmp_path, im_total_num=9), **other)
    if settings["look"] == "plain":
        del settings["fonts"]
    assert main(["create_dataset", *flags(**settings)]) == 2
    assert len(capfd.readouterr().err.splitlines()[-1]) < 400 and contents(tmp_path) == before


# ---- loading

OCR = LstmCtcOcr().resolve()


def png(pixels, suffix=".png"):
    return cv2.imencode(suffix, pixels)[1].tobytes()


@pytest.fixture(scope="module")
def colour():
    """A captcha's pixels: strokes of one dark colour on white, (64, 256, 3) uint8, BGR."""
    mask = np.zeros((64, 256), np.uint8)
    cv2.putText(mask, "PIY", (5, 50), cv2.FONT_HERSHEY_SIMPLEX, 1.5, 255, 4)
    return np.where(mask[..., None] > 127, (90, 40, 20), (255, 255, 255)).astype(np.uint8)


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def variants(colour):
    """The same picture, which has two colours, as files of many kinds, modes and depths."""
    rgb = Image.fromarray(colour[..., ::-1])
    grey, palette, turned = rgb.convert("L"), rgb.quantize(2), Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    alpha = grey.point(lambda value: 0 if value == 255 else 255)
    transparent = rgb.copy()
    transparent.paste((0, 0, 0), mask=ImageOps.invert(alpha))  # what is transparent is black underneath
    transparent.putalpha(alpha)
    alpha16 = np.array(transparent)[..., [2, 1, 0, 3]].astype(np.uint16) * 257
    white = palette.getpixel((0, 0))
    left, right = palette.copy(), palette.copy()
    left.paste(white, (40, 0, 256, 64))
    right.paste(white, (0, 0, 40, 64))
    nothing = rgb.convert("RGBA")
    nothing.putalpha(0)
    light = Image.new("RGBA", rgb.size, (255, 255, 240))
    light.putalpha(alpha)
    return {
        "grey": saved(grey), "1 bit": saved(grey.point(lambda value: value // 255 * 255).convert("1")),
        "palette": saved(palette), "palette tRNS": saved(palette, transparency=white),
        "LA": saved(transparent.convert("LA")),
        "RGB tRNS": saved(rgb, transparency=(255, 255, 255)), "grey tRNS": saved(grey, transparency=255),
        "RGBA": saved(rgb.convert("RGBA")), "transparent": saved(transparent),
        "16 bit": png(np.array(grey).astype(np.uint16) * 257), "RGB 16 bit": png(colour.astype(np.uint16) * 257),
        "transparent 16 bit": png(alpha16), "turned": saved(rgb.rotate(90, expand=True), exif=turned),
        "BMP": saved(rgb, "BMP"), "grey BMP": saved(grey, "BMP"), "palette BMP": saved(palette, "BMP"),
        "GIF": saved(palette, "GIF"), "transparent GIF": saved(palette, "GIF", transparency=white),
        "animated GIF": saved(left, "GIF", save_all=True, append_images=[right]),
        "alpha 0": saved(nothing), "LA alpha 0": saved(nothing.convert("LA")), "TIFF alpha 0": saved(nothing, "TIFF"),
        "BMP alpha 0": png(np.dstack([colour, np.zeros((64, 256), np.uint8)]), ".bmp"),
        "WebP alpha 0": saved(nothing, "WEBP", lossless=True, exact=True),
        "light on nothing": saved(light), "light on nothing, GIF": saved(light, "GIF"),
        "light on nothing, WebP": saved(light, "WEBP", lossless=True),
        "JPEG with a thumbnail": saved(rgb, "MPO", quality=98, save_all=True, append_images=[rgb.resize((64, 16))]),
        "TIFF of two pages": saved(rgb, "TIFF", save_all=True, append_images=[ImageOps.mirror(rgb)]),
        "WebP": saved(rgb, "WEBP", lossless=True), "transparent WebP": saved(transparent, "WEBP", lossless=True),
        "TIFF": saved(rgb, "TIFF"), "CMYK TIFF": saved(rgb.convert("CMYK"), "TIFF"),
        "compressed TIFF": saved(rgb, "TIFF", compression="tiff_lzw"),
        "16 bit TIFF": png(np.array(grey).astype(np.uint16) * 257, ".tiff"),
        "float TIFF": saved(Image.fromarray(np.float32(grey) / 255), "TIFF"),
        "JPEG": saved(rgb, "JPEG", quality=98), "grey JPEG": saved(grey, "JPEG", quality=98),
        "CMYK JPEG": saved(rgb.convert("CMYK"), "JPEG", quality=98),
        "twice as large": saved(rgb.resize((512, 128), Image.NEAREST)), "narrow": saved(rgb.crop((0, 0, 150, 64))),
    }


@pytest.mark.parametrize("kind", sorted(variants(np.zeros((64, 256, 3), np.uint8))))
def test_the_same_picture_in_any_file_gives_the_same_input(colour, kind):
    ink = OCR.load_image(png(colour))
    assert ink.shape == (64, 256) and ink.dtype == np.uint8 and ink.max() == 255 and ink[0, -1] == 0
    np.testing.assert_array_equal(ink, np.where((colour == 255).all(axis=2), 0, 255))
    loaded = OCR.load_image(variants(colour)[kind])
    np.testing.assert_allclose(loaded, ink, atol=40 if "JPEG" in kind else 0)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG", "AVIF"])
def test_an_image_is_turned_as_a_browser_shows_it(colour, kind):
    """Each orientation that EXIF has: what is shown there first and leftmost."""
    turn, orientation = Image.Transpose, Image.Exif()
    options = {"quality": 98} if kind in ("JPEG", "AVIF") else {"lossless": True} if kind == "WEBP" else {}
    stored = [turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE, turn.ROTATE_90,
              turn.TRANSVERSE, turn.ROTATE_270]
    upright, ink = Image.fromarray(colour[..., ::-1]), OCR.load_image(png(colour))
    for orientation[ExifTags.Base.Orientation], way in enumerate(stored, 2):
        file = saved(upright.transpose(way), kind, exif=orientation, **options)
        np.testing.assert_allclose(OCR.load_image(file), ink, atol=40 if options.get("quality") else 0)


def letters(*spans):
    """A captcha of which only the letters in these columns are seen."""
    picture = np.full((64, 256, 3), 255, np.uint8)
    whole = cv2.putText(picture.copy(), "HK7M", (5, 50), cv2.FONT_HERSHEY_SIMPLEX, 1.5, (90, 40, 20), 4)
    for start, end in spans:
        picture[:, start:end] = whole[:, start:end]
    return picture


LETTERS = [(0, 40), (40, 75), (75, 105), (105, 256)]


@pytest.mark.parametrize("kind, options", [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}),
                                           ("AVIF", {"quality": 98})])
@pytest.mark.parametrize("frames", [
    [LETTERS[:count] for count in range(5)],  # one after another
    [LETTERS[count:count + 1] for count in range(4)],  # one at a time
    [LETTERS[1:], LETTERS[1:], LETTERS],  # one blinks
], ids=["growing", "alone", "blinking"])
def test_letters_that_frames_of_an_animation_lack_are_seen(kind, options, frames):
    first, *others = (Image.fromarray(letters(*spans)[..., ::-1]) for spans in frames)
    ink = OCR.load_image(saved(first, kind, save_all=True, append_images=others, **options))
    whole = OCR.load_image(png(letters(*LETTERS)))
    for start, end in LETTERS:
        assert ink[:, start:end][whole[:, start:end] == 255].mean() > 50, (start, end)
    assert ink[whole == 0].mean() < 5


def test_noise_that_moves_gets_weak(colour):
    generator, ink = np.random.default_rng(0), OCR.load_image(png(colour))
    frames = [Image.fromarray(np.where(generator.random((64, 256, 1)) < .3, np.uint8(0), colour[..., ::-1]))
              for _ in range(8)]
    loaded = OCR.load_image(saved(frames[0], "PNG", save_all=True, append_images=frames[1:]))
    assert (loaded[ink == 0] > 150).mean() < .05 and loaded[ink == 255].mean() > 240


def test_a_long_animation_cannot_stall_the_service(monkeypatch):
    """Only so many pixels of it are decoded; what is behind may even be damaged."""
    frames = [Image.new("P", (1000, 1000), number) for number in range(12)]
    whole = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert OCR.load_colours(whole[:len(whole) * 2 // 3]).shape == (64, 64, 3)
    decoded, colours_of = [], LstmCtcOcr._colours_of
    monkeypatch.setattr(LstmCtcOcr, "_colours_of", staticmethod(lambda image: decoded.append(1) or colours_of(image)))
    small = [Image.new("P", (9, 9), number % 256) for number in range(1000)]
    OCR.load_colours(saved(small[0], "GIF", save_all=True, append_images=small[1:]))
    assert len(decoded) < 500


def framed(picture, top, bottom, left, right, colour=(0, 0, 0)):
    return cv2.copyMakeBorder(picture, top, bottom, left, right, cv2.BORDER_CONSTANT, value=colour)


@pytest.mark.parametrize("sides", [(30, 30, 0, 0), (96, 96, 0, 0), (9, 0, 0, 0), (0, 25, 0, 0), (1, 1, 1, 1),
                                   (2, 2, 2, 2), (10, 10, 10, 10), (3, 40, 20, 7)])
@pytest.mark.parametrize("paper", [255, 90], ids=["light", "dark"])
def test_bars_and_borders_are_cut_off(colour, sides, paper):
    """In the ink's colour, in others, two around each other, and when they are blurred, as in a JPEG."""
    colour = np.where(colour == 255, np.uint8(paper), colour)
    ink = OCR.load_image(png(colour))
    for other in (90, 40, 20), (0, 0, 0), (0, 0, 255), (200, 160, 240):
        np.testing.assert_array_equal(OCR.load_image(png(framed(colour, *sides, other))), ink)
    if len(set(sides)) == 1:
        double = framed(framed(colour, *sides), 4, 4, 4, 4, (0, 255, 255))
        np.testing.assert_array_equal(OCR.load_image(png(double)), ink)
    soft = cv2.GaussianBlur(framed(colour, *sides), (3, 3), 0)
    kept = OCR.load_image(cv2.imencode(".jpg", soft)[1].tobytes())
    assert (np.abs(kept.astype(int) - ink) < 100).mean() > .93


def bold(word, paper):
    """Black letters with flat tops, and so many pixels of white around them."""
    box = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), word, font_size=44, stroke_width=2)
    picture = Image.new("L", (round(box[2] - box[0]) + 2 * paper, round(box[3] - box[1]) + 2 * paper), 255)
    ImageDraw.Draw(picture).text((paper - box[0], paper - box[1]), word, 0, font_size=44, stroke_width=2)
    return np.array(picture)


def belonging():
    """Pictures that end in lines of one colour which are no bars: what is cut there would be lost."""
    letter, tight, white = (np.full(size, 255, np.uint8) for size in ((50, 30), (40, 90), (60, 160)))
    letter[-8:] = letter[:, :8] = 0  # an L that fills its picture
    tight[:, :9] = tight[:, 25:34] = tight[16:24, :34] = tight[:30, 60:70] = 0  # an H at the left side
    lined = white.copy()
    lined[8] = lined[30] = 0
    words = {word: bold(word, number % 3 * 5 + 2) for number, word in enumerate(
        ["BEER", "DEED", "EEEE", "TEE5", "EFT7", "TTTT", "5577", "FEZ7", "HHHH", "IDLE"])}
    return words | {"letter": letter, "upside down": letter[::-1], "tight": tight, "mirrored": tight[:, ::-1],
            "blank": white, "lined": lined, "margins": np.uint8(np.pad(tight, 15, constant_values=255)),
            "gradient": np.uint8(np.linspace(90, 250, 60)[:, None] + np.zeros(160)),
            "stripes": np.uint8(np.arange(60)[:, None] % 2 * 255 + np.zeros(160))}


@pytest.mark.parametrize("name", sorted(belonging()))
def test_what_belongs_to_a_picture_is_not_cut_off(name):
    picture = belonging()[name]
    height, width = picture.shape
    method = cv2.INTER_LINEAR if height <= 64 else cv2.INTER_AREA
    whole = cv2.resize(np.float32(picture) / 255, (round(width * 64 / height), 64), interpolation=method)
    np.testing.assert_array_equal(OCR.load_colours(png(picture))[..., 0], whole)


def test_files_of_every_suffix_are_read(tmp_path, capfd):
    """As browsers and telephones name them."""
    image = Image.open(ROOT / "dataset" / "test" / "0_PIY.png")
    kinds = dict.fromkeys(["jfif", "jpe", "pjpeg", "pjp", "JPG"], "JPEG") | {"avif": "AVIF", "apng": "PNG"}
    for number, (suffix, kind) in enumerate(kinds.items()):
        image.save(tmp_path / f"{number}_PIY.{suffix}", kind, quality=95)
    assert main(["test", str(tmp_path), "--model", str(SHIPPED), "--json"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["ocr_ret"] for line in lines] == ["PIY"] * len(kinds)


def test_colours_are_rgb_and_mixed_with_white_where_they_are_half_transparent(ocr):
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 128))
    np.testing.assert_allclose(ocr.load_colours(saved(image))[5, 5], [1, .5, .5], atol=.003)
    assert ocr.load_colours(saved(image.convert("L"))).shape == (64, 64, 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (64, 256), (20, 2000), (700, 90)])
def test_any_size_gives_the_networks_size(size):
    assert OCR.load_image(png(np.full((*size, 3), 200, np.uint8))).tolist() == np.zeros((64, 256)).tolist()


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_numbers_of_32_bits_are_shares_of_the_largest(kind, tmp_path):
    """As Pillow writes them; infinite ones are as black as those that are no numbers."""
    pixels = np.full((64, 100), 200, kind)
    pixels[20:40, 30:60] = 0
    if kind is np.float32:
        pixels[20:30, 30:60] = np.inf
    Image.fromarray(pixels).save(tmp_path / "it.tif")
    ink = OCR.load_image(tmp_path / "it.tif")
    np.testing.assert_array_equal(ink[:, :100], np.where(pixels == 200, 0, 255))


@pytest.mark.parametrize("number", [-2e9, -3e38, -np.inf])
def test_negative_numbers_are_black(number, tmp_path):
    pixels = np.full((64, 100), number, np.float32)
    Image.fromarray(pixels).save(tmp_path / "blank.tif")
    pixels[20:40, 30:60] = 5
    Image.fromarray(pixels).save(tmp_path / "it.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not OCR.load_image(tmp_path / "blank.tif").any()
        ink = OCR.load_image(tmp_path / "it.tif")
    np.testing.assert_array_equal(ink[:, :100], np.where(pixels == 5, 255, 0))


@pytest.mark.parametrize("words, complaint", [("A/", "cannot render ['/']"), ("AB验", "cannot render ['验']")])
def test_letters_that_cannot_be_rendered_are_one_line(words, complaint, tmp_path, capfd):
    assert main(["create_dataset", *flags(dataset=tmp_path / "new", words=words, im_total_num=2)]) == 2
    message, = capfd.readouterr().err.splitlines()
    assert complaint in message and not list(tmp_path.glob("*/*.png"))


def broken(colour):
    whole = png(colour)
    return {"empty": b"", "text": b"hello", "cut": whole[:len(whole) // 2], "PBM": b"P4 8 1\n\xff",
            "cut JPEG": png(colour, ".jpg")[:900], "damaged": whole[:200] + b"\0" * 50 + whole[250:]}


@pytest.mark.parametrize("kind", sorted(broken(np.zeros((64, 256, 3), np.uint8))))
def test_what_is_no_whole_image_is_one_error_that_names_the_file(colour, kind, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(broken(colour)[kind])
    with pytest.raises(LstmCtcOcr.Error, match="broken.png: not a whole image"):
        OCR.load_image(path)
    with pytest.raises(LstmCtcOcr.Error, match="the image: not a whole image"):
        OCR.load_image(path.read_bytes())


@pytest.mark.parametrize("name, fault", [("gone.png", "No such file"), ("", "Is a directory"), ("a\0b", "null")])
def test_an_unreadable_path_is_one_error(name, fault, tmp_path):
    with pytest.raises(LstmCtcOcr.Error, match=fault):
        OCR.load_image(tmp_path / name)


def test_a_pipe_in_a_folder_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "0_A.png")
    with pytest.raises(LstmCtcOcr.Error, match="0_A.png: a pipe, not a file"):
        OCR.load_image(tmp_path / "0_A.png")


def huge(kind):
    """The first bytes of an image of 60,000 x 60,000 pixels, or a large one, with nothing behind its header."""
    size = struct.pack("<II", 60000, 60000)
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    chunks = b"\0\0\0\r" + chunk + struct.pack(">I", zlib.crc32(chunk)) + b"\0\0\0\0IDAT5\xaf\x06\x1e"
    vp8l = b"/" + struct.pack("<I", 16382 | 16382 << 14) + bytes(11)  # its largest size
    tags = [(256, 60000), (257, 60000), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, 60000), (279, 9)]
    return {"PNG": b"\x89PNG\r\n\x1a\n" + chunks,
            "WEBP": b"RIFF\x1c\0\0\0WEBPVP8L\x10\0\0\0" + vp8l,
            "TIFF": b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(
                struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4),
            "BMP": b"BM" + struct.pack("<IHHII", 54, 0, 0, 54, 40) + size + struct.pack("<HHIIIIII", 1, 24, *[0] * 6),
            "GIF": b"GIF89a" + b"\x60\xea" * 2 + bytes(3) + b",\0\0\0\0" + b"\x60\xea" * 2 + b"\0\x02\0",
            "JPEG": b"\xff\xd8\xff\xc0\0\x11\x08" + b"\xea\x60" * 2 + b"\x03\1\x11\0\2\x11\0\3\x11\0"}[kind]


def test_too_many_pixels_are_refused_from_the_header(tmp_path):
    for kind in "PNG", "BMP", "GIF", "JPEG", "WEBP", "TIFF":
        path = tmp_path / kind
        path.write_bytes(huge(kind))
        with pytest.raises(LstmCtcOcr.TooLarge, match=f"{kind}: more than 4,000,000 pixels"):
            OCR.load_image(path)


# ---- decoded for training

LOAD = """
import hashlib, os, sys
from pathlib import Path
import numpy as np
from lstm_ctc_ocr import LstmCtcOcr
LstmCtcOcr.IN_MEMORY, load_image, decoded = 20 * 64 * 96, LstmCtcOcr.load_image, []
def load(self, path):
    decoded.append(path)
    if len(decoded) == int(sys.argv[3]):
        os.kill(os.getpid(), 9)
    return load_image(self, path)
LstmCtcOcr.load_image = load
ocr = LstmCtcOcr(words="AX", words_max_num=3, im_width=96, im_height=64).resolve()
try:
    images, files = ocr.load_images(ocr.labelled_files(sys.argv[1]), Path(sys.argv[2]))
except ocr.Error as error:
    sys.exit(str(error))
rows = [images[np.array([row])] for row in range(len(files))]
print(*(text + hashlib.md5(row).hexdigest() for row, (_, text) in zip(rows, files)))
"""


def start_loading(folder, model, kill_at=0, **options):
    """A process that decodes a folder of images, more than it may keep in memory."""
    return subprocess.Popen([sys.executable, "-c", LOAD, folder, model, str(kill_at)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def loaded(process):
    """Returns the digests of all images that a process has decoded, and its messages."""
    output, messages = process.communicate()
    assert "Traceback" not in messages
    return sorted(output.split()), messages


def expected(ocr, folder):
    """What loading each image of a folder by itself gives."""
    return sorted(path.stem.split("_")[1] + hashlib.md5(ocr.load_image(path)).hexdigest()
                  for path in folder.glob("[0-9]*.png"))


@pytest.fixture
def folder(dataset, tmp_path):
    """40 images of the small task."""
    (tmp_path / "images").mkdir()
    for path in sorted(dataset.glob("*.png"))[:40]:
        shutil.copy2(path, tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def model(tmp_path):
    return tmp_path / "model"


def test_many_images_are_kept_in_a_file_that_leaves_nothing_behind(ocr, folder, model):
    before = contents(folder)
    assert loaded(start_loading(folder, model)) == (expected(ocr, folder), "")
    assert contents(folder) == before and not os.listdir(model)


def test_few_images_are_kept_in_memory(ocr, folder, model):
    for path in sorted(folder.glob("*.png"))[20:]:
        path.unlink()
    assert loaded(start_loading(folder, model)) == (expected(ocr, folder), "")
    assert not model.exists()


def test_many_threads_read_decoded_images_at_once(ocr, folder, model, monkeypatch):
    monkeypatch.setattr(LstmCtcOcr, "IN_MEMORY", 20 * 64 * 96)
    images, files = ocr.load_images([(str(path), "A") for path in folder.glob("*.png")], model)
    whole, rows = images[np.arange(40)], [np.random.default_rng(seed).permutation(40) for seed in range(100)]
    with ThreadPool(8) as pool:
        assert all((read == whole[order]).all() for read, order in zip(pool.map(images.__getitem__, rows), rows))
    assert all((image == ocr.load_image(path)).all() for image, (path, _) in zip(whole, files))


def test_what_cannot_be_decoded_is_left_out_and_said(ocr, folder, model):
    good = expected(ocr, folder)
    (folder / "900_AX.png").write_bytes(b"no image")
    digests, messages = loaded(start_loading(folder, model))
    assert digests == good and messages.count("left out") == 1
    assert "900_AX.png: not a whole image" in messages


@pytest.mark.parametrize("moment", [1, 20, 40])
def test_kill_9_while_decoding_leaves_nothing_behind(moment, ocr, folder, model):
    process = start_loading(folder, model, moment)
    assert loaded(process) == ([], "") and process.returncode == -9
    assert not os.listdir(model)
    assert loaded(start_loading(folder, model)) == (expected(ocr, folder), "")


def test_a_disk_that_is_full_while_decoding_is_one_line(ocr, folder, model):
    import resource
    process = start_loading(folder, model, preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (120_000, 120_000)))
    _, messages = loaded(process)
    message, = messages.splitlines()
    assert process.returncode == 1 and message.startswith(f"cannot write to {model} (File too large); run the same")
    assert not os.listdir(model)  # what was written takes no room
    assert loaded(start_loading(folder, model)) == (expected(ocr, folder), "")
