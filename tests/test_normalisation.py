"""Norms: formulas, hand-written gradients, what is kept for the backward, the limiter, 16 bits."""
import copy
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from speechlearn.zipformer.normalisation import BasicNorm, BiasNorm, _BiasNorm, basic_norm, bias_norm, limit_param_value, rms_norm
from zipformer_tools import randn

HALVES = [torch.float16, torch.bfloat16]


def draws(monkeypatch, value):
    """Every decision draws this; the list that comes back counts them."""
    count = []
    monkeypatch.setattr(random, "random", lambda: count.append(value) or value)
    return count


def kept(function):
    """Numbers of elements that autograd keeps, shared memory counted once."""
    found = {}

    def note(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function()
    del result
    return sorted(found.values())


class TestFormulas:
    def test_by_hand(self):
        """(3, 4) has the RMS √12.5; less (1, 0) it is (2, 4), RMS √10."""
        x = torch.tensor([3.0, 4.0], dtype=torch.float64)
        assert rms_norm(x).tolist() == pytest.approx([3 / math.sqrt(12.5), 4 / math.sqrt(12.5)])
        eps = torch.tensor(0.25, dtype=torch.float64).log()
        assert basic_norm(x, eps).tolist() == pytest.approx([3 / math.sqrt(12.75), 4 / math.sqrt(12.75)])
        bias, log_scale = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64).log()
        assert bias_norm(x, bias, log_scale).tolist() == pytest.approx([6 / math.sqrt(10), 8 / math.sqrt(10)])

    @pytest.mark.parametrize("rms, expected", [(0.01, 0.020), (0.5, 0.71), (1.0, 0.89), (10.0, 0.999)])
    def test_basic_norm_of_lengths(self, rms, expected):
        """The table of the specification."""
        y = BasicNorm(100).eval()(torch.full((1, 100), rms))
        assert y.square().mean().sqrt().item() == pytest.approx(expected, rel=0.01)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data(), st.integers(0, 10**6), st.floats(-2, 2), st.floats(0.1, 10))
    def test_equal_plain_expressions(self, shape, data, seed, log_scale, scale):
        dim = data.draw(st.integers(-len(shape), len(shape) - 1))
        x = randn(*shape, seed=seed, scale=scale)
        channels = shape[dim]
        bias = randn(channels, seed=seed + 1)
        moved = x.movedim(dim, -1)
        number = torch.tensor(log_scale, dtype=torch.float64)
        rms = lambda v: torch.linalg.vector_norm(v, dim=-1, keepdim=True) / math.sqrt(channels)  # noqa: E731
        torch.testing.assert_close(rms_norm(moved), torch.nn.functional.rms_norm(moved, (channels,), eps=0.0))
        torch.testing.assert_close(basic_norm(x, number, dim=dim).movedim(dim, -1), moved / (rms(moved) ** 2 + math.exp(log_scale)).sqrt())
        ones = [1] * (len(shape) - 1 - dim % len(shape))
        torch.testing.assert_close(bias_norm(x, bias.view(-1, *ones), number, dim=dim).movedim(dim, -1), moved / rms(moved - bias) * math.exp(log_scale))

    def test_identities(self):
        x = randn(4, 6)
        zero, bias = torch.zeros((), dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
        torch.testing.assert_close(bias_norm(x, bias, zero), rms_norm(x))
        torch.testing.assert_close(basic_norm(x, torch.tensor(-80.0, dtype=torch.float64)), rms_norm(x))
        torch.testing.assert_close(rms_norm(7 * x), rms_norm(x))  # the length is forgotten
        torch.testing.assert_close(rms_norm(x - x.mean(dim=-1, keepdim=True)), nn.LayerNorm(6, eps=0.0, elementwise_affine=False)(x))
        large = torch.full((6,), 1e6, dtype=torch.float64)
        torch.testing.assert_close(bias_norm(2 * x, large, zero), 2 * bias_norm(x, large, zero), rtol=1e-4, atol=0)  # a large bias keeps the length


def module_and_input(channel_dim, store, seed=0, dtype=torch.float64):
    """A norm over an axis of 5 channels with a bias that matters, and an input of (4, 5, 5)."""
    norm = BiasNorm(5, channel_dim=channel_dim, log_scale=0.3, store_output_for_backprop=store).to(dtype)
    with torch.no_grad():
        norm.bias.copy_(randn(5, seed=seed + 9))
    return norm, randn(4, 5, 5, seed=seed, dtype=dtype).requires_grad_()


class TestBiasNorm:
    @pytest.mark.parametrize("store", [False, True])
    @pytest.mark.parametrize("dim, shape", [(2, (5,)), (1, (5, 1)), (0, (5, 1, 1))])
    def test_gradcheck(self, store, dim, shape):
        x = randn(5, 5, 5).requires_grad_()
        bias, log_scale = randn(*shape, seed=1).requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda *a: _BiasNorm.apply(*a, dim, store), (x, bias, log_scale))

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data(), st.booleans(), st.floats(-1.4, 1.4), st.integers(0, 10**6))
    def test_equals_autograd(self, shape, data, store, log_scale, seed):
        dim = data.draw(st.integers(-len(shape), len(shape) - 1))
        norm = BiasNorm(shape[dim], channel_dim=dim, log_scale=log_scale, store_output_for_backprop=store).double()
        with torch.no_grad():
            norm.bias.copy_(randn(shape[dim], seed=seed + 1))
        x, g = randn(*shape, seed=seed, scale=3).requires_grad_(), randn(*shape, seed=seed + 2)
        leaves = [x, norm.bias, norm.log_scale]
        theirs = bias_norm(x, norm.bias.view(-1, *[1] * (len(shape) - 1 - dim % len(shape))), norm.log_scale, dim=dim)
        ours = norm(x)
        torch.testing.assert_close(ours, theirs)
        for a, b in zip(torch.autograd.grad(ours, leaves, g), torch.autograd.grad(theirs, leaves, g)):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("store", [False, True])
    def test_only_what_is_wanted(self, store):
        norm, x = module_and_input(-1, store)
        norm.bias.requires_grad_(False)
        norm(x).square().sum().backward()
        assert norm.bias.grad is None and x.grad is not None and norm.log_scale.grad is not None
        norm, x = module_and_input(-1, store)
        norm(x.detach()).sum().backward()
        assert norm.bias.grad is not None

    @pytest.mark.parametrize("store", [False, True])
    def test_keeps_one_of_input_and_output(self, store):
        norm = BiasNorm(16, store_output_for_backprop=store)
        x = randn(20, 16, dtype=torch.float32).requires_grad_()
        # The input or the output, a scale for each frame, bias and log_scale; its limiter keeps the latter, too, when it acts.
        assert kept(lambda: norm(x * 1)) == [1, 16, 20, 320]
        found = []

        def note(tensor):
            found.append(tensor)
            return tensor

        before = x * 1
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = norm(before)
        big = next(t for t in found if t.numel() == 320)
        assert big.data_ptr() == (y if store else before).data_ptr()

    def test_nothing_is_kept_without_gradient(self):
        norm, x = BiasNorm(4), randn(3, 4, dtype=torch.float32).requires_grad_()
        with torch.no_grad():
            assert kept(lambda: norm(x)) == []

    @pytest.mark.parametrize("store", [False, True])
    def test_modes_give_the_same_values(self, store, monkeypatch):
        norm, x = module_and_input(1, store)
        count = draws(monkeypatch, 0.0)
        training = norm(x)
        assert len(count) == 1
        evaluation = norm.eval()(x)
        with torch.no_grad():
            without = norm(x)
        norm.train()
        with torch.no_grad():
            trained_without = norm(x)
        assert len(count) == 1, "drew in evaluation or without gradient"
        torch.testing.assert_close(training, evaluation)
        torch.testing.assert_close(evaluation, without)
        torch.testing.assert_close(evaluation, trained_without)

    def test_frames_do_not_touch_each_other(self):
        norm, x = BiasNorm(6), randn(5, 6, dtype=torch.float32)
        other = x.clone()
        other[3:] *= 100
        assert torch.equal(norm(x)[:3], norm(other)[:3])

    def test_zeros_are_harmless(self):
        """Padding: the small random bias keeps the length from zero, and the result is zero."""
        norm = BiasNorm(32)
        x = torch.zeros(3, 32, requires_grad=True)
        y = norm(x)
        y.sum().backward()
        assert y.abs().max() == 0 and x.grad.isfinite().all() and norm.bias.grad.isfinite().all()

    def test_log_scale_comes_back_into_its_range(self, monkeypatch):
        """A loss that wants an ever larger output: with the limiter the value returns to 1.5 from above, without it leaves."""

        def descend(prob):
            draws(monkeypatch, prob)
            norm = BiasNorm(4, log_scale=1.8)
            optimiser = torch.optim.SGD(norm.parameters(), lr=0.002)
            for _ in range(50):
                optimiser.zero_grad()
                x = randn(8, 4, dtype=torch.float32)
                (-norm(x) * x.sign()).mean().backward()
                optimiser.step()
            return norm.log_scale.item()

        assert descend(0.0) < 1.8 < descend(0.99)

    @pytest.mark.parametrize("value, drawn, turned", [(1.6, 0.59, True), (1.6, 0.6, False), (1.4, 0.0, False), (-1.6, 0.0, False)])
    def test_limiter_of_log_scale(self, monkeypatch, value, drawn, turned):
        """With probability 0.6, outside [−1.5, 1.5], and only where descent would lead further out (here: upwards)."""
        norm = BiasNorm(4, log_scale=value)
        x = randn(3, 4, dtype=torch.float32)
        draws(monkeypatch, drawn)
        y = norm(x)
        (-(y * x)).sum().backward()  # descent wants a larger scale
        assert (norm.log_scale.grad > 0) == turned
        assert norm.log_scale.grad.abs().item() == pytest.approx((y * x).sum().item(), rel=1e-5)

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("store", [False, True])
    @pytest.mark.parametrize("gradients", [True, False])
    @pytest.mark.parametrize("narrow", [True, False])
    def test_sixteen_bits(self, dtype, store, gradients, narrow):
        """Squares of 16 bits would overflow from 256 on, with float16."""
        norm = BiasNorm(8, log_scale=0.5, store_output_for_backprop=store)
        norm = norm.to(dtype) if narrow else norm
        x = (1e4 * randn(4, 8)).to(dtype)
        with torch.set_grad_enabled(gradients):
            y = norm(x)
        wide = copy.deepcopy(norm).double()
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), wide(x.double()), rtol=4 * torch.finfo(dtype).eps, atol=1e-3)

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("store", [False, True])
    def test_gradients_of_sixteen_bits(self, dtype, store):
        norm = BiasNorm(8, log_scale=0.5, store_output_for_backprop=store)
        with torch.no_grad():
            norm.bias.copy_(randn(8, seed=2))
        x = (3 * randn(4, 8)).to(dtype).requires_grad_()
        g = randn(4, 8, seed=1).to(dtype)
        norm(x).backward(g)
        wide, exact_x = copy.deepcopy(norm).double(), x.detach().double().requires_grad_()
        wide.zero_grad(set_to_none=True)
        wide(exact_x).backward(g.double())
        assert x.grad.dtype == dtype and norm.bias.grad.dtype == torch.float32
        for ours, exact in ((x.grad, exact_x.grad), (norm.bias.grad, wide.bias.grad), (norm.log_scale.grad, wide.log_scale.grad)):
            assert (ours.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max().clamp(min=1)

    def test_names_and_strict_loading(self):
        norm = BiasNorm(7)
        assert {k: tuple(v.shape) for k, v in norm.state_dict().items()} == {"log_scale": (), "bias": (7,)}
        assert norm.log_scale.item() == 1.0 and 0 < norm.bias.abs().max() < 1e-3
        other = BiasNorm(7)
        other.load_state_dict({"log_scale": torch.tensor(0.2), "bias": torch.ones(7)}, strict=True)
        twin = copy.deepcopy(other)
        x = randn(2, 7, dtype=torch.float32)
        assert torch.equal(twin(x), other(x)) and not torch.equal(norm(x), other(x))
        with torch.no_grad():
            twin.bias.zero_()
        assert other.bias.sum() == 7
        with pytest.raises(RuntimeError, match="size mismatch for bias"):
            other.load_state_dict(BiasNorm(6).state_dict(), strict=True)

    def test_tracing(self, monkeypatch):
        norm, x = BiasNorm(5), randn(2, 5, dtype=torch.float32)
        expected = norm.eval()(x)
        count = draws(monkeypatch, 0.0)
        monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
        torch.testing.assert_close(norm.train()(x), expected)
        assert not count

    @pytest.mark.parametrize("make", [BiasNorm, BasicNorm])
    def test_wrong_number_of_channels(self, make):
        with pytest.raises(ValueError, match="has 5 channels on axis -1; this norm was made for 4"):
            make(4)(torch.zeros(2, 4, 5))
        make(4, channel_dim=1)(torch.zeros(2, 4, 5))
        with pytest.raises(ValueError, match="has 5 channels on axis 2"):
            make(4, channel_dim=2)(torch.zeros(2, 4, 5))


class TestBasicNorm:
    @pytest.mark.parametrize("dim", [0, 1, -1])
    def test_gradcheck(self, dim):
        eps = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, e: basic_norm(x, e, dim=dim), (randn(3, 4, 2).requires_grad_(), eps))

    @pytest.mark.parametrize("mode", [True, False])
    @pytest.mark.parametrize("drawn, clamped", [(0.24, True), (0.25, False), (0.9, False)])
    def test_clamped_in_one_step_of_four(self, monkeypatch, mode, drawn, clamped):
        norm, x = BasicNorm(4, eps=math.exp(5.0)).train(mode), randn(3, 4, dtype=torch.float32)
        count = draws(monkeypatch, drawn)
        y = norm(x)
        y.sum().backward()
        assert len(count) == (1 if mode else 0)
        acts = clamped and mode
        torch.testing.assert_close(y, basic_norm(x, torch.tensor(3.0 if acts else 5.0)))
        assert (norm.eps.grad == 0) == acts  # outside the range the clamp has no slope

    def test_inside_the_range_nothing_is_clamped(self, monkeypatch):
        norm, x = BasicNorm(4), randn(3, 4, dtype=torch.float32)
        draws(monkeypatch, 0.0)
        acted = norm(x)
        assert torch.equal(acted, norm.eval()(x))

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("narrow", [True, False])
    def test_sixteen_bits(self, dtype, narrow):
        norm = BasicNorm(8).to(dtype) if narrow else BasicNorm(8)
        x = (1e4 * randn(4, 8)).to(dtype).requires_grad_()
        y = norm(x)
        y.sum().backward()
        assert y.dtype == dtype and x.grad.isfinite().all()
        torch.testing.assert_close(y.double(), copy.deepcopy(norm).double()(x.double()), rtol=4 * torch.finfo(dtype).eps, atol=1e-3)

    def test_names(self):
        assert {k: tuple(v.shape) for k, v in BasicNorm(7).state_dict().items()} == {"eps": ()}
        assert BasicNorm(7).eps.item() == pytest.approx(math.log(0.25))
        fixed = BasicNorm(7, learn_eps=False)
        assert list(fixed.state_dict()) == ["eps"] and not list(fixed.parameters())
        fixed.load_state_dict(BasicNorm(7, eps=0.5).state_dict(), strict=True)
        assert copy.deepcopy(fixed).eps.item() == pytest.approx(math.log(0.5))


class TestLimitParamValue:
    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=8), st.floats(-2, 0, width=32), st.floats(0, 2, width=32), st.integers(0, 10**6))
    def test_the_rule(self, values, low, high, seed):
        x = torch.tensor(values, requires_grad=True)
        g = randn(len(values), seed=seed, dtype=torch.float32)
        y = limit_param_value(x, low, high, prob=1.0)
        assert torch.equal(y, x)
        (got,) = torch.autograd.grad(y, x, g)
        for value, before, after in zip(x.tolist(), g.tolist(), got.tolist()):
            assert abs(after) == abs(before)
            if value < low:
                assert after <= 0  # descent moves it up
            elif value > high:
                assert after >= 0  # descent moves it down
            else:
                assert after == before

    def test_one_step_of_descent_leads_back(self):
        x = torch.tensor([-2.0, -2.0, 2.0, 2.0], requires_grad=True)
        g = torch.tensor([1.0, -1.0, 1.0, -1.0])
        limit_param_value(x, -1.0, 1.0, prob=1.0).backward(g)
        assert (x - 0.1 * x.grad).abs().lt(2.0).all()

    @pytest.mark.parametrize("prob, training, expected", [(0.6, True, 0.6), (0.0, True, 0.0), (1.0, True, 1.0), (1.0, False, 0.0)])
    def test_how_often(self, prob, training, expected):
        random.seed(0)
        x = torch.tensor(5.0, requires_grad=True)
        turned = 0
        for _ in range(1000):
            (g,) = torch.autograd.grad(limit_param_value(x, -1.0, 1.0, prob=prob, training=training), x, torch.tensor(-1.0))
            turned += g.item() > 0
        assert turned / 1000 == pytest.approx(expected, abs=4.5 * math.sqrt(expected * (1 - expected) / 1000))

    def test_no_draw_outside_training(self, monkeypatch):
        count = draws(monkeypatch, 0.0)
        x = torch.tensor(5.0, requires_grad=True)
        assert limit_param_value(x, -1.0, 1.0, training=False) is x and not count
