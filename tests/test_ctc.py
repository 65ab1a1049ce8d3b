"""CTC against the sum over all paths, against torch, and at its limits."""
import functools
import itertools
import math
import warnings

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from speechlearn.alignment.ctc import collapse, ctc_brute_force, ctc_greedy, ctc_loss, ctc_posteriors, lattice_scores, penalise_blank, plot_lattice, reversed_within, valid_steps, with_blanks
from speechlearn.data.batches import assert_batch_independent

# Three steps; blank, a, b.
THREE = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1]], dtype=torch.float64).log()


def ints(*values):
    return torch.tensor(values, dtype=torch.long)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def text_of(path, blank):
    """Written again here, letter by letter, so that a mistake in `collapse` is seen."""
    written, before = [], blank
    for symbol in path:
        if symbol != before and symbol != blank:
            written.append(symbol)
        before = symbol
    return tuple(written)


@functools.lru_cache(maxsize=None)
def paths_by_text(steps, vocab, blank):
    table = {}
    for path in itertools.product(range(vocab), repeat=steps):
        table.setdefault(text_of(path, blank), []).append(path)
    return table


def all_paths(log_probs, text, blank):
    """Log-probability of a text and its derivative with respect to `log_probs`, from the list of its paths."""
    steps, vocab = log_probs.shape
    paths = paths_by_text(steps, vocab, blank).get(tuple(text), [])
    scores = [math.fsum(float(log_probs[t, k]) for t, k in enumerate(path)) for path in paths]
    shares = torch.zeros(steps, vocab, dtype=torch.float64)
    if not paths or max(scores) == -math.inf:
        return -math.inf, shares
    total = max(scores) + math.log(math.fsum(math.exp(s - max(scores)) for s in scores))
    for path, score in zip(paths, scores):
        for t, k in enumerate(path):
            shares[t, k] += math.exp(score - total)
    return total, shares


@st.composite
def batches(draw, longest=5, most_tokens=3, fitting=False):
    """(log_probs, targets with garbage behind their ends, lengths, target_lengths, texts, blank)."""
    vocab = draw(st.integers(2, 4))
    blank = draw(st.integers(0, vocab - 1))
    letters = st.sampled_from([k for k in range(vocab) if k != blank])
    texts = draw(st.lists(st.lists(letters, max_size=most_tokens), min_size=1, max_size=4))
    needs = [len(text) + sum(a == b for a, b in zip(text, text[1:])) if fitting else 0 for text in texts]
    lengths = [draw(st.integers(need, max(longest, need))) for need in needs]
    steps, tokens = max(lengths) + draw(st.integers(0, 2)), max(map(len, texts)) + draw(st.integers(0, 2))
    garbage = st.sampled_from([-1, blank, vocab, 10**6, 0, vocab - 1])
    targets = torch.tensor([text + [draw(garbage) for _ in range(tokens - len(text))] for text in texts], dtype=torch.long).reshape(len(texts), tokens)
    logits = 2 * torch.randn(len(texts), steps, vocab, generator=generator(draw(st.integers(0, 10**6))), dtype=torch.float64)
    return logits.log_softmax(dim=-1), targets, ints(*lengths), ints(*map(len, texts)), texts, blank


class TestByHand:
    def test_loss(self):
        # aaa, aa∅, ∅aa, a∅∅, ∅a∅, ∅∅a
        total = 0.084 + 0.105 + 0.168 + 0.030 + 0.210 + 0.048
        assert ctc_loss(THREE[None], ints([1]), ints(3), ints(1), blank=0).item() == pytest.approx(-math.log(total), abs=1e-12)
        assert ctc_brute_force(THREE, [1], blank=0).exp().item() == pytest.approx(total)
        # aa needs a∅a; ab: aab, abb, ∅ab, a∅b, ab∅; three letters only themselves; abab nothing
        assert ctc_loss(THREE[None], ints([1, 1]), ints(3), ints(2), blank=0).item() == pytest.approx(-math.log(0.3 * 0.2 * 0.4))
        five = 0.3 * 0.7 * 0.1 + 0.3 * 0.1 * 0.1 + 0.6 * 0.7 * 0.1 + 0.3 * 0.2 * 0.1 + 0.3 * 0.1 * 0.5
        assert ctc_loss(THREE[None], ints([1, 2]), ints(3), ints(2), blank=0).item() == pytest.approx(-math.log(five))
        assert ctc_loss(THREE[None], ints([1, 2, 1]), ints(3), ints(3), blank=0).item() == pytest.approx(-math.log(0.3 * 0.1 * 0.4))
        # The last symbol as blank: then "0" alone
        assert ctc_loss(THREE[None, :1], ints([0]), ints(1), ints(1), blank=2).item() == pytest.approx(-math.log(0.6))

    def test_posteriors_and_gradient(self):
        log_p, gamma = ctc_posteriors(THREE[None], ints([1]), ints(3), ints(1), blank=0)
        assert log_p.exp().item() == pytest.approx(0.645) and log_p.dtype == gamma.dtype == torch.float64
        expected = torch.tensor([[0.168 + 0.210 + 0.048, 0.084 + 0.105 + 0.030, 0.0], [0.048, 0.084 + 0.105 + 0.168 + 0.210, 0.030], [0.0, 0.084 + 0.168 + 0.048, 0.105 + 0.030 + 0.210]], dtype=torch.float64) / 0.645
        assert torch.allclose(gamma[0], expected)
        leaf = THREE[None].clone().requires_grad_()
        gradient = torch.autograd.grad(ctc_loss(leaf, ints([1]), ints(3), ints(1), blank=0).sum(), leaf)[0]
        assert torch.allclose(gradient[0], -torch.stack([expected[:, 0] + expected[:, 2], expected[:, 1], torch.zeros(3, dtype=torch.float64)], dim=1))

    def test_collapse_and_states(self):
        assert collapse([2, 2, 0, 2, 1, 1, 0, 0], blank=0) == [2, 2, 1]
        assert collapse([2, 2, 0, 2, 1, 1, 0, 0], blank=2) == [0, 1, 0]
        assert collapse([], blank=0) == [] == collapse([0, 0], blank=0) and collapse([4, 4, 4], blank=0) == [4]
        assert with_blanks(ints([5, 5], [6, 7]), blank=9).tolist() == [[9, 5, 9, 5, 9], [9, 6, 9, 7, 9]]
        assert with_blanks(torch.zeros(2, 0, dtype=torch.long), blank=9).tolist() == [[9], [9]]

    def test_brute_force_at_its_ends(self):
        assert ctc_brute_force(THREE, [1, 1, 1], blank=0) == -math.inf
        assert ctc_brute_force(THREE[:0], [], blank=0) == 0 and ctc_brute_force(THREE[:0], [1], blank=0) == -math.inf

    def test_forward_table(self):
        emissions = THREE[:, [0, 1, 0]][None]
        alpha = lattice_scores(emissions, torch.tensor([[False, True, False]])).exp()[0]
        assert torch.allclose(alpha, torch.tensor([[0.6, 0.3, 0.0], [0.12, 0.63, 0.06], [0.06, 0.3, 0.345]], dtype=torch.float64))

    def test_reversed_within(self):
        x = torch.arange(12).reshape(2, 3, 2)
        rows = reversed_within(x, ints(3, 2), dim=1)
        assert rows[0].tolist() == [[4, 5], [2, 3], [0, 1]] and rows[1, :2].tolist() == [[8, 9], [6, 7]]
        columns = reversed_within(x, ints(2, 1), dim=2)
        assert columns[0].tolist() == [[1, 0], [3, 2], [5, 4]] and columns[1, :, 0].tolist() == [6, 8, 10]


class TestAgainstAllPaths:
    @settings(max_examples=120, deadline=None)
    @given(batches())
    def test_loss_and_gradient(self, batch):
        log_probs, targets, lengths, target_lengths, texts, blank = batch
        leaf = log_probs.clone().requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            losses = ctc_loss(leaf, targets, lengths, target_lengths, blank=blank)
        weights = torch.arange(1, len(texts) + 1, dtype=torch.float64)
        gradient = torch.autograd.grad((losses * weights).sum(), leaf)[0]
        assert gradient.shape == log_probs.shape and losses.shape == (len(texts),)
        for i, (n, text) in enumerate(zip(lengths.tolist(), texts)):
            total, shares = all_paths(log_probs[i, :n], text, blank)
            assert losses[i].item() == pytest.approx(-total, abs=1e-10)
            assert torch.allclose(gradient[i, :n], -weights[i] * shares, atol=1e-10)
            assert (gradient[i, n:] == 0).all(), "padding has a gradient"

    @settings(max_examples=60, deadline=None)
    @given(batches())
    def test_the_slow_oracle_of_the_chapter(self, batch):
        log_probs, _, lengths, _, texts, blank = batch
        for x, n, text in zip(log_probs, lengths.tolist(), texts):
            assert ctc_brute_force(x[:n], text, blank=blank).item() == pytest.approx(all_paths(x[:n], text, blank)[0], abs=1e-10)

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 10**6), st.integers(0, 4), st.integers(2, 3), st.data())
    def test_all_texts_together_have_probability_one(self, seed, steps, vocab, data):
        blank = data.draw(st.integers(0, vocab - 1))
        x = torch.randn(1, steps, vocab, generator=generator(seed), dtype=torch.float64).log_softmax(dim=-1)
        texts = list(paths_by_text(steps, vocab, blank))
        targets = torch.zeros(len(texts), steps, dtype=torch.long)
        for row, text in zip(targets, texts):
            row[: len(text)] = ints(*text)
        n = len(texts)
        losses = ctc_loss(x.expand(n, -1, -1), targets, ints(*[steps] * n), ints(*map(len, texts)), blank=blank)
        assert (-losses).exp().sum().item() == pytest.approx(1)

    @settings(max_examples=60, deadline=None)
    @given(batches(fitting=True))
    def test_posteriors_are_probabilities(self, batch):
        log_probs, targets, lengths, target_lengths, texts, blank = batch
        targets = targets.masked_fill(torch.arange(targets.shape[1]) >= target_lengths[:, None], blank)
        log_p, gamma = ctc_posteriors(log_probs, targets, lengths, target_lengths, blank=blank)
        assert gamma.shape == (*log_probs.shape[:2], 2 * targets.shape[1] + 1) and (gamma >= 0).all() and gamma.isfinite().all()
        for i, (n, text) in enumerate(zip(lengths.tolist(), texts)):
            assert torch.allclose(gamma[i, :n].sum(dim=1), torch.ones(n, dtype=torch.float64))
            assert (gamma[i, n:] == 0).all() and (gamma[i, :, 2 * len(text) + 1 :] == 0).all()
            if n and text:  # who starts or ends where no path does?
                assert (gamma[i, 0, 2:] == 0).all() and (gamma[i, n - 1, : 2 * len(text) - 1] == 0).all()

    def test_posteriors_of_a_text_without_a_path_are_zero(self):
        log_p, gamma = ctc_posteriors(THREE[None].repeat(2, 1, 1), ints([1, 1], [1, 2]), ints(2, 2), ints(2, 2), blank=0)
        assert log_p[0] == -math.inf and (gamma[0] == 0).all() and torch.allclose(gamma[1].sum(dim=1), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))


def torch_loss(log_probs, targets, lengths, target_lengths, blank):
    return F.ctc_loss(log_probs.transpose(0, 1), targets, lengths, target_lengths, blank=blank, reduction="none")


def with_gradient(loss, logits, dtype=torch.float64):
    leaf = logits.to(dtype).requires_grad_()
    losses = loss(leaf.log_softmax(dim=-1))
    weights = torch.linspace(0.5, 2, len(losses), dtype=torch.float64).to(losses.dtype)
    return losses.detach().double(), torch.autograd.grad((losses * weights).sum(), leaf)[0].double()


@st.composite
def longer(draw):
    n, vocab, tokens = draw(st.integers(1, 5)), draw(st.integers(2, 9)), draw(st.integers(1, 10))
    blank, g = draw(st.integers(0, vocab - 1)), generator(draw(st.integers(0, 10**6)))
    letters = ints(*[k for k in range(vocab) if k != blank][: draw(st.integers(1, vocab - 1))])  # few letters: many repeats
    targets = letters[torch.randint(len(letters), (n, tokens), generator=g)]
    target_lengths = torch.randint(0, tokens + 1, (n,), generator=g)
    lengths = 2 * tokens - 1 + torch.randint(0, 30, (n,), generator=g)
    logits = draw(st.sampled_from([0.1, 1.0, 8.0])) * torch.randn(n, int(lengths.max()) + draw(st.integers(0, 3)), vocab, generator=g, dtype=torch.float64)
    return logits, targets, lengths, target_lengths, blank


class TestAgainstTorch:
    @settings(max_examples=80, deadline=None)
    @given(longer())
    def test_64_bits(self, case):
        logits, *args, blank = case
        ours, theirs = (with_gradient(lambda x, f=f: f(x, *args, blank=blank), logits) for f in (ctc_loss, torch_loss))
        assert torch.allclose(ours[0], theirs[0], rtol=1e-10, atol=1e-10)
        assert (ours[1] - theirs[1]).abs().max() <= 1e-10

    @settings(max_examples=40, deadline=None)
    @given(longer())
    def test_32_bits(self, case):
        logits, *args, blank = case
        logits = logits.float()  # both see the same numbers
        ours = with_gradient(lambda x: ctc_loss(x, *args, blank=blank), logits, torch.float32)
        truth = with_gradient(lambda x: torch_loss(x, *args, blank=blank), logits)
        assert ((ours[0] - truth[0]).abs() <= 1e-5 * truth[0].abs() + 1e-6).all()
        assert (ours[1] - truth[1]).abs().max() <= 1e-5

    def test_32_bits_for_ten_seconds(self):
        g = generator(0)
        logits, targets = torch.randn(2, 1000, 50, generator=g), torch.randint(1, 50, (2, 150), generator=g)
        args = targets, ints(1000, 900), ints(150, 120)
        ours = with_gradient(lambda x: ctc_loss(x, *args, blank=0), logits, torch.float32)
        truth = with_gradient(lambda x: torch_loss(x, *args, blank=0), logits)
        assert ((ours[0] - truth[0]) / truth[0]).abs().max() <= 1e-6 and (ours[1] - truth[1]).abs().max() <= 2e-6

    @pytest.mark.parametrize(("dtype", "loss_gap", "gradient_gap"), [(torch.float16, 1e-3, 2e-3), (torch.bfloat16, 1e-2, 2e-2)])
    def test_16_bits_in_64_bits_out_rounded_once(self, dtype, loss_gap, gradient_gap):
        x = torch.randn(2, 30, 6, generator=generator(1), dtype=torch.float64).log_softmax(dim=-1).to(dtype)
        args = ints([1, 1, 2, 5], [3, 3, -1, -1]), ints(30, 22), ints(4, 2)
        results = []
        for leaf in (x.clone().requires_grad_(), x.double().requires_grad_()):
            losses = ctc_loss(leaf, *args, blank=0)
            assert losses.dtype == leaf.dtype
            results.append((losses.detach().double(), torch.autograd.grad(losses.sum(), leaf)[0].double()))
        assert ((results[0][0] - results[1][0]) / results[1][0]).abs().max() <= loss_gap
        assert (results[0][1] - results[1][1]).abs().max() <= gradient_gap

    def test_lengths_and_targets_of_32_bits(self):
        args = ints([1, 1, 2], [2, 1, 0]), ints(8, 5), ints(3, 2)
        x = torch.randn(2, 8, 3, generator=generator(2)).log_softmax(dim=-1)
        assert torch.equal(ctc_loss(x, *args, blank=0), ctc_loss(x, *(a.int() for a in args), blank=0))


class TestGradient:
    args = ints([1, 1, 2], [3, -1, 99], [7, 7, 7]), ints(6, 4, 2), ints(3, 1, 0)

    @pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
    def test_gradcheck(self, label_smoothing):
        x = torch.randn(3, 7, 4, generator=generator(3), dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: ctc_loss(x.log_softmax(dim=-1), *self.args, blank=0, label_smoothing=label_smoothing), x)

    def test_gradcheck_of_what_is_not_normalised(self):
        x = (torch.rand(3, 7, 4, generator=generator(4), dtype=torch.float64) - 3).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: ctc_loss(x, *self.args, blank=0), x)

    def test_each_step_gives_away_one(self):
        """The gradient holds minus a probability for each valid step; through the softmax it sums to zero."""
        x = torch.randn(3, 7, 4, generator=generator(5), dtype=torch.float64).requires_grad_()
        log_probs = x.log_softmax(dim=-1)
        loss = ctc_loss(log_probs, *self.args, blank=0).sum()
        at_log_probs, at_logits = torch.autograd.grad(loss, (log_probs, x))
        valid = torch.arange(7) < self.args[1][:, None]
        assert torch.allclose(at_log_probs.sum(dim=2), -valid.double()) and torch.allclose(at_logits.sum(dim=2), torch.zeros(3, 7, dtype=torch.float64))
        assert (at_log_probs <= 0).all() and (at_logits[~valid] == 0).all()

    def test_one_step_against_the_gradient_helps(self):
        x = torch.randn(3, 7, 4, generator=generator(6), dtype=torch.float64).requires_grad_()
        before = ctc_loss(x.log_softmax(dim=-1), *self.args, blank=0).sum()
        after = ctc_loss((x - 0.1 * torch.autograd.grad(before, x)[0]).log_softmax(dim=-1), *self.args, blank=0).sum()
        assert after < before

    def test_a_second_derivative_is_refused(self):
        x = torch.randn(3, 7, 4, generator=generator(7)).log_softmax(dim=-1).requires_grad_()
        for total in (lambda losses: losses.sum(), lambda losses: losses.square().sum()):
            gradient = torch.autograd.grad(total(ctc_loss(x, *self.args, blank=0)), x, create_graph=True)[0]
            with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
                gradient.sum().backward()

    def test_what_is_kept_for_the_backward_grows_with_the_states_and_not_with_the_vocabulary(self):
        kept = []
        x = torch.randn(2, 40, 1000, generator=generator(8)).log_softmax(dim=-1).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss = ctc_loss(x, ints([1, 2, 3], [4, 5, 6]), ints(40, 30), ints(3, 3), blank=0)
        assert kept and max(t.numel() for t in kept) == 2 * 40 * 7
        assert torch.autograd.grad(loss.sum(), x)[0].shape == x.shape


class TestBatch:
    @settings(max_examples=40, deadline=None)
    @given(batches(fitting=True))
    def test_alone_as_in_a_batch(self, batch):
        log_probs, targets, lengths, target_lengths, texts, blank = batch
        together = ctc_loss(log_probs, targets, lengths, target_lengths, blank=blank)
        for i, (n, text) in enumerate(zip(lengths.tolist(), texts)):
            alone = ctc_loss(log_probs[i : i + 1, :n], torch.tensor([text], dtype=torch.long).reshape(1, -1), ints(n), ints(len(text)), blank=blank)
            assert together[i].item() == pytest.approx(alone.item(), abs=1e-12)

    @pytest.mark.parametrize("garbage", [0.0, -math.inf, math.nan, 1e30, math.inf])
    @pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
    def test_more_steps_behind_the_end_change_nothing(self, garbage, label_smoothing):
        x = torch.randn(2, 6, 4, generator=generator(9), dtype=torch.float64).log_softmax(dim=-1)
        args = ints([1, 1], [3, 2]), ints(6, 6), ints(2, 2)
        short, long = (leaf.requires_grad_() for leaf in (x.clone(), F.pad(x, (0, 0, 0, 3), value=garbage)))
        a, b = (ctc_loss(leaf, *args, blank=0, label_smoothing=label_smoothing) for leaf in (short, long))
        gradients = [torch.autograd.grad(losses.sum(), leaf)[0] for losses, leaf in ((a, short), (b, long))]
        assert torch.equal(a, b) and torch.equal(gradients[0], gradients[1][:, :6]) and (gradients[1][:, 6:] == 0).all()

    def test_posteriors_with_the_shared_helper(self):
        targets, target_lengths = ints([1, 2], [3, 3], [1, 1]), ints(2, 2, 1)
        x = torch.randn(3, 9, 4, generator=generator(10)).log_softmax(dim=-1)
        rows = {float(row[0, 0]): i for i, row in enumerate(x)}

        def posteriors(x, lengths):
            which = [rows[float(row[0, 0])] for row in x]
            return ctc_posteriors(x, targets[which], lengths, target_lengths[which], blank=0)[1], lengths

        assert_batch_independent(posteriors, x, ints(9, 4, 6))

    def test_nobody_at_all(self):
        nothing = torch.zeros(0, dtype=torch.long)
        assert ctc_loss(torch.zeros(0, 5, 3), torch.zeros(0, 2, dtype=torch.long), nothing, nothing, blank=0).shape == (0,)
        assert ctc_greedy(torch.zeros(0, 5, 3), nothing, blank=0) == []


class TestLimits:
    def test_empty_texts_are_blanks_only(self):
        for targets in (torch.zeros(1, 0, dtype=torch.long), ints([2, -1])):
            assert ctc_loss(THREE[None], targets, ints(3), ints(0), blank=0).item() == pytest.approx(-math.log(0.6 * 0.2 * 0.5))

    @pytest.mark.parametrize("steps", [0, 3])
    def test_no_steps(self, steps):
        x = THREE[None, :steps].repeat(2, 1, 1).requires_grad_()
        losses = ctc_loss(x, ints([1], [1]), ints(0, 0), ints(0, 1), blank=0, impossible="zero")
        assert losses.tolist() == [0, 0]
        with pytest.warns(UserWarning, match="utterance 1 has 0 steps, but its text of 1 symbols"):
            losses = ctc_loss(x, ints([1], [1]), ints(0, 0), ints(0, 1), blank=0)
        assert losses.tolist() == [0, math.inf]
        assert (torch.autograd.grad(losses.sum(), x)[0] == 0).all()

    @pytest.mark.parametrize("which", range(3))
    def test_a_symbol_of_probability_zero(self, which):
        """Impossible here and there, as a mask over the symbols makes it; a loss without a path is infinite, never NaN."""
        logits = torch.randn(4, 5, 3, generator=generator(11), dtype=torch.float64)
        logits[0, :, which], logits[1, 2, which], logits[2, :4, which] = -math.inf, -math.inf, -math.inf
        leaf = logits.clone().requires_grad_()
        log_probs = leaf.log_softmax(dim=-1)
        losses = ctc_loss(log_probs, ints([1, 2], [1, 2], [2, 1], [1, 1]), ints(5, 5, 5, 5), ints(2, 2, 2, 2), blank=0)
        at_log_probs, at_logits = torch.autograd.grad(losses.sum(), (log_probs, leaf))
        assert at_log_probs.isfinite().all() and at_logits.isfinite().all()
        for i, text in enumerate(((1, 2), (1, 2), (2, 1), (1, 1))):
            total, shares = all_paths(log_probs[i].detach(), text, 0)
            assert losses[i].item() == pytest.approx(-total) and torch.allclose(at_log_probs[i], -shares)
        assert (losses[0] == math.inf) == (which != 0)

    def test_all_symbols_impossible_at_one_step(self):
        x = THREE[None].clone()
        x[0, 1] = -math.inf
        leaf = x.requires_grad_()
        loss = ctc_loss(leaf, ints([1]), ints(3), ints(1), blank=0)
        assert loss.item() == math.inf and (torch.autograd.grad(loss.sum(), leaf)[0] == 0).all()

    def test_very_sure_and_very_wrong_models(self):
        for scale in (1e3, 1e30):
            logits = scale * torch.eye(3)[[0, 1, 0, 2]][None]
            leaf = logits.clone().requires_grad_()
            losses = ctc_loss(leaf.log_softmax(dim=-1), ints([1, 2]), ints(4), ints(2), blank=0)
            assert losses.item() == 0 and torch.autograd.grad(losses.sum(), leaf)[0].abs().max() < 1e-6
            leaf = logits.clone().requires_grad_()
            losses = ctc_loss(leaf.log_softmax(dim=-1), ints([2, 1]), ints(4), ints(2), blank=0)
            assert losses.item() >= scale and torch.autograd.grad(losses.sum(), leaf)[0].isfinite().all()

    def test_symbols_one_million_apart(self):
        """Number of the blank and of symbols are labels only: another order of the columns gives the same."""
        x = torch.randn(1, 6, 5, generator=generator(12), dtype=torch.float64).log_softmax(dim=-1)
        order = [3, 0, 4, 1, 2]
        new = {old: place for place, old in enumerate(order)}
        a = ctc_loss(x, ints([1, 1, 4]), ints(6), ints(3), blank=0)
        b = ctc_loss(x[:, :, order], ints([new[1], new[1], new[4]]), ints(6), ints(3), blank=new[0])
        assert a.item() == pytest.approx(b.item(), abs=1e-12)

    def test_backwards_is_the_same(self):
        x = torch.randn(1, 9, 4, generator=generator(13), dtype=torch.float64).log_softmax(dim=-1)
        a, b = (ctc_loss(y, t, ints(9), ints(3), blank=0) for y, t in ((x, ints([1, 3, 3])), (x.flip(1), ints([3, 3, 1]))))
        assert a.item() == pytest.approx(b.item(), abs=1e-12)


class TestImpossible:
    x = torch.randn(3, 4, 5, generator=generator(14), dtype=torch.float64).log_softmax(dim=-1)
    args = ints([1, 2, 3], [4, 4, 4], [2, 2, 1]), ints(4, 4, 3), ints(3, 3, 3)
    message = (
        r"utterance 1 has 4 steps, but its text of 3 symbols needs more \(one for each symbol, and one between equal neighbours\); 2 of 3 utterances cannot be aligned. "
        "Leave them out, use a front end that keeps more steps, or larger symbols"
    )

    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
    def test_warn(self, label_smoothing):
        leaf = self.x.clone().requires_grad_()
        with pytest.warns(UserWarning, match=self.message + ". Their loss is infinite") as caught:
            losses = ctc_loss(leaf, *self.args, blank=0, label_smoothing=label_smoothing)
        assert len(caught) == 1
        assert losses.isinf().tolist() == [False, True, True]
        for weights in (torch.ones(3, dtype=torch.float64), torch.tensor([1.0, 1e300, math.inf], dtype=torch.float64)):
            gradient = torch.autograd.grad(losses, leaf, weights, retain_graph=True)[0]
            assert (gradient[1:] == 0).all() and gradient[0].isfinite().all() and (gradient[0] != 0).any()

    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
    def test_zero(self, label_smoothing):
        leaf = self.x.clone().requires_grad_()
        losses = ctc_loss(leaf, *self.args, blank=0, impossible="zero", label_smoothing=label_smoothing)  # a warning would be an error
        assert losses[1:].tolist() == [0, 0] and losses[0] > 0
        gradient = torch.autograd.grad(losses.mean(), leaf)[0]
        assert (gradient[1:] == 0).all() and gradient.isfinite().all() and (gradient[0] != 0).any()
        assert losses[0] == ctc_loss(self.x[:1], *(a[:1] for a in self.args), blank=0, label_smoothing=label_smoothing)[0]

    def test_raise(self):
        with pytest.raises(ValueError, match=self.message):
            ctc_loss(self.x, *self.args, blank=0, impossible="raise")

    @pytest.mark.parametrize("impossible", ["warn", "raise", "zero"])
    def test_enough_steps_are_enough(self, impossible):
        """Exactly as many steps as the text needs: one path."""
        loss = ctc_loss(self.x[:1], ints([1, 1, 3]), ints(4), ints(3), blank=0, impossible=impossible)
        assert loss.item() == pytest.approx(-sum(float(self.x[0, t, k]) for t, k in enumerate((1, 0, 1, 3))))

    def test_equal_neighbours_in_the_padding_do_not_count(self):
        assert ctc_loss(self.x[:1], ints([1, 1, 1, 1]), ints(1), ints(1), blank=0).isfinite().all()

    def test_no_other_word(self):
        with pytest.raises(ValueError, match="impossible is 'drop'; expected 'warn', 'raise' or 'zero'"):
            ctc_loss(self.x, *self.args, blank=0, impossible="drop")


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(log_probs=torch.tensor([[[0.5, -1.0, -1.0]] * 3] * 2)), r"log_probs has the value 0.5; log-probabilities are never above 0. Apply log_softmax"),
            (dict(targets=ints([1, 2], [2, 0])), "target 1 has symbol 0 at place 1: this is the blank, which must not be a letter of the text"),
            (dict(targets=ints([1, 2], [2, 3])), "target 1 has symbol 3 at place 1: symbols go from 0 to 2"),
            (dict(targets=ints([-1, 2], [2, 1])), "target 0 has symbol -1 at place 0: symbols go from 0 to 2"),
            (dict(lengths=ints(3, 4)), "lengths of utterance 1 is 4; it must lie between 0 and 3. Lengths count the model's steps, not the frames"),
            (dict(lengths=ints(-1, 3)), "lengths of utterance 0 is -1; it must lie between 0 and 3"),
            (dict(target_lengths=ints(2, 3)), "target_lengths of utterance 1 is 3; it must lie between 0 and 2"),
            (dict(target_lengths=ints(-2, 2)), "target_lengths of utterance 0 is -2"),
            (dict(blank=3), "blank is 3; it must be one of the 3 symbols of log_probs"),
            (dict(blank=-1), "blank is -1; it must be one of the 3 symbols of log_probs"),
            (dict(label_smoothing=1.0), "label_smoothing is 1.0; expected at least 0 and below 1"),
            (dict(label_smoothing=-0.1), "label_smoothing is -0.1"),
        ],
    )
    def test_what_does_not_fit(self, change, message):
        arguments = dict(log_probs=THREE[None].repeat(2, 1, 1), targets=ints([1, 2], [2, 1]), lengths=ints(3, 3), target_lengths=ints(2, 2), blank=0)
        assert ctc_loss(**arguments).isfinite().all()
        with pytest.raises(ValueError, match=message):
            ctc_loss(**arguments | change)

    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("impossible", ["warn", "zero"])
    def test_nan(self, label_smoothing, impossible):
        x = THREE[None].repeat(3, 1, 1)
        x[1, 2, 1] = math.nan
        with pytest.raises(ArithmeticError, match="the loss of utterance 1 is NaN; its log_probs hold NaN"):
            ctc_loss(x, ints([1], [1], [2]), ints(3, 3, 3), ints(1, 1, 1), blank=0, label_smoothing=label_smoothing, impossible=impossible)

    def test_a_nan_that_comes_back_is_passed_on_where_there_is_a_path(self):
        x = THREE[None].repeat(2, 1, 1).requires_grad_()
        losses = ctc_loss(x, ints([1, 0], [1, 1]), ints(3, 2), ints(1, 2), blank=0, impossible="zero")
        losses.backward(torch.tensor([math.nan, 1.0], dtype=torch.float64))
        assert x.grad[0, :, :2].isnan().all() and (x.grad[1] == 0).all()

    @pytest.mark.parametrize("upstream", [math.nan, math.inf, 1.0])
    def test_a_text_without_a_path_pulls_at_nothing_whatever_comes_back(self, upstream):
        x = THREE[None].repeat(2, 1, 1).requires_grad_()
        with pytest.warns(UserWarning, match="utterance 1 has 2 steps"):
            losses = ctc_loss(x, ints([1, 0], [1, 1]), ints(3, 2), ints(1, 2), blank=0)
        losses.backward(torch.tensor([1.0, upstream], dtype=torch.float64))
        assert (x.grad[1] == 0).all() and x.grad[0].sum(dim=1).allclose(torch.full((3,), -1.0, dtype=torch.float64))

    def test_nan_in_a_symbol_that_the_text_lacks_is_named_when_smoothing_reads_it(self):
        x = THREE[None].clone()
        x[0, 1, 2] = math.nan
        with pytest.raises(ArithmeticError, match="utterance 0"):
            ctc_loss(x, ints([1]), ints(3), ints(1), blank=0, label_smoothing=0.1)


class TestLabelSmoothing:
    @settings(max_examples=30, deadline=None)
    @given(batches(fitting=True), st.floats(0.0, 0.9))
    def test_the_formula(self, batch, epsilon):
        log_probs, targets, lengths, target_lengths, texts, blank = batch
        smoothed = ctc_loss(log_probs, targets, lengths, target_lengths, blank=blank, label_smoothing=epsilon)
        for i, (n, text) in enumerate(zip(lengths.tolist(), texts)):
            flat = -sum(float(p) for row in log_probs[i, :n] for p in row) / log_probs.shape[2]
            assert smoothed[i].item() == pytest.approx(-(1 - epsilon) * all_paths(log_probs[i, :n], text, blank)[0] + epsilon * flat, abs=1e-9)

    def test_it_pulls_a_sure_model_back(self):
        leaf = (6 * torch.eye(3)[[1, 0, 0]][None]).requires_grad_()
        loss = ctc_loss(leaf.log_softmax(dim=-1), ints([1]), ints(3), ints(1), blank=0, label_smoothing=0.2)
        gradient = torch.autograd.grad(loss.sum(), leaf)[0][0]
        assert gradient[0, 1] > 0 and gradient[0, 2] < 0  # descent makes the sure symbol less likely, and the one that never comes likelier


class TestGreedy:
    @settings(max_examples=80, deadline=None)
    @given(st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 10**6))
    @example([[1, 1, 0, 1], []], 0, 0)
    def test_against_a_decoder_with_one_loop(self, paths, blank, seed):
        n = max(map(len, paths)) + 2
        logits = torch.rand(len(paths), n, 4, generator=generator(seed), dtype=torch.float64)
        for row, path in zip(logits, paths):
            row[range(len(path)), path] += 1
        x = logits.log_softmax(dim=-1)
        for row, path, found in zip(x, paths, ctc_greedy(x, ints(*map(len, paths)), blank=blank), strict=True):
            assert found.tokens == text_of(path, blank)
            assert found.log_prob == found.score == pytest.approx(sum(float(row[t].max()) for t in range(len(path))))
            rebuilt = [blank] * len(path)
            for token, (first, last) in zip(found.tokens, found.spans, strict=True):
                rebuilt[first : last + 1] = [token] * (last - first + 1)
            assert rebuilt == path

    def test_it_is_no_better_than_the_best_text(self):
        x = torch.tensor([[[0.6, 0.4], [0.6, 0.4]]], dtype=torch.float64).log()
        found = ctc_greedy(x, ints(2), blank=0)[0]
        assert found.tokens == () and found.spans == () and math.exp(found.log_prob) == pytest.approx(0.36)
        assert math.exp(-ctc_loss(x, ints([1]), ints(2), ints(1), blank=0).item()) == pytest.approx(0.64)

    @pytest.mark.parametrize("never", [(), (1,), (1, 3), (0, 2)])  # the blank stays allowed
    def test_symbols_that_must_not_be_written(self, never):
        x = torch.randn(15, 5, 4, generator=generator(16), dtype=torch.float64).log_softmax(dim=-1)
        before, allowed = x.clone(), [symbol for symbol in range(4) if symbol == 0 or symbol not in never]
        for row, found in zip(x, ctc_greedy(x, ints(*[5] * 15), blank=0, never=never), strict=True):
            best = max(itertools.product(allowed, repeat=5), key=lambda path: float(row[range(5), list(path)].sum()))
            assert found.tokens == text_of(best, 0) and found.log_prob == pytest.approx(float(row[range(5), list(best)].sum()))
        assert torch.equal(x, before)  # the caller's log-probabilities are left alone

    def test_one_path_is_never_more_than_all(self):
        x = torch.randn(20, 12, 4, generator=generator(15), dtype=torch.float64).log_softmax(dim=-1)
        for row, found in zip(x, ctc_greedy(x, ints(*[12] * 20), blank=2)):
            text = torch.tensor([found.tokens], dtype=torch.long).reshape(1, -1)
            assert found.log_prob <= -ctc_loss(row[None], text, ints(12), ints(len(found.tokens)), blank=2).item()

    @pytest.mark.parametrize(
        ("lengths", "blank", "message"),
        [
            (ints(3, 4), 0, r"lengths \[3, 4\] do not fit log_probs of shape \(2, 3, 3\); each utterance has one, between 0 and 3"),
            (ints(-1, 3), 0, "do not fit"),
            (ints(3), 0, "do not fit"),
            (ints(3, 3), 3, "blank is 3; it must be one of the 3 symbols"),
            (ints(3, 3), -1, "blank is -1"),
        ],
    )
    def test_what_does_not_fit(self, lengths, blank, message):
        with pytest.raises(ValueError, match=message):
            valid_steps(THREE[None].repeat(2, 1, 1), lengths, blank=blank)
        if len(lengths) == 2:  # otherwise the shape check of the test run speaks first
            with pytest.raises(ValueError, match=message):
                ctc_greedy(THREE[None].repeat(2, 1, 1), lengths, blank=blank)

    def test_logits_and_nan(self):
        x = THREE[None].repeat(2, 1, 1)
        x[1, 2, 0] = 4.5
        assert len(ctc_greedy(x, ints(3, 2), blank=0)) == 2  # in the padding it is nobody's
        with pytest.raises(ValueError, match="log_probs has the value 4.5; log-probabilities are never above 0. Apply log_softmax"):
            ctc_greedy(x, ints(3, 3), blank=0)
        x[1, 2, 0] = math.nan
        with pytest.raises(ArithmeticError, match="the log-probabilities of utterance 1 hold NaN"):
            ctc_greedy(x, ints(3, 3), blank=0)


class TestPenalty:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 10**6), st.floats(-5, 5), st.integers(0, 4))
    def test_factor_and_sum(self, seed, penalty, blank):
        x = torch.randn(2, 3, 5, generator=generator(seed), dtype=torch.float64).log_softmax(dim=-1)
        y = penalise_blank(x, penalty, blank=blank)
        assert torch.allclose(y.exp().sum(dim=-1), torch.ones(2, 3, dtype=torch.float64))
        others = [k for k in range(5) if k != blank]
        factors = (y - x).exp()
        assert torch.allclose(factors[..., blank] / factors[..., others[0]], torch.full((2, 3), math.exp(-penalty), dtype=torch.float64))
        assert torch.allclose(factors[..., others], factors[..., others[:1]].expand(-1, -1, 4))
        assert torch.allclose(penalise_blank(y, -penalty, blank=blank), x)

    def test_by_hand_and_what_it_does(self):
        x = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
        assert torch.allclose(penalise_blank(x, math.log(2), blank=0).exp(), torch.tensor([0.25, 0.3, 0.2], dtype=torch.float64) / 0.75)
        x = x[None, None]
        assert ctc_greedy(x, ints(1), blank=0)[0].tokens == () and ctc_greedy(penalise_blank(x, 1.0, blank=0), ints(1), blank=0)[0].tokens == (1,)
        impossible = torch.tensor([0.5, 0.5, 0.0]).log()
        assert penalise_blank(impossible, 1.0, blank=0)[2] == -math.inf and not penalise_blank(impossible, 1.0, blank=0).isnan().any()


class TestPicture:
    def test_lattice(self):
        import matplotlib.pyplot as plt

        _, gamma = ctc_posteriors(THREE[None], ints([1, 2]), ints(3), ints(2), blank=0)
        ax = plot_lattice(gamma[0], ["a", " "], frame_seconds=0.04)
        assert ax.get_xlabel() == "time (s)" and [label.get_text() for label in ax.get_yticklabels()] == ["a", "␣"]
        assert ax.images[0].get_array().shape == (5, 3) and ax.images[0].get_extent()[1] == pytest.approx(0.12)
        assert torch.allclose(torch.as_tensor(ax.images[0].get_array().data), gamma[0].T)
        _, given_axes = plt.subplots()
        assert plot_lattice(gamma[0], "ab", ax=given_axes) is given_axes and given_axes.get_xlabel() == "step"
        with pytest.raises(ValueError, match="3 symbols have 7 states, but the posteriors have 5; cut off the padding, and give the names without blanks"):
            plot_lattice(gamma[0], "abc")
        plt.close("all")
