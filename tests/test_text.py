"""text: vocabularies, cleaning, error rates."""
import copy
import doctest
import json
import pickle
import subprocess
import sys
from functools import lru_cache

import jiwer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import speechlearn.text
from speechlearn.text import (
    CharacterVocabulary, SubwordVocabulary, WordVocabulary, character_error_rate, edit_distance, edit_table, error_rate, normalise_text,
    plot_edit_table, vocabulary_from_dict, word_error_rate,
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


def fewest_edits(reference, hypothesis):
    """The oracle: try every possibility, with nothing shared with the table."""

    @lru_cache(maxsize=None)
    def from_here(i, j):
        if i == len(reference) or j == len(hypothesis):
            return len(reference) - i + len(hypothesis) - j
        kept = from_here(i + 1, j + 1) + (reference[i] != hypothesis[j])
        return min(kept, from_here(i + 1, j) + 1, from_here(i, j + 1) + 1)

    return from_here(0, 0)


SHORT = st.text(alphabet="abc", max_size=6)


@given(SHORT, SHORT)
def test_edit_distance_equals_trying_everything(a, b):
    assert edit_distance(a, b).edits == fewest_edits(a, b)


@given(SHORT, SHORT, SHORT)
def test_edit_distance_is_a_distance(a, b, c):
    def between(x, y):
        return edit_distance(x, y).edits

    assert (between(a, b) == 0) == (a == b)
    assert between(a, c) <= between(a, b) + between(b, c)
    assert abs(len(a) - len(b)) <= between(a, b) <= max(len(a), len(b))


def test_pairs_spell_out_the_counts():
    alignment = edit_distance("kitten", "sitting")
    kinds = [("D" if h is None else "I" if r is None else "H" if r == h else "S") for r, h in alignment.pairs]
    assert "".join(kinds) == "SHHHSHI"
    assert (alignment.hits, alignment.substitutions, alignment.deletions, alignment.insertions) == (4, 2, 0, 1)


def test_ties_prefer_substitutions_from_the_end():
    # Two edits either way: two substitutions, or one deletion and one insertion around a hit. Ours is the first; the sum is what counts.
    ours, theirs = edit_distance(["a", "b"], ["b", "a"]), jiwer.process_words("a b", "b a")
    assert (ours.substitutions, ours.deletions, ours.insertions) == (2, 0, 0)
    assert ours.edits == theirs.substitutions + theirs.deletions + theirs.insertions
    assert edit_distance("aa", "a").pairs == (("a", None), ("a", "a"))
    assert edit_distance("a", "aa").pairs == ((None, "a"), ("a", "a"))


@settings(max_examples=100)
@given(st.lists(st.tuples(WORDS.filter(str.strip), WORDS), min_size=1, max_size=4))
def test_edits_of_a_corpus_equal_jiwer(pairs):
    references, hypotheses = [r for r, _ in pairs], [h for _, h in pairs]
    for unit, process in (("word", jiwer.process_words), ("character", jiwer.process_characters)):
        ours, theirs = error_rate(references, hypotheses, unit=unit), process(references, hypotheses)
        assert ours.substitutions + ours.deletions + ours.insertions == theirs.substitutions + theirs.deletions + theirs.insertions
        # Deletions minus insertions is the difference of the lengths, however a tie is broken.
        assert ours.deletions - ours.insertions == theirs.deletions - theirs.insertions
        assert ours.n_reference == theirs.hits + theirs.substitutions + theirs.deletions


def test_error_rate_counts_each_kind():
    rate = error_rate(["a b c", "d", "e f"], ["a x c", "", "e f g h"])
    assert (rate.substitutions, rate.deletions, rate.insertions, rate.n_reference) == (1, 1, 2, 6)
    assert rate.rate == pytest.approx(4 / 6)


def test_empty_references():
    # Inside a corpus an empty reference adds its insertions, in jiwer as well. Alone it has no rate; jiwer calls it 0 or 1.
    assert word_error_rate(["a", ""], ["a", "x y"]) == jiwer.wer(["a", ""], ["a", "x y"]) == 2
    assert character_error_rate(["a", ""], ["a", "xy"]) == jiwer.cer(["a", ""], ["a", "xy"]) == 2
    for hypothesis in ("", "a"):
        for measure, unit in ((word_error_rate, "words"), (character_error_rate, "characters")):
            with pytest.raises(ValueError, match=f"the references hold no {unit}"):
                measure([" "], [hypothesis])
    with pytest.raises(ValueError, match="the references hold no words"):
        word_error_rate([], [])


def test_white_space_in_error_rates():
    assert word_error_rate([" a  b\n"], ["a b"]) == 0
    assert word_error_rate(["a\tb"], ["a b"]) == 0
    assert character_error_rate([" ab "], ["ab"]) == 0
    assert character_error_rate(["a b"], ["ab"]) == pytest.approx(1 / 3)


def test_documented_examples_are_true():
    result = doctest.testmod(speechlearn.text)
    assert result.attempted >= 4 and result.failed == 0


def test_heavy_libraries_are_imported_late():
    code = "import sys, speechlearn.text; print([m for m in ('sentencepiece', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_sentencepiece_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert CharacterVocabulary().encode("a")
    with pytest.raises(ImportError, match="pip install sentencepiece"):
        SubwordVocabulary.train(SENTENCES, 50)


def test_training_leaves_no_files_and_takes_any_iterable(subwords, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert SubwordVocabulary.train((sentence for sentence in SENTENCES), 50) == subwords
    assert list(tmp_path.iterdir()) == []


def test_subwords_and_unknown_characters(subwords):
    drop, replace = (SubwordVocabulary(subwords.model, unknown=policy) for policy in ("drop", "replace"))
    known = subwords.encode("turn on")
    assert replace.encode("turn on €")[-1] == replace.unk and replace.decode(replace.encode("turn on €")) == "turn on \ufffd"
    assert replace.unk not in drop.encode("turn on €") and drop.encode("turn on €")[: len(known)] == known
    with pytest.raises(ValueError, match="'€' at position 5 of 'turn €'"):
        subwords.encode("turn €")


def test_words_and_unknown_words():
    assert WordVocabulary(unknown="drop").encode("one ten two") == WordVocabulary().encode("one two")
    replace = WordVocabulary(unknown="replace")
    assert replace.encode("one ten")[1] == replace.unk and replace.decode(replace.encode("one ten")) == "one \ufffd"
    assert WordVocabulary().encode("  one   two ") == WordVocabulary().encode("one two")


def test_the_policy_belongs_to_the_description():
    for vocabulary in (CharacterVocabulary(unknown="drop"), WordVocabulary(unknown="replace")):
        assert vocabulary_from_dict(vocabulary.to_dict()).unknown == vocabulary.unknown
    assert CharacterVocabulary() != CharacterVocabulary(unknown="drop")
    assert CharacterVocabulary("ab") != CharacterVocabulary("ba") and CharacterVocabulary("ab") != WordVocabulary(["a", "b"])


def test_description_is_not_changed_by_reading():
    values = CharacterVocabulary("abc").to_dict()
    vocabulary_from_dict(values)
    assert values == {"kind": "characters", "characters": "abc", "unknown": "error"}


def test_vocabularies_can_go_to_workers(subwords):
    for vocabulary in (CharacterVocabulary(), WordVocabulary(), subwords):
        for again in (pickle.loads(pickle.dumps(vocabulary)), copy.deepcopy(vocabulary)):
            assert again == vocabulary and again.symbols == vocabulary.symbols
    assert pickle.loads(pickle.dumps(subwords)).encode(SENTENCES[0]) == subwords.encode(SENTENCES[0])


@given(st.lists(LETTERS.filter(bool), min_size=1, max_size=5))
def test_rows_of_a_batch_decode_to_their_texts(texts):
    vocabulary = CharacterVocabulary()
    batch, lengths = vocabulary.encode_batch(texts)
    assert batch.shape == (len(texts), max(map(len, texts))) and lengths.dtype == torch.int64
    assert [vocabulary.decode(row) for row in batch] == texts
    assert (batch == vocabulary.pad).sum() == batch.numel() - lengths.sum()


def test_a_text_that_loses_everything_is_named():
    with pytest.raises(ValueError, match="text 1 of the batch, '12', has no symbols"):
        CharacterVocabulary(unknown="drop").encode_batch(["a", "12"])


def test_decode_does_not_collapse():
    vocabulary = CharacterVocabulary("ab")
    assert vocabulary.decode([5, 5, 0, 5, 3]) == "aaa"


def steps_in(axes):
    """{kind: (cells, count in the legend)} of the marked steps."""
    found = {}
    for marks, text in zip(axes.collections[1:], axes.get_legend().get_texts(), strict=True):  # the first one lies under the start
        kind, _, count = text.get_text().partition(": ")
        assert marks.get_label() == text.get_text()
        found[kind] = ([tuple(map(int, cell)) for cell in marks.get_offsets().tolist()], int(count))
    return found


def test_plot_of_the_table():
    reference, hypothesis = "turn on the light".split(), "turn the lights".split()
    axes = plot_edit_table(reference, hypothesis)
    (path,) = axes.lines
    assert path.get_xydata().tolist() == [[0, 0], [1, 1], [1, 2], [2, 3], [3, 4]]
    assert steps_in(axes) == {"hits": ([(1, 1), (2, 3)], 2), "substitutions": ([(3, 4)], 1), "deletions": ([(1, 2)], 1), "insertions": ([], 0)}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["start", *hypothesis]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["start", *reference]
    assert [text.get_text() for text in axes.texts] == [str(value) for row in edit_table(reference, hypothesis) for value in row]
    import matplotlib.pyplot as plt

    plt.close(axes.figure)


def test_plot_of_the_table_tells_steps_by_shape_and_by_colour():
    import matplotlib.pyplot as plt

    axes = plot_edit_table("a b c d e f".split(), "x a b c e g".split())
    assert {kind: count for kind, (_, count) in steps_in(axes).items()} == {"hits": 4, "substitutions": 1, "deletions": 1, "insertions": 1}
    marks = axes.collections[1:]
    assert len({m.get_paths()[0].vertices.tobytes() for m in marks}) == 4 and len({m.get_edgecolor().tobytes() for m in marks}) == 4
    plt.close(axes.figure)


@settings(max_examples=10, deadline=None)
@given(WORDS, WORDS)
def test_plot_of_the_table_marks_every_step_once(a, b):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    assert plot_edit_table(a.split(), b.split(), ax=axes) is axes
    cells = [cell for kind_cells, _ in steps_in(axes).values() for cell in kind_cells]
    (path,) = axes.lines
    assert sorted(cells) == sorted(tuple(map(int, point)) for point in path.get_xydata()[1:])
    assert path.get_xydata()[-1].tolist() == [len(b.split()), len(a.split())]
    edits = sum(count for kind, (_, count) in steps_in(axes).items() if kind != "hits")
    assert edits == (round(jiwer.wer(a, b) * len(a.split())) if a.split() else len(b.split()))
    plt.close(figure)


def test_plot_of_two_texts_has_letters_on_its_axes():
    import matplotlib.pyplot as plt

    axes = plot_edit_table("weather", "weater")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["start", *"weather"]
    assert steps_in(axes)["deletions"] == ([(4, 5)], 1)
    plt.close(axes.figure)


def test_one_text_is_no_list_of_texts():
    # A string is a sequence of strings: "four two" against "four too" once had a word error rate of 1/7, one word per letter.
    with pytest.raises(TypeError, match=r"references is one text, 'four two'.*write \['four two'\]"):
        word_error_rate("four two", "four too")
    with pytest.raises(TypeError, match="hypotheses is one text"):
        character_error_rate(["a"], "b")
    with pytest.raises(TypeError, match="texts is one text, 'go'"):
        CharacterVocabulary().encode_batch("go")
    with pytest.raises(TypeError, match="words is one text"):
        WordVocabulary("yes")
    with pytest.raises(TypeError, match="texts is one text"):
        SubwordVocabulary.train("turn on the light", 20)


def test_long_texts_are_not_left_out():
    vocabulary = SubwordVocabulary.train([*SENTENCES, " ".join(["zebra"] * 1000)], 60)
    assert vocabulary.decode(vocabulary.encode("zebra")) == "zebra"


def test_too_small_subword_vocabulary():
    # a, b, the word mark and five specials.
    with pytest.raises(ValueError, match="vocab_size is 7, but 2 letters.* at least 8"):
        SubwordVocabulary.train(["ab"], 7)
    assert len(SubwordVocabulary.train(["ab"], 8)) == 8
    with pytest.raises(ValueError, match="no texts"):
        SubwordVocabulary.train(["", " "], 10)


def test_damaged_subword_models():
    with pytest.raises(ValueError, match="no bytes"):
        SubwordVocabulary(b"")
    for model, message in (("", "no bytes"), ("@@@@", "no base64"), ("AAA", "no base64"), ("QUJD", "no sentencepiece model")):
        with pytest.raises(ValueError, match=message):
            vocabulary_from_dict({"kind": "subwords", "model": model, "unknown": "error"})


def test_decode_takes_whole_numbers_only():
    vocabulary = CharacterVocabulary("ab")
    assert vocabulary.decode(torch.tensor([5, 6])) == "ab"
    with pytest.raises(TypeError):
        vocabulary.decode([5.7])


def test_large_word_list_is_quick():
    import time

    start = time.perf_counter()
    WordVocabulary([f"w{i}" for i in range(30_000)])
    assert time.perf_counter() - start < 2  # comparing each with each took several seconds


def test_representation_tells_kind_and_size(subwords):
    assert repr(CharacterVocabulary()) == "CharacterVocabulary(33 symbols, the 5 specials included, unknown='error')"
    assert "SubwordVocabulary(50 symbols" in repr(subwords)


def test_normalise_other_widths_hyphens_and_alphabets():
    assert normalise_text("ｆｕｌｌ，ｗｉｄｔｈ") == "full width"
    assert normalise_text("\u210cello well\u2010known") == "hello well known"
    for text, sign in (("straße", "'ß', letters that the alphabet"), ("да", "'а', 'д', letters")):
        with pytest.raises(ValueError, match=sign):
            normalise_text(text)
