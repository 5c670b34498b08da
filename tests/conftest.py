"""Shared by the tests: a task small enough to be learnt for real within seconds."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "lstm_ctc_ocr.py"
PRETRAINED = ROOT / "my-model" / "pretrained"
SHIPPED = PRETRAINED / "cnn_lstm"  # reads faster than `general`, which reads by default
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # as the program sets it, which some tests come before

import lstm_ctc_ocr  # noqa: E402
from lstm_ctc_ocr import LstmCtcOcr, main  # noqa: E402
from train_general import save_weights  # noqa: E402

# One to three letters out of two: everything that the real task has, repeats above all.
TASK = dict(words="AX", words_max_num=3, im_width=96, im_height=64)
NET = dict(n_hidden=48, batch_size=16, lr=1e-2, epoch_max=15, val_num=80, save_epoch=0.1)
IMAGES = 806  # 86 of them are held out: 45 steps of 16 an epoch


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes minutes; run with -m long, and not otherwise")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("-m"):
        long = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)


def flags(**settings):
    """Settings as a command line has them."""
    return [word for name, value in settings.items() for word in ("--" + name.replace("_", "-"), str(value))]


def spawn(*arguments, **kwargs):
    """The real program as a process of its own, its output piped and read as text."""
    return subprocess.Popen([sys.executable, str(SCRIPT), *map(str, arguments)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **kwargs)


def untrained(folder, **settings):
    """A model folder of first weights, but with statistics and biases that are not the neutral ones."""
    tf, ocr, generator = lstm_ctc_ocr._tensorflow(), LstmCtcOcr(**settings).resolve(), np.random.default_rng(0)
    with tf.Graph().as_default(), tf.Session() as session:
        ocr._build_reading(ocr._build_input())
        session.run(tf.global_variables_initializer())
        weights = {variable.op.name: variable.eval() for variable in tf.global_variables()}
    folder.mkdir()
    save_weights({name: generator.uniform(0.5, 1.5, value.shape).astype(np.float32) if value.ndim == 1 else value
                  for name, value in weights.items()}, folder, 1)
    config = {name: getattr(ocr, name) for name in lstm_ctc_ocr.ARCHITECTURE}
    (folder / "config.json").write_text(json.dumps({**ocr.FORMAT, **config, "best_step": 1}))
    return folder


def needs_warp():
    """Skips what needs Baidu's library where it is not installed."""
    try:
        lstm_ctc_ocr._warp_library()
        missing = ""
    except LstmCtcOcr.Error as error:
        missing = str(error)
    return pytest.mark.skipif(bool(missing), reason=missing)


@pytest.fixture
def browser(tmp_path_factory):
    """Chromium, driven by selenium; skips where it is missing."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver (Debian: chromium chromium-driver)")
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage",
                 f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def ocr():
    return LstmCtcOcr(**TASK).resolve()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A folder of rendered captchas of the small task."""
    folder = tmp_path_factory.mktemp("dataset") / "train"
    assert main(["create_dataset", *flags(dataset=folder, im_total_num=IMAGES, **TASK)]) == 0
    return folder


@pytest.fixture(scope="session")
def trained(dataset, tmp_path_factory):
    """A model folder that the real command has trained on it; read only."""
    folder = tmp_path_factory.mktemp("model") / "small"
    assert main(["train", *flags(dataset=dataset, model=folder, **TASK, **NET)]) == 0
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A function from a model folder to the ONNX file that it is exported to, once."""
    @functools.cache
    def export(model):
        for package in ("onnx", "onnxruntime"):
            pytest.importorskip(package, reason=f"needs pip install {package}")
        path = tmp_path_factory.mktemp("exported") / f"{model.name}.onnx"
        assert main(["export", str(path), "--model", str(model)]) == 0
        return path

    return export


@pytest.fixture(scope="session", params=["tensorflow", "onnxruntime"])
def engine(request, exported):
    """What reads: a function from a model folder to what --model is given."""
    return exported if request.param == "onnxruntime" else lambda model: model
