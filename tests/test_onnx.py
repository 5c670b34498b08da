"""An exported ONNX file: read by ONNX Runtime, by ddddocr and by this program, it must read as TensorFlow does."""

import json
import os
import random
import shutil
import subprocess
import sys
import types

import cv2
import numpy as np
import pytest
from captcha.image import ImageCaptcha
from conftest import PRETRAINED, ROOT, SCRIPT, SHIPPED, flags, untrained

import lstm_ctc_ocr
from lstm_ctc_ocr import LstmCtcOcr, main

pytest.importorskip("onnx", reason="needs pip install onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install onnxruntime")


@pytest.fixture(scope="module", autouse=True)
def float32_and_another_network():
    """Turns bfloat16 off, whose rounding is far above what is compared here, and adds a row to NETWORKS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lstm_ctc_ocr, "_has_bfloat16", lambda: False)
        patch.setitem(lstm_ctc_ocr.NETWORKS, "another", types.SimpleNamespace(
            about="", convolutions=((8, 3, 4, 1, 1), (12, 5, 1, 4, 0)), projection=16,
            inks=(), doubt=0))
        yield


MODELS = {
    "lstm": lambda folder: PRETRAINED / "lstm",
    "cnn_lstm": lambda folder: SHIPPED,
    "general": lambda folder: PRETRAINED / "general",  # residual blocks, a temperature, paper by the border
    "parts": lambda folder: untrained(folder, net="cnn_lstm", label_parts=3, words="AX", n_hidden=32),
    "another": lambda folder: untrained(folder, net="another", words="ABCD", n_hidden=24),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Images (64, w, 3) uint8 as PNG files have them: plain, light on dark, varied, noise, narrow, blank."""
    folder = tmp_path_factory.mktemp("varied")
    assert main(["create_dataset", *flags(dataset=folder, look="varied", im_total_num=40, seed=3)]) == 0
    varied = [cv2.imread(str(path)) for path in sorted(folder.glob("*.png"))]
    varied = [cv2.resize(image, (min(256, round(image.shape[1] * 64 / image.shape[0])), 64)) for image in varied]
    random.seed(0)  # captcha draws from there
    plain = [cv2.imdecode(np.frombuffer(ImageCaptcha(width, 64).generate(text).read(), np.uint8), 1)
             for text in ("PIY", "A", "ZZZZ", "QWERTYUIOP") for width in (256, 200, 120)]
    generator = np.random.default_rng(0)
    noise = [generator.integers(0, 256, (64, width, 3), np.uint8) for width in (5, 9, 255)]
    return [*plain, *(255 - image for image in plain[:6]), *varied, *noise, np.full((64, 90, 3), 130, np.uint8)]


def as_a_client(picture):
    """What the file is given: (1, 3, H, w) float32."""
    return {"images": picture.transpose(2, 0, 1)[None] / np.float32(255)}


@pytest.mark.parametrize("kind", MODELS)
def test_scores_and_texts_equal_those_of_tensorflow(kind, pictures, exported, tmp_path):
    """A foreign client's, which gives an image as it is, and this program's, which reads it as it reads any."""
    model = MODELS[kind](tmp_path / "model")
    path = exported(model)
    session = onnxruntime.InferenceSession(str(path))
    tensorflow, ours = (LstmCtcOcr(model=str(each)) for each in (model, path))
    datas = [cv2.imencode(".png", picture)[1].tobytes() for picture in pictures]
    ocr = tensorflow._reader.ocr

    def expected(image):
        logits = tensorflow._reader.logits(image).astype(np.float64)
        return logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))

    for picture, data in zip(pictures, datas):
        image = ocr.load_image(data)[None, :, :picture.shape[1]]
        foreign, = session.run(None, as_a_client(picture))
        seen = image[..., [0, 0]] if image.ndim == 4 else image  # the file removes no clutter
        for scores, image in ((np.roll(foreign, -1, axis=2), seen), (ours._reader.logits(image), image),
                              (ours._reader.logits(image, alone=True), image)):
            # They go down to -80; and lstm takes 256 steps one after the other, each of which rounds.
            np.testing.assert_allclose(scores, expected(image), atol=1e-2 if kind == "lstm" else 1e-3, rtol=1e-4)
    texts, got = ([text for text, _ in each.recognise(datas)] for each in (tensorflow, ours))
    assert got == texts


def test_images_of_any_width_are_read(exported):
    """Narrower and wider than this program lets its network see them."""
    session, ocr = onnxruntime.InferenceSession(str(exported(SHIPPED))), LstmCtcOcr(model=str(SHIPPED))
    random.seed(0)
    for width in 150, 200, 257, 300, 400:
        captcha = ImageCaptcha(width, 64).generate("HELLO").read()
        scores, = session.run(None, as_a_client(cv2.imdecode(np.frombuffer(captcha, np.uint8), 1)))
        (text, confidence), = ocr._reader.ocr.texts(np.roll(scores, -1, axis=2))
        (expected, sure), = ocr.recognise([captcha])
        assert text == expected == "HELLO" and confidence == pytest.approx(sure, abs=0.01)


def test_reads_a_batch_as_it_reads_each(pictures, exported):
    session = onnxruntime.InferenceSession(str(exported(PRETRAINED / "general")))
    images = np.stack([image for image in pictures if image.shape[1] == 256]).transpose(0, 3, 1, 2) / np.float32(255)
    together, = session.run(None, {"images": images})
    for number, image in enumerate(images):
        alone, = session.run(None, {"images": image[None]})
        np.testing.assert_allclose(together[:, number], alone[:, 0], atol=1e-3)


def test_temperature_and_metadata(tmp_path):
    scores = {}
    for temperature in (1, 2):
        model = shutil.copytree(SHIPPED, tmp_path / f"model{temperature}")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "temperature": temperature}))
        path = tmp_path / f"{temperature}.onnx"
        assert main(["export", str(path), "--model", str(model)]) == 0
        session = onnxruntime.InferenceSession(str(path))
        known = json.loads(session.get_modelmeta().custom_metadata_map["lstm_ctc_ocr"])
        assert known == json.loads((model / "config.json").read_text()) and known["temperature"] == temperature
        image = np.linspace(0, 1, 64 * 256, dtype=np.float32).reshape(1, 1, 64, 256)
        scores[temperature] = session.run(None, {"images": image})[0].astype(np.float64)
    softened = scores[1] / 2
    softened -= np.log(np.exp(softened).sum(axis=2, keepdims=True))
    np.testing.assert_allclose(scores[2], softened, atol=1e-3)
    assert not list(tmp_path.glob(".*"))  # nothing half written is left


def test_ddddocr_reads_as_we_do(tmp_path, exported):
    ddddocr = pytest.importorskip("ddddocr", reason="needs pip install ddddocr==1.6.1")
    path = exported(SHIPPED)
    reader = ddddocr.DdddOcr(det=False, ocr=False, show_ad=False, import_onnx_path=str(path),
                             charsets_path=str(path.with_suffix(".json")))
    assert main(["create_dataset", *flags(dataset=tmp_path / "unseen", im_total_num=300, seed=55)]) == 0
    samples, unseen = (sorted(folder.glob("*.png")) for folder in (ROOT / "dataset" / "test", tmp_path / "unseen"))
    right = {path: reader.classification(path.read_bytes()) == path.stem.split("_")[1] for path in [*samples, *unseen]}
    assert samples and all(right[path] for path in samples)
    readings = LstmCtcOcr(model=str(SHIPPED)).recognise_files(unseen)
    ours = sum(text == path.stem.split("_")[1] for path, text, *_ in readings)
    assert len(unseen) == 300 and abs(sum(right[path] for path in unseen) - ours) <= 1.5


# ---------------------------------------------------------------------- what is missing or wrong

MISSING = """
import sys

class Missing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("tensorflow", "keras", "captcha", "onnx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

sys.meta_path.insert(0, Missing())
"""


@pytest.mark.parametrize("arguments, code, said", [
    (["test", "--model", "{onnx}"], 0, "accuracy 100.00% (3 of 3)"),
    (["test", "--model", "cnn_lstm"], 2, "(an ONNX file reads without), install tensorflow: pip install tensorflow"),
    (["create_dataset", "--dataset", "{tmp}"], 2, "pip install captcha")])
def test_it_reads_where_neither_tensorflow_nor_captcha_is_installed(arguments, code, said, exported, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(MISSING)
    arguments = [word.format(onnx=exported(SHIPPED), tmp=tmp_path / "images") for word in arguments]
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == code and said in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("package, arguments", [
    ("onnx", ["export", "{tmp}/new.onnx"]), ("onnxruntime", ["test", "--model", "{onnx}"])])
def test_without_the_package_one_line_says_what_to_install(package, arguments, exported, tmp_path, capsys, monkeypatch):
    arguments = [word.format(onnx=exported(SHIPPED), tmp=tmp_path) for word in arguments]
    monkeypatch.setitem(sys.modules, package, None)
    capsys.readouterr()
    assert main(arguments) == 2
    message, = capsys.readouterr().err.splitlines()
    assert message.endswith(f"pip install {package}") and not any(tmp_path.iterdir())


def not_ours(path):
    """An ONNX file that this program has not written."""
    import onnx
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "other", [value], [
        onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)


def of_other_letters(path):
    """Its metadata are another model's."""
    import onnx
    model = onnx.load(path)
    config, = model.metadata_props
    config.value = json.dumps({**json.loads(config.value), "words": "ABC"})
    onnx.save(model, path)


@pytest.mark.parametrize("ours, theirs", [(None, "config"), (None, "onnx.infer"), ("config", "onnx.infer")])
def test_metadata_that_others_add_are_ignored(ours, theirs, exported, tmp_path, capfd):
    """As those of a quantiser. Ours were called config once."""
    import onnx
    model = onnx.load(exported(SHIPPED))
    config, = model.metadata_props
    config.key = ours or config.key
    other = model.metadata_props.add()
    other.key, other.value = theirs, "dynamic int8"
    onnx.save(model, tmp_path / "it.onnx")
    assert main(["test", "--model", str(tmp_path / "it.onnx")]) == 0
    assert "3 of 3" in capfd.readouterr().out


@pytest.mark.parametrize("command", ["test", "start", "export"])
@pytest.mark.parametrize("harm", [
    lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:10_000]), not_ours, of_other_letters,
    lambda path: path.write_bytes(b"")])
def test_a_harmed_file_is_one_clear_line(harm, command, exported, tmp_path, capfd):
    path = tmp_path / "it.onnx"
    shutil.copy(exported(SHIPPED), path)
    harm(path)
    capfd.readouterr()
    arguments = {"start": ["--port", "0"], "export": [str(tmp_path / "new")]}.get(command, [])
    assert main([command, *arguments, "--model", str(path)]) == 2
    output, messages = capfd.readouterr()
    assert not output and str(path) in messages and "--model" in messages and len(messages.splitlines()) == 1


def test_from_a_file_nothing_can_be_trained_or_exported(exported, tmp_path, capsys):
    path = exported(SHIPPED)
    for arguments in (["export", str(tmp_path / "new")], ["export", str(tmp_path / "new.onnx")]):
        capsys.readouterr()
        assert main([*arguments, "--model", str(path)]) == 2
        message, = capsys.readouterr().err.splitlines()
        assert str(path) in message and "name another folder with --model" in message


def test_a_file_beside_it_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "config.json").write_text("mine")
    assert main(["export", str(tmp_path / "config.onnx"), "--model", str(SHIPPED)]) == 2
    assert "config.json is there already" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
