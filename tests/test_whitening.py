"""Whitening: metrics of covariances computed by hand, the gradient against autograd, the size of the hint, and when it is given."""
import copy
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlearn.zipformer.scaling import ScheduledFloat, set_batch_count
from speechlearn.zipformer.whitening import FirstWhiten, Whiten, whitening_gradient, whitening_metric
from zipformer_tools import draws, gradient, randn

HALVES = [torch.float16, torch.bfloat16]


def crowded(*shape, seed=0, dtype=torch.float64):
    """Channels that mostly say the same."""
    return (randn(*shape, seed=seed) + 5 * randn(*shape[:-1], 1, seed=seed + 1) * randn(shape[-1], seed=seed + 2)).to(dtype)


def rotation(channels, seed):
    return torch.linalg.qr(randn(channels, channels, seed=seed))[0]


def with_eigenvalues(values, n_frames=None, seed=0):
    """A centred cloud whose matrix of sums has exactly these eigenvalues, turned at random."""
    n_frames = n_frames or len(values) + 3
    columns = torch.linalg.qr(torch.cat([torch.ones(n_frames, 1, dtype=torch.float64), randn(n_frames, len(values), seed=seed)], dim=1))[0][:, 1:]
    return columns * torch.tensor(values, dtype=torch.float64).sqrt() @ rotation(len(values), seed + 1)


def metric_by_eigenvalues(x, num_groups=1):
    """By numpy's covariance and torch's eigenvalues."""
    flat = x.reshape(-1, x.shape[-1])
    size = flat.shape[1] // num_groups
    values = torch.cat([torch.linalg.eigvalsh(torch.cov(flat[:, k * size : (k + 1) * size].T, correction=0).reshape(size, size)) for k in range(num_groups)])
    return values.square().mean() / values.mean().square()


def metric_in_64_bits(x, num_groups=1):
    flat = x.reshape(-1, x.shape[-1])
    groups = (flat - flat.mean(dim=0)).reshape(len(flat), num_groups, -1)
    sums = torch.einsum("tgi,tgj->gij", groups, groups)
    return sums.square().sum() / flat.shape[1] / (sums.diagonal(dim1=1, dim2=2).sum() / flat.shape[1]).square()


class TestMetric:
    @pytest.mark.parametrize(
        "eigenvalues, expected",
        [((1, 1, 1, 1), 1), ((4, 0, 0, 0), 4), ((2, 2, 0, 0), 2), ((16, 0), 2), ((3, 1), 10 / 8), ((1, 2, 3), 14 / 12), ((5,), 1)],
    )
    @pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4])
    def test_by_hand(self, eigenvalues, expected, scale):
        x = scale * with_eigenvalues(eigenvalues)
        assert whitening_metric(x.float()).item() == pytest.approx(expected, rel=1e-4)
        assert whitening_gradient(x)[0].item() == pytest.approx(expected, rel=1e-7)  # 1e-20 is added below the fraction

    def test_groups_by_hand(self):
        """Each group round, one twice as strong in variance: mean of (1, 1, 2, 2) squared."""
        x = torch.cat([with_eigenvalues((1, 1), 9), with_eigenvalues((2, 2), 9, seed=4)], dim=1)
        assert whitening_metric(x, 2).item() == pytest.approx((1 + 1 + 4 + 4) / 4 / 1.5**2, rel=1e-5)
        # Groups that say the same are fine, each by itself; together they are not.
        x = torch.cat([with_eigenvalues((1, 1), 9)] * 2, dim=1)
        assert whitening_metric(x, 2).item() == pytest.approx(1, rel=1e-5) and whitening_metric(x, 1).item() == pytest.approx(2, rel=1e-5)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6))
    def test_equals_the_eigenvalues(self, frames, num_groups, size, seed):
        x = crowded(*frames, num_groups * size, seed=seed)
        if math.prod(frames) < 2:
            assert whitening_metric(x, num_groups) == 0  # one frame has no covariance
            return
        expected = metric_by_eigenvalues(x, num_groups)
        torch.testing.assert_close(whitening_gradient(x, num_groups)[0], expected, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(whitening_metric(x, num_groups).double(), expected, rtol=1e-3, atol=1e-4)
        assert 1 - 1e-9 <= expected <= num_groups * size + 1e-9

    def test_what_it_does_not_see(self):
        x = crowded(50, 6)
        metric = whitening_gradient(x)[0]
        for other in (10 * x, x + 100 * randn(6, seed=9), x @ rotation(6, 5), x[torch.randperm(50)], x.repeat(2, 1)):
            torch.testing.assert_close(whitening_gradient(other)[0], metric, rtol=1e-6, atol=0)
        assert whitening_gradient(x * torch.tensor([10.0] + [1] * 5))[0] != pytest.approx(metric.item())

    def test_zeros(self):
        metric, hint = whitening_gradient(torch.zeros(5, 4))
        assert metric == 0 and not hint.any()

    def test_groups_that_do_not_fit(self):
        for function in (whitening_metric, whitening_gradient):
            with pytest.raises(ValueError, match="10 channels cannot be split into 4 groups"):
                function(torch.zeros(3, 10), 4)


class TestGradientOfTheMetric:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.integers(1, 5), min_size=1, max_size=3).filter(lambda s: math.prod(s) > 2), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6))
    def test_equals_autograd(self, frames, num_groups, size, seed):
        x = crowded(*frames, num_groups * size, seed=seed).requires_grad_()
        expected = metric_in_64_bits(x, num_groups)
        metric, hint = whitening_gradient(x.detach(), num_groups)
        torch.testing.assert_close(metric, expected.detach())
        (exact,) = torch.autograd.grad(expected, x)
        torch.testing.assert_close(hint, exact, rtol=1e-6, atol=1e-9 * max(1.0, exact.abs().max().item()))

    def test_gradcheck(self):
        class Metric(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                metric, ctx.hint = whitening_gradient(x, 2)
                return metric

            @staticmethod
            def backward(ctx, grad):
                return grad * ctx.hint

        assert torch.autograd.gradcheck(Metric.apply, crowded(7, 6).requires_grad_())

    def test_white_clouds_get_no_hint(self):
        _, hint = whitening_gradient(with_eigenvalues((2, 2, 2)))
        assert hint.abs().max() < 1e-12

    def test_against_size_and_mean(self):
        """The metric does not see size and mean, so its gradient changes neither."""
        x = crowded(20, 5)
        _, hint = whitening_gradient(x)
        assert abs((hint * (x - x.mean(dim=0))).sum()) < 1e-10 * hint.norm() * x.norm() and hint.sum(dim=0).abs().max() < 1e-10 * hint.norm()


def make(kind, limit=1.5, prob=1.0, grad_scale=0.02, groups=1):
    return kind(groups, limit, prob, grad_scale)


@pytest.mark.parametrize("kind", [Whiten, FirstWhiten])
class TestHint:
    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 3), st.floats(0.001, 0.3), st.floats(-6, 6), st.integers(0, 10**6))
    def test_its_size_and_direction(self, kind, groups, grad_scale, log_size, seed):
        x, g = crowded(30, groups * 4, seed=seed), 10**log_size * randn(30, groups * 4, seed=seed + 5)
        metric, hint = whitening_gradient(x, groups)
        added = gradient(make(kind, 1.0, grad_scale=grad_scale, groups=groups), x, g) - g
        assert added.norm().item() == pytest.approx(grad_scale * g.norm().item(), rel=1e-6)
        torch.testing.assert_close(added / added.norm(), hint / hint.norm(), rtol=1e-6, atol=1e-8)
        step = 1e-3 * x.norm() / added.norm()
        assert whitening_gradient(x - step * added, groups)[0] < metric, "descent must lower the metric"

    def test_how_far_above_does_not_matter(self, kind):
        g = randn(40, 4, seed=9)
        slightly, badly = with_eigenvalues((3, 1, 1, 1), 40), with_eigenvalues((1000, 1, 1, 1), 40)
        sizes = [(gradient(make(kind, 1.1), x, g) - g).norm().item() for x in (slightly, badly)]
        assert sizes == pytest.approx([0.02 * g.norm().item()] * 2, rel=1e-6)

    @pytest.mark.parametrize("limit, given_", [(1.2, True), (1.3, False)])
    def test_limit(self, kind, limit, given_):
        """Eigenvalues 3 and 1 have the metric 1.25."""
        x, g = with_eigenvalues((3, 1)), randn(5, 2, seed=9)
        assert torch.equal(gradient(make(kind, limit), x, g), g) != given_

    def test_without_gradient_no_hint(self, kind):
        x = crowded(10, 4)
        assert not gradient(make(kind), x, torch.zeros_like(x)).any()

    def test_many_steps(self, kind):
        """A loss without any wish: the metric falls to the neighbourhood of the limit."""
        x = torch.nn.Parameter(crowded(60, 6))
        module, before = make(kind, 1.6, grad_scale=0.1), whitening_metric(x.detach())
        for step in range(400):
            (g,) = torch.autograd.grad(module(x), x, (-1.0) ** step * 0.3 * torch.ones_like(x))
            with torch.no_grad():
                x -= g
        assert before > 3 and whitening_metric(x.detach()) < 1.7

    @pytest.mark.parametrize("dtype, scale", [(torch.float16, 3e4), (torch.bfloat16, 1e38), (torch.float32, 1e30), (torch.float32, 1e-30), (torch.float32, 1e8), (torch.float16, 1e-7)])
    def test_extreme_inputs(self, kind, dtype, scale):
        x = crowded(20, 4)
        x, g = (x / x.abs().max() * scale).to(dtype), randn(20, 4, seed=9).to(dtype)
        got = gradient(make(kind), x, g)
        assert got.dtype == dtype and got.isfinite().all() and (got - g).double().norm() <= 0.03 * g.double().norm()

    @pytest.mark.parametrize("dtype", HALVES)
    def test_sixteen_bits_are_computed_in_thirty_two(self, kind, dtype):
        x, g = (100 * crowded(30, 6)).to(dtype), randn(30, 6, seed=9).to(dtype)
        got, wide = gradient(make(kind), x, g), gradient(make(kind), x.float(), g.float())
        assert torch.equal(got, wide.to(dtype))

    def test_evaluation(self, kind, monkeypatch):
        x, g, module = crowded(10, 4), randn(10, 4, seed=9), make(kind, prob=(0.1, 0.2))
        count = draws(monkeypatch, 0.0)
        assert torch.equal(gradient(module.eval(), x, g), g) and not count and module.prob == 0.2
        module.train()
        assert torch.equal(module(x), x) and not count
        with torch.no_grad():
            assert torch.equal(module(x.clone().requires_grad_()), x) and not count
        monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
        assert torch.equal(gradient(module, x, g), g) and not count

    def test_switched_off(self, kind, monkeypatch):
        x, g, count = crowded(10, 4), randn(10, 4, seed=9), draws(monkeypatch, 0.0)
        assert torch.equal(gradient(make(kind, grad_scale=0.0), x, g), g) and not count

    @pytest.mark.parametrize("drawn, acts", [(0.25, True), (0.2501, False)])
    def test_probability(self, kind, monkeypatch, drawn, acts):
        """It looks unless the draw is above."""
        x, g = crowded(10, 4), randn(10, 4, seed=9)
        draws(monkeypatch, drawn)
        assert torch.equal(gradient(make(kind, prob=0.25), x, g), g) != acts

    def test_names_and_copies(self, kind):
        module = make(kind, prob=(0.1, 0.2))
        assert not module.state_dict()
        twin = copy.deepcopy(module)
        twin.prob = 0.1
        assert module.prob == 0.2 and twin.num_groups == 1
        module.load_state_dict({}, strict=True)

    def test_what_is_kept(self, kind):
        x, seen = crowded(10, 4, dtype=torch.float32).requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.data_ptr()) or t, lambda t: t):
            make(kind)(x)
        assert seen == [x.data_ptr()]

    def test_groups_that_do_not_fit(self, kind):
        x = crowded(10, 4).requires_grad_()
        with pytest.raises(ValueError, match="4 channels cannot be split into 3 groups"):
            make(kind, groups=3)(x).sum().backward()


class TestWhiten:
    def test_prob_is_switched_in_the_backward(self, monkeypatch):
        module, good, bad = make(Whiten, 2.0, prob=(0.025, 0.25)), with_eigenvalues((1, 1, 1, 1)), with_eigenvalues((9, 0, 0, 0))
        assert module.prob == 0.25
        draws(monkeypatch, 0.26)
        gradient(module, good, torch.ones_like(good))
        assert module.prob == 0.25, "did not look"
        draws(monkeypatch, 0.0)
        gradient(module, good, torch.ones_like(good))
        assert module.prob == 0.025
        module(bad.requires_grad_())
        assert module.prob == 0.025, "only the backward knows"
        draws(monkeypatch, 0.1)
        gradient(module, bad.detach(), torch.ones_like(bad))
        assert module.prob == 0.025, "did not look"
        draws(monkeypatch, 0.02)
        gradient(module, bad.detach(), torch.ones_like(bad))
        assert module.prob == 0.25

    def test_at_the_limit_it_acts(self):
        """Channels without covariance and with sums of squares 12 and 4: exactly 1.25, in 32 bits, too."""
        x, g = torch.tensor([[2.0, 0], [-2, 0], [1, 1], [-1, 1], [1, -1], [-1, -1]]), randn(6, 2, dtype=torch.float32)
        assert whitening_metric(x).item() == 1.25
        module = Whiten(1, 1.25, (0.1, 0.2), 0.5)
        module.prob = 1.0
        assert not torch.equal(gradient(module, x, g), g) and module.prob == 0.2
        assert torch.equal(gradient(FirstWhiten(1, 1.25, 1.0, 0.5), x, g), g)  # the first version acts above its limit only
        assert not torch.equal(gradient(FirstWhiten(1, 1.2499, 1.0, 0.5), x, g), g)

    def test_schedules(self):
        x, g = with_eigenvalues((3, 1)), randn(5, 2, seed=9)
        module = Whiten(1, ScheduledFloat((0, 1.2), (10, 1.4), default=1.4), 1.0, ScheduledFloat((0, 0.1), (10, 0.3), default=0.2))
        assert torch.equal(gradient(module, x, g), g)  # the default limit
        set_batch_count(module, 0)
        assert (gradient(module, x, g) - g).norm().item() == pytest.approx(0.1 * g.norm().item(), rel=1e-6)
        set_batch_count(module, 2)
        assert (gradient(module, x, g) - g).norm().item() == pytest.approx(0.14 * g.norm().item(), rel=1e-6)
        set_batch_count(module, 9)
        assert torch.equal(gradient(module, x, g), g)

    @pytest.mark.parametrize(
        "args, message",
        [
            ((0, 2.0, 0.5, 0.1), r"num_groups \(0\)"), ((1, 0.9, 0.5, 0.1), r"whitening_limit \(0.9\).*at least 1"), ((1, 2.0, 0.0, 0.1), "prob is 0.0; expected 0 < lower"),
            ((1, 2.0, (0.5, 0.2), 0.1), r"prob is \(0.5, 0.2\); expected 0 < lower"), ((1, 2.0, (0.5, 1.2), 0.1), r"upper ≤ 1"),
        ],
    )
    def test_refused(self, args, message):
        with pytest.raises(ValueError, match=message):
            Whiten(*args)


class TestFirstWhiten:
    def test_prob_is_switched_in_a_quarter_of_the_looks(self, monkeypatch):
        module, bad = make(FirstWhiten, 2.0, prob=(0.025, 0.25)), with_eigenvalues((9, 0, 0, 0)).requires_grad_()
        good = with_eigenvalues((1, 1, 1, 1)).requires_grad_()
        for first, second, x, prob in ((0.2, 0.25, good, 0.25), (0.26, 0.0, good, 0.25), (0.2, 0.24, good, 0.025), (0.02, 0.3, bad, 0.025), (0.02, 0.24, bad, 0.25)):
            draws(monkeypatch, first, second)
            module(x)
            assert module.prob == prob

    def test_one_number_is_never_switched(self, monkeypatch):
        module, count = make(FirstWhiten, 2.0, prob=0.25), draws(monkeypatch, 0.0)
        module(with_eigenvalues((1, 1)).requires_grad_())
        assert module.prob == 0.25 and len(count) == 1

    def test_in_evaluation_if_asked(self, monkeypatch):
        module, x, g = make(FirstWhiten).eval(), crowded(10, 4), randn(10, 4, seed=9)
        module.acts_in_evaluation = True
        assert not torch.equal(gradient(module, x, g), g)
