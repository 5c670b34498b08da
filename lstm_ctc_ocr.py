"""Reads captchas of 1 to 10 letters with an LSTM, CTC and a beam search.

    python lstm_ctc_ocr.py create_dataset     renders dataset/train/<i>_<LABEL>.png
    python lstm_ctc_ocr.py train              learns from them, saves to my-model/lstm; run again, it resumes
    python lstm_ctc_ocr.py test [PATH...]     reads images, dataset/test by default
    python lstm_ctc_ocr.py start              serves GET /captchaOcr?img_path=./dataset/test/0_PIY.png, and a page
    python lstm_ctc_ocr.py export DIR         writes a SavedModel

The idea: the columns of an image are the time steps of an LSTM. At each of them it says which letter it has just seen,
or none (the blank); CTC adds up every way in which those steps can spell the label, so nobody has to say where in the
image a letter stands.

    text "PIY" -> sequence [15, 8, 24] -> sparse tensor -----------------------.
    image (B, H, W) -> columns (T, B, H) -> LSTM (T, B, N) -> logits (T, B, C) +-> CTC loss
                                                                               '-> beam search -> sequence -> text

The network cnn_lstm puts convolutions between the image and the LSTM, and reads in both directions.

Dimensions: B batch, H height, W width, T time steps (W; W / 4 behind convolutions), F features, N LSTM cells, C classes
(the letters, the blank last).
"""

import argparse
import base64
import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import hmac
import importlib.util
import ipaddress
import itertools
import json
import math
import multiprocessing
import os
import queue
import random
import re
import secrets
import signal
import socket
import sys
import threading
import time
import types
from multiprocessing.pool import ThreadPool
from pathlib import Path

MAX_PIXELS = 4_000_000  # of an image file; OpenCV takes this from the environment when it is imported
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")  # what is wrong with an image is said by `load_image`

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import cv2  # noqa: E402
import flask
import numpy as np
import waitress
from captcha.image import ImageCaptcha
from tqdm import tqdm
from werkzeug.datastructures import WWWAuthenticate
from werkzeug.exceptions import HTTPException, ServiceUnavailable, Unauthorized

VERSION = "1.0.0"
HOME = Path(__file__).resolve().parent
MODELS = HOME / "my-model"
MODEL_FORMAT = 1  # what config.json must say; raised when older folders can no longer be read
# What a model folder fixes:
ARCHITECTURE = ("net", "n_hidden", "label_parts", "words", "words_max_num", "im_width", "im_height")
NETS = ("lstm", "cnn_lstm")
CONVOLUTIONS = ((32, 5, 4, 2), (48, 3, 2, 2), (96, 3, 2, 1), (128, 3, 2, 1))  # channels, size, strides down, across
PROJECTION = 128  # features that each step hands to the LSTM
STATISTICS = "statistics"  # the graph's collection of batch normalisation's (variable, value of it in a batch)
PLAN = "plan"  # the collection of a variable by which the chief tells the workers how it trains; never saved
CTCS = ("tensorflow", "warp")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
LABELLED = re.compile(r"(\d+)_(.*)\.\w+")  # <i>_<LABEL>.png
LOCK = ".lock"  # in a model folder: whoever trains there holds it
LENGTH = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?", re.ASCII)  # N or MIN-MAX
SHARD = re.compile(r"(\d{1,9})/(\d{1,9})", re.ASCII)  # I/N
STALE = 600  # seconds after which nobody is writing a .part file any more: it takes milliseconds

MAX_GRADIENT_NORM = 1.0  # what gradients are clipped to, together, so that one hard image cannot throw the weights off
AVERAGE_DECAY = 0.998  # of the weights' moving averages, a step: they look back over about 500 steps
MIN_CONTRAST = 16 / 255  # below it an image is taken to be blank rather than stretched until its noise looks like ink
READ_BATCH = 64  # images a step in reading files
REPORT_STEPS = 100  # between reports, as in the article
VALIDATION_SHARE = 0.05  # the most of training's CPU time that validating may take; a report waits until it fits in

# A process's place among those that train together, see `_join_cluster`; this one trains by itself.
ALONE = types.SimpleNamespace(job="chief", index=0, chief=True, number=0, workers=1, servers=0, target="", device=None,
                              sees=())

TOKEN_VARIABLE = "LSTM_CTC_OCR_TOKEN"
MAX_BODY = 8_000_000  # bytes of a request, and of a file that it names
MAX_IMAGES = 64  # in a request
QUEUE = 64  # images that may wait for their reading; whoever comes then is told to come again
SERVE_BATCH = 8  # the most images that a thread of the service reads at once; more cost hardly less an image
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*")  # of what is served


def setting(default, text):
    """Declares a hyper-parameter once: its default, its flag and the flag's help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass
class LstmCtcOcr:
    """The whole system; its fields are its settings. Constructing it opens nothing and builds nothing."""

    # --- the task
    words: str = setting("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "the letters that an image may hold")
    words_max_num: int = setting(10, "the most letters in an image")
    im_width: int = setting(256, "image width in pixels, and so the LSTM's time steps")
    im_height: int = setting(64, "image height in pixels, and so the input of a step")
    # --- the images
    dataset: str = setting(str(HOME / "dataset" / "train"), "folder of the training images, <i>_<LABEL>.png")
    im_total_num: int = setting(100_000, "images to render (100,000 take 0.9 GB on disk)")
    workers: int = setting(0, "processes that render; 0: one a core")
    shard: str = setting("1/1", "what to render of it, I/N: of N machines with the same settings, the part of the I-th")
    train_max_num: int = setting(0, "the most images to train on; 0: all of the folder (100,000 take 1.6 GB of memory)")
    val_num: int = setting(2000, "images held out to validate on, at most a tenth of the folder")
    # --- the network
    net: str = setting("", "lstm, the article's, or cnn_lstm, with convolutions in front; empty: train lstm, read with "
                           "what was trained last or else with the shipped cnn_lstm")
    n_hidden: int = setting(256, "LSTM cells; cnn_lstm has half of them each way")
    label_parts: int = setting(1, "classes a letter: 3 splits it in left, middle and right, so that no blank has to "
                                  "stand between equal letters")
    # --- training
    ctc: str = setting("tensorflow", "CTC loss: tensorflow, or Baidu's warp (pip install --no-deps paddlepaddle)")
    batch_size: int = setting(32, "images a step")
    epoch_max: float = setting(9, "passes over the images; 9 of 100,000 take 40 to 50 minutes on 2 cores")
    lr: float = setting(4e-3, "learning rate at the start; it falls as lr * (1 - (epoch / epoch_max) ** 2)")
    save_epoch: float = setting(0.1, "epochs between checkpoints")
    seed: int = setting(0, "fixes what is drawn at random: rendered images, first weights, order, held-out images")
    # --- reading
    model: str = setting("", "model folder; empty: my-model/<net>, or to read with until there is one, "
                                "my-model/pretrained/<net>")
    beam_width: int = setting(4, "beam of the search, 1 to 100; in reading, for each length that a text may have")
    letters: str = setting("", "letters that alone can be read; of one case, they stand for the other case too")
    length: str = setting("", "N or MIN-MAX: letters that a text has, for sure")
    host: str = setting("127.0.0.1", "address to serve on")
    port: int = setting(5050, "port to serve on")
    image_root: str = setting(str(HOME / "dataset"), "only images under this folder can be asked for by path")
    token: str = setting("", "what clients must show, as a bearer token or as HTTP Basic's password; better given in "
                             f"the environment, as {TOKEN_VARIABLE}")

    class Error(ValueError):
        """Something that the user can mend, in one line that says what to do."""
        status = 422  # of the service's answer

    class TooLarge(Error):
        """An image of more pixels than `MAX_PIXELS`."""
        status = 413

    def __post_init__(self):
        """Raises `Error` for settings that cannot work."""
        positive = ("words_max_num", "im_width", "im_height", "im_total_num", "n_hidden", "batch_size", "epoch_max",
                    "lr", "save_epoch", "val_num")
        for name in positive:
            if not getattr(self, name) > 0:
                raise self.Error(f"{_flag(name)} must be above 0, not {getattr(self, name)}")
        for name in ("workers", "train_max_num", "seed"):
            if getattr(self, name) < 0:
                raise self.Error(f"{_flag(name)} must not be negative: {getattr(self, name)}")
        if not self.words or len(set(self.words)) != len(self.words):
            raise self.Error(f"--words needs at least one letter and each of them once, not {self.words!r}")
        if unfit := set(self.words) & set("/\\\0\n"):
            raise self.Error(f"--words cannot hold {sorted(unfit)}: labels are part of file names")
        # equal neighbours need a blank step between them, unless a letter begins and ends with classes of its own
        needed = self.label_parts * self.words_max_num if self.label_parts > 1 else 2 * self.words_max_num - 1
        if needed > self.steps:
            raise self.Error(f"CTC cannot align {self.words_max_num} letters, {needed} steps, in {self.steps}: lower "
                             "--words-max-num, or widen --im-width")
        if not 1 <= self.beam_width <= 100:
            raise self.Error(f"--beam-width must be 1 to 100, not {self.beam_width}")
        index, count = map(int, SHARD.fullmatch(self.shard).groups()) if SHARD.fullmatch(self.shard) else (0, 0)
        if not 1 <= index <= count:
            raise self.Error(f"--shard must be I/N with I from 1 to N, such as 2/3, not {self.shard!r}")
        for name, choices in ("net", ("", *NETS)), ("ctc", CTCS), ("label_parts", (1, 3)):
            if getattr(self, name) not in choices:
                raise self.Error(f"{_flag(name)} must be one of {', '.join(map(str, filter(None, choices)))}, not "
                                 f"{getattr(self, name)}")

    @property
    def steps(self):
        """Time steps T that the network makes of an image: its width, over the strides of the convolutions."""
        strides = [across for *_, across in CONVOLUTIONS] if self.net == "cnn_lstm" else []
        return functools.reduce(lambda width, stride: -(-width // stride), strides, self.im_width)

    # ------------------------------------------------------------------ text, sequences, sparse tensors

    def text_to_sequence(self, text):
        """Returns the classes of a text, `label_parts` a letter; raises `Error` for a letter outside `words`."""
        try:
            return [self._class_of[letter] * self.label_parts + part
                    for letter in text for part in range(self.label_parts)]
        except KeyError as error:
            raise self.Error(f"{text!r} holds {error}, which is not in --words {self.words}") from None

    def sequence_to_text(self, sequence, words=None):
        """Undoes `text_to_sequence`; a letter counts once the most of its parts are there, in their order.

        words: the letters that the classes stand for, if not `self.words`.
        """
        text, last, seen = "", None, 0
        for letter, part in (divmod(number, self.label_parts) for number in sequence):
            seen = seen + 1 if last and letter == last[0] and part > last[1] else 1
            if seen == self.label_parts // 2 + 1:
                text += (words or self.words)[letter]
            last = letter, part
        return text

    @functools.cached_property
    def _class_of(self):
        return {letter: number for number, letter in enumerate(self.words)}

    @staticmethod
    def sequences_to_sparse(sequences):
        """Returns B sequences as the parts of a sparse tensor.

        (indices (n, 2) int64, values (n,) int32, dense_shape (2,) int64), n all letters together, dense_shape
        (B, longest): what `tf.SparseTensorValue` takes.
        """
        lengths = [len(sequence) for sequence in sequences]
        indices = [(row, column) for row, length in enumerate(lengths) for column in range(length)]
        return (np.array(indices, np.int64).reshape(-1, 2),
                np.array([number for sequence in sequences for number in sequence], np.int32),
                np.array([len(sequences), max(lengths, default=0)], np.int64))

    @staticmethod
    def sparse_to_sequences(sparse):
        """Undoes `sequences_to_sparse`: always dense_shape[0] rows, those without a letter included."""
        indices, values, dense_shape = sparse
        sequences = [[] for _ in range(dense_shape[0])]
        for (row, _), value in zip(indices, values):
            sequences[row].append(int(value))
        return sequences

    # ------------------------------------------------------------------ rendering

    def create_dataset(self):
        """Renders image 0 to `im_total_num` - 1 into the folder `dataset`, on every core; of them, its `shard`.

        Image i depends on the seed and on i alone, neither on the number of workers nor on that of shards, which may
        share the folder. Whole files are left as they are, so that an interrupted run goes on where it stopped. Returns
        0, or 128 + the signal's number when it was told to stop. Raises `Error` if the folder holds images that these
        settings would not have given.
        """
        folder, (index, count) = Path(self.dataset), map(int, self.shard.split("/"))
        with self._writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._refuse_strangers(folder)
        numbers = range(index - 1, self.im_total_num, count)
        with _deferred_stop() as stop, self._renderers() as pool, \
                tqdm(total=len(numbers), unit="img", desc=folder.name, disable=None) as bar:
            with _signals_held():  # a worker that is still starting would die of them
                futures = [pool.submit(self._render_all, numbers[start:start + 20])
                           for start in range(0, len(numbers), 20)]
            for fault in itertools.chain.from_iterable(future.result() for future in futures):
                bar.update()
                if fault:
                    raise self.Error(fault)
                if stop:
                    print(f"stopped; the same command goes on with the images that {folder} lacks", file=sys.stderr)
                    return 128 + stop[0]
        print(f"{len(numbers)} images in {folder}" + f", shard {self.shard}" * (count > 1), file=sys.stderr)
        return 0

    @contextlib.contextmanager
    def _renderers(self):
        """Processes that render, and end with this one, however it ends; raises `Error` if one of them is killed."""
        context = multiprocessing.get_context("spawn")  # fork would copy the threads of a loaded TensorFlow half
        pool = concurrent.futures.ProcessPoolExecutor(self.workers or _cores(), context, _follow_parent)
        try:
            yield pool
        except concurrent.futures.BrokenExecutor:
            for process in multiprocessing.active_children():  # they may be waiting for what the dead one had locked
                process.kill()
            raise self.Error("a process that renders was killed, perhaps for want of memory; run the same command "
                             "again, with fewer --workers") from None
        finally:
            pool.shutdown(cancel_futures=True)

    def _render_all(self, numbers):
        return [self._render(i) for i in numbers]

    def _render(self, i):
        """Renders image i unless it is there already. Returns what went wrong, or None."""
        random.seed(f"{self.seed}-{i}")  # captcha 0.7.0 draws from this module's generator
        label = self._draw_label(random)
        path = Path(self.dataset, f"{i}_{label}.png")
        if _is_whole_png(path):
            return None
        part = path.with_name(f".{i}-{secrets.token_hex(4)}.part")  # its own: another run may be at the same image
        try:
            # No fsync: an image that a power cut tears lacks its end, and is rendered again.
            part.write_bytes(_renderer(self.im_width, self.im_height).generate(label).getvalue())
            os.replace(part, path)  # a file has its final name only once it is whole
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            return f"cannot write {path}: {error.strerror}; run the same command again once that is mended"

    def _draw_label(self, generator):
        """A random label; generator: the module `random`, or a `random.Random`."""
        return "".join(generator.choice(self.words) for _ in range(generator.randint(1, self.words_max_num)))

    def _refuse_strangers(self, folder):
        for path in folder.glob(".*.part"):  # left behind by kill -9, or else another shard is writing it just now
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - STALE:
                    path.unlink()
        files = [(path, named) for path in folder.iterdir() if (named := LABELLED.fullmatch(path.name))]
        for path, named in files:
            expected = self._draw_label(random.Random(f"{self.seed}-{int(named[1])}"))
            if named[2] != expected:
                raise self.Error(f"{folder} holds images of another --seed, --words or --words-max-num: {path.name} "
                                 f"would be {named[1]}_{expected}.png; give the same settings, or another --dataset")
        for path, _ in files[:1]:
            image = cv2.imread(str(path))
            if image is not None and image.shape[:2] != (self.im_height, self.im_width):
                raise self.Error(f"{folder} holds images of {image.shape[1]} x {image.shape[0]} pixels: give the same "
                                 "--im-width and --im-height, or another --dataset")

    # ------------------------------------------------------------------ loading images

    def load_image(self, source):
        """Loads an image as the network sees it; the only preprocessing there is.

        source: a path, or the bytes of an image file; any size, mode and depth that OpenCV reads.
        Returns (H, W) uint8, how much ink there is: 0 for the paper, 255 for the image's darkest stroke. An image of
        another height is scaled to H; one that is then wider than W is squeezed into it, as the renderer does with long
        texts, and a narrower one has paper added on its right.
        Raises `Error`, which names the file and the fault.
        """
        name = "the image" if isinstance(source, bytes) else source
        try:
            data = source if isinstance(source, bytes) else Path(source).read_bytes()
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
        except OSError as error:
            raise self.Error(f"{name}: {error.strerror}") from None
        except cv2.error as error:
            if "IMAGE_PIXELS" in str(error):  # from the header alone, before anything is decoded
                raise self.TooLarge(f"{name}: more than {MAX_PIXELS:,} pixels") from None
            raise self.Error(f"{name}: {error.err or error}") from None
        except ValueError as error:  # a NUL in the path
            raise self.Error(f"{name}: {error}") from None
        if pixels is None:
            raise self.Error(f"{name}: not a whole image of a kind that OpenCV reads")
        return self._ink(_grey(pixels))

    def _ink(self, grey):
        """(h, w) float32, 1 white, -> (H, W) uint8."""
        height, width = grey.shape
        fitted = min(self.im_width, max(1, round(width * self.im_height / height)))
        if (height, width) != (self.im_height, fitted):
            method = cv2.INTER_AREA if height > self.im_height else cv2.INTER_LINEAR
            grey = cv2.resize(grey, (fitted, self.im_height), interpolation=method)
        ink = grey.max() - grey
        image = np.zeros((self.im_height, self.im_width), np.uint8)
        image[:, :fitted] = np.rint(ink * (255 / max(ink.max(), MIN_CONTRAST)))
        return image

    def load_images(self, files):
        """Loads (path, text) pairs into memory: returns images (n, H, W) uint8 and their n texts.

        Files that are no images are named on stderr and left out.
        """
        images = np.empty((len(files), self.im_height, self.im_width), np.uint8)

        def load(row):
            try:
                images[row] = self.load_image(files[row][0])
            except self.Error as error:
                return str(error)

        with ThreadPool(_cores()) as pool:  # OpenCV decodes outside the interpreter's lock
            faults = list(tqdm(pool.imap(load, range(len(files)), chunksize=50), total=len(files), unit="img",
                               desc="loading", disable=None))
        for fault in filter(None, faults):
            print(f"left out: {fault}", file=sys.stderr)
        good = [row for row, fault in enumerate(faults) if not fault]
        return images if len(good) == len(files) else images[good], [files[row][1] for row in good]

    def _labelled_files(self, folder, place=ALONE):
        """Returns the (path, text) of every labelled image, in an order that the seed and the names fix.

        Of several workers, number n of N gets the images i with i % N == n, what `create_dataset --shard` renders.

        Raises `Error` if there is none, or one with a label that no network of these settings could learn.
        """
        files = [path.name for path in _image_files(folder)]
        names = [named for name in files if (named := LABELLED.fullmatch(name))]
        if names and (others := [name for name in files if not LABELLED.fullmatch(name)]):
            print(f"left out: {len(others)} images of {folder} that are not named <i>_<LABEL>.png, such as {others[0]}",
                  file=sys.stderr)
        for named in names:
            if unknown := set(named[2]) - set(self.words):
                raise self.Error(f"{folder / named[0]}: the label holds {sorted(unknown)}, which is not in --words "
                                 f"{self.words}: remove the file, or give other --words")
            if not 0 < len(named[2]) <= self.words_max_num:
                raise self.Error(f"{folder / named[0]}: a label needs 1 to {self.words_max_num} letters "
                                 "(--words-max-num)")
        names = [named for named in names if int(named[1]) % place.workers == place.number]
        if not names:
            raise self.Error(f"no images <i>_<LABEL>.png in {folder}: render some with `python lstm_ctc_ocr.py "
                             "create_dataset`, or name another folder with --dataset")
        # By a digest of each name: a folder that grows keeps its order, so no image trained on is ever held out later.
        names.sort(key=lambda named: random.Random(f"{self.seed}-{named[0]}").random())
        return [(folder / named[0], named[2]) for named in names]

    # ------------------------------------------------------------------ the network

    def logits(self, images, training=False):
        """The forward pass, the same in training and in reading: (B, H, W) uint8 -> (T, B, C) float32.

        A batch of known size is split over the cores: a step's matrix product is too small to be shared by them, and
        one half of the batch on each runs half again as fast.
        """
        tf = _tensorflow()
        parts = next(n for n in range(_cores(), 0, -1) if n == 1 or images.shape[0] and images.shape[0] % n == 0)
        with tf.variable_scope("", reuse=tf.AUTO_REUSE):
            return tf.concat([self._logits(part, training) for part in tf.split(images, parts)], axis=1)

    def _logits(self, images, training):
        tf = _tensorflow()
        ink = tf.cast(images, tf.float32) * (3 / 255)
        if self.net == "cnn_lstm":
            x = tf.nn.relu(self.dense(self.convolutions(ink, training), PROJECTION, "projection"))
            x = tf.concat([self.lstm(x, "forward"), tf.reverse(self.lstm(tf.reverse(x, [0]), "backward"), [0])], axis=2)
        else:
            x = self.lstm(tf.transpose(ink, [2, 0, 1]))  # columns (T, B, H) -> (T, B, N)
        return self.dense(x, len(self.words) * self.label_parts + 1)

    def convolutions(self, ink, training):
        """Features of an image's columns: ink (B, H, W) -> (T, B, F); T is W over the strides, F all that is above."""
        tf = _tensorflow()
        x = ink[..., None]  # (B, H, W, 1)
        for number, (channels, size, down, across) in enumerate(CONVOLUTIONS, 1):
            with tf.variable_scope(f"convolution{number}"):
                kernel = tf.get_variable("kernel", [size, size, x.shape[3], channels])
                x = tf.nn.conv2d(x, kernel, [1, down, across, 1], "SAME")
                x = tf.nn.relu(self.batch_norm(x, training))
        _, height, steps, channels = x.shape
        return tf.reshape(tf.transpose(x, [2, 0, 1, 3]), [steps, -1, height * channels])

    @staticmethod
    def batch_norm(x, training):
        """Batch normalisation (Ioffe and Szegedy, 2015) of x (B, H, W, C), each channel alike.

        Training takes mean and variance from its batch. They are kept in variables too, so that reading takes them from
        moving averages of those, as it takes the weights.
        """
        tf = _tensorflow()
        scale = tf.get_variable("scale", x.shape[3], initializer=tf.ones_initializer())
        offset = tf.get_variable("offset", x.shape[3], initializer=tf.zeros_initializer())
        known = [tf.get_variable(name, x.shape[3], initializer=initializer(), trainable=False)
                 for name, initializer in (("mean", tf.zeros_initializer), ("variance", tf.ones_initializer))]
        if not training:
            return tf.nn.fused_batch_norm(x, scale, offset, *known, epsilon=1e-3, is_training=False)[0]
        x, *batch = tf.nn.fused_batch_norm(x, scale, offset, epsilon=1e-3)
        tf.get_collection_ref(STATISTICS).extend(zip(known, batch))
        return x

    def dense(self, x, units, name="dense"):
        """Projects every step alike: (T, B, N) -> (T, B, units)."""
        tf = _tensorflow()
        kernel = tf.get_variable(f"{name}/kernel", [x.shape[2], units])
        bias = tf.get_variable(f"{name}/bias", [units], initializer=tf.zeros_initializer())
        return tf.einsum("tbn,nc->tbc", x, kernel) + bias

    def lstm(self, x, name="lstm"):
        """One layer over x (T, B, I) float32: returns its outputs, (T, B, N)."""
        tf = _tensorflow()
        cells = self.n_hidden // 2 if self.net == "cnn_lstm" else self.n_hidden
        kernel = tf.get_variable(f"{name}/kernel", [x.shape[2] + cells, 4 * cells])
        bias = tf.get_variable(f"{name}/bias", [4 * cells], initializer=tf.zeros_initializer())
        return self._lstm_layer()(x, kernel, bias)

    @staticmethod
    def _lstm_layer():
        """Returns the function (x (T, B, I), kernel (I + N, 4 N), bias (4 N,)) -> outputs (T, B, N).

        The recurrence is TensorFlow's BlockLSTM (Zaremba et al., 2014, arXiv:1409.2329, without peepholes), whose gates
        are ordered input, cell, forget, output. Its gradient is written by hand: only what has to go back step by step
        does so, in one loop compiled by XLA, and the gradients of the weights are single matrix products after it.
        """
        tf = _tensorflow()
        backward = tf.function(LstmCtcOcr._lstm_backward, jit_compile=True)

        @tf.custom_gradient
        def layer(x, kernel, bias):
            inputs, cells = x.shape[2], bias.shape[0] // 4
            zero, none = tf.zeros([tf.shape(x)[1], cells]), tf.zeros([cells])
            i, cs, f, o, ci, co, h = tf.raw_ops.BlockLSTM(
                seq_len_max=tf.shape(x, out_type=tf.int64)[0], x=x, cs_prev=zero, h_prev=zero, w=kernel, wci=none,
                wcf=none, wco=none, b=bias, forget_bias=1.0, cell_clip=-1.0)  # by default it would clip the cell at 3

            def gradient(d_outputs):
                # Transposed once here rather than by each step's product, which would take a fifth longer a step.
                d_gates = backward(d_outputs, tf.transpose(kernel[inputs:]), i, cs, f, o, ci, co)
                h_prev = tf.concat([tf.zeros_like(h[:1]), h[:-1]], axis=0)
                d_flat = tf.reshape(d_gates, [-1, 4 * cells])  # (T * B, 4 N)
                x_and_h = tf.reshape(tf.concat([x, h_prev], axis=2), [-1, inputs + cells])  # (T * B, I + N)
                d_x = tf.einsum("tbg,ig->tbi", d_gates, kernel[:inputs])  # not computed where nobody asks for it
                d_bias = tf.matmul(tf.ones([1, tf.shape(d_flat)[0]]), d_flat)[0]  # a sum over rows, only faster
                return d_x, tf.matmul(x_and_h, d_flat, transpose_a=True), d_bias

            return h, gradient

        return layer

    @staticmethod
    def _lstm_backward(d_outputs, recurrent, i, cs, f, o, ci, co):
        """Goes back in time over gates and cells (T, B, N); recurrent (4 N, N) is their kernel, transposed.

        Returns the gradient at the gates before their activations, (T, B, 4 N).
        """
        tf = _tensorflow()
        steps, batch, cells = d_outputs.shape
        cs_prev = tf.concat([tf.zeros_like(cs[:1]), cs[:-1]], axis=0)

        def step(t, d_h, d_cs, d_gates):
            d_h += d_outputs[t]
            d_cs += d_h * o[t] * (1 - co[t] ** 2)
            d_gate = tf.concat([d_cs * ci[t] * i[t] * (1 - i[t]), d_cs * i[t] * (1 - ci[t] ** 2),
                                d_cs * cs_prev[t] * f[t] * (1 - f[t]), d_h * co[t] * o[t] * (1 - o[t])], axis=1)
            return t - 1, tf.matmul(d_gate, recurrent), d_cs * f[t], d_gates.write(t, d_gate)

        zero = tf.zeros_like(d_outputs[0])
        d_gates = tf.TensorArray(tf.float32, size=steps, element_shape=[batch, 4 * cells])
        return tf.while_loop(lambda t, *_: t >= 0, step, (steps - 1, zero, zero, d_gates))[-1].stack()

    # ------------------------------------------------------------------ loss, training step, decoding

    def ctc_loss(self, sequences, logits):
        """CTC loss (Graves et al., 2006): sequences (B, .) sparse int32, logits (T, B, C), blank last -> (B,)."""
        tf = _tensorflow()
        if self.ctc == "tensorflow":
            return tf.nn.ctc_loss(sequences, logits, tf.fill([tf.shape(logits)[1]], tf.shape(logits)[0]))
        _warp_library()  # now, so that it is missed before anything is trained
        lengths = tf.math.bincount(tf.cast(sequences.indices[:, 0], tf.int32), minlength=tf.shape(logits)[1])

        @tf.custom_gradient
        def warp(logits):
            losses, d_logits = tf.numpy_function(_warp_ctc, [logits, sequences.values, lengths], [tf.float32] * 2)
            losses.set_shape([logits.shape[1]])
            d_logits.set_shape(logits.shape)
            return losses, lambda d_losses: d_losses[:, None] * d_logits

        return warp(logits)

    def decode(self, logits):
        """TensorFlow's beam search over logits (T, B, C), blank last: validates, and reads in a SavedModel.

        Returns the texts as a sparse tensor (B, .) int64, and the log of the confidence, (B,) float32: the probability
        that the network gives to the text, summed over the alignments that the beam has kept. With a wide enough beam
        that is exp(-CTC loss) of the text.
        """
        tf = _tensorflow()
        steps = tf.fill([tf.shape(logits)[1]], tf.shape(logits)[0])
        (sparse,), log_probability = tf.nn.ctc_beam_search_decoder(  # merge_repeated would read AAA as A
            logits, steps, self.beam_width, top_paths=1, merge_repeated=False)
        return sparse, log_probability[:, 0]

    @dataclasses.dataclass(frozen=True)
    class Known:
        """What is known of a text before it is read: the settings `letters` and `length`, or a request's."""
        letters: str = ""
        length: str = ""

    def known(self, letters="", length=""):
        """Returns what is known of a text as `texts` takes it; raises `Error` where this model cannot read such."""
        letters = "".join(dict.fromkeys(letters))
        for letter in letters:
            if not self._read_as(letter, letters):
                raise self.Error(f"letters: this model does not know {letter!r}, it knows {self.words}")
        if length:
            self._bounds(length)
        return self.Known(letters, length)

    @functools.cached_property
    def _known_by_settings(self):
        return self.known(self.letters, self.length)

    def _bounds(self, length):
        """The least and the most letters that "N" or "MIN-MAX" allows."""
        match = LENGTH.fullmatch(length)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high <= self.words_max_num:  # so many fit into the steps, see `__post_init__`
            raise self.Error(f"length must be N or MIN-MAX, from 1 to this model's {self.words_max_num}, not "
                             f"{length!r}")
        return low, high

    def _read_as(self, letter, letters):
        """The model's letters that are read as `letter` where only `letters` can be: it, and its other case."""
        return [word for word in self.words if word == letter or word.swapcase() == letter and word not in letters]

    def texts(self, logits, known=Known()):
        """Decodes logits (T, B, C), blank last, to B (text, confidence) pairs.

        The confidence is the probability that the network gives to the text (with --label-parts, to the sequence of
        parts), exp(-CTC loss). What is `known` does not raise it: it is low where the image holds something else. Where
        only one case of a letter is allowed, the other one is read as it.
        """
        words, parts = known.letters or self.words, self.label_parts
        p = softmax(logits)
        if known.letters:
            p = p @ self._folds(words)
        low, high = self._bounds(known.length) if known.length else (0, self.words_max_num)
        longest, fits, follows = high if parts == 1 else self.words_max_num * parts, None, None
        if known.length:
            fits = lambda sequence: low <= len(self.sequence_to_text(sequence, words)) <= high  # noqa: E731
            follows = self._whole_letters(len(words)) if parts > 1 else None
        found = most_probable(p, self.beam_width, longest, fits, follows)
        return [(self.sequence_to_text(sequence, words), probability) for sequence, probability in found]

    def _folds(self, letters):
        """The matrix that adds up the classes read as each of `letters`, and drops the others, the blank last."""
        matrix = np.zeros((len(self.words), len(letters)))
        for column, letter in enumerate(letters):
            for word in self._read_as(letter, letters):
                matrix[self._class_of[word], column] = 1
        folds = np.zeros((len(self.words) * self.label_parts + 1, len(letters) * self.label_parts + 1))
        folds[:-1, :-1], folds[-1, -1] = np.kron(matrix, np.eye(self.label_parts)), 1
        return folds

    def _whole_letters(self, count):
        """Which class may follow which, 0 or -inf, where each of `count` letters has all its parts in order."""
        classes = np.arange(count * self.label_parts + 1)  # the blank, last, stands for nothing before
        begins, ends = classes % self.label_parts == 0, (classes + 1) % self.label_parts == 0
        ends[-1] = True
        return np.where(ends[:, None] & begins | ~ends[:, None] & (classes == classes[:, None] + 1), 0, -np.inf)

    def _build_input(self, batch_size=None):
        """Begins a network in the default graph: its tensors by name, so far the images alone."""
        tf = _tensorflow()
        tf.set_random_seed(self.seed)
        return types.SimpleNamespace(
            images=tf.placeholder(tf.uint8, [batch_size, self.im_height, self.im_width], "images"))

    def _build_reading(self, net, temperature=1):
        """Adds to the tensors `net` all that leads from images to texts.

        temperature: divides the logits, so that confidences are as high as readings are often right (Guo et al., 2017).
        """
        tf = _tensorflow()
        net.logits = self.logits(net.images)
        if temperature != 1:
            net.logits /= temperature
        net.sparse, log_probability = self.decode(net.logits)
        net.confidence = tf.exp(log_probability)
        return net

    def _build_training(self, steps_per_epoch, place):
        """Builds a training step too, and reads with the moving averages of the weights that it trains.

        The averages read far better than the weights of the moment while the learning rate is high (Polyak and
        Juditsky, 1992): 88 % of 1,984 strings rather than 82 % after 236,000 images.
        """
        tf = _tensorflow()
        net = self._build_input(self.batch_size)
        net.sequences = tf.sparse_placeholder(tf.int32, [self.batch_size, None], "sequences")
        net.step = tf.train.get_or_create_global_step()
        net.loss = tf.reduce_mean(self.ctc_loss(net.sequences, self.logits(net.images, training=True)))
        # Of the batch's parts, one on each core, the last one's statistics will do.
        statistics = {variable.name: (variable, value) for variable, value in tf.get_collection(STATISTICS)}.values()
        variables = tf.trainable_variables()
        gradients, net.gradient_norm = tf.clip_by_global_norm(tf.gradients(net.loss, variables), MAX_GRADIENT_NORM)
        averages = tf.train.ExponentialMovingAverage(AVERAGE_DECAY, num_updates=net.step)
        optimizer = tf.train.AdamOptimizer(self._learning_rate(tf.cast(net.step, tf.float32) / steps_per_epoch))
        if place.servers:  # the chief averages the gradients of all workers, applies them, and lets all go on
            optimizer = net.replicas = tf.train.SyncReplicasOptimizer(
                optimizer, place.workers, variable_averages=averages,
                variables_to_average=variables + [variable for variable, _ in statistics])
            plan = json.dumps({**self._plan(), "last": math.ceil(self.epoch_max * steps_per_epoch)})
            net.plan = tf.get_variable("plan", initializer=plan, trainable=False, collections=[PLAN])
            net.finished = [_finished_queue(server, place.workers).enqueue(True) for server in range(place.servers)]
        train = optimizer.apply_gradients(zip(gradients, variables), global_step=net.step)
        train = tf.group(train, *[tf.assign(*pair) for pair in statistics])
        if not place.servers:
            with tf.control_dependencies([train]):
                train = averages.apply(variables + [variable for variable, _ in statistics])
        with tf.control_dependencies([train]):
            net.train = net.step.read_value()  # running it trains, and tells the step that it has reached

        def averaged(getter, *args, **kwargs):
            return averages.average(getter(*args, **kwargs))

        with tf.variable_scope("", reuse=True, custom_getter=averaged):
            self._build_reading(net)
        net.losses = self.ctc_loss(net.sequences, net.logits)
        return net

    @staticmethod
    def _reading_saver():
        """Saves and restores what reading needs, the averaged weights, into the variables of the default graph."""
        tf = _tensorflow()
        averages = tf.train.ExponentialMovingAverage(AVERAGE_DECAY)
        return tf.train.Saver({averages.average_name(variable): variable for variable in tf.global_variables()},
                              save_relative_paths=True)

    def _learning_rate(self, epoch):
        """The article's decay, at every step rather than once an epoch."""
        return self.lr * (1 - (epoch / self.epoch_max) ** 2)

    # ------------------------------------------------------------------ model folders

    def _model_to_read(self):
        """The folder that `test` and `start` read with: what the user has trained last, else what ships."""
        if self.model:
            return Path(self.model)
        own = [MODELS / net / "checkpoint" for net in NETS if net == (self.net or net)]
        trained = max((path for path in own if path.exists()), key=lambda path: path.stat().st_mtime, default=None)
        return trained.parent if trained else MODELS / "pretrained" / (self.net or "cnn_lstm")

    def _load_config(self, folder):
        """Returns a model folder's config.json; raises `Error` if it is missing, torn or of another version."""
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError:
            raise self.Error(f"no model in {folder}: train one with `python lstm_ctc_ocr.py train`, or name another "
                             "with --model") from None
        except (OSError, ValueError) as error:
            raise self.Error(f"{path} cannot be read ({error}): restore it, or name another folder with "
                             "--model") from None
        if not isinstance(config, dict) or config.get("format") != MODEL_FORMAT or not config.keys() >= {*ARCHITECTURE}:
            raise self.Error(f"{path} is not of format {MODEL_FORMAT}, which this version reads: train anew, or name "
                             "another folder with --model")
        return config

    def _adopt(self, folder):
        """Takes the architecture from the model in a folder."""
        config = self._load_config(folder)
        for name in ARCHITECTURE:
            setattr(self, name, config[name])
        self.__dict__.pop("_class_of", None)
        self.__post_init__()

    def _save_config(self, folder, config):
        part = folder / ".config.json.part"
        with self._writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(config, indent=2) + "\n")
            _to_disk(part)
            os.replace(part, folder / "config.json")
            _to_disk(folder)

    def _restore(self, session, saver, folder, step=None):
        """Loads the checkpoint of `step`, or the newest; where that is torn the newest whole one, and says so.

        Returns the step that it has loaded. Raises `Error` if there is none.
        """
        tf = _tensorflow()
        steps = sorted((int(path.stem.split("-")[1]) for path in folder.glob("LstmCtcOcr-*.index")), reverse=True)
        wanted = step or max(steps, default=None)
        if not wanted:
            raise self.Error(f"no checkpoint in {folder}: train it further, or name another folder with --model")
        for number in dict.fromkeys([wanted, *steps]):
            try:
                saver.restore(session, str(folder / f"LstmCtcOcr-{number}"))  # compares checksums
            except (tf.errors.OpError, ValueError) as error:
                if _is_lost_server(error):
                    raise
                continue
            if number != wanted:
                print(f"the checkpoint {folder / f'LstmCtcOcr-{wanted}'} is missing or torn: going on from that of "
                      f"step {number}", file=sys.stderr)
            return number
        raise self.Error(f"the checkpoint {folder / f'LstmCtcOcr-{wanted}'} is missing, torn or of another network, "
                         "and there is no other: restore it, or name another folder with --model")

    @contextlib.contextmanager
    def _alone_in(self, folder):
        """Keeps other trainings out of a model folder until it ends, or this process, however that ends."""
        with self._writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / LOCK, "w")
        with lock:
            try:
                if fcntl:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self.Error(f"another training is at work in {folder}: wait for its end, or name another folder "
                                 "with --model") from None
            except OSError:  # of a file system that has no locks
                pass
            yield

    @functools.cached_property
    def _reader(self):
        """The session that reads and its tensors, built once; the architecture comes from the model folder."""
        tf, folder = _tensorflow(), self._model_to_read()
        self._adopt(folder)
        with tf.Graph().as_default() as graph:
            net = self._build_reading(self._build_input(), self._load_config(folder).get("temperature", 1))
            net.saver = self._reading_saver()
            session = tf.Session(config=_session_config())
            self._restore(session, net.saver, folder, self._load_config(folder).get("best_step"))
            graph.finalize()  # nothing may be added to it per request
        self._known_by_settings  # said now, if the model cannot read such
        return session, net

    def publish(self, folder):
        """Copies the model that this object reads with into `folder`, without what only training needs."""
        session, net = self._reader
        config = self._load_config(self._model_to_read())
        step = config.get("best_step", config["step"])
        config.update(step=step, images_seen=round(config["images_seen"] * step / config["step"]),
                      epoch=round(config["epoch"] * step / config["step"], 3))
        with self._writing(folder), session.graph.as_default():
            Path(folder).mkdir(parents=True, exist_ok=True)
            prefix = net.saver.save(session, str(Path(folder, "LstmCtcOcr")), step, write_meta_graph=False)
            for path in Path(folder).glob("LstmCtcOcr-*"):
                if path.stem != Path(prefix).name:
                    path.unlink()
        self._save_config(Path(folder), config)

    # ------------------------------------------------------------------ training

    def train(self):
        """Trains on the folder `dataset`, saves to the model folder and goes on from what is there.

        With TF_CONFIG set, this process is one task of the cluster that it describes (see `_join_cluster`): the chief
        saves, validates and reports, the workers add their gradients, the parameter servers hold the weights.
        Returns 0 when `epoch_max` is reached, 128 + the signal's number when told to stop (and saved, if it could).
        """
        self.net = self.net or "lstm"
        place = _join_cluster()
        if place.job == "ps":
            return self._serve_parameters(place)
        folder = Path(self.model or MODELS / self.net)
        if place.chief:
            self._training_config(folder)
            if (folder / LOCK).exists():
                with self._alone_in(folder):
                    pass  # if not, that is said now, before the images are loaded
        files = self._labelled_files(Path(self.dataset), place)
        held = max(1, min(self.val_num, len(files) // 10)) if place.chief else 0
        images, texts = self.load_images(files[:held + (self.train_max_num // place.workers or len(files))])
        if len(images) - held < self.batch_size:
            raise self.Error(f"{self.dataset} leaves {max(0, len(images) - held)} images to train on, fewer than one "
                             f"batch of {self.batch_size}: render more, or lower --batch-size")
        run = types.SimpleNamespace(
            place=place, folder=folder, config={}, held=(images[:held], texts[:held]), images=images[held:],
            texts=texts[held:], steps_per_epoch=(len(images) - held) // self.batch_size)
        run.last = math.ceil(self.epoch_max * run.steps_per_epoch)
        tf = _tensorflow()
        with tf.Graph().as_default(), tf.device(place.device):
            run.net = self._build_training(run.steps_per_epoch, place)
            run.saver = tf.train.Saver(max_to_keep=0, save_relative_paths=True)  # `_save` keeps the best and newest
            if not place.chief:
                return self._train_loop(run)
            with self._alone_in(folder):
                run.config = self._training_config(folder)
                self._save_config(folder, run.config)
                with self._writing(folder):
                    run.writer = tf.summary.FileWriter(str(folder / "events"))
                return self._train_loop(run)

    @contextlib.contextmanager
    def _session(self, run):
        """The session that trains. A worker's ends without an error when the chief has done the last step."""
        tf, servers, run.finished = _tensorflow(), run.place.servers, False
        try:
            session = self._open_session(run)
            if not run.place.chief:
                plan = json.loads(run.session.run(run.net.plan))
                run.last = plan.pop("last")
                self._require_agreement(plan)
            yield session
        except tf.errors.OutOfRangeError:  # the chief is done, and has closed the queue that the workers wait at
            run.finished = True
        except tf.errors.OpError as error:
            if not _is_lost_server(error):
                raise
            raise self.Error("lost a parameter server: start it again, and then this") from None
        if servers and run.finished:
            with contextlib.suppress(tf.errors.OpError):  # the parameter servers may have gone already
                run.session.run(run.net.finished)
            threading.excepthook = lambda _: None  # closing cancels TensorFlow's thread that applies gradients
        # Closing all of it closes that queue, so that a chief who leaves too early must not.
        closing = threading.Thread(target=(session if run.finished or not servers else run.session).close, daemon=True)
        closing.start()
        closing.join(5 if servers else None)  # it would wait for ever for a parameter server that has gone before

    def _open_session(self, run):
        """Opens a session that waits for parameter servers which it loses, and then goes on."""
        tf, place, net, graph = _tensorflow(), run.place, run.net, run.net.loss.graph
        config, init_op, run.opened = _session_config(place), tf.global_variables_initializer(), 0
        manager = tf.train.SessionManager(tf.local_variables_initializer(), recovery_wait_secs=1, ready_op=(
            None if place.chief else tf.report_uninitialized_variables([net.plan])))

        def restore(session):
            if any(run.folder.glob("LstmCtcOcr-*.index")):
                self._resume(session, run.saver, run.folder, run.config)

        class Creator(tf.train.SessionCreator):
            def create_session(self):
                with graph.as_default():  # it may be opened again by the thread that runs the steps
                    if place.chief:
                        return manager.prepare_session(place.target, init_op, init_fn=restore, config=config)
                    return manager.wait_for_session(place.target, config)

        class Begun(tf.train.SessionRunHook):
            def after_create_session(self, session, coord):
                run.opened += 1
                run.session = session  # what may be asked from several threads, and be saved from
                if run.opened > 1:
                    print(f"lost a parameter server; going on from step {session.run(net.step)}", file=sys.stderr)
                if place.chief and place.servers:
                    session.run(net.plan.initializer)  # now the weights are ready for the workers, who wait for it

        hooks = [net.replicas.make_session_run_hook(place.chief, num_tokens=0)] if place.servers else []
        return tf.train.MonitoredSession(Creator(), [*hooks, Begun()], stop_grace_period_secs=1)

    def _require_agreement(self, plan):
        """Raises `Error` if the chief trains with other settings than this worker."""
        for name, value in plan.items():
            if self._plan()[name] != value:
                raise self.Error(f"the chief trains with {_flag(name)} {value}, not {self._plan()[name]}: give the "
                                 "same to every task of the cluster")

    def _plan(self):
        """What a model folder, and all of a cluster, must agree on."""
        return {"format": MODEL_FORMAT, **{name: getattr(self, name) for name in (*ARCHITECTURE, "seed", "batch_size")}}

    def _serve_parameters(self, place):
        """Holds a share of the weights for the workers until they are done."""
        tf = _tensorflow()
        with tf.Graph().as_default(), tf.Session(place.target, config=_session_config(place)) as session:
            finished = _finished_queue(place.index, place.workers).dequeue()
            print(f"holds weights for {place.workers} workers", file=sys.stderr)
            session.run(finished)
            with contextlib.suppress(tf.errors.DeadlineExceededError):  # of one that has died there is no word
                for _ in range(place.workers - 1):
                    session.run(finished, options=tf.RunOptions(timeout_in_ms=10_000))
            time.sleep(3)  # while they close their sessions
        return 0

    def _training_config(self, folder):
        """Returns the folder's config, or a new one; raises `Error` if the folder was trained with other settings."""
        config = self._plan()
        if not (folder / "config.json").exists():
            return config
        known = self._load_config(folder)
        for name in config:
            if known.get(name) != config[name]:
                raise self.Error(f"{folder} was trained with {_flag(name)} {known.get(name)}, not {config[name]}: give "
                                 "the same to go on with it, or another folder with --model")
        return known

    def _resume(self, session, saver, folder, config):
        """Loads the newest checkpoint; forgets what was best if that was torn and came later."""
        if self._restore(session, saver, folder) < config.get("best_step", 0):
            for name in ("accuracy", "validated_on", "best_step"):
                config.pop(name, None)

    def _train_loop(self, run):
        """One pass of the loop is one step; what happens between steps is in `_between_steps`."""
        chief, tf = run.place.chief, _tensorflow()
        with concurrent.futures.ThreadPoolExecutor(1) as run.stepping, self._session(run) as session, \
                _deferred_stop() if chief else contextlib.nullcontext([]) as run.stop:
            run.step = run.saved = int(run.session.run(run.net.step))
            run.losses, run.since = [], (time.monotonic(), run.step)
            run.begun, run.validating, run.validation = time.process_time(), 0.0, None
            run.cpu_before = run.config.get("cpu_minutes", 0) - time.process_time() / 60
            with tqdm(total=run.last * self.batch_size, initial=run.step * self.batch_size, unit="img",
                      disable=None) as run.bar:
                run.bar.write(f"{len(run.images)} images to train on, {len(run.held[0])} held out; from step "
                              f"{run.step} to {run.last}", file=sys.stderr)
                for images, sequences in _one_ahead(self._batches(run)):
                    if chief and run.step >= run.last:
                        break
                    feeds, before = {run.net.images: images, run.net.sequences: sequences}, run.step
                    whole = self._step(run, session, feeds)
                    if chief:
                        try:
                            self._between_steps(run, before, feeds)
                        except (tf.errors.OpError, RuntimeError) as error:
                            if whole and not _is_lost_server(error):  # of which the next step hears, and waits for it
                                raise
                    if run.stop:
                        print(f"stopped and saved at step {run.saved} of {run.last}; the same command goes on from "
                              "there", file=sys.stderr)
                        if not whole:  # nothing can end a step that waits for a parameter server
                            os._exit(128 + run.stop[0])
                        return 128 + run.stop[0]
            run.finished = True
        if chief:
            print(f"{run.step} steps done; best accuracy {run.config.get('accuracy')} in {run.folder}", file=sys.stderr)
        return 0

    def _step(self, run, session, feeds):
        """Runs one training step. Returns False if the chief gave it up: told to stop while another task is missing."""
        waiting = run.stepping.submit(session.run, [run.net.loss, run.net.gradient_norm, run.net.train], feeds)
        while not waiting.done() and not (run.stop and run.place.servers):
            concurrent.futures.wait([waiting], timeout=1)  # in this thread signals are heard
        if not waiting.done():
            return False
        loss, norm, step = waiting.result()
        self._require_finite(run, loss, norm)
        run.losses.append(float(loss))
        run.bar.update((int(step) - run.step) * self.batch_size)
        run.bar.set_postfix(loss=f"{np.mean(run.losses[-100:]):.3f}", accuracy=run.config.get("accuracy"))
        run.step = int(step)
        return True

    def _between_steps(self, run, before, feeds):
        """Reports and saves where it is time for it, after the step that followed step `before`."""
        due = run.step // REPORT_STEPS > before // REPORT_STEPS and self._validation_is_due(run)
        report, save_steps = run.step >= run.last or due, max(1, round(self.save_epoch * run.steps_per_epoch))
        if report or run.stop or run.step // save_steps > before // save_steps:
            self._require_finite(run, run.session.run(run.net.loss, feeds))  # of the weights to be saved
            if report:
                self._report(run, feeds)
            self._save(run)

    def _require_finite(self, run, *values):
        if not np.isfinite(values).all():
            raise self.Error(f"the loss or its gradient is no longer a number after step {run.step}: lower --lr; the "
                             f"checkpoint of step {run.saved} in {run.folder} is intact")

    def _batches(self, run):
        """Yields (images, sparse sequences) from `run.step` on; the seed and the step alone say which images."""
        for step in itertools.count(run.step):
            epoch, batch = divmod(step, run.steps_per_epoch)
            if batch == 0 or step == run.step:
                order = np.random.default_rng([self.seed, epoch]).permutation(len(run.images))
            rows = order[batch * self.batch_size:(batch + 1) * self.batch_size]
            yield run.images[rows], self.sequences_to_sparse([self.text_to_sequence(run.texts[row]) for row in rows])

    def _validation_is_due(self, run):
        """Whether one more validation stays under its share of the time; the first one's cost is a guess."""
        elapsed = time.process_time() - run.begun  # a machine that was busy, or stopped, for a while does not count
        cost = run.validation or elapsed / len(run.losses) / self.batch_size * len(run.held[0]) / 3
        return run.validating + cost <= VALIDATION_SHARE * elapsed

    def _report(self, run, feeds):
        """Validates on every held-out image; prints the article's figures and writes them for TensorBoard."""
        begun, now, (last_time, last_step) = time.process_time(), time.monotonic(), run.since
        epoch, batch = divmod(run.step, run.steps_per_epoch)
        speed = (run.step - last_step) * self.batch_size / (now - last_time)
        images, sequences = feeds.values()
        train = score([self.sequence_to_text(sequence) for sequence in self.sparse_to_sequences(sequences)],
                      [text for text, _ in self._read(run.session, run.net, images)])
        truths, readings, loss = self._validate(run)
        held = score(truths, readings)
        wrong = [row for row, truth in enumerate(truths) if readings[row] != truth]
        figures = {"lr": self._learning_rate((run.step - 1) / run.steps_per_epoch), "images_per_second": speed,
                   "train/loss": float(np.mean(run.losses[last_step - run.step:])), "train/edit_distance": train["cer"],
                   "validation/loss": loss, "validation/edit_distance": held["cer"],
                   "validation/accuracy": held["accuracy"], "cpu_minutes": self._cpu_minutes(run)}
        lines = [f"epoch {epoch}  batch {batch} of {run.steps_per_epoch}  step {run.step}  lr {figures['lr']:.2e}  "
                 f"{speed:.0f} images/s",
                 f"train       loss {figures['train/loss']:.3f}  edit distance {train['cer']:.4f}",
                 f"validation  loss {loss:.3f}  edit distance {held['cer']:.4f}  accuracy {held['accuracy']:.2%}",
                 "accuracy by length  " + _shares(held["by_length"])]
        lines += [f"True {_spelt(truths[row])} <====> {_spelt(readings[row])}" for row in (wrong + [0])[:3]]
        tqdm.write("\n".join(lines) + "\n", file=sys.stderr)
        _write_summaries(run.writer, run.step, figures, [(run.held[0][row], truths[row], readings[row])
                                                         for row in wrong[:8]])
        if held["accuracy"] >= run.config.get("accuracy", 0):
            run.config.update(accuracy=held["accuracy"], validated_on=len(truths), best_step=run.step)
        run.since = time.monotonic(), run.step
        run.validation = time.process_time() - begun
        run.validating += run.validation

    @staticmethod
    def _cpu_minutes(run):
        """What all cores have spent on it: earlier parts and validations count, loading the images does not."""
        return run.cpu_before + time.process_time() / 60

    def _validate(self, run):
        """Returns the held-out texts, their readings and the mean loss over them."""
        images, texts = run.held
        rows = np.arange(-(-len(texts) // self.batch_size) * self.batch_size).reshape(-1, self.batch_size) % len(texts)

        def validate(batch):  # the graph takes whole batches, so the last one is filled up from the front
            sequences = self.sequences_to_sparse([self.text_to_sequence(texts[row]) for row in batch])
            losses, sparse = run.session.run([run.net.losses, run.net.sparse],
                                             {run.net.images: images[batch], run.net.sequences: sequences})
            return losses, [self.sequence_to_text(sequence) for sequence in self.sparse_to_sequences(sparse)]

        with ThreadPool(_cores()) as pool:
            results = pool.map(validate, rows)
        losses = np.concatenate([losses for losses, _ in results])[:len(texts)]
        return texts, [text for _, batch in results for text in batch][:len(texts)], float(losses.mean())

    def _save(self, run):
        """Writes the checkpoint of this step, then config.json, and then removes what is no longer needed.

        In this order kill -9 at any point leaves a folder that loads. So does a power cut, because each is on the disk
        before the next is begun; that takes milliseconds. The checkpoint before stays too, should the disk tear one.
        """
        with self._writing(run.folder):
            try:
                prefix = run.saver.save(run.session, str(run.folder / "LstmCtcOcr"), run.step, write_meta_graph=False)
                _to_disk(*run.folder.glob(f"{Path(prefix).name}.*"), run.folder)
            except BaseException:  # a full disk, say: parts of a checkpoint must not take the room of the next attempt
                whole = (run.folder / f"LstmCtcOcr-{run.step}.index").exists()  # it is written last
                for path in run.folder.glob("checkpoint.tmp*" if whole else f"LstmCtcOcr-{run.step}.*"):
                    path.unlink()
                raise
        before, run.saved = run.saved, run.step
        run.config.update(step=run.step, epoch=round(run.step / run.steps_per_epoch, 3),
                          images_seen=run.step * self.batch_size * run.place.workers,
                          images=len(run.images) * run.place.workers, epoch_max=self.epoch_max,
                          lr=self.lr, cpu_minutes=round(self._cpu_minutes(run), 2),
                          tensorflow=_tensorflow().__version__)
        self._save_config(run.folder, run.config)
        kept = {f"LstmCtcOcr-{step}" for step in (run.step, before, run.config.get("best_step"))}
        for path in run.folder.glob("LstmCtcOcr-*"):
            if path.name.split(".")[0] not in kept:
                path.unlink()

    # ------------------------------------------------------------------ reading

    def _read(self, session, net, images, known=(), options=None):
        """images (n, H, W) uint8, and what is `Known` of each, or of none -> n (text, confidence) pairs."""
        logits = session.run(net.logits, {net.images: images}, options)
        known = known or [self.Known()] * len(images)
        readings = {}
        for each in set(known):
            rows = [row for row, of_row in enumerate(known) if of_row == each]
            readings.update(zip(rows, self.texts(logits[:, rows], each)))
        return [readings[row] for row in range(len(images))]

    def _read_each(self, sources, known=(), options=None):
        """As `recognise`, but an image that cannot be read has its `Error` in its place.

        known: what is `Known` of each; by default what the settings say.
        """
        reader, images, rows, results = self._reader, [], [], []  # before the images: the model says how large they are
        for row, source in enumerate(sources):
            try:
                images.append(self.load_image(source))
                rows.append(row)
                results.append(None)
            except self.Error as error:
                results.append(error)
        if images:
            known = known or [self._known_by_settings] * len(sources)
            readings = self._read(*reader, np.stack(images), [known[row] for row in rows], options)
            for row, reading in zip(rows, readings):
                results[row] = reading
        return results

    def recognise(self, sources, letters="", length=""):
        """Reads images, each a path or the bytes of a file, as one batch; returns their (text, confidence) pairs.

        letters, length: what is known of the texts, as the settings of these names, which hold where nothing is given.
        The confidence is the probability that the network gives to the text, see `texts`. The model is loaded at the
        first call. Raises `Error` if it cannot be, or cannot read such texts, or for the first image that cannot be
        read.
        """
        self._reader  # it says which letters can be known
        known = self.known(letters or self.letters, length or self.length)
        readings = self._read_each(sources, [known] * len(sources))
        for reading in readings:
            if isinstance(reading, self.Error):
                raise reading
        return readings

    def recognise_files(self, paths):
        """Yields for each path, in order: (path, text, confidence, None), or (path, None, None, what is wrong)."""
        self._reader  # built by this thread alone

        def read(batch):
            return [(path, None, None, str(reading)) if isinstance(reading, self.Error) else (path, *reading, None)
                    for path, reading in zip(batch, self._read_each(batch))]

        paths = list(paths)
        batches = [paths[start:start + READ_BATCH] for start in range(0, len(paths), READ_BATCH)]
        with ThreadPool(_cores()) as pool:
            for rows in pool.imap(read, batches):
                yield from rows

    def test(self, paths=(), as_json=False):
        """Reads files and folders and prints a line for each image, then how many labelled ones were read right.

        Returns 0, or 1 if some could not be read. Raises `Error` if there is nothing to read.
        """
        paths = paths or [HOME / "dataset" / "test"]
        files = [file for path in paths for file in _image_files(Path(path))]
        if not files:
            raise self.Error(f"no images in {', '.join(map(str, paths))}: name files or folders that hold some")
        self._reader  # first of all, so that a missing model is the only thing said
        truths, readings, confidences = [], [], []
        for path, text, confidence, fault in self.recognise_files(files):
            confidences += [confidence] * (not fault)
            if as_json:
                print(json.dumps({"img_path": str(path), "error": fault} if fault else
                                 {"img_path": str(path), "ocr_ret": text, "confidence": confidence}))
            elif fault:
                print(fault, file=sys.stderr)
            else:
                truth = self._truth_of(path)
                verdict = "" if truth is None else f"  {truth} {'right' if text == truth else 'wrong'}"
                print(f"{text:<{self.words_max_num}}  {confidence:.3f}  {path}{verdict}")
                if truth is not None:
                    truths.append(truth)
                    readings.append(text)
        if truths and not as_json:
            print("\n" + describe(score(truths, readings)))
        if sum(confidence < 0.5 for confidence in confidences) > len(confidences) / 2:
            print(self._strange_images(), file=sys.stderr)
        return 1 if len(confidences) < len(files) else 0

    def _strange_images(self):
        """The line that says what to do about images of which most are read with little confidence."""
        learn = "label a few hundred of them, and `train --dataset FOLDER --start-from general`"
        if self._model_to_read().name != "general":
            learn = f"try `--model general`, or {learn}"
        return f"most of these do not look like what this model has learnt (confidence below 0.5): {learn}"

    def _truth_of(self, path):
        """The label in a file's name, or None if there is none of this alphabet."""
        named = LABELLED.fullmatch(path.name)
        return named[2] if named and named[2] and set(named[2]) <= set(self.words) else None

    # ------------------------------------------------------------------ service

    def create_app(self):
        """Returns the Flask application, its model loaded and asked once."""
        self._reader  # first, because the model says how large an image is
        self._service.model = {name: value for name, value in self._load_config(self._model_to_read()).items()
                               if name in ("net", "words", "words_max_num", "step", "accuracy")}
        for _ in range(_cores()):
            threading.Thread(target=self._read_jobs, daemon=True).start()
        self._read_in_batches([cv2.imencode(".png", np.zeros((self.im_height, self.im_width), np.uint8))[1].tobytes()],
                              self._known_by_settings)
        self._service.token = self.token or os.environ.get(TOKEN_VARIABLE, "")
        app = flask.Flask(__name__, static_folder=None)
        app.json.sort_keys = False
        app.config["MAX_CONTENT_LENGTH"] = MAX_BODY
        app.before_request(self._admit)
        app.after_request(self._account)
        app.register_error_handler(HTTPException, _json_error)
        for path, method, answer in (
                ("/captchaOcr", "GET", self._answer_path), ("/captchaOcr", "POST", self._answer_post),
                ("/healthz", "GET", self._answer_health), ("/", "GET", self._answer_page),
                ("/openapi.json", "GET", describe_service)):
            app.add_url_rule(path, answer.__name__, answer, methods=[method], provide_automatic_options=False)
        return app

    @functools.cached_property
    def _service(self):
        """What requests share: counters, the latest latencies in seconds, and the images that wait to be read."""
        return types.SimpleNamespace(
            images_read=0, errors=0, waiting=0, latencies=collections.deque(maxlen=1000), stopping=False,
            lock=threading.Lock(), jobs=queue.SimpleQueue())

    def _admit(self):
        """Refuses strangers, and whoever comes when the service is about to stop."""
        flask.g.begun = time.perf_counter()
        basic, header = flask.request.authorization, flask.request.headers.get("Authorization", "")
        shown = basic.password if basic and basic.type == "basic" else header.partition(" ")[2]
        if self._service.token and flask.request.path != "/healthz" and not hmac.compare_digest(
                (shown or "").encode(), self._service.token.encode()):
            raise Unauthorized("this service wants its token", www_authenticate=WWWAuthenticate("basic", {
                "realm": "lstm_ctc_ocr"}))
        if self._service.stopping:
            raise ServiceUnavailable("the service is stopping", retry_after=1)

    def _account(self, response):
        """Counts and logs a request; sets the headers that every answer has."""
        seconds = time.perf_counter() - flask.g.begun
        with self._service.lock:
            self._service.errors += response.status_code >= 400
            self._service.latencies.append(seconds)
        response.headers.update({"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
                                 "X-Frame-Options": "DENY", "Cache-Control": "no-store"})
        response.headers.setdefault("Content-Security-Policy", "default-src 'none'")
        target = ascii(flask.request.full_path.rstrip("?"))[1:-1]
        with contextlib.suppress(OSError):  # nobody may be reading the log
            print(f'{flask.request.remote_addr} "{flask.request.method} {target}" {response.status_code} '
                  f"{seconds * 1e3:.1f} ms", file=sys.stderr, flush=True)
        return response

    def _answer_path(self):
        """GET /captchaOcr?img_path="""
        img_path = flask.request.args.get("img_path")
        if not img_path:
            flask.abort(400, "say which image: /captchaOcr?img_path=./dataset/test/0_PIY.png")
        path = self._servable(img_path)
        try:
            data = path and path.stat().st_size <= MAX_BODY and path.read_bytes()
        except OSError:
            path = None
        if not path:
            flask.abort(404, "no such image under the image root")
        if data is False:
            flask.abort(413, f"the file has more than {MAX_BODY:,} bytes")
        return {"img_path": img_path, **self._answer([data], flask.request.args)[0]}

    def _answer_post(self):
        """POST /captchaOcr: one image as the body, or as JSON, or one or several as a form's files."""
        kind, known = flask.request.mimetype, flask.request.values
        if kind == "multipart/form-data":
            datas = [file.read() for file in flask.request.files.getlist("image")]
        elif kind == "application/json":
            body = flask.request.get_json(silent=True)
            datas = [_base64_image(body)]
            known = {**known, **body}
        elif kind.startswith("image/"):
            datas = [flask.request.get_data()]
        else:
            flask.abort(415, "send an image/* body, JSON with the image as base64, or a form with files named image")
        if not 1 <= len(datas) <= MAX_IMAGES:
            flask.abort(400, f"send 1 to {MAX_IMAGES} images, as files named image")
        answers = self._answer(datas, known)
        return answers[0] if len(answers) == 1 else {"results": answers}

    def _answer(self, datas, known):
        """Reads files' bytes; returns for each what the service says about it, or ends the request with an error.

        known: a mapping that may hold `letters` and `length`; where it does not, the settings do.
        """
        service = self._service
        try:
            known = self.known(*(str(known.get(name) or getattr(self, name)) for name in ("letters", "length")))
        except self.Error as error:
            flask.abort(error.status, str(error))
        if not all(data.startswith(SIGNATURES) for data in datas):
            flask.abort(415, "that is no PNG, JPEG, GIF, BMP, WebP or TIFF image")
        with service.lock:
            if service.waiting and service.waiting + len(datas) > QUEUE:
                raise ServiceUnavailable("too many images are waiting; try again soon", retry_after=1)
            service.waiting += len(datas)
        try:
            readings = self._read_in_batches(datas, known)
        except self.Error as error:
            flask.abort(error.status, str(error))
        finally:
            with service.lock:
                service.waiting -= len(datas)
        with service.lock:
            service.images_read += len(datas)
        return [{"ocr_ret": text, "confidence": confidence} for text, confidence in readings]

    def _read_in_batches(self, datas, known):
        """`recognise` for many threads at once: other threads read in batches what all of them have asked for."""
        futures = [concurrent.futures.Future() for _ in datas]
        for data, future in zip(datas, futures):
            self._service.jobs.put((data, known, future))
        concurrent.futures.wait(futures)  # all of them, although one may be no image
        return [future.result() for future in futures]

    def _read_jobs(self):
        """Reads for ever; while a batch is read the next one fills up, so nobody waits for others to come.

        The batch is decoded and read in this thread, on one core, and there is such a thread for each: in paired runs a
        sixth to a fifth more requests a second than one thread whose operations all cores share.
        """
        jobs, options = self._service.jobs, _tensorflow().RunOptions(inter_op_thread_pool=-1)  # in the calling thread
        while True:
            batch = [jobs.get()]
            with contextlib.suppress(queue.Empty):
                while len(batch) < SERVE_BATCH:
                    batch.append(jobs.get_nowait())
            datas, known, futures = zip(*batch)
            try:
                readings = self._read_each(datas, known, options)
            except Exception as error:  # whoever asked is told, and the next batch is read
                readings = [error] * len(batch)
            for future, reading in zip(futures, readings):
                (future.set_exception if isinstance(reading, Exception) else future.set_result)(reading)

    def _answer_health(self):
        """GET /healthz"""
        service = self._service
        with service.lock:
            milliseconds = np.array(service.latencies or [0]) * 1e3
            read, errors = service.images_read, service.errors
        return {"status": "stopping" if service.stopping else "ok", "version": VERSION, "model": service.model,
                "waiting": service.waiting, "images_read": read, "errors": errors,
                "latency_ms": {f"p{p}": round(float(np.percentile(milliseconds, p)), 2) for p in (50, 95, 99)}}

    def _answer_page(self):
        """GET /"""
        nonce = secrets.token_urlsafe(16)
        samples = "".join(SAMPLE.format(name=path.stem.split("_")[1], data=base64.b64encode(path.read_bytes()).decode())
                          for path in sorted((HOME / "dataset" / "test").glob("*.png"))[:3])
        page = PAGE.replace("$nonce", nonce).replace("$samples", samples).replace("$net", self._service.model["net"])
        return page, {"Content-Security-Policy": f"default-src 'none'; script-src 'nonce-{nonce}'; style-src "
                      f"'nonce-{nonce}'; img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
                      "frame-ancestors 'none'"}

    def _servable(self, img_path):
        """The regular file that a client names, links resolved, if it is under the image root; else None.

        A relative path may start at the server's folder, at the image root or at the folder that holds it.
        """
        root = Path(os.path.realpath(self.image_root))
        for base in (Path.cwd(), root.parent, root):
            try:
                path = Path(os.path.realpath(base / img_path))
                if path.is_relative_to(root) and path.is_file():
                    return path
            except (OSError, ValueError):  # a name too long, a NUL
                return None

    def start(self):
        """Serves until it is told to stop; then it finishes what is under way."""
        if not Path(self.image_root).is_dir():
            raise self.Error(f"--image-root {self.image_root} is not a folder")
        server = self._listen()
        host = f"[{self.host}]" if ":" in self.host else self.host
        with _deferred_stop() as stop:
            threading.Thread(target=server.run, daemon=True).start()
            print(f"http://{host}:{server.effective_port}/captchaOcr?img_path=./dataset/test/0_PIY.png",
                  file=sys.stderr, flush=True)
            while not stop:  # who waits for a lock misses a signal that comes as the wait begins
                time.sleep(0.1)
            self._drain(server)
        return 0

    def _listen(self):
        """Returns the server, ready to run; raises `Error` if the address cannot be had."""
        try:
            family, *_, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            listening = socket.create_server(address[:2], family=family, backlog=1024)
        except (OSError, OverflowError, UnicodeError) as error:
            raise self.Error(f"cannot serve on {self.host}:{self.port} ({error}); choose another --port or "
                             "--host") from None
        if not ipaddress.ip_address(address[0]).is_loopback:
            print(f"other machines can reach this: posted images are read, and every image under {self.image_root}; "
                  f"a token is {'' if self.token or os.environ.get(TOKEN_VARIABLE) else 'not '}asked for",
                  file=sys.stderr)
        waitress.utilities.Error.to_response = _json_parse_error  # waitress has no setting for it
        # More threads than may wait for an answer, so that there is always one to say that too many wait.
        return waitress.create_server(self.create_app(), sockets=[listening], threads=QUEUE + 8, ident=None,
                                      max_request_body_size=4 * MAX_BODY, connection_limit=1000,
                                      asyncore_use_poll=True)

    def _drain(self, server):
        """Takes no more connections, and waits until every request under way is answered, 4 seconds at most."""
        self._service.stopping, server.accepting = True, False
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline and any(
                channel.requests or channel.total_outbufs_len for channel in list(server.active_channels.values())):
            time.sleep(0.01)

    # ------------------------------------------------------------------ export

    def export(self, directory):
        """Writes a SavedModel for TensorFlow Serving: encoded images (B,) string -> text (B,), confidence (B,).

        PNG, JPEG, GIF and BMP of any size, prepared as by `load_image`. Raises `Error` if the folder is there already.
        """
        if Path(directory).exists():
            raise self.Error(f"{directory} is there already: name a new folder")
        tf, folder = _tensorflow(), self._model_to_read()
        self._adopt(folder)
        with tf.Graph().as_default(), tf.Session(config=_session_config()) as session, self._writing(directory):
            encoded = tf.placeholder(tf.string, [None], "images")
            config = self._load_config(folder)
            net = self._build_reading(types.SimpleNamespace(images=tf.map_fn(self._load_in_graph, encoded, tf.uint8)),
                                      config.get("temperature", 1))
            self._restore(session, self._reading_saver(), folder, config.get("best_step"))
            tf.saved_model.simple_save(session, str(directory), {"images": encoded},
                                       {"text": self._texts_in_graph(net.sparse), "confidence": net.confidence})
        print(f"{directory} takes {{'images': [encoded, ...]}} and gives text and confidence", file=sys.stderr)

    def _load_in_graph(self, encoded):
        """`load_image` as TensorFlow operations: the bytes of a file () string -> (H, W) uint8."""
        tf = _tensorflow()
        pixels = tf.cast(tf.io.decode_image(encoded, expand_animations=False), tf.float32) / 255  # (h, w, channels)
        channels = tf.shape(pixels)[2]
        alpha = tf.cond(channels % 2 < 1, lambda: pixels[..., -1:], lambda: tf.ones_like(pixels[..., :1]))
        grey = tf.cond(channels < 3, lambda: pixels[..., :1],
                       lambda: tf.tensordot(pixels[..., :3], [[0.299], [0.587], [0.114]], 1))
        grey = grey * alpha + 1 - alpha
        height, width = tf.shape(grey)[0], tf.shape(grey)[1]
        fitted = tf.clip_by_value(tf.cast(tf.round(width * self.im_height / height), tf.int32), 1, self.im_width)
        size = [self.im_height, fitted]
        grey = tf.case([(tf.reduce_all(tf.equal([height, width], size)), lambda: grey),
                        (height > self.im_height, lambda: tf.image.resize_area(grey[None], size)[0])],
                       lambda: tf.image.resize_bilinear(grey[None], size, half_pixel_centers=True)[0])[..., 0]
        ink = tf.reduce_max(grey) - grey
        image = tf.round(ink * (255 / tf.maximum(tf.reduce_max(ink), MIN_CONTRAST)))
        image = tf.pad(image, [[0, 0], [0, self.im_width - fitted]])
        return tf.ensure_shape(tf.cast(image, tf.uint8), [self.im_height, self.im_width])

    def _texts_in_graph(self, sparse):
        """`sequence_to_text` as TensorFlow operations: sparse sequences (B, .) -> (B,) string."""
        tf = _tensorflow()
        numbers = tf.sparse.to_dense(sparse, default_value=-1)
        letters, parts = numbers // self.label_parts, numbers % self.label_parts
        goes_on = tf.pad(tf.equal(letters[:, 1:], letters[:, :-1]) & (parts[:, 1:] > parts[:, :-1]), [[0, 0], [1, 0]])
        # Of one part, each is a letter. Of three, a letter counts at its second: where one goes on that did not before.
        counts = goes_on & ~tf.pad(goes_on[:, :-1], [[0, 0], [1, 0]]) if self.label_parts > 1 else numbers >= 0
        return tf.strings.reduce_join(tf.where(counts, tf.gather([*self.words], tf.maximum(letters, 0)),
                                               tf.fill(tf.shape(letters), "")), axis=1)

    @contextlib.contextmanager
    def _writing(self, folder):
        """Turns the faults of a disk into an `Error` that names the folder."""
        tf = sys.modules.get("tensorflow")
        try:
            yield
        except (OSError, *([tf.errors.OpError] if tf else [])) as error:
            if _is_lost_server(error):
                raise
            text = getattr(error, "strerror", None) or str(error)
            reason = re.search(r"(.+)\n\s*\[\[", text) or re.match(".*", text)  # TensorFlow puts a traceback around it
            raise self.Error(f"cannot write to {folder} ({reason[reason.re.groups]}); run the same command again once "
                             "that is mended") from None


# ---------------------------------------------------------------------- Baidu's Warp-CTC

@functools.cache
def _warp_library():
    """The library as the paddlepaddle wheel carries it, loaded without importing that package.

    Its `options` makes a `ctcOptions` of ctc.h; the union in there, thread count or GPU stream, has a pointer's size.
    """
    package = importlib.util.find_spec("paddle")
    try:
        library = ctypes.CDLL(str(Path(package.origin).parent / "libs" / "libwarpctc.so"))
    except (AttributeError, OSError) as error:
        reason = "" if package is None else f" ({error})"
        raise LstmCtcOcr.Error("--ctc warp needs Baidu's library, which is not here: pip install --no-deps "
                               f"paddlepaddle==3.3.1{reason}") from None
    library.options = type("ctcOptions", (ctypes.Structure,), {"_fields_": [
        ("location", ctypes.c_int), ("threads", ctypes.c_size_t), ("blank", ctypes.c_int)]})
    return library


def _warp_ctc(logits, labels, lengths):
    """logits (T, B, C) float32, blank last; labels: all texts' classes (n,) int32; lengths (B,) int32, summing to n.

    Returns losses (B,) and their gradients at the logits (T, B, C). Raises `LstmCtcOcr.Error` for a label that cannot
    be aligned in T steps: the library would say that all is well, and leave the gradient unwritten.
    """
    library = _warp_library()
    steps, batch, classes = logits.shape
    for label in np.split(labels, np.cumsum(lengths)[:-1]):
        if (needed := len(label) + np.count_nonzero(label[1:] == label[:-1])) > steps:
            raise LstmCtcOcr.Error(f"CTC cannot align a label that takes {needed} steps in {steps}")

    def pointer(array):
        return array.ctypes.data_as(ctypes.c_void_p)

    logits, labels, lengths = (np.ascontiguousarray(a, d) for a, d in ((logits, np.float32), (labels, np.int32),
                                                                       (lengths, np.int32)))
    inputs, losses, gradients = np.full(batch, steps, np.int32), np.empty(batch, np.float32), np.zeros_like(logits)
    options, size = library.options(0, _cores(), classes - 1), ctypes.c_size_t()
    status = library.get_workspace_size(pointer(lengths), pointer(inputs), classes, batch, options, ctypes.byref(size))
    workspace = np.empty(size.value, np.uint8)
    status = status or library.compute_ctc_loss(pointer(logits), pointer(gradients), pointer(labels), pointer(lengths),
                                                pointer(inputs), classes, batch, pointer(losses), pointer(workspace),
                                                options)
    if status:
        raise LstmCtcOcr.Error(f"warp-ctc failed with status {status}")
    return losses, gradients


# ---------------------------------------------------------------------- the most probable text

TINY = 1e-300  # what a probability counts at least in the search, so that every text has one to compare
ODD = np.uint64(0x9E3779B97F4A7C15)  # hashes a prefix: that of a longer one is the shorter one's times this, + class


def softmax(logits):
    """(T, B, C) -> probabilities (T, B, C) float64."""
    p = np.exp(logits - logits.max(axis=2, keepdims=True), dtype=np.float64)
    return p / p.sum(axis=2, keepdims=True)


def most_probable(p, beam_width, longest, fits=None, follows=None):
    """The most probable of the sequences that CTC can read from p (T, B, C), each step's probabilities, blank last.

    Returns B pairs (sequence, probability); the probability is exact: exp(-CTC loss), so it means the same however the
    sequence was found. First the best class of each step is tried. If the sequence that they spell has more than one
    half, it is the most probable, for those of all sequences add up to at most 1. Only else a beam search looks further
    (`_beam_search`), among sequences of up to `longest` classes, and what it leaves is compared by exact probabilities.
    fits(sequence) says which sequences may be answered; None: all. follows: as `_beam_search` has it; given, it is
    asked besides, for sequences that fit by all means.
    """
    sequences = _greedy(p)
    results = list(zip(sequences, sequence_probabilities(sequences, p).tolist()))
    hard = [b for b, (sequence, probability) in enumerate(results)
            if probability <= 0.5 or fits and not fits(sequence)]
    if not hard:
        return results
    rules = [None] if follows is None else [None, follows]
    searches = [_beam_search(p[:, hard], beam_width, longest, fits, rule) for rule in rules]
    for b, *found in zip(hard, *searches):
        candidates = sum(found, [sequences[b]] * (not fits or fits(sequences[b])))
        exact = sequence_probabilities(candidates, p[:, [b] * len(candidates)])
        results[b] = candidates[exact.argmax()], float(exact.max())
    return results


def _greedy(p):
    """The best class of each step, repeats merged and blanks dropped: p (T, B, C) -> B sequences."""
    best = p.argmax(axis=2)  # (T, B)
    begins = best < p.shape[2] - 1
    begins[1:] &= best[1:] != best[:-1]
    return [column[kept].tolist() for column, kept in zip(best.T, begins.T)]


def sequence_probabilities(sequences, p):
    """The probability of each of B sequences, all its alignments added up: p (T, B, C), blank last -> (B,) float64.

    The forward recursion of Graves et al. (2006), section 4.1. It needs no logarithms: float64 loses only what is below
    1e-300 in the end.
    """
    lengths, blank = np.array([len(sequence) for sequence in sequences]), p.shape[2] - 1
    states = np.full((len(sequences), 2 * lengths.max() + 1), blank)  # (B, S): letters with blanks around them
    for row, sequence in zip(states, sequences):
        row[1:2 * len(sequence):2] = sequence
    skips = np.zeros(states.shape)  # 1 where a path may come from the state before the last one
    skips[:, 1:2] = 1
    skips[:, 2:] = (states[:, 2:] != blank) & (states[:, 2:] != states[:, :-2])
    rows = np.arange(len(sequences))
    paths = np.zeros((len(sequences), states.shape[1] + 2))  # (B, S + 2): what ends in each state, two before the first
    paths[:, 1] = 1  # whence the first step reaches the first two states
    for emitted in p[:, rows[:, None], states]:  # (B, S)
        now = paths[:, :-2] * skips
        now += paths[:, 1:-1]
        now += paths[:, 2:]
        now *= emitted
        paths[:, 2:] = now
        paths[:, 1] = 0
    return np.minimum(1, paths[rows, 2 * lengths + 2] + paths[rows, 2 * lengths + 1])


@dataclasses.dataclass
class _Beam:
    """The W likeliest prefixes of each length L from 0 on; arrays (B, L, W)."""
    blank: np.ndarray  # log of the probability of a prefix by the paths that end with a blank
    letter: np.ndarray  # and of those that end with its last class
    last: np.ndarray  # its last class; the blank, if it is empty
    key: np.ndarray  # its hash, by which it is known if it comes a second way; 0 where there is none yet
    sequence: np.ndarray  # (B, L, W, L - 1), what is not used of it arbitrary


def _beam_search(p, beam_width, longest, fits=None, follows=None):
    """CTC's prefix beam search (Hannun et al., 2014, arXiv:1408.2873), with a beam for every length up to `longest`.

    So a sequence of every length is found, however unlikely. p (T, B, C), blank last; follows (C, C), 0 or -inf, by a
    last class and the next one: which may come next. Returns for each of B the `beam_width` best sequences that fit.
    """
    steps, batch, classes = p.shape
    shape = batch, longest + 1, beam_width
    beam = _Beam(np.full(shape, -np.inf), np.full(shape, -np.inf), np.full(shape, classes - 1),
                 np.zeros(shape, np.uint64), np.zeros((*shape, longest), np.int16))
    beam.blank[:, 0, 0], beam.key[:, 0, 0] = 0, 1
    # Those beyond cannot win: of a prefix's extensions W at most are in the beam already, and one is its last class.
    count = min(classes - 1, 2 * beam_width + 1) if follows is None else classes - 1
    likely = np.argpartition(p[..., :-1], -count, axis=2)[..., -count:]  # (T, B, K)
    place = np.full(p.shape, count)  # (T, B, C): where in `likely` a class is; K if it is not
    np.put_along_axis(place, likely, np.arange(count), axis=2)
    for log_p, *classes_of_step in zip(np.log(np.maximum(p, TINY)), likely, place):
        _advance(beam, log_p, *classes_of_step, follows)
    score, found = np.logaddexp(beam.blank, beam.letter).reshape(batch, -1), []
    for b, order in enumerate(np.argsort(-score, axis=1)):
        ranked = (beam.sequence[b, n // beam_width, n % beam_width, :n // beam_width].tolist() for n in order
                  if score[b, n] > -np.inf)
        found.append(list(itertools.islice(filter(fits or (lambda _: True), ranked), beam_width)))
    return found


def _advance(beam, log_p, likely, place, follows):
    """Takes a beam one step on: log_p (B, C), blank last; likely (B, K) and place (B, C): see `_beam_search`."""
    batch, lengths, width = beam.last.shape
    b, n, w = np.ogrid[:batch, :lengths, :width]
    log_last, total = log_p[b, beam.last], np.logaddexp(beam.blank, beam.letter)
    stay_blank, stay_letter = total + log_p[:, None, None, -1], beam.letter + log_last
    longer = np.empty((batch, lengths, width, likely.shape[1] + 1))  # the last for what is not among the likely
    longer[..., :-1] = total[..., None] + np.take_along_axis(log_p, likely, axis=1)[:, None, None]
    longer[b, n, w, place[b, beam.last]] = beam.blank + log_last  # a repeat needs a blank between
    if follows is not None:
        longer[..., :-1] += follows[beam.last[..., None], likely[:, None, None]]
    # What is in the beam already, and also one of its prefixes made longer, is the same text.
    child = beam.key[:, :-1, :, None] * ODD + beam.last[:, 1:, None].astype(np.uint64)
    i, j, parent, known = np.nonzero(child == beam.key[:, 1:, None])
    to, at = (i, j + 1, known), (i, j, parent)
    gained = np.where(beam.last[at] == beam.last[to], beam.blank[at], total[at]) + log_p[i, beam.last[to]]
    stay_letter[to] = np.logaddexp(stay_letter[to], gained)
    longer[(*at, place[i, beam.last[to]])] = -np.inf
    scores = np.full((batch, lengths, width * (likely.shape[1] + 1)), -np.inf)
    scores[..., :width] = np.logaddexp(stay_blank, stay_letter)
    scores[:, 1:, width:] = longer[:, :-1, :, :-1].reshape(batch, lengths - 1, -1)
    best = np.argpartition(scores, -width, axis=2)[..., -width:]
    score, stays = scores[b, n, best], best < width
    parent, added = np.divmod(best - width, likely.shape[1])
    added, origin = likely[b, added], (b, n - ~stays, np.where(stays, best, parent))
    beam.blank = np.where(stays, stay_blank[origin], -np.inf)
    beam.letter = np.where(stays, stay_letter[origin], score)
    beam.key = np.where(stays, beam.key[origin], beam.key[origin] * ODD + added.astype(np.uint64))
    beam.key[score == -np.inf] = 0
    beam.last = np.where(stays, beam.last[origin], added)
    beam.sequence = beam.sequence[origin]
    i, j, k = np.nonzero(~stays)
    beam.sequence[i, j, k, j - 1] = added[i, j, k]


# ---------------------------------------------------------------------- accuracy

def edit_distance(a, b):
    """Levenshtein's distance: the fewest letters to insert, delete or replace to turn a into b."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (letter != other))
    return row[-1]


def score(truths, readings):
    """Compares readings with the truth.

    Returns accuracy (whole strings), cer (character error rate: edits per true letter), count, by_length and by_repeat:
    {length: (right, count)} of all strings, and of those with two equal letters side by side.
    """
    by_length, by_repeat = collections.defaultdict(lambda: (0, 0)), collections.defaultdict(lambda: (0, 0))
    for truth, reading in zip(truths, readings):
        repeats = any(a == b for a, b in zip(truth, truth[1:]))
        for table in [by_length] + [by_repeat] * repeats:
            right, count = table[len(truth)]
            table[len(truth)] = right + (reading == truth), count + 1
    edits = sum(map(edit_distance, truths, readings))
    return {"accuracy": sum(right for right, _ in by_length.values()) / max(1, len(truths)), "count": len(truths),
            "cer": edits / max(1, sum(map(len, truths))),
            "by_length": dict(sorted(by_length.items())), "by_repeat": dict(sorted(by_repeat.items()))}


def describe(scores):
    """The lines that `test` prints below its readings."""
    right = sum(right for right, _ in scores["by_length"].values())
    lines = [f"accuracy {scores['accuracy']:.2%} ({right} of {scores['count']}), "
             f"edit distance (CER) {scores['cer']:.4f}",
             "by length   " + _shares(scores["by_length"])]
    repeats = sum(count for _, count in scores["by_repeat"].values())
    if repeats:
        right = sum(right for right, _ in scores["by_repeat"].values())
        others = 0  # what as many strings of the same lengths without a repeat would have got right
        for length, (right_here, here) in scores["by_repeat"].items():
            right_all, count_all = scores["by_length"][length]
            others += here * (right_all - right_here) / max(1, count_all - here)
        lines.append(f"with a letter repeated side by side {right / repeats:.2%} of {repeats}; without, at the same "
                     f"lengths, {others / repeats:.2%}")
    return "\n".join(lines)


def _shares(table):
    """{length: (right, count)} as a line."""
    return "  ".join(f"{length}: {right / count:.1%}" for length, (right, count) in table.items())


def _spelt(text):
    return "[" + ", ".join(text) + "]"


def _write_summaries(writer, step, figures, wrong):
    """Writes figures {tag: value} and wrong readings [(image (H, W), truth, reading)] as a TensorBoard event."""
    tf = _tensorflow()
    values = [tf.Summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
    if wrong:
        rows = []
        for image, truth, reading in wrong:
            caption = np.full((16, image.shape[1]), 255, np.uint8)
            cv2.putText(caption, f"{truth} -> {reading}", (2, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.4, 0)
            rows += [255 - image, caption]
        picture = np.vstack(rows)
        values.append(tf.Summary.Value(tag="validation/wrong", image=tf.Summary.Image(
            height=picture.shape[0], width=picture.shape[1], colorspace=1,
            encoded_image_string=cv2.imencode(".png", picture)[1].tobytes())))
    writer.add_summary(tf.Summary(value=values), step)
    writer.flush()


# ---------------------------------------------------------------------- images and files

def _grey(pixels):
    """Pixels (h, w) or (h, w, channels) as OpenCV decodes them -> (h, w) float32, 1 white; transparent is white."""
    whole = pixels.dtype.kind in "iu"
    white = np.iinfo(pixels.dtype).max if whole else max(np.nanmax(pixels), 1e-9)
    pixels = (pixels.astype(np.float32) / np.float32(white)).reshape(*pixels.shape[:2], -1)
    if not whole:
        pixels = np.nan_to_num(pixels)
    if pixels.shape[2] in (2, 4):
        colour, alpha = pixels[..., :-1], pixels[..., -1:]
        pixels = colour * alpha + (1 - alpha)
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY) if pixels.shape[2] == 3 else pixels[..., 0]


def _image_files(path):
    """The images of a folder in the order of their numbers, or the path itself if it is no folder."""
    if not path.is_dir():
        return [path]
    files = [path / entry.name for entry in os.scandir(path) if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES
             and not entry.name.startswith(".")]
    return sorted(files, key=lambda file: (int(re.match(r"\d*", file.name)[0] or -1), file.name))


def _to_disk(*paths):
    """Waits until files, and in folders the names of files, are on the disk."""
    for path in paths if os.name == "posix" else ():  # Windows cannot, of what is open for reading
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            if not path.is_dir():  # not every file system can, of a folder
                raise
        finally:
            os.close(descriptor)


def _is_whole_png(path):
    try:
        with open(path, "rb") as file:
            file.seek(-8, os.SEEK_END)
            return file.read() == b"IEND\xaeB`\x82"
    except OSError:  # not there, or too short
        return False


@functools.cache
def _renderer(width, height):
    return ImageCaptcha(width, height)


# ---------------------------------------------------------------------- HTTP

def create_app(**settings):
    """The application for other WSGI servers: gunicorn 'lstm_ctc_ocr:create_app()'."""
    return LstmCtcOcr(**settings).create_app()


def _json_error(error):
    """Turns an HTTP error into JSON; headers such as Allow and Retry-After stay."""
    response = error.get_response()
    response.data = json.dumps({"error": error.description})
    response.content_type = "application/json"
    return response


def _json_parse_error(error, ident=None):
    """The same for what waitress refuses by itself, such as a request that is no HTTP; logs it."""
    with contextlib.suppress(OSError):
        print(f'- "{error.reason}" {error.code}', file=sys.stderr, flush=True)
    return (f"{error.code} {error.reason}", [("Content-Type", "application/json")],
            json.dumps({"error": f"{error.reason}: {error.body}"}).encode())


def _base64_image(body):
    """The image in the JSON body {"image": base64}."""
    try:
        return base64.b64decode(body["image"], validate=True)
    except (KeyError, TypeError, ValueError):
        flask.abort(400, 'send {"image": base64 of the file}')


def describe_service():
    """The service's OpenAPI description."""
    def content(schema, kind="application/json"):
        return {kind: {"schema": schema}}

    def answers(good, *codes):
        return {"200": good, **{str(code): {"$ref": "#/components/responses/Error"} for code in (401, 503, *codes)}}

    def record(optional={}, **properties):
        return {"type": "object", "required": list(properties), "properties": {**properties, **optional}}

    binary, text, number = {"type": "string", "format": "binary"}, {"type": "string"}, {"type": "number", "minimum": 0}
    reading = record(ocr_ret=text, confidence=number)
    known = {"letters": {**text, "description": "letters that alone can be read, such as ABC"},
             "length": {**text, "pattern": f"^{LENGTH.pattern}$", "description": "letters of the text: N or MIN-MAX"}}
    restrictions = [{"name": name, "in": "query", "schema": schema} for name, schema in known.items()]
    readings = {"anyOf": [reading, record(results={"type": "array", "items": reading})]}
    body = {**content(binary, "image/*"),
            **content(record(known, image={"type": "string", "format": "byte"})),
            **content(record(known, image={"type": "array", "minItems": 1, "maxItems": MAX_IMAGES, "items": binary}),
                      "multipart/form-data")}
    return {
        "openapi": "3.1.0", "info": {"title": "lstm_ctc_ocr", "version": VERSION},
        "paths": {
            "/captchaOcr": {
                "get": {"summary": "Reads an image under the image root", "parameters": [
                    {"name": "img_path", "in": "query", "required": True, "schema": {**text, "minLength": 1}},
                    *restrictions], "responses": answers({"description": "its text", "content": content(
                        record(img_path=text, ocr_ret=text, confidence=number))}, 400, 404, 413, 415, 422)},
                "post": {"summary": "Reads one image, or several files of a form", "parameters": restrictions,
                         "requestBody": {"required": True, "content": body},
                         "responses": answers({"description": "its text, or theirs in order",
                                               "content": content(readings)}, 400, 413, 415, 422)}},
            "/healthz": {"get": {"summary": "Model, version, counters, latency", "responses": answers(
                {"description": "it is up", "content": content(record(
                    status=text, version=text, model={"type": "object"}, waiting=number, images_read=number,
                    errors=number, latency_ms=record(p50=number, p95=number, p99=number)))})}},
            "/openapi.json": {"get": {"summary": "This description", "responses": answers(
                {"description": "OpenAPI", "content": content({"type": "object"})})}},
            "/": {"get": {"summary": "The page", "responses": answers(
                {"description": "HTML", "content": content(text, "text/html")})}}},
        "components": {"responses": {
            "Error": {"description": "what is wrong", "content": content(record(error=text))}}}}


SAMPLE = """<button class="sample"><img alt="sample {name}" src="data:image/png;base64,{data}"></button>"""
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Captcha reader</title>
<style nonce="$nonce">
  :root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
  body { max-width: 40rem; margin: 0 auto; padding: 1.5rem 1rem }
  h1 { font-size: 1.4rem }
  #drop { display: block; padding: 2rem 1rem; border: 2px dashed GrayText; border-radius: .75rem }
  #drop { text-align: center; cursor: pointer }
  #drop.over, #drop:focus-within { border-color: Highlight }
  #drop input { display: block; margin: .75rem auto 0; max-width: 100% }
  .sample { padding: .25rem; margin: .25rem .5rem .25rem 0; cursor: pointer }
  .sample img { display: block; height: 2.5rem }
  figure { display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; align-items: center; margin: 1rem 0 }
  figure img { max-width: min(256px, 100%); max-height: 8rem; background: #fff; border-radius: .25rem }
  output { font: 600 1.6rem ui-monospace, monospace; letter-spacing: .1em; overflow-wrap: anywhere }
  small { display: block; font: .85rem system-ui, sans-serif; letter-spacing: 0; opacity: .75 }
</style>
<h1>Captcha reader</h1>
<label id="drop">Drop a captcha here, paste one, or choose a file
  <input type="file" accept="image/*" multiple>
</label>
<p>Or try a sample:<br>$samples</p>
<main id="results" aria-live="polite"></main>
<footer><small>Read by $net. <a href="openapi.json">OpenAPI</a> · <a href="healthz">health</a></small></footer>
<noscript>Without JavaScript: <code>curl -F image=@captcha.png …/captchaOcr</code></noscript>
<script nonce="$nonce">
  const drop = document.querySelector("#drop"), input = drop.querySelector("input");

  async function read(blob) {
    const figure = document.createElement("figure"), image = new Image(), output = document.createElement("output");
    const note = document.createElement("small");
    image.src = URL.createObjectURL(blob);
    image.alt = "the image that was read";
    output.textContent = "…";
    figure.append(image, output);
    document.querySelector("#results").prepend(figure);
    const begun = performance.now();
    try {
      const headers = {"Content-Type": blob.type.startsWith("image/") ? blob.type : "image/unknown"};
      const response = await fetch("captchaOcr", {method: "POST", headers, body: blob});
      const answer = await response.json();
      if (!response.ok) throw new Error(answer.error);
      output.textContent = answer.ocr_ret || "(no letter)";
      const milliseconds = Math.round(performance.now() - begun);
      note.textContent = `confidence ${(100 * answer.confidence).toFixed(1)} %, ${milliseconds} ms`;
    } catch (error) {
      output.textContent = "not read";
      note.textContent = error.message;
    }
    output.append(note);
  }

  function readAll(files) { for (const file of files) read(file); }

  input.addEventListener("change", () => { readAll(input.files); input.value = ""; });
  document.addEventListener("paste", event => readAll(event.clipboardData.files));
  for (const name of ["dragover", "dragleave", "drop"]) document.addEventListener(name, event => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop") readAll(event.dataTransfer.files);
  });
  for (const sample of document.querySelectorAll(".sample")) sample.addEventListener("click", () => {
    const bytes = Uint8Array.from(atob(sample.firstChild.src.split(",")[1]), letter => letter.charCodeAt());
    read(new Blob([bytes], {type: "image/png"}));
  });
</script>
</html>
"""


# ---------------------------------------------------------------------- the machine

@functools.cache
def _tensorflow():
    """TensorFlow's graph-and-session API, imported when first needed: it takes seconds, and rendering needs none."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _quiet_stderr():  # no setting stops the lines that it prints while it is loaded
        import tensorflow.compat.v1 as tf
    tf.logging.set_verbosity(tf.logging.FATAL)
    with contextlib.suppress(RuntimeError):  # somebody has used TensorFlow before
        tf.config.threading.set_intra_op_parallelism_threads(1)  # or a tf.function gives every operation all cores
    return tf


@contextlib.contextmanager
def _quiet_stderr():
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _session_config(place=ALONE):
    """One core an operation, as many operations at once as there are cores: see `LstmCtcOcr.logits`.

    Where the processor can, convolutions, their normalisation and all matrix products but BlockLSTM's are done in
    bfloat16: the same accuracy, and cnn_lstm trains in two thirds of the time. Graph and weights stay float32.
    """
    config = _tensorflow().ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=_cores(),
                                       device_filters=place.sees)
    config.graph_options.rewrite_options.auto_mixed_precision_onednn_bfloat16 = int(_has_bfloat16())  # 1: ON
    return config


@functools.cache
def _has_bfloat16():
    """Whether the processor has instructions for it; without them TensorFlow imitates it, at half float32's speed."""
    try:
        return bool(re.search(r"\b(avx512|amx)_bf16\b", Path("/proc/cpuinfo").read_text()))
    except OSError:  # not Linux
        return False


def _join_cluster():
    """Returns this process's place in the cluster that TF_CONFIG describes, its server started; without it, `ALONE`.

    TF_CONFIG is as TensorFlow documents it: {"cluster": {"chief": [address], "worker": [...], "ps": [...]}, "task":
    {"type": ..., "index": ...}}; without a chief, the first worker is it. Raises `LstmCtcOcr.Error` if it is not.
    """
    if not os.environ.get("TF_CONFIG"):
        return ALONE
    tf = _tensorflow()
    try:
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        cluster, job, index = resolver.cluster_spec(), resolver.task_type, int(resolver.task_id or 0)
        tasks = [(job, index) for job in ("chief", "worker", "ps") if job in cluster.jobs
                 for index in cluster.task_indices(job)]
        servers = [task for task in tasks if task[0] == "ps"]
        workers = tasks[:len(tasks) - len(servers)]
        if (job, index) not in tasks or not workers or len(workers) > 1 > len(servers):
            raise ValueError("it must name a chief or worker, a ps if they are several, and a task that is one of them")
        if tasks == workers:
            return ALONE
        with _quiet_stderr():
            server = tf.train.Server(cluster, job, index, config=_session_config())
    except (ValueError, TypeError, AttributeError, KeyError, tf.errors.OpError) as error:
        raise LstmCtcOcr.Error(f"TF_CONFIG: {str(error).splitlines()[0]}") from None
    here, number = f"/job:{job}/task:{index}", workers.index((job, index)) if (job, index) in workers else None
    for each in (signal.SIGINT, signal.SIGTERM):  # who waits for others inside TensorFlow would not hear of one;
        signal.signal(each, signal.SIG_DFL)  # the chief saves first, from when it trains
    return types.SimpleNamespace(
        job=job, index=index, chief=number == 0, number=number, workers=len(workers), servers=len(servers),
        target=server.target, device=tf.train.replica_device_setter(cluster=cluster, worker_device=here),
        sees=["/job:ps", here])


def _is_lost_server(error):
    """Whether an exception says that a parameter server has gone, not that something is wrong."""
    tf = sys.modules.get("tensorflow")
    return tf and isinstance(error, (tf.errors.UnavailableError, tf.errors.AbortedError))


def _finished_queue(server, workers):
    """The queue on a parameter server to which every worker that is done adds an entry."""
    tf = _tensorflow()
    with tf.device(f"/job:ps/task:{server}"):
        return tf.FIFOQueue(workers, tf.bool, shapes=[], shared_name=f"finished_{server}")


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _follow_parent():
    """Makes this process end when its parent has ended, and only then: signals to the whole group are the parent's."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _one_ahead(iterable):
    """Yields from an iterable, computing the next item in another thread meanwhile."""
    iterator, end = iter(iterable), object()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(next, iterator, end)
        while (item := ahead.result()) is not end:
            ahead = pool.submit(next, iterator, end)
            yield item


@contextlib.contextmanager
def _signals_held():
    """Holds Ctrl-C and SIGTERM back until it ends, and for good in the processes that are started meanwhile."""
    hold = getattr(signal, "pthread_sigmask", lambda *_: None)  # Windows has none
    hold(getattr(signal, "SIG_BLOCK", 0), (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        hold(getattr(signal, "SIG_UNBLOCK", 0), (signal.SIGINT, signal.SIGTERM))


@contextlib.contextmanager
def _deferred_stop():
    """Turns Ctrl-C and SIGTERM into an entry of the list that it yields, so that what is under way is finished."""
    caught = []
    before = {number: signal.signal(number, lambda number, _: caught.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------- command line

COMMANDS = {
    "create_dataset": ("render captchas to train on",
                       "dataset im_total_num words words_max_num im_width im_height seed workers shard"),
    "train": ("train on the rendered captchas, or go on from the last checkpoint",
              "dataset model net words words_max_num im_width im_height train_max_num val_num n_hidden batch_size "
              "epoch_max lr save_epoch seed beam_width label_parts ctc"),
    "test": ("read images: one line each", "model net beam_width letters length"),
    "start": ("serve a page, GET /captchaOcr?img_path= and POST /captchaOcr",
              "model net beam_width letters length host port image_root token"),
    "export": ("write a SavedModel for TensorFlow Serving", "model net beam_width"),
}


def _flag(name):
    return "--" + name.replace("_", "-")


def _parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    fields = {field.name: field for field in dataclasses.fields(LstmCtcOcr)}
    for command, (text, names) in COMMANDS.items():
        sub = commands.add_parser(command, help=text, description=text, allow_abbrev=False)
        for field in map(fields.get, names.split()):
            sub.add_argument(_flag(field.name), type=field.type, default=field.default, metavar=field.type.__name__,
                             help=field.metadata["help"] + " (%(default)s)" * (field.default != ""))
        if command == "export":
            sub.add_argument("directory", metavar="DIR", help="a new folder; TensorFlow Serving wants <name>/<number>")
        if command == "test":
            sub.add_argument("paths", nargs="*", metavar="PATH", help="images and folders of images (dataset/test)")
            sub.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object an image")
    return parser


def main(argv=None):
    """Runs one command; returns its exit code (0 done, 1 some images could not be read, 2 wrong use)."""
    settings = vars(_parser().parse_args(argv))
    command = settings.pop("command")
    arguments = {name: settings.pop(name) for name in ("paths", "as_json", "directory") if name in settings}
    try:
        return getattr(LstmCtcOcr(**settings), command)(**arguments) or 0
    except KeyboardInterrupt as stop:
        print("stopped", file=sys.stderr)
        return 128 + (stop.args or [signal.SIGINT])[0]
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (LstmCtcOcr.Error, OSError) as error:
        print(f"lstm_ctc_ocr: {error}", file=sys.stderr)
        return 2


def _interrupt(number, _):
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # it ends a command as Ctrl-C does
    sys.exit(main())
