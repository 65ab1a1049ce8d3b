"""text: vocabularies, cleaning, error rates."""
import json

import jiwer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlearn.text import (
    CharacterVocabulary, SubwordVocabulary, WordVocabulary, character_error_rate, edit_distance, edit_table, error_rate, normalise_text,
    vocabulary_from_dict, word_error_rate,
)

SENTENCES = [f"turn {s} the {r} {d}" for s in ("on", "off") for r in ("kitchen", "bedroom", "garage") for d in ("light", "fan", "heater")]
LETTERS = st.text(alphabet=" 'abcdefghijklmnopqrstuvwxyz", max_size=40)
WORDS = st.lists(st.sampled_from("a b c dd e".split()), max_size=9).map(" ".join)


@pytest.fixture(scope="module")
def subwords():
    return SubwordVocabulary.train(SENTENCES, 50)


@given(LETTERS)
def test_characters_come_back(text):
    vocabulary = CharacterVocabulary()
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_specials_have_numbers_of_their_own(subwords):
    for vocabulary in (CharacterVocabulary(), WordVocabulary(), subwords):
        specials = {vocabulary.blank, vocabulary.pad, vocabulary.sos, vocabulary.eos, vocabulary.unk}
        assert specials == {0, 1, 2, 3, 4} and vocabulary.blank == 0
        assert len(vocabulary) == 5 + len(vocabulary.symbols)
        assert vocabulary.decode([0, 1, 2, 3]) == ""
    assert 0 not in CharacterVocabulary().encode("a")


def test_unknown_characters(subwords):
    with pytest.raises(ValueError, match="'1' at position 5 of 'room 12'"):
        CharacterVocabulary().encode("room 12")
    assert CharacterVocabulary(unknown="drop").encode("a1b") == CharacterVocabulary().encode("ab")
    assert CharacterVocabulary(unknown="replace").encode("a1")[1] == 4
    assert CharacterVocabulary(unknown="replace").decode([4]) == "\ufffd"
    with pytest.raises(ValueError, match="word 1 of 'one ten', 'ten'"):
        WordVocabulary().encode("one ten")
    with pytest.raises(ValueError, match="was never seen"):
        subwords.encode("turn zebra")
    with pytest.raises(ValueError, match="expected 'error', 'drop' or 'replace'"):
        CharacterVocabulary(unknown="ignore")


def test_alphabets_that_cannot_be():
    for characters in ("", "abca"):
        with pytest.raises(ValueError, match="each character needs one number"):
            CharacterVocabulary(characters)
    for words in ([], ["a", "a"], ["a b"], [""]):
        with pytest.raises(ValueError, match="given once each"):
            WordVocabulary(words)


def test_batch_is_padded_with_lengths():
    batch, lengths = CharacterVocabulary("abc").encode_batch(["a", "cab"])
    assert batch.tolist() == [[5, 1, 1], [7, 5, 6]] and lengths.tolist() == [1, 3] and batch.dtype == torch.int64
    with pytest.raises(ValueError, match="text 1 of the batch, '', has no symbols"):
        CharacterVocabulary().encode_batch(["a", ""])
    with pytest.raises(ValueError, match="no texts"):
        CharacterVocabulary().encode_batch([])


def test_numbers_of_another_vocabulary_are_refused():
    for bad in (8, -1):
        with pytest.raises(ValueError, match="no symbol of this vocabulary"):
            CharacterVocabulary("abc").decode([bad])


def test_subwords_come_back_and_are_reproducible(subwords):
    for sentence in SENTENCES:
        assert subwords.decode(subwords.encode(sentence)) == sentence
    again = SubwordVocabulary.train(SENTENCES, 50)
    assert again.symbols == subwords.symbols and len(subwords) == 50
    assert len(subwords.encode(SENTENCES[0])) < len(SENTENCES[0])
    with pytest.raises(ValueError, match="no vocabulary of 9999"):
        SubwordVocabulary.train(SENTENCES, 9999)
    with pytest.raises(ValueError, match="no texts"):
        SubwordVocabulary.train([], 50)
    with pytest.raises(ValueError, match="no sentencepiece model"):
        SubwordVocabulary(b"damaged")


def test_round_trip_through_json(subwords):
    for vocabulary in (CharacterVocabulary("abc", unknown="drop"), WordVocabulary(["yes", "no"]), subwords):
        again = vocabulary_from_dict(json.loads(json.dumps(vocabulary.to_dict())))
        assert again == vocabulary and again.symbols == vocabulary.symbols
    with pytest.raises(ValueError, match="no vocabulary of kind 'bytes'"):
        vocabulary_from_dict({"kind": "bytes"})
    with pytest.raises(ValueError, match="lacks 'words'"):
        vocabulary_from_dict({"kind": "words", "unknown": "error"})


def test_normalise_text():
    assert normalise_text("  What’s up, Émile?  ") == "what's up emile"
    assert normalise_text("ice-cream") == "ice cream"
    assert normalise_text("") == ""
    for text, sign in (("at 12", "'1', '2'"), ("5 €", "'5', '€'"), ("a+b", r"'\+'")):
        with pytest.raises(ValueError, match=sign):
            normalise_text(text)


@given(st.text(max_size=30))
def test_normalised_text_can_always_be_encoded(text):
    try:
        clean = normalise_text(text)
    except ValueError:
        return
    assert CharacterVocabulary().decode(CharacterVocabulary().encode(clean)) == clean
    assert normalise_text(clean) == clean


def test_edit_distance_by_hand():
    assert edit_table("ab", "b") == [[0, 1], [1, 1], [2, 1]]
    alignment = edit_distance("a b c d e f".split(), "x a b d e g".split())
    assert (alignment.hits, alignment.substitutions, alignment.deletions, alignment.insertions) == (4, 1, 1, 1)
    assert alignment.pairs == ((None, "x"), ("a", "a"), ("b", "b"), ("c", None), ("d", "d"), ("e", "e"), ("f", "g"))
    assert edit_distance([], ["a"]).insertions == 1 and edit_distance(["a"], []).deletions == 1 and edit_distance([], []).edits == 0


@settings(max_examples=200)
@given(WORDS, WORDS)
def test_alignment_is_consistent(reference, hypothesis):
    reference, hypothesis = reference.split(), hypothesis.split()
    alignment = edit_distance(reference, hypothesis)
    assert [r for r, _ in alignment.pairs if r is not None] == reference
    assert [h for _, h in alignment.pairs if h is not None] == hypothesis
    assert alignment.edits == edit_table(reference, hypothesis)[-1][-1] == edit_distance(hypothesis, reference).edits
    assert alignment.hits + alignment.substitutions + alignment.deletions == len(reference)


@settings(max_examples=200)
@given(st.lists(st.tuples(WORDS.filter(str.strip), WORDS), min_size=1, max_size=5))
def test_error_rates_equal_jiwer(pairs):
    references, hypotheses = [r for r, _ in pairs], [h for _, h in pairs]
    assert word_error_rate(references, hypotheses) == pytest.approx(jiwer.wer(references, hypotheses), abs=1e-12)
    assert character_error_rate(references, hypotheses) == pytest.approx(jiwer.cer(references, hypotheses), abs=1e-12)


def test_error_rate_of_a_corpus_is_no_mean_of_utterances():
    rate = error_rate(["yes", "a b c d e f g"], ["no", "a b c d e f g"])
    assert rate.rate == 1 / 8 and rate.n_reference == 8 and rate.substitutions == 1
    assert word_error_rate(["yes"], ["no it is not"]) == 4
    assert word_error_rate(["yes", ""], ["yes", "no"]) == 1
    with pytest.raises(ValueError, match="no words"):
        word_error_rate([""], ["a"])
    with pytest.raises(ValueError, match="2 references but 1 hypotheses"):
        word_error_rate(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="expected 'word' or 'character'"):
        error_rate(["a"], ["a"], unit="letter")
