"""Balancers: the gradient against autograd of the loss as it is written, directions, probabilities, extreme inputs."""
import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlearn.zipformer.balancer import ActivationBalancer, Balancer, acting_probability, correction_line, mean_over_stddev_of_share, rms_of_mean_abs
from speechlearn.zipformer.scaling import ScheduledFloat, set_batch_count
from zipformer_tools import draws, gradient, randn

HALVES = [torch.float16, torch.bfloat16]


def random_channels(*shape, channel_dim=-1, seed=0, dtype=torch.float64):
    """Channels of very different means and sizes: some inside usual ranges, most outside."""
    x = randn(*shape, seed=seed).movedim(channel_dim, -1)
    channels = x.shape[-1]
    x = (x + 1.5 * randn(channels, seed=seed + 1)) * (2 * randn(channels, seed=seed + 2)).exp()
    return x.movedim(-1, channel_dim).to(dtype)


class TestLimits:
    @pytest.mark.parametrize("share, expected", [(0.45, -0.08167), (0.3, -0.34483), (0.05, -1.19832), (0.0, -9.6531), (1.0, 9.6531), (0.5, 0.0), (0.95, 1.19832)])
    def test_share_to_mean(self, share, expected):
        """The check values of the specification."""
        assert mean_over_stddev_of_share(share) == pytest.approx(expected, abs=5e-5)

    def test_share_against_the_bell_curve(self):
        """The function only resembles the inverse of the cumulative function: it rises, has its sign, and lies within 0.35 of it between 0.15 and 0.85."""
        normal = torch.distributions.Normal(0.0, 1.0)
        shares = [s / 100 for s in range(15, 86)]
        exact = normal.icdf(torch.tensor(shares)).tolist()
        ours = [mean_over_stddev_of_share(s) for s in shares]
        assert max(abs(a - b) for a, b in zip(exact, ours)) < 0.35
        assert all(a < b for a, b in zip(ours, ours[1:])) and all(a * b >= 0 for a, b in zip(exact, ours))

    def test_mean_abs_to_rms(self):
        x = randn(200_000)
        assert rms_of_mean_abs(x.abs().mean().item()) == pytest.approx(x.square().mean().sqrt().item(), rel=0.01)
        assert rms_of_mean_abs(2.0) == pytest.approx(2 * math.sqrt(math.pi / 2))


def written_loss(x, min_mean, max_mean, min_rms, max_rms, channel_dim):
    """The sum over the channels of how far they are outside, by the definition."""
    others = [axis for axis in range(x.dim()) if axis != channel_dim % x.dim()]
    square, mean = x.square().mean(dim=others), x.mean(dim=others)
    stddev, rms = (square - mean.square()).clamp(min=1e-20).sqrt(), square.clamp(min=1e-20).sqrt()
    ratio = mean / stddev
    return ((ratio - ratio.clamp(min=min_mean, max=max_mean)).abs() + (rms.clamp(min=min_rms, max=max_rms) / rms).log().abs()).sum()


def expected_gradient(x, g, limits, grad_scale, channel_dim):
    leaf = x.clone().requires_grad_()
    (push,) = torch.autograd.grad(written_loss(leaf, *limits, channel_dim), leaf)
    others = [axis for axis in range(x.dim()) if axis != channel_dim % x.dim()]
    push = push * grad_scale / push.square().mean(dim=others, keepdim=True).sqrt().clamp(min=1e-20)
    return g + g.abs() * push


class TestBalancer:
    @settings(max_examples=80, deadline=None)
    @given(
        st.lists(st.integers(2, 5), min_size=2, max_size=4), st.data(), st.floats(0.02, 0.49), st.floats(0.51, 0.98), st.floats(0.01, 1.0), st.floats(1.1, 10.0),
        st.floats(0.001, 0.2), st.integers(0, 10**6),
    )
    def test_equals_autograd_of_the_written_loss(self, shape, data, min_positive, max_positive, min_abs, max_abs, grad_scale, seed):
        dim = data.draw(st.integers(-len(shape), len(shape) - 1))
        x, g = random_channels(*shape, channel_dim=dim, seed=seed), randn(*shape, seed=seed + 3)
        module = Balancer(shape[dim], dim, min_positive=min_positive, max_positive=max_positive, min_abs=min_abs, max_abs=max_abs, grad_scale=grad_scale, prob=1.0)
        limits = mean_over_stddev_of_share(min_positive), mean_over_stddev_of_share(max_positive), rms_of_mean_abs(min_abs), rms_of_mean_abs(max_abs)
        torch.testing.assert_close(gradient(module, x, g), expected_gradient(x, g, limits, grad_scale, dim), rtol=1e-6, atol=1e-9)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 10**6), st.floats(0.001, 0.5))
    def test_the_line(self, n, channels, seed, grad_scale):
        """In each channel either zeros, or values of the RMS `grad_scale`."""
        x = random_channels(n, channels, seed=seed)
        slope, offset = correction_line(x, -0.4, 0.4, 0.5, 2.0, grad_scale, 1)
        assert slope.shape == offset.shape == (1, channels)
        size = (slope * x + offset).square().mean(dim=0).sqrt()
        outside = torch.stack([written_loss(x[:, c : c + 1], -0.4, 0.4, 0.5, 2.0, 1) for c in range(channels)]) > 0
        torch.testing.assert_close(size, grad_scale * outside.to(x.dtype), rtol=1e-6, atol=1e-12)

    def test_inside_exactly_nothing(self):
        """Also where a neighbour is outside."""
        x = torch.stack([randn(200), randn(200, seed=1) + 9, 0.5 * randn(200, seed=2)], dim=1)
        g = randn(200, 3, seed=3)
        got = gradient(Balancer(3, -1, prob=1.0), x, g)
        assert torch.equal(got[:, 0], g[:, 0]) and torch.equal(got[:, 2], g[:, 2]) and not torch.allclose(got[:, 1], g[:, 1])

    def test_frames_without_gradient_get_nothing(self):
        x, g = random_channels(10, 4, 6), randn(10, 4, 6, seed=1)
        g[7:, 2] = 0.0
        got = gradient(Balancer(6, -1, prob=1.0), x, g)
        assert not got[7:, 2].any() and (got[:7, 2] != g[:7, 2]).any()

    def test_relative_to_the_gradient(self):
        x, g = random_channels(20, 6), randn(20, 6, seed=1)
        module = Balancer(6, -1, prob=1.0)
        torch.testing.assert_close(gradient(module, x, 1e-6 * g), 1e-6 * gradient(module, x, g))
        change = gradient(module, x, g) - g
        ones = gradient(module, x, torch.ones_like(g)) - 1
        torch.testing.assert_close(change, g.abs() * ones)
        minus = gradient(module, x, -g) + g  # the sign of the gradient does not matter
        torch.testing.assert_close(minus, change)

    @pytest.mark.parametrize(
        "x, statistic, wanted",
        [
            (randn(500) - 3, "mean", "up"), (randn(500) + 3, "mean", "down"), (0.01 * randn(500), "rms", "up"), (50 * randn(500), "rms", "down"),
            (0.01 * (randn(500) - 3), "rms", "up"), (0.01 * (randn(500) - 3), "ratio", "up"), (50 * (randn(500) + 3), "ratio", "down"),
        ],
    )
    def test_one_step_of_descent(self, x, statistic, wanted):
        """With gradients of size one and random signs, the correction alone moves the channel where it should be."""
        g = randn(500, 1, seed=7).sign()
        x = x[:, None]
        push = gradient(Balancer(1, -1, max_abs=10.0, prob=1.0), x, g) - g
        after = x - 0.01 * x.abs().mean() * push
        of = {"mean": lambda v: v.mean(), "rms": lambda v: v.square().mean().sqrt(), "ratio": lambda v: v.mean() / v.std()}[statistic]
        assert of(after) > of(x) if wanted == "up" else of(after) < of(x)

    def test_many_steps_lead_inside(self):
        """SGD with gradients that alternate and so want nothing: four bad channels come inside the ranges, up to the size of a step."""
        x = torch.nn.Parameter(torch.stack([randn(100) - 4, randn(100, seed=1) + 4, 0.02 * randn(100, seed=2), 8 * randn(100, seed=3)], dim=1))
        module, optimiser = Balancer(4, -1, min_positive=0.2, max_positive=0.8, min_abs=0.5, max_abs=2.0, prob=1.0), torch.optim.SGD([x], lr=1.0)
        limits = mean_over_stddev_of_share(0.2), mean_over_stddev_of_share(0.8), rms_of_mean_abs(0.5), rms_of_mean_abs(2.0)
        losses = lambda: [written_loss(x[:, c : c + 1], *limits, 1).item() for c in range(4)]  # noqa: E731
        assert min(losses()) > 1
        for step in range(300):
            optimiser.zero_grad()
            module(x).backward(torch.full_like(x, (-1.0) ** step))
            optimiser.step()
        assert max(losses()) < 0.1

    def test_lower_limit_above_the_upper(self):
        """clamp gives the upper one: as if the lower were equal to it."""
        x, g = random_channels(20, 5), randn(20, 5, seed=1)
        torch.testing.assert_close(gradient(Balancer(5, -1, min_abs=1.5, max_abs=1.0, prob=1.0), x, g), gradient(Balancer(5, -1, min_abs=1.0, max_abs=1.0, prob=1.0), x, g))

    @pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
    def test_constant_channels(self, value):
        """No variance: the gradient is finite, and that of the written loss."""
        x, g = torch.full((10, 1), value, dtype=torch.float64), randn(10, 1, seed=1)
        got = gradient(Balancer(1, -1, prob=1.0), x, g)
        limits = mean_over_stddev_of_share(0.05), mean_over_stddev_of_share(0.95), rms_of_mean_abs(0.2), rms_of_mean_abs(100.0)
        torch.testing.assert_close(got, expected_gradient(x, g, limits, 0.04, -1), rtol=1e-5, atol=1e-9)
        assert (got - g).abs().max() <= 0.0401 * g.abs().max()

    @pytest.mark.parametrize("scale, pushed", [(3e-11, False), (3e-10, True)])
    def test_tiny_channels(self, scale, pushed):
        """Below 1e-10 the size counts as 1e-10, so that nothing is to be gained."""
        x, g = scale * randn(20, 2), randn(20, 2, seed=1)
        limits = mean_over_stddev_of_share(0.05), mean_over_stddev_of_share(0.95), rms_of_mean_abs(0.2), rms_of_mean_abs(100.0)
        got = gradient(Balancer(2, -1, prob=1.0), x, g)
        torch.testing.assert_close(got, expected_gradient(x, g, limits, 0.04, -1))
        assert torch.equal(got, g) != pushed

    @pytest.mark.parametrize("dtype, scale", [(torch.float32, 1e30), (torch.float32, 1e-30), (torch.float32, 1e15), (torch.float16, 6e4), (torch.float16, 1e-7), (torch.bfloat16, 1e38), (torch.float64, 1e200)])
    @pytest.mark.parametrize("mean", [0.0, 5.0])
    def test_extreme_inputs(self, dtype, scale, mean):
        x = ((randn(50, 3) + mean) / (mean + 4) * scale).to(dtype)
        g = randn(50, 3, seed=1).to(dtype)
        got = gradient(Balancer(3, -1, prob=1.0), x, g)
        assert got.dtype == dtype and got.isfinite().all() and (got - g).abs().max() <= 0.2 * g.abs().max()

    @pytest.mark.parametrize("scale", [1e5, 1e10, 1e15, 1e18])
    @pytest.mark.parametrize("mean", [0.0, 0.1, 3.0])
    def test_the_correction_does_not_depend_on_the_size(self, scale, mean):
        """Channels that are too large, however large: in 32 bits as in 64."""
        x, g = randn(50, 3) + mean, randn(50, 3, seed=1)
        exact = gradient(Balancer(3, -1, prob=1.0), scale * x, g)
        torch.testing.assert_close(gradient(Balancer(3, -1, prob=1.0), 1e4 * x, g), exact, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(gradient(Balancer(3, -1, prob=1.0), (scale * x).float(), g.float()).double(), exact, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("dtype", HALVES)
    def test_sixteen_bits_are_computed_in_thirty_two(self, dtype):
        x, g = random_channels(40, 5, dtype=torch.float32).clamp(-1000, 1000).to(dtype), randn(40, 5, seed=1).to(dtype)
        wide = gradient(Balancer(5, -1, prob=1.0), x.float(), g.float())
        got = gradient(Balancer(5, -1, prob=1.0), x, g)
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), wide, rtol=3 * torch.finfo(dtype).eps, atol=1e-3)

    def test_large_mean_small_variance(self):
        """mean(x²) − mean² loses all digits in 32 bits here; the line is that of 64 bits."""
        x, g = (1000 + 0.01 * randn(400, 2)).float(), torch.ones(400, 2)
        got, exact = gradient(Balancer(2, -1, prob=1.0), x, g), gradient(Balancer(2, -1, prob=1.0), x.double(), g.double())
        torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("drawn, acts", [(0.39, True), (0.4, False), (0.99, False)])
    def test_probability(self, monkeypatch, drawn, acts):
        x, g, module = random_channels(10, 4), randn(10, 4, seed=1), Balancer(4, -1)
        count = draws(monkeypatch, drawn)
        assert torch.equal(gradient(module, x, g), g) != acts and len(count) == 1

    def test_probability_follows_a_schedule(self):
        module = Balancer(4, -1)
        assert float(module.prob) == 0.4
        for step, prob in ((0, 0.5), (4000, 0.3125), (8000, 0.125), (1e6, 0.125)):
            set_batch_count(module, step)
            assert float(module.prob) == prob

    def test_limits_may_be_schedules(self):
        x, g = random_channels(30, 3), randn(30, 3, seed=1)
        module = Balancer(3, -1, min_abs=ScheduledFloat((0, 0.5), (10, 1.5)), max_positive=ScheduledFloat((0, 0.9), (10, 0.6)), grad_scale=ScheduledFloat((0, 0.1), (10, 0.02)), prob=1.0)
        for step, settings_ in ((0, (0.5, 0.9, 0.1)), (5, (1.0, 0.75, 0.06)), (99, (1.5, 0.6, 0.02))):
            set_batch_count(module, step)
            fixed = Balancer(3, -1, min_abs=settings_[0], max_positive=settings_[1], grad_scale=settings_[2], prob=1.0)
            torch.testing.assert_close(gradient(module, x, g), gradient(fixed, x, g))

    def test_what_is_kept(self):
        x = randn(10, 4, dtype=torch.float32).requires_grad_()
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.data_ptr()) or t, lambda t: t):
            Balancer(4, -1, prob=1.0)(x)
        assert seen == [x.data_ptr()]  # the input itself, no copy
        seen.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.data_ptr()) or t, lambda t: t):
            Balancer(4, -1, prob=0.0)(x)
        assert not seen

    def test_names(self):
        module = Balancer(4, -1)
        assert not module.state_dict()
        twin = copy.deepcopy(module)
        set_batch_count(twin, 0)
        assert float(twin.prob) == 0.5 and float(module.prob) == 0.4


@pytest.mark.parametrize("module", [Balancer(4, -1, prob=1.0), ActivationBalancer(4, -1, min_prob=1.0)])
class TestBoth:
    def test_evaluation(self, module, monkeypatch):
        """The exact gradient, and no draw."""
        x, g = random_channels(10, 4), randn(10, 4, seed=1)
        count = draws(monkeypatch, 0.0)
        module = copy.deepcopy(module)
        assert not torch.equal(gradient(module, x, g), g)
        count.clear()
        assert torch.equal(gradient(module.eval(), x, g), g) and not count

    def test_without_gradient(self, module, monkeypatch):
        x, count = random_channels(10, 4), draws(monkeypatch, 0.0)
        assert torch.equal(module(x), x)
        with torch.no_grad():
            assert torch.equal(module(x.clone().requires_grad_()), x)
        assert not count and not hasattr(module, "cpu_count") or module.cpu_count == 0

    def test_tracing(self, module, monkeypatch):
        x, g, count = random_channels(10, 4), randn(10, 4, seed=1), draws(monkeypatch, 0.0)
        monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
        assert torch.equal(gradient(module, x, g), g) and not count

    def test_wrong_number_of_channels(self, module, monkeypatch):
        draws(monkeypatch, 0.0)
        with pytest.raises(ValueError, match="has 5 channels on axis -1; this balancer was made for 4"):
            copy.deepcopy(module)(torch.zeros(3, 5, requires_grad=True))


def first_by_hand(x, g, module, prob):
    """The first version's gradient, channel by channel; channels last."""
    y = g.clone()
    for c in range(x.shape[1]):
        values = x[:, c].tolist()
        share, size = sum(v > 0 for v in values) / len(values), sum(abs(v) for v in values) / len(values)
        gain_sign, gain_scale, most = module.sign_gain_factor / prob, module.scale_gain_factor / prob, module.max_factor
        limited = lambda v: min(max(v, 0.0), most)  # noqa: E731
        sign = scale = 0.0
        if module.min_positive > 0:
            sign += limited((module.min_positive - share) / module.min_positive * gain_sign)
        if module.max_positive < 1:
            sign -= limited((share - module.max_positive) / (1 - module.max_positive) * gain_sign)
        if module.min_abs > 0:
            scale += limited((module.min_abs - size) / module.min_abs * gain_scale)
        scale -= limited((size - module.max_abs) / module.max_abs * gain_scale)
        for t, value in enumerate(values):
            y[t, c] -= abs(g[t, c]) * (sign + scale * ((value > 0) - 0.5))
    return y


class TestActivationBalancer:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 12), st.integers(1, 4), st.sampled_from([0.0, 0.05, 0.45]), st.sampled_from([1.0, 0.95, 0.55]), st.sampled_from([0.0, 0.2]), st.floats(0.5, 10), st.integers(0, 10**6))
    def test_by_hand(self, n, channels, min_positive, max_positive, min_abs, max_abs, seed):
        # Numbers that 32 bits hold exactly, so that no rounding decides.
        x, g = (random_channels(n, channels, seed=seed) * 64).round() / 64, randn(n, channels, seed=seed + 3)
        module = ActivationBalancer(channels, -1, min_positive=min_positive, max_positive=max_positive, min_abs=min_abs, max_abs=max_abs, min_prob=1.0)
        torch.testing.assert_close(gradient(module, x, g), first_by_hand(x, g, module, 1.0), rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("dim", [0, 1, 2, -2])
    def test_axes(self, dim):
        x, g = random_channels(5, 5, 5, channel_dim=dim), randn(5, 5, 5, seed=1)
        module = ActivationBalancer(5, dim, min_prob=1.0)
        flat = lambda v: v.movedim(dim, -1).reshape(25, 5)  # noqa: E731
        last = gradient(ActivationBalancer(5, -1, min_prob=1.0), flat(x), flat(g))
        torch.testing.assert_close(flat(gradient(module, x, g)), last)

    def test_at_most_six_per_cent(self):
        x, g = random_channels(20, 50, seed=4), randn(20, 50, seed=1)
        got = gradient(ActivationBalancer(50, -1, min_positive=0.49, max_positive=0.51, sign_gain_factor=9.0, scale_gain_factor=9.0, max_abs=1.0, min_prob=1.0), x, g)
        assert ((got - g).abs() <= 0.06 * g.abs() * (1 + 1e-5)).all() and ((got - g).abs() > 0.0599 * g.abs()).any()

    def test_inside_exactly_nothing(self):
        x, g = randn(200, 3), randn(200, 3, seed=1)
        g[5] = 0.0
        assert torch.equal(gradient(ActivationBalancer(3, -1, min_prob=1.0), x, g), g)

    @pytest.mark.parametrize(
        "x, of, wanted",
        [
            (randn(500).abs() * -1, "mean", "up"), (randn(500).abs(), "mean", "down"), (0.01 * randn(500), "size", "up"), (500 * randn(500), "size", "down"),
        ],
    )
    def test_one_step_of_descent(self, x, of, wanted):
        g = randn(500, 1, seed=7).sign()
        x = x[:, None]
        push = gradient(ActivationBalancer(1, -1, min_prob=1.0), x, g) - g
        after = x - x.abs().mean() * push
        statistic = {"mean": lambda v: v.mean(), "size": lambda v: v.abs().mean()}[of]
        assert statistic(after) > statistic(x) if wanted == "up" else statistic(after) < statistic(x)

    @pytest.mark.parametrize("calls, expected", [(0, 0.5), (4000, 0.25), (9287, 0.5 ** (1 + 9287 / 4000)), (9288, 0.1), (10**6, 0.1)])
    def test_acting_probability(self, calls, expected):
        assert acting_probability(calls, 0.1) == pytest.approx(expected) and acting_probability(9287, 0.1) > 0.1

    def test_the_gain_makes_up_for_the_probability(self, monkeypatch):
        """At the start it acts in half of the steps, with twice the gain."""
        x, g = randn(100, 1) - 1, torch.ones(100, 1, dtype=torch.float64)
        settings_ = dict(min_positive=0.5, max_factor=1.0, min_abs=0.0)
        always = gradient(ActivationBalancer(1, -1, min_prob=1.0, **settings_), x, g) - g
        draws(monkeypatch, 0.02)
        half = gradient(ActivationBalancer(1, -1, **settings_), x, g) - g
        assert always.abs().max() > 0.005
        torch.testing.assert_close(half, 2 * always, rtol=1e-5, atol=1e-8)

    @pytest.mark.parametrize("drawn, acts", [(0.499, True), (0.5, False)])
    def test_probability(self, monkeypatch, drawn, acts):
        x, g, module = random_channels(10, 4), randn(10, 4, seed=1), ActivationBalancer(4, -1)
        count = draws(monkeypatch, 0.9, drawn)
        assert torch.equal(gradient(module, x, g), g) != acts and len(count) == 2

    def test_counter(self, monkeypatch):
        x, module = randn(5, 2).requires_grad_(), ActivationBalancer(2, -1)
        draws(monkeypatch, 0.9)
        for _ in range(3):
            module(x)
        assert (module.cpu_count, module.count.item()) == (3, 0)
        draws(monkeypatch, 0.009, 0.9)  # one call in a hundred writes it down
        module(x)
        assert (module.cpu_count, module.count.item()) == (4, 4)
        with torch.no_grad():
            module(x)
        module(x.detach())
        assert module.cpu_count == 4

    def test_counter_comes_back_from_a_checkpoint(self, monkeypatch):
        module, x = ActivationBalancer(4, -1), random_channels(10, 4).requires_grad_()
        module.load_state_dict({"count": torch.tensor(7000)}, strict=True)
        draws(monkeypatch, 0.0, 0.9)
        module(x)
        assert module.cpu_count == 7000 and copy.deepcopy(module).cpu_count == 7000
        g = randn(10, 4, seed=1)
        draws(monkeypatch, 0.9, 0.2)  # 0.5 ** 2.75 is 0.149
        assert torch.equal(gradient(module, x.detach(), g), g)

    def test_names(self):
        state = ActivationBalancer(4, -1).state_dict()
        assert list(state) == ["count"] and state["count"].dtype == torch.int64 and state["count"].shape == ()

    def test_in_evaluation_if_asked(self, monkeypatch):
        module, x, g = ActivationBalancer(4, -1).eval(), random_channels(10, 4), randn(10, 4, seed=1)
        module.acts_in_evaluation = True
        draws(monkeypatch, 0.0)
        assert not torch.equal(gradient(module, x, g), g)

    def test_one_byte_for_each_number(self):
        x = randn(100, 4, dtype=torch.float32).requires_grad_()
        seen = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append((t.dtype, t.numel())) or t, lambda t: t):
            ActivationBalancer(4, -1, min_prob=1.0)(x)
        assert seen == [(torch.bool, 400), (torch.float32, 4), (torch.float32, 4)]

    @pytest.mark.parametrize("dtype, scale", [(torch.float16, 6e4), (torch.bfloat16, 1e38), (torch.float32, 1e37)])
    def test_large_inputs(self, dtype, scale):
        x = (scale * (randn(50, 3) / 4).clamp(-1, 1)).to(dtype)
        g = randn(50, 3, seed=1).to(dtype)
        got = gradient(ActivationBalancer(3, -1, min_prob=1.0), x, g)
        assert got.dtype == dtype and got.isfinite().all() and (got - g).abs().max() <= 0.07 * g.abs().max() and not torch.equal(got, g)
