"""The SavedModel that `export DIR` writes must read what this program reads."""

import json
import shutil

import numpy as np
import pytest
import tensorflow as tensorflow2
import tensorflow.compat.v1 as tf
from conftest import ROOT, SHIPPED, untrained

from lstm_ctc_ocr import LstmCtcOcr, main

SAMPLES = {path.stem.split("_")[1]: path for path in sorted((ROOT / "dataset" / "test").glob("*.png"))}


def saved(model, folder):
    """Exports a model folder; returns a function: ink (B, H, W) uint8 -> texts, confidences, by TensorFlow alone."""
    assert main(["export", str(folder), "--model", str(model)]) == 0
    loaded = tensorflow2.saved_model.load(str(folder))
    read = loaded.signatures["serving_default"]

    def texts_and_confidences(ink, _=loaded):  # the loaded model must live as long as this
        outputs = read(ink=tensorflow2.constant(ink))
        assert outputs["confidence"].dtype == tf.float32
        return [text.decode() for text in outputs["text"].numpy()], outputs["confidence"].numpy()

    return texts_and_confidences


def test_it_reads_what_recognise_reads(tmp_path, capsys):
    """Samples, repeats, and a blank image, alone and among others."""
    LstmCtcOcr(dataset=str(tmp_path / "repeats"), words="AX", im_total_num=12, seed=2).create_dataset()
    blank = tmp_path / "blank.png"
    blank.write_bytes(tensorflow2.io.encode_png(np.full((64, 256, 3), 200, np.uint8)).numpy())
    paths = [blank, *SAMPLES.values(), *sorted((tmp_path / "repeats").glob("*.png"))]
    ocr, read = LstmCtcOcr(model=str(SHIPPED)), saved(SHIPPED, tmp_path / "exported")
    ours = ocr.recognise(paths)
    ink = np.stack([ocr.resolve().load_image(path) for path in paths])
    texts, confidences = read(ink)
    assert texts == [text for text, _ in ours] and texts[1:4] == [*SAMPLES]
    assert confidences == pytest.approx([confidence for _, confidence in ours], abs=0.02)
    assert read(ink[:1])[0] == [""] and read(ink[1:2, :, :192])[0] == ["PIY"]
    assert main(["export", str(tmp_path / "exported"), "--model", str(SHIPPED)]) == 2  # nothing is overwritten
    assert "is there already" in capsys.readouterr().err.splitlines()[-1]


def test_a_models_temperature_lowers_its_confidence(tmp_path):
    shutil.copytree(SHIPPED, tmp_path / "model")
    config = json.loads((SHIPPED / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "temperature": 3.0}))
    ocr = LstmCtcOcr(model=str(tmp_path / "model"))
    texts, confidences = saved(tmp_path / "model", tmp_path / "exported")(
        np.stack([ocr.resolve().load_image(path) for path in SAMPLES.values()]))
    ours = ocr.recognise(list(SAMPLES.values()))
    assert texts == [*SAMPLES] and max(confidences) < 0.95
    assert confidences == pytest.approx([confidence for _, confidence in ours], abs=0.05)  # float32, not bfloat16


@pytest.mark.parametrize("label_parts", [1, 3])
def test_its_texts_are_those_of_the_network(label_parts, tmp_path, monkeypatch):
    """No letter, repeats, and the longest text in one batch; with parts, the middle one writes the letter."""
    expected = ["", "A", "AAA", "CBAC", ""]
    model = untrained(tmp_path / "model", words="ABC", words_max_num=4, label_parts=label_parts)
    ocr = LstmCtcOcr(words="ABC", label_parts=label_parts).resolve()
    sparse = ocr.sequences_to_sparse([ocr.text_to_sequence(text) for text in expected])
    monkeypatch.setattr(LstmCtcOcr, "decode", lambda self, logits: (
        tf.SparseTensor(sparse[0], tf.cast(sparse[1], tf.int64), sparse[2]), tf.zeros([len(expected)])))
    texts, confidences = saved(model, tmp_path / "exported")(np.zeros((5, 64, 256), np.uint8))
    assert texts == expected and confidences.tolist() == [1] * 5
