"""Optimisers and schedules: against torch's Adam and a plain loop in numpy, invariances, gradients that are not numbers, saving and loading."""
import copy
import io
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from speechlearn.optim import Eden, Eden2, FirstScaledAdam, ScaledAdam, adam_step, eden2_factor, eden_factor, median_norm, noam_factor, parameter_groups

BOTH = [ScaledAdam, FirstScaledAdam]


def randn(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameters(*shapes, seed=0, scale=1.0, dtype=torch.float64):
    return [nn.Parameter(randn(*shape, seed=100 * seed + i, scale=scale, dtype=dtype)) for i, shape in enumerate(shapes)]


def give(params, gradients):
    for p, g in zip(params, gradients, strict=True):
        p.grad = None if g is None else g.clone()


def gradients_of(shapes, t, seed=0, scale=1.0):
    return [randn(*shape, seed=10_000 + 1000 * seed + 50 * t + i, scale=scale) for i, shape in enumerate(shapes)]


def follow(optimiser, params, steps):
    """The parameters after each step."""
    history = []
    for gradients in steps:
        give(params, gradients)
        optimiser.step()
        history.append([p.detach().clone() for p in params])
    return history


def assert_equal_histories(ours, theirs, **tolerance):
    assert len(ours) == len(theirs) > 0
    for t, (a, b) in enumerate(zip(ours, theirs)):
        for p, q in zip(a, b, strict=True):
            torch.testing.assert_close(p, q, msg=lambda m: f"after step {t}: {m}", **tolerance)


def rms(p):
    return p.detach().square().mean().sqrt().item()


class Plain:
    """ScaledAdam in numpy: one parameter after the other, nothing stacked."""

    def __init__(self, params, lr=0.03, clipping_scale=None, betas=(0.9, 0.98), scalar_lr_scale=0.1, eps=1e-8, param_min_rms=1e-5, param_max_rms=3.0, scalar_max=10.0, size_update_period=4,
                 clipping_update_period=100):
        self.__dict__.update({name: value for name, value in locals().items() if name not in ("self", "params")})
        self.p = [p.detach().numpy().copy() for p in params]
        self.v, self.m = [np.zeros_like(p) for p in self.p], [np.zeros_like(p) for p in self.p]
        self.size, self.w = [math.sqrt(np.mean(p**2)) for p in self.p], [0.0 for _ in self.p]
        self.h = [[0.0] * size_update_period for _ in self.p]
        self.t, self.norms, self.threshold, self.ratios = 0, {}, None, []

    def ratio(self, gradients):
        if self.clipping_scale is None:
            return 1.0
        norm = math.sqrt(sum(np.sum((g * (self.scalar_lr_scale if g.size == 1 else size)) ** 2) for g, size in zip(gradients, self.size)))
        norm = norm if math.isfinite(norm) else math.inf
        period = self.clipping_update_period
        if self.t > 0:
            self.norms[self.t] = norm
            last = sorted(self.norms[t] for t in range(max(1, self.t - period + 1), self.t + 1))  # step 0 is not among them
            middle = last[min(len(last) - 1, len(last) // 4 * 2)]
            if self.t % period == 0:
                self.threshold = self.clipping_scale * middle
            elif self.t in (10, 20, 40) and self.t < period:
                self.threshold = 2 * self.clipping_scale * middle
        if norm == math.inf:
            return 0.0
        return 1.0 if self.threshold is None else min(1.0, self.threshold / (norm + 1e-20))

    def step(self, gradients):
        beta1, beta2 = self.betas
        gradients = [g.numpy() for g in gradients]
        ratio, period, last = self.ratio(gradients), self.size_update_period, self.t % self.size_update_period == self.size_update_period - 1
        self.ratios.append(ratio)
        for i, (p, g) in enumerate(zip(self.p, gradients)):
            g = g * ratio if ratio > 0 else 0 * np.nan_to_num(g, posinf=0, neginf=0)
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * g**2
            k = 1 - beta2 ** (self.t + 1)
            change = -self.lr * g / (np.sqrt(self.v[i] / k if k < 0.99 else self.v[i]) + self.eps)
            if g.size == 1:
                change = change * self.scalar_lr_scale
            else:
                self.h[i][self.t % period] = float(np.sum(p * g))
                if last:
                    self.size[i] = math.sqrt(np.mean(p**2))
                change = change * max(self.size[i], self.param_min_rms)
                if last and self.t > 0:
                    beta = beta2**period
                    self.w[i] = beta * self.w[i] + (1 - beta) * sum(x * x for x in self.h[i]) / period
                    s = -self.lr * self.scalar_lr_scale * math.sqrt(1 - beta ** ((self.t + 1) // period)) * sum(self.h[i]) / (math.sqrt(self.w[i]) + self.eps)
                    s = 0.0 if self.size[i] < self.param_min_rms else max(-0.1, min(0.1, s))
                    s = min(s, (self.param_max_rms - self.size[i]) / self.size[i]) if self.size[i] > 0 else s
                    change = change + s * p
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * change
            self.p[i] = p + self.m[i]
            if g.size == 1:
                self.p[i] = np.clip(self.p[i], -self.scalar_max, self.scalar_max)
        self.t += 1
        return [torch.from_numpy(np.asarray(p).copy()) for p in self.p]


class TestAdamStep:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 9), st.floats(1e-5, 1), st.floats(0, 0.99), st.floats(0, 0.9999), st.floats(1e-10, 1e-2), st.integers(0, 1000))
    def test_equals_torch(self, shape, n_steps, lr, beta1, beta2, eps, seed):
        weight = nn.Parameter(randn(*shape, seed=seed))
        theirs = torch.optim.Adam([weight], lr=lr, betas=(beta1, beta2), eps=eps)
        p, m, v = weight.detach().clone(), torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        for t in range(1, n_steps + 1):
            g = randn(*shape, seed=seed + t, scale=10.0 ** (t % 4 - 2))
            weight.grad = g.clone()
            theirs.step()
            p, m, v = adam_step(p, g, m, v, t, lr=lr, betas=(beta1, beta2), eps=eps)
            torch.testing.assert_close(p, weight.detach())

    def test_leaves_its_arguments_alone(self):
        given_ = [randn(3, seed=i) for i in range(3)] + [randn(3, seed=3).square()]
        before = [x.clone() for x in given_]
        adam_step(*given_, 5)
        assert all(torch.equal(a, b) for a, b in zip(given_, before))

    @pytest.mark.parametrize("t", [0, -1])
    def test_refused(self, t):
        with pytest.raises(ValueError, match=f"the first step of Adam has the number 1, got t = {t}"):
            adam_step(*[torch.zeros(1)] * 4, t)


class TestMedian:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.floats(0, 1e6), min_size=1, max_size=120), st.randoms())
    def test_place(self, norms, shuffle):
        expected = sorted(norms)[len(norms) // 4 * 2] if len(norms) > 1 else norms[0]
        shuffle.shuffle(norms)
        assert median_norm(norms) == expected
        assert sum(n <= expected for n in norms) > 0.5 * len(norms) - 2

    def test_what_is_no_number_stands_at_the_end(self):
        assert median_norm([math.nan, 1.0, 3.0, 2.0]) == 3.0  # place 2 of 1, 2, 3, nan
        assert median_norm([1.0, math.nan, math.inf, 2.0]) == math.inf and median_norm([math.nan]) == math.inf
        for place in range(8):
            norms = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
            norms.insert(place, math.nan)
            assert median_norm(norms) == 5.0

    def test_refused(self):
        with pytest.raises(ValueError, match="no gradient lengths"):
            median_norm([])


SHAPES = [(3, 2), (), (4,), (3, 2), (1,), (2, 3, 2), ()]


class TestScaledAdamAgainstALoop:
    @settings(max_examples=25, deadline=None)
    @given(
        st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6), st.integers(1, 30), st.integers(0, 1000), st.sampled_from([None, 0.5, 2.0]),
        st.fixed_dictionaries({
            "lr": st.floats(1e-4, 0.3), "betas": st.tuples(st.floats(0, 0.95), st.floats(0.1, 0.99)), "scalar_lr_scale": st.floats(0, 2), "param_min_rms": st.floats(1e-6, 0.2),
            "param_max_rms": st.floats(0.3, 3), "scalar_max": st.floats(0.1, 3), "size_update_period": st.integers(1, 5), "clipping_update_period": st.integers(1, 14),
        }),
        st.floats(-4, 1),
    )
    def test_any_settings(self, shapes, n_steps, seed, clipping_scale, numbers, size):
        numbers["clipping_scale"] = clipping_scale
        params = parameters(*shapes, seed=seed, scale=10.0**size)
        steps = [gradients_of(shapes, t, seed, scale=20.0 if t % 7 == 3 else 1.0) for t in range(n_steps)]
        plain = Plain(params, **numbers)
        assert_equal_histories(follow(ScaledAdam(params, **numbers), params, steps), [plain.step(g) for g in steps], rtol=1e-7, atol=1e-9)

    def test_the_usual_settings_for_long(self):
        """300 steps, with spikes that are clipped: three periods of the median."""
        params = parameters(*SHAPES)
        steps = [gradients_of(SHAPES, t, scale=50.0 if t % 31 == 30 else 1.0) for t in range(300)]
        plain, optimiser = Plain(params, clipping_scale=2.0), ScaledAdam(params, clipping_scale=2.0)
        assert_equal_histories(follow(optimiser, params, steps), [plain.step(g) for g in steps], rtol=1e-7, atol=1e-10)
        assert min(plain.ratios) < 0.1 and plain.ratios.count(1.0) > 200
        (memory,) = [state for state in optimiser.state.values() if "model_norms" in state]
        assert memory["num_clipped"] == sum(ratio < 1 for ratio in plain.ratios) and memory["model_norm_threshold"] == pytest.approx(plain.threshold)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("period", [12, 100])
    def test_gradients_that_are_not_finite_wherever_they_come(self, bad, period):
        for places in ((5,), (1,), (0,), (2, 9), (3, 4, 8), (10,), (12,), (20, 21)):
            params, steps = parameters((3, 2), ()), [gradients_of([(3, 2), ()], t) for t in range(26)]
            for t in places:
                steps[t][t % 2].view(-1)[0] = bad
            settings_ = dict(clipping_scale=0.8, clipping_update_period=period)
            plain = Plain(params, **settings_)
            assert_equal_histories(follow(ScaledAdam(params, **settings_), params, steps), [plain.step(g) for g in steps], rtol=1e-7, atol=1e-9)
            assert all(plain.ratios[t] == 0 for t in places) and all(0 < ratio for t, ratio in enumerate(plain.ratios) if t not in places)


@pytest.mark.parametrize("kind", BOTH)
class TestInvariances:
    steps = [gradients_of(SHAPES, t) for t in range(25)]

    def run(self, kind, steps=None, order=None, groups=None, scale=1.0, **settings_):
        params = parameters(*SHAPES, scale=scale)
        order = order or range(len(params))
        given_ = [params[i] for i in order] if groups is None else groups(params)
        return follow(kind(given_, **settings_), params, steps or self.steps)

    @pytest.mark.parametrize("clipping_scale", [None, 0.7])
    @pytest.mark.parametrize("factor", [1000.0, 1e-3])
    def test_size_of_the_gradients(self, kind, clipping_scale, factor):
        settings_ = dict(clipping_scale=clipping_scale, clipping_update_period=6, eps=1e-20)
        scaled = [[g * factor for g in gradients] for gradients in self.steps]
        assert_equal_histories(self.run(kind, scaled, **settings_), self.run(kind, **settings_), rtol=1e-9, atol=1e-12)

    def test_size_of_the_tensors(self, kind):
        """A tensor ten times as large, whose gradient is then ten times as small, makes the same steps relative to its size; scalars do not."""
        settings_ = dict(eps=1e-20, param_max_rms=1e9)
        tenfold = self.run(kind, [[g / 10 for g in gradients] for gradients in self.steps], scale=10.0, **settings_)
        big = [i for i, shape in enumerate(SHAPES) if math.prod(shape) > 1]
        pick = lambda history, factor: [[row[i] * factor for i in big] for row in history]
        assert_equal_histories(pick(tenfold, 0.1), pick(self.run(kind, **settings_), 1.0), rtol=1e-9, atol=1e-12)

    def test_stacked_or_alone(self, kind):
        """Every parameter in a group of its own."""
        assert_equal_histories(self.run(kind, groups=lambda params: [{"params": [p]} for p in params]), self.run(kind), rtol=1e-12, atol=1e-14)

    def test_order(self, kind):
        settings_ = dict(clipping_scale=0.7, clipping_update_period=6)
        order = list(range(len(SHAPES)))
        random.Random(1).shuffle(order)
        assert_equal_histories(self.run(kind, order=order, **settings_), self.run(kind, **settings_), rtol=1e-9, atol=1e-12)

    def test_no_gradient_is_a_gradient_of_zeros(self, kind):
        without = [[None if (t + i) % 3 == 0 else g for i, g in enumerate(gradients)] for t, gradients in enumerate(self.steps)]
        zeros = [[torch.zeros_like(g) if (t + i) % 3 == 0 else g for i, g in enumerate(gradients)] for t, gradients in enumerate(self.steps)]
        settings_ = dict(clipping_scale=0.7, clipping_update_period=6)
        assert_equal_histories(self.run(kind, without, **settings_), self.run(kind, zeros, **settings_), rtol=0, atol=0)

    @pytest.mark.parametrize("clipping_scale", [None, 2.0])
    def test_never_a_gradient(self, kind, clipping_scale):
        start = [p.detach() for p in parameters(*SHAPES)]
        history = self.run(kind, [[None] * len(SHAPES)] * 25, clipping_scale=clipping_scale, clipping_update_period=6)
        assert_equal_histories(history, [start] * 25, rtol=0, atol=0)


class TestClipping:
    def test_threshold_by_hand(self):
        """Two numbers of RMS 1, gradient (a, 0): its length is a. Period 4: the lengths of steps 1 to 4 count, that of step 0 does not."""
        weight = nn.Parameter(torch.tensor([1.0, -1.0], dtype=torch.float64))
        optimiser = ScaledAdam([weight], lr=0.0, clipping_scale=1.5, clipping_update_period=4)
        thresholds, clipped = [], []
        for length in (100.0, 3.0, 8.0, 1.0, 5.0, 7.0, 9.0, 2.0, 10.0):
            weight.grad = torch.tensor([length, 0.0], dtype=torch.float64)
            optimiser.step()
            state = optimiser.state[weight]
            thresholds.append(state["model_norm_threshold"])
            clipped.append(state["num_clipped"])
        # Step 4: place 2 of 1, 3, 5, 8. Step 8: place 2 of 2, 7, 9, 10.
        assert thresholds[:4] == [None] * 4 and thresholds[4:] == pytest.approx([7.5, 7.5, 7.5, 7.5, 13.5]) and clipped == [0, 0, 0, 0, 0, 0, 1, 1, 1]
        torch.testing.assert_close(state["exp_avg_sq"][0, 1], torch.zeros((), dtype=torch.float64))
        lengths = [100.0, 3.0, 8.0, 1.0, 5.0, 7.0, 7.5, 2.0, 10.0]  # as they entered the average
        assert state["exp_avg_sq"][0, 0].item() == pytest.approx(sum(0.02 * 0.98 ** (8 - t) * a * a for t, a in enumerate(lengths)))

    def test_length_counts_sizes_and_the_rate_of_scalars(self):
        wide, scalar = nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor(2.0))
        optimiser = ScaledAdam([wide, scalar], lr=0.0, clipping_scale=1.0, scalar_lr_scale=0.5)
        first = FirstScaledAdam([wide, scalar], lr=0.0, clipping_scale=1.0, scalar_lr_scale=0.5)
        for t in range(2):
            wide.grad, scalar.grad = torch.tensor([2.0, -1.0]), torch.tensor(6.0)
            optimiser.step(), first.step()
        lengths = [next(state["model_norms"][1] for state in o.state.values() if "model_norms" in state) for o in (optimiser, first)]
        assert lengths == pytest.approx([math.sqrt(5 * 12.5 + 9), math.sqrt(5 * 12.5 + 36)])

    def test_early_thresholds(self):
        """After 10, 20 and 40 steps: twice as generous, from the lengths so far. The first version waits for the full period."""
        for kind, expected in ((ScaledAdam, {9: None, 10: 2 * 2 * 5.0, 19: 20.0, 20: 2 * 2 * 11.0, 40: 2 * 2 * 21.0, 100: 2 * 51.0}), (FirstScaledAdam, {10: None, 99: None, 100: 102.0})):
            weight = nn.Parameter(torch.tensor([1.0, -1.0], dtype=torch.float64))
            optimiser = kind([weight], lr=0.0, clipping_scale=2.0)
            for t in range(101):
                weight.grad = torch.tensor([float(t), 0.0], dtype=torch.float64)
                optimiser.step()
                if t in expected:
                    found = optimiser.state[weight]["model_norm_threshold"]
                    assert found == (expected[t] if expected[t] is None else pytest.approx(expected[t])), t

    def test_first_version_clips_the_learning_of_sizes_alone(self):
        """Lengths 1, 1, 1, 10, period 2: the threshold of step 2 is 1.5, so step 3 has a factor of 0.15."""
        for kind, used in ((FirstScaledAdam, 10.0), (ScaledAdam, 1.5)):
            weight = nn.Parameter(torch.tensor([1.0, -1.0], dtype=torch.float64))
            optimiser = kind([weight], lr=0.0, clipping_scale=1.5, clipping_update_period=2, size_update_period=5)
            for length in (1.0, 1.0, 1.0, 10.0):
                weight.grad = torch.tensor([length, 0.0], dtype=torch.float64)
                optimiser.step()
            state = optimiser.state[weight]
            assert state["scale_grads"].flatten().tolist() == pytest.approx([1.0, 1.0, 1.0, 1.5, 0.0])
            assert state["exp_avg_sq"][0, 0].item() == pytest.approx(0.02 * (0.98**3 + 0.98**2 + 0.98 + used**2))

    def test_each_group_has_its_own(self):
        calm, wild = parameters((3,), (4,))
        optimiser = ScaledAdam([{"params": [calm]}, {"params": [wild]}], lr=0.0, clipping_scale=2.0, clipping_update_period=3)
        for _ in range(5):
            give([calm, wild], [torch.ones(3, dtype=torch.float64), 100 * torch.ones(4, dtype=torch.float64)])
            optimiser.step()
        assert [optimiser.state[p]["model_norm_threshold"] for p in (calm, wild)] == pytest.approx([2 * math.sqrt(3) * rms(calm), 400 * rms(wild)])

    def test_without_clipping_they_reach_the_parameters(self):
        for bad in (math.nan, math.inf):
            (weight,) = parameters((3,))
            weight.grad = torch.tensor([bad, 1.0, 1.0], dtype=torch.float64)
            ScaledAdam([weight]).step()
            assert weight[0].isnan() and weight[1:].isfinite().all()

    @pytest.mark.parametrize("period, at", [(4, 4), (100, 10)])
    def test_too_many_are_an_error_with_names(self, period, at):
        model = nn.ModuleDict({"good": nn.Linear(2, 2), "bad": nn.Linear(3, 3)})
        optimiser = ScaledAdam(model.named_parameters(), clipping_scale=2.0, clipping_update_period=period)
        before = copy.deepcopy(model.state_dict())
        for t in range(at + 1):
            for name, p in model.named_parameters():
                p.grad = torch.full_like(p, math.nan if name == "bad.weight" else 0.0)
            if t < at:
                optimiser.step()
        with pytest.raises(ValueError, match=rf"about half of the last {at} gradients were not finite. In this step those of bad.weight are not. Lower"):
            optimiser.step()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def test_names_are_made_up_where_none_are_given(self):
        weights = parameters((2,), (2,), (2,), (3,), (2,))
        optimiser = ScaledAdam(weights, clipping_scale=2.0, clipping_update_period=1)
        give(weights, [torch.full_like(p, math.nan) for p in weights])
        weights[0].grad.zero_()
        optimiser.step()
        with pytest.raises(ValueError, match=r"number 1 of shape \(2,\), number 2 of shape \(2,\), number 3 of shape \(3,\) and others are not"):
            optimiser.step()


class TestBounds:
    @pytest.mark.parametrize("lr", [0.01, 0.03])
    def test_largest_size(self, lr):
        """A gradient that always asks for longer. In one period the plain steps add up to 4 · lr of the size, which the pull towards the bound takes back."""
        (weight,) = parameters((30,))
        optimiser, sizes = ScaledAdam([weight], lr=lr, param_max_rms=2.0), []
        for _ in range(1000):
            weight.grad = -weight.detach().sign()
            optimiser.step()
            sizes.append(rms(weight))
        assert 2.0 * 0.95 < min(sizes[-100:]) and max(sizes[-100:]) < 2.0 / (1 - 4 * lr) * 1.05
        assert max(sizes) < 2.5 * (1 + lr)

    def test_first_version_shrinks_at_a_fixed_rate(self):
        """Above the largest size, with gradients of zeros: once in four steps the step gets −lr · 0.1 · 4 times the parameter."""
        weight = nn.Parameter(torch.full((3,), 5.0, dtype=torch.float64))
        optimiser, expected, delta = FirstScaledAdam([weight], lr=0.05), 5.0, 0.0
        for t in range(40):
            optimiser.step()
            delta = 0.9 * delta + (0.1 * -0.05 * 0.1 * 4 * expected if t % 4 == 3 else 0.0)
            expected += delta
            torch.testing.assert_close(weight.detach(), torch.full((3,), expected, dtype=torch.float64))
        assert expected < 4.5

    def test_zeros_grow_as_if_they_had_the_least_size(self):
        weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        optimiser, expected, m = ScaledAdam([weight], lr=0.1, param_min_rms=1e-3), 0.0, 0.0
        for _ in range(3):  # the size is looked at in step 3
            weight.grad = torch.tensor([2.0, 2.0, -5.0, -5.0], dtype=torch.float64)
            optimiser.step()
            m = 0.9 * m - 0.1 * 0.1 * 1e-3
            expected += m
            torch.testing.assert_close(weight.detach(), torch.tensor([expected, expected, -expected, -expected], dtype=torch.float64), rtol=1e-6, atol=0)

    def test_smallest_size(self):
        """A gradient that always asks for shorter: the tensor stays near the least size, and keeps moving."""
        (weight,) = parameters((30,))
        optimiser = ScaledAdam([weight], lr=0.03, param_min_rms=1e-3)
        for _ in range(1000):
            weight.grad = weight.detach().sign()
            before = weight.detach().clone()
            optimiser.step()
        assert 1e-7 < rms(weight) < 2e-3 and not torch.equal(weight.detach(), before) and weight.isfinite().all()

    @pytest.mark.parametrize("kind, slack", [(ScaledAdam, 0.0), (FirstScaledAdam, 0.0031)])
    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
    def test_scalars(self, kind, slack, shape):
        """The first version clamps before it moves: it may be one step, lr · 0.1, beyond."""
        weight = nn.Parameter(torch.full(shape, 1.0))
        optimiser, values = kind([weight], scalar_max=2.0), []
        for t in range(1000):
            weight.grad = torch.full(shape, -1.0 if t < 500 else 1.0)
            optimiser.step()
            values.append(weight.item())
        assert max(values) == pytest.approx(2.0 + slack, abs=1e-4) and max(values) <= 2.0 + slack and values[499] == max(values) and values[-1] < 1.0


class TestAsAnOptimizer:
    shapes = [(3, 2), (), (3, 2), (5,)]

    def make(self, kind=ScaledAdam, seed=0):
        params = parameters(*self.shapes, seed=seed, dtype=torch.float32)
        optimiser = kind([{"named_params": [("a", params[0]), ("b", params[1])], "lr": 0.02}, {"params": params[2:]}], clipping_scale=1.0, clipping_update_period=7)
        return params, optimiser, Eden(optimiser, 10, 2, warmup_batches=5)

    def go_on(self, params, optimiser, scheduler, steps):
        for t in steps:
            give(params, [g.float() for g in gradients_of(self.shapes, t)])
            if t == 8 and type(optimiser) is ScaledAdam:  # the first version lets it through
                params[2].grad[0, 0] = math.nan
            scheduler.step_batch(t)
            optimiser.step()

    @pytest.mark.parametrize("kind", BOTH)
    @pytest.mark.parametrize("through_a_file", [False, True])
    @pytest.mark.parametrize("stop", [0, 1, 9, 14])
    def test_resumes_bit_exactly(self, kind, through_a_file, stop):
        params, optimiser, scheduler = self.make(kind)
        self.go_on(params, optimiser, scheduler, range(stop))
        saved = {"params": [p.detach().clone() for p in params], "optimiser": copy.deepcopy(optimiser.state_dict()), "scheduler": scheduler.state_dict()}
        if through_a_file:
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        self.go_on(params, optimiser, scheduler, range(stop, 25))
        others, other, other_scheduler = self.make(kind, seed=3)
        with torch.no_grad():
            for p, value in zip(others, saved["params"]):
                p.copy_(value)
        other.load_state_dict(saved["optimiser"])
        other_scheduler.load_state_dict(saved["scheduler"])
        self.go_on(others, other, other_scheduler, range(stop, 25))
        for p, q in zip(params, others, strict=True):
            assert torch.equal(p, q) and p.isfinite().all()
        assert other.param_groups[0]["names"] == ["a", "b"] and [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimiser.param_groups]

    def test_copies_are_independent(self):
        params, optimiser, scheduler = self.make()
        self.go_on(params, optimiser, scheduler, range(5))
        twin_params, twin = copy.deepcopy((params, optimiser))
        before = [p.detach().clone() for p in params]
        self.go_on(twin_params, twin, Eden(twin, 10, 2, warmup_batches=5), range(5, 9))
        assert all(torch.equal(p, q) for p, q in zip(params, before)) and not any(torch.equal(p, q) for p, q in zip(twin_params, before))

    def test_closure(self):
        (weight,) = parameters((3,))
        twin = nn.Parameter(weight.detach().clone())
        optimiser, plain = ScaledAdam([weight]), ScaledAdam([twin])

        def closure():
            optimiser.zero_grad()
            loss = (weight**2).sum()
            loss.backward()
            return loss

        for _ in range(6):
            loss = optimiser.step(closure)
            twin.grad = 2 * twin.detach()
            expected = (twin.detach() ** 2).sum()
            assert plain.step() is None
            assert torch.equal(loss.detach(), expected) and torch.equal(weight, twin)
        with torch.no_grad():
            optimiser.step(closure)

    @pytest.mark.parametrize("kind", BOTH)
    def test_nothing_to_do(self, kind):
        empty, real = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.ones(2))
        optimiser = kind([{"params": []}, {"params": [empty]}, {"params": [nn.Parameter(torch.zeros(0)), real]}], clipping_scale=2.0, clipping_update_period=1)
        for _ in range(5):
            empty.grad, real.grad = torch.zeros(0, 3), torch.tensor([1.0, -1.0])
            optimiser.step()
        assert real[0] < 1 < real[1]
        optimiser.load_state_dict(optimiser.state_dict())
        optimiser.step()
        with pytest.raises(ValueError, match="empty parameter list"):
            kind([])

    @pytest.mark.parametrize("clipping_scale", [None, 2.0])
    def test_types_side_by_side(self, clipping_scale):
        """Types are never stacked together; each does what it does alone, to its own precision."""
        types = [torch.float32, torch.float64, torch.bfloat16, torch.float32]
        params = [nn.Parameter(randn(4, 3, seed=5).to(dtype)) for dtype in types]
        optimiser = ScaledAdam(params, clipping_scale=clipping_scale, clipping_update_period=4)
        for t in range(12):
            give(params, [randn(4, 3, seed=90 + t).to(dtype) for dtype in types])
            optimiser.step()
        assert [p.dtype for p in params] == types and torch.equal(params[0], params[3])
        assert [state["delta"].dtype for state in optimiser.state.values() if "delta" in state] == [torch.bfloat16, torch.float32, torch.float64]
        for p, tolerance in ((params[0], 1e-5), (params[2], 0.05)):
            torch.testing.assert_close(p.double(), params[1].detach(), atol=tolerance, rtol=0)

    def test_not_contiguous(self):
        strange, usual = nn.Parameter(randn(3, 4).t()), nn.Parameter(randn(3, 4).t().contiguous())
        for p in (strange, usual):
            optimiser = ScaledAdam([p], clipping_scale=1.0)
            for t in range(6):
                p.grad = randn(4, 3, seed=t + 1)
                optimiser.step()
        assert not strange.is_contiguous()
        torch.testing.assert_close(strange.detach(), usual.detach(), rtol=1e-12, atol=1e-14)

    def test_sparse_and_complex(self):
        table = nn.Embedding(4, 2, sparse=True)
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(TypeError, match="sparse=False"):
            ScaledAdam(table.parameters()).step()
        number = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        number.grad = torch.zeros(2, dtype=torch.complex64)
        with pytest.raises(TypeError, match="real gradients"):
            ScaledAdam([number]).step()

    @pytest.mark.parametrize("kind", BOTH)
    def test_a_quadratic(self, kind):
        """From zero to a given vector: the weighted distance falls to a millionth."""
        goal, weights = randn(20), torch.logspace(-2, 2, 20, dtype=torch.float64)
        x = nn.Parameter(0.01 * randn(20, seed=1))
        optimiser = kind([x], lr=0.05, clipping_scale=2.0)
        scheduler, first = Eden(optimiser, lr_batches=100, lr_epochs=10, warmup_batches=20), None
        for t in range(1500):
            optimiser.zero_grad()
            loss = (weights * (x - goal) ** 2).sum()
            first = first or loss.item()
            loss.backward()
            scheduler.step_batch(t)
            scheduler.step_epoch(t // 10)
            optimiser.step()
        assert loss.item() < 1e-6 * first


class TestGroups:
    def test_ways_to_name(self):
        model = nn.Linear(3, 2)
        pairs = list(model.named_parameters())
        for given_ in (model.named_parameters(), pairs, [{"params": pairs}], [{"named_params": iter(pairs)}]):
            (group,) = ScaledAdam(given_).param_groups
            assert group["names"] == ["weight", "bias"] and [p.shape for p in group["params"]] == [(2, 3), (2,)] and "named_params" not in group
        (group,) = ScaledAdam(model.parameters()).param_groups
        assert "names" not in group and len(group["params"]) == 2
        (group,) = ScaledAdam([{"params": model.weight}]).param_groups
        assert group["params"] == [model.weight]

    def test_the_callers_dictionaries_stay_as_they_are(self):
        given_ = {"named_params": [("w", nn.Parameter(torch.ones(2)))], "lr": 0.1}
        ScaledAdam([given_])
        assert set(given_) == {"named_params", "lr"}

    def test_refused(self):
        a, b = parameters((2,), (3,))
        with pytest.raises(ValueError, match="both 'params' and 'named_params'"):
            ScaledAdam([{"params": [a], "named_params": [("a", a)]}])
        with pytest.raises(ValueError, match="some parameters of a group come with a name and some without"):
            ScaledAdam([("a", a), b])
        with pytest.raises(ValueError, match="more than one parameter group"):
            ScaledAdam([{"params": [a]}, {"params": [a]}])

    @pytest.mark.parametrize("kind", BOTH)
    @pytest.mark.parametrize(
        "settings_, message",
        [
            (dict(lr=-0.1), "lr must be 0 or more, got -0.1"), (dict(lr=math.nan), "lr must be 0 or more, got nan"), (dict(betas=(0.9, 1.0)), r"betas must be two numbers from 0 to below 1"),
            (dict(betas=(-0.1, 0.9)), "betas"), (dict(eps=0.0), "eps must be above 0"), (dict(scalar_lr_scale=-1.0), "scalar_lr_scale must be 0 or more"),
            (dict(scalar_max=0.0), "scalar_max must be above 0"), (dict(param_min_rms=0.0), "param_min_rms and param_max_rms"), (dict(param_min_rms=4.0), r"the first not above the second, got \(4.0, 3.0\)"),
            (dict(clipping_scale=0.0), "clipping_scale must be above 0, or None"), (dict(clipping_scale=-1.0), "clipping_scale"), (dict(size_update_period=0), "size_update_period must be 1 or more"),
            (dict(clipping_update_period=0), "clipping_update_period must be 1 or more"),
        ],
    )
    def test_settings_out_of_range(self, kind, settings_, message):
        params = parameters((2,), (3,))
        with pytest.raises(ValueError, match=message):
            kind(params, **settings_)
        with pytest.raises(ValueError, match=message):  # for one group
            kind([{"params": [params[0]]}, {"params": [params[1]], **settings_}])

    def test_nested_rates(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)), nn.BatchNorm1d(2))
        model[1].lr_scale = 0.5
        model[1][0].lr_scale = 0.25
        model[2].lr_scale = 0.5
        groups = parameter_groups(model, 0.04)
        assert {group["lr"]: [name for name, _ in group["named_params"]] for group in groups} == {
            0.04: ["0.weight", "0.bias"], 0.04 * 0.125: ["1.0.weight", "1.0.bias"], 0.04 * 0.5: ["1.1.weight", "2.weight", "2.bias"],
        }
        model.lr_scale = 2
        assert sorted(group["lr"] for group in parameter_groups(model, 0.04)) == pytest.approx([0.01, 0.04, 0.08])
        optimiser = ScaledAdam(groups)
        assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([0.04, 0.005, 0.02]) and optimiser.param_groups[2]["names"] == ["1.1.weight", "2.weight", "2.bias"]

    def test_every_parameter_once(self):
        """Shared weights, a shared module, and parameters of the model itself."""
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.offset = nn.Parameter(torch.zeros(2))
                self.embedding, self.out = nn.Embedding(3, 2), nn.Linear(2, 3)
                self.out.weight = self.embedding.weight
                self.again = self.out
                self.out.lr_scale = 0.5

        model = Model()
        groups = parameter_groups(model, 1.0)
        assert {group["lr"]: [name for name, _ in group["named_params"]] for group in groups} == {1.0: ["offset", "embedding.weight"], 0.5: ["out.bias"]}
        ScaledAdam(groups)

    def test_one_parameter_alone(self):
        weight = nn.ParameterList([nn.Parameter(torch.ones(2))])
        assert parameter_groups(weight, 0.1) == [{"named_params": [("0", weight[0])], "lr": 0.1}] and parameter_groups(nn.Identity(), 0.1) == []

    @pytest.mark.parametrize("wrong", [-1.0, math.nan, "0.5", None, torch.tensor(0.5)])
    def test_wrong_scales(self, wrong):
        model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
        model[0][0].lr_scale = wrong
        with pytest.raises(ValueError, match="lr_scale of 0.0 must be a number, 0 or more, got"):
            parameter_groups(model, 0.1)
        model = nn.Linear(2, 2)
        model.lr_scale = wrong
        with pytest.raises(ValueError, match="lr_scale of the model must"):
            parameter_groups(model, 0.1)

    def test_a_scale_of_zero_freezes(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[0].lr_scale = 0
        before, optimiser = copy.deepcopy(model.state_dict()), ScaledAdam(parameter_groups(model, 0.1))
        for _ in range(5):
            model(torch.ones(1, 2)).square().sum().backward()
            optimiser.step()
        assert torch.equal(model[0].weight, before["0.weight"]) and not torch.equal(model[1].weight, before["1.weight"])


def eden_by_hand(b, e, B, E, warm_batches, warm_start):
    fall = (1 + b * b / B**2) ** -0.25 / math.sqrt(math.sqrt(1 + e * e / E**2))
    return fall if b >= warm_batches else fall * (warm_start * (1 - b / warm_batches) + b / warm_batches)


class TestSchedules:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 10**6), st.integers(1, 2000), st.integers(1, 10**5))
    def test_noam(self, step, d_model, warmup):
        expected = step / warmup**1.5 if step < warmup else 1 / math.sqrt(step)
        assert noam_factor(step, d_model, warmup) == pytest.approx(expected / math.sqrt(d_model))
        assert noam_factor(step, d_model, warmup) <= noam_factor(warmup, d_model, warmup) * (1 + 1e-12)

    @pytest.mark.parametrize("arguments", [(0, 512, 4000), (1, 0, 4000), (1, 512, 0)])
    def test_noam_refused(self, arguments):
        with pytest.raises(ValueError, match="must be 1 or more, got"):
            noam_factor(*arguments)

    @settings(max_examples=80, deadline=None)
    @given(st.integers(0, 10**6), st.floats(0, 100), st.floats(1, 10**5), st.floats(0.1, 50), st.integers(0, 3000), st.floats(0, 1))
    def test_eden(self, batch, epoch, lr_batches, lr_epochs, warmup_batches, warmup_start):
        by_hand = eden_by_hand(batch, epoch, lr_batches, lr_epochs, warmup_batches, warmup_start)
        settings_ = dict(lr_batches=lr_batches, warmup_batches=warmup_batches, warmup_start=warmup_start)
        assert eden_factor(batch, epoch, lr_epochs=lr_epochs, **settings_) == pytest.approx(by_hand)
        warm = 1.0 if batch >= warmup_batches else warmup_start + (1 - warmup_start) * batch / warmup_batches
        assert eden2_factor(batch, **settings_) == pytest.approx(warm / math.hypot(1, batch / lr_batches))
        optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        scheduler = Eden(optimiser, lr_epochs=lr_epochs, **settings_)
        scheduler.step_epoch(epoch)
        scheduler.step_batch(batch)
        assert scheduler.get_last_lr() == pytest.approx([0.3 * by_hand])

    def test_all_groups_keep_their_highest_rate(self):
        weights = parameters((2,), (2,), (2,))
        optimiser = ScaledAdam([{"params": [weights[0]], "lr": 0.04}, {"params": [weights[1]], "lr": 0.01}])
        scheduler = Eden(optimiser, 100, 2, warmup_batches=10, warmup_start=0.1)
        assert scheduler.get_last_lr() == pytest.approx([0.004, 0.001])
        for _ in range(50):
            scheduler.step_batch()
        scheduler.step_epoch()
        factor = eden_by_hand(50, 1, 100, 2, 10, 0.1)
        assert [group["lr"] for group in optimiser.param_groups] == pytest.approx([0.04 * factor, 0.01 * factor]) and [group["base_lr"] for group in optimiser.param_groups] == [0.04, 0.01]
        optimiser.add_param_group({"params": [weights[2]], "lr": 0.5})
        scheduler.step_batch(50)
        assert scheduler.get_last_lr() == pytest.approx([0.04 * factor, 0.01 * factor, 0.5 * factor])
        again = Eden(optimiser, 100, 2, warmup_batches=0)  # a second one starts from the highest rates
        assert again.get_last_lr() == [0.04, 0.01, 0.5]

    @pytest.mark.parametrize("kind", [lambda o: Eden(o, 100, 2, warmup_batches=10), lambda o: Eden2(o, 100, warmup_batches=10)])
    def test_saving_and_loading(self, kind):
        schedulers = [kind(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)) for _ in range(2)]
        schedulers[0].step_epoch(3)
        for _ in range(70):
            schedulers[0].step_batch()
        state = schedulers[0].state_dict()
        assert state == {"epoch": 3, "batch": 70}
        schedulers[1].load_state_dict(state)
        assert schedulers[1].get_last_lr() == schedulers[0].get_last_lr() != [0.3]
        for scheduler in schedulers:
            scheduler.step_batch()
        assert schedulers[1].get_last_lr() == schedulers[0].get_last_lr() and schedulers[1].batch == 71

    def test_eden2_knows_no_epochs(self):
        scheduler = Eden2(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3), 100, warmup_batches=0)
        scheduler.step_batch(100)
        before = scheduler.get_last_lr()
        scheduler.step_epoch(30)
        assert scheduler.get_last_lr() == before == pytest.approx([0.3 / math.sqrt(2)])

    @pytest.mark.parametrize(
        "settings_, message",
        [
            (dict(lr_batches=0), "lr_batches must be above 0, got 0"), (dict(lr_epochs=-1), "lr_epochs must be above 0, got -1"), (dict(warmup_batches=-1), "warmup_batches must be 0 or more, got -1"),
            (dict(warmup_start=1.5), "warmup_start must be from 0 to 1, got 1.5"), (dict(warmup_start=-0.5), "warmup_start must be from 0 to 1"), (dict(lr_batches=math.nan), "lr_batches must be above 0"),
        ],
    )
    def test_refused(self, settings_, message):
        optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
        with pytest.raises(ValueError, match=message):
            Eden(optimiser, **{"lr_batches": 100, "lr_epochs": 2, **settings_})
        if "lr_epochs" not in settings_:
            with pytest.raises(ValueError, match=message):
                Eden2(optimiser, **{"lr_batches": 100, **settings_})
        assert "base_lr" not in optimiser.param_groups[0]
