"""An exported ONNX file: read by ONNX Runtime and by ddddocr, it must read as TensorFlow does."""

import json
import shutil
import sys

import cv2
import numpy as np
import pytest
from captcha.image import ImageCaptcha
from conftest import PRETRAINED, ROOT, SHIPPED

import lstm_ctc_ocr
from lstm_ctc_ocr import LstmCtcOcr, main

pytest.importorskip("onnx", reason="needs pip install onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install onnxruntime")


@pytest.fixture(scope="module", autouse=True)
def float32():
    """TensorFlow without bfloat16, whose rounding is far above what is compared here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lstm_ctc_ocr, "_has_bfloat16", lambda: False)
        yield


def untrained(folder, **settings):
    """A model folder of first weights, but with statistics and biases that are not the neutral ones."""
    tf, ocr = lstm_ctc_ocr._tensorflow(), LstmCtcOcr(**settings)
    with tf.Graph().as_default(), tf.Session() as session:
        ocr._build_reading(ocr._build_input())
        session.run(tf.global_variables_initializer())
        generator = np.random.default_rng(0)
        for variable in tf.global_variables():
            if len(variable.shape) == 1:
                variable.load(generator.uniform(0.5, 1.5, variable.shape), session)
        folder.mkdir()
        ocr._reading_saver().save(session, str(folder / "LstmCtcOcr"), 1)
    config = {name: getattr(ocr, name) for name in lstm_ctc_ocr.ARCHITECTURE}
    (folder / "config.json").write_text(json.dumps({"format": 1, **config, "best_step": 1}))
    return folder


MODELS = {
    "lstm": lambda folder: PRETRAINED / "lstm",
    "cnn_lstm": lambda folder: SHIPPED,
    "wide": lambda folder: untrained(folder, net="wide_cnn_lstm", paper="border", words="AbC12", n_hidden=32),
    "parts": lambda folder: untrained(folder, net="cnn_lstm", paper="border", label_parts=3, words="AX", n_hidden=32),
}


@pytest.fixture(scope="module")
def pictures():
    """Images (h, w, 3) uint8: plain, light on dark, coloured, blank, narrow, and wider than the model."""
    texts = ["PIY", "A", "HELLO", "ZZZZ", "QWERTYUIOP", "MNO"]
    plain = [cv2.imdecode(np.frombuffer(ImageCaptcha(width, 64).generate(text).read(), np.uint8), 1)
             for text in texts for width in (256, 200, 120, 400)]
    generator = np.random.default_rng(0)
    noise = [generator.integers(0, 256, (64, width, 3), np.uint8) for width in (1, 5, 9, 255, 257)]
    return [*plain, *(255 - image for image in plain[:8]), *noise, np.full((64, 90, 3), 130, np.uint8)]


@pytest.mark.parametrize("kind", MODELS)
def test_scores_equal_those_of_tensorflow(kind, pictures, tmp_path):
    model = MODELS[kind](tmp_path / "model")
    assert main(["export", str(tmp_path / "it.onnx"), "--model", str(model)]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "it.onnx"))
    ocr = LstmCtcOcr(model=str(model))
    tensorflow, net = ocr._reader
    for picture in pictures:
        data = cv2.imencode(".png", picture)[1].tobytes()
        logits = tensorflow.run(net.logits, {net.images: ocr.load_image(data)[None]}).astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(axis=2, keepdims=True))
        colours = picture.astype(np.float32) / 255
        if ocr.paper == "brightest":
            colours = cv2.cvtColor(colours, cv2.COLOR_BGR2GRAY)[..., None]
        scores, = session.run(None, {"images": colours.transpose(2, 0, 1)[None]})
        np.testing.assert_allclose(np.roll(scores, -1, axis=2), expected, atol=1e-3 if picture.shape[1] <= 256 else 2e-2)
        assert (np.roll(scores, -1, axis=2).argmax(2) == expected.argmax(2)).mean() > 0.99


def test_reads_a_batch_as_it_reads_each(pictures, tmp_path):
    model = untrained(tmp_path / "model", net="cnn_lstm", words="AX", n_hidden=32)
    assert main(["export", str(tmp_path / "it.onnx"), "--model", str(model)]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "it.onnx"))
    images = np.stack([image for image in pictures if image.shape[1] == 256]).transpose(0, 3, 1, 2) / np.float32(255)
    together, = session.run(None, {"images": images})
    for number, image in enumerate(images):
        alone, = session.run(None, {"images": image[None]})
        np.testing.assert_allclose(together[:, number], alone[:, 0], atol=1e-4)


def test_temperature_and_metadata(tmp_path):
    scores = {}
    for temperature in (1, 2):
        model = shutil.copytree(SHIPPED, tmp_path / f"model{temperature}")
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "temperature": temperature}))
        path = tmp_path / f"{temperature}.onnx"
        assert main(["export", str(path), "--model", str(model)]) == 0
        session = onnxruntime.InferenceSession(str(path))
        known = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
        assert known["temperature"] == temperature and known["accuracy"] == 0.996 and known["net"] == "cnn_lstm"
        image = np.linspace(0, 1, 64 * 256, dtype=np.float32).reshape(1, 1, 64, 256)
        scores[temperature] = session.run(None, {"images": image})[0].astype(np.float64)
    softened = scores[1] / 2
    softened -= np.log(np.exp(softened).sum(axis=2, keepdims=True))
    np.testing.assert_allclose(scores[2], softened, atol=1e-3)
    assert not list(tmp_path.glob(".*"))  # nothing half written is left


def test_without_the_package_one_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert main(["export", str(tmp_path / "it.onnx")]) == 2
    assert "pip install onnx" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_ddddocr_reads_the_samples(tmp_path):
    ddddocr = pytest.importorskip("ddddocr", reason="needs pip install ddddocr==1.6.1")
    assert main(["export", str(tmp_path / "it.onnx"), "--model", str(SHIPPED)]) == 0
    reader = ddddocr.DdddOcr(det=False, ocr=False, show_ad=False, import_onnx_path=str(tmp_path / "it.onnx"),
                             charsets_path=str(tmp_path / "it.json"))
    samples = sorted((ROOT / "dataset" / "test").glob("*.png"))
    texts = [text for text, _ in LstmCtcOcr(model=str(SHIPPED)).recognise(samples)]
    assert samples and [reader.classification(path.read_bytes()) for path in samples] == texts
