"""Rendering, and the one way in which images are loaded."""

import collections
import hashlib
import io
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import zlib
from multiprocessing.pool import ThreadPool

import captcha
import cv2
import numpy as np
import pytest
from conftest import ROOT, TASK, flags, spawn
from PIL import ExifTags, Image, ImageOps

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
    assert .04 < len(sums) / len(everything) < .08 and set("".join(sums)) == set("0123456789+-*×/÷=?")
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
    other = ImageOps.mirror(palette)
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
        "animated GIF": saved(palette, "GIF", save_all=True, append_images=[other]),
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
