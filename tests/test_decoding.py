"""The decoder against the enumeration of all paths, and against TensorFlow's own."""

import itertools
import string

import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from hypothesis import example, given, settings, strategies as st

import lstm_ctc_ocr
from lstm_ctc_ocr import LstmCtcOcr


def enumerate_sequences(logits, read_as=None):
    """{sequence: probability} by collapsing every alignment of one image: logits (T, C), blank last.

    read_as: for each class what it is read as, None where it cannot be.
    """
    steps, classes = logits.shape
    p = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    p = (p / p.sum(axis=1, keepdims=True)).tolist()
    read_as = [*(read_as or range(classes - 1)), "blank"]
    found = {}
    for path in itertools.product([c for c in range(classes) if read_as[c] is not None], repeat=steps):
        sequence = tuple(letter for letter, _ in itertools.groupby(read_as[c] for c in path) if letter != "blank")
        probability = 1
        for step, c in zip(p, path):
            probability *= step[c]
        found[sequence] = found.get(sequence, 0) + probability
    return found


def random_logits(seed, steps, batch, classes, scale):
    return np.random.default_rng(seed).normal(scale=scale, size=(steps, batch, classes)).astype(np.float32)


def evaluate(build, *arrays):
    with tf.Graph().as_default(), tf.Session() as session:
        return session.run(build(*map(tf.constant, arrays)))


seeds, scales = st.integers(0, 2**32), st.sampled_from([0.1, 1, 4, 30])  # from flat to surer than a network is
tiny = st.tuples(seeds, st.integers(1, 5), st.just(2), st.integers(2, 4), scales)


@settings(max_examples=60, deadline=None)
@given(tiny, st.sampled_from([1, 4, 100]))
@example((0, 5, 2, 3, 0.1), 1)
def test_a_text_has_its_exact_probability_and_a_wide_beam_finds_the_best(shape, beam_width):
    logits = random_logits(*shape)
    ocr = LstmCtcOcr(words="ABC"[:shape[3] - 1], words_max_num=5, im_width=9, beam_width=beam_width).resolve()
    for image, (text, confidence) in enumerate(ocr.texts(logits)):
        every = enumerate_sequences(logits[:, image])
        assert confidence == pytest.approx(every[tuple(map(ocr.words.index, text))], rel=1e-5)
        if beam_width == 100 or beam_width > 1 and max(every.values()) > 0.5:  # a beam of one may lose it
            assert confidence == pytest.approx(max(every.values()), rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(seeds, scales, st.sampled_from(["A", "a", "B", "AB", "aB", "Aa", "Aab"]),
       st.sampled_from(["", "1", "2", "3", "1-2", "2-3"]))
def test_what_is_known_gives_the_best_of_what_is_left(seed, scale, letters, length):
    """Paths through other letters count nothing, and those through the other case count for the one allowed."""
    logits = random_logits(seed, 5, 2, 4, scale)
    ocr = LstmCtcOcr(words="AaB", words_max_num=5, im_width=9, beam_width=100).resolve()  # no text of 5 steps is longer
    read_as = [next((other for other in (word, word.swapcase()) if other in letters), None) for word in ocr.words]
    low, high = (int(length[0]), int(length[-1])) if length else (0, 5)
    for image, (text, confidence) in enumerate(ocr.texts(logits, ocr.restrict(letters, length))):
        every = enumerate_sequences(logits[:, image], read_as)
        fitting = {"".join(sequence): p for sequence, p in every.items() if low <= len(sequence) <= high}
        assert confidence == pytest.approx(fitting[text], rel=1e-5)
        assert confidence == pytest.approx(max(fitting.values()), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(seeds, scales, st.sampled_from(["", "4"]))
def test_of_letters_with_an_equals_sign_a_sum_is_read_with_its_exact_probability(seed, scale, length):
    logits = random_logits(seed, 6, 1, 4, scale)
    ocr = LstmCtcOcr(words="1+=", words_max_num=5, im_width=9, beam_width=100).resolve()
    (text, confidence), = ocr.texts(logits, ocr.restrict("1+=", length))
    every = {"".join(map(ocr.words.__getitem__, sequence)): p for sequence, p in enumerate_sequences(logits[:, 0]).items()}
    sums = {text: every[text] for text in ("1+1=", "1+11=", "11+1=") if len(text) == 4 or not length}
    assert confidence == pytest.approx(sums[text], rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(seeds, scales, st.sampled_from(["", "1"]))
def test_of_label_parts_the_best_sequence_of_parts_is_read(seed, scale, length):
    logits = random_logits(seed, 6, 1, 4, scale)
    ocr = LstmCtcOcr(words="A", words_max_num=2, im_width=6, label_parts=3, beam_width=100).resolve()
    (text, confidence), = ocr.texts(logits, ocr.restrict(length=length))
    every = {sequence: p for sequence, p in enumerate_sequences(logits[:, 0]).items()
             if not length or len(ocr.sequence_to_text(sequence)) == 1}
    best = max(every, key=every.get)
    assert confidence == pytest.approx(every[best], rel=1e-5) and text == ocr.sequence_to_text(best)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_steps_that_say_the_same_for_sure_are_searched_but_once(seed):
    logits = random_logits(seed, 8, 1, 3, 1)
    logits[[0, 1, 6, 7]], logits[[3, 4]] = [0, 0, 20], [20, 0, 0]
    ocr, searched = LstmCtcOcr(words="AB", words_max_num=5, im_width=9, beam_width=100).resolve(), []
    with pytest.MonkeyPatch.context() as patch:
        step = LstmCtcOcr._extended
        patch.setattr(LstmCtcOcr, "_extended", lambda *args: searched.append(args[2]) or step(*args))
        (text, confidence), = ocr.texts(logits)
    every = enumerate_sequences(logits[:, 0])
    best = max(every, key=every.get)
    assert text == "".join(map(ocr.words.__getitem__, best)) and confidence == pytest.approx(every[best], rel=1e-5)
    p = ocr.softmax(logits)
    sure, = ocr.sequence_probabilities(ocr.greedy(p), p) > .5
    np.testing.assert_array_equal(searched, [] if sure else p[[0, 2, 3, 5, 6], 0])


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from([1, 4]), st.sampled_from(["", "2"]))
def test_views_of_a_doubtful_image_agree_on_what_is_likeliest_on_average(seed, scale, length):
    """A further view proposes what its best classes spell or, if that has not the known length, its most probable."""
    first, *further = (random_logits(seed + view, steps, 3, 3, scale) for view, steps in enumerate((5, 4, 6)))
    ocr, asked = LstmCtcOcr(words="AB", words_max_num=5, im_width=11, beam_width=100).resolve(), [set(), set()]
    doubts = 0.6, 0.4
    readings = ocr.texts(first, ocr.restrict(length=length), [
        (doubts[view], lambda rows, view=view: asked[view].update(rows) or further[view][:, rows]) for view in (0, 1)])

    def fitting(logits):
        return {sequence: p for sequence, p in enumerate_sequences(logits).items() if not length or len(sequence) == 2}

    for image, (text, confidence) in enumerate(readings):
        views = [fitting(first[:, image])]
        means = {max(views[0], key=views[0].get): max(views[0].values())}
        for doubt, rows, logits in zip(doubts, asked, further):
            assert (image in rows) == (max(means.values()) <= doubt)
            if image in rows:
                views.append(fitting(logits[:, image]))
                best = itertools.groupby(logits[:, image].argmax(axis=1))
                spelled = tuple(c for c, _ in best if c < 2)
                proposed = spelled if spelled in views[-1] else max(views[-1], key=views[-1].get)
                means = {sequence: sum(view.get(sequence, 0) for view in views) / len(views)
                         for sequence in [*means, proposed]}
        assert confidence == pytest.approx(max(means.values()), rel=1e-5)
        assert means[tuple(map(ocr.words.index, text))] == pytest.approx(confidence, rel=1e-5)


@pytest.mark.parametrize("label_parts, length", [(1, 4), (3, 2)])
@pytest.mark.parametrize("words", ["A", "AB"])
@pytest.mark.parametrize("beam_width", [1, 4])
def test_a_text_of_every_length_that_the_steps_allow_is_found(words, beam_width, label_parts, length):
    """On an image that is surely empty, with a beam of one, and where repeats leave no step to spare."""
    ocr = LstmCtcOcr(words=words, words_max_num=length, im_width=7, label_parts=label_parts, beam_width=beam_width).resolve()
    logits = np.zeros((7, 1, len(words) * label_parts + 1), np.float32)
    logits[..., -1] = 200
    for wanted in range(1, length + 1):
        (text, confidence), = ocr.texts(logits, ocr.restrict(length=str(wanted)))
        assert len(text) == wanted and 0 <= confidence < 1e-80
    assert ocr.texts(logits) == [("", 1)]


def captcha_logits(steps, letters, batch):
    """As a trained network gives them: blanks with peaks of letters; from image to image more of them are doubtful."""
    rng = np.random.default_rng([steps, letters])
    logits = rng.normal(size=(steps, batch, letters + 1)).astype(np.float32)
    logits[..., -1] += 12
    for image in range(batch):
        for step in np.arange(2, steps - 4, steps // 8):
            letter, other = rng.integers(0, letters, 2)
            logits[step, image, letter] += 24
            logits[step + rng.integers(0, 3), image, other] += rng.uniform(0, 36 * image / batch)
    return logits


@pytest.mark.parametrize("steps, letters", [(64, 26), (64, 62), (256, 26)])
def test_on_real_sizes_it_is_at_least_as_good_as_tensorflows_beam(steps, letters):
    logits = captcha_logits(steps, letters, 16)
    ocr = LstmCtcOcr(words=(string.ascii_uppercase + string.ascii_lowercase + string.digits)[:letters]).resolve()
    readings = ocr.texts(logits)
    lengths = np.full(16, steps, np.int32)
    (sparse,), log_p = evaluate(lambda x: tf.nn.ctc_beam_search_decoder(x, lengths, 100, 1, False), logits)
    sequences = [ocr.text_to_sequence(text) for text, _ in readings]
    labels = tf.SparseTensorValue(*ocr.sequences_to_sparse(sequences))
    losses = evaluate(lambda x: tf.nn.ctc_loss(tf.SparseTensor.from_value(labels), x, lengths), logits)
    confidences = np.array([confidence for _, confidence in readings])
    np.testing.assert_allclose(confidences, np.exp(-losses), rtol=1e-3)
    assert 3 <= (confidences > 0.5).sum() <= 13  # the shortcut and the search
    theirs = ocr.sparse_to_sequences(sparse)
    for ours, their, confidence, log_probability in zip(sequences, theirs, confidences, log_p[:, 0]):
        assert ours == their or confidence >= np.exp(log_probability) * 0.999
    assert sum(map(list.__eq__, sequences, theirs)) >= 15


@pytest.mark.parametrize("letters, length, complaint", [
    ("AX7", "", "does not know .7., it knows AX"), ("Aa", "", "does not know .a."),
    ("", "4", "from 1 to this model's 3, not '4'"), ("", "0", "length must be"), ("", "3-2", "length must be"),
    ("", "1-4", "length must be"), ("", "-1", "length must be"), ("", "many", "length must be"),
    ("", "٣", "length must be")])
def test_what_the_model_cannot_read_is_refused_in_one_line(ocr, letters, length, complaint):
    with pytest.raises(LstmCtcOcr.Error, match=complaint) as caught:
        ocr.restrict(letters, length)
    assert "\n" not in str(caught.value)


def test_a_model_of_capitals_reads_small_letters_where_those_are_asked_for(ocr):
    logits = 20 * np.eye(3, dtype=np.float32)[[0, 2, 1]][:, None]  # A-X
    texts = [ocr.texts(logits, ocr.restrict(letters))[0][0] for letters in ("", "ax", "aX", "Xa")]
    assert texts == ["AX", "ax", "aX", "aX"]


def test_a_beam_of_one_does_not_take_a_long_letter_for_two():
    """AA would need a blank, which this image surely has not; AX and XA need one step of an X."""
    logits = np.log(np.float32([[[0.99, 0.01, 1e-6]]] * 5))
    ocr = LstmCtcOcr(words="AX", words_max_num=3, im_width=5, beam_width=1).resolve()
    assert ocr.texts(logits, ocr.restrict(length="2"))[0][0] in ("AX", "XA")


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_the_temperature_that_fits_is_the_one_that_texts_were_drawn_with(temperature):
    """Texts are drawn from the network's own probabilities at that temperature, class by class."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 2, (5, 4000, 4))
    p = np.exp(logits / temperature)
    paths = (p.cumsum(axis=2) / p.sum(axis=2, keepdims=True) < generator.random((5, 4000, 1))).sum(axis=2)  # (T, B)
    drawn = [[a for a, before in zip(path, [3, *path]) if a != 3 and a != before] for path in paths.T.tolist()]
    assert lstm_ctc_ocr.fit_temperature(*lstm_ctc_ocr.greedy_confidences(logits, drawn)) == temperature
