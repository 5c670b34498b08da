"""The SavedModel that `export DIR` writes: read by others it must give the texts and confidences that we read."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from conftest import ROOT, SHIPPED

from lstm_ctc_ocr import LstmCtcOcr, main

SAMPLES = {path.stem.split("_")[1]: path.read_bytes() for path in (ROOT / "dataset" / "test").glob("*.png")}


def by_the_command_line(folder, paths, tmp_path):
    """What TensorFlow's own saved_model_cli says of images: texts and confidences."""
    np.save(tmp_path / "images.npy", np.array([Path(path).read_bytes() for path in paths]))
    run_python("-m", "tensorflow.python.tools.saved_model_cli", "run", "--dir", folder, "--tag_set", "serve",
               "--signature_def", "serving_default", "--inputs", f"images={tmp_path / 'images.npy'}",
               "--outdir", tmp_path, "--overwrite")
    texts, confidences = (np.load(tmp_path / f"{name}.npy", allow_pickle=True) for name in ("text", "confidence"))
    return [text.decode() for text in texts], confidences.tolist()


def by_the_c_api(folder, paths, tmp_path):
    """The same by the library in TensorFlow's wheel, which TensorFlow Serving runs too."""
    shown = run_python("-m", "tensorflow.python.tools.saved_model_cli", "show", "--dir", folder, "--tag_set", "serve",
                       "--signature_def", "serving_default")
    names = [re.search(rf"\['{name}'\].*?name: (\S+):0", shown, re.DOTALL)[1]
             for name in ("images", "text", "confidence")]
    library = Path(importlib.util.find_spec("tensorflow").origin).with_name("libtensorflow_cc.so.2")
    if not library.exists():
        pytest.skip(f"this wheel of TensorFlow has no {library.name}")
    return json.loads(run_python(Path(__file__).with_name("c_api.py"), library, folder, *names, *paths))


def run_python(*arguments):
    """Runs Python away from this project, and returns what it prints."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=tempfile.gettempdir(), text=True,
                          capture_output=True, check=True).stdout


@pytest.mark.parametrize("read", [by_the_command_line, by_the_c_api])
def test_the_export_reads_without_this_project(read, tmp_path):
    """Image bytes in, the same texts and confidences out."""
    images = {**{f"{text}.png": data for text, data in SAMPLES.items()}}
    grey = cv2.imdecode(np.frombuffer(SAMPLES["PIY"], np.uint8), cv2.IMREAD_GRAYSCALE)
    faded = np.dstack([np.zeros_like(grey)] * 3 + [255 - grey])  # black ink on nothing
    for name, pixels in {"large.png": cv2.resize(grey, (512, 128)), "small.bmp": cv2.resize(grey, (128, 32)),
                         "grey.jpg": grey, "faded.png": faded, "narrow.png": grey[:, :100]}.items():
        images[name] = cv2.imencode(os.path.splitext(name)[1], pixels)[1].tobytes()
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
    assert main(["export", str(tmp_path / "exported"), "--model", str(SHIPPED)]) == 0
    paths = [str(tmp_path / name) for name in images]
    texts, confidences = read(tmp_path / "exported", paths, tmp_path)
    ours = LstmCtcOcr(model=str(SHIPPED)).recognise(paths)
    assert texts == [text for text, _ in ours] and texts[:3] == [*SAMPLES]
    assert confidences == pytest.approx([confidence for _, confidence in ours], abs=0.02)
    assert main(["export", str(tmp_path / "exported")]) == 2  # nothing is overwritten


@pytest.mark.parametrize("label_parts", [1, 3])
def test_the_exports_texts_are_those_of_the_sequences(label_parts):
    """A batch without any letter among them, and letters of which a part is missing."""
    ocr = LstmCtcOcr(words="ABC", words_max_num=4, label_parts=label_parts)
    sequences = [[], [0], [0, 1, 2, 3, 4, 5], [1, 2, 0], [0, 2, 0, 1], [8, 8, 7], [0, 1, 2] * 3]
    sequences = [[number % (3 * label_parts) for number in sequence] for sequence in sequences]
    for batch in (sequences, sequences[:1], [[], []]):
        with tf.Graph().as_default(), tf.Session() as session:
            texts = session.run(ocr._texts_in_graph(tf.SparseTensor(*ocr.sequences_to_sparse(batch))))
        assert [text.decode() for text in texts] == [ocr.sequence_to_text(sequence) for sequence in batch]
