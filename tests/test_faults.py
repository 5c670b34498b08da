"""One row a fault, each done for real: one clear line, nothing lost that was saved, and the work goes on."""

import contextlib
import ctypes
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import cv2
import pytest
from conftest import IMAGES, ROOT, SCRIPT, TASK, flags, spawn
from test_images import contents
from test_training import config_of, step_of, train, until

from lstm_ctc_ocr import main

TINY = dict(n_hidden=16, val_num=16)
long = pytest.mark.long


def pause(process, seconds=0.02):
    """Waits for a process's end, but not for longer than that."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def eventually(holds, process):
    """Waits until something holds, while a process is to bring it about."""
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None and time.monotonic() < deadline
        pause(process)


def said(capfd):
    """The messages since it was last asked, none of them a traceback."""
    messages = capfd.readouterr().err
    assert "Traceback" not in messages
    return messages


def saved(folder):
    """The steps of the checkpoints that a model folder holds."""
    return sorted(int(path.stem.split("-")[1]) for path in folder.glob("LstmCtcOcr-*.index"))


def reads(model, dataset):
    """Whether `test` gives a line for an image."""
    return main(["test", "--model", str(model), str(next(dataset.glob("0_*.png")))]) == 0


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MB, and a function that fills it up."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.strip()}")

    def fill():
        with contextlib.suppress(OSError), open(path / "filler", "ab", buffering=0) as file:
            while file.write(bytes(1024)):
                pass

    yield path, fill
    subprocess.run(["umount", "--lazy", path], check=True)


# ---- a folder of images

@pytest.fixture(scope="module")
def about_images(dataset, tmp_path_factory):
    """What training says about a folder in which everything is wrong that need not stop it."""
    folder = tmp_path_factory.mktemp("faulty")
    shutil.copytree(dataset, folder / "train")
    whole = next(dataset.glob("0_*.png")).read_bytes()
    for name, data in {"900_AX.png": whole[:len(whole) // 2], "901_AX.png": b"", "902_AX.png": b"<html>",
                       "AX.png": whole}.items():
        (folder / "train" / name).write_bytes(data)
    (folder / "train" / "903_AX.png").mkdir()
    process = spawn(*train(folder / "train", folder / "model", **TINY, epoch_max=0.1))
    messages = process.communicate()[1]
    assert process.returncode == 0 and reads(folder / "model", dataset)
    return messages


@pytest.mark.parametrize("line", [
    r"^left out: .*900_AX.png: not a whole image", r"^left out: .*901_AX.png: not a whole image",
    r"^left out: .*902_AX.png: not a whole image", r"^left out: .*903_AX.png: Is a directory",
    r'^besides: 1 images without a label, such as "AX.png"', r"^720 images to train on, 16 held out"],
    ids=["cut in half", "empty", "no image", "a folder", "without a label", "all others"])
def test_what_is_no_labelled_image_is_named_and_left_out(line, about_images):
    assert len(re.findall(line, about_images, re.MULTILINE)) == 1 and "Traceback" not in about_images


@pytest.mark.parametrize("label, settings, complaint", [
    ("AY", {}, "900_AY.png: the label 'AY' is not 1 to 3 letters of --words AX"),
    ("AXAX", {}, "900_AXAX.png: the label 'AXAX' is not 1 to 3 letters of --words AX"),
    ("", {}, '(besides: 1 images without a label, such as "900_.png")'),
    ("AX", dict(im_width=4), "CTC cannot align 3 letters, 5 steps, in 4"),
    ("AX", dict(im_width=16, net="cnn_lstm"), "CTC cannot align 3 letters, 5 steps, in 4"),
])
def test_a_label_that_cannot_be_learnt_is_one_line(label, settings, complaint, tmp_path, capfd):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / f"900_{label}.png").touch()
    assert main(train(tmp_path / "train", tmp_path / "model", **settings)) == 2
    message, = said(capfd).splitlines()
    assert complaint in message and not (tmp_path / "model").exists()


def test_a_folder_that_may_not_be_read_is_one_line(dataset, trained, tmp_path):
    """Root may read whatever it likes, so that right is taken away from it first."""
    libc = ctypes.CDLL(None)

    def give_up_rights():
        for capability in 1, 2:  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP

    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0)
    commands = [train(closed, tmp_path / "model"), train(dataset, closed), train(dataset, closed / "model"),
                ["test", "--model", str(closed)], ["test", "--model", str(trained), str(closed)],
                ["create_dataset", "--dataset", str(closed)], ["export", str(closed / "exported")]]
    code = (f"import os, sys; sys.exit('root') if os.access({str(closed)!r}, os.R_OK) else None\n"
            f"from lstm_ctc_ocr import main; sys.exit(sum(main(command) != 2 for command in {commands}))")
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, preexec_fn=give_up_rights, capture_output=True,
                             text=True)
    if process.stderr == "root\n":
        pytest.skip("nothing is closed to this user")
    lines = process.stderr.splitlines()
    assert process.returncode == 0 and len(lines) == len(commands)
    assert all("ermission denied" in line and "closed" in line for line in lines)


# ---- a model folder

def cut_in_half(*paths):
    for path in paths:
        path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def data(folder, step):
    return folder / f"LstmCtcOcr-{step}.data-00000-of-00001"


def harms(*steps, best):
    """Tears the data of the checkpoints of some steps, in a folder where one of a certain step is the best."""
    def harm(folder):
        (folder / "config.json").write_text(json.dumps({**config_of(folder), "best_step": best}))
        cut_in_half(*(data(folder, step) for step in steps))
    return harm


def torn_index(folder):
    harms(best=672)(folder)
    cut_in_half(folder / "LstmCtcOcr-675.index")


@pytest.mark.parametrize("harm, reading, training", [
    (harms(675, best=672), "", "LstmCtcOcr-675 is missing or torn: going on from that of step 672"),
    (harms(675, best=675), "LstmCtcOcr-675 is missing or torn: going on from that of step 672",
     "LstmCtcOcr-675 is missing or torn: going on from that of step 672"),
    (harms(672, best=672), "LstmCtcOcr-672 is missing or torn: going on from that of step 675", ""),
    (torn_index, "", "LstmCtcOcr-675 is missing or torn: going on from that of step 672"),
    (lambda folder: cut_in_half(folder / "checkpoint"), "", ""),
], ids=["newest", "newest and best", "best", "index", "list of them"])
def test_a_torn_checkpoint_costs_what_came_after_the_one_before(harm, reading, training, trained, dataset, tmp_path,
                                                                 capfd):
    """Both `test` and `train` say in one line what they use instead, and training leaves a folder that is whole."""
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    harm(model)
    said(capfd)
    assert reads(model, dataset)
    messages = said(capfd)
    assert reading in messages and len(messages.splitlines()) == 1 + bool(reading)  # one says what it reads with
    assert main(train(dataset, model, epoch_max=15.1)) == 0
    messages = said(capfd)
    assert training in messages and messages.count("going on from") == bool(training)
    assert step_of(model) == config_of(model)["step"] == 680 and config_of(model)["best_step"] in saved(model)
    assert reads(model, dataset)


@pytest.mark.parametrize("harm, complaint", [
    (lambda folder: cut_in_half(*folder.glob("*.data-*")), "LstmCtcOcr-.* is missing, torn or of another network"),
    (lambda folder: cut_in_half(folder / "config.json"), "config.json cannot be read"),
], ids=["every checkpoint", "config.json"])
def test_what_nothing_can_be_made_of_is_one_line_and_left_as_it_is(harm, complaint, trained, dataset, tmp_path, capfd):
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    harm(model)
    before = {path: path.read_bytes() for path in model.glob("*.*") if path.is_file()}
    assert not reads(model, dataset)
    message, = said(capfd).splitlines()
    assert re.search(complaint, message)
    assert main(train(dataset, model, epoch_max=16)) == 2
    assert re.search(complaint, said(capfd).splitlines()[-1])
    assert before.items() <= {path: path.read_bytes() for path in model.glob("*.*") if path.is_file()}.items()


# ---- a machine

moments = pytest.mark.parametrize("moments", [2, pytest.param(20, marks=long)])


@moments
def test_kill_9_at_any_moment_of_training(moments, dataset, tmp_path):
    """A checkpoint at every step, so that most moments are those of saving one."""
    generator = random.Random(1)
    for _ in range(moments):
        before = max(saved(tmp_path), default=0)
        process = spawn(*train(dataset, tmp_path, **TINY, epoch_max=1000, save_epoch=0.001))
        assert f"from step {before} to" in until(process, "from step")
        more = before + generator.randint(1, 20)
        eventually(lambda: max(saved(tmp_path), default=0) >= more, process)
        pause(process, generator.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert reads(tmp_path, dataset) and max(saved(tmp_path)) >= more
        assert len(saved(tmp_path)) <= 4


@moments
def test_kill_9_at_any_moment_of_rendering(moments, dataset, tmp_path):
    """No final name ever stands for half a file, and the end is the same as if nothing had happened."""
    generator = random.Random(1)
    arguments = ["create_dataset", *flags(dataset=tmp_path, im_total_num=IMAGES, **TASK)]
    for _ in range(moments):
        more = len(os.listdir(tmp_path)) + generator.randint(1, 35)
        process = spawn(*arguments)
        eventually(lambda: len(os.listdir(tmp_path)) >= more, process)
        pause(process, generator.uniform(0, 0.01))
        process.kill()
        process.communicate()
        assert all(cv2.imread(str(path)) is not None for path in tmp_path.glob("[0-9]*"))
    assert main(arguments) == 0
    for part in tmp_path.glob(".*.part"):
        part.unlink()
    assert contents(tmp_path) == contents(dataset)


def test_rendering_that_is_told_to_stop_goes_on_later(dataset, tmp_path, capfd):
    arguments = ["create_dataset", *flags(dataset=tmp_path, im_total_num=IMAGES, **TASK)]
    process = spawn(*arguments, start_new_session=True)
    eventually(lambda: contents(tmp_path), process)
    os.killpg(process.pid, signal.SIGTERM)  # to its workers too, as `timeout` or a terminal would
    message, = process.communicate()[1].splitlines()
    assert process.returncode == 128 + signal.SIGTERM and message.startswith("stopped; the same command goes on")
    files = contents(tmp_path)
    assert 0 < len(files) < IMAGES and files.items() <= contents(dataset).items()
    assert main(arguments) == 0 and contents(tmp_path) == contents(dataset)


def test_a_renderer_that_is_killed_is_one_line(tmp_path, capfd):
    def kill():
        while not any(tmp_path.glob("*.png")):
            pass
        multiprocessing.active_children()[0].kill()

    threading.Thread(target=kill).start()
    assert main(["create_dataset", *flags(dataset=tmp_path, **TASK)]) == 2
    assert "a process that renders was killed" in said(capfd).splitlines()[-1]


def test_a_full_disk_while_rendering(disk, dataset, capfd):
    path, _ = disk
    arguments = ["create_dataset", *flags(dataset=path / "train", im_total_num=IMAGES, **TASK)]
    assert main(arguments) == 2
    assert "(No space left on device); run the same command again" in said(capfd).splitlines()[-1]
    files = contents(path / "train")
    assert files.items() <= contents(dataset).items()  # and so no part of one takes room
    (path / "train" / min(files)).unlink()
    assert main(["create_dataset", *flags(dataset=path / "train", im_total_num=1, **TASK)]) == 0


def test_a_full_disk_while_saving(disk, dataset, capfd):
    path, fill = disk
    process = spawn(*train(dataset, path / "model", **TINY, epoch_max=1000, save_epoch=0.1))
    eventually(lambda: saved(path / "model"), process)
    while process.poll() is None:  # again and again, because training removes old checkpoints
        fill()
        pause(process)
    message = process.communicate()[1].splitlines()[-1]
    assert process.returncode == 2 and "No space left on device" in message and "run the same command" in message
    assert reads(path / "model", dataset)
    step = max(saved(path / "model"))
    assert main(train(dataset, path / "model", **TINY, epoch_max=(step + 9) / 45)) == 2  # still full
    assert "No space left on device" in said(capfd).splitlines()[-1] and max(saved(path / "model")) == step
    (path / "filler").unlink()
    assert main(train(dataset, path / "model", **TINY, epoch_max=(step + 9) / 45)) == 0
    assert step_of(path / "model") >= step + 9 and reads(path / "model", dataset)
    assert not list((path / "model").glob("*temp*"))


def test_two_trainings_in_one_folder(dataset, tmp_path, capfd):
    """The second one is told; the first one is none the worse, and its lock goes with it."""
    process = spawn(*train(dataset, tmp_path, **TINY, epoch_max=1000, save_epoch=0.1))
    until(process, "from step 0")
    before = config_of(tmp_path)
    assert main(train(dataset, tmp_path, **TINY)) == 2
    message, = said(capfd).splitlines()
    assert "another training is at work in" in message
    assert config_of(tmp_path).items() >= before.items()
    eventually(lambda: saved(tmp_path), process)
    process.terminate()
    assert "stopped and saved at step" in process.communicate()[1] and process.returncode == 128 + signal.SIGTERM
    step = step_of(tmp_path)
    assert main(train(dataset, tmp_path, **TINY, epoch_max=(step + 1) / 49)) == 0
    assert step_of(tmp_path) > step and reads(tmp_path, dataset)


# ---- a system

def test_without_semaphores(dataset, tmp_path, monkeypatch, capfd):
    """As where /dev/shm is missing: threads need none, and what needs processes does without."""
    def fail(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("_multiprocessing.SemLock", fail)
    assert main(["create_dataset", *flags(dataset=tmp_path / "train", im_total_num=60, **TASK)]) == 0
    assert contents(tmp_path / "train").items() <= contents(dataset).items()
    assert main(train(tmp_path / "train", tmp_path / "model", **TINY, epoch_max=1)) == 0
    assert main(["test", "--model", str(tmp_path / "model"), str(tmp_path / "train")]) == 0
    said(capfd)


def test_without_docstrings(tmp_path):
    """Every command reads its flags first, for which there is a docstring's line otherwise."""
    command = ["create_dataset", *flags(dataset=tmp_path, im_total_num=2, workers=1, **TASK)]
    process = subprocess.run([sys.executable, "-OO", SCRIPT, *command], capture_output=True, text=True)
    assert process.returncode == 0 and len(contents(tmp_path)) == 2


@pytest.mark.parametrize("encoding, name, shown", [
    ("cp1252", "日é.png", b"\\u65e5\xe9.png"), ("ascii", "日é.png", b"\\u65e5\\xe9.png"),
    ("utf-8", "日é.png", "日é.png".encode()), ("utf-8", os.fsdecode(b"a\xff.png"), b"a\xff.png")])
def test_letters_that_stdout_lacks_are_escaped(encoding, name, shown, trained, dataset, tmp_path, monkeypatch):
    for image in name, "z.png":
        shutil.copy(next(dataset.glob("0_*.png")), tmp_path / image)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    assert main(["test", "--model", str(trained), str(tmp_path)]) == 0
    sys.stdout.flush()
    lines = sys.stdout.buffer.getvalue().splitlines()
    assert any(shown in line for line in lines) and any(b"z.png" in line for line in lines)
