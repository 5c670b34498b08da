"""The network, its gradient, CTC and the beam search against oracles that share no code with them."""

import functools
import itertools

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from conftest import needs_warp

import lstm_ctc_ocr
from lstm_ctc_ocr import LstmCtcOcr


def evaluate(build, *arrays):
    """Runs build(*tensors) once in a graph of its own."""
    with tf.Graph().as_default(), tf.Session() as session:
        feeds = [tf.placeholder(array.dtype, array.shape) for array in arrays]
        fetches = build(*feeds)
        session.run(tf.global_variables_initializer())
        return session.run(fetches, dict(zip(feeds, arrays)))


def plain_lstm(x, kernel, bias):
    """The textbook's cell in float64 numpy, gates in the order input, cell, forget, output, forget bias 1."""
    h = c = np.zeros((x.shape[1], len(bias) // 4))
    outputs = []
    for step in x:
        i, g, f, o = np.split(np.concatenate([step, h], axis=1) @ kernel + bias, 4, axis=1)
        sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
        c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs)


@pytest.fixture(scope="module")
def lstm():
    """Arguments of a small layer whose cells go past 3, where BlockLSTM clips unless told not to, and weights for its
    outputs, so that a scalar depends on all of them; with our outputs and gradients."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 4, 3)).astype(np.float32)
    kernel = rng.normal(size=(3 + 5, 20)).astype(np.float32)
    bias = np.repeat([2, 2, 2, 0], 5).astype(np.float32)
    weights = rng.normal(size=(12, 4, 5)).astype(np.float32)

    def build(x, kernel, bias, weights):
        outputs = LstmCtcOcr._lstm_layer()(x, kernel, bias)
        return [outputs, *tf.gradients(tf.reduce_sum(outputs * weights), [x, kernel, bias])]

    return (x, kernel, bias, weights), evaluate(build, x, kernel, bias, weights)


def test_lstm_computes_the_textbook_cell(lstm):
    (x, kernel, bias, _), (outputs, *_) = lstm
    np.testing.assert_allclose(outputs, plain_lstm(*(a.astype(np.float64) for a in (x, kernel, bias))), atol=1e-5)


def test_lstm_gradient_is_the_numeric_one(lstm):
    arguments, (_, *gradients) = lstm
    *arguments, weights = (array.astype(np.float64) for array in arguments)
    rng = np.random.default_rng(1)
    for which, gradient in enumerate(gradients):
        for flat in rng.choice(gradient.size, min(20, gradient.size), replace=False):
            values = []
            for nudge in (1e-5, -1e-5):
                nudged = [array.copy() for array in arguments]
                nudged[which].flat[flat] += nudge
                values.append((plain_lstm(*nudged) * weights).sum())
            assert gradient.flat[flat] == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-3)


def test_lstm_gradient_is_tensorflows_own(lstm):
    arguments, (outputs, *gradients) = lstm

    def build(x, kernel, bias, weights):
        zero, none = tf.zeros([4, 5]), tf.zeros([5])
        h = tf.raw_ops.BlockLSTM(seq_len_max=tf.constant(12, tf.int64), x=x, cs_prev=zero, h_prev=zero, w=kernel,
                                 wci=none, wcf=none, wco=none, b=bias, forget_bias=1.0, cell_clip=-1.0).h
        return [h, *tf.gradients(tf.reduce_sum(h * weights), [x, kernel, bias])]

    for ours, theirs in zip([outputs, *gradients], evaluate(build, *arguments)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("net, steps", [("lstm", 16), ("cnn_lstm", 4), ("wide_cnn_lstm", 4)])
def test_a_batch_gives_what_its_images_give_alone(net, steps, monkeypatch):
    """No image's answer depends on its neighbours, nor on how the batch is split over the cores."""
    monkeypatch.setattr(lstm_ctc_ocr, "_cores", lambda: 2)
    ocr = LstmCtcOcr(words="ABC", words_max_num=2, im_width=16, im_height=8, n_hidden=6, net=net).resolve()
    images = np.random.default_rng(0).integers(0, 256, (16, *ocr._shape), np.uint8)

    def logits(batch):
        with tf.Graph().as_default(), tf.Session() as session:
            tf.set_random_seed(0)
            net = ocr._build_reading(ocr._build_input(batch))
            session.run(tf.global_variables_initializer())
            return [session.run(net.logits, {net.images: part}) for part in np.split(images, 16 // (batch or 16))]

    whole, alone, unknown = logits(16), logits(1), logits(None)
    assert whole[0].shape == (steps, 16, 4) and ocr.steps == steps  # (T, B, C), the blank is the fourth class
    np.testing.assert_allclose(whole[0], np.concatenate(alone, axis=1), atol=1e-5)
    np.testing.assert_allclose(whole[0], unknown[0], atol=1e-5)


@pytest.mark.parametrize("batch, cores, images", [
    (32, 1, 32), (32, 2, 16), (32, 4, 8), (32, 16, 8), (32, 3, 16), (16, 16, 8), (8, 4, 8), (4, 2, 4), (36, 16, 9)])
def test_normalisation_never_takes_its_statistics_from_a_few_images(batch, cores, images, monkeypatch):
    """However many cores there are: what is normalised of a batch, each time that it is in training."""
    monkeypatch.setattr(lstm_ctc_ocr, "_cores", lambda: cores)
    seen, batch_norm = set(), tf.nn.fused_batch_norm
    monkeypatch.setattr(tf.nn, "fused_batch_norm", lambda x, *args, **settings: seen.add(
        int(x.shape[0])) or batch_norm(x, *args, **settings))
    ocr = LstmCtcOcr(words="ABC", words_max_num=2, im_width=16, im_height=8, n_hidden=6, net="cnn_lstm").resolve()
    with tf.Graph().as_default():
        ocr.logits(tf.placeholder(tf.uint8, [batch, 8, 16]), training=True)
    assert seen == {images}


@pytest.mark.parametrize("limit, cpus", [
    (None, np.inf), ("max 100000", np.inf), ("150000 100000", 1.5), ("50000 100000", 0.5), ("", np.inf)])
def test_a_containers_cpu_quota_is_kept_to(limit, cpus, tmp_path, monkeypatch):
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit + "\n")
    quota = lstm_ctc_ocr._cpu_quota(tmp_path / "cpu.max")
    assert quota == cpus
    monkeypatch.setattr(lstm_ctc_ocr, "_cpu_quota", lambda: quota)
    monkeypatch.setattr(lstm_ctc_ocr.os, "sched_getaffinity", lambda _: range(8))
    assert lstm_ctc_ocr._cores() == min(8, np.ceil(cpus))


def enumerate_paths(logits):
    """{label: probability} by collapsing each of the C ** T alignments of one image: logits (T, C), blank last."""
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    blank, labels = logits.shape[1] - 1, {}
    for path in itertools.product(range(logits.shape[1]), repeat=len(logits)):
        label = tuple(letter for letter, _ in itertools.groupby(path) if letter != blank)
        labels[label] = labels.get(label, 0) + np.prod(probabilities[range(len(path)), path])
    return labels


LOGITS = np.random.default_rng(0).normal(scale=2, size=(5, 3, 3)).astype(np.float32)  # (T, B, C): 243 paths an image


ctcs = pytest.mark.parametrize("ctc", ["tensorflow", pytest.param("warp", marks=needs_warp())])


@ctcs
def test_ctc_loss_is_the_sum_over_all_paths(ctc):
    ocr = LstmCtcOcr(ctc=ctc).resolve()
    for image in range(LOGITS.shape[1]):
        labels = enumerate_paths(LOGITS[:, image].astype(np.float64))
        assert sum(labels.values()) == pytest.approx(1)
        labels = {label: p for label, p in labels.items() if label}
        logits = np.repeat(LOGITS[:, image:image + 1], len(labels), axis=1)
        losses = evaluate(lambda logits: ocr.ctc_loss(
            tf.SparseTensor(*ocr.sequences_to_sparse(list(labels))), logits), logits)
        np.testing.assert_allclose(losses, -np.log(list(labels.values())), rtol=1e-4)


@needs_warp()
def test_warp_ctc_is_tensorflows_loss_and_gradient():
    rng = np.random.default_rng(0)
    for _ in range(10):
        logits = rng.normal(scale=3, size=(20, 6, 5)).astype(np.float32)
        labels = [rng.integers(0, 4, rng.integers(1, 10)).tolist() for _ in range(6)]  # at most 9 + 8 steps
        weights = rng.normal(size=6).astype(np.float32)  # an upstream gradient that differs from image to image

        def build(logits, weights, ctc):
            ocr = LstmCtcOcr(ctc=ctc).resolve()
            losses = ocr.ctc_loss(tf.SparseTensor(*ocr.sequences_to_sparse(labels)), logits)
            return [losses, *tf.gradients(tf.reduce_sum(losses * weights), [logits])]

        theirs, ours = (evaluate(functools.partial(build, ctc=ctc), logits, weights) for ctc in ("tensorflow", "warp"))
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4)
        np.testing.assert_allclose(ours[1], theirs[1], atol=1e-4)


@needs_warp()
def test_warp_ctc_refuses_what_cannot_be_aligned():
    """The library itself answers success, loss 0 and a gradient that it never wrote."""
    logits = np.zeros((5, 2, 3), np.float32)
    with pytest.raises(LstmCtcOcr.Error, match="6 steps in 5"):
        lstm_ctc_ocr._warp_ctc(logits, np.array([0, 1, 0, 0, 1, 1], np.int32), np.array([2, 4], np.int32))


def test_a_wide_beam_finds_the_most_probable_label_and_its_probability():
    ocr = LstmCtcOcr(words="AB", words_max_num=2, im_width=5, beam_width=100).resolve()
    sparse, log_probability = evaluate(lambda logits: ocr.decode(logits), LOGITS)
    for image, sequence in enumerate(ocr.sparse_to_sequences(sparse)):
        labels = enumerate_paths(LOGITS[:, image].astype(np.float64))
        assert tuple(sequence) == max(labels, key=labels.get)
        assert np.exp(log_probability[image]) == pytest.approx(max(labels.values()), rel=1e-4)


@pytest.mark.parametrize("beam_width", [1, 4, 100])
@pytest.mark.parametrize("path, text", [
    ("A-A-A", "AAA"), ("AAAAA", "A"), ("AA-AA", "AA"), ("A-B-B", "ABB"), ("-----", ""), ("BA-AB", "BAAB")])
def test_repeats_are_neither_lost_nor_invented(path, text, beam_width):
    """The field's most reported fault: a decoder that merges repeats reads AAA as A."""
    ocr = LstmCtcOcr(words="AB", words_max_num=3, im_width=5, beam_width=beam_width).resolve()
    logits = 20 * np.eye(3, dtype=np.float32)[["AB-".index(step) for step in path]][:, np.newaxis]
    sparse, log_probability = evaluate(lambda logits: ocr.decode(logits), logits)
    assert [ocr.sequence_to_text(s) for s in ocr.sparse_to_sequences(sparse)] == [text]
    assert np.exp(log_probability) == pytest.approx([1], abs=1e-3)


def test_a_repeat_at_the_limit_has_a_path():
    """"No valid path found" cannot happen: the longest text of equal letters fits the narrowest width allowed."""
    ocr = LstmCtcOcr(words="AB", words_max_num=3, im_width=5).resolve()
    logits = np.zeros((ocr.im_width, 1, 3), np.float32)
    loss = evaluate(lambda logits: ocr.ctc_loss(tf.SparseTensor(*ocr.sequences_to_sparse([[0, 0, 0]])), logits), logits)
    assert loss == pytest.approx([5 * np.log(3)], rel=1e-5)  # A-A-A is its only path
