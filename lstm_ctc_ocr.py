"""Reads captchas of 1 to 10 letters with an LSTM, CTC and a beam search.

    python lstm_ctc_ocr.py create_dataset    renders dataset/train/<i>_<LABEL>.png
    python lstm_ctc_ocr.py train             learns from them, saves to my-model/lstm; run again,
                                             it goes on
    python lstm_ctc_ocr.py train --dataset FOLDER --start-from general
                                             learns from a few labelled images of your own
    python lstm_ctc_ocr.py test [PATH...]    reads images, those of dataset/test by default
    python lstm_ctc_ocr.py start             serves GET /captchaOcr?img_path=..., and a page; with
                                             --label FOLDER also a page to label images on
    python lstm_ctc_ocr.py export PATH       writes a SavedModel, or an ONNX file if PATH ends so

The columns of an image are the time steps of an LSTM. At each step it says which letter it has
just seen, or that it has seen none (the blank). CTC adds up all ways in which these steps can
spell the label, so nobody has to say where in the image a letter stands.

    text "PIY" -> sequence [15, 8, 24] -> sparse tensor --------------------.
    image (B, H, W) -> (convolutions) -> LSTM (T, B, N) -> logits (T, B, C) +-> CTC loss
                                                                            '-> beam search
                                                             text "PIY" <- sequence <-'

Dimensions: B images of a batch, H height, W width, T time steps (W, or W / 4 behind convolutions),
F features of a step, I inputs and N cells of an LSTM, C classes (the letters, the blank last).

Contents of this file:
    settings                            every hyper-parameter and path, declared once
    text, sequences, sparse tensors     "PIY" to [15, 8, 24] to a sparse tensor, and back
    the network                         from an image's ink to logits
    CTC: loss and search                from logits to a loss, or to a text and its confidence;
                                        here ends what the original article is about
    graphs                              the network ready to train, or ready to read
    images                              from a file to ink; the only preprocessing
    rendering captchas                  the command create_dataset
    labels                              which text stands on which image of a folder
    model folders                       what is saved, atomically, and how it is loaded
    training                            the command train
    reading                             the command test, and `recognise` for other programs
    training on several machines        what a cluster adds to train
    service                             the command start
    labelling page                      what --label adds to start
    export                              the command export
Functions that need no settings:
    captchas of every look              images for create_dataset --look varied
    few images, distorted               more variety for a training on few images
    Baidu's Warp-CTC                    another CTC loss
    accuracy                            scores, and how sure they are
    pictures                            the learning curve and the report
    images and files                    names, paths and safe writes
    HTTP                                requests, answers, pages and their description
    the machine                         TensorFlow, cores, processes and signals
    command line                        flags from the settings, exit codes
"""

import argparse
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import csv
import ctypes
import dataclasses
import functools
import gc
import hashlib
import hmac
import importlib
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import random
import re
import secrets
import signal
import socket
import string
import sys
import tempfile
import threading
import time
import types
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until all is imported, Ctrl-C ends the program without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import cv2
import flask
import jinja2
import numpy as np
import waitress
import waitress.buffers
import waitress.channel
import waitress.parser
from PIL import Image, ImageFont, ImageOps, ImageSequence, UnidentifiedImageError
from tqdm import tqdm
from werkzeug.datastructures import Authorization, WWWAuthenticate
from werkzeug.exceptions import HTTPException, ServiceUnavailable, Unauthorized

warnings.filterwarnings("ignore", module=r"PIL\.")  # it warns of odd headers; the image counts

VERSION = "1.0.0"
HOME = Path(__file__).resolve().parent
MODELS = HOME / "my-model"
# The images that are read: each suffix of their files, and Pillow's name of the format. To read
# one more format, add it here.
IMAGE_KINDS = {".png": "PNG", ".apng": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG",
               ".jfif": "JPEG", ".pjpeg": "JPEG", ".pjp": "JPEG", ".gif": "GIF", ".bmp": "BMP",
               ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF", ".avif": "AVIF"}
LABELLED = re.compile(r"(\d+)_(.+)\.\w+")  # <i>_<LABEL>.png
LABELS = "labels.csv"  # the list that the labelling page adds to: relative/path.png,LABEL lines
NO_UTF8 = "[\0\ufffd\ud800-\udfff]"  # what stands in names and texts for bytes that are no UTF-8
CAPITALS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
SIGNS = "+-*×/÷=?"  # of sums such as 3×8=?
MIN_CONTRAST = 16 / 255  # an image of less is blank: its noise must not be stretched to ink

# ---------------------------------------------------------------------- settings

NETWORKS = {
    # convolutions: (channels, size, stride down, stride across, residual blocks behind it) each.
    # projection: features that each time step hands from the convolutions to the LSTM.
    # inks: the last axes of an image: none, or (2,), see `ink_of`.
    # doubt: the confidence up to which an image is read again in other views, unless config.json
    # says otherwise; lstm and cnn_lstm read fewer images right with them.
    "lstm": types.SimpleNamespace(
        about="the article's", convolutions=(), projection=0, inks=(), doubt=0),
    "cnn_lstm": types.SimpleNamespace(
        about="with convolutions in front",
        convolutions=((32, 5, 4, 2, 0), (48, 3, 2, 2, 0), (96, 3, 2, 1, 0), (128, 3, 2, 1, 0)),
        projection=128, inks=(), doubt=0),
    "wide_cnn_lstm": types.SimpleNamespace(
        about="with larger convolutions",
        convolutions=((32, 5, 2, 2, 0), (48, 3, 2, 2, 1), (96, 3, 2, 1, 1), (128, 3, 2, 1, 2)),
        projection=160, inks=(2,), doubt=0.6),
}
ARCHITECTURE = (  # the settings that a model folder fixes
    "net", "n_hidden", "label_parts", "words", "words_max_num", "im_width", "im_height")
PLANNED = (*ARCHITECTURE, "start_from", "seed", "batch_size")  # those that a training fixes
COUNT, COUNT_OR_NONE = range(1, 10 ** 9), range(10 ** 9)  # what numbers of things may be


def setting(default, text, allowed=None, usual=None):
    """Declares a setting once: its default, its flag, the flag's help and the values allowed.

    A default of None means that the value is still open: `LstmCtcOcr.resolve` decides it, and
    takes `usual` if nothing else says which. A float must be above 0.
    """
    metadata = {"help": text, "allowed": allowed, "usual": usual}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class LstmCtcOcr:
    """The whole system; its fields are its settings. Constructing it opens and builds nothing.

    The commands (`create_dataset`, `train`, `test`, `start`, `export`) and `recognise` take the
    settings as they are. A method that builds a network needs every setting, see `resolve`.
    Nothing changes afterwards: one object may render, train, read and serve from any thread.
    """

    # --- the task
    words: str = setting(
        None, "the letters that an image may hold; if not given, in training those of the labels, "
        "in varied captchas a-z, A-Z and 0-9, else", usual=CAPITALS)
    words_max_num: int = setting(
        None, "the most letters in an image; if not given, in training that of the labels, else",
        COUNT, 10)
    im_width: int = setting(
        None, "image width in pixels, and so the LSTM's time steps; if not given, in training "
        "what fits the images, else", COUNT, 256)
    im_height: int = setting(
        None, "image height in pixels, and so the number of inputs of a time step", COUNT, 64)
    # --- the images
    dataset: str = setting(
        str(HOME / "dataset" / "train"), "folder of the training images, to write or to read")
    labels: str = setting(
        "", "where the labels are: LABEL, LABEL_*, *_LABEL or the like for a pattern of the file "
        "names (* is any text); list for labels.csv, labels.txt or <image>.gt.txt; if not given, "
        "the folder is searched for all of these")
    case: str = setting(
        "kept", "kept: labels as they are; lower, upper: all of their letters small, or capitals",
        ("kept", "lower", "upper"))
    look: str = setting(
        "plain", "plain: as the captcha package draws them; varied: in all the ways in which "
        "captchas differ", ("plain", "varied"))
    fonts: str = setting(
        "", "folder of the fonts for varied captchas; if not given, the captcha package's and "
        "the system's are used")
    im_total_num: int = setting(
        100_000, "images to render (100,000 take 0.9 GB on disk)", COUNT)
    workers: int = setting(0, "processes that render; 0: one a core", COUNT_OR_NONE)
    shard: str = setting(
        "1/1", "I/N: render only part I of N, to share the work among N machines")
    val_num: int = setting(
        2000, "the most images to validate on; about so many are held out, or a tenth of a small "
        "folder; 0: train on all", COUNT_OR_NONE)
    # --- the network
    net: str = setting(
        None, "the network: " + "; ".join(f"{name}, {net.about}" for name, net in NETWORKS.items())
        + "; if not given, training takes that of --start-from, and reading that of --model, else",
        NETWORKS, "lstm")
    n_hidden: int = setting(
        None, "LSTM cells; a network that reads in both directions has half of them for each",
        COUNT, 256)
    label_parts: int = setting(
        None, "classes a letter; 3 splits it in left, middle and right, so that no blank has to "
        "stand between equal letters", (1, 3), 1)
    # --- training
    start_from: str = setting(
        None, "a trained model to start from: its folder, or the name of one that ships", usual="")
    ctc: str = setting(
        "tensorflow", "CTC loss: tensorflow, or Baidu's warp (pip install --no-deps paddlepaddle)",
        ("tensorflow", "warp"))
    batch_size: int = setting(32, "images a step", COUNT)
    epoch_max: float = setting(
        None, "passes over the images; 9 of 100,000 take 40 to 50 minutes on 2 cores; with "
        "--start-from about 800 steps, and more for more images; else", usual=9)
    lr: float = setting(
        None, "learning rate at the start; it falls as lr * (1 - (epoch / epoch_max) ** 2); with "
        "--start-from at most 0.001, else", usual=4e-3)
    save_epoch: float = setting(
        None, "epochs between checkpoints; if not given, as many as 100 steps take, at least",
        usual=0.1)
    seed: int = setting(
        0, "fixes all that is random: rendered images, first weights, the order of the images",
        COUNT_OR_NONE)
    # --- reading
    model: str = setting(
        "", "the model: a folder, or one that ships (lstm, cnn_lstm, general); if not given, test "
        "and start read with what was trained last on the usual dataset, or else with general, "
        "and train writes my-model/<net>, for another dataset my-model/<its name>; test and start "
        "take an ONNX file too")
    beam_width: int = setting(
        4, "prefixes that the beam search keeps; with --length, for each length up to the longest",
        range(1, 101))
    letters: str = setting(
        "", "the only letters to read; a letter given in one case is also read for the other; with "
        "= among them only sums are read, such as 7+5=? or 12-4=")
    length: str = setting("", "N or MIN-MAX: the number of letters that every text has")
    host: str = setting("127.0.0.1", "address to serve on")
    port: int = setting(5050, "port to serve on", range(65536))
    image_root: str = setting(
        str(HOME / "dataset"), "only images under this folder can be asked for by path")
    label: str = setting(
        "", "folder of images, subfolders included, to label on the page /label")
    token: str = setting(
        "", "what clients must show, as a bearer token or as HTTP Basic's password; better given "
        "in the environment, as LSTM_CTC_OCR_TOKEN")

    class Error(ValueError):
        """Something that the user can mend; the message is one line that says what to do."""
        status = 422  # of the service's answer

    class TooLarge(Error):
        """An image of too many pixels."""
        status = 413

    class Unknown(Error):
        """A file of a kind that is not served."""
        status = 415

    def __post_init__(self):
        """Raises `Error` for a setting that cannot work. Open ones are checked by `resolve`."""
        for field in dataclasses.fields(self):
            flag, value = _flag(field.name), getattr(self, field.name)
            allowed = field.metadata["allowed"]
            if field.type is float and value is not None and not 0 < value < math.inf:
                raise self.Error(f"{flag} must be above 0 and finite, not {value}")
            if allowed and value is not None and value not in allowed:
                if isinstance(allowed, range):  # too long to be listed
                    said = f"{allowed[0]} to {allowed[-1]:,}"
                else:
                    said = "one of " + ", ".join(map(str, allowed))
                raise self.Error(f"{flag} must be {said}, not {value}")
        if self.words is not None and (not self.words or len(set(self.words)) != len(self.words)):
            raise self.Error(
                f"--words needs at least one letter and each of them once, not {self.words!r}")
        if self.labels not in ("", "list") and self.labels.count("LABEL") != 1:
            raise self.Error(
                "--labels must be list, or hold LABEL once, such as '*_LABEL', not "
                f"{self.labels!r}")

    def resolve(self, *sources):
        """Returns these settings with a value for each one that is open, that is None.

        sources: dictionaries of settings. The first that holds an open setting gives its value,
        even if it is None; if none does, the field's `usual` value is taken. Raises `Error` if
        the longest text does not fit the time steps.
        """
        fields = dataclasses.fields(self)
        known = collections.ChainMap(*sources, {f.name: f.metadata["usual"] for f in fields})
        ocr = dataclasses.replace(self, **{
            f.name: known[f.name] for f in fields if getattr(self, f.name) is None})
        if ocr._least_steps > ocr.steps:
            raise self.Error(
                f"CTC cannot align {ocr.words_max_num} letters, {ocr._least_steps} steps, in "
                f"{ocr.steps}: lower --words-max-num, or widen --im-width")
        return ocr

    @property
    def steps(self):
        """Time steps T that the network makes of an image of full width W."""
        return -(-self.im_width // self._stride)

    @property
    def _least_steps(self):
        """Time steps that the longest text may need, with blanks between equal neighbours."""
        return max(self.label_parts * self.words_max_num, 2 * self.words_max_num - 1)

    @property
    def _stride(self):
        """Columns of an image that make one time step."""
        return math.prod(across for _, _, _, across, _ in NETWORKS[self.net].convolutions)

    # -------------------------------------------------------------- text, sequences, sparse tensors

    def text_to_sequence(self, text):
        """Returns the classes of a text from left to right, `label_parts` of them a letter.

        Raises `Error` for a letter that is not in `words`.
        """
        try:
            return [self._class_of[letter] * self.label_parts + part
                    for letter in turned(text) for part in range(self.label_parts)]
        except KeyError as error:
            raise self.Error(
                f"{text!r} holds {error}, which is not in --words {self.words}") from None

    def sequence_to_text(self, sequence, words=None):
        """Undoes `text_to_sequence`. Of three parts, a letter needs two, in their order.

        words: the letters that the classes stand for, if not `self.words`.
        """
        words, parts = words or self.words, self.label_parts
        text, last, seen = "", -1, 0
        for number in sequence:
            seen = seen + 1 if number > last and number // parts == last // parts else 1
            if seen == parts // 2 + 1:
                text += words[number // parts]
            last = number
        return turned(text)

    @functools.cached_property
    def _class_of(self):
        return {letter: number for number, letter in enumerate(self.words)}

    @staticmethod
    def sequences_to_sparse(sequences):
        """Returns B sequences as the three parts of a sparse tensor, as `tf.SparseTensorValue` has.

        They are indices (n, 2) int64, values (n,) int32 and dense_shape (2,) int64, for n letters
        in all; dense_shape is (B, length of the longest).
        """
        lengths = [len(sequence) for sequence in sequences]
        indices = [(row, column) for row, length in enumerate(lengths) for column in range(length)]
        return (np.array(indices, np.int64).reshape(-1, 2),
                np.array([number for sequence in sequences for number in sequence], np.int32),
                np.array([len(sequences), max(lengths, default=0)], np.int64))

    @staticmethod
    def sparse_to_sequences(sparse):
        """Undoes `sequences_to_sparse`: returns dense_shape[0] sequences, empty ones included."""
        indices, values, dense_shape = sparse
        sequences = [[] for _ in range(dense_shape[0])]
        for (row, _), value in zip(indices, values):
            sequences[row].append(int(value))
        return sequences

    # ------------------------------------------------------------------ the network

    MIN_PART = 8  # images: from fewer, batch normalisation would take too rough statistics

    def logits(self, images, training=False):
        """Runs the network: the one forward pass, for training and for reading.

        Images (B, H, W) or (B, H, W, 2) uint8, see `ink_of`, become (T, B, C) float32: a class for
        each letter (or part of one), the blank last.
        A batch of known size is split into parts, at most one a core: one time step's matrix
        product is too small to be shared by cores; one part a core is 1.5 times as fast.
        """
        tf, size = _tensorflow(), images.shape[0] or 1
        most = min(_cores(), size // self.MIN_PART)
        count = max((n for n in range(1, most + 1) if size % n == 0), default=1)
        with tf.variable_scope("", reuse=tf.AUTO_REUSE):
            parts = tf.split(images, count)
            return tf.concat([self._logits(part, training) for part in parts], axis=1)

    def _logits(self, images, training):
        tf, network = _tensorflow(), NETWORKS[self.net]
        ink = tf.cast(images, tf.float32) * (3 / 255)
        if network.convolutions:
            x = self.convolutions(ink, training)  # (T, B, F)
            x = tf.nn.relu(self.dense(x, network.projection, "projection"))
            forward = self.lstm(x, "forward")
            backward = tf.reverse(self.lstm(tf.reverse(x, [0]), "backward"), [0])
            x = tf.concat([forward, backward], axis=2)
        else:
            x = self.lstm(tf.transpose(ink, [2, 0, 1]))  # the columns are the steps: (W, B, H)
        return self.dense(x, len(self.words) * self.label_parts + 1)  # (T, B, N) -> (T, B, C)

    def convolutions(self, ink, training):
        """Computes features of an image's columns: ink (B, H, W) or (B, H, W, 2) -> (T, B, F).

        T is W over all strides across, F the channels at all heights that are left.
        """
        tf = _tensorflow()
        x = ink if NETWORKS[self.net].inks else ink[..., None]  # (B, H, W, 1 or 2)
        layers = NETWORKS[self.net].convolutions
        for number, (channels, size, down, across, blocks) in enumerate(layers, 1):
            name = f"convolution{number}"
            x = tf.nn.relu(self.convolution(x, training, name, channels, size, down, across))
            for block in range(1, blocks + 1):  # residual (He et al., 2015, arXiv:1512.03385)
                y = self.convolution(x, training, f"{name}/residual{block}a", channels)
                y = self.convolution(tf.nn.relu(y), training, f"{name}/residual{block}b", channels)
                x = tf.nn.relu(x + y)
        x = tf.transpose(x, [2, 0, 1, 3])  # (T, B, height, channels)
        return tf.reshape(x, tf.concat([tf.shape(x)[:2], [x.shape[2] * x.shape[3]]], axis=0))

    NORM_EPSILON = 1e-3  # added to the variance
    STATISTICS = "statistics"  # the graph's collection of (mean or variance, its value in a batch)

    def convolution(self, x, training, name, channels, size=3, down=1, across=1):
        """Convolves and normalises x (B, h, w, I): (B, h / down, w / across, channels).

        Batch normalisation (Ioffe and Szegedy, 2015, arXiv:1502.03167) scales each channel. In
        training, mean and variance are those of this part, and variables keep them. In reading,
        the moving averages of these variables become part of the kernel and of a bias.
        """
        tf, strides = _tensorflow(), [1, down, across, 1]
        ones, zeros = tf.ones_initializer(), tf.zeros_initializer()
        with tf.variable_scope(name):
            kernel = tf.get_variable("kernel", [size, size, x.shape[3], channels])
            scale = tf.get_variable("scale", channels, initializer=ones)
            offset = tf.get_variable("offset", channels, initializer=zeros)
            mean = tf.get_variable("mean", channels, initializer=zeros, trainable=False)
            variance = tf.get_variable("variance", channels, initializer=ones, trainable=False)
        if not training:
            scale = scale * tf.math.rsqrt(variance + self.NORM_EPSILON)
            x = tf.nn.conv2d(x, kernel * scale, strides, "SAME")
            return tf.nn.bias_add(x, offset - mean * scale)
        x, *batch = tf.nn.fused_batch_norm(
            tf.nn.conv2d(x, kernel, strides, "SAME"), scale, offset, epsilon=self.NORM_EPSILON)
        tf.get_collection_ref(self.STATISTICS).extend(zip((mean, variance), batch))
        return x

    def dense(self, x, units, name="dense"):
        """Projects every time step in the same way: (T, B, N) -> (T, B, units)."""
        kernel, bias = self._weights(name, x.shape[2], units)
        return _tensorflow().einsum("tbn,nc->tbc", x, kernel) + bias

    def lstm(self, x, name="lstm"):
        """Runs one LSTM layer over time: x (T, B, I) float32 -> outputs (T, B, N)."""
        cells = self.n_hidden // (2 if NETWORKS[self.net].convolutions else 1)
        return self._lstm_layer()(x, *self._weights(name, x.shape[2] + cells, 4 * cells))

    @staticmethod
    def _weights(name, inputs, outputs):
        """Returns the variables kernel (inputs, outputs) and bias (outputs,) of a layer."""
        tf = _tensorflow()
        with tf.variable_scope(name):
            return (tf.get_variable("kernel", [inputs, outputs]),
                    tf.get_variable("bias", [outputs], initializer=tf.zeros_initializer()))

    @staticmethod
    def _lstm_layer():
        """Returns the function (x (T, B, I), kernel (I + N, 4 N), bias (4 N,)) -> (T, B, N).

        Forward it is TensorFlow's BlockLSTM (Zaremba et al., 2014, arXiv:1409.2329, without
        peepholes), whose gates are ordered input, cell, forget, output. The gradient is our own:
        only what must go back step by step does so, in one loop that XLA compiles. The gradients
        of the weights are then single matrix products over all steps.
        """
        tf = _tensorflow()
        backward = tf.function(LstmCtcOcr._lstm_backward, jit_compile=True, autograph=False)

        @tf.custom_gradient
        def layer(x, kernel, bias):
            inputs, cells = x.shape[2], bias.shape[0] // 4
            zero, none = tf.zeros([tf.shape(x)[1], cells]), tf.zeros([cells])
            i, cs, f, o, ci, co, h = tf.raw_ops.BlockLSTM(
                seq_len_max=tf.shape(x, out_type=tf.int64)[0], x=x, cs_prev=zero, h_prev=zero,
                w=kernel, wci=none, wcf=none, wco=none, b=bias, forget_bias=1.0,
                cell_clip=-1.0)  # by default it would clip the cell at 3

            def gradient(d_outputs):
                # Transposed once, here: to do it in every step takes a fifth longer.
                recurrent = tf.transpose(kernel[inputs:])
                d_gates = backward(d_outputs, recurrent, i, cs, f, o, ci, co)
                h_prev = tf.concat([tf.zeros_like(h[:1]), h[:-1]], axis=0)
                d_flat = tf.reshape(d_gates, [-1, 4 * cells])  # (T * B, 4 N)
                x_and_h = tf.reshape(tf.concat([x, h_prev], axis=2), [-1, inputs + cells])
                # TensorFlow leaves this out where nobody needs it, as for an image.
                d_x = tf.einsum("tbg,ig->tbi", d_gates, kernel[:inputs])
                d_kernel = tf.matmul(x_and_h, d_flat, transpose_a=True)
                # The sum over all rows, which is faster as a product.
                d_bias = tf.matmul(tf.ones([1, tf.shape(d_flat)[0]]), d_flat)[0]
                return d_x, d_kernel, d_bias

            return h, gradient

        return layer

    @staticmethod
    def _lstm_backward(d_outputs, recurrent, i, cs, f, o, ci, co):
        """Returns the gradient at the gates, before their activations: (T, B, 4 N).

        It goes back in time over d_outputs, gates and cells, each (T, B, N). recurrent (4 N, N)
        is the part of the kernel that the outputs before are multiplied with, transposed.
        """
        tf = _tensorflow()
        steps, batch, cells = d_outputs.shape
        cs_prev = tf.concat([tf.zeros_like(cs[:1]), cs[:-1]], axis=0)

        def step(t, d_h, d_cs, d_gates):
            d_h += d_outputs[t]
            d_cs += d_h * o[t] * (1 - co[t] ** 2)
            d_gate = tf.concat([
                d_cs * ci[t] * i[t] * (1 - i[t]),  # input
                d_cs * i[t] * (1 - ci[t] ** 2),  # cell
                d_cs * cs_prev[t] * f[t] * (1 - f[t]),  # forget
                d_h * co[t] * o[t] * (1 - o[t])], axis=1)  # output
            return t - 1, tf.matmul(d_gate, recurrent), d_cs * f[t], d_gates.write(t, d_gate)

        zero = tf.zeros_like(d_outputs[0])
        d_gates = tf.TensorArray(tf.float32, size=steps, element_shape=[batch, 4 * cells])
        start = (steps - 1, zero, zero, d_gates)
        return tf.while_loop(lambda t, *_: t >= 0, step, start)[-1].stack()

    # ------------------------------------------------------------------ CTC: loss and search

    def ctc_loss(self, sequences, logits):
        """Returns the CTC loss of each image (Graves et al., 2006), (B,) float32.

        sequences: (B, .) sparse int32; logits: (T, B, C) float32, blank last.
        """
        tf = _tensorflow()
        steps, batch = tf.unstack(tf.shape(logits)[:2])
        if self.ctc == "tensorflow":
            return tf.nn.ctc_loss(sequences, logits, tf.fill([batch], steps))
        _warp_library()  # now, so that a missing library is noticed before the training begins
        lengths = tf.math.bincount(tf.cast(sequences.indices[:, 0], tf.int32), minlength=batch)

        @tf.custom_gradient
        def warp(logits):
            losses, d_logits = tf.numpy_function(
                _warp_ctc, [logits, sequences.values, lengths], [tf.float32] * 2)
            losses.set_shape([logits.shape[1]])
            d_logits.set_shape(logits.shape)
            return losses, lambda d_losses: d_losses[:, None] * d_logits

        return warp(logits)

    def decode(self, logits):
        """Decodes logits (T, B, C), blank last, by TensorFlow's beam search, as in the article.

        Validation and the SavedModel use it, because it runs inside the graph. Reading uses
        `texts`, whose search knows restrictions and gives exact probabilities. Returns the texts as
        a sparse tensor (B, .) int64, and the logarithms of their probabilities, (B,) float32. A
        probability is the sum over the alignments that the beam has kept: with a wide enough beam,
        it is exp(-CTC loss).
        """
        tf = _tensorflow()
        steps, batch = tf.unstack(tf.shape(logits)[:2])
        # merge_repeated=True would read AAA as A.
        (sparse,), log_probability = tf.nn.ctc_beam_search_decoder(
            logits, tf.fill([batch], steps), self.beam_width, top_paths=1, merge_repeated=False)
        return sparse, log_probability[:, 0]

    @staticmethod
    def softmax(logits):
        """Turns logits (T, B, C) into probabilities (T, B, C) float64."""
        p = np.exp(logits - logits.max(axis=2, keepdims=True), dtype=np.float64)
        return p / p.sum(axis=2, keepdims=True)

    @staticmethod
    def greedy(p):
        """Takes the best class of each step, merges repeats, then drops blanks.

        p: (T, B, C), blank last. Returns B sequences.
        """
        best = p.argmax(axis=2)  # (T, B)
        kept = best < p.shape[2] - 1
        kept[1:] &= best[1:] != best[:-1]
        return [classes[here].tolist() for classes, here in zip(best.T, kept.T)]

    @staticmethod
    def sequence_probabilities(sequences, p):
        """Returns the exact probability of each sequence, the sum over all its alignments.

        sequences: n; p: (T, n, C), blank last. Returns (n,) float64. This is the forward recursion
        of Graves et al. (2006), section 4.1. It needs no logarithms: float64
        underflows only below 1e-300.
        """
        blank, image = p.shape[2] - 1, np.arange(len(sequences))
        lengths = np.array([len(sequence) for sequence in sequences], int)
        states = np.full((len(sequences), 2 * lengths.max(initial=0) + 1), blank)  # (n, S)
        for row, sequence in zip(states, sequences):
            row[1:2 * len(sequence):2] = sequence  # with a blank before and after each class
        skips = np.zeros(states.shape)  # 1 where a path may leave out the blank before the state
        skips[:, 2:] = (states[:, 2:] != blank) & (states[:, 2:] != states[:, :-2])
        emitted = p[:, image[:, None], states]  # (T, n, S)
        paths = np.zeros((len(sequences), states.shape[1] + 2))  # two columns of zeros come first
        two_before, one_before, own = paths[:, :-2], paths[:, 1:-1], paths[:, 2:]
        own[:, :2] = emitted[0, :, :2]
        for step in emitted[1:]:
            own[:] = (two_before * skips + one_before + own) * step
        return np.minimum(1, own[image, 2 * lengths] + paths[image, 2 * lengths + 1])

    def _search(self, p, longest=0):
        """Finds the likeliest sequences by CTC's prefix beam search.

        p: (T, C), blank last. Returns `beam_width` sequences. Where `longest` is given, it returns
        that many for each number of letters up to `longest`, and for each part of a letter that a
        sequence may end with, however unlikely they are: only such prefixes compete with one
        another. The source is Hannun et al. (2014), arXiv:1408.2873.
        """
        # Neighbouring steps often are sure of the same class, mostly the blank. The second of them
        # changes next to nothing. All such are left out, if the longest text still has room.
        sure = p > 0.999
        repeats = np.append(False, (sure[1:] & sure[:-1]).any(axis=1))
        if (~repeats).sum() >= 2 * longest * self.label_parts:
            p = p[~repeats]
        # To extend a prefix, W + 1 classes are enough for a beam of W. A less likely class would
        # have to beat W of them. (One of the W + 1 may be weak: to repeat the prefix's last class
        # needs a blank.)
        likely = np.argsort(-p[:, :-1], axis=1)[:, :self.beam_width + 1]

        @functools.cache
        def group_of(prefix):
            letters = len(self.sequence_to_text(prefix))
            ending = prefix and prefix[-1] % self.label_parts
            return (letters, ending) if letters <= longest else "too long"

        beam = {(): (1, 0)}  # see `_extended`
        for step, classes in zip(p.tolist(), likely.tolist()):
            extended = self._extended(beam, step, classes)
            beam, places = {}, collections.Counter({"too long": self.beam_width})
            for prefix in sorted(extended, key=lambda prefix: -sum(extended[prefix])):
                places[group := longest and group_of(prefix)] += 1
                if places[group] <= self.beam_width:
                    beam[prefix] = extended[prefix]
        return [list(prefix) for prefix in beam]

    def _extended(self, beam, step, classes):
        """Extends a beam by one time step: each prefix stays, and is continued by each class.

        beam: {prefix: (probability of its paths that end with a blank, that of its paths that end
        with its last class)}; step: the C probabilities, blank last. Returns the same for all
        prefixes.
        """
        extended = collections.defaultdict(lambda: [0, 0])
        for prefix, (blank, letter) in beam.items():
            last, own = prefix[-1:], extended[prefix]
            own[0] = (blank + letter) * step[-1]
            for c in last:
                own[1] += letter * step[c]
            # The class that follows the last one is always tried: so each letter can get all its
            # parts, and is followed by another letter's.
            for c in {*classes, *((c + 1) % (len(step) - 1) for c in last)}:
                # It may be in the beam too: then both are added.
                extended[*prefix, c][1] += step[c] * (blank if c in last else blank + letter)
        return extended

    def _most_probable(self, p, fits, longest, enough=0.5):
        """Returns the most probable sequence of each image and its probability, B pairs.

        p: (T, B, C), blank last; fits(sequence) says which sequences may be answered; longest: see
        `_search`. The probabilities are exact, and so mean the same however a sequence was found.
        First the best class of each step is tried. If these spell a sequence that has more than
        half of the probability, there can be none that is more probable, and no search is needed.
        enough: above this probability, no search is made.
        """
        sequences = self.greedy(p)
        found = list(zip(sequences, self.sequence_probabilities(sequences, p).tolist()))
        for b, (sequence, probability) in enumerate(found):
            if probability <= enough or not fits(sequence):
                candidates = [sequence, *self._search(p[:, b], longest)]
                found[b], = self._likeliest([list(filter(fits, candidates))], [p[:, [b]]])
        return found

    def _likeliest(self, candidates, seen):
        """Chooses the candidate that is most probable on average over some views of the image.

        candidates: a list of sequences for each of B images; seen: (T, B, C) for each view.
        Returns B pairs (sequence, average), ([], 0) where there is no candidate.
        """
        rows = [b for b, sequences in enumerate(candidates) for _ in sequences]
        sequences = sum(candidates, [])
        averages = iter(np.mean([self.sequence_probabilities(sequences, p[:, rows]) for p in seen],
                                axis=0).tolist())
        return [max(zip(each, averages), key=lambda pair: pair[1], default=([], 0))
                for each in candidates]

    @dataclasses.dataclass(frozen=True)
    class Restriction:
        """What is known of a text before it is read."""
        letters: str = ""  # the only letters that the text can hold; "": all that the model knows
        length: str = ""  # "N" or "MIN-MAX": how many letters the text has; "": any number

        def __str__(self):
            return (f"{self.length or 'any number of'} letters, "
                    f"of {self.letters or 'all that it knows'}")

    def restrict(self, letters="", length=""):
        """Makes a `Restriction` for `texts`; raises `Error` if this model cannot read such texts.

        What is not given is that of the settings. A letter of which only one case is among
        `letters` is read in either case.
        """
        letters, length = "".join(dict.fromkeys(letters or self.letters)), length or self.length
        for letter in letters:
            if letter not in self._read_as(letters):
                raise self.Error(f"letters: this model does not know {letter!r}, it knows "
                                 f"{self.words}")
        self._bounds(length)
        return self.Restriction(letters, length)

    def _read_as(self, letters):
        """Returns for each of `words` the letter of `letters` that it is read as, or another."""
        return [word if word in letters else word.swapcase() for word in self.words]

    def _bounds(self, length):
        """Returns the least and the most letters that a restriction's length allows."""
        if not length:
            return 0, math.inf
        match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", length, re.ASCII)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= low <= high <= self.words_max_num:  # these fit, see `resolve`
            raise self.Error(f"length must be N or MIN-MAX, from 1 to this model's "
                             f"{self.words_max_num}, not {length!r}")
        return low, high

    SUM = "[0-9]+[-+*×/÷][0-9]+=[?]?"  # what is read if the letters that are allowed hold "="

    def texts(self, logits, restriction=Restriction(), views=()):
        """Decodes logits (T, B, C), blank last, into B pairs (text, confidence).

        The confidence is the probability that the network gives to the text (with --label-parts, to
        the sequence of parts): exp(-CTC loss). A restriction does not raise it: the confidence is
        low where the image holds something else.

        views: pairs (doubt, function of rows (n,) that returns the logits (T', n, C) of another
        view of these images). A view is tried for images whose confidence is at most its doubt. It
        proposes the text that its best classes spell or, if that does not fit, the most probable.
        The image gets the proposal that is most probable on average over the views so far, and this
        average is the confidence.
        """
        words, (low, high) = restriction.letters or self.words, self._bounds(restriction.length)
        sums = "=" in restriction.letters

        def fits(sequence):
            text = self.sequence_to_text(sequence, words)
            return low <= len(text) <= high and (not sums or re.fullmatch(self.SUM, text))

        def probabilities(logits):
            p = self.softmax(logits)
            return p @ self._folds(words) if restriction.letters else p

        longest = min(high, self.words_max_num) if restriction.length or sums else 0
        found = self._most_probable(p := probabilities(logits), fits, longest)
        rows, seen, proposed = np.arange(len(found)), [p], [[sequence] for sequence, _ in found]
        for doubt, view in views:
            doubtful = [found[b][1] <= doubt for b in rows]
            if not any(doubtful):
                break
            rows, seen = rows[doubtful], [p[:, doubtful] for p in seen]
            seen.append(p := probabilities(view(rows)))
            for b, (sequence, _) in zip(rows, self._most_probable(p, fits, longest, enough=0)):
                proposed[b].append(sequence)
            for b, best in zip(rows, self._likeliest([proposed[b] for b in rows], seen)):
                found[b] = best
        return [(self.sequence_to_text(sequence, words), confidence)
                for sequence, confidence in found]

    def _folds(self, letters):
        """Returns the matrix (C, C') that adds up the classes that are read as the same letter.

        C' are the classes of `letters`; what can be read as none of these is dropped.
        """
        same = [[read == letter for letter in letters] for read in self._read_as(letters)]
        folds = np.pad(np.kron(same, np.eye(self.label_parts)), (0, 1))
        folds[-1, -1] = 1  # the blank
        return folds

    # ------------------------------------------------------------------ graphs

    @dataclasses.dataclass(frozen=True)
    class _Net:
        """The tensors and operations of a network in its graph."""
        images: object  # (B, H, W) or (B, H, W, 2) uint8
        logits: object  # (T, B, C) float32
        sparse: object  # the texts that are read, sparse (B, .) int64
        confidence: object  # (B,) float32
        # Only in training:
        sequences: object = None  # the labels, sparse (B, .) int32
        losses: object = None  # (B,) float32, of what is read
        loss: object = None  # () float32, of what is trained
        gradient_norm: object = None  # () float32, before clipping
        train: object = None  # runs a step and returns its number
        step: object = None  # () int64
        saver: object = None  # writes all variables; it removes no checkpoint
        # Only on several machines:
        replicas: object = None  # the optimizer that averages the workers' gradients
        plan: object = None  # () string, the settings of the chief
        finished: tuple = ()  # for each parameter server, the operation that says: I am done

    def _build_input(self, batch_size=None):
        """Returns the placeholder of the images; without a batch size, B and W may be anything."""
        tf = _tensorflow()
        tf.set_random_seed(self.seed)
        height, width, *inks = self._shape
        shape = [batch_size, height, width if batch_size else None, *inks]
        return tf.placeholder(tf.uint8, shape, "images")

    def _build_reading(self, images, temperature=1):
        """Builds the way from images to texts; returns a `_Net`.

        temperature: divides the logits, so that the confidence is the share of readings that are
        right (Guo et al., 2017, arXiv:1706.04599).
        """
        logits = self.logits(images) / temperature
        sparse, log_probability = self.decode(logits)
        return self._Net(images, logits, sparse, _tensorflow().exp(log_probability))

    MAX_GRADIENT_NORM = 1.0  # of all gradients together: one hard image must not spoil the weights
    AVERAGE_DECAY = 0.998  # a step: the moving averages look back over about 500 steps

    def _build_training(self, steps_per_epoch, place):
        """Builds a training step, and reading with the moving averages of the weights.

        The averages read better than the weights of the moment while the learning rate is high
        (Polyak and Juditsky, 1992): after 236,000 images 88 % of 1,984 texts instead of 82 %.
        """
        tf = _tensorflow()
        images = self._build_input(self.batch_size)
        sequences = tf.sparse_placeholder(tf.int32, [self.batch_size, None], "sequences")
        step = tf.train.get_or_create_global_step()
        logits = self.logits(images, training=True)
        loss = tf.reduce_mean(self.ctc_loss(sequences, logits))
        variables = tf.trainable_variables()
        gradients, norm = tf.clip_by_global_norm(
            tf.gradients(loss, variables), self.MAX_GRADIENT_NORM)
        # Each part of the batch has its own statistics; those of the last part are kept.
        statistics = {variable.name: (variable, value)
                      for variable, value in tf.get_collection(self.STATISTICS)}.values()
        averages = tf.train.ExponentialMovingAverage(self.AVERAGE_DECAY, num_updates=step)
        averaged = variables + [variable for variable, _ in statistics]
        epoch = tf.cast(step, tf.float32) / steps_per_epoch
        optimizer = tf.train.AdamOptimizer(self._learning_rate(epoch))
        together = {}
        if place.servers:  # the chief averages and applies the gradients of all workers
            optimizer = tf.train.SyncReplicasOptimizer(
                optimizer, place.workers, variable_averages=averages, variables_to_average=averaged)
            together = self._build_agreement(place, optimizer)
        train = optimizer.apply_gradients(zip(gradients, variables), global_step=step)
        train = tf.group(train, *[tf.assign(*pair) for pair in statistics])
        if not place.servers:
            with tf.control_dependencies([train]):
                train = averages.apply(averaged)
        with tf.control_dependencies([train]):
            train = step.read_value()

        def average(getter, *args, **kwargs):
            return averages.average(getter(*args, **kwargs))

        with tf.variable_scope("", reuse=True, custom_getter=average):
            net = self._build_reading(images)
        return dataclasses.replace(
            net, sequences=sequences, losses=self.ctc_loss(sequences, net.logits), loss=loss,
            gradient_norm=norm, train=train, step=step, **together,
            saver=tf.train.Saver(max_to_keep=0, save_relative_paths=True))

    def _start_weights(self):
        """Returns the weights {name: array} of the model `start_from`, for the letters of this one.

        A letter that it does not know gets the classes of its other case. If it does not know
        that either, the letter gets the mean of all letters' weights.
        """
        _, config, weights = self._load_model(_model_folder(self.start_from))
        words = config["words"]
        places = [words.find(letter if letter in words else letter.swapcase())
                  for letter in self.words]  # -1 where there is none: there, the mean is put
        for name in ("dense/kernel", "dense/bias"):
            letters, blank = np.split(weights[name], [-1], axis=-1)
            letters = np.stack(np.split(letters, len(words), axis=-1))  # (letters, ..., parts)
            known = np.concatenate([letters, letters.mean(axis=0, keepdims=True)])
            weights[name] = np.concatenate([*known[places], blank], axis=-1)
        return weights

    def _learning_rate(self, epoch):
        """The article's decay, at every step rather than once an epoch."""
        return self.lr * (1 - (epoch / self.epoch_max) ** 2)

    # ------------------------------------------------------------------ images

    def load_image(self, source):
        """Loads an image as the network sees it. This is the only preprocessing there is.

        source: a path, or the bytes of an image file of one of `IMAGE_KINDS`; images of any size,
        mode and depth are read. Returns (H, W, ...) uint8, see `ink_of`. Raises `Error`, which
        names the file and the fault.
        """
        return self.ink_of(self.load_colours(source))

    MAX_PIXELS = 4_000_000  # a file of a few bytes can unpack to gigabytes

    def load_colours(self, source):
        """Decodes an image and scales it to the network's height.

        source: as for `load_image`. Returns (H, w, 1 or 3) float32, grey or RGB from 0 (black) to
        1 (white). An image that would be wider than W is squeezed into W. An animation counts as
        the mean of its frames. Raises `Error`, which names the file and the fault.
        """
        whole = isinstance(source, bytes)
        name = "the image" if whole else _on_one_line(source)
        try:
            # To read a pipe may wait for ever, but /dev/stdin is one that the user names.
            if not whole and Path(source).is_fifo() and not str(source).startswith("/dev/"):
                raise OSError(0, "a pipe, not a file")
            file = io.BytesIO(source) if whole else source
            with Image.open(file, formats=[*IMAGE_KINDS.values()]) as image:
                if math.prod(image.size) > self.MAX_PIXELS:  # as the header says; not decoded yet
                    raise Image.DecompressionBombError
                colours = self._without_bars(self._colours_of_frames(image))
        except Image.DecompressionBombError:
            raise self.TooLarge(f"{name}: more than {self.MAX_PIXELS:,} pixels") from None
        except UnidentifiedImageError:
            raise self.Unknown(f"{name}: not a whole image ({' '.join(IMAGE_KINDS)})") from None
        except Exception as error:  # a damaged file can fail in many ways
            reason = getattr(error, "strerror", None)  # if it cannot even be opened
            reason = reason or f"not a whole image ({_on_one_line(error)})"
            raise self.Error(f"{name}: {reason}") from None
        height, width, _ = colours.shape
        fitted = max(1, round(width * self.im_height / height))
        size = min(self.im_width, fitted), self.im_height
        method = cv2.INTER_AREA if height > self.im_height else cv2.INTER_LINEAR
        if (width, height) != size:
            colours = np.atleast_3d(cv2.resize(colours, size, interpolation=method))
        return colours

    def _colours_of_frames(self, image):
        """Decodes a file that Pillow has opened: (h, w, 1 or 3), as `_colours_of`.

        An animation gives the mean of its frames: a letter that some of them lack can be read, and
        noise that moves gets weak. Of a long one only the first frames count, about 200 of 200 x 50
        pixels.
        """
        if image.format in ("TIFF", "MPO") or not getattr(image, "is_animated", False):
            return self._colours_of(image)  # several pages are no animation
        most = 1 + self.MAX_PIXELS // (10_000 + math.prod(image.size))
        frames = [frame.copy() for frame in itertools.islice(ImageSequence.Iterator(image), most)]
        return sum(map(self._colours_of, frames)) / len(frames)

    @staticmethod
    def _colours_of(image):
        """Decodes a Pillow image to its colours, (h, w, 1 or 3) float32 from 0 to 1.

        It is turned as its EXIF data say, and as browsers show it. What is transparent is white, or
        black if on white nothing were dark; if all is transparent, that says nothing. In an image
        of 16 or 32 bits a pixel the largest number is white, and 0 and less are black.
        """
        image.load()
        if "exif" in image.info:
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith(("I", "F")):
            grey = np.nan_to_num(np.float32(image).clip(0), posinf=0)
            return np.atleast_3d(grey / max(grey.max(), 1e-9))
        if image.has_transparency_data and (image := image.convert("RGBA")).getbbox():
            for paper in "white", "black":
                seen = Image.alpha_composite(Image.new("RGBA", image.size, paper), image)
                if seen.convert("L").getextrema()[0] < 200:
                    break
            image = seen
        if image.mode not in ("L", "RGB"):
            image = image.convert("RGB")
        colours = np.atleast_3d(np.float32(image))
        colours /= 255  # in place: to make a further array takes as long as to decode the image
        return colours

    @staticmethod
    def _without_bars(colours):
        """Cuts off what has one colour around a picture of another paper: (h', w', channels).

        colours: (h, w, channels). Letters leave their paper between them: what lies around them is
        no bar if at a side of the rest its colour goes on inward. Bars at the left and right alone
        stay, for they may be strokes of letters that fill the height. A picture that is not wider
        than high stays too, for it may be a letter.
        """
        for _ in range(2):  # from the first row's colour, then from the last one's
            def like_bar(rows, near=0.2):
                return cv2.inRange(rows, colours[0, 0] - near, colours[0, 0] + near)

            # Most images end here: half of their middle row has the colour of the first row.
            some = colours[:, ::8]  # every eighth column tells the same, and faster
            if cv2.mean(like_bar(some[len(some) // 2][None]))[0] < 127:
                _, top, _, rows = cv2.boundingRect(~like_bar(some, 0.1))
                if rows < len(some) and like_bar(some[top:top + 4]).mean() < 100:
                    x, y, width, height = cv2.boundingRect(~like_bar(colours, 0.1))
                    rest = colours[y:y + height, x:x + width]
                    sides = (np.rot90(rest, turn)[:4] for turn in range(4))
                    # At least 97 of 100 lines from a side inward soon leave the bar's colour.
                    if width > height and all(like_bar(s).min(axis=0).mean() < 8 for s in sides):
                        colours = rest
            colours = colours[::-1]
        return colours

    def ink_of(self, colours):
        """Measures how far each pixel's colour is from that of the paper.

        colours: (H, w, 1 or 3) float32, as `load_colours` gives them.
        Returns the ink, (H, W) uint8: 0 for the paper, and 255 for the strongest stroke, or less
        if the contrast is below `MIN_CONTRAST`. A narrower image gets paper on its right.

        A network of two inks gets (H, W, 2): all ink, and the ink without clutter.
        """
        paper = self._paper_of(colours)[:, None, None]
        away = np.subtract(colours.transpose(2, 0, 1), paper, order="C")  # faster in this order
        ink = np.abs(away).max(axis=0)
        if not NETWORKS[self.net].inks:
            return self._filled(ink)
        clear = self._without_clutter(away, ink)
        return self._filled(np.dstack([ink, clear * (ink.max() / max(clear.max(), 1e-6))]))

    @staticmethod
    def _without_clutter(away, ink):
        """Removes the ink of lines, grids and dots, if these have a colour of their own: (H, w).

        away: (channels, H, w), the colours less that of the paper; ink: (H, w).

        The strong ink is put into 6 groups by the direction in which it differs from the paper. One
        of them is clutter: the one that is spread over the most rows and columns for its number of
        pixels. Ink of this direction is removed. The rest gets about equal strength.
        """
        away = away.transpose(1, 2, 0)
        strong = np.argwhere(ink > ink.max() / 2)
        strong = strong[::1 + len(strong) // 1000]  # about 1,000 pixels are enough
        if len(strong) <= 6:
            return ink
        rows, columns = strong.T
        cv2.setRNGSeed(0)  # of this thread
        stop = cv2.TERM_CRITERIA_COUNT, 10, 0
        seen = away[rows, columns]
        seen = seen / np.linalg.norm(seen, axis=1, keepdims=True)
        _, groups, centres = cv2.kmeans(seen, 6, None, stop, 1, cv2.KMEANS_PP_CENTERS)
        spread = [math.prod(len(np.unique(axis)) for axis in strong[here].T) / here.sum()
                  for here in (groups[:, 0] == group for group in range(6))]
        clutter = centres[np.argmax(spread)]
        length = np.linalg.norm(away, axis=2).clip(1e-6) * np.linalg.norm(clutter)
        sine = np.sqrt(1 - (away @ clutter / length).clip(0, 1) ** 2)
        other = (sine / 0.06 - 0.5).clip(0, 1)  # 0: in the clutter's colour; 1: in another one
        if other[rows, columns].mean() < 0.08:  # nothing else would be left: all has one colour
            return ink
        clear = ink * other
        removed, kept = (np.uint8(part > ink.max() / 4) for part in (ink - clear, clear))
        thick = [cv2.erode(part, np.ones((3, 3), np.uint8)).sum() / max(part.sum(), 1)
                 for part in (removed, kept)]
        if thick[0] > thick[1]:  # then the letters would go, and their lines stay
            return ink
        return np.minimum(clear, np.median(clear[clear > clear.max() / 4]))

    def _paper_of(self, colours):
        """Returns the paper's colour, (channels,) float32: the median along the image's border."""
        edge = max(1, self.im_height // 16)
        # The last and first rows, then columns; "wrap", as an image may have fewer than these.
        border = np.concatenate([
            colours.take(range(-edge, edge), axis, mode="wrap").reshape(-1, colours.shape[2])
            for axis in (0, 1)])
        return np.sort(border, axis=0)[len(border) // 2]  # np.partition takes 4 times as long

    def _filled(self, ink):
        """Scales ink (H, w, ...) to full strength and adds paper: (H, W, ...), see `ink_of`."""
        image = np.zeros(self._shape, np.uint8)
        strongest = max(np.atleast_3d(ink)[..., 0].max(), MIN_CONTRAST)
        image[:, :ink.shape[1]] = cv2.convertScaleAbs(ink, alpha=255 / strongest)
        return image

    @property
    def _shape(self):
        """The shape of an image: H, W, and for some networks 2."""
        return self.im_height, self.im_width, *NETWORKS[self.net].inks

    def _read_width(self, width):
        """Returns how many of an image's W columns the network is given; the rest is paper.

        width: of the image as `load_colours` returns it. The result is a multiple of H or W, so
        that images of similar width are read together; the longest text has enough steps.
        """
        squares = math.ceil(max(width, self._least_steps * self._stride) / self.im_height)
        return min(self.im_width, squares * self.im_height)

    # ------------------------------------------------------------------ rendering captchas

    def create_dataset(self):
        """Renders captchas into the folder `dataset`: all `im_total_num`, or a part, see `shard`.

        Image i depends on the settings and on i alone, not on how many processes or machines
        render. Several of them may share the folder. Files that are there are kept, so that an
        interrupted run goes on where it stopped.

        Returns 0, or 128 + the signal's number when it was told to stop. Raises `Error` if the
        folder holds images of other settings, or if it cannot be written.
        """
        usual = CAPITALS if self.look == "plain" else CAPITALS + self.SMALL + DIGITS
        ocr = self.resolve({"words": usual})
        folder, shard = Path(self.dataset), re.fullmatch(r"(\d{1,9})/(\d{1,9})", self.shard)
        if not shard or not 1 <= int(shard[1]) <= int(shard[2]):
            raise self.Error(
                f"--shard must be I/N with I from 1 to N, such as 2/3, not {self.shard!r}")
        numbers = range(int(shard[1]) - 1, self.im_total_num, int(shard[2]))
        fonts = ocr._fonts_found()
        if unfit := re.findall(r"[/\\]", ocr.words):
            raise self.Error(f"cannot render {unfit}: names of files cannot hold them; give other "
                             "--words")
        with self._writing(folder), _deferred_stop() as stop, self._renderers() as pool:
            folder.mkdir(parents=True, exist_ok=True)
            ocr._claim(folder, fonts)
            with _signals_held():  # they would kill a process that is still starting
                # Not `pool.map`: when a process is killed, it cancels what the pool sets to failed.
                rendered = [pool.submit(ocr._render, numbers[start:start + 20])
                            for start in range(0, len(numbers), 20)]
            for part in tqdm(rendered, folder.name, unit="img", unit_scale=20, disable=None):
                part.result()
                if stop:
                    break
        if stop:
            _say(f"stopped; the same command goes on with the images that {folder} lacks")
            return 128 + stop[0]
        _say(f"{len(numbers)} images in {folder}, shard {self.shard}")
        return 0

    FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts",
                    "~/.fonts", "/Library/Fonts", "/System/Library/Fonts", "C:/Windows/Fonts")

    def _fonts_found(self):
        """Finds the fonts to draw with: (path, those of `words` that it has) of each.

        Raises `Error` for letters that cannot be rendered.
        """
        folders = str(Path(_package("captcha", "render captchas").__file__).parent),
        if self.look == "varied":
            folders = (self.fonts,) if self.fonts else (*folders, *self.FONT_FOLDERS)
        return _find_fonts(folders, self.words)

    RENDERING = ".rendering.txt"  # the file in a folder of images that says how they were rendered

    def _claim(self, folder, fonts):
        """Writes into the folder all that decides what its images look like, as flags and values.

        fonts: see `_fonts_found`. Raises `Error` if the folder holds other labelled images.
        """
        names = "look", "seed", "words", "words_max_num", "im_width", "im_height"
        lines = [f"{_flag(name)} {getattr(self, name)}" for name in names]
        lines.append(" ".join(["--fonts", *(Path(path).name for path, _ in fonts)]))
        path = folder / self.RENDERING
        found = _text_of(path).split("\n") if path.exists() else []
        if other := [line.split()[0] for line in lines if line not in found]:
            if any(map(LABELLED.fullmatch, os.listdir(folder))):
                these = f"of other {', '.join(other)}, see {path}" if found else "not rendered here"
                raise self.Error(f"{folder} holds images {these}: give another --dataset")
            _replace(path, "\n".join(lines))

    @contextlib.contextmanager
    def _renderers(self):
        """Starts processes that render, and that end when this one does.

        Raises `Error` if one of them is killed.
        """
        context = multiprocessing.get_context("spawn")  # a fork would lack TensorFlow's threads
        try:
            pool = concurrent.futures.ProcessPoolExecutor(
                self.workers or _cores(), context, _follow_parent)
        except (OSError, NotImplementedError):  # the system has no semaphores for it
            pool = ThreadPoolExecutor(1)
        try:
            yield pool
        except concurrent.futures.BrokenExecutor:
            for process in multiprocessing.active_children():
                process.kill()  # it may wait for what the dead one had locked
            raise self.Error("a process that renders was killed, perhaps for want of memory; run "
                             "the same command again, with fewer --workers") from None
        finally:
            pool.shutdown(cancel_futures=True)

    PNG_END = b"IEND\xaeB`\x82"

    def _render(self, numbers):
        """Renders the images of these numbers, unless a complete file exists.

        Raises OSError if one cannot be written.
        """
        for i in numbers:
            random.seed(f"{self.seed}-{i}")  # the captcha package draws from this generator, too
            plain, label = self._draw_label()
            path = Path(self.dataset, f"{i}_{turned(label)}.png")  # drawn from left to right
            if not (path.exists() and path.read_bytes().endswith(self.PNG_END)):
                _replace(path, self._draw(plain, label))  # no fsync: a torn file is rendered again

    SMALL = CAPITALS.lower()
    # The letters of varied captchas, where `words` has them, and how often they are these. Most
    # captchas have letters of one case. "": all of `words`.
    ALPHABETS = ((CAPITALS, 24), (CAPITALS + DIGITS, 26), (SMALL, 8), (SMALL + DIGITS, 14),
                 (DIGITS, 15), ("", 14))

    def _draw_label(self):
        """Decides at random whether a captcha is plain, and its label: by the module `random`.

        Some varied captchas are sums, such as 12-4=? or 3×8, if `words` has all `SIGNS`. The others
        then have none of these.
        """
        letters, lengths = self.words, [1, self.words_max_num]
        plain = self.look == "plain"
        if not plain:
            if {*SIGNS, *DIGITS} <= {*letters}:
                if random.random() < .15:
                    numbers = random.choices([*DIGITS * 9, *map(str, range(100))], k=2)
                    label = random.choice("+++---××*/÷").join(numbers)
                    return False, (label + "=?"[:random.randint(0, 2)])[:self.words_max_num]
                letters = letters.translate(dict.fromkeys(map(ord, SIGNS)))
            alphabet = _pick(random, self.ALPHABETS)
            letters = [letter for letter in letters if letter in alphabet] or letters
            if random.random() < .08:  # letters that repeat are easily lost
                letters = random.choices(letters, k=2)
            plain = random.random() < .1
            if not plain and random.random() < .6:  # as most captchas have
                lengths = [min(length, self.words_max_num) for length in (4, 6)]
        length = random.randint(*lengths)
        return plain, "".join(random.choice(letters) for _ in range(length))

    @staticmethod
    @functools.cache
    def _captcha_package(width, height):
        return _package("captcha.image", "render captchas").ImageCaptcha(width, height)

    def _draw(self, plain, label):
        """Draws a captcha with the module `random`'s generator: returns the bytes of a PNG file."""
        if plain:
            return self._captcha_package(self.im_width, self.im_height).generate(label).getvalue()
        pixels = draw_varied(label, random.getrandbits(64), self._fonts_found())
        return cv2.imencode(".png", pixels)[1].tobytes()

    @dataclasses.dataclass(frozen=True)
    class _Look:
        """What the parts of one varied captcha share. A colour is (3, 1, 1) float32, BGR, 0 to 255.
        """
        chance: random.Random
        noise: np.random.Generator  # for whole arrays
        shape: tuple  # (h, w) of the image in pixels
        size: float  # of the letters, pixels an em
        paper: np.ndarray  # the colour of the paper
        ink: np.ndarray  # the colour of the letters
        contrast: int  # the least difference in brightness between letters and paper

    # ------------------------------------------------------------------ labels

    LISTS = ("labels.txt", LABELS)  # lists in a folder; a label in the second counts more
    BESIDE = ".gt.txt"  # ends the name of a text file that holds the label of the image beside it

    def find_labels(self, folder):
        """Finds the labels of a folder's images: in its lists, or else in the images' names.

        Returns the labels, {path in the folder: text}, ordered by digests of the paths; the way in
        which they were found, "list" or a pattern as in the setting `labels`, "" if names give
        none; and lines for the user, which say so and count the files that give no label.

        A digest keeps its place when the folder grows: the images held out are always the first.

        Raises `Error` if the names can be read in two ways: the setting `labels` decides then.
        """
        folder, way, labels, left_out = Path(folder), "list", {}, {}
        names, others = _files_in(folder)
        if self.labels in ("", "list"):
            labels, left_out = self._listed(folder, names, others)
        if self.labels != "list" and not (labels or left_out):
            way, labels = self._named(folder, names)
        labels = {name: getattr(str, self.case, str)(label) for name, label in labels.items()}
        left_out["images without a label"] = [name for name in names if name not in labels]
        left_out["files that are no images"] = [
            name for name in others if name not in self.LISTS and not name.endswith(self.BESIDE)]
        said = []
        for name, label in labels.items():
            typed = ", typed from right to left" if turned(label) != label else ""
            said = said or [f"{folder.resolve().name}: {len(labels):,} images, labels as in {way} "
                            f'("{_on_one_line(name)}" is {label}{typed})']
            if re.search(NO_UTF8, label):
                raise self.Error(f"{folder / name}: the label {label!r} is no text in UTF-8 but "
                                 "perhaps in GBK, cp1252 or UTF-16: save the list, or rename the "
                                 "image, in UTF-8")
        capitals, small = (sum(map(case, labels.values())) for case in (str.isupper, str.islower))
        if min(capitals, small) > 1 and capitals + small > 0.9 * len(labels):
            said.append(f"{capitals:,} labels are in capitals, {small:,} in small letters: if the "
                        "images do not tell these apart, give --case lower or --case upper")
        faults = "; ".join(f'{len(those):,} {what}, such as "{_on_one_line(those[0])}"'
                           for what, those in left_out.items() if those)
        labels = {name: labels[name] for name in sorted(labels, key=_digest)}
        return labels, way, said + [f"besides: {faults}"] * bool(faults)

    def _listed(self, folder, names, others):
        """Reads the lists of a folder: a line an image, or a text file beside each image.

        names, others: the folder's images and its other files. Returns {image: label} and {what is
        wrong with lines: names in them}. Both are empty if no line names anything. Raises `Error`
        as `_rows_of` does.
        """
        images = {}  # by all that a list may call them
        for name in names:
            beside = os.path.splitext(name)[0] + self.BESIDE
            images[_key(beside)] = images[_key(name)] = name
        rows = [(name, _text_of(folder / name).partition("\n")[0])
                for name in others if name.endswith(self.BESIDE)]
        for path in self.LISTS:
            rows += _rows_of(folder / path, names) if path in others else ()
        labels, left_out = {}, collections.defaultdict(list)
        for name, label in rows:
            image, label = images.get(_key(name)), _one_form(label).strip()
            if not image:
                left_out["lines of lists that are no text in UTF-8" if re.search(NO_UTF8, name)
                         else "lines of lists that name no image"].append(name)
            elif label:
                if labels.get(image, label) != label:
                    left_out["labels that a later line replaces"].append(image)
                labels[image] = label
        return labels, left_out

    def _named(self, folder, names):
        """Finds the way in which labels stand in the names of a folder's images, and {name: label}.

        Both are empty if the names only count the images. Of <text>_<text>, the label is the part
        that looks far less like a count. Where this does not tell, or labels would be only a few
        texts, the model to start from, or else `general`, decides. Raises `Error` if it cannot.
        """
        # A label may hold them, besides usual letters, and the marks of the scripts that have some.
        letters = re.escape(self.words or "A") + "\u0300-\u1dff\u302a-\u302f\ua8e0-\uabff"
        end = r"(?: \(\d+\)|\.\d+)?(?:\.\w+)"  # LABEL (1).png and LABEL.1.png have a label, too
        if self.labels:
            label = rf"((?=\d+\.\d)[\d.]*\d|(?>[^\s_.()]|[{letters}])+?)(?=.*\.)"
            pattern = re.escape(_one_form(self.labels)).replace(r"\*", ".*").replace("LABEL", label)
            return self.labels, _labels_in(names, pattern + end + "?")
        if (folder / self.RENDERING).exists():
            return "*_LABEL", _labels_in(names, r"\d+_(.+)\.\w+")
        # What is longer is a checksum or the like. Of 12.50.png, nobody knows what the label is.
        label = r"(?!\d+\.\d)" * ("." not in letters) + rf"(?>[^\W_]|[{letters}]){{1,20}}"
        whole, first, last = (_labels_in(names, form + end) for form in (
            f"({label})", f"({label}?)_.*", rf".*?_({label})"))
        every = {**first, **whole}
        share = len(whole) / max(1, len(every))
        # A few that are called otherwise are something else, such as logo.png.
        one = ("LABEL", whole) if share >= 0.9 else ("LABEL_*", every if share >= 0.1 else first)
        behind = len(last) >= len(one[1]) / 2
        two = behind and len({*first.values()}) > (len(first) > 1)  # not captcha_<text>.png
        rivals = [one if two else ("", {}), ("*_LABEL", last) if behind else one]
        (low, *_), (high, way, labels) = sorted(
            (self._gap(labels, two), way, labels) for way, labels in rivals)
        few = two and len({*labels.values()}) < min(5, len(labels) / 2)  # perhaps train and val
        if high > 10 * low and not few:
            return way, labels
        texts = self._read_some(folder, names)
        (low, *_), (high, way, labels) = sorted(
            (sum(texts.get(folder / name) == label.lower() for name, label in labels.items()),
             way, labels) for way, labels in rivals)
        if high > 10 * low + 2:
            return f"{way}, as {self.start_from or 'general'} reads {high} of {len(texts)}", labels
        if two and (few or "".join(first.values()).isdigit()
                    or texts and self._gap(last, False) >= 10):
            name = next(iter(last))
            ways = " or ".join(f"--labels '{way}' (\"{_on_one_line(name)}\" is {labels.get(name)})"
                               for way, labels in rivals)
            raise self.Error(f"the names in {folder} can be read in two ways: give {ways}")
        return rivals[0]

    def _read_some(self, folder, names):
        """Reads 30 images, from all over a folder, with the model to start from, or else `general`.

        Returns {path: text in small letters} of what can be read: nothing of fewer than 20 images,
        or without such a model.
        """
        names = sorted(names, key=_digest)[:30 if len(names) >= 20 else 0]
        with contextlib.suppress(self.Error):  # no such model, or no TensorFlow
            ocr = LstmCtcOcr(model=self.start_from or "general")
            readings = ocr.recognise_files([folder / name for name in names])
            return {path: text.lower() for path, text, *_ in readings if text}
        return {}

    @staticmethod
    def _gap(labels, two):
        """Measures how little labels look like a running count of the images.

        Returns the mean distance of neighbouring numbers where nearly all labels are different
        numbers, else infinity; 1 if all labels are the same. two: whether names have a second part
        that may be the label. Then the numbers have no zeros in front; else a count may look like
        captcha001. Numbers far apart, but all of about the same size, are no count.
        """
        prefix = re.escape(os.path.commonprefix([*labels.values()]))
        form = "(0|[1-9][0-9]*)" if two else prefix + "([0-9]*)"
        numbers = {(os.path.dirname(name), int(found[1] or 0))  # a subfolder counts anew
                   for name, label in labels.items() if (found := re.fullmatch(form, label))}
        if len(numbers) <= 0.98 * len(labels):
            return 1 if len({*labels.values()}) < 2 else math.inf
        _, values = zip(*numbers)
        low, high = min(values), max(values)
        gap = (high - low) / len(values)
        return gap if gap < 10 or 10 * low <= high else math.inf

    def labelled_files(self, folder, found=None, number=0, workers=1):
        """Lists the labelled images of a folder as (path, text), in the order of `find_labels`.

        found: what `find_labels` has found in the folder, if that was asked already. number,
        workers: gives one worker's share. Of images <number>_<text>, it is what `create_dataset`
        renders as `--shard`; of others, the digest decides.

        Raises `Error` if there is none, or one with a label that these settings cannot learn.
        """
        folder, (labels, _, said) = Path(folder), found or self.find_labels(folder)
        for name, label in labels.items():
            if len(label) > self.words_max_num or not set(self.words).issuperset(label):
                raise self.Error(
                    f"{folder / name}: the label {label!r} is not 1 to {self.words_max_num} "
                    f"letters of --words {self.words}: correct it, or give --case, other --words "
                    "or --words-max-num, and for a model that was trained already another --model")
        names = [name for name in labels if _number_of(name) % workers == number]
        if not names:
            raise self.Error(
                f"no labelled images in {folder} ({'; '.join(said) or 'no images'}): call "
                "them LABEL.png or the like (names that look like a count are labels only with "
                "--labels LABEL), say with --labels how they are called, or write a "
                "labels.csv, a line an image: its name, a comma, its label; or render some with "
                "`python lstm_ctc_ocr.py create_dataset`, or name another folder with --dataset")
        return [(os.path.join(folder, name), labels[name]) for name in names]

    # ------------------------------------------------------------------ model folders

    FORMAT = {"format": 1, "paper": "border"}  # what a config.json says that this version reads
    MIN_ACCURACY = 0.5  # on held-out images, for a model to be chosen without being named

    def _model_to_read(self):
        """Returns the folder that is read with: `model`, or the user's latest, or one that ships.

        A model of the user's that reads less than `MIN_ACCURACY` of its held-out images is passed
        over, with a message.
        """
        if self.model:
            return _model_folder(self.model)
        own = [path for path in MODELS.glob(f"{self.net or '*'}/checkpoint")
               if path.parent.name in NETWORKS]
        if own:
            folder = max(own, key=lambda path: path.stat().st_mtime).parent
            config = self._load_config(folder)
            accuracy = config.get("accuracy", 0 if config.get("held_share") else 1)
            if accuracy >= self.MIN_ACCURACY:
                return folder
            _say(f"{_shown(folder)} is passed over: it read only {accuracy:.1%} of its held-out "
                 f"images; train it further, or read with it all the same by --model "
                 f"{_shown(folder)}")
        return MODELS / "pretrained" / (self.net or "general")

    def _load_config(self, folder):
        """Returns a model folder's config.json; raises `Error` if there is none that is whole."""
        path = folder / "config.json"
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError:
            raise self.Error(
                f"no model in {folder}: train one with `python lstm_ctc_ocr.py train`, or name "
                "another, such as --model general") from None
        except (OSError, ValueError) as error:
            raise self.Error(
                f"{path} cannot be read ({error}): restore it, or name another folder with "
                "--model or --start-from") from None
        return self._checked(config, path)

    def _checked(self, config, path):
        """Returns what the file `path` says of a model; raises `Error` if that makes no sense."""
        kinds = self.__annotations__
        if not (isinstance(config, dict) and self.FORMAT.items() <= config.items()
                and all(isinstance(config.get(name), kinds[name]) for name in ARCHITECTURE)
                and all(isinstance(config.get(name, ""), str) for name in ("letters", "length"))):
            raise self.Error(
                f"{path} is not what this version writes, with {self.FORMAT}: train anew, or name "
                "another model with --model")
        return config

    def _with_architecture(self, config, folder):
        """Returns these settings with the architecture of a model and nothing left open.

        The model also says which letters and how many are read, unless the settings do.
        """
        self._require({"net": config["net"]}, f"{folder} holds a model of",
                      "leave --net out, or name another folder with --model")
        architecture = {name: config[name] for name in ARCHITECTURE}
        architecture |= {name: getattr(self, name) or config.get(name, "")
                         for name in ("letters", "length")}
        try:
            return dataclasses.replace(self, **architecture).resolve()
        except self.Error as error:
            raise self.Error(f"{folder}: {error}") from None

    def _write(self, folder, name, content):
        """Writes a file whole or not at all, and waits until it is on the disk."""
        with self._writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _replace(folder / name, content, durable=True)

    def _save_config(self, folder, config):
        """Writes config.json as `_write` does."""
        self._write(folder, "config.json", json.dumps(config, indent=2) + "\n")

    AVERAGE = "/ExponentialMovingAverage"  # how TensorFlow ends the name of a moving average

    def _load_model(self, folder):
        """Returns (settings with the model's architecture, config.json, {name: array} of weights).

        The weights are the moving averages at the model's best step.
        """
        config = self._load_config(folder)  # first, for a training may write a newer one
        ocr = self._with_architecture(config, folder)
        arrays = self._restore(folder, config.get("best_step", config.get("step")))
        weights = {name.removesuffix(self.AVERAGE): array
                   for name, array in arrays.items() if name.endswith(self.AVERAGE)}
        kernel = weights.get("convolution1/kernel", np.zeros((1, 1, 2, 1)))
        if NETWORKS[ocr.net].inks and kernel.shape[2] == 1:  # of before: it sees all ink only
            weights["convolution1/kernel"] = np.insert(kernel, 1, 0, axis=2)
        return ocr, config, weights

    def _restore(self, folder, step=None):
        """Reads the checkpoint of `step`, or the newest; returns {name: array}.

        If that one is missing or torn, it reads the newest that is whole, and says so. Raises
        `Error` if there is none.
        """
        errors = _tensorflow().errors.OpError, ValueError, RuntimeError, LookupError, OSError
        names = " ".join(path.name for path in folder.glob("*"))
        steps = sorted(map(int, re.findall(r"\bLstmCtcOcr-(\d+)\.index\b", names)), reverse=True)
        wanted = max(steps, default=0) if step is None else step
        for number in dict.fromkeys([wanted, *steps]):
            try:
                arrays = _arrays_of(folder / f"LstmCtcOcr-{number}")
            except errors:
                continue
            if number != wanted:
                _say(f"the checkpoint {folder / f'LstmCtcOcr-{wanted}'} is missing or torn: "
                     f"going on from that of step {number}")
            return arrays
        raise self.Error(
            f"the checkpoint {folder / f'LstmCtcOcr-{wanted}'} is missing, torn or of another "
            "network, and there is no other: restore it, or name another model with --model")

    LOCK = ".lock"  # in a model folder: whoever trains there holds it

    @contextlib.contextmanager
    def _alone_in(self, folder):
        """Keeps other trainings out of a model folder until it ends, or until this process does."""
        with self._writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / self.LOCK, "w")
        with lock:
            try:
                if fcntl:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self.Error(
                    f"another training is at work in {folder}: wait for its end, or name another "
                    "folder with --model") from None
            except OSError:  # the file system has no locks
                pass
            yield

    @contextlib.contextmanager
    def _writing(self, folder):
        """Turns the faults of a disk into an `Error` that names the folder."""
        try:
            yield
        except OSError as error:
            raise self.Error(
                f"cannot write to {folder} ({error.strerror or error}); run the same command again "
                "once that is mended") from None

    # ------------------------------------------------------------------ training

    @dataclasses.dataclass
    class _Run:
        """A training under way: what its methods share, and what changes from step to step."""
        place: object  # _Place
        folder: Path  # of the model
        net: object  # _Net
        images: object  # (n, H, W) uint8, to be indexed by an array of rows
        files: list  # (path, text) of each image
        steps_per_epoch: int
        last: int  # the step at which it ends
        config: dict  # of the chief: what config.json will say; its `step` is the last saved one
        held: np.ndarray  # rows that are validated on
        rows: np.ndarray  # rows that are trained on
        again: np.ndarray  # rows that are trained on besides, as often as they are in here
        distorts: bool  # whether an image is distorted whenever it is trained on
        session: object = None  # any thread may use it; a new one after a parameter server was lost
        stop: list = ()  # the signals that told the chief to stop
        step: int = 0
        losses: list = dataclasses.field(default_factory=list)  # of the steps since the last report
        reported: float = 0.0  # when that was, by the monotonic clock
        begun: float = 0.0  # CPU seconds of this process when the training began
        validating: float = 0.0  # CPU minutes that it took to validate
        learnt: bool = False  # there is nothing more to learn

        @property
        def cpu_minutes(self):
            """How long this process has trained, and the chiefs before it."""
            return (time.process_time() - self.begun) / 60

    def train(self, labelled_only=False):
        """Trains on the images of `dataset`, and goes on from what is in the model folder.

        From a model to start from, it also learns images without a label, see `_teach_itself`,
        unless labelled_only.

        With TF_CONFIG set, this process is one task of a cluster, see `_join_cluster`: the chief
        validates, reports and saves; the workers add their gradients; the parameter servers hold
        the weights.
        Returns 0 after `epoch_max` epochs, or on few images once all that are held out are read
        right, and those learnt from for sure. Told to stop by a signal, it saves and returns 128 +
        the signal's number.
        """
        place, folder = self._join_cluster(), self._folder_to_train()
        if place.serves:
            return self._serve_parameters(place)
        if not Path(self.dataset).is_dir():
            raise self.Error(f"{self.dataset} is no folder: render captchas with `python "
                             "lstm_ctc_ocr.py create_dataset`, or name the folder of your own "
                             "with --dataset")
        found = self.find_labels(self.dataset)
        config = self._load_config(folder) if (folder / "config.json").exists() else {}
        others = [name for name in _files_in(self.dataset)[0] if name not in found[0]]
        # A training goes on as it began: with or without guesses.
        if (self.start_from and not labelled_only and place.workers == 1
                and len(others) >= self.LEAST_SURE and ("round" in config or not config)):
            return self._teach_itself(place, folder, found, config, others)
        return self._train(place, folder, found, config)

    FEW = 20_000  # images; fewer are distorted anew whenever they are shown, see `distort`

    def _train(self, place, folder, found, config, guesses=0, part=1):
        """Trains as `train` does, on labels and on guesses.

        found: what `find_labels` has found, and behind its labels so many guesses. config: what
        config.json says of the training in the folder so far, and will say. part: how much of the
        training is to be done. Raises `Error` if that so far had other settings, or other images.
        """
        ocr = self._settings_for_training(config, found[0])
        config = {**self.FORMAT, **ocr._plan(), **config}
        if place.chief:
            ocr._require(config, f"{folder} was trained with",
                         "give the same to go on with it, or another folder with --model")
        samples = config.get("samples", {}).items()
        if samples and not self.model and samples.isdisjoint(found[0].items()):
            raise self.Error(
                f"{_shown(folder)} has learnt other images than those in {self.dataset}: name "
                "another folder with --model, or this one if it shall learn these too")
        files = ocr.labelled_files(self.dataset, found, place.number, place.workers)
        if ocr.ctc == "warp":
            _warp_library()  # where it is missing, that is said before the model folder is made
        ocr._hold_out(files, guesses, place, config)  # so is whether they are too few
        with ocr._alone_in(folder) if place.chief else contextlib.nullcontext():
            _say(*found[-1],
                 f"1 to {ocr.words_max_num} letters of {ocr.words} in {ocr.im_width} x "
                 f"{ocr.im_height} pixels; the model goes to {_shown(folder)}")
            if len(files) < ocr.FEW and not ocr.start_from:
                _say(f"{len(files):,} images are few to learn from nothing: a model to start from, "
                     "such as --start-from general, needs far fewer")
            return ocr._train_on(place, folder, files, config, guesses, part)

    def _folder_to_train(self):
        """Returns the folder that `train` writes: `model`, or one named by dataset or network."""
        dataset = Path(os.path.abspath(self.dataset))
        if self.model or dataset != HOME / "dataset" / "train":
            return Path(self.model or MODELS / dataset.name)
        return MODELS / (self.net or self._settings_of_start().get("net", "lstm"))

    def _settings_for_training(self, config, labels):
        """Returns these settings with all that was open, but for `_schedule`'s.

        They are those of the training so far, or else those of the model to start from, and those
        that the labelled images show. labels: {path in the dataset: text}.
        """
        later = dict.fromkeys(("lr", "epoch_max", "save_epoch"))  # they stay open
        if "words" in config:
            return self.resolve(later, config)
        start, shown = self._settings_of_start(), {}
        if labels:
            letters = set(config.get("letters", "")).union(*labels.values())
            shown = {"words": "".join(sorted(letters)),
                     "words_max_num": max(map(len, labels.values()))}
            shown["im_width"] = self.resolve(start, shown, {"im_width": 384})._width_of(labels)
        return self.resolve(later, start, shown)

    def _settings_of_start(self):
        """Returns the settings that the model `start_from` fixes; raises `Error` for others."""
        if not self.start_from:
            return {}
        config = self._load_config(_model_folder(self.start_from))
        fixed = {name: config[name] for name in ("net", "n_hidden", "label_parts", "im_height")}
        self._require(fixed, f"--start-from {self.start_from} has",
                      "leave that out, or start from another model")
        return fixed

    def _width_of(self, names):
        """Returns the width, a multiple of 16, that 95 % of the images have at `im_height`.

        It is at most the `im_width` of these settings. Wider images are squeezed.
        """
        widths = []
        for name in itertools.islice(names, 1000):
            with contextlib.suppress(self.Error):  # whoever decodes it later says so
                widths.append(self.load_colours(Path(self.dataset, name)).shape[1])
        usual = np.quantile(widths or [self.im_width], .95, method="inverted_cdf")
        return 16 * math.ceil(usual / 16)

    REPORT_STEPS = 100  # between reports, as in the article

    def _schedule(self, steps_per_epoch, steps):
        """Returns learning rate, epochs and epochs between checkpoints.

        From a model to start from, training is counted in steps: even few images need `steps`.
        """
        schedule = {"save_epoch": max(0.1, self.REPORT_STEPS / steps_per_epoch)}
        if self.start_from:
            seen = self.batch_size * steps_per_epoch  # images an epoch
            schedule["lr"] = 1e-3 * min(1, seen / 160)
            schedule["epoch_max"] = (steps + 0.2 * seen) / steps_per_epoch
        return schedule

    def _plan(self):
        """Returns the settings that all parts of a training must have in common."""
        return {name: getattr(self, name) for name in PLANNED}

    def _require(self, settings, whose, remedy):
        """Raises `Error` if one of `PLANNED` is set, but not as in a dictionary that holds it."""
        for name in PLANNED:
            own = getattr(self, name)
            if name in settings and own not in (None, settings[name]):
                raise self.Error(f"{whose} {_flag(name)} {settings[name]}, not {own}: {remedy}")

    HELD_SHARE = 0.1  # of a small folder's images are held out
    HELD_NUM = 2000  # images are held out of a large folder, about
    HELD_LEAST = 20  # images are held out at least, or half of a tiny folder
    MIN_IMAGES = 10  # to train on, when it starts from a model

    def _hold_out(self, files, guesses, place, config):
        """Counts the images to hold out, the first ones, and notes their share in `config`.

        Of the images that a person has labelled, all but the last `guesses`, those are held out
        whose digests are below the share, whatever `val_num` and the number of workers are. For
        one model that share never grows. So no image is trained on first and validated on later.
        Raises `Error` if so few others are left to train on that it makes no sense.
        """
        share = 0
        labelled = len(files) - guesses
        if self.val_num and files:
            share = min(self.HELD_SHARE, self.HELD_NUM / (len(files) * place.workers))
            if place.workers == 1:
                share = max(share, self._digest_of(files[min(self.HELD_LEAST, labelled // 2)]))
        share = min(share, config.get("held_share", 1))
        config["held_share"] = share
        held = bisect.bisect_left(files, share, hi=labelled, key=self._digest_of)
        least = self.MIN_IMAGES if self.start_from else self.batch_size
        if len(files) - held < least:
            raise self.Error(f"{self.dataset} leaves {len(files) - held} images to train on, fewer "
                             f"than {least}: label or render more, or lower --batch-size")
        return held

    def _digest_of(self, file):
        """Returns a number from 0 to 1 that the image's path in the dataset decides."""
        return _digest(os.path.relpath(file[0], self.dataset))

    def _train_on(self, place, folder, files, config, guesses, part):
        """Decodes the images, decides which are held out and how long it trains, and trains.

        files: this process's (path, text) pairs in the order of their digests, guesses last. The
        other arguments are as in `_train`, all but the schedule is settled. Returns the exit code.
        """
        images, files = self.load_images(files, folder)  # without those that are no images
        held = self._hold_out(files, guesses, place, config)
        rows = np.arange(held, len(files))
        steps_per_epoch = max(1, len(rows) // self.batch_size)
        ocr = self.resolve(self._schedule(steps_per_epoch, 300 if guesses else 800))
        last = math.ceil(ocr.epoch_max * steps_per_epoch * part)
        tf = _tensorflow()
        with tf.Graph().as_default(), tf.device(place.device):
            net = ocr._build_training(steps_per_epoch, place)
            if place.chief:
                self._save_config(folder, config)
            return ocr._train_loop(self._Run(
                place, folder, net, images, files, steps_per_epoch, last, config, rows=rows,
                # Beside guesses, a label is learnt four times as often.
                again=np.tile(rows[:len(rows) - guesses], 3 if guesses else 0),
                held=np.arange(min(held, self.val_num)),
                distorts=bool(self.start_from) and len(rows) < self.FEW))

    IN_MEMORY = 400_000_000  # bytes of decoded images; more are kept on the disk

    def load_images(self, files, folder):
        """Decodes the images of (path, text) pairs on all cores, and names on stderr what is none.

        More than `IN_MEMORY` of them are mapped from a file in `folder`. It has no name, so the
        system removes it when this process ends, however it ends.
        Returns images (n, H, W) uint8, and their pairs.
        Raises `Error` if the file cannot be written.
        """
        def load(file):
            try:
                return file, self.load_image(file[0])
            except self.Error as error:
                _say(f"left out: {error}")

        good, batch = [], 512  # so many are decoded before they are written
        starts = tqdm(range(0, len(files), batch), "decoding", unit="img", unit_scale=batch,
                      disable=None)
        with self._writing(folder), ThreadPoolExecutor(_cores()) as pool:
            kept, many = io.BytesIO(), len(files) * math.prod(self._shape) > self.IN_MEMORY
            if many:
                folder.mkdir(parents=True, exist_ok=True)
                kept = tempfile.TemporaryFile(dir=folder)
            for start in starts:
                for file, image in filter(None, pool.map(load, files[start:start + batch])):
                    kept.write(image)
                    good.append(file)
            kept.write(bytes(1))  # an empty file could not be mapped
            kept.flush()
        pixels = np.memmap(kept, mode="r") if many else np.frombuffer(kept.getbuffer(), np.uint8)
        return pixels[:-1].reshape(-1, *self._shape), good

    def _train_loop(self, run):
        """Trains step by step up to the last one, an early end or a signal.

        The chief reports and saves now and then. Returns the exit code.
        """
        chief, net = run.place.chief, run.net
        open_session = self._session_in_cluster if run.place.servers else self._session_alone
        with open_session(run) as run_step, \
                _deferred_stop() if chief else contextlib.nullcontext([]) as run.stop, \
                self._begin(run) as bar:
            for feeds in _one_ahead(self._batches(run)):
                if chief and (run.step >= run.last or run.learnt):
                    break
                before = run.step
                loss, norm, step = run_step([net.loss, net.gradient_norm, net.train], feeds)
                self._require_finite(run, loss, norm)
                run.losses.append(float(loss))
                run.step = int(step)
                bar.update(run.step - before)
                bar.set_postfix(loss=f"{loss:.3f}", CPU=f"{run.cpu_minutes:.1f} min")
                if chief:
                    self._between_steps(run, before, feeds)
                # A signal that came after saving waits for the next step, which saves again.
                if run.stop and run.step == run.config["step"]:
                    break
        if run.stop:
            return self._stopped(run)
        if chief and run.last >= self.epoch_max * run.steps_per_epoch:
            self._say_how_it_ended(run)
        return 0

    def _begin(self, run):
        """Notes where the training stands and when it began; returns its progress bar."""
        run.step = run.config["step"] = int(run.session.run(run.net.step))
        samples = {os.path.relpath(path, self.dataset): text for path, text in run.files[:20]}
        best = run.config.get("samples"), run.config.get("validated_on")
        if best != (samples, len(run.held)) or run.step < run.config.get("best_step", 0):
            for name in ("accuracy", "validated_on", "best_step"):
                run.config.pop(name, None)  # it was the best on other images, or has been lost
        run.config["samples"] = samples
        run.reported = time.monotonic()
        run.begun = time.process_time() - 60 * run.config.get("cpu_minutes", 0)
        _say(f"{len(run.rows)} images to train on, {len(run.held)} held out; from step {run.step} "
             f"to {run.last}")
        return tqdm(total=run.last, initial=run.step, unit="step", disable=None)

    DISTORTED = 0.9  # of the training, if it distorts; the rest shows the images as they are

    def _batches(self, run):
        """Yields what each step is fed, from `run.step` on.

        The seed and the number of the step alone decide it, so a resumed training goes on with
        the same batches.
        """
        first = run.step
        for step in itertools.count(first):
            epoch, batch = divmod(step, run.steps_per_epoch)
            if batch == 0 or step == first:
                shown = np.append(run.rows, run.again)
                order = np.random.default_rng([self.seed, epoch]).permutation(shown)
            rows = order[batch * self.batch_size:(batch + 1) * self.batch_size]
            feeds = self._feeds(run, np.resize(rows, self.batch_size))
            if run.distorts and step < self.DISTORTED * run.last:
                noise = np.random.default_rng([self.seed, step, 1])
                feeds[run.net.images] = distort(feeds[run.net.images], noise)
            yield feeds

    def _feeds(self, run, rows):
        """Returns what the network is fed for a batch: {tensor: images or labels}."""
        sequences = [self.text_to_sequence(run.files[row][1]) for row in rows]
        return {run.net.images: run.images[rows],
                run.net.sequences: self.sequences_to_sparse(sequences)}

    VALIDATION_SHARE = 0.05  # of the CPU time of a training may go to validating

    def _between_steps(self, run, before, feeds):
        """Reports and saves if it is time for it, after the step that followed step `before`.

        Reports are due every `REPORT_STEPS` steps and at the end. One before the end waits until
        those so far have taken at most `VALIDATION_SHARE` of the CPU time. The clock would also
        count moments in which the machine was busy or stopped.
        """
        fits = run.validating <= self.VALIDATION_SHARE * run.cpu_minutes
        ends = run.step >= run.last
        reports = ends or fits and run.step // self.REPORT_STEPS > before // self.REPORT_STEPS
        reports = reports and len(run.held)
        save_steps = max(1, round(self.save_epoch * run.steps_per_epoch))
        saves = run.step // save_steps > before // save_steps
        if not (reports or saves or ends or run.stop):
            return
        # If a parameter server is lost here, the next step finds that too, and waits for it.
        errors = _tensorflow().errors
        with contextlib.suppress(errors.UnavailableError, errors.AbortedError):
            self._require_finite(run, run.session.run(run.net.loss, feeds))  # of what is saved
            if ends and "letters" in run.config:  # found by reading: no image has a label
                self._keep_of_start(run)
            if reports:
                self._report(run, feeds)
            self._save(run)

    def _keep_of_start(self, run):
        """Makes three tenths of the moving averages the weights that the training started from.

        Guesses are partly wrong, and so is what is learnt from them. The mean with a model that has
        not learnt them is right more often (WiSE-FT, Wortsman et al., 2022). With labels this is
        not done: they may be small letters for drawn capitals, which the start does not expect.
        """
        start = self._start_weights()
        for variable in _tensorflow().global_variables(f".*{self.AVERAGE}"):
            kept = 0.3 * start[variable.op.name.removesuffix(self.AVERAGE)]
            variable.load(kept + 0.7 * run.session.run(variable), run.session)

    def _require_finite(self, run, *values):
        """Raises `Error` if the training has got out of hand."""
        if not np.isfinite(values).all():
            raise self.Error("the loss or its gradient is no longer a number after step "
                             f"{run.step}: lower --lr, to go on from the newest checkpoint in "
                             f"{run.folder}")

    LEARNT = 0.05  # is the loss, or less, of distorted images that are read right for sure

    def _report(self, run, feeds):
        """Validates; prints the article's figures and draws the learning curve."""
        begun = run.cpu_minutes
        speed = len(run.losses) * self.batch_size / (time.monotonic() - run.reported)
        epoch, batch = divmod(run.step, run.steps_per_epoch)
        lr = self._learning_rate((run.step - 1) / run.steps_per_epoch)
        train_loss = float(np.mean(run.losses))
        readings = run.session.run(run.net.sparse, feeds)
        train = score(self._texts_of(feeds[run.net.sequences]), self._texts_of(readings))
        truths, readings, loss, temperature = self._validate(run)
        held = score(truths, readings)
        _say(
            f"epoch {epoch}  batch {batch} of {run.steps_per_epoch}  step {run.step}  "
            f"lr {lr:.2e}  {speed:.0f} images/s  {run.cpu_minutes:.1f} CPU minutes, "
            f"{(run.last - run.step) * self.batch_size / speed / 60:.1f} minutes left",
            f"train       loss {train_loss:.3f}  edit distance {train['cer']:.4f}",
            f"validation  loss {loss:.3f}  edit distance {held['cer']:.4f}  "
            f"accuracy {held['accuracy']:.2%}",
            "accuracy by length  " + _shares(held["by_length"]),
            *(f"True [{', '.join(truth)}] <====> [{', '.join(reading)}]"
              for truth, reading in zip(truths[:3], readings)), "")
        if held["accuracy"] >= run.config.get("accuracy", 0):  # of equal ones the later is the best
            run.config.update(accuracy=held["accuracy"], validated_on=held["count"],
                              best_step=run.step, temperature=temperature)
        run.learnt = run.distorts and held["accuracy"] == 1 and train_loss < self.LEARNT
        curve = [point for point in run.config.get("curve", ()) if point[0] < run.step]
        run.config["curve"] = thin_curve([*curve, (run.step, train_loss, held["accuracy"])])
        self._write(run.folder, "curve.svg", draw_curve(run.config["curve"]))
        run.losses, run.reported = [], time.monotonic()
        run.validating += run.cpu_minutes - begun

    MIN_VALIDATED = 100  # held-out images that tell the temperature

    def _validate(self, run):
        """Reads the held-out images.

        Returns their texts, the readings, the mean loss, and the temperature that fits them.
        """
        held, net = run.held, run.net
        # The graph takes whole batches: the last one is filled up with the first images.
        count = -(-len(held) // self.batch_size)
        batches = np.resize(held, (count, self.batch_size))

        def validate(rows):
            feeds = self._feeds(run, rows)
            losses, sparse, logits = run.session.run([net.losses, net.sparse, net.logits], feeds)
            sequences = self.sparse_to_sequences(feeds[net.sequences])
            return losses, self._texts_of(sparse), *greedy_confidences(logits, sequences)

        with ThreadPoolExecutor(_cores()) as pool:
            losses, readings, right, confidences = zip(*pool.map(validate, batches))
        real = slice(len(held))
        temperature = run.config.get("temperature", 1)
        if len(held) >= self.MIN_VALIDATED:
            temperature = fit_temperature(np.concatenate(right)[real],
                                          np.concatenate(confidences, axis=1)[:, real])
        return ([run.files[row][1] for row in held], sum(readings, [])[real],
                float(np.concatenate(losses)[real].mean()), temperature)

    def _texts_of(self, sparse):
        """Returns the B texts of sequences in a sparse tensor."""
        return [self.sequence_to_text(sequence) for sequence in self.sparse_to_sequences(sparse)]

    def _save(self, run):
        """Writes the checkpoint of this step, then config.json, then removes older checkpoints.

        In this order kill -9 at any moment leaves a folder that loads. So does a power cut, since
        each is on the disk before the next is begun, which takes milliseconds. The checkpoint
        before stays too, in case the disk damages the newest.
        """
        files = _written_by(lambda folder: run.net.saver.save(
            run.session, f"{folder}/LstmCtcOcr", run.step, write_meta_graph=False))
        for name, content in files.items():  # the index after the data
            self._write(run.folder, name, content)
        kept = {f"LstmCtcOcr-{step}" for step in (
            run.step, run.config["step"], run.config.get("best_step"))}
        run.config.update(
            step=run.step, epoch=round(run.step / run.steps_per_epoch, 3),
            images_seen=run.step * self.batch_size * run.place.workers,
            images=len(run.rows) * run.place.workers,  # of all workers together
            epoch_max=self.epoch_max, lr=self.lr, cpu_minutes=round(run.cpu_minutes, 2),
            tensorflow=_tensorflow().__version__)
        self._save_config(run.folder, run.config)
        parts = run.folder.glob(".*.part")  # of trainings that were killed
        for path in (*parts, *run.folder.glob("LstmCtcOcr-*")):
            if path.name.split(".")[0] not in kept:
                path.unlink()

    def _say_how_it_ended(self, run):
        """Prints what a training that has ended has come to, and what to do next."""
        count, most = run.config.get("validated_on", 0), run.config.get("accuracy", 0)
        _say(f"{run.step} steps done in {run.cpu_minutes:.1f} CPU minutes; the model is in "
             f"{run.folder}")
        if count:
            _say(f"of the held-out images it reads {_counted(round(most * count), count)}")
        if run.learnt:
            _say("it has ended early: it reads all of them, and is sure of those it has learnt "
                 "from")
        _say(f"to learn longer, give a larger --epoch-max than {self.epoch_max:.4g}; to learn "
             "images that are new too, another --model")
        if count and not most:
            _say("nothing has been learnt yet: look whether the labels are right, give more "
                 "images, or start from a model (--start-from general, with another --model)")

    @staticmethod
    def _stopped(run):
        """Says how to go on with a training that was stopped; returns its exit code."""
        _say(f"stopped and saved at step {run.config['step']} of {run.last}; the same command goes "
             "on from there")
        return 128 + run.stop[0]

    @contextlib.contextmanager
    def _session_alone(self, run):
        """Opens a session in this process; yields the function that runs a step."""
        tf = _tensorflow()
        init = tf.global_variables_initializer()
        run.net.loss.graph.finalize()
        with tf.Session(config=_session_config()) as run.session:
            run.session.run(init)
            self._resume(run, run.session)
            yield run.session.run

    def _resume(self, run, session):
        """Loads the newest checkpoint that is whole, or else the model to start from, if any."""
        source, weights = self.start_from, {}
        begun = any(run.folder.glob("LstmCtcOcr-*.index"))
        if begun:
            source, weights = run.folder, self._restore(run.folder)
        elif source:
            weights = self._start_weights()
        for variable in _tensorflow().global_variables():
            name = variable.op.name
            if not begun:  # moving averages begin with the weights that they are averages of
                name = name.removesuffix(self.AVERAGE)
            if begun or name in weights:
                variable.load(_fitting(weights, name, variable.shape, source), session)

    # ------------------------------------------------------------------ reading

    @dataclasses.dataclass
    class _Reader:
        """A model that is ready to read."""
        ocr: object  # LstmCtcOcr, see `_with_architecture`
        folder: Path  # or ONNX file
        config: dict  # as it was when the weights were loaded
        restriction: object  # by the settings `letters` and `length`, or by `expect_alike`
        logits: object  # function: images uint8 -> (T, B, C) float32, blank last; it uses all
        #                 cores, or with alone=True the calling thread only

    @property
    def _reader(self):
        """The model that is read with; it is opened once, whichever thread asks first."""
        with OPENING:
            return self._opened

    @functools.cached_property
    def _opened(self):
        model = self._model_to_read()
        opening = self._open_onnx if model.suffix.lower() == ".onnx" else self._open_folder
        ocr, config, logits = opening(model)
        return self._Reader(ocr, model, config, ocr.restrict(), logits)

    def _open_folder(self, folder):
        """Opens a model folder with TensorFlow; returns ocr, config and logits of a `_Reader`."""
        tf, (ocr, config, weights) = _tensorflow(), self._load_model(folder)
        with tf.Graph().as_default() as graph, _constants(weights, folder):
            net = ocr._build_reading(ocr._build_input(), config.get("temperature", 1))
            session = tf.Session(config=_session_config())
            graph.finalize()  # from now on, adding to the graph by mistake is an error
        in_this_thread = tf.RunOptions(inter_op_thread_pool=-1)

        def logits(ink, alone=False):
            return session.run(net.logits, {net.images: ink}, in_this_thread if alone else None)

        return ocr, config, logits

    def _open_onnx(self, path):
        """Opens an exported .onnx file with ONNX Runtime; returns the same as `_open_folder`."""
        runtime = _package("onnxruntime", "read with an ONNX file")
        remedy = (f"write it with `python lstm_ctc_ocr.py export {path.name}`, or name another "
                  "with --model")
        try:
            data = path.read_bytes()
            session = _onnx_session(runtime, data, _cores())
            metadata = session.get_modelmeta().custom_metadata_map
            # In older files they are called config.
            config = json.loads(metadata.get(self.METADATA) or metadata["config"])
        except Exception as error:  # ONNX Runtime raises many that have no class in common
            fault = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise self.Error(f"{path} cannot be read ({fault}): {remedy}") from None
        ocr = self._with_architecture(self._checked(config, path), path)
        shapes = [end.shape[2] for end in (*session.get_inputs(), *session.get_outputs())]
        if shapes != [ocr.im_height, len(ocr.words) * ocr.label_parts + 1]:
            raise self.Error(f"{path} holds another network than it says: {remedy}")
        in_this_thread = functools.cache(functools.partial(_onnx_session, runtime, data, 1))

        def logits(ink, alone=False):
            ink = ink.reshape(*ink.shape[:3], -1).transpose(0, 3, 1, 2)  # (B, 1 or 2, H, w)
            images = -np.float32(ink)  # see `_export_onnx`
            scores, = (in_this_thread() if alone else session).run(None, {"images": images})
            return np.roll(scores, -1, axis=2)  # there, the blank is first

        return ocr, config, logits

    def _say_model(self):
        """Says on stderr which model is read with, and what it reads or how well."""
        config = self._reader.config
        figures = config["net"]
        if config.get("validated_on"):
            figures += (f", {config.get('accuracy', 0):.1%} of {config['validated_on']:,} "
                        "held-out images")
        if "expected" in config:
            figures += f", expects to read {config['expected']:.0%} of new images right"
        _say(f"reading with {_shown(self._reader.folder)} ({config.get('about', figures)})")
        if config.get("length"):
            _say(f"expecting {self._reader.restriction}")

    def _read(self, infer, images, restriction, doubt=None):
        """Reads images of one width under one restriction; returns B pairs (text, confidence).

        infer: function from images (B, H, w, ...) uint8 to logits (T, B, C). doubt: the confidence
        up to which images are read again in another view; those that stay in doubt, in several.
        That raises the accuracy, but only of a network that has learnt captchas of many kinds.
        """
        def again(rows, view):
            return infer(self._viewed(view, images[rows]))

        def zoomed(factor):
            return functools.partial(self._zoomed, factor)

        doubt = NETWORKS[self.net].doubt if doubt is None else doubt
        views = ((1, self._from_afar), (0.6, zoomed(1.3)), (0.5, zoomed(0.8)), (0.4, zoomed(1.5)),
                 (0.4, self._clear))
        return self.texts(infer(images), restriction, [
            (share * doubt, functools.partial(again, view=view))
            for share, view in views if doubt])

    def _viewed(self, view, images):
        """Returns images (B, H, w, ...) as a view shows them, ink at full strength, uint8.

        view: function from an image (H, w, ...) to one that may have another width.
        """
        seen = [view(image) for image in images]
        width = self._read_width(seen[0].shape[1])
        return np.stack([self._filled(ink)[:, :width] for ink in seen])

    @staticmethod
    def _clear(image):
        """Shows nothing but the ink without clutter of an image (H, w, 2)."""
        return image[..., [1, 1]]

    @staticmethod
    def _from_afar(ink):
        """Makes ink (H, w) narrower, (H, 0.87 w), and blurs it: dots run together into strokes."""
        height, width = ink.shape[:2]
        narrow = cv2.resize(ink, (round(.87 * width), height), interpolation=cv2.INTER_AREA)
        return cv2.GaussianBlur(narrow, (0, 0), 2)

    def _zoomed(self, factor, ink):
        """Makes ink (H, w) larger or smaller by a factor, (H, factor * w); what grows gets thinner.

        Small letters grow, touching ones part, and letters that are cut off at the border get room.
        The result is at most W wide; ink that would reach further grows less in width.
        """
        height, width = ink.shape[:2]
        right = min(self.im_width, round(factor * width))
        end = 1 + ink.any(axis=0).nonzero()[0].max(initial=0)  # behind it is nothing but paper
        zoom = np.array([[min(factor, right / end), 0, 0],
                         [0, factor, (1 - factor) * height / 2]])
        zoomed = cv2.warpAffine(ink, zoom, (right, height))
        return cv2.erode(zoomed, np.ones((2, 2), np.uint8)) if factor > 1 else zoomed

    def _read_each(self, sources, restrictions=(), alone=False):
        """Reads as `recognise`, but an image that cannot be read has its `Error` in its place.

        restrictions: one for each source; by default that of the settings. alone: see `_Reader`.
        """
        reader, alike = self._reader, collections.defaultdict(list)
        results, ocr = [None] * len(sources), reader.ocr
        restrictions = restrictions or [reader.restriction] * len(sources)
        for row, source in enumerate(sources):
            try:
                colours = ocr.load_colours(source)
            except self.Error as error:
                results[row] = error
                continue
            width = ocr._read_width(colours.shape[1])
            alike[width, restrictions[row]].append((row, ocr.ink_of(colours)[:, :width]))
        infer = functools.partial(reader.logits, alone=alone)
        for (_, restriction), images in alike.items():
            rows, images = zip(*images)
            doubt = reader.config.get("doubt")
            for row, reading in zip(rows, ocr._read(infer, np.stack(images), restriction, doubt)):
                results[row] = reading
        return results

    def recognise(self, sources, letters="", length=""):
        """Reads images as one batch; returns their pairs (text, confidence).

        sources: paths, or the bytes of files. letters, length: as for `restrict`. The confidence is
        the probability that the network gives to the text, see `texts`. The model is loaded by the
        first call. Raises `Error` if there is no such model, if it cannot read such texts, or for
        the first image that cannot be read.
        """
        restriction = self._reader.ocr.restrict(letters, length)
        readings = self._read_each(sources, [restriction] * len(sources))
        for reading in readings:
            if isinstance(reading, self.Error):
                raise reading
        return readings

    def recognise_files(self, paths):
        """Reads files on all cores, batch by batch.

        Yields for each path, in order, (path, text, confidence, None), or if the image cannot be
        read (path, None, None, what is wrong).
        """
        paths, size = list(paths), 64
        batches = [paths[start:start + size] for start in range(0, len(paths), size)]
        read = functools.partial(self._read_each, alone=len(batches) > 1)
        # Closing the map drops the batches that wait.
        with ThreadPoolExecutor(_cores()) as pool, \
                contextlib.closing(pool.map(read, batches)) as readings:
            for path, reading in zip(paths, itertools.chain.from_iterable(readings)):
                failed = isinstance(reading, self.Error)
                yield path, *((None, None, str(reading)) if failed else (*reading, None))

    def test(self, paths=(), as_json=False, report="", alike=False):
        """Reads files and folders, prints a line an image, and compares what was read with labels.

        paths: by default the samples in dataset/test. as_json: prints JSON lines, without the
        figures. report: an HTML file to write about the labelled images. alike: reads all images as
        one kind, see `expect_alike`.
        Returns 0, or 1 if images could not be read; raises `Error` without any, or any to report.
        """
        page, paths = Path(report), [Path(path) for path in paths or (HOME / "dataset" / "test",)]
        if report and not (page.parent.is_dir() and page.suffix == ".html"):
            raise self.Error(f"--report {report}: name an .html file in a folder that exists")
        files = [path / name for path in paths
                 for name in (_files_in(path)[0] if path.is_dir() else [""])]
        if not files:
            raise self.Error(f"no images in {', '.join(map(str, paths))}: name files or folders "
                             "that hold some")
        self._say_model()  # first of all, so that a missing model is the only thing said
        truths = {}
        for path in paths:
            truths.update(self._reader.ocr._truths_of(path))
        if alike:
            self.expect_alike(files)
        readings = []  # (path, its label or None, text, confidence)
        for path, text, confidence, fault in self.recognise_files(files):
            if not fault:
                readings.append((path, truths.get(path), text, confidence))
            self._print_reading(path, truths.get(path), text, confidence, fault, as_json)
        labelled = [reading for reading in readings if reading[1]]
        if labelled and not as_json:
            print("\n" + describe(score(*zip(*(reading[1:3] for reading in labelled)))))
        if report:
            if not labelled:
                raise self.Error("--report wants labelled images, and none of these is: see "
                                 "`train --help` for --labels")
            self._write(page.parent, page.name,
                        report_page(labelled, str(_shown(self._reader.folder))))
        common = self._reader.ocr.alike([reading[2:] for reading in readings])
        if common.length and not self._reader.restriction.length:
            _say(f"most texts have {common}: to read all images as such, add --alike, or give "
                 "--length and --letters")
        if sum(confidence < 0.5 for *_, confidence in readings) > len(readings) / 2:
            _say("most of these do not look like what this model has learnt (confidence below "
                 "0.5): if it is not general, try `--model general`; else put 1,000 of them in a "
                 "folder, and `train --dataset FOLDER --start-from general`")
        return 1 if len(readings) < len(files) else 0

    def _truths_of(self, path):
        """Returns {path: label} of a folder's images, and says on stderr how they were labelled.

        For one file, it returns the label in its name if that is as `create_dataset` writes it.
        """
        if not path.is_dir():
            labels = _labels_in([path.name], r"\d+_(.+)\.\w+").values()
            return {path: label for label in labels if set(label) <= set(self.words)}
        try:
            labels, way, said = self.find_labels(path)
        except self.Error as error:  # the images can be read all the same
            _say(error)
            return {}
        if way or self.labels:  # without labels it is just read
            _say(*said)
        return {path / name: label for name, label in labels.items()}

    def _print_reading(self, path, truth, text, confidence, fault, as_json):
        """Prints what was read in an image, or what is wrong with it; truth: its label, or None."""
        if as_json:
            about = {"error": fault} if fault else {"ocr_ret": text, "confidence": confidence}
            print(json.dumps({"img_path": str(path), **about}))
        elif fault:
            _say(fault)
        else:
            verdict = "" if truth is None else f"  {truth} {'right' if text == truth else 'wrong'}"
            width = self._reader.ocr.words_max_num
            print(f"{text:<{width}}  {confidence:.3f}  {_on_one_line(path)}{verdict}")

    # ------------------------------------------------------------------ images without labels

    SURE = 0.7  # the confidence from which on a reading is taken for right
    LEAST_SURE = 20  # so many sure readings tell what the texts of a folder have in common

    ROUNDS = 3  # of reading images without a label, and learning what is read surely

    def alike(self, readings):
        """Finds what the texts of one kind of captchas have in common, by the sure readings.

        readings: pairs (text, confidence). Returns a `Restriction`; if too few readings are sure,
        that of the settings.
        """
        texts = [text for text, confidence in readings
                 if text and confidence >= self.SURE and len(text) <= self.words_max_num]
        if len(texts) < self.LEAST_SURE:
            return self.restrict()
        lengths, drawn = collections.Counter(map(len, texts)), "".join(texts)
        usual = [length for length in lengths if lengths[length] >= max(lengths.values()) / 10]
        letters = self.letters or self.words
        # Capitals, small letters and digits are counted by those that look like no others.
        for kind, clear in ((CAPITALS, "ABDEFGHMNQRT"), (self.SMALL, "abdefghmnqrt"),
                            (DIGITS, "23456789")):
            if sum(map(drawn.count, clear)) < 0.03 * len(drawn):
                letters = letters.translate(str.maketrans("", "", kind))
        return self.restrict(letters, f"{min(usual)}-{max(usual)}")

    def expect_alike(self, paths):
        """Reads images of one kind; from then on expects what the sure texts have in common.

        Returns that, as `alike` does.
        """
        reader = self._reader
        reader.restriction = reader.ocr.alike([each[1:3] for each in self.recognise_files(paths)])
        _say(f"expecting {reader.restriction}")
        return reader.restriction

    def _teach_itself(self, place, folder, found, config, names):
        """Trains on labels, and on what is read surely in the other images, in rounds.

        A tenth of these images is never learnt from: it tells how many of new ones are read right.
        found, config: as for `_train`; names: the images without a label. Returns the exit code.
        """
        self._say_if_mixed(names)
        names = sorted(names, key=_digest)
        tenth = len(names) // 10
        new, names = names[:tenth], names[tenth:]
        first = config.get("round", 1)
        for number in range(first, self.ROUNDS + 1):
            readings, kind = self._read_unlabelled(
                self.start_from if number == 1 else folder, names, found[0])
            # Where few readings are that sure, the surer half of all readings is mostly right too.
            bar = np.clip(np.median([sure for *_, sure in readings] or 1), 0.3, self.SURE)
            guesses = [(*reading, number) for reading in readings if reading[2] >= bar]
            _say(f"round {number} of {self.ROUNDS}: {len(guesses)} of {len(names)} images without "
                 "a label are read surely")
            if len(guesses) < self.LEAST_SURE:
                _say("these are too few to learn from")
                guesses = ()
            config.update({} if found[0] else kind, round=number)
            if number > first:  # its most accurate checkpoint is sought anew
                config["validated_on"] = 0
            taught = {**found[0], **dict(guess[:2] for guess in guesses)}, *found[1:]
            code = self._train(place, folder, taught, config, len(guesses), number / self.ROUNDS)
            self._note_guesses(folder, guesses)
            if code:
                return code
            config = self._load_config(folder)
        readings, _ = self._read_unlabelled(folder, new, found[0])
        config["expected"] = sum(sure for *_, sure in readings) / len(new)
        self._save_config(folder, config)
        _say(f"of new images it expects to read {config['expected']:.0%} right; what it took for "
             f"labels is in {_shown(folder / self.TAUGHT)}")
        return 0

    def _say_if_mixed(self, names):
        """Says so if images of the dataset have several heights, as those of several kinds have."""
        heights = []
        for name in names:
            with contextlib.suppress(Exception), Image.open(Path(self.dataset, name)) as image:
                heights.append(image.height)
        low, high = np.quantile(heights or [1], (0.1, 0.9))
        if high > 1.1 * low:
            _say(f"the images have several heights: if {self.dataset} holds several kinds, give "
                 "each a folder of its own")

    def _read_unlabelled(self, model, names, labels):
        """Reads images of the dataset with a model, as images of one kind.

        labels: {path: text} of others of this kind; they tell whether its letters are capitals.
        Returns triples (path in the dataset, text, confidence) of those in which it finds a text,
        and the letters and length of the kind, as config.json keeps them. The confidence is that of
        the text in any case: of many letters, such as c and C, nothing but the size tells the case.
        """
        ocr = LstmCtcOcr(model=str(model))
        paths = [Path(self.dataset, name) for name in names]
        labelled = ocr._reader.ocr.alike([(text, 1) for text in labels.values()])
        ocr._reader.restriction = ocr._reader.ocr.restrict(labelled.letters)
        kind = ocr.expect_alike(paths)
        cased = in_any_case = [*ocr.recognise_files(paths)]
        one_case = "".join({letter.lower(): letter for letter in kind.letters}.values())
        if one_case != kind.letters:  # letters of one case are read in either
            ocr._reader.restriction = ocr.Restriction(one_case, kind.length)
            in_any_case = ocr.recognise_files(paths)
        readings = [
            (name, text, round(confidence, 3) if text.lower() == (read or "").lower() else 0)
            for name, (_, text, *_), (_, read, confidence, _) in zip(names, cased, in_any_case)
            if text]
        return readings, dataclasses.asdict(kind)

    TAUGHT = "taught.csv"  # in a model folder: the guesses that it learns

    def _note_guesses(self, folder, guesses):
        """Writes guesses, rows (path in the dataset, text, confidence, round), in a folder."""
        written = io.StringIO()
        csv.writer(written, lineterminator="\n").writerows(
            [("path", "text", "confidence", "round"), *guesses])
        self._write(folder, self.TAUGHT, written.getvalue())

    # -------------------------------------------------------------- training on several machines

    @dataclasses.dataclass(frozen=True)
    class _Place:
        """A process's place among those that train together; by default it trains alone."""
        chief: bool = True
        serves: bool = False  # it is a parameter server
        number: int = 0  # among chief and workers, or among the parameter servers
        workers: int = 1  # the chief included
        servers: int = 0  # parameter servers
        target: str = ""  # of its sessions
        device: object = None  # where variables and operations go
        sees: tuple = ()  # the tasks that it communicates with

    @staticmethod
    def _join_cluster():
        """Starts this process's server in the cluster that TF_CONFIG describes; returns its place.

        TF_CONFIG is as TensorFlow documents it: {"cluster": {"chief": [address], "worker": [...],
        "ps": [...]}, "task": {"type": ..., "index": ...}}. Without it the process trains alone.
        Raises `LstmCtcOcr.Error` if it makes no sense.
        """
        if not os.environ.get("TF_CONFIG"):
            return LstmCtcOcr._Place()
        tf = _tensorflow()
        try:
            resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
            cluster, job = resolver.cluster_spec(), resolver.task_type
            index, addresses = int(resolver.task_id or 0), cluster.as_dict()
            sizes = {name: len(addresses.get(name, ())) for name in ("chief", "worker", "ps")}
            if sizes["chief"] != 1 or not sizes["ps"] or index >= sizes.get(job, 0):
                raise ValueError("it must name a chief, a ps or several, and a task that is one of "
                                 "them")
            with _quiet_stderr():
                server = tf.train.Server(cluster, job, index, config=_session_config())
        except Exception as error:  # it can be wrong in many ways
            raise LstmCtcOcr.Error(f"TF_CONFIG: {str(error).splitlines()[0]}") from None
        # While TensorFlow waits for other tasks, no Python code hears a signal: let it end the
        # process. The chief, once it trains, catches signals and saves first.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        here = f"/job:{job}/task:{index}"
        return LstmCtcOcr._Place(
            chief=job == "chief", serves=job == "ps", number=index + (job == "worker"),
            workers=1 + sizes["worker"], servers=sizes["ps"], target=server.target,
            sees=("/job:ps", here),
            device=tf.train.replica_device_setter(cluster=cluster, worker_device=here))

    def _serve_parameters(self, place):
        """Holds a share of the weights for the workers until the chief is done; returns 0."""
        tf = _tensorflow()
        with tf.Graph().as_default(), \
                tf.Session(place.target, config=_session_config(place)) as session:
            finished = self._finished_queue(place.number).dequeue()
            _say(f"holds weights for {place.workers} workers")
            session.run(finished)
            time.sleep(10)  # the workers hear it too, and close their sessions
        return 0

    @staticmethod
    def _finished_queue(server):
        """Returns a parameter server's queue: the chief adds an entry once it is done."""
        tf = _tensorflow()
        with tf.device(f"/job:ps/task:{server}"):
            return tf.FIFOQueue(1, tf.bool, shapes=[], shared_name=f"finished_{server}")

    def _build_agreement(self, place, optimizer):
        """Builds what chief and workers share: variables and queues, as fields of `_Net`."""
        tf = _tensorflow()
        return {"replicas": optimizer,
                "plan": tf.get_variable("plan", initializer=json.dumps(self._plan()),
                                        trainable=False, collections=["plan"]),
                "finished": [self._finished_queue(server).enqueue(True)
                             for server in range(place.servers)]}

    def _open_in_cluster(self, run):
        """Opens a session that is opened anew whenever a parameter server was lost.

        The chief sets the weights first; the workers wait until it has. Returns a
        `MonitoredSession`.
        """
        tf, place, net = _tensorflow(), run.place, run.net
        config, init = _session_config(place), tf.global_variables_initializer()
        ready = None if place.chief else tf.report_uninitialized_variables([net.plan])
        manager = tf.train.SessionManager(tf.local_variables_initializer(), recovery_wait_secs=1,
                                          ready_op=ready)

        def create():
            with net.loss.graph.as_default():  # the thread that runs the steps may call this
                if not place.chief:
                    return manager.wait_for_session(place.target, config)
                return manager.prepare_session(
                    place.target, init, config=config, init_fn=functools.partial(self._resume, run))

        def begin(session, coordinator):
            if run.session is not None:
                _say(f"lost a parameter server; going on from step {session.run(net.step)}")
            run.session = session
            if place.chief:
                session.run(net.plan.initializer)  # for this the workers wait

        begun = tf.train.SessionRunHook()
        begun.after_create_session = begin
        hooks = [net.replicas.make_session_run_hook(place.chief, num_tokens=0), begun]
        return tf.train.MonitoredSession(
            types.SimpleNamespace(create_session=create), hooks, stop_grace_period_secs=1)

    @contextlib.contextmanager
    def _session_in_cluster(self, run):
        """Opens the session that trains with others; yields the function that runs a step.

        A worker's ends without an error when the chief has done the last step. Raises `Error` if
        the chief trains with other settings than this worker.
        """
        tf = _tensorflow()
        with ThreadPoolExecutor(1) as stepping:
            def run_step(fetches, feeds):
                waiting = stepping.submit(session.run, fetches, feeds)
                while not waiting.done() and not run.stop:
                    concurrent.futures.wait([waiting], timeout=1)  # this thread hears signals
                if not waiting.done():
                    self._leave(run, feeds)
                return waiting.result()

            try:
                session = self._open_in_cluster(run)
                if not run.place.chief:
                    plan = json.loads(run.session.run(run.net.plan))
                    self._require(plan, "the chief trains with",
                                  "give the same to every task of the cluster")
                yield run_step
            except tf.errors.OutOfRangeError:
                pass  # the chief is done, and has closed the queue at which the workers wait
            except (tf.errors.UnavailableError, tf.errors.AbortedError):
                raise self.Error("lost a parameter server: start it again, and then this") from None
            if run.stop:  # closing would close that queue too: workers would take it for the end
                return
            if run.place.chief:
                with contextlib.suppress(tf.errors.OpError):  # a server may have gone
                    run.session.run(run.net.finished)
            threading.excepthook = lambda _: None  # closing stops TensorFlow's own threads
            closing = threading.Thread(target=session.close, daemon=True)
            closing.start()
            closing.join(5)  # it would wait for ever for a parameter server that has gone

    def _leave(self, run, feeds):
        """Saves and ends this process.

        Its step waits for another task. Such a step cannot be cancelled, so the process exits.
        """
        # If a server is lost too, or the loss no number, the newest checkpoint stays what it is.
        with contextlib.suppress(_tensorflow().errors.OpError, RuntimeError, self.Error):
            self._require_finite(run, run.session.run(run.net.loss, feeds))
            self._save(run)
        os._exit(self._stopped(run))

    # ------------------------------------------------------------------ service

    MAX_BODY = 2_500_000  # bytes of a request, or of a file that it names
    MAX_IMAGES = 64  # in a request
    QUEUE = 64  # images that may wait before a further request is told to come again
    SERVE_BATCH = 8  # images that a thread reads at once; more cost hardly less an image

    @dataclasses.dataclass
    class _Service:
        """State that the requests to an application share."""
        labelling: object  # _Labelling, with --label
        pool: object  # threads that read, one a core. The first request that reads starts them:
        #               those of a parent would not be in a process that gunicorn --preload forks
        jobs: object  # deque of (bytes, Restriction, Future) of images that wait

    class _Request(flask.Request):
        """A request whose files stay in memory: not every system has a folder for others."""
        def _get_file_stream(self, *_, **__):
            return io.BytesIO()

    def create_app(self):
        """Returns the Flask application, with its model loaded and run once.

        Its routes are those of the OpenAPI description: an operation's `operationId` names the
        method that answers it. `app.extensions["lstm_ctc_ocr"]` is the state that requests share;
        its `pool.shutdown()` ends the threads. Raises `Error` if there is no model, or no image
        to label.
        """
        labelling = self._open_labelling() if self.label else None
        ocr = self._reader.ocr
        self._reader.logits(  # the first run takes long
            np.zeros((1, *ocr._shape), np.uint8), alone=True)
        service = self._Service(labelling, ThreadPoolExecutor(_cores()), collections.deque())
        app = flask.Flask(__name__, static_folder=None)
        app.extensions["lstm_ctc_ocr"] = service
        app.request_class = self._Request
        app.json.sort_keys = False
        app.config["MAX_CONTENT_LENGTH"] = self.MAX_BODY
        app.before_request(self._admit)
        app.after_request(self._account)
        for error in (HTTPException, self.Error, OSError):
            app.register_error_handler(error, _json_error)
        for path, operations in describe_service(self.label)["paths"].items():
            for method, operation in operations.items():
                name = operation["operationId"]
                answer = functools.partial(getattr(self, f"_{name}"), service)
                app.add_url_rule(path, name, answer, methods=[method],
                                 provide_automatic_options=False)
        return app

    def _admits(self, header):
        """Whether a header Authorization, its bytes in Latin-1 as by WSGI, holds the token."""
        basic = Authorization.from_header(header)
        if basic and basic.type == "basic":  # as a browser sends what its user types
            sent = basic.password.encode()
        else:
            sent = header.partition(" ")[2].encode("latin-1")
        token = os.fsencode(self.token or os.environ.get("LSTM_CTC_OCR_TOKEN", ""))
        return not token or hmac.compare_digest(sent, token)

    def _admit(self):
        """Refuses a request without the token, which only /healthz does not need."""
        flask.g.begun = time.perf_counter()
        header = flask.request.headers.get("Authorization", "")
        if flask.request.path != "/healthz" and not self._admits(header):
            raise Unauthorized("this service wants its token", www_authenticate=WWWAuthenticate(
                "basic", {"realm": "lstm_ctc_ocr"}))

    HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
               "X-Frame-Options": "DENY", "Cache-Control": "no-store"}

    def _account(self, response):
        """Logs a request; sets the headers that every answer has."""
        request, seconds = flask.request, time.perf_counter() - flask.g.begun
        response.headers.update(self.HEADERS)
        response.headers.setdefault("Content-Security-Policy", "default-src 'none'")
        target = ascii(request.full_path.rstrip("?"))[1:-1]  # no control characters in a log
        with contextlib.suppress(OSError):  # nobody may be reading the log
            _say(f'{request.remote_addr} "{request.method} {target}" '
                 f"{response.status_code} {seconds * 1e3:.1f} ms")
        return response

    def _answer_path(self, service):
        """GET /captchaOcr?img_path=P: reads an image file under the image root."""
        img_path = flask.request.args.get("img_path")
        if not img_path:
            flask.abort(400, "say which image: /captchaOcr?img_path=./dataset/test/0_PIY.png")
        try:
            root = Path(os.path.realpath(self.image_root))
            # A relative path may start at the image root, or at the folder that holds the root.
            paths = [_file_under(root, start / img_path) for start in (root.parent, root)]
            with open(next(filter(None, paths)), "rb") as file:
                data = file.read(self.MAX_BODY + 1)
        except (StopIteration, OSError):  # the same answer, so that nobody learns what exists
            flask.abort(404, "no such image under the image root")
        if len(data) > self.MAX_BODY:
            flask.abort(413, f"the file has more than {self.MAX_BODY:,} bytes")
        return {"img_path": img_path, **self._answer(service, [data])[0]}

    def _answer_post(self, service):
        """POST /captchaOcr: reads an image, sent as the body or in JSON, or files of a form."""
        request, kind, datas = flask.request, flask.request.mimetype, []
        if kind == "multipart/form-data":
            datas = [file.read() for file in request.files.getlist("image")]
        elif kind == "application/json":
            with contextlib.suppress(KeyError, AttributeError, ValueError):
                encoded = _json_body()["image"].rpartition(",")[2]  # or a data URL
                datas = [base64.urlsafe_b64decode(encoded + "==")]  # both alphabets, padded or not
        elif kind.startswith("image/"):
            datas = [request.get_data()]
        if not 1 <= len(datas) <= self.MAX_IMAGES:
            flask.abort(400, "send an image/* body, JSON with the image as base64, or a form "
                             f"with 1 to {self.MAX_IMAGES} files named image")
        answers = self._answer(service, datas)
        return answers[0] if len(answers) == 1 else {"results": answers}

    def _answer(self, service, datas):
        """Reads image files, given as bytes; returns a list with the answer about each.

        `letters` and `length` are taken from the query, the form or the JSON body, else from the
        settings. An image that cannot be read has its error in its place; if no image can be
        read, the first error is raised.
        """
        given = {**flask.request.values, **_json_body()}
        restriction = self._reader.ocr.restrict(*(
            str(given.get(name) or "") for name in ("letters", "length")))
        futures = [concurrent.futures.Future() for _ in datas]
        try:
            if len(service.jobs) >= self.QUEUE:
                raise RuntimeError
            for data, future in zip(datas, futures):  # a large form too, though over the limit
                service.jobs.append((data, restriction, future))
                service.pool.submit(self._read_jobs, service)  # RuntimeError: it is shut down
        except RuntimeError:
            raise ServiceUnavailable("too many images are waiting, or the service is stopping; "
                                     "try again soon", retry_after=1) from None
        readings = [future.result() for future in futures]
        if all(isinstance(reading, self.Error) for reading in readings):
            raise readings[0]
        return [{"error": str(reading)} if isinstance(reading, self.Error) else
                dict(zip(("ocr_ret", "confidence"), reading)) for reading in readings]

    def _read_jobs(self, service):
        """Reads a batch of the images that wait, if others have left any.

        While the threads are busy the next batch fills up, so no image waits for others to come.
        A batch is decoded and read on one core: in paired runs this answered a sixth to a fifth
        more requests a second than reading one batch at a time on all cores.
        """
        batch = []
        with contextlib.suppress(IndexError):  # none is left
            while len(batch) < self.SERVE_BATCH:
                batch.append(service.jobs.popleft())
        if not batch:
            return
        datas, restrictions, futures = zip(*batch)
        try:
            readings = self._read_each(datas, restrictions, alone=True)
            for future, reading in zip(futures, readings):
                future.set_result(reading)
        except Exception as fault:  # of this program; Flask logs it and answers with status 500
            for future in futures:
                future.set_exception(fault)

    def _answer_health(self, service):
        """GET /healthz: says which model reads, and how many images wait to be read."""
        told = ("net", "words", "words_max_num", "step", "accuracy")
        return {"status": "ok", "version": VERSION, "waiting": len(service.jobs),
                "model": {name: self._reader.config.get(name) for name in told}}

    def _answer_description(self, service):
        """GET /openapi.json"""
        return describe_service(self.label)

    def _answer_page(self, service):
        """GET /: a page that reads what is dropped on it, with the first three images to try."""
        paths = sorted((HOME / "dataset" / "test").glob("*.png"))[:3]
        samples = [SAMPLE % _data_url(path.read_bytes()) for path in paths]
        return _page(PAGE, samples="".join(samples), net=self._reader.config["net"])

    MAX_SENT = 100_000_000  # bytes of a request; more are refused before they are sent
    CONNECTIONS = 450  # at once, see `_make_room`; Windows can wait for 512

    def start(self):
        """Serves until Ctrl-C or SIGTERM, then finishes the requests under way.

        Raises `Error` for settings that cannot be served.
        """
        if not Path(self.image_root).is_dir():
            raise self.Error(f"--image-root {self.image_root} is not a folder")
        listening = self._listen()
        app = self.create_app()
        server = waitress.create_server(
            app, sockets=[listening], ident=None, max_request_header_size=32_768,
            max_request_body_size=self.MAX_SENT, connection_limit=500, threads=100,
            cleanup_interval=1, channel_timeout=20,  # seconds
            outbuf_overflow=100_000_000)  # more of an answer goes to the disk
        accept = server.handle_accept
        server.handle_accept = lambda: [accept() for _ in range(20)]  # not one between two rounds
        serve = functools.partial(  # receives and sends what can be, after 0.1 seconds at most
            server.asyncore.loop, 0.1, use_poll=True, map=server._map, count=1)
        # While its threads are still starting, it would say that requests wait for them.
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        waitress.utilities.Error.to_response = _json_parse_error  # waitress has no settings for it
        waitress.channel.HTTPChannel.parser_class = _request_parser(self._admits)
        host = f"[{self.host}]" if ":" in self.host else self.host
        address = f"http://{host}:{server.effective_port}"
        with _deferred_stop() as stop:
            _say(f"{address}/captchaOcr?img_path=./dataset/test/0_PIY.png")
            self._say_model()
            if self.label:
                _say(f"label {self.label} on {address}/label")
            while not stop:
                serve()
                _make_room(server.active_channels.values())
            # Takes no more connections, and answers the requests under way, for 4 seconds at most.
            app.extensions["lstm_ctc_ocr"].pool.shutdown(wait=False)
            server.del_channel()
            server.socket.shutdown(socket.SHUT_RD)  # who comes now is refused, rather than cut off
            deadline = time.monotonic() + 4
            while time.monotonic() < deadline and any(
                    channel.requests or channel.total_outbufs_len
                    for channel in server.active_channels.values()):
                serve()

    def _listen(self):
        """Returns a socket that listens; raises `Error` if the address cannot be had."""
        try:
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            listening = socket.create_server((self.host, self.port), family=family, backlog=1024)
        except (OSError, UnicodeError) as error:
            raise self.Error(f"cannot serve on {self.host}:{self.port} ({error}); choose another "
                             "--port or --host") from None
        if self.host not in ("127.0.0.1", "localhost", "::1"):
            _say("other machines can reach this service, all images under "
                 f"{self.image_root}, and those to label: set --token to keep strangers out")
        return listening

    # ------------------------------------------------------------------ labelling page

    UNREAD = "", 2  # the guess of an image that is not read yet; it comes after all others

    @dataclasses.dataclass
    class _Labelling:
        """Images of a folder that are labelled on the page /label; a name is a path in there."""
        folder: Path  # links resolved
        labels: dict  # by name
        guesses: dict  # by name (text, confidence), of all that can be read; `UNREAD` at first
        unread: object  # iterator over the names of those that are still to be read
        read: object  # function from paths to readings, see `_read_each`
        skipped: collections.Counter  # how often, by name
        lock: object  # held to write

        def left(self):
            """Returns the names of the images that have no label."""
            return [name for name in list(self.guesses) if name not in self.labels]

        def guess(self, name):
            """Reads an image and returns its guess, or None if it has gone or cannot be read.

            Such an image is named on stderr and dropped.
            """
            reading, = self.read([self.folder / name], (), True)
            if isinstance(reading, LstmCtcOcr.Error):
                _say(reading)
                self.guesses.pop(name, None)
                return None
            self.guesses[name] = reading
            return reading

        def show(self, asked=""):
            """Returns what the page shows: the image asked for if it is there, else the next one.

            Next comes the image that was skipped least often, and of those the least surely read.
            When all images have a label, the path is empty.
            """
            def order(name):
                return self.skipped[name], self.guesses.get(name, LstmCtcOcr.UNREAD)[1]

            shown = {"path": ""}
            while name := asked if asked in self.guesses else min(
                    self.left(), key=order, default=""):
                if guess := self.guess(name):
                    text, confidence = guess
                    image = _data_url((self.folder / name).read_bytes())
                    shown = {"path": name, "image": image, "confidence": confidence,
                             "text": self.labels.get(name, text)}
                    break
            labelled = len(self.labels)
            return {**shown, "labelled": labelled, "images": labelled + len(self.left())}

        def write(self, name, label):
            """Adds a line to the list of labels, whole or not at all; it is then on the disk."""
            with self.lock:
                before, line = self.listed(), io.StringIO()
                sign = ";" if ";" in before.partition("\n")[0] else ","
                csv.writer(line, delimiter=sign, lineterminator="\n").writerow([name, label])
                before = before and before.removesuffix("\n") + "\n"  # the last line may lack it
                _replace(self.folder / LABELS, before + line.getvalue(), durable=True)
                self.labels[name] = label

        def listed(self):
            """Returns the text of the list of labels; raises `Error` if that is not UTF-8."""
            path = self.folder / LABELS
            text = path.read_bytes().decode(errors="replace") if path.exists() else ""
            if re.search(NO_UTF8, text):
                raise LstmCtcOcr.Error(f"{path} is no CSV file in UTF-8 but perhaps in GBK, cp1252 "
                                       "or UTF-16: save it in UTF-8, or move it away")
            return text

    def _open_labelling(self):
        """Returns the state of labelling the folder `label`; raises `Error` if it has no images."""
        folder = Path(os.path.realpath(self.label))
        names, others = _files_in(folder)
        guesses = {name: self.UNREAD for name in names  # only those that really are in there
                   if _one_form(name).isprintable() and _file_under(folder, folder / name)}
        if hidden := len(names) - len(guesses):
            _say(f"{hidden} images are not shown on the page: links that lead out of {folder}, or "
                 "names that cannot be printed")
        if not guesses:
            raise self.Error(f"no images in {self.label}: --label takes the folder of those that "
                             "you want to label")
        labels, _ = self._listed(folder, names, others)
        unread = iter([name for name in guesses if name not in labels])
        labelling = self._Labelling(folder, labels, guesses, unread, self._read_each,
                                    collections.Counter(), threading.Lock())
        labelling.listed()
        return labelling

    def _guess_all(self, service):
        """Reads the next image to label, then lets requests be read, and goes on with the others.
        """
        if name := next(service.labelling.unread, None):
            service.labelling.guess(name)
            service.pool.submit(self._guess_all, service)  # refused once the pool is closed

    def _answer_label_page(self, service):
        """GET /label: the page to label images on. From then on they are read, to guess."""
        with contextlib.suppress(RuntimeError):  # the service is stopping
            service.pool.submit(self._guess_all, service)
        return _page(LABEL_PAGE)

    LONGEST_LABEL = 100  # letters; a line of a list cannot be as long as a client likes

    def _answer_label(self, service):
        """POST /label: writes an image's label, or without one skips it; answers with the next."""
        request, labelling = flask.request, service.labelling
        # A browser always says its page's origin; where it came over https, also how that is to us.
        origin = request.headers.get("Origin", request.host).rpartition("/")[2]
        own = "same-origin" if origin == request.host else "another"
        if request.headers.get("Sec-Fetch-Site", own) != "same-origin":
            flask.abort(403, "labels are taken from this service's own page, and from no other; a "
                             "proxy must pass the browser's Host on (nginx: proxy_set_header Host "
                             "$http_host)")
        body = _json_body()
        name, label = str(body.get("path")), _one_form(str(body.get("label") or "")).strip()
        if name not in labelling.guesses:
            flask.abort(400, 'send JSON: {"path": an image of the folder, "label": its text}')
        if len(label) > self.LONGEST_LABEL or not label.isprintable():
            flask.abort(400, f"a label has at most {self.LONGEST_LABEL} letters, and holds no "
                             "control characters")
        if label:
            labelling.write(name, label)
        else:
            labelling.skipped[name] += 1
        return labelling.show()

    def _answer_image_to_label(self, service):
        """GET /label/image?path=P: shows the image P if it is there, else the next one to label."""
        return service.labelling.show(flask.request.args.get("path"))

    # ------------------------------------------------------------------ export

    def export(self, target):
        """Writes the model in a form that needs nothing of this project.

        target: a new folder, which becomes a SavedModel, or a new file FILE.onnx.
        Raises `Error` if it is there already.
        """
        target = Path(target)
        is_onnx = target.suffix.lower() == ".onnx"
        for path in (target, target.with_suffix(".json")) if is_onnx else (target,):
            if path.exists():
                raise self.Error(f"{path} is there already: name a new folder or file")
        takes = self._export_onnx(target) if is_onnx else self._export_saved_model(target)
        _say(f"{target} takes {takes}")

    def _export_saved_model(self, directory):
        """Writes a SavedModel: ink uint8 -> text (B,) string, confidence (B,) float32.

        The ink is B images as `load_image` gives them, or fewer of their columns. Each is read
        once, with TensorFlow's beam search. Right-to-left letters come in the order from the left,
        see `turned`. Returns a description of the input.
        """
        tf, folder = _tensorflow(), self._model_to_read()
        ocr, config, weights = self._load_model(folder)
        with tf.Graph().as_default(), tf.Session(config=_session_config()) as session, \
                _constants(weights, folder):
            net = ocr._build_reading(ocr._build_input(), config.get("temperature", 1))
            classes = 1 + tf.sparse.to_dense(net.sparse, default_value=-1)  # 0: the text has ended
            text = tf.strings.reduce_join(tf.gather(ocr._written(), classes), axis=1)
            graph, = _written_by(lambda folder: tf.saved_model.simple_save(
                session, folder, {"ink": net.images},
                {"text": text, "confidence": net.confidence})).values()
        with self._writing(directory):
            directory.parent.mkdir(parents=True, exist_ok=True)
            # The folder appears whole or not at all.
            with tempfile.TemporaryDirectory(prefix=".", dir=directory.parent) as part:
                os.mkdir(f"{part}/model")
                Path(part, "model", "saved_model.pb").write_bytes(graph)
                os.replace(f"{part}/model", directory)
        return f"ink (images, {ocr.im_height}, columns) uint8"

    def _written(self):
        """Returns what each class adds to a text in an export, the blank first.

        Of a letter's several parts the middle one adds it, if the letter is to be read.
        """
        letters = self.letters or self.words
        return [""] + [letter if part == self.label_parts // 2 and letter in letters else ""
                       for letter in self.words for part in range(self.label_parts)]

    METADATA = "lstm_ctc_ocr"  # the name of config.json in an ONNX file; others add more metadata

    def _export_onnx(self, path):
        """Writes an ONNX file of standard operators, and beside it the .json that ddddocr needs.

        Its input: images (B, 1 or 3 channels, H, w) float32, 0 to 1, already scaled to the height
        H; w is any width from H / 16. Negative numbers, 0 to -255, are an image that `load_image`
        has prepared.
        Its output: scores (T, B, C) float32, the logarithms of probabilities, the blank first.
        Its metadata hold the model's config.json. Returns a description of the input.
        """
        onnx = _package("onnx", "write ONNX files")
        ocr, config, weights = self._load_model(self._model_to_read())
        temperature = np.float32(config.get("temperature", 1))
        for name in "dense/kernel", "dense/bias":  # the blank, last in ours, comes first
            weights[name] = np.roll(weights[name], 1, axis=-1) / temperature
        graph = onnx.GraphProto(name="lstm_ctc_ocr")
        ocr._onnx_network(functools.partial(_add_to_onnx, onnx, graph), weights)
        value, real = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
        graph.input.append(
            value("images", real, ["batch", "channels", ocr.im_height, "width"]))
        graph.output.append(
            value("scores", real, ["steps", "batch", weights["dense/bias"].size]))
        model = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
        onnx.helper.set_model_props(model, {self.METADATA: json.dumps(config)})
        # ddddocr drops repeated classes, and joins what the charset has for the others.
        settings = {"charset": ocr._written(), "word": False,
                    "image": [-1, ocr.im_height], "channel": 3}
        beside = path.with_suffix(".json")
        self._write(path.parent, path.name, model.SerializeToString())
        self._write(path.parent, beside.name, json.dumps(settings) + "\n")
        return (f"images (1 or 3 channels, {ocr.im_height} rows, any width, 0 to 1); "
                f"{beside} is for ddddocr")

    def _onnx_network(self, add, weights):
        """Adds the network's operations to an ONNX graph, from "images" to "scores".

        add: adds one operation, see `_add_to_onnx`. weights: {name: array} as in TensorFlow.
        """
        network = NETWORKS[self.net]

        def convolution(x, name, strides=(1, 1)):
            kernel, *norm = (weights[f"{name}/{part}"]
                             for part in ("kernel", "scale", "offset", "mean", "variance"))
            kernel = kernel.transpose(3, 2, 0, 1)
            x = add("Conv", x, kernel, strides=strides, auto_pad="SAME_UPPER")
            return add("BatchNormalization", x, *norm, epsilon=self.NORM_EPSILON)

        def dense(x, name):
            return add("Add", add("MatMul", x, weights[f"{name}/kernel"]), weights[f"{name}/bias"])

        x = add("Mul", self._onnx_ink(add), np.float32(3 / 255))  # (B, 1 or 2, H, W)
        for number, (_, _, down, across, blocks) in enumerate(network.convolutions, 1):
            name = f"convolution{number}"
            x = add("Relu", convolution(x, name, (down, across)))  # (B, channels, h, T)
            for block in range(1, blocks + 1):
                y = add("Relu", convolution(x, f"{name}/residual{block}a"))
                x = add("Relu", add("Add", x, convolution(y, f"{name}/residual{block}b")))
        x = add("Transpose", x, perm=[3, 0, 2, 1])
        x = add("Reshape", x, [0, 0, -1])  # (T, B, h * channels)
        if network.convolutions:
            x = add("Relu", dense(x, "projection"))
        x = self._onnx_lstm(add, x, weights)
        add("LogSoftmax", dense(x, "dense"), axis=2, name="scores")

    def _onnx_lstm(self, add, x, weights):
        """Adds the LSTM layers to an ONNX graph: x (T, B, I) -> (T, B, N of all directions)."""
        both = NETWORKS[self.net].convolutions
        layers = np.stack([np.vstack([weights[f"{name}/kernel"], weights[f"{name}/bias"]])
                           for name in (("forward", "backward") if both else ("lstm",))])
        i, c, f, o = np.split(layers, 4, axis=2)  # (directions, I + N + 1, N) each
        f[:, -1] += 1  # BlockLSTM adds it to the bias, ONNX does not
        gates, cells = np.concatenate([i, o, f, c], axis=2).transpose(0, 2, 1), i.shape[2]
        kernel, recurrent, bias = np.split(gates, [-cells - 1, -1], axis=2)
        biases = np.hstack([bias, 0 * bias])[..., 0]  # ONNX has a second one
        x = add("LSTM", x, kernel, recurrent, biases, hidden_size=cells,
                direction="bidirectional" if both else "forward")
        x = add("Transpose", x, perm=[0, 2, 1, 3])  # (T, B, directions, N)
        return add("Reshape", x, [0, 0, -1])

    def _onnx_ink(self, add):
        """Adds `ink_of` to an ONNX graph: "images" -> ink (B, 1 or 2, H, w) of 0 to 255.

        Of colours, a network of two inks gets all ink twice; clutter is not removed.
        """
        prepared = add("Relu", add("Neg", "images"))  # 0 for colours
        prepared = add("Gather", prepared, [0, -1][:1 + len(NETWORKS[self.net].inks)], axis=1)
        colours = add("Relu", "images")  # 0 for prepared ink
        edge = max(1, self.im_height // 16)
        border = (add("Gather", colours, range(-edge, edge), axis=axis) for axis in (2, 3))
        along = add("Concat", *(add("Reshape", part, [0, 0, -1, 1]) for part in border), axis=2)
        half = add("Div", add("Shape", along, start=2, end=3), [2])
        lower_half = add("TopK", along, add("Add", half, [1]), axis=2, largest=0)
        paper = add("ReduceMax", lower_half, [2])  # the median, as in `_paper_of`
        ink = add("ReduceMax", add("Abs", add("Sub", colours, paper)), [1])
        strongest = add("Max", add("ReduceMax", ink, [2, 3]), np.float32(MIN_CONTRAST))
        ink = add("Round", add("Mul", ink, add("Div", np.float32(255), strongest)))
        return add("Add", ink, prepared)


def _add_to_onnx(onnx, graph, kind, *inputs, name=None, **attributes):
    """Adds an operation to an ONNX graph and returns the name of its first output.

    inputs: names of other operations' outputs, or arrays. attributes: as ONNX defines them.
    """
    name, names = name or f"{kind}_{len(graph.node)}", []
    for each in inputs:
        if not isinstance(each, str):
            array, each = np.asarray(each), f"constant_{len(graph.initializer)}"
            graph.initializer.append(onnx.numpy_helper.from_array(array, each))
        names.append(each)
    outputs = [name, f"{name}_places"] if kind == "TopK" else [name]
    graph.node.append(onnx.helper.make_node(kind, names, outputs, **attributes))
    return name


def _onnx_session(runtime, data, threads):
    """Opens the bytes of an ONNX file; each reading uses so many threads."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # print nothing: every error is raised too
    return runtime.InferenceSession(data, options, ["CPUExecutionProvider"])


# ---------------------------------------------------------------------- captchas of every look

# Tables say what captchas are made of: colours, letter styles, letter patterns, papers, clutter,
# warps and degradations. A row holds a thing and how often it occurs. To add a kind, write a small
# function and a row. Pictures are (c, h, w) float32 here, 0 to 255: that is the fastest to blend.

def draw_varied(text, seed, fonts):
    """Draws a captcha in a look that the seed decides; returns (h, w, 3) uint8, BGR.

    fonts: (path, its letters) of each. The image is 15 to 90 pixels high, and as wide as its text.
    """
    chance = random.Random(seed)
    height = round(chance.choice((15, 22, 45, 45)) * chance.uniform(1, 2))
    size = max(13, height * chance.triangular(.25, 1.05, .9))
    placed, width = _place_letters(chance, fonts, text, height, size)
    paper, contrast = _colour(chance, PAPER_COLOURS), chance.choice((35, 50, 75, 100, 125))
    look = LstmCtcOcr._Look(
        chance, np.random.default_rng(chance.getrandbits(64)), (height, width), size, paper,
        _contrasting(chance, paper, contrast), contrast)
    letters, canvas = _draw_letters(look, placed), _draw_paper(look)
    _clutter(look, canvas, over=False)
    if chance.random() < .5:
        letters = _warp(look, letters, chance.uniform(.6, 1.6), cv2.BORDER_CONSTANT)
    canvas = canvas * (1 - letters[3]) + letters[:3]
    _clutter(look, canvas, over=True)
    return _as_pixels(_apply(look, canvas, DEGRADATIONS))


def _pick(chance, table):
    """Returns one of the things in a table of (thing, weight)."""
    things, weights = zip(*table)
    return chance.choices(things, weights)[0]


def _some(chance, share, low, high):
    """Returns a number from low to high for that share of captchas, else 0."""
    return chance.uniform(low, high) if chance.random() < share else 0


def _apply(look, picture, table):
    """Changes a picture by functions of a table, (function, share of captchas that it changes)."""
    for change, share in table:
        if look.chance.random() < share:
            picture = change(look, picture)
    return picture


def _blend(picture, opacity, colour):
    """Lays a colour over a picture, in place; opacity: (h, w) or (3, h, w), 0 to 1."""
    picture += opacity * (colour - picture)


def _as_pixels(canvas):
    """Rounds a canvas (3, h, w) to the pixels of an image: (h, w, 3) uint8."""
    return np.dstack(np.uint8(np.clip(canvas, 0, 255)))


# A row of colours holds the least and the most that each of B, G and R may be.

PAPER_COLOURS = (((255, 255), 28), ((195, 255), 28), ((0, 0), 9), ((0, 90), 11), ((90, 170), 12),
                 ((0, 255), 12))
INK_COLOURS = ((0, 255), 80), ((0, 0), 13), ((255, 255), 7)


def _colour(chance, table=INK_COLOURS):
    """Draws a colour: (3, 1, 1) float32."""
    low, high = _pick(chance, table)
    channels = chance.choice((1, 3, 3, 3))  # a quarter of the colours are grey
    values = [chance.uniform(low, high) for _ in range(channels)]
    return np.resize(np.float32(values), (3, 1, 1))


def _contrast(colour, other=0):
    """Returns how well one tells two colours apart by brightness, or else by hue: 0 to 255."""
    away = np.ravel(colour - other)
    return max(abs(np.dot((.114, .587, .299), away)), .3 * max(abs(away)))


def _contrasting(chance, other, least):
    """Chooses a colour that has at least so much contrast to another one.

    least: at most 127, so that black or white always fits.
    """
    colour = _colour(chance)
    while _contrast(colour, other) < least:
        colour = _colour(chance)
    return colour


# Fonts that draw something else for a letter.
SYMBOL_FONT = re.compile("symbol|dingbat|wingd|webdings|ornament|D050000L", re.I)


@functools.cache
def _find_fonts(folders, words):
    """Finds the fonts under folders, sorted by name: (path, the letters of `words` that it has).

    Raises `Error` if no font has a letter.
    """
    paths = {path for folder in folders for path in Path(folder).expanduser().rglob("*")
             if path.suffix.lower() in (".ttf", ".otf") and not SYMBOL_FONT.search(path.name)}
    fonts = tuple((str(path), letters)
                  for path in sorted(paths, key=lambda path: (path.name, path))
                  if len(letters := _letters_of(str(path), words)) > len(words) / 2)
    if unfit := sorted(set(words).difference(*(letters for _, letters in fonts))):
        raise LstmCtcOcr.Error(f"cannot render {unfit}: no font has them; give other --words, or "
                               "with --look varied --fonts a folder of fonts that do")
    return fonts


def _letters_of(font, words):
    """Finds out which of the letters `words` a font has.

    It lacks a letter if it draws a box for it, or the capital for a small letter.
    """
    try:
        shapes = {letter: bytes(_face(font, 12).getmask(letter))
                  for letter in {*words, *words.upper(), "\uffff"}}
    except OSError:  # no font after all
        return ""
    return "".join(letter for letter in words
                   if (any(shapes[letter]) or letter == " ") and shapes[letter] != shapes["\uffff"]
                   and (letter == letter.upper() or shapes[letter] != shapes.get(letter.upper())))


@functools.lru_cache(4096)
def _face(font, size):
    # Not every Pillow has the other layout engine.
    return ImageFont.truetype(font, size, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(32768)
def _glyph(font, letter, size):
    """Draws a letter: (h, w) uint8 with a margin, y of its middle from the baseline, advance."""
    face = _face(font, size)
    mask, (_, top) = face.getmask2(letter, "L", anchor="ls")
    pixels = np.asarray(mask, np.uint8).reshape(mask.size[::-1])
    return np.pad(pixels, size // 8 + 1), top + mask.size[1] / 2, face.getlength(letter)


GLYPH_SIZES = 20, 34, 58  # pixels an em; glyphs are drawn at these sizes, cached, and then scaled
MAX_ASPECT = 4.3  # width / height, about; letters that are far apart move closer to keep it


def _place_letters(chance, fonts, text, height, size):
    """Chooses font, size, angle and place of every letter.

    Returns [(glyph, matrix (2, 2) that turns and scales it, x and y of its middle, whether it has
    no half-transparent pixels)], and the width of the image, in pixels.
    """
    level, crisp = GLYPH_SIZES[bisect.bisect(GLYPH_SIZES[:-1], .9 * size)], chance.random() < .2
    if crisp:  # small glyphs get large squares, as those of a bitmap font
        level = chance.choice((level, chance.randint(9, 14)))
    # A plus, turned further, looks like a times.
    swing = _some(chance, .7, 5, 50 if text.isalnum() else 30)
    slant, slope = _some(chance, .5, -.35, .35), _some(chance, .33, -.12, .12)
    stretch = 1 + _some(chance, .33, -.25, .3)
    loose = chance.uniform(1, max(1, .8 * height / size))  # small letters are often far apart
    shrink, jitter = _some(chance, .6, .05, .35), loose * _some(chance, .67, .05, .25)
    # Of letters, in widths of a letter: half of them closer than .98.
    spacing = min(loose * (.65 + 1.7 * chance.random() ** 2.3),
                  max(.8, MAX_ASPECT * height / (len(text) * .6 * size * stretch)))
    able = [path for path, letters in fonts if not text.strip(letters)]
    font = chance.choice(able) if able and chance.random() < .7 else None
    x, y, placed = 0, height - (height - .72 * size) * chance.uniform(.07, .93), []
    for letter in text:
        path = font or chance.choice([path for path, letters in fonts if letter in letters])
        glyph, middle, advance = _glyph(path, letter, level)
        scale = size / level * (1.1 - chance.uniform(0, shrink))
        turned = cv2.getRotationMatrix2D((0, 0), chance.uniform(-swing, swing), scale)[:, :2]
        matrix = turned @ [[stretch, slant], [0, 1]]
        width = advance * stretch * scale
        down = y + middle * scale + chance.uniform(-jitter, jitter) * size
        down = np.clip(down, .24 * size, height - .24 * size)
        placed.append((glyph, matrix, x + width / 2, down))
        x += width * chance.uniform(spacing, 1.15 * spacing)
        y += slope * height / len(text)
    extent, margins = x - width * (spacing - 1), height * (2.2 * chance.random() ** 3 - .08)
    whole = int(max(extent + margins, height * chance.uniform(.9, 3)))
    left = (whole - extent) * chance.choice((.5, chance.uniform(.1, .9)))
    return [(glyph, matrix, left + x, y, crisp) for glyph, matrix, x, y in placed], whole


def _stamp(layer, glyph, matrix, x, y, colour, crisp):
    """Draws a glyph over a layer (4, h, w) as in `_draw_letters`, with its middle at x, y.

    crisp: without half-transparent pixels at its edges.
    """
    offset = (x, y) - matrix @ np.array(glyph.shape[::-1]) / 2
    drawn = cv2.warpAffine(glyph, np.column_stack((matrix, offset)), layer.shape[:0:-1],
                           flags=cv2.INTER_NEAREST if crisp else cv2.INTER_LINEAR)
    left, top, width, height = cv2.boundingRect(drawn)
    part = np.s_[..., top:top + height, left:left + width]
    opacity = drawn[part] / np.float32(255)
    if crisp:
        opacity = opacity > .3
    _blend(layer[:3][part], opacity, colour)
    _blend(layer[3][part], opacity, 1)


def _gridded(look, layer):
    """Makes letters of stripes, dots or squares."""
    step = look.chance.uniform(2, max(3, look.size / 10))
    # Wider strokes, so that none of them runs between two rows of dots.
    wide = cv2.dilate(np.dstack(layer), np.ones([int(step)] * 2)).transpose(2, 0, 1)
    return wide * _grid(look, look.chance.choice((1, 9)), step)


def _sparse(look, layer):
    """Takes pixels out of letters, more of them if the letters are large."""
    kept = look.chance.uniform(.2 if look.size > 34 else .4, .8)
    return layer * (look.noise.random(look.shape) < kept)


def _fading(look, layer):
    """Lets letters fade into another colour from one side to the other, or from part to part."""
    other = _contrasting(look.chance, look.paper, look.contrast)
    share = look.chance.choice((_gradient, _texture))(look, 0)
    _blend(layer[:3], np.clip(share, 0, 1), layer[3] * other)
    return layer


LETTER_PATTERNS = (_fading, .13), (_gridded, .1), (_sparse, .06)

# A style draws a letter in steps: (morphological change of the glyph, its size in strokes, shift to
# the side and down). One step has the letter's colour; of more, the first has another colour, the
# second the letter's, the third that of the paper.
LETTER, EDGE = (cv2.MORPH_DILATE, 0, 0), (cv2.MORPH_DILATE, 2, 0)
HOLLOW = cv2.MORPH_GRADIENT, 1, 0
STYLES = (
    ([LETTER], 47),
    ([(cv2.MORPH_DILATE, 1, 0)], 8),  # bold
    ([HOLLOW], 14),
    ([(cv2.MORPH_GRADIENT, 1, .6), HOLLOW], 4),
    ([EDGE, LETTER], 8),  # with an edge
    ([(cv2.MORPH_DILATE, 0, 1), LETTER], 8),  # with a shadow
    ([EDGE, EDGE, LETTER], 7),  # hollow, and hides what it overlaps
    ([(cv2.MORPH_DILATE, 99, 0), LETTER], 4),  # on a tile
)


def _draw_letters(look, placed):
    """Draws the text: (4, h, w), which is B, G and R times the opacity, and the opacity, 0 to 1."""
    chance, layer = look.chance, np.zeros((4, *look.shape), np.float32)
    style, ink, other = _pick(chance, STYLES), look.ink, _contrasting(chance, look.ink, 40)
    stroke, right = chance.uniform(.04, .07), chance.choice((-1, 1))
    several = chance.random() < .3
    for glyph, matrix, x, y, crisp in placed:
        if several:
            ink = _contrasting(chance, look.paper, look.contrast)
            other = _contrasting(chance, ink, 40)
        colours = (other, ink, look.paper)[len(style) == 1:]
        for (change, strokes, shift), colour in zip(style, colours):
            kernel = np.ones([1 + strokes * max(1, round(stroke * len(glyph)))] * 2)
            away = shift * max(1, look.size / 16)
            _stamp(layer, cv2.morphologyEx(glyph, change, kernel), matrix, x + right * away,
                   y + away, colour, crisp)
    if look.size > 26 and style[0][1] < 99:  # small ones and tiles could not be read any more
        layer = _apply(look, layer, LETTER_PATTERNS)
    return layer


# Patterns, of papers and clutter, are functions of a look and of a thickness in pixels. They return
# the opacity of each pixel, (h, w) or (1 or 3, h, w), 0 to 1.

def _places(look):
    """Returns x and y of each pixel: (2, h, w) float32."""
    return np.float32(np.indices(look.shape)[::-1])


def _along(look, angle):
    """Returns how far each pixel lies in a direction: (h, w) float32, in pixels."""
    x, y = _places(look)
    return x * math.cos(angle) + y * math.sin(angle)


def _bands(look, distance, thickness, step=None):
    """Draws bands where a distance (h, w) is near to a multiple of `step`, all in pixels.

    A band is two thirds of the thickness wide, and at most two thirds of a step.
    """
    step = step or look.chance.uniform(.08, .4) * look.shape[0]
    from_middle = abs((distance + look.chance.uniform(0, step)) % step - step / 2)
    return np.clip(min(thickness, step) / 3 + .5 - from_middle, 0, 1)


def _spots(look, channels, grain, method=cv2.INTER_CUBIC):
    """Draws random values, 0 to 1, one every `grain` pixels, and scales them: (channels, h, w)."""
    rows, columns = (int(length / grain) + 2 for length in look.shape)
    spots = look.noise.random((channels, rows, columns), np.float32)
    return np.stack([cv2.resize(one, look.shape[::-1], interpolation=method) for one in spots])


def _gradient(look, thickness):
    rise = _along(look, look.chance.uniform(0, 2 * math.pi))
    return cv2.normalize(rise, None, 0, 1, cv2.NORM_MINMAX)


# As `_spots` takes.
TEXTURES = (1, 1, 3), (1, 1, 2, 4, 10, 16), (cv2.INTER_CUBIC, cv2.INTER_NEAREST)


def _texture(look, thickness):
    return _spots(look, *map(look.chance.choice, TEXTURES))


def _grid(look, thickness, step=None):
    """Draws stripes, or two sets of them across one another; step: as `_bands` takes it."""
    angle = look.chance.choice((0, math.pi / 2, look.chance.uniform(0, math.pi)))
    one, other = (_bands(look, _along(look, angle + turn), thickness, step)
                  for turn in (0, math.pi / 2))
    return look.chance.choice((one, np.maximum(one, other), abs(one - other), one * other))


def _ripples(look, thickness):
    """Draws rings around one point."""
    middle = look.noise.uniform(0, look.shape[1], (2, 1, 1))
    return _bands(look, np.hypot(*(_places(look) - middle)), thickness)


def _dots(look, thickness):
    grain = max(1, look.chance.choice((0, 0, 2, 3, 4)) * look.shape[0] / 45)
    return _spots(look, 1, grain) > 1 - 10 ** look.chance.uniform(-2.3, -.8)


def _small_letters(look, thickness):
    mask = np.zeros(look.shape, np.uint8)
    for place in np.int32(_points(look, look.chance.randint(5, 30))):
        cv2.putText(mask, look.chance.choice(CAPITALS), place, look.chance.randint(0, 7), .4, 255)
    return mask / np.float32(510)


def _border(look, thickness):
    inside = np.zeros(np.subtract(look.shape, 2 * thickness), np.float32)
    return np.pad(inside, thickness, constant_values=1)


def _many(make, least, most, filled=False):
    """Returns a pattern of that many lines, or fewer thick ones, or of that many filled shapes.

    make: a function of a look that chooses the points of one, (n, 2), x and y in pixels.
    """
    def pattern(look, thickness):
        mask, number = np.zeros(look.shape, np.uint8), look.chance.randint(least, most)
        for _ in range(number if filled else max(1, number // thickness)):
            points = [np.int32(make(look) * 8)]
            if filled:
                cv2.fillPoly(mask, points, look.chance.randint(90, 160), cv2.LINE_AA, shift=3)
            else:
                cv2.polylines(mask, points, False, 255, thickness, cv2.LINE_AA, shift=3)
        return mask / np.float32(255)

    return pattern


def _points(look, number):
    """Chooses points in the image or a little beyond it: (number, 2), x and y."""
    return look.noise.uniform(-.1, 1.1, (number, 2)) * look.shape[::-1]


def _line(look):
    """Chooses a straight line or a curve, often across the whole image.

    Some have waves, some begin with a ring or a hook.
    """
    chance, points = look.chance, _points(look, look.chance.choice((2, 2, 3, 4)))
    if chance.random() < .6:
        points[:, 0] = np.linspace(-.05, 1.05, len(points)) * look.shape[1]
    line = cv2.resize(points, (2, 32), interpolation=cv2.INTER_CUBIC)  # a smooth way through them
    waves = np.sin(np.linspace(0, chance.uniform(2, 25), 32))
    line[:, 1] += waves * _some(chance, .25, .05, .3) * look.shape[0]
    if chance.random() < .2:
        hook = _oval(look)
        line = np.concatenate((hook, line - line[0] + hook[-1]))
    return line


def _hair(look):
    return _points(look, 1) + look.noise.normal(0, look.shape[0] / 12, (2, 2))


def _oval(look):
    """Chooses a circle or an ellipse, or a part of one."""
    chance, whole = look.chance, 2 * math.pi
    turns = np.linspace(0, chance.choice((whole, chance.uniform(.7, 5))), 40)
    slant = chance.choice((whole / 4, chance.uniform(.5, 2.6)))  # the first makes a circle
    oval = np.cos(np.column_stack((turns, turns + slant)) + chance.uniform(0, whole))
    return _points(look, 1) + oval * look.shape[0] * 10 ** chance.uniform(-1, .1)


def _polygon(look):
    return _points(look, look.chance.randint(3, 5))


BLOTS = _many(_oval, 1, 4, filled=True)
PAPERS = ((None, 43), (_gradient, 13), (_texture, 17), (_grid, 10), (_ripples, 8),
          (_many(_polygon, 2, 8, filled=True), 9))


def _draw_paper(look):
    """Draws the paper with nothing on it: (3, h, w)."""
    canvas, pattern = np.full((3, *look.shape), look.paper), _pick(look.chance, PAPERS)
    if pattern:
        # Its second colour is so near to the first that letters stand out from both.
        away = _colour(look.chance) - look.paper
        room = .42 * _contrast(look.ink, look.paper) / max(_contrast(away), 20)
        _blend(canvas, pattern(look, look.chance.randint(2, 16)), look.paper + away * min(1, room))
    return canvas


CLUTTER = ((_many(_line, 1, 6), 40), (_dots, 25), (_grid, 10), (_many(_hair, 8, 50), 7),
           (_many(_oval, 1, 12), 13), (BLOTS, 5), (_border, 6), (_small_letters, 5), (_ripples, 3))


def _clutter(look, canvas, over):
    """Draws lines, dots and the like on the canvas (3, h, w), in place.

    over: over the letters, where they may also have the colour of the paper.
    """
    chance = look.chance
    for _ in range(chance.choice((0, 0, 0, 1, 1, 2))):
        opacity = np.float32(1 - _some(chance, .45, .2, .85))
        # What is faint may be thicker than a stroke of a letter, and still nobody takes it for one.
        thickness = chance.uniform(.25, 1.2) * look.size / 11 / math.sqrt(opacity)
        share = _pick(chance, CLUTTER)(look, max(1, round(thickness)))
        if chance.random() < .2:
            share = share > .3
        colour = _pick(
            chance, ((look.ink, 6), (look.paper, 3 * over), (_colour(chance), 5), (None, 4)))
        if colour is None:  # many colours
            colour = 255 * _texture(look, thickness)
        _blend(canvas, share * opacity, colour)


# Warps are functions of a look, a force of about 1, and the places of pixels, (2, h, w), x and y
# in heights of the image. They return how far the pixels move, (2, h, w).

def _wave(look, force, places):
    """Bends rows and columns into waves."""
    turn = places[::-1] * (2 * math.pi / look.chance.uniform(.5, 3)) + look.chance.uniform(0, 7)
    return force * look.noise.uniform(0, .1, (2, 1, 1)) * np.sin(turn)


def _dents(look, force, places):
    spots = _spots(look, 2, look.shape[0] / look.chance.uniform(3, 5))
    return force * look.chance.uniform(.07, .2) * (spots - .5)


def _lens(look, force, places):
    away = places - places[:, -1:, -1:] * look.noise.uniform(.2, .8, (2, 1, 1))
    near = np.clip(1 - np.hypot(*away) / look.chance.uniform(.6, 1.5), 0, 1)
    return away * near * force * look.chance.uniform(-.3, .3)


def _jolts(look, force, places):
    """Moves rows, or single pixels."""
    size = 2, look.shape[0], look.chance.choice((1, look.shape[1]))
    return look.noise.normal(0, force * look.chance.uniform(.01, .03), size)


WARPS = (_wave, 45), (_dents, 38), (_lens, 12), (_jolts, 10)


def _warp(look, picture, force=.5, edge=cv2.BORDER_REPLICATE):
    """Bends a picture (c, h, w); edge: what is beyond it, a `borderMode` of OpenCV."""
    height, places = look.shape[0], _places(look) / look.shape[0]
    for _ in range(look.chance.choice((1, 1, 2))):
        places = places + _pick(look.chance, WARPS)(look, force, places)
    return cv2.remap(np.dstack(picture), *np.float32(places * height), cv2.INTER_LINEAR,
                     borderMode=edge).transpose(2, 0, 1)


# Degradations are functions of a look and of the canvas, (3, h, w). They return the canvas.

def _swapped(look, canvas):
    """Lets ink and paper change places: in blots, or on one side."""
    pattern = look.chance.choice((BLOTS, _gradient))
    _blend(canvas, pattern(look, 0) > .3, look.paper + look.ink - canvas)
    return canvas


def _shaded(look, canvas):
    """Gets darker or brighter to one side, but contrasts stay as they are."""
    return canvas + _gradient(look, 0) * (look.chance.uniform(60, 200) - look.paper)


def _blurred(look, canvas):
    radius = look.chance.uniform(.3, 1.1) * max(.5, look.shape[0] / 60)
    return np.stack([cv2.GaussianBlur(channel, (0, 0), radius) for channel in canvas])


def _noisy(look, canvas):
    shape = look.chance.choice((1, 3)), *look.shape
    strength = 3 + .45 * look.contrast * look.chance.random() ** 3
    return canvas + strength * look.noise.standard_normal(shape, np.float32)


def _grey(look, canvas):
    return np.stack([cv2.cvtColor(np.dstack(canvas), cv2.COLOR_BGR2GRAY)] * 3)


def _jpeg(look, canvas):
    quality = cv2.IMWRITE_JPEG_QUALITY, look.chance.randint(30, 92)
    jpeg = cv2.imencode(".jpg", _as_pixels(canvas), quality)[1]
    return np.float32(cv2.imdecode(jpeg, cv2.IMREAD_COLOR).transpose(2, 0, 1))


DEGRADATIONS = ((_shaded, .09), (_swapped, .05), (_warp, .12), (_blurred, .3), (_noisy, .22),
                (_grey, .12), (_jpeg, .35))


# ---------------------------------------------------------------------- few images, distorted

def distort(images, noise):
    """Draws images (B, H, W, ...) uint8, 0 for paper, as others of their kind might look.

    noise: the `np.random.Generator` that decides how.
    """
    return np.stack([_distorted(image, noise) for image in images])


def _distorted(image, noise):
    """Moves, scales, turns, shears and bends an image a little.

    Perhaps it also gets blurred, noisy, fainter, darker, or holes and blots.
    """
    height, width = image.shape[:2]
    end = [width, *(image.max(axis=0) > 40).nonzero()[0] + 1][-1]  # of the text
    middle = np.reshape((end / 2, height / 2), (2, 1, 1))
    places = np.indices((height, width))[::-1] - middle + noise.uniform(-5, 5, (2, 1, 1))
    turn = np.eye(2) + noise.uniform(-.12, .12, (2, 2)) * ((1, 1.2), (.3, 1))
    places = np.tensordot(turn, places, 1) + middle
    if noise.random() < .5:
        places += [cv2.resize(dents, (width, height), interpolation=cv2.INTER_CUBIC)
                   for dents in noise.normal(0, 1.5, (2, 4, 9))]
    pixels = np.float32(cv2.remap(image, *np.float32(places), cv2.INTER_LINEAR))
    if noise.random() < .3:
        pixels = cv2.GaussianBlur(pixels, (0, 0), noise.uniform(.4, 1.2))
    if noise.random() < .3:
        pixels += noise.uniform(3, 20) * noise.standard_normal(pixels.shape, np.float32)
    pixels = np.clip(pixels, 0, 255)
    if noise.random() < .5:
        pixels = 255 * (pixels / 255) ** noise.uniform(.7, 1.4)
    for _ in range(noise.choice((0, 0, 0, 2))):
        top, left, tall, wide = noise.integers(0, (height, end, 14, 14))
        pixels[top:top + tall, left:left + wide] = noise.choice((0, 0, 128))
    return np.uint8(pixels)


# ---------------------------------------------------------------------- Baidu's Warp-CTC

@functools.cache
def _warp_library():
    """Loads Baidu's library from the paddlepaddle package, without importing that package.

    Its `options` is the type `ctcOptions` of its ctc.h. Raises `LstmCtcOcr.Error` if the library
    is not installed.
    """
    try:
        package = Path(importlib.util.find_spec("paddle").origin)
        library = ctypes.CDLL(str(package.with_name("libs") / "libwarpctc.so"))
    except (AttributeError, TypeError, OSError):  # no package, an empty folder of it, no library
        raise LstmCtcOcr.Error("--ctc warp needs Baidu's library, which is not here: pip install "
                               "--no-deps paddlepaddle==3.3.1") from None
    fields = [("location", ctypes.c_int), ("threads", ctypes.c_size_t), ("blank", ctypes.c_int)]
    library.options = type("ctcOptions", (ctypes.Structure,), {"_fields_": fields})
    return library


def _warp_ctc(logits, labels, lengths):
    """Computes the CTC loss and its gradient with Baidu's library.

    logits: (T, B, C) float32, the blank last. labels: the classes of all texts, one text after the
    other, (n,) int32. lengths: of the texts, (B,) int32.
    Returns losses (B,) and their gradients with respect to the logits, (T, B, C). Raises
    `LstmCtcOcr.Error` if a label does not fit into T steps: the library does not say so itself,
    and leaves the gradient unwritten.
    """
    steps, batch, classes = logits.shape
    for label in np.split(labels, np.cumsum(lengths)[:-1]):
        needed = len(label) + np.count_nonzero(label[1:] == label[:-1])  # blanks between equal ones
        if needed > steps:
            raise LstmCtcOcr.Error(f"CTC cannot align a label that takes {needed} steps in {steps}")
    library, size = _warp_library(), ctypes.c_size_t()
    options = library.options(0, _cores(), classes - 1)  # 0: on the CPU
    all_steps = np.full(batch, steps, np.int32)
    losses, gradients = np.empty(batch, np.float32), np.zeros_like(logits)
    library.get_workspace_size(
        lengths.ctypes, all_steps.ctypes, classes, batch, options, ctypes.byref(size))
    workspace = np.empty(size.value, np.uint8)
    arrays = (each.ctypes for each in (logits, gradients, labels, lengths, all_steps))
    status = library.compute_ctc_loss(
        *arrays, classes, batch, losses.ctypes, workspace.ctypes, options)
    if status:
        raise LstmCtcOcr.Error(f"warp-ctc failed with status {status}")
    return losses, gradients


# ---------------------------------------------------------------------- accuracy

def greedy_confidences(logits, sequences):
    """Tells which images the best classes alone read right, and how sure they are of it.

    logits: (T, B, C), blank last; sequences: the B true ones. Returns (B,) bool, and the
    probabilities (K, B) of what was read, one row for each of `TEMPERATURES`. The temperature
    changes how probable a text is, but not which text the best classes spell.
    """
    found = LstmCtcOcr.greedy(logits)
    return (np.array([one == other for one, other in zip(found, sequences)]),
            np.array([LstmCtcOcr.sequence_probabilities(found, LstmCtcOcr.softmax(logits / divisor))
                      for divisor in TEMPERATURES]))


TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.5, 1.75, 2.0, 2.5)


def fit_temperature(right, confidences):
    """Returns the temperature at which the confidences tell best which readings are right.

    confidences: (K, n), one row for each of `TEMPERATURES`; right: (n,) bool, or (K, n) where the
    reading changes with the temperature. This is temperature scaling (Guo et al., 2017,
    arXiv:1706.04599) of whole texts: of those with confidence 0.9, nine in ten should be right.
    """
    p = np.clip(confidences, 1e-6, 1 - 1e-6)
    return TEMPERATURES[int(np.where(right, np.log(p), np.log(1 - p)).sum(axis=1).argmax())]


def edits(a, b):
    """Returns the fewest edits that turn text a into text b (Levenshtein, 1965).

    An edit is a pair of letters: one of a and what stands for it in b, "" for none.
    """
    if a == b:
        return []
    row = [[("", letter) for letter in b[:n]] for n in range(len(b) + 1)]  # edits from "" to b[:n]
    for was in a:
        above, row = row, [row[0] + [(was, "")]]
        for n, letter in enumerate(b):
            replaced = above[n] + [(was, letter)] * (was != letter)
            row.append(min(replaced, above[n + 1] + [(was, "")], row[n] + [("", letter)], key=len))
    return row[-1]


def score(truths, readings):
    """Compares what was read with the true texts, at least one; returns a dictionary.

    accuracy: the share of texts that are right as a whole. caseless: the same if the case of
    letters does not count. cer: the character error rate, edits for each true letter. count: texts.
    by_length: {length of the true text: (right, count)}. by_repeat: the same for "some" texts that
    hold a letter twice side by side, and for those with "none".
    """
    distances = [len(edits(*pair)) for pair in zip(truths, readings)]
    caseless = sum(truth.casefold() == text.casefold() for truth, text in zip(truths, readings))

    def right_by(kind):
        right = collections.defaultdict(list)
        for truth, distance in zip(truths, distances):
            right[kind(truth)].append(distance == 0)
        return {key: (sum(each), len(each)) for key, each in sorted(right.items())}

    return {"accuracy": distances.count(0) / len(truths), "caseless": caseless / len(truths),
            "cer": sum(distances) / sum(map(len, truths)), "count": len(truths),
            "by_length": right_by(len),
            "by_repeat": right_by(lambda text: "some" if re.search(r"(.)\1", text) else "none")}


def describe(scores):
    """Returns the lines that `test` prints below its readings; scores: those of `score`."""
    right = round(scores["accuracy"] * scores["count"])
    return (f"accuracy {scores['accuracy']:.2%} ({right} of {scores['count']}), "
            f"{scores['caseless']:.2%} with case ignored, edit distance (CER) {scores['cer']:.4f}\n"
            f"by length   {_shares(scores['by_length'])}\n"
            f"by repeats  {_shares(scores['by_repeat'])}")


def _shares(table):
    """Returns {kind of text: (right, count)} as a line of text."""
    return "  ".join(f"{length}: {right / count:.1%}" for length, (right, count) in table.items())


def interval(right, count):
    """Returns the 95 % confidence interval of a share, (low, high) from 0 to 1 (Wilson, 1927).

    The share is that of `right` things in a sample of `count`.
    """
    z = 1.96
    middle = right + z ** 2 / 2
    spread = z * math.sqrt(right * (count - right) / count + z ** 2 / 4)
    return (middle - spread) / (count + z ** 2), (middle + spread) / (count + z ** 2)


def _counted(right, count):
    """Returns a share and its confidence interval as text."""
    low, high = (round(100 * end) for end in interval(right, count))
    return f"{right:,} of {count:,}, {low} to {high} %"


# ---------------------------------------------------------------------- pictures

CURVE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="-60 -20 560 290" width="560">
<style>
  text { font: 12px system-ui, sans-serif; fill: #555 }
  .axis { text-anchor: end }
  polyline { fill: none; stroke-width: 2 }
  .losses { stroke: #c60 } text.losses { fill: #c60; stroke: none }
  .accuracies { stroke: #07b } text.accuracies { fill: #07b; stroke: none }
  path { stroke: #999; stroke-width: .5 }
  @media (prefers-color-scheme: dark) { text { fill: #bbb } }
</style>
<path d="M0 0H480M0 60H480M0 120H480M0 180H480M0 240H480"/>
<text class="axis" x="-8" y="4">100 %</text>
<text class="axis" x="-8" y="124">50 %</text>
<text class="axis" x="-8" y="244">0 %</text>
<text x="0" y="258">0</text>
<text class="axis" x="480" y="258">$last steps</text>
<text class="losses" x="0" y="-6">loss in training, in % of $highest</text>
<polyline class="losses" points="$losses"/>
<text class="accuracies" x="240" y="-6">held-out texts right</text>
<polyline class="accuracies" points="$accuracies"/>
</svg>
"""


def draw_curve(curve):
    """Draws a learning curve as the text of an SVG file.

    curve: [(step, loss in training, accuracy on held-out images)].
    """
    steps, losses, accuracies = np.transpose(curve)
    highest = losses.max() or 1
    lines = [" ".join(f"{480 * step / steps[-1]:.1f},{240 - 240 * y:.1f}"
                      for step, y in zip(steps, line)) for line in (losses / highest, accuracies)]
    return string.Template(CURVE).substitute(
        losses=lines[0], accuracies=lines[1], highest=f"{highest:.3g}", last=f"{steps[-1]:,.0f}")


def thin_curve(curve):
    """Leaves every other point out of a learning curve of more than 200; the last one stays."""
    return curve[::-1][::2][::-1] if len(curve) > 200 else curve


REPORT = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>How well captchas are read</title>
<style>
  :root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
  body { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem }
  h1 { font-size: 1.4rem }
  table { border-collapse: collapse; margin: .5rem 0 }
  th, td { padding: .1rem .75rem .1rem 0; text-align: left; border-bottom: 1px solid #8884 }
  th { font-weight: normal }
  th, small { opacity: .7 }
  pre { white-space: pre-wrap }
  .wrong { display: flex; flex-wrap: wrap; gap: 1rem }
  figure { margin: 0; break-inside: avoid }
  figure img { display: block; max-width: 256px; max-height: 96px; background: #fff }
</style>
{% macro table(heads, rows) %}
<table>
<tr>{% for head in heads %}<th>{{ head }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell or "(nothing)" }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% endmacro %}
<h1>How well captchas are read</h1>
<p>By {{ model }}: <b>{{ right }}</b> (95 % confidence interval) are right.</p>
<pre>{{ description }}</pre>
<h2>Letters that are taken for others</h2>
{{ table(("letter", "read as", "times"), letters) }}
<h2>Is the confidence right?</h2>
<p>On images like these, the share of right readings is about the mean confidence.</p>
{{ table(("mean confidence", "readings", "right"), sure) }}
<h2>Read wrong: {{ count }}, the most confident first</h2>
<div class="wrong">
{% for image, name, truth, text, confidence in wrong %}
<figure><img alt="" src="{{ image }}"><figcaption><b>{{ truth }}</b> read as <b>{{ text }}</b>,
  {{ "%.3f"|format(confidence) }}<br><small>{{ name }}</small></figcaption></figure>
{% endfor %}
{% if count > wrong|length %}<p>and {{ count - wrong|length }} more</p>{% endif %}
</div>
"""


def report_page(readings, model):
    """Returns an HTML page, complete in itself, that shows how well labelled images were read.

    readings: (path, true text, text that was read, confidence) of each image. model: its name.
    """
    _, truths, texts, _ = zip(*readings)
    wrong = [reading for reading in readings if reading[1] != reading[2]]
    wrong.sort(key=lambda reading: -reading[3])
    confused = collections.Counter(
        pair for _, truth, text, _ in wrong for pair in edits(truth, text))
    bins = collections.defaultdict(list)  # readings that are about as confident
    for _, truth, text, confidence in readings:
        bins[min(9, int(10 * confidence))].append((confidence, text == truth))
    means = [(*np.mean(alike, axis=0), len(alike)) for _, alike in sorted(bins.items())]
    return jinja2.Environment(autoescape=True).from_string(REPORT).render(
        model=model, count=len(wrong), description=describe(score(truths, texts)),
        right=_counted(len(readings) - len(wrong), len(readings)),
        letters=[(*pair, times) for pair, times in confused.most_common(20)],
        sure=[(f"{sure:.2f}", number, f"{share:.1%}") for sure, share, number in means],
        wrong=[(_data_url(Path(path).read_bytes()), Path(path).name, truth, text, confidence)
               for path, truth, text, confidence in wrong[:200]])


# ---------------------------------------------------------------------- images and files

def _files_in(folder):
    """Lists the images in a folder and its subfolders, and the other files: (images, others).

    All are paths from the folder on. Images of one folder come in the order of the numbers at the
    beginning of their names. A folder that is named like an image counts as one: whoever opens it
    tells the user. Hidden files and folders are left out. Subfolders come behind, and last of all
    links to folders elsewhere: each folder is listed once. What is no folder has none of either.
    Raises OSError if a folder cannot be listed.
    """
    images, others, folders, links, seen = [], [], [""], [], set()
    while folders or links:
        inside = (folders or links).pop(0)
        here = os.path.realpath(os.path.join(folder, inside))
        names = os.listdir(here) if os.path.isdir(here) and here not in seen else ()
        seen.add(here)
        for name in sorted(names, key=lambda name: (int(re.match(r"\d*", name)[0] or -1), name)):
            path, file = os.path.join(inside, name), Path(here, name)
            if name.startswith("."):
                continue
            if name.lower().endswith(tuple(IMAGE_KINDS)):
                images.append(path)
            elif file.is_dir():
                (links if file.is_symlink() else folders).append(path)
            else:
                others.append(path)
    return images, others


def _say(*lines):
    """Prints messages on stderr, each on its line, above a progress bar; results go to stdout."""
    tqdm.write("\n".join(map(str, lines)), file=sys.stderr)


def _on_one_line(text):
    """Returns a path, or what it is given, as text on one line, for messages."""
    text = str(text)
    return text if text.isprintable() else json.dumps(text, ensure_ascii=False)[1:-1]


# What is not seen, as soft hyphens and joiners are not: Unicode's Default_Ignorable_Code_Point.
INVISIBLE = re.compile("[\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
                       "\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8"
                       "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]")


def _one_form(text):
    """Returns a text as all labels are compared: composed, and without what is not seen."""
    return unicodedata.normalize("NFC", INVISIBLE.sub("", text))


def _key(name):
    """Returns an image's path as it is compared: whoever writes a list may write it otherwise."""
    return os.path.normpath(_one_form(name).strip().replace("\\", "/"))


def turned(text):
    """Turns a text of right-to-left letters from typing order to that from the left, or back.

    Numbers and Latin letters keep their order, and marks stay behind their letter.
    """
    if any(unicodedata.bidirectional(letter) in ("R", "AL") for letter in text):
        runs = r"[\dA-Za-z]+(?:[.,:][\dA-Za-z]+)*|.[\u0591-\u05bd\u05bf-\u05c7\u064b-\u065f\u0670]*"
        text = "".join(reversed(re.findall(runs, text, re.DOTALL)))
    return text


def _labels_in(names, pattern):
    """Returns {name: label} of the images whose names follow a regular expression of one group."""
    return {name: found[1] for name in names if (
        found := re.fullmatch(pattern, _one_form(os.path.basename(name)), re.DOTALL))}


def _number_of(name):
    """Returns the number of an image <number>_<text>.png; of other names, one by a digest."""
    named = LABELLED.fullmatch(os.path.basename(name))
    return int(named[1]) if named else int(_digest(name) * 2 ** 32)


def _file_under(folder, path):
    """Returns a regular file's path, links resolved, or None if that is not below `folder`.

    folder: its links are resolved already.
    """
    try:
        path = Path(os.path.realpath(path))
        return path if path.is_relative_to(folder) and path.is_file() else None
    except (OSError, ValueError):  # a name too long, a NUL
        return None


def _text_of(path):
    """Reads a text file in UTF-8, or in UTF-16 if its first bytes say so; see `NO_UTF8`."""
    data = path.read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return data.decode(encoding, "replace")


def _rows_of(path, names):
    """Reads a list of labels; returns its rows (name, label).

    names: the images. The first line, if it names no image file, names the columns. Each line has
    its own separator: the tab, comma or semicolon behind the suffix of a file, or else the first.
    Between tabs, quotation marks are letters.

    In a list of labels alone, line n is for image n, if the numbers of the images say so. Its first
    line may not be "label" or "text": that may be the head of a list which lacks a label.

    Raises `Error` for a line that holds more than the first line names, or than a name, a label and
    numbers from 0 to 1: the rest may be a part of the label, as in 0.png,1,234.
    """
    text, order, rows, columns = _text_of(path), sorted(names, key=len), [], 1
    labels = text.split()
    if len(labels) == len(order) > 0 and not re.search(r"(?i)[\t,;.]|^(label|text)s?\s", text):
        last = len(labels) - ("0." in order[0])  # the images are numbered from 0 or from 1 on
        if f"{last}." in order[-1]:
            return zip(order, labels)
    for number, line in enumerate(text.splitlines(), 1):
        line = line[:100_000] or ","  # `csv` takes no longer cell, and finds none in no text
        sign = re.search(r'^(?:.*?\.\w+"? *|[^.]*?)([\t,;])|$', line)[1] or ","
        reader = csv.reader([line], delimiter=sign, skipinitialspace=True)
        name, *cells = line.split(sign) if sign == "\t" else next(reader)
        if number == 1 and not any(kind in name.lower() for kind in IMAGE_KINDS):
            columns = max(1, len(cells))
        elif not all(re.fullmatch(r" *[01]?(\.\d+)? *", cell) for cell in cells[columns:]):
            raise LstmCtcOcr.Error(
                f"{path}, line {number} holds more than a name and a label: put a label with "
                'commas in quotes, as in 0.png,"1,234", or let the first line name all columns')
        elif name:
            rows.append((name, "".join(cells[:1])))
    return rows


def _digest(name):
    """Returns a number from 0 to 1 that depends on an image's path in its folder alone."""
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2 ** 64


def _model_folder(model):
    """Returns the folder of a model, which is given as a path or as the name of one that ships."""
    shipped = MODELS / "pretrained" / model
    return shipped if not Path(model).exists() and shipped.is_dir() else Path(model)


def _shown(folder):
    """Shortens a path for messages: it begins at this script's folder if it is in there."""
    return folder.relative_to(HOME) if folder.is_relative_to(HOME) else folder


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


def _replace(path, content, durable=False):
    """Writes a small file of text or bytes as a whole or not at all; several processes may do so.

    durable: waits until it is on the disk. Else a power cut may leave it empty or torn.
    """
    part = path.with_name(f".{secrets.token_hex(4)}.part")
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    try:
        part.write_bytes(content)
        _to_disk(*[part] * durable)
        os.replace(part, path)
        _to_disk(*[path.parent] * durable)
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------------- HTTP

def create_app(**settings):
    """Returns the application for other WSGI servers: gunicorn 'lstm_ctc_ocr:create_app()'."""
    return LstmCtcOcr(**settings).create_app()


def _json_error(error):
    """Answers an error as JSON; an HTTP error keeps its headers, such as Retry-After."""
    if isinstance(error, LstmCtcOcr.Error):
        return {"error": str(error)}, error.status
    if isinstance(error, OSError):
        return {"error": f"files cannot be read or written: {error.strerror}"}, 503
    response = error.get_response()
    response.data = json.dumps({"error": error.description})
    response.content_type = "application/json"
    return response


def _json_parse_error(error, ident=None):
    """Logs what waitress refuses by itself, such as a request that is no HTTP; answers in JSON."""
    with contextlib.suppress(OSError):
        _say(f'- "{error.reason}" {error.code}')
    return (f"{error.code} {error.reason}", [("Content-Type", "application/json")],
            json.dumps({"error": f"{error.reason}: {error.body}"}).encode())


def _request_parser(admits):
    """Returns waitress's class that takes requests in, changed so that strangers fill no memory.

    admits: function that tells whether the text of a header Authorization holds the token.
    """
    class Body(waitress.buffers.BytesIOBasedBuffer):
        """The first bytes of a request's body. The others are read and dropped.

        Most clients send all of a body before they read that it is refused.
        """
        most = 0  # bytes

        def append(self, data):
            super().append(data[:self.most - len(self)])

    class Request(waitress.parser.HTTPRequestParser):
        def parse_header(self, head):
            """Understands the head. Without the token nothing is kept of the body."""
            super().parse_header(head)
            if self.body_rcv is not None:
                self.body_rcv.buf = Body()
                if admits(self.headers.get("AUTHORIZATION", "")):
                    self.body_rcv.buf.most = LstmCtcOcr.MAX_BODY + 1

    return Request


def _make_room(connections):
    """Drops 20 connections if there are too many; 500 kB of a request's body count as one more.

    These have been idle longest, of those whose request is not being answered.
    """
    held = sum(len(request.body_rcv or ()) for each in connections
               for request in (each.request, *each.requests) if request)
    if len(connections) + held / 500_000 > LstmCtcOcr.CONNECTIONS:
        waiting = (each for each in connections if not each.requests)
        for each in sorted(waiting, key=lambda each: each.last_activity)[:20]:
            each.will_close = True


def _json_body():
    """Returns the object in the request's JSON body, or {} if there is none."""
    body = None
    with contextlib.suppress(RecursionError):  # brackets in brackets
        body = flask.request.get_json(silent=True)
    return body if isinstance(body, dict) else {}


def _page(page, **values):
    """Fills in the $names of a page; its policy lets no script and no style run but its own."""
    nonce = secrets.token_urlsafe(16)
    return string.Template(page).safe_substitute(values, nonce=nonce), {
        "Content-Security-Policy":
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"}


def _data_url(data):
    """Returns an image file as a data URL, for a page to show it."""
    return "data:image;base64," + base64.b64encode(data).decode()


# An operation is answered by the method that its operationId names, see `LstmCtcOcr.create_app`.
DESCRIPTION = """{
"openapi": "3.1.0",
"info": {"title": "lstm_ctc_ocr", "version": "$version"},
"paths": {
  "/captchaOcr": {
    "get": {
      "operationId": "answer_path",
      "summary": "Reads an image under the image root",
      "parameters": [
        {"name": "img_path", "in": "query", "required": true,
         "schema": {"type": "string", "minLength": 1}},
        {"$ref": "#/components/parameters/letters"},
        {"$ref": "#/components/parameters/length"}],
      "responses": {
        "200": {"description": "its text", "content": {"application/json": {"schema": {
          "allOf": [{"$ref": "#/components/schemas/Reading"},
                    {"type": "object", "required": ["img_path"],
                     "properties": {"img_path": {"type": "string"}}}]}}}},
        "400": {"$ref": "#/components/responses/Error"},
        "401": {"$ref": "#/components/responses/Error"},
        "404": {"$ref": "#/components/responses/Error"},
        "413": {"$ref": "#/components/responses/Error"},
        "415": {"$ref": "#/components/responses/Error"},
        "422": {"$ref": "#/components/responses/Error"},
        "503": {"$ref": "#/components/responses/Error"}}},
    "post": {
      "operationId": "answer_post",
      "summary": "Reads one image, or several files of a form",
      "parameters": [
        {"$ref": "#/components/parameters/letters"},
        {"$ref": "#/components/parameters/length"}],
      "requestBody": {"required": true, "content": {
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {"schema": {"type": "object", "required": ["image"], "properties": {
          "image": {"type": "string", "format": "byte"},
          "letters": {"$ref": "#/components/schemas/Letters"},
          "length": {"$ref": "#/components/schemas/Length"}}}},
        "multipart/form-data": {"schema": {"type": "object", "required": ["image"], "properties": {
          "image": {"type": "array", "minItems": 1, "maxItems": $max_images,
                    "items": {"type": "string", "format": "binary"}},
          "letters": {"$ref": "#/components/schemas/Letters"},
          "length": {"$ref": "#/components/schemas/Length"}}}}}},
      "responses": {
        "200": {"description": "its text; of several images their texts, or what is wrong with one",
                "content": {"application/json": {"schema": {"anyOf": [
                  {"$ref": "#/components/schemas/Reading"},
                  {"type": "object", "required": ["results"], "properties": {"results": {
                    "type": "array", "items": {"anyOf": [
                      {"$ref": "#/components/schemas/Reading"},
                      {"$ref": "#/components/schemas/Error"}]}}}}]}}}},
        "400": {"$ref": "#/components/responses/Error"},
        "401": {"$ref": "#/components/responses/Error"},
        "413": {"$ref": "#/components/responses/Error"},
        "415": {"$ref": "#/components/responses/Error"},
        "422": {"$ref": "#/components/responses/Error"},
        "503": {"$ref": "#/components/responses/Error"}}}},
  "/healthz": {
    "get": {
      "operationId": "answer_health",
      "summary": "Model, version, and how many images wait to be read",
      "responses": {
        "200": {"description": "it is up", "content": {"application/json": {"schema": {
          "type": "object",
          "required": ["status", "version", "model", "waiting"],
          "properties": {
            "status": {"const": "ok"},
            "version": {"type": "string"},
            "model": {"type": "object"},
            "waiting": {"$ref": "#/components/schemas/Number"}}}}}}}}},
  "/openapi.json": {
    "get": {
      "operationId": "answer_description",
      "summary": "This description",
      "responses": {
        "200": {"description": "OpenAPI",
                "content": {"application/json": {"schema": {"type": "object"}}}},
        "401": {"$ref": "#/components/responses/Error"}}}},
  "/": {
    "get": {
      "operationId": "answer_page",
      "summary": "A page that reads images",
      "responses": {
        "200": {"description": "HTML", "content": {"text/html": {"schema": {"type": "string"}}}},
        "401": {"$ref": "#/components/responses/Error"}}}}$label_paths},
"components": {
  "parameters": {
    "letters": {"name": "letters", "in": "query",
                "schema": {"$ref": "#/components/schemas/Letters"}},
    "length": {"name": "length", "in": "query", "schema": {"$ref": "#/components/schemas/Length"}}},
  "responses": {
    "Error": {"description": "what is wrong", "content": {"application/json": {
      "schema": {"$ref": "#/components/schemas/Error"}}}}},
  "schemas": {
    "Number": {"type": "number", "minimum": 0},
    "Letters": {"type": "string", "description": "the only letters to read, such as ABC"},
    "Length": {"type": "string", "pattern": "^[0-9]{1,4}(-[0-9]{1,4})?$",
               "description": "letters of the text: N or MIN-MAX"},
    "Error": {"type": "object", "required": ["error"],
              "properties": {"error": {"type": "string"}}},
    "Reading": {"type": "object", "required": ["ocr_ret", "confidence"], "properties": {
      "ocr_ret": {"type": "string"}, "confidence": {"$ref": "#/components/schemas/Number"}}},
    "ToLabel": {"type": "object", "required": ["path", "labelled", "images"], "properties": {
      "path": {"type": "string", "description": "empty when all images have a label"},
      "image": {"type": "string", "description": "a data URL"},
      "text": {"type": "string", "description": "its label, or what it may say"},
      "confidence": {"$ref": "#/components/schemas/Number"},
      "labelled": {"$ref": "#/components/schemas/Number"},
      "images": {"$ref": "#/components/schemas/Number"}}}}}}"""


LABEL_PATHS = """,
  "/label": {
    "get": {
      "operationId": "answer_label_page",
      "summary": "The page to label images on",
      "responses": {
        "200": {"description": "HTML", "content": {"text/html": {"schema": {"type": "string"}}}},
        "401": {"$ref": "#/components/responses/Error"}}},
    "post": {
      "operationId": "answer_label",
      "summary": "Writes an image's label, or skips the image without one",
      "requestBody": {"required": true, "content": {"application/json": {"schema": {
        "type": "object", "required": ["path"], "properties": {
          "path": {"type": "string"}, "label": {"type": "string"}}}}}},
      "responses": {
        "200": {"description": "the next image to label", "content": {"application/json": {
          "schema": {"$ref": "#/components/schemas/ToLabel"}}}},
        "400": {"$ref": "#/components/responses/Error"},
        "401": {"$ref": "#/components/responses/Error"},
        "403": {"$ref": "#/components/responses/Error"},
        "413": {"$ref": "#/components/responses/Error"},
        "503": {"$ref": "#/components/responses/Error"}}}},
  "/label/image": {
    "get": {
      "operationId": "answer_image_to_label",
      "summary": "The image to label next, or one that is named",
      "parameters": [
        {"name": "path", "in": "query", "schema": {"type": "string", "minLength": 1}}],
      "responses": {
        "200": {"description": "the image, and what it may say", "content": {"application/json": {
          "schema": {"$ref": "#/components/schemas/ToLabel"}}}},
        "401": {"$ref": "#/components/responses/Error"}}}}"""


def describe_service(label):
    """Returns the service's OpenAPI description; label: whether the page /label is served."""
    values = {"version": VERSION, "max_images": LstmCtcOcr.MAX_IMAGES,
              "label_paths": LABEL_PATHS if label else ""}
    return json.loads(string.Template(DESCRIPTION).safe_substitute(values))


HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style nonce="$nonce">
  :root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
  body { max-width: 40rem; margin: 0 auto; padding: 1.5rem 1rem }
  h1 { font-size: 1.4rem }
"""
LABEL_PAGE = HEAD.replace("$title", "Label captchas") + """\
  img { display: block; width: 100%; height: 10rem; object-fit: contain }
  img { background: #fff; border-radius: .25rem }
  input { display: block; box-sizing: border-box; width: 100%; margin: 1rem 0; padding: .5rem }
  input { font: 600 1.6rem ui-monospace, monospace; letter-spacing: .1em; text-align: center }
  small { font-size: .85rem; opacity: .75 }
</style>
<h1>What does it say?</h1>
<main>
  <img alt="the image to label" hidden>
  <input aria-label="what the image says" autocomplete="off" autocapitalize="off"
    spellcheck="false">
  <p id="note" aria-live="polite"></p>
  <p id="progress"></p>
</main>
<small>Enter takes it, Escape skips it, Backspace in the empty field goes one back.</small>
<noscript>This page needs JavaScript.</noscript>
<script nonce="$nonce">
  const image = document.querySelector("img"), field = document.querySelector("input");
  const note = document.querySelector("#note"), progress = document.querySelector("#progress");
  const past = [];
  let shown = "", busy = false;

  async function ask(target, body) {
    busy = true;
    try {
      const headers = {"Content-Type": "application/json"};
      const request = body && {method: "POST", headers, body: JSON.stringify(body)};
      const response = await fetch(target, request);
      const answer = await response.json();
      if (!response.ok) throw new Error(answer.error);
      show(answer);
      return true;
    } catch (error) {
      note.textContent = error.message;
    } finally {
      busy = false;
    }
  }

  function show(answer) {
    shown = answer.path;
    progress.textContent = `${answer.labelled} of ${answer.images}; start training with about 200`;
    image.hidden = !shown;
    image.src = answer.image || "";
    field.value = answer.text || "";
    field.focus();
    field.select();
    const sure = `${shown}: read with confidence ${(100 * answer.confidence).toFixed(1)} %`;
    note.textContent = shown ? sure : "Every image has its label.";
  }

  async function leave(body) {
    const before = shown;
    if (await ask("label", body)) past.push(before);
  }

  field.addEventListener("keydown", event => {
    const back = event.key === "Backspace" && !field.value && !event.repeat && past.length;
    if (busy || event.isComposing) return;
    if (event.key === "Enter" && shown) leave({path: shown, label: field.value});
    else if (event.key === "Escape" && shown) leave({path: shown});
    else if (back) ask("label/image?path=" + encodeURIComponent(past.pop()));
  });
  ask("label/image");
</script>
</html>
"""
SAMPLE = """<button class="sample"><img alt="a sample" src="%s"></button>"""
PAGE = HEAD.replace("$title", "Captcha reader") + """\
  #drop { display: block; padding: 2rem 1rem; border: 2px dashed GrayText; border-radius: .75rem }
  #drop { text-align: center; cursor: pointer }
  #drop.over, #drop:focus-within { border-color: Highlight }
  #drop input { display: block; margin: .75rem auto 0; max-width: 100% }
  .sample { padding: .25rem; margin: .25rem .5rem .25rem 0; cursor: pointer }
  .sample img { display: block; height: 2.5rem }
  figure { display: flex; flex-wrap: wrap; gap: .5rem 1.25rem; align-items: center; margin: 1rem 0 }
  figure img { max-width: min(256px, 100%); max-height: 8rem }
  figure img { background: #fff; border-radius: .25rem }
  .sure { text-decoration: underline solid .15rem #2a2 }
  .unsure { text-decoration: underline dashed .15rem #c80 }
  .doubtful { text-decoration: underline wavy .15rem #d33 }
  output { font: 600 1.6rem ui-monospace, monospace; letter-spacing: .1em; overflow-wrap: anywhere }
  small { display: block; font: .85rem system-ui, sans-serif; letter-spacing: 0; opacity: .75 }
</style>
<h1>Captcha reader</h1>
<label id="drop">Drop a captcha here, paste one, or choose a file
  <input type="file" accept="image/*" multiple>
</label>
<p>Or try a sample:<br>$samples</p>
<main id="results" aria-live="polite"></main>
<footer><small>
  Read by $net. <a href="openapi.json">OpenAPI</a> · <a href="healthz">health</a>
</small></footer>
<noscript>Without JavaScript: <code>curl -F image=@captcha.png …/captchaOcr</code></noscript>
<script nonce="$nonce">
  const drop = document.querySelector("#drop"), input = drop.querySelector("input");

  function sureness(confidence) {
    if (confidence < .5) return "doubtful";
    return confidence < .95 ? "unsure" : "sure";
  }

  async function read(blob) {
    const figure = document.createElement("figure"), image = new Image();
    const output = document.createElement("output"), note = document.createElement("small");
    image.src = URL.createObjectURL(blob);
    image.alt = "the image that was read";
    output.textContent = "…";
    figure.append(image, output);
    document.querySelector("#results").prepend(figure);
    const begun = performance.now();
    try {
      const type = blob.type.startsWith("image/") ? blob.type : "image/unknown";
      const request = {method: "POST", headers: {"Content-Type": type}, body: blob};
      const response = await fetch("captchaOcr", request);
      const answer = await response.json();
      if (!response.ok) throw new Error(answer.error);
      const text = document.createElement("span");
      text.textContent = answer.ocr_ret || "(no letter)";
      text.className = sureness(answer.confidence);
      output.replaceChildren(text);
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
  const samples = document.querySelectorAll(".sample");
  for (const sample of samples) sample.addEventListener("click", () => {
    const bytes = atob(sample.firstChild.src.split(",")[1]);
    const data = Uint8Array.from(bytes, byte => byte.charCodeAt());
    read(new Blob([data], {type: "image/png"}));
  });
</script>
</html>
"""


# ---------------------------------------------------------------------- the machine

def _package(name, purpose):
    """Imports a package that not everything needs; raises `Error` where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:  # it, or another one that it needs
        raise LstmCtcOcr.Error(
            f"to {purpose}, install {error.name}: pip install {error.name}") from None


OPENING = threading.RLock()  # held while TensorFlow is imported, or a model is opened


@functools.cache
def _tensorflow():
    """Returns TensorFlow's graph-and-session API. Only the first call imports it, for seconds."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # What it imports asks for a folder for temporary files, and writes none; there may be none.
    os.environ.setdefault("TEST_TMPDIR", os.curdir)
    gc.disable()  # it would scan TensorFlow's objects again and again, for a second in all
    try:
        with OPENING, _quiet_stderr():  # no setting stops the lines that the import prints
            tf = _package("tensorflow.compat.v1", "train, export or read with a model folder (an "
                          "ONNX file reads without)")
    finally:
        gc.freeze()
        gc.enable()
    tf.logging.set_verbosity(tf.logging.FATAL)
    with contextlib.suppress(RuntimeError):  # somebody has used TensorFlow before
        # Otherwise a tf.function gives every operation all cores.
        tf.config.threading.set_intra_op_parallelism_threads(1)
    return tf


@contextlib.contextmanager
def _in_memory():
    """Lends a folder in TensorFlow's memory: TensorFlow works there, and Python with the disk.

    On a disk TensorFlow takes the path of a checkpoint for a pattern, in which [ and \\ have a
    meaning, and it knows only paths in UTF-8.
    """
    gfile, folder = _tensorflow().gfile, f"ram://{secrets.token_hex(8)}"
    gfile.MakeDirs(folder)
    try:
        yield folder
    finally:
        gfile.DeleteRecursively(folder)


def _written_by(write):
    """Calls write(folder) with a folder in memory; returns {name: bytes} of the files in it."""
    gfile = _tensorflow().gfile
    with _in_memory() as memory:
        write(memory)
        return {name: gfile.GFile(f"{folder}/{name}", "rb").read()
                for folder, _, names in gfile.Walk(memory) for name in sorted(names)}


def _arrays_of(checkpoint):
    """Reads a checkpoint, a path without an ending, and compares checksums: {name: array}."""
    tf = _tensorflow()
    with _in_memory() as memory:
        for ending in (".index", ".data-00000-of-00001"):
            tf.gfile.Copy(os.fsencode(f"{checkpoint}{ending}"), f"{memory}/it{ending}")
        reader = tf.train.NewCheckpointReader(f"{memory}/it")
        return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


@contextlib.contextmanager
def _quiet_stderr():
    """Drops what is written to stderr until it ends, by compiled libraries too."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _session_config(place=LstmCtcOcr._Place()):
    """Returns a session's settings: one core an operation, as many at once as there are cores.

    Where the processor has bfloat16, convolutions, their normalisation and all matrix products
    but BlockLSTM's use it: accuracy stays, and cnn_lstm trains in two thirds of the time. Graph
    and weights stay float32.
    """
    config = _tensorflow().ConfigProto(
        intra_op_parallelism_threads=1, inter_op_parallelism_threads=_cores(),
        device_filters=place.sees)
    rewrite = config.graph_options.rewrite_options
    rewrite.auto_mixed_precision_onednn_bfloat16 = int(_has_bfloat16())  # 1: ON
    if place.servers:  # there, a convolution with its bias and its ReLU does not know bfloat16
        rewrite.remapping = 2  # OFF
    return config


@functools.cache
def _has_bfloat16():
    """Whether the processor has such instructions. TensorFlow's imitation takes twice as long."""
    info = Path("/proc/cpuinfo")  # of Linux
    return info.exists() and bool(re.search(r"\b(avx512|amx)_bf16\b", info.read_text()))


@contextlib.contextmanager
def _constants(weights, folder):
    """Makes constants of {name: array}, a model folder's weights, in place of variables.

    TensorFlow then computes once, not in each reading, what depends on them alone.
    """
    tf = _tensorflow()

    def constant(getter, name, shape, **_):
        return tf.constant(_fitting(weights, name, shape, folder))

    with tf.variable_scope("", custom_getter=constant):
        yield


def _fitting(weights, name, shape, folder):
    """Returns one of a model folder's weights; raises `Error` if there is none of this shape."""
    if name not in weights or _tensorflow().TensorShape(shape) != weights[name].shape:
        raise LstmCtcOcr.Error(
            f"the weights in {folder} are not those of the network that its config.json tells of: "
            "restore it, or name another model")
    return weights[name]


def _cores():
    """Counts the cores that this process may use, and that its container's quota pays for."""
    bound = hasattr(os, "sched_getaffinity")  # not on Windows and macOS
    cores = len(os.sched_getaffinity(0)) if bound else os.cpu_count()
    return max(1, math.ceil(min(cores, _cpu_quota())))


def _cpu_quota(path=Path("/sys/fs/cgroup/cpu.max")):
    """Returns the CPUs that a container may use, or inf; `path` is of Linux's cgroup v2."""
    limit = re.match(r"(\d+) (\d+)", path.read_text() if path.exists() else "")
    return int(limit[1]) / int(limit[2]) if limit else math.inf  # "max 100000" is none


def _follow_parent():
    """Makes this process end when its parent has ended, and not by Ctrl-C in their terminal."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for Windows, see `_signals_held`
    cv2.setNumThreads(1)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _one_ahead(iterable):
    """Yields what an iterable yields; another thread computes the next item meanwhile."""
    iterator, end = iter(iterable), object()
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(next, iterator, end)
        while (item := ahead.result()) is not end:
            ahead = pool.submit(next, iterator, end)
            yield item


STOPS = signal.SIGINT, signal.SIGTERM


@contextlib.contextmanager
def _signals_held():
    """Holds Ctrl-C and SIGTERM back until it ends; processes started meanwhile never get them."""
    if fcntl:  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        if fcntl:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


@contextlib.contextmanager
def _deferred_stop():
    """Yields a list to which Ctrl-C and SIGTERM add their number, and nothing else happens."""
    caught, before = [], {}
    try:
        with contextlib.suppress(ValueError):  # only the main thread may hear signals
            for number in STOPS:
                before[number] = signal.signal(number, lambda number, _: caught.append(number))
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------- command line

COMMANDS = {
    "create_dataset": (
        "render captchas to train on",
        "dataset look fonts im_total_num words words_max_num im_width im_height seed workers "
        "shard"),
    "train": (
        "train on rendered captchas or on your own, or go on from the last checkpoint",
        "dataset labels case start_from model net words words_max_num im_width im_height val_num "
        "n_hidden batch_size epoch_max lr save_epoch seed beam_width label_parts ctc"),
    "test": ("read images, one line each", "model net labels case beam_width letters length"),
    "start": (
        "serve a page, GET /captchaOcr?img_path= and POST /captchaOcr",
        "model net beam_width letters length host port image_root label token"),
    "export": (
        "write a SavedModel for TensorFlow Serving, or an ONNX file", "model net beam_width"),
}


def _flag(name):
    return "--" + name.replace("_", "-")


def _parser():
    """Builds the parser of the command line; most flags are fields of `LstmCtcOcr`."""
    about = __doc__ and __doc__.split("\n")[0]  # with python -OO there is none
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    fields = {field.name: field for field in dataclasses.fields(LstmCtcOcr)}
    for command, (text, names) in COMMANDS.items():
        sub = commands.add_parser(command, help=text, description=text, allow_abbrev=False)
        for name in names.split():
            field = fields[name]
            usual = field.metadata["usual"] if field.default is None else field.default
            shown = "" if usual == "" else f" ({usual})"
            sub.add_argument(_flag(name), type=field.type, default=field.default,
                             help=field.metadata["help"] + shown)
        if command == "export":
            sub.add_argument(
                "target", metavar="DIR|FILE.onnx", help="a new folder; TensorFlow Serving wants "
                "<name>/<number>; or a new ONNX file")
        if command == "train":
            sub.add_argument("--labelled-only", action="store_true",
                             help="with --start-from: do not learn images without a label")
        if command == "test":
            sub.add_argument("paths", nargs="*", metavar="PATH",
                             help="images and folders of images (dataset/test)")
            sub.add_argument("--json", action="store_true", dest="as_json",
                             help="print one JSON object an image")
            sub.add_argument("--alike", action="store_true",
                             help="read all images as one kind of captchas: their texts are like "
                             "those that are read surely, in length and letters")
            sub.add_argument("--report", default="", metavar="FILE.html",
                             help="of labelled images: write a page that shows what is read wrong, "
                             "and whether the confidence is right")
    return parser


def main(argv=None):
    """Runs one command; returns its exit code: 0, or 1 if some images could not be read, or 2."""
    arguments = vars(_parser().parse_args(argv))
    command = arguments.pop("command")
    settings = {name: arguments.pop(name) for name in COMMANDS[command][1].split()}
    with contextlib.suppress(AttributeError):  # not a stream of Python's own
        # Names of files need not be UTF-8; not every stdout has all letters.
        utf_8 = sys.stdout.encoding.lower().startswith("utf")
        sys.stdout.reconfigure(errors="surrogateescape" if utf_8 else "backslashreplace")
    try:
        return getattr(LstmCtcOcr(**settings), command)(**arguments) or 0
    except KeyboardInterrupt as stop:
        _say("stopped")
        return 128 + (stop.args or [signal.SIGINT])[0]
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (LstmCtcOcr.Error, OSError) as error:
        _say(f"lstm_ctc_ocr: {error}")
        return 2


def _interrupt(number, _):
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt)  # it ends a command as Ctrl-C does
    # With stderr closed, messages would go to whatever file is opened next.
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if sys.argv[1:2] == ["train"]:
        # With AVX-512, TensorFlow leaves oneDNN off by default. It takes an eighth off
        # cnn_lstm's training, but makes reading a single image five times as slow.
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    sys.exit(main())
