"""Forced alignment against all paths; times and confidences of words, by hand."""
import functools
import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlearn.alignment.ctc import collapse, ctc_greedy, ctc_loss
from speechlearn.alignment.forced import AlignedWord, Alignment, forced_alignment, measured_shifts, plot_words, word_times
from speechlearn.text import CharacterVocabulary, SubwordVocabulary, WordVocabulary


def ints(*values):
    return torch.tensor(values, dtype=torch.long)


def random_log_probs(seed, *shape):
    return (1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).log_softmax(dim=-1)


def align(x, text, blank=0):
    return forced_alignment(x[None], torch.tensor([text], dtype=torch.long).reshape(1, -1), ints(len(x)), ints(len(text)), blank=blank)[0]


@functools.lru_cache(maxsize=None)
def texts_of_paths(steps, vocab, blank):
    table = {}
    for path in itertools.product(range(vocab), repeat=steps):
        text = tuple(k for before, k in zip((None, *path), path) if k != before and k != blank)
        table.setdefault(text, []).append(path)
    return table


def score_of(x, path):
    return math.fsum(float(x[t, k]) for t, k in enumerate(path))


@st.composite
def texts_and_sounds(draw, longest=6):
    vocab = draw(st.integers(2, 4))
    blank = draw(st.integers(0, vocab - 1))
    text = draw(st.lists(st.sampled_from([k for k in range(vocab) if k != blank]), max_size=3))
    needs = len(text) + sum(a == b for a, b in zip(text, text[1:]))
    return random_log_probs(draw(st.integers(0, 10**6)), draw(st.integers(needs, max(needs, longest))), vocab), text, blank


def check_consistent(found, x, text, blank):
    """Path, spans, text and scores tell the same story."""
    assert found.tokens == tuple(text) and len(found.path) == len(x) and collapse(found.path, blank=blank) == list(text)
    assert found.log_prob == pytest.approx(score_of(x, found.path))
    rebuilt, behind = [blank] * len(x), 0
    for token, (first, last), sure in zip(found.tokens, found.spans, found.log_probs, strict=True):
        assert behind <= first <= last < len(x), "spans overlap, or are not in order"
        behind = last + 1
        rebuilt[first:behind] = [token] * (behind - first)
        assert sure == pytest.approx(max(float(x[t, token]) for t in range(first, behind)))
    assert tuple(rebuilt) == found.path


class TestAgainstAllPaths:
    def test_by_hand(self):
        x = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1]], dtype=torch.float64).log()
        found = align(x, [1])
        assert (found.tokens, found.spans, found.path) == ((1,), ((1, 1),), (0, 1, 0))
        assert math.exp(found.log_prob) == pytest.approx(0.6 * 0.7 * 0.5) and math.exp(found.log_probs[0]) == pytest.approx(0.7)
        assert align(x, [1, 1]).path == (1, 0, 1)
        assert align(x, [1, 2]).spans == ((1, 1), (2, 2)) and align(x, [1, 2]).path == (0, 1, 2)
        assert align(x, []).path == (0, 0, 0) and math.exp(align(x, []).log_prob) == pytest.approx(0.06)

    @settings(max_examples=150, deadline=None)
    @given(texts_and_sounds())
    def test_the_best_of_all(self, case):
        x, text, blank = case
        found = align(x, text, blank)
        paths = texts_of_paths(*x.shape, blank)[tuple(text)]
        best = max(paths, key=lambda path: score_of(x, path))
        assert found.path == best and found.log_prob == pytest.approx(score_of(x, best))
        check_consistent(found, x, text, blank)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 10**6), st.integers(2, 8), st.lists(st.integers(1, 7), max_size=12), st.integers(0, 30))
    def test_long_ones(self, seed, vocab, text, more):
        """Too many paths to list; but one path is at most all of them, and no worse than the greedy path of the same text."""
        text = [1 + k % (vocab - 1) for k in text]
        x = random_log_probs(seed, 2 * len(text) + more, vocab)
        found = align(x, text)
        check_consistent(found, x, text, 0)
        total = -ctc_loss(x[None], torch.tensor([text], dtype=torch.long).reshape(1, -1), ints(len(x)), ints(len(text)), blank=0).item()
        n_ways = math.comb(len(x) + len(text), 2 * len(text))  # at most so many paths, each at most as likely as the best
        assert found.log_prob <= total + 1e-9 and total <= found.log_prob + math.log(n_ways) + 1e-9

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 10**6), st.integers(0, 25), st.integers(2, 5), st.data())
    def test_the_greedy_text_has_the_greedy_path(self, seed, steps, vocab, data):
        blank = data.draw(st.integers(0, vocab - 1))
        x = random_log_probs(seed, steps, vocab)
        greedy = ctc_greedy(x[None], ints(steps), blank=blank)[0]
        found = align(x, list(greedy.tokens), blank)
        assert found.spans == greedy.spans and found.log_prob == pytest.approx(greedy.log_prob)

    def test_only_one_way(self):
        x = random_log_probs(0, 5, 4)
        assert align(x, [1, 1, 2, 3]).path == (1, 0, 1, 2, 3) and align(x[:3], [3, 1, 3]).path == (3, 1, 3) and align(x[:1], [2]).path == (2,)

    def test_nothing_in_nothing(self):
        assert align(torch.zeros(0, 3), []) == Alignment((), (), (), (), 0.0)

    def test_an_impossible_step_is_avoided(self):
        x = random_log_probs(1, 6, 3)
        x[:4, 1] = -math.inf
        x[5, 1] = -math.inf
        x[2, 0] = -math.inf  # the third step must be the other letter
        found = align(x, [2, 1])
        assert found.spans[1] == (4, 4) and found.path[2] == 2 and found.log_prob > -math.inf
        check_consistent(found, x, [2, 1], 0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_the_sums_have_64_bits(self, dtype):
        x, text = random_log_probs(2, 400, 4).to(dtype), [1, 3, 3, 2] * 30
        assert align(x, text) == align(x.double(), text)

    def test_no_gradient_is_kept(self):
        x = random_log_probs(3, 6, 4).requires_grad_()
        assert type(align(x, [1, 2]).log_prob) is float and x.grad is None


class TestBatch:
    @settings(max_examples=40, deadline=None)
    @given(st.lists(texts_and_sounds(), min_size=1, max_size=4), st.sampled_from([-1, 0, 1, 99]), st.booleans())
    def test_in_a_batch_as_alone(self, cases, garbage, nan_behind):
        vocab, blank = max(x.shape[1] for x, _, _ in cases), 0
        cases = [(random_log_probs(i, len(x), vocab), [1 if k == blank else k for k in text]) for i, (x, text, _) in enumerate(cases)]
        cases = [(x, text) for x, text in cases if len(text) + sum(a == b for a, b in zip(text, text[1:])) <= len(x)] or [(random_log_probs(9, 2, vocab), [1])]
        x = torch.full((len(cases), max(len(x) for x, _ in cases) + 1, vocab), math.nan if nan_behind else 5.0, dtype=torch.float64)
        targets = torch.full((len(cases), max(len(text) for _, text in cases) + 1), garbage)
        for i, (sound, text) in enumerate(cases):
            x[i, : len(sound)], targets[i, : len(text)] = sound, torch.tensor(text, dtype=torch.long)
        found = forced_alignment(x, targets, ints(*(len(s) for s, _ in cases)), ints(*(len(t) for _, t in cases)), blank=blank)
        assert found == [align(sound, text, blank) for sound, text in cases]


class TestErrors:
    x = random_log_probs(4, 2, 5, 4)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(targets=ints([1, 2, 3], [3, 3, 3]), lengths=ints(5, 4)), r"text 1 of 3 symbols does not fit into 4 steps \(it needs one for each symbol, and one between equal neighbours\); does it belong"),
            (dict(lengths=ints(0, 4)), "text 0 of 3 symbols does not fit into 0 steps"),
            (dict(targets=ints([1, 2, 3], [1, 0, 1])), "target 1 has symbol 0 at place 1: this is the blank"),
            (dict(targets=ints([1, 2, -1], [1, 2, 1])), "target 0 has symbol -1 at place 2: symbols go from 0 to 3"),
            (dict(targets=ints([1, 2, 4], [1, 2, 1])), "target 0 has symbol 4 at place 2: symbols go from 0 to 3"),
            (dict(blank=4), "blank is 4; it must be one of the 4 symbols"),
            (dict(blank=-1), "blank is -1"),
            (dict(lengths=ints(5, 6)), "lengths of utterance 1 is 6; it must lie between 0 and 5"),
            (dict(lengths=ints(-1, 5)), "lengths of utterance 0 is -1"),
            (dict(target_lengths=ints(3, 4)), "target_lengths of utterance 1 is 4; it must lie between 0 and 3"),
            (dict(target_lengths=ints(-1, 3)), "target_lengths of utterance 0 is -1"),
            (dict(log_probs=torch.full((2, 5, 4), 2.0)), "log_probs has the value 2; log-probabilities are never above 0"),
        ],
    )
    def test_what_does_not_fit(self, change, message):
        arguments = dict(log_probs=self.x, targets=ints([1, 2, 3], [3, 1, 1]), lengths=ints(5, 5), target_lengths=ints(3, 3), blank=0)
        assert len(forced_alignment(**arguments)) == 2
        with pytest.raises(ValueError, match=message):
            forced_alignment(**arguments | change)

    def test_an_impossible_symbol(self):
        x = self.x.clone()
        x[1, :, 3] = -math.inf
        args = ints([1, 3, 0], [2, 3, 1]), ints(5, 5), ints(2, 3)
        with pytest.raises(ValueError, match="text 1 has probability zero for this model: one of its symbols is impossible wherever it could lie"):
            forced_alignment(x, *args, blank=0)
        x[1, 4, 3] = 0.0  # possible, but too late for the letter behind it
        with pytest.raises(ValueError, match="text 1 has probability zero"):
            forced_alignment(x, *args, blank=0)
        x[1, 3, 3] = -9.0
        assert forced_alignment(x, *args, blank=0)[1].spans[1] == (3, 3)

    def test_nan(self):
        x = self.x.clone()
        x[1, 2, 3] = math.nan
        with pytest.raises(ArithmeticError, match="utterance 1 hold NaN"):
            forced_alignment(x, ints([1, 2], [1, 2]), ints(5, 5), ints(2, 2), blank=0)


def aligned(vocabulary, tokens, spans=None, log_probs=None):
    """An alignment as a search might give it; every symbol has one step, unless told otherwise."""
    tokens = tuple(vocabulary.encode(tokens)) if isinstance(tokens, str) else tuple(tokens)
    return Alignment(tokens, tuple(spans or ((i, i) for i in range(len(tokens)))), tuple(log_probs or [0.0] * len(tokens)), (), 0.0)


LETTERS = CharacterVocabulary()
PIECES = SubwordVocabulary.train(["turn on the lamp", "turn on the light", "turn off the light"] * 5, 24)
WORDS = WordVocabulary(["turn", "on", "off"])


def approximately(words):
    return [(w.text, pytest.approx(w.start), pytest.approx(w.end)) for w in words]


class TestWordTimes:
    def test_letters(self):
        found = word_times(aligned(LETTERS, "ab c", [(1, 1), (2, 4), (5, 7), (9, 9)], [math.log(0.5), math.log(0.125), -20.0, -1.0]), LETTERS, frame_seconds=0.04)
        assert [("ab", 0.04, 0.2), ("c", 0.36, 0.4)] == approximately(found)
        assert [w.confidence for w in found] == pytest.approx([0.25, math.exp(-1)])  # the geometric mean; the space is in no word

    def test_spaces_at_the_ends_and_in_a_row(self):
        tokens = [LETTERS.encode("a b")[1], *LETTERS.encode("a"), *[LETTERS.encode("a b")[1]] * 2, *LETTERS.encode("b"), LETTERS.encode("a b")[1]]
        assert [("a", 1, 2), ("b", 4, 5)] == approximately(word_times(aligned(LETTERS, tokens), LETTERS, frame_seconds=1.0))

    def test_whole_words(self):
        found = word_times(aligned(WORDS, "turn off turn", [(0, 2), (3, 3), (7, 8)], [-0.5, 0.0, -2.0]), WORDS, frame_seconds=0.1)
        assert [("turn", 0.0, 0.3), ("off", 0.3, 0.4), ("turn", 0.7, 0.9)] == approximately(found)
        assert [w.confidence for w in found] == pytest.approx([math.exp(-0.5), 1.0, math.exp(-2)])

    @pytest.mark.parametrize("text", ["turn on the lamp", "light", "off off", "the lamp on"])
    def test_pieces(self, text):
        tokens = PIECES.encode(text)
        found = word_times(aligned(PIECES, tokens), PIECES, frame_seconds=0.5)
        begins = [i for i, t in enumerate(tokens) if PIECES.symbols[t - 5].startswith("▁")]
        assert list(zip(text.split(), [0.5 * i for i in begins], [0.5 * i for i in (*begins[1:], len(tokens))])) == approximately(found)

    def test_a_mark_without_letters_and_special_symbols_are_no_words(self):
        """A recogniser may write them; the words must be those of the decoded text."""
        mark = 5 + PIECES.symbols.index("▁")
        on = PIECES.encode("on")
        tokens = [*PIECES.encode("turn"), mark, *(on if PIECES.symbols[on[0] - 5].startswith("▁") else [mark, *on]), mark, 1]
        found = word_times(aligned(PIECES, tokens), PIECES, frame_seconds=1.0)
        assert [w.text for w in found] == PIECES.decode(tokens).split() == ["turn", "on"]
        tokens = [1, *WORDS.encode("turn"), 3, 4]
        assert [w.text for w in word_times(aligned(WORDS, tokens), WORDS, frame_seconds=1.0)] == WORDS.decode(tokens).split() == ["turn", "\ufffd"]

    @pytest.mark.parametrize("vocabulary", [LETTERS, WORDS, PIECES], ids=lambda v: v.kind)
    def test_no_words(self, vocabulary):
        assert word_times(aligned(vocabulary, []), vocabulary, frame_seconds=0.04) == []

    def test_shifts_and_the_ends_of_the_recording(self):
        found = aligned(WORDS, "turn on off", [(0, 1), (4, 5), (8, 9)])
        times = lambda **options: [(pytest.approx(w.start), pytest.approx(w.end)) for w in word_times(found, WORDS, frame_seconds=0.1, **options)]  # noqa: E731
        assert times() == [(0.0, 0.2), (0.4, 0.6), (0.8, 1.0)]
        assert times(start_shift=-0.05, end_shift=0.02) == [(0.0, 0.22), (0.35, 0.62), (0.75, 1.02)]
        assert times(start_shift=-0.05, end_shift=0.02, seconds=0.9) == [(0.0, 0.22), (0.35, 0.62), (0.75, 0.9)]
        assert times(start_shift=0.25) == [(0.25, 0.25), (0.65, 0.65), (1.05, 1.05)]  # no end before its start
        assert times(end_shift=-5.0) == [(0.0, 0.0), (0.4, 0.4), (0.8, 0.8)]
        assert times(seconds=0.5) == [(0.0, 0.2), (0.4, 0.5), (0.5, 0.5)]

    @settings(max_examples=80, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), max_size=6), st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 3))
    def test_what_is_promised_about_times(self, gaps, start_shift, end_shift, seconds):
        spans, behind = [], 0
        for gap, n in gaps:
            spans.append((behind + gap, behind + gap + n - 1))
            behind += gap + n
        found = word_times(aligned(WORDS, [5] * len(spans), spans), WORDS, frame_seconds=0.1, start_shift=start_shift, end_shift=end_shift, seconds=seconds)
        assert len(found) == len(spans) and all(0 <= w.start <= w.end <= seconds and w.confidence == 1 for w in found)
        assert all(a.start <= b.start and a.end <= b.end for a, b in zip(found, found[1:]))

    def test_from_sound_to_words(self):
        text, path = "ab c", [0, 0, 6, 6, 7, 0, 0, 5, 5, 8, 8, 0]
        vocabulary = CharacterVocabulary(" abc")
        assert vocabulary.encode(text) == [6, 7, 5, 8]
        x = (8 * torch.eye(len(vocabulary))[path]).log_softmax(dim=-1)
        found = word_times(align(x, vocabulary.encode(text)), vocabulary, frame_seconds=0.04, seconds=12 * 0.04)
        assert [("ab", 0.08, 0.2), ("c", 0.36, 0.44)] == approximately(found)
        said, not_said = found, word_times(align(x, vocabulary.encode("ab b")), vocabulary, frame_seconds=0.04)
        assert said[1].confidence > 0.9 > 0.1 > not_said[1].confidence and not_said[0].confidence == pytest.approx(said[0].confidence)


class TestShifts:
    def test_by_hand(self):
        assert measured_shifts([0.06, 0.05, 0.2], [-0.01, 0.0, 0.04, 0.02]) == (-0.06, pytest.approx(-0.01))

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.floats(-1, 1), min_size=1, max_size=9), st.lists(st.floats(-1, 1), min_size=1, max_size=9))
    def test_afterwards_the_median_is_zero(self, starts, ends):
        shifts = measured_shifts(starts, ends)
        for errors, shift in zip((starts, ends), shifts):
            assert statistics.median(e + shift for e in errors) == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize(("starts", "ends"), [([], [0.1]), ([0.1], []), ([], [])])
    def test_nothing_measured(self, starts, ends):
        with pytest.raises(ValueError, match="no errors were measured, so no shift can be found"):
            measured_shifts(starts, ends)


class TestPicture:
    def test_words_and_truth(self):
        import matplotlib.pyplot as plt

        words = [AlignedWord("turn", 0.0, 0.04, 0.9), AlignedWord("everything", 0.04, 0.1, 0.1)]
        ax = plot_words(torch.sin(torch.arange(1600) / 5), words, 16_000)
        assert [t.get_text() for t in ax.texts] == ["turn", "everything"] and ax.get_xlim() == (0, pytest.approx(0.1)) and ax.get_xlabel() == "time (s)"
        assert ax.patches[0].get_alpha() > ax.patches[1].get_alpha()  # the surer, the stronger
        assert float(ax.lines[0].get_ydata().max()) == pytest.approx(1, abs=1e-3) and len(ax.lines) == 3

        class TrueWord:
            text, start, end = "turn", 0.01, 0.03

        _, given_axes = plt.subplots()
        assert plot_words(torch.zeros(100_000), words, 16_000, truth=[TrueWord()], ax=given_axes) is given_axes
        assert [t.get_text() for t in given_axes.texts] == ["turn", "everything", "turn"] and given_axes.texts[2].get_position()[1] < 0
        assert len(given_axes.lines[0].get_xdata()) <= 4001  # long recordings are drawn with fewer points
        given_axes.figure.canvas.draw()
        plt.close("all")
