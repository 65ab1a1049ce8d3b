"""The n-gram model: numbers by hand, probabilities that sum to one, and files, whole and damaged."""
import math
import os
import stat
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from speechlearn.alignment.language_model import END, START, UNKNOWN, NGramModel, read_arpa, train_ngram, write_arpa

SENTENCES = ["turn on the lamp", "turn on the light", "turn off the light"]
TEN = math.log(10)


def p(model, word, *context):
    return math.exp(model.log_prob(word, context))


class TestByHand:
    def test_one_word_at_a_time(self):
        """15 words with the three ends, 7 different; 8 places in the list with the unknown one."""
        model = train_ngram(SENTENCES, order=1)
        counts = {"turn": 3, "on": 2, "off": 1, "the": 3, "lamp": 1, "light": 2, END: 3, UNKNOWN: 0}
        for word, n in counts.items():
            assert p(model, word) == pytest.approx((n + 7 / 8) / 22)
            assert p(model, word, "on", "the") == pytest.approx((n + 7 / 8) / 22)  # no context is too long
        assert model.words == {"turn", "on", "off", "the", "lamp", "light"} and model.order == 1 and not model.log_backoffs

    def test_two_words(self):
        model = train_ngram(SENTENCES, order=2)
        lamp, light, turn, on = ((n + 7 / 8) / 22 for n in (1, 2, 3, 2))
        assert p(model, "lamp", "the") == pytest.approx((1 + 2 * lamp) / 5)
        assert p(model, "light", "the") == pytest.approx((2 + 2 * light) / 5)
        assert p(model, "turn", "the") == pytest.approx(2 * turn / 5)
        assert p(model, "turn", START) == pytest.approx((3 + turn) / 4)  # after the start came always the same: one different follower
        assert p(model, "on", "turn") == pytest.approx((2 + 2 * on) / 5)
        assert p(model, "on", "lamp") == pytest.approx(on / 2)  # lamp was followed once, by the end
        assert p(model, "on", "zebra") == pytest.approx(on)
        assert p(model, "zebra", "the") == pytest.approx(2 / 5 * (7 / 8) / 22)

    def test_three_words(self):
        model = train_ngram(SENTENCES, order=3)
        two = train_ngram(SENTENCES, order=2)
        assert p(model, "lamp", "on", "the") == pytest.approx((1 + 2 * p(two, "lamp", "the")) / 4)
        assert p(model, "lamp", "off", "the") == pytest.approx((0 + 1 * p(two, "lamp", "the")) / 2)
        assert p(model, "lamp", "lamp", "the") == pytest.approx(p(two, "lamp", "the"))  # "lamp the" was never there: weight one
        assert p(model, "on", START, "turn") == pytest.approx((2 + 2 * p(two, "on", "turn")) / 5)

    def test_a_whole_sentence_and_perplexity(self):
        model = train_ngram(["a", "a b"], order=2)
        # Counts: a 2, b 1, ends 2, of 5; 3 different; 4 places with the unknown one.
        a, b, end, unknown = ((n + 3 / 4) / 8 for n in (2, 1, 2, 0))
        assert a + b + end + unknown == pytest.approx(1)
        start_a, a_b, a_end, b_end = (2 + a) / 3, (1 + 2 * b) / 4, (1 + 2 * end) / 4, (1 + end) / 2
        assert math.exp(model.score("a b")) == pytest.approx(start_a * a_b * b_end)
        assert math.exp(model.score("a")) == pytest.approx(start_a * a_end)
        assert math.exp(model.score("")) == pytest.approx(end / 3)
        assert math.exp(model.score("a x")) == pytest.approx(start_a * (2 / 4 * unknown) * end)  # nothing was ever seen after the unknown word
        assert model.score("  a\tb ") == model.score("a b")
        assert model.perplexity(["a b"]) == pytest.approx((start_a * a_b * b_end) ** (-1 / 3))
        assert model.perplexity(iter(["a b", "a"])) == pytest.approx((start_a * a_b * b_end * start_a * a_end) ** (-1 / 5))

    def test_perplexity_of_a_die(self):
        die = NGramModel({(face,): -math.log(8) for face in ("1", "2", "3", "4", "5", "6", END, UNKNOWN)}, {})
        assert die.perplexity(["1 2 3", "6", "", "seven"]) == pytest.approx(8)

    def test_more_of_the_same_is_learnt(self):
        scores = [train_ngram(SENTENCES[:1] * n, order=3).score(SENTENCES[0]) for n in (1, 2, 10, 1000)]
        assert scores == sorted(scores) and scores[-1] > -0.02
        assert train_ngram(SENTENCES).score("turn off the lamp") > train_ngram(SENTENCES).score("turn the lamp off") + 2


def interpolated(sentences, order, word, context):
    """The formula of the chapter, from the shortest context to the longest."""
    marked = [(START, *s.split(), END) for s in sentences]
    listed = {w for m in marked for w in m[1:]} | {UNKNOWN}
    probability = 1 / len(listed)
    context = tuple(context)[max(0, len(context) - order + 1) :]
    for n in range(len(context) + 1):
        h = context[len(context) - n :]
        followers = Counter(m[i] for m in marked for i in range(1, len(m)) if i >= n and m[i - n : i] == h)
        c, different = followers.total(), len(followers)
        if c:
            probability = (followers[word] + different * probability) / (c + different)
    return probability


class TestAgainstTheFormula:
    sentences = st.lists(st.lists(st.sampled_from("abcd"), max_size=6).map(" ".join), min_size=1, max_size=8)
    contexts = st.lists(st.sampled_from([START, *"abcd", "x", UNKNOWN, END]), max_size=4)

    @settings(max_examples=150, deadline=None)
    @given(sentences, st.integers(1, 4), contexts)
    @example(["a a a a"], 4, ["a", "a", "a"])
    @example([""], 3, [START])
    def test_every_word_after_every_context(self, sentences, order, context):
        model = train_ngram(sentences, order=order)
        total = 0.0
        for word in (*model.words, END, UNKNOWN):
            expected = interpolated(sentences, order, word, context)
            assert p(model, word, *context) == pytest.approx(expected, rel=1e-12)
            total += expected
        assert total == pytest.approx(1) and 0 < p(model, UNKNOWN, *context) == p(model, "never", *context)

    @settings(max_examples=50, deadline=None)
    @given(sentences, st.integers(1, 4), st.lists(st.sampled_from("abcx"), max_size=6))
    def test_the_score_follows_the_words(self, sentences, order, words):
        model = train_ngram(sentences, order=order)
        known = [w if w in model.words else UNKNOWN for w in words]
        history, total = [START], 0.0
        for word in (*known, END):
            total += math.log(interpolated(sentences, order, word, history))
            history.append(word)
        assert model.score(" ".join(words)) == pytest.approx(total)

    @settings(max_examples=50, deadline=None)
    @given(sentences, st.integers(1, 4), st.lists(st.sampled_from("abcx"), max_size=7))
    def test_what_after_forgets_is_not_needed(self, sentences, order, words):
        model, context, full = train_ngram(sentences, order=order), (START,), (START,)
        for word in words:
            context, full = model.after(word, context), (*full, word if word in model.words else UNKNOWN)
            assert len(context) <= order - 1 and full[len(full) - len(context) :] == context
            for following in (*model.words, END, UNKNOWN):
                assert model.log_prob(following, context) == model.log_prob(following, full)

    def test_a_longer_history_than_the_order_was_never_counted(self):
        model = train_ngram(SENTENCES, order=2)
        assert max(map(len, model.log_probs)) == 2 and max(map(len, model.log_backoffs)) == 1
        assert (START,) not in model.log_probs and not any(ngram[-1] == START for ngram in model.log_probs)
        assert all(END not in context for context in model.log_backoffs)


class TestErrors:
    @pytest.mark.parametrize(
        ("sentences", "order", "message"),
        [
            (SENTENCES, 0, "order is 0; the shortest n-gram has one word"),
            (SENTENCES, -1, "order is -1"),
            ([], 3, "there are no sentences to count"),
            (["a", "a </s> b"], 3, "the sentence 'a </s> b' contains '</s>', which the model keeps for itself"),
            (["<unk>"], 3, "contains '<unk>'"),
            (["<s>"], 3, "contains '<s>'"),
        ],
    )
    def test_training(self, sentences, order, message):
        with pytest.raises(ValueError, match=message):
            train_ngram(sentences, order=order)

    def test_one_text_is_not_a_list(self):
        with pytest.raises(TypeError, match="sentences is one text, 'turn on'"):
            train_ngram("turn on")
        with pytest.raises(TypeError, match="sentences is one text, 'turn on'"):
            train_ngram(SENTENCES).perplexity("turn on")

    def test_models(self):
        with pytest.raises(ValueError, match="no entry for '</s>', the end of a sentence"):
            NGramModel({}, {})
        with pytest.raises(ValueError, match="the n-gram 'a b' has the log-probability 0.5; it must not be above 0"):
            NGramModel({(END,): -1.0, ("a", "b"): 0.5}, {})
        with pytest.raises(ValueError, match="there are no sentences, so there is no perplexity"):
            train_ngram(SENTENCES).perplexity([])

    def test_without_the_unknown_word_others_are_impossible(self):
        model = NGramModel({(END,): -1.0, ("a",): -1.0, ("a", "a"): -0.2}, {("a",): -0.5})
        assert model.log_prob("b", ()) == model.log_prob("b", ("a",)) == model.log_prob(START, ()) == -math.inf
        assert model.score("a b a") == -math.inf and model.score("a") == -2.5 and model.perplexity(["a b"]) == math.inf


HAND = """This line stands before the data, and is read over.

\\data\\
ngram 1=5
ngram 2=4
ngram 3=2

\\1-grams:
-99\t<s>\t-0.7
-1.5\t<unk>\t-0.6
-0.9\t</s>
-0.8\ta\t-0.3
-1.1\tb\t-0.2

\\2-grams:
-0.4\t<s> a\t-0.15
-0.5\ta b\t-0.25
-0.35\tb </s>
-0.45\t<unk> a

\\3-grams:
-0.05\t<s> a b
-0.02\ta b </s>

\\end\\
behind the end as well
"""


class TestFiles:
    def test_a_file_by_hand(self, tmp_path):
        (tmp_path / "hand.arpa").write_text(HAND)
        model = read_arpa(tmp_path / "hand.arpa")
        assert model.order == 3 and model.words == {"a", "b"}
        expected = {
            ("b", (START, "a")): -0.05,
            ("b", ("x", START, "a")): -0.05,  # only the last two words count
            (END, ("a", "b")): -0.02,
            ("a", (START, "a")): -0.15 - 0.3 - 0.8,  # back off twice
            (END, (START, "a")): -0.15 - 0.3 - 0.9,
            ("b", ("b", "a")): -0.5,  # "b a" was never seen: weight one
            ("a", ("a", "b")): -0.25 - 0.2 - 0.8,
            ("a", ("b", "b")): -0.2 - 0.8,
            (END, ("b",)): -0.35,
            ("zebra", ("a",)): -0.3 - 1.5,
            ("zebra", ()): -1.5,
            (START, ()): -1.5,  # the beginning never follows anything: as a word it is unknown
            ("a", ("<unk>",)): -0.45,
            ("b", ("a", "<unk>")): -0.6 - 1.1,
        }
        for (word, context), log10 in expected.items():
            assert model.log_prob(word, context) == pytest.approx(log10 * TEN), (word, context)
        assert model.score("a b") == pytest.approx((-0.4 - 0.05 - 0.02) * TEN)
        assert model.score("") == pytest.approx((-0.7 - 0.9) * TEN)
        assert model.score("zebra a") == pytest.approx((-0.7 - 1.5 - 0.45 - 0.3 - 0.9) * TEN)  # read as "<unk> a"
        assert model.perplexity(["a b", ""]) == pytest.approx(10 ** ((0.47 + 1.6) / 4))

    def test_a_file_without_the_unknown_word(self, tmp_path):
        text = HAND.replace("-1.5\t<unk>\t-0.6\n", "").replace("-0.45\t<unk> a\n", "").replace("1=5", "1=4").replace("2=4", "2=3")
        (tmp_path / "hand.arpa").write_text(text)
        model = read_arpa(tmp_path / "hand.arpa")
        assert model.log_prob("zebra", ()) == -math.inf and model.score("a zebra") == -math.inf and model.score("a b") == pytest.approx(-0.47 * TEN)

    @settings(max_examples=40, deadline=None)
    @given(TestAgainstTheFormula.sentences, st.integers(1, 4), st.lists(TestAgainstTheFormula.sentences.map(" ".join), max_size=3))
    def test_there_and_back(self, tmp_path_factory, sentences, order, others):
        model = train_ngram(sentences, order=order)
        path = tmp_path_factory.mktemp("arpa") / "model.arpa"
        write_arpa(model, path)
        again = read_arpa(path)
        assert again.log_probs.keys() == model.log_probs.keys() and again.log_backoffs.keys() == model.log_backoffs.keys()
        assert again.words == model.words and again.order == model.order
        for sentence in (*sentences, *others, "x a"):
            assert again.score(sentence) == pytest.approx(model.score(sentence), rel=1e-7)
        first = path.read_text()
        write_arpa(again, path)
        assert path.read_text() == first

    def test_the_form_of_the_file(self, tmp_path):
        write_arpa(train_ngram(["é a"], order=2), tmp_path / "m.arpa")
        lines = (tmp_path / "m.arpa").read_text(encoding="utf-8").splitlines()
        assert lines[:3] == ["\\data\\", "ngram 1=5", "ngram 2=3"] and lines[-1] == "\\end\\"
        assert lines[lines.index("\\1-grams:") + 2].startswith("-99\t<s>\t")
        assert "é" in {line.split("\t")[1] for line in lines if "\t" in line}
        # Three words came, all different; the weight after "a" is 1 / (1 + 1).
        row = next(line for line in lines if "\ta\t" in line).split("\t")
        assert [float(row[0]), float(row[2])] == pytest.approx([math.log10((1 + 3 / 4) / 6), math.log10(1 / 2)])
        assert not any(line.count("\t") > 1 for line in lines[lines.index("\\2-grams:") :])  # the longest are no contexts

    def test_models_that_were_not_trained_here(self, tmp_path):
        """A context with a weight and no probability of its own, and a word that is impossible."""
        log_probs = {(END,): -1.0, ("a",): -1.0, ("b",): -1.5, ("c",): -math.inf, ("a", "a"): -0.2, ("a", "b", "a"): -0.1}
        model = NGramModel(log_probs, {("a",): -0.3, ("a", "b"): -0.4})
        write_arpa(model, tmp_path / "m.arpa")
        again = read_arpa(tmp_path / "m.arpa")
        for sentence in ("", "a b b a", "a b a", "b a a b"):
            assert again.score(sentence) == pytest.approx(model.score(sentence))
        assert again.log_prob("c", ()) == pytest.approx(-99 * TEN)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("\\data\\", "data", "has no line .data.; it is not an ARPA file"),
            (HAND, "", "is not an ARPA file"),
            (HAND[HAND.index("\\end") :], "", r"has no line .end.; it is cut off"),
            (HAND[HAND.index("\\3-grams") :], "", "the head says 2 3-grams, but there are 0; the file is damaged or cut off"),
            ("-1.1\tb\t-0.2\n", "", "the head says 5 1-grams, but there are 4"),
            ("ngram 3=2", "ngram 3=1", "the head says 1 3-grams, but there are 2"),
            ("ngram 3=2\n", "", r"line 20: .*3-grams:' is not one of the sections that the head announces"),
            ("ngram 2=4", "ngram two=4", "line 5: expected 'ngram N=COUNT', got 'ngram two=4'"),
            ("ngram 2=4", "ngram 2=-4", "line 5: expected 'ngram N=COUNT'"),
            ("ngram 2=4", "what is this", "line 5: expected 'ngram N=COUNT', got 'what is this'"),
            ("\\2-grams:", "\\two-grams:", r"line 15: .*two-grams:' is not one of the sections"),
            ("-0.8\ta\t-0.3", "-0.8\ta b c\t-0.3", "line 12: expected a logarithm, 1 words and perhaps a back-off weight"),
            ("-0.5\ta b\t-0.25", "-0.5\ta", "line 17: expected a logarithm, 2 words"),
            ("-0.5\ta b\t-0.25", "much\ta b\t-0.25", "line 17: expected a logarithm, 2 words"),
            ("-0.5\ta b\t-0.25", "-0.5\ta b\tlittle", "line 17: expected a logarithm, 2 words and perhaps a back-off weight, got '-0.5.*little'"),
            ("-0.5\ta b\t-0.25", "nan\ta b\t-0.25", "line 17: expected a logarithm"),
            ("-0.5\ta b\t-0.25", "-inf\ta b\t-0.25", "line 17: expected a logarithm"),
            ("-0.5\ta b\t-0.25", "-0.5\ta b\tnan", "line 17: expected a logarithm"),
            ("-0.5\ta b\t-0.25", "-0.5\ta b\tinf", "line 17: expected a logarithm"),
            ("-0.5\ta b\t-0.25", "0.5\ta b\t-0.25", "the n-gram 'a b' has the log-probability 1.15.*must not be above 0"),
            ("-1.1\tb\t-0.2", "-1.1\ta\t-0.2", "line 13: the n-gram 'a' stands there for the second time"),
            ("-0.9\t</s>", "-0.9\tend", "no entry for '</s>'"),
        ],
    )
    def test_damaged_files(self, tmp_path, old, new, message):
        assert HAND.count(old) == 1
        path = tmp_path / "hand.arpa"
        path.write_text(HAND.replace(old, new))
        with pytest.raises(ValueError, match=message) as caught:
            read_arpa(path)
        if "line" in message:
            assert str(path) in str(caught.value)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, len(HAND) - len("\\end\\\nbehind the end as well\n") - 1))
    def test_no_cut_is_overlooked(self, tmp_path_factory, n):
        path = tmp_path_factory.mktemp("cut") / "hand.arpa"
        path.write_text(HAND[:n])
        with pytest.raises(ValueError, match="cut off|not an ARPA file|expected|is not one of"):
            read_arpa(path)

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            read_arpa(tmp_path / "nothing.arpa")


class TestAtomicWriting:
    model = train_ngram(SENTENCES, order=2)

    def test_replaces(self, tmp_path):
        path = tmp_path / "m.arpa"
        path.write_text("old")
        write_arpa(self.model, str(path))
        assert read_arpa(str(path)).score(SENTENCES[0]) == pytest.approx(self.model.score(SENTENCES[0]))
        assert [f.name for f in tmp_path.iterdir()] == ["m.arpa"]

    @pytest.mark.skipif(os.name != "posix", reason="Windows has no umask")
    def test_others_may_read_it_as_they_may_read_other_files(self, tmp_path):
        (tmp_path / "plain").write_text("")
        write_arpa(self.model, tmp_path / "m.arpa")
        assert stat.S_IMODE((tmp_path / "m.arpa").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)

    @pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
    @pytest.mark.parametrize("where", ["replace", "fsync or write"])
    def test_a_failure_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch, failure, where):
        path = tmp_path / "m.arpa"
        path.write_text("old")

        def fail(*_, **__):
            raise failure

        if where == "replace":
            monkeypatch.setattr(os, "replace", fail)
        else:
            whole = type(path).write_text

            def half(self, text, **options):
                whole(self, text[: len(text) // 2], **options)
                raise failure

            monkeypatch.setattr(type(path), "write_text", half)
        with pytest.raises(type(failure)):
            write_arpa(self.model, path)
        monkeypatch.undo()
        assert path.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["m.arpa"]

    def test_no_folder(self, tmp_path):
        with pytest.raises(OSError, match="No such file"):
            write_arpa(self.model, tmp_path / "nowhere" / "m.arpa")
        assert list(tmp_path.iterdir()) == []
