"""text -> sequence -> sparse tensor -> sequence -> text, and the settings that allow it."""

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from lstm_ctc_ocr import LstmCtcOcr, edits, score

ocr = LstmCtcOcr().resolve()
texts = st.text(alphabet=ocr.words, max_size=10)


in_parts = LstmCtcOcr(label_parts=3).resolve()


@given(texts, st.sampled_from([ocr, in_parts]))
@example("", in_parts)
@example("AAA", ocr)
@example("AAA", in_parts)
def test_text_and_sequence_are_inverse(text, ocr):
    sequence = ocr.text_to_sequence(text)
    assert ocr.sequence_to_text(sequence) == text and len(sequence) == len(text) * ocr.label_parts


@given(texts)
def test_in_parts_no_class_follows_itself(text):
    """So that CTC never needs a blank between two of them."""
    sequence = in_parts.text_to_sequence(text)
    assert all(a != b for a, b in zip(sequence, sequence[1:]))


@pytest.mark.parametrize("sequence, text", [
    ([0, 2], "A"), ([1, 2], "A"), ([0, 1], "A"),  # a part was missed
    ([0], ""), ([0, 4, 5], "B"),  # one part alone is no letter
    ([0, 2, 0, 1], "AA"), ([0, 1, 2, 3, 4, 5, 4], "AB")])
def test_a_letter_counts_once_most_of_its_parts_are_there(sequence, text):
    assert in_parts.sequence_to_text(sequence) == text


@given(st.lists(texts, min_size=1, max_size=8))
@example(["", "AAA", ""])
@example([""])
def test_sequences_and_sparse_are_inverse_row_by_row(batch):
    """The article's conversion dropped empty rows, which moved every later answer to the wrong image."""
    sequences = [ocr.text_to_sequence(text) for text in batch]
    indices, values, dense_shape = ocr.sequences_to_sparse(sequences)
    assert ocr.sparse_to_sequences((indices, values, dense_shape)) == sequences
    assert tuple(dense_shape) == (len(batch), max(map(len, batch)))
    assert indices.shape == (sum(map(len, batch)), 2) and values.dtype == np.int32


def test_a_letter_outside_the_alphabet_is_named():
    with pytest.raises(LstmCtcOcr.Error, match="'Ab' holds 'b'"):
        ocr.text_to_sequence("Ab")


@pytest.mark.parametrize("settings, complaint", [
    (dict(words="AAB"), "each of them once"),
    (dict(words=""), "at least one letter"),
    (dict(words_max_num=129), "257 steps, in 256: lower --words-max-num"),  # 129 equal letters and 128 blanks
    (dict(words_max_num=33, net="cnn_lstm"), "65 steps, in 64"),
    (dict(words_max_num=22, net="cnn_lstm", label_parts=3), "66 steps, in 64"),
    (dict(label_parts=2), "--label-parts must be one of 1, 3"),
    (dict(ctc="baidu"), "--ctc must be one of"),
    (dict(im_width=0), "--im-width must be 1 to"),
    (dict(batch_size=-1), "--batch-size must be 1 to"),
    (dict(lr=0.0), "--lr must be above 0"),
    (dict(lr=float("nan")), "--lr must be above 0"),
    (dict(epoch_max=float("inf")), "--epoch-max must be above 0 and finite"),
    (dict(seed=-1), "--seed must be 0 to"),
    (dict(beam_width=101), "--beam-width must be 1 to 100"),
    (dict(net="transformer"), "--net must be one of"),
])
def test_impossible_settings_are_refused_at_once(settings, complaint):
    with pytest.raises(LstmCtcOcr.Error, match=complaint) as caught:
        LstmCtcOcr(**settings).resolve()
    assert "\n" not in str(caught.value)


def test_the_first_source_that_has_an_open_setting_decides_it():
    given = LstmCtcOcr(n_hidden=8)
    ocr = given.resolve({"n_hidden": 9, "lr": None}, {"lr": 1.0, "words": "AB"}, {"words": "C"})
    assert (ocr.n_hidden, ocr.lr, ocr.words, ocr.im_width) == (8, None, "AB", 256)
    assert ocr.resolve().lr == 4e-3 and given.words is None


@pytest.mark.parametrize("settings", [
    dict(words_max_num=128), dict(words_max_num=32, net="cnn_lstm"),
    dict(words_max_num=21, net="cnn_lstm", label_parts=3)])
def test_the_longest_text_that_ctc_can_align_is_allowed(settings):
    assert LstmCtcOcr(**settings).resolve().words_max_num == settings["words_max_num"]


@pytest.mark.parametrize("a, b, distance", [
    ("", "", 0), ("", "ABC", 3), ("ABC", "", 3), ("KITTEN", "SITTING", 3), ("AAA", "AA", 1), ("AB", "BA", 2),
    ("FLAW", "LAWN", 2), ("PIY", "PIY", 0)])
def test_edit_distance(a, b, distance):
    assert len(edits(a, b)) == distance


def test_score_counts_by_length_and_by_repeat():
    scores = score(["A", "AA", "AB", "BB", "ABA"], ["A", "A", "AB", "BB", ""])
    assert scores["accuracy"] == 3 / 5 and scores["cer"] == 4 / 10
    assert scores["by_length"] == {1: (1, 1), 2: (2, 3), 3: (0, 1)}
    assert scores["by_repeat"] == {"some": (1, 2), "none": (2, 3)}
