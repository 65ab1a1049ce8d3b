"""Searches against brute force, in batches, with caches, and at their limits."""
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlearn.decoding import Hypothesis, alignment_of, beam_search, greedy_search, length_normalised, plot_alignment, rescore_with_ctc
from speechlearn.speech_transformer.decoder import SpeechTransformer
from speechlearn.speech_transformer.encoder import SpeechTransformerConfig

SOS, EOS, SYMBOLS = 0, 1, (2, 3, 4)


class Tables:
    """A model for each utterance, written as random tables: text so far → log-probabilities of (end, symbols)."""

    def __init__(self, seeds, longest=4, sharpness=1.5, of=None):
        self.tables = []
        for seed in seeds:
            g = torch.Generator().manual_seed(seed)
            texts = [text for n in range(longest + 2) for text in itertools.product(SYMBOLS, repeat=n)]
            self.tables.append({text: (torch.randn(4, generator=g, dtype=torch.float64) * sharpness).log_softmax(0) for text in texts})
        self.rows = [(i, None) for i in range(len(self.tables))]
        self.selected = 0

    def select(self, rows):
        self.selected += 1
        self.rows = [self.rows[r] for r in rows.tolist()]

    def step(self, tokens, state):
        assert len(tokens) == len(self.rows)
        self.rows = [(i, () if text is None else (*text, t)) for (i, text), t in zip(self.rows, tokens.tolist())]
        return torch.stack([torch.cat([torch.tensor([-math.inf], dtype=torch.float64), self.tables[i].get(text, torch.zeros(4, dtype=torch.float64))]) for i, text in self.rows])

    def everything(self, i, longest, power):
        found = []
        for n in range(longest + 1):
            for text in itertools.product(SYMBOLS, repeat=n):
                total = sum(float(self.tables[i][text[:k]][s - 1]) for k, s in enumerate((*text, EOS)))
                found.append((total / (n + 1) ** power, total, text))
        return sorted(found, reverse=True)


def search(tables, beam, **options):
    return beam_search(tables.step, tables, len(tables.tables), sos=SOS, eos=EOS, beam=beam, **options)


class TestAgainstBruteForce:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([0.0, 0.3, 1.0]))
    def test_a_wide_beam_lists_all_texts_in_order(self, seed, longest, power):
        tables = Tables([seed])
        expected = tables.everything(0, longest, power)
        found = search(tables, beam=len(expected), max_length=longest, length_power=power)[0]
        assert [h.tokens for h in found] == [text for _, _, text in expected] and all(h.finished for h in found)
        assert [h.score for h in found] == pytest.approx([score for score, _, _ in expected])
        assert [h.log_prob for h in found] == pytest.approx([total for _, total, _ in expected])

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([0.0, 0.7, 1.0]))
    def test_no_beam_invents_scores_or_beats_the_best(self, seed, beam, power):
        tables = Tables([seed])
        scores = {text: score for score, _, text in tables.everything(0, 3, power)}
        found = search(tables, beam, max_length=3, length_power=power)[0]
        finished = [h for h in found if h.finished]
        assert 1 <= len(found) <= beam and len({h.tokens for h in finished}) == len(finished)
        for h in finished:
            assert h.score == pytest.approx(scores[h.tokens])
        assert [h.score for h in finished] == sorted((h.score for h in finished), reverse=True)
        if finished:
            assert finished[0].score <= max(scores.values()) + 1e-9

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, 10**6), min_size=1, max_size=4), st.integers(1, 4))
    def test_beam_of_one_is_greedy(self, seeds, longest):
        one, greedy = Tables(seeds), Tables(seeds)
        found = search(one, 1, max_length=longest)
        expected = greedy_search(greedy.step, greedy, len(seeds), sos=SOS, eos=EOS, max_length=longest)
        assert [(f[0].tokens, f[0].finished) for f in found] == [(e.tokens, e.finished) for e in expected]
        assert [f[0].log_prob for f in found if f[0].finished] == pytest.approx([e.log_prob for e in expected if e.finished], abs=1e-5)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 4)), min_size=2, max_size=4), st.integers(1, 4), st.sampled_from([0.0, 1.0]))
    def test_a_batch_gives_what_each_gives_alone(self, parts, beam, power):
        limits = torch.tensor([longest for _, longest in parts])
        together = search(Tables([seed for seed, _ in parts]), beam, max_length=limits, length_power=power)
        for row, (seed, longest) in zip(together, parts):
            assert row == search(Tables([seed]), beam, max_length=longest, length_power=power)[0]

    def test_the_early_stop_loses_nothing(self):
        """Stopping when nothing can change gives what going on to the longest length gives."""
        for seed in range(30):
            for power in (0.0, 1.0):
                best = search(Tables([seed], sharpness=3), 64, max_length=3, length_power=power)[0][0]
                assert best.tokens == Tables([seed], sharpness=3).everything(0, 3, power)[0][2]


class TestEnds:
    def constant(self, log_probs):
        class State:
            def select(self, rows):
                pass

        return (lambda tokens, state: torch.tensor([log_probs]).expand(len(tokens), -1)), State()

    def test_an_end_at_once_is_an_empty_text(self):
        step, state = self.constant([-math.inf, 0.0, -math.inf])
        assert greedy_search(step, state, 2, sos=0, eos=1, max_length=5) == [Hypothesis((), 0.0, 0.0, True)] * 2
        assert beam_search(step, state, 1, sos=0, eos=1, beam=3, max_length=5) == [[Hypothesis((), 0.0, 0.0, True)]]

    def test_a_model_that_never_ends_is_cut_off(self):
        step, state = self.constant([-math.inf, -math.inf, -0.5, -2.0])
        got = greedy_search(step, state, 2, sos=0, eos=1, max_length=torch.tensor([3, 1]))
        assert [(h.tokens, h.finished) for h in got] == [((2, 2, 2), False), ((2,), False)]
        assert got[0].log_prob == pytest.approx(-1.5)
        found = beam_search(step, state, 2, sos=0, eos=1, beam=2, max_length=torch.tensor([3, 1]))
        assert found[0][0].tokens == (2, 2, 2) and not found[0][0].finished and found[1][0].tokens == (2,)

    def test_finished_texts_come_before_unfinished_ones(self):
        step, state = self.constant([-math.inf, -5.0, -0.01])
        found = beam_search(step, state, 1, sos=0, eos=1, beam=2, max_length=2, length_power=1.0)[0]
        assert found[0].finished and found[0].tokens == (2, 2)
        assert all(a.finished or not b.finished for a, b in zip(found, found[1:]))

    def test_never_symbols_are_not_written(self):
        step, state = self.constant([-3.0, -4.0, -0.1, -1.0])
        assert set(greedy_search(step, state, 1, sos=0, eos=1, max_length=4, never=(0, 2))[0].tokens) == {3}
        for row in beam_search(step, state, 1, sos=0, eos=1, beam=4, max_length=4, never=(0, 2)):
            assert all(set(h.tokens) <= {3} for h in row)

    @pytest.mark.parametrize("run", [lambda s, t: greedy_search(s, t, 1, sos=0, eos=1, max_length=3), lambda s, t: beam_search(s, t, 1, sos=0, eos=1, beam=2, max_length=3)])
    def test_nan_is_refused(self, run):
        with pytest.raises(ArithmeticError, match="the model gives NaN for row 0"):
            run(*self.constant([math.nan, 0.0]))

    def test_wrong_arguments(self):
        step, state = self.constant([0.0, 0.0])
        with pytest.raises(ValueError, match="beam is 0"):
            beam_search(step, state, 1, sos=0, eos=1, beam=0, max_length=3)
        with pytest.raises(ValueError, match="max_length is 0; each text may have at least one symbol"):
            greedy_search(step, state, 1, sos=0, eos=1, max_length=0)

    def test_length_power(self):
        assert length_normalised(-8.0, 4, 0.0) == -8 and length_normalised(-8.0, 4, 0.5) == -4 and length_normalised(-8.0, 4, 1.0) == -2
        assert length_normalised(-8.0, 0, 1.0) == -8


def transformer(seed=0, **options):
    torch.manual_seed(seed)
    config = SpeechTransformerConfig(**{"vocab": 12, "d_model": 32, "n_heads": 4, "n_encoder_layers": 1, "n_decoder_layers": 2, "d_feedforward": 48, "front_channels": 4, "ctc_weight": 0.3, **options})
    model = SpeechTransformer(config).eval()
    with torch.no_grad():
        for parameter in model.decoder.head.parameters():
            parameter.mul_(4)
    return model


class TestWithATransformer:
    features, lengths = torch.randn(3, 60, 80, generator=torch.Generator().manual_seed(1)), torch.tensor([60, 41, 17])

    @pytest.mark.parametrize("beam", [1, 3])
    def test_caches_change_nothing(self, beam):
        model = transformer()
        found = [
            beam_search(model.step, model.start(self.features, self.lengths, use_cache=use_cache), 3, sos=2, eos=3, beam=beam, max_length=12, never=(0, 1, 2))
            for use_cache in (True, False)
        ]
        assert [[h.tokens for h in row] for row in found[0]] == [[h.tokens for h in row] for row in found[1]]
        for a, b in zip(itertools.chain(*found[0]), itertools.chain(*found[1])):
            assert a.log_prob == pytest.approx(b.log_prob, abs=1e-4)
        assert any(len(h.tokens) > 3 for row in found[0] for h in row)

    def test_scores_are_those_of_the_whole_text(self):
        model = transformer()
        found = beam_search(model.step, model.start(self.features, self.lengths), 3, sos=2, eos=3, beam=4, max_length=9, never=(0, 1, 2))
        for i, row in enumerate(found):
            for h in row:
                with torch.no_grad():
                    log_probs = model(self.features[i : i + 1, : self.lengths[i]], self.lengths[i : i + 1], torch.tensor([[2, *h.tokens]]))[0]
                answer = (*h.tokens, 3) if h.finished else h.tokens
                assert h.log_prob == pytest.approx(sum(float(log_probs[k, t]) for k, t in enumerate(answer)), abs=1e-3)

    def test_alignment(self):
        model = transformer()
        weights = alignment_of(model, self.features[:1], self.lengths[:1], [4, 5, 6])
        assert weights.shape == (3, 15) and torch.allclose(weights.sum(-1), torch.ones(3), atol=1e-5)
        with pytest.raises(ValueError, match="the text is empty"):
            alignment_of(model, self.features[:1], self.lengths[:1], [])
        import matplotlib.pyplot as plt

        figure = plot_alignment(weights, ["a", "b", "c"], features=self.features[0])
        assert [len(ax.images) for ax in figure.axes] == [1, 1] and figure.axes[1].get_xlabel() == "time (s)"
        with pytest.raises(ValueError, match="3 rows of weights but 2 names"):
            plot_alignment(weights, ["a", "b"])
        plt.close("all")


def ctc_by_enumeration(log_probs, tokens, blank=0):
    total = -math.inf
    for path in itertools.product(range(log_probs.shape[1]), repeat=len(log_probs)):
        merged = [s for i, s in enumerate(path) if i == 0 or s != path[i - 1]]
        if tuple(s for s in merged if s != blank) == tuple(tokens):
            total = float(torch.logaddexp(torch.tensor(total, dtype=torch.float64), sum(log_probs[t, s] for t, s in enumerate(path))))
    return total


class TestRescoring:
    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 10**6), st.floats(0.1, 0.9), st.sampled_from([0.0, 1.0]))
    def test_against_all_paths(self, seed, weight, power):
        log_probs = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)
        texts = [(1,), (1, 2), (2, 2), (3, 1, 2), ()]
        hypotheses = [Hypothesis(t, -float(i), -float(i), True) for i, t in enumerate(texts)]
        got = {h.tokens: h.score for h in rescore_with_ctc(hypotheses, log_probs, weight=weight, length_power=power)}
        for h in hypotheses:
            expected = ((1 - weight) * h.log_prob + weight * ctc_by_enumeration(log_probs, h.tokens)) / (len(h.tokens) + 1) ** power
            assert got[h.tokens] == pytest.approx(expected, abs=1e-5)

    def test_what_cannot_be_aligned_is_last(self):
        log_probs = torch.zeros(2, 4).log_softmax(-1)
        got = rescore_with_ctc([Hypothesis((1, 2, 3), -0.1, -0.1, True), Hypothesis((1,), -9.0, -9.0, True)], log_probs, weight=0.3)
        assert [h.tokens for h in got] == [(1,), (1, 2, 3)] and got[1].score == -math.inf

    def test_weight_zero_keeps_the_decoder_and_order_of_finished(self):
        log_probs = torch.zeros(2, 4).log_softmax(-1)
        hypotheses = [Hypothesis((1, 2, 3), -0.1, 0.0, False), Hypothesis((1,), -9.0, 0.0, True)]
        got = rescore_with_ctc(hypotheses, log_probs, weight=0.0)
        assert [h.tokens for h in got] == [(1,), (1, 2, 3)] and got[0].score == -9.0
        assert rescore_with_ctc([], log_probs, weight=0.5) == []
        with pytest.raises(ValueError, match="weight is 1.5"):
            rescore_with_ctc(hypotheses, log_probs, weight=1.5)
