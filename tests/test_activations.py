"""Activations: formulas, slopes, the backward of one byte, the fused linear layer, 16 bits, and what is kept for the backward."""
import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from speechlearn.zipformer.activations import (
    ActivationDropoutAndLinear, DoubleSwish, SwooshL, SwooshR, _ActivationDropoutAndLinear, double_swish, double_swish_slope, quantised, restored, swish, swoosh_l, swoosh_l_slope,
    swoosh_r, swoosh_r_slope,
)
from speechlearn.zipformer.scaling import ScheduledFloat
from zipformer_tools import randn

# Module, function, slope from (x, y), range of the byte.
KINDS = {
    "SwooshL": (SwooshL, swoosh_l, swoosh_l_slope, (-0.08, 0.925)),
    "SwooshR": (SwooshR, swoosh_r, swoosh_r_slope, (-0.08, 0.925)),
    "DoubleSwish": (DoubleSwish, double_swish, double_swish_slope, (-0.043637, 1.2)),
}
HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def kept(function):
    """Type and number of elements of each tensor that autograd keeps, shared memory counted once."""
    found = {}

    def note(tensor):
        found[tensor.untyped_storage().data_ptr()] = (tensor.dtype, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function()
    del result
    return sorted(found.values(), key=str)


class TestFormulas:
    @pytest.mark.parametrize(
        "function, x, expected",
        [
            (swoosh_l, 0.0, math.log1p(math.exp(-4)) - 0.035), (swoosh_l, 4.0, math.log(2) - 0.355), (swoosh_r, 0.0, math.log1p(math.exp(-1)) - 0.313261687),
            (swoosh_r, 1.0, math.log(2) - 0.393261687), (double_swish, 1.0, 0.5), (double_swish, 0.0, 0.0), (swish, 0.0, 0.0),
        ],
    )
    def test_by_hand(self, function, x, expected):
        assert function(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(expected, abs=1e-12)

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.integers(0, 5), max_size=4), st.integers(0, 10**6), st.floats(0.1, 30))
    def test_equal_torch(self, shape, seed, scale):
        x = randn(*shape, seed=seed, scale=scale)
        torch.testing.assert_close(swish(x), F.silu(x))
        torch.testing.assert_close(double_swish(x), x * torch.sigmoid(x - 1))
        torch.testing.assert_close(swoosh_l(x), F.softplus(x - 4, threshold=700) - 0.08 * x - 0.035)
        torch.testing.assert_close(swoosh_r(x), F.softplus(x - 1, threshold=700) - 0.08 * x - 0.313261687)

    @pytest.mark.parametrize("function", [swoosh_l, swoosh_r, double_swish])
    def test_gradcheck(self, function):
        x = randn(3, 7, scale=4).requires_grad_()
        assert torch.autograd.gradcheck(function, x)

    def test_slopes(self, kind):
        _, function, slope, (floor, ceil) = kind
        x = torch.linspace(-60, 60, 2401, dtype=torch.float64, requires_grad=True)
        y = function(x)
        (truth,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(slope(x, y).detach(), truth, atol=1e-12, rtol=0)
        assert floor - 1e-6 < truth.min() and truth.max() < ceil  # what a byte must be able to say

    def test_ends_of_the_slopes(self):
        far = torch.tensor([-1e30, 1e30])
        assert swoosh_l_slope(far).tolist() == swoosh_r_slope(far).tolist() == pytest.approx([-0.08, 0.92], abs=1e-7)
        assert double_swish_slope(far, double_swish(far)).tolist() == [0.0, 1.0]

    def test_double_swish_extremes(self):
        """Minimum and extreme slopes as the specification states them."""
        x = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
        y = double_swish(x)
        slope = double_swish_slope(x, y)
        assert y.min().item() == pytest.approx(-0.1200, abs=5e-5) and x[y.argmin()].item() == pytest.approx(-1.12, abs=1e-3)
        assert slope.max().item() == pytest.approx(1.198992, abs=1e-6) and slope.min().item() == pytest.approx(-0.0436375, abs=1e-7)
        assert (y - swish(swish(x))).abs().max().item() == pytest.approx(0.061, abs=5e-4)


class TestLargeNumbers:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("dtype, largest", [(torch.float16, 6e4), (torch.bfloat16, 1e38), (torch.float32, 1e38), (torch.float64, 1e300)])
    def test_finite_everywhere(self, kind, training, dtype, largest):
        make, function, slope, (floor, ceil) = kind
        x = torch.tensor([-largest, -1000.0, -100.0, -5.0, 0.0, 5.0, 95.0, 100.0, 1000.0, largest], dtype=dtype, requires_grad=True)
        y = make().train(training)(x)
        y.sum().backward()
        assert y.dtype == x.grad.dtype == dtype and y.isfinite().all() and x.grad.isfinite().all()
        wide = x.detach().double()
        exact = function(wide)
        # One rounding to the narrow type, and that of the computation.
        torch.testing.assert_close(y.detach().double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-3 if dtype in HALVES else 1e-6)
        level = (ceil - floor) / 255 if training else 0
        assert ((x.grad.double() - slope(wide, exact)).abs() <= level * 1.001 + 0.01 * (dtype in HALVES) + 1e-6).all()

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("function", [swoosh_l, swoosh_r])
    def test_sixteen_bits_are_computed_in_thirty_two(self, function, dtype):
        x = randn(1000, seed=1, scale=5).to(dtype)
        assert torch.equal(function(x), function(x.float()).to(dtype))


class TestOneByte:
    @settings(max_examples=60, deadline=None)
    @given(st.floats(-3, 3), st.floats(0.01, 4), st.integers(0, 10**6))
    def test_levels(self, floor, width, seed):
        ceil = floor + width
        values = floor + width * 254 / 255 * torch.rand(200, generator=generator(seed), dtype=torch.float64)  # room for the noise, as the activations have it
        noise = torch.rand(200, generator=generator(seed + 1), dtype=torch.float64)
        codes = quantised(values, floor, ceil, noise)
        back = restored(codes, floor, ceil, dtype=torch.float64)
        assert codes.dtype == torch.uint8
        assert (back - values).abs().max() < width / 255 * (1 + 1e-9)
        # Without noise it rounds down; with nearly 1 it rounds up.
        assert (restored(quantised(values, floor, ceil, torch.zeros_like(values)), floor, ceil, dtype=torch.float64) <= values + 1e-9).all()
        assert (restored(quantised(values, floor, ceil, torch.full_like(values, 1 - 1e-9)), floor, ceil, dtype=torch.float64) >= values - 1e-6).all()

    def test_levels_of_the_ends(self):
        ends = torch.tensor([-0.08, 0.925])
        assert quantised(ends, -0.08, 0.925, torch.zeros(2)).tolist() == [0, 255]
        assert restored(torch.tensor([0, 255], dtype=torch.uint8), -0.08, 0.925).tolist() == pytest.approx([-0.08, 0.925], abs=1e-6)

    def test_below_the_floor_by_a_rounding_error(self):
        """The least slope of DoubleSwish lies 5e-7 below the floor: level 0, and not 255."""
        values = torch.full((100,), -0.0436375)
        assert quantised(values, -0.043637, 1.2, torch.zeros(100)).unique().tolist() == [0]

    def test_the_mean_is_exact(self, kind):
        """For noise on a regular grid, the mean of the restored slopes is the slope, up to the grid."""
        _, function, slope, (floor, ceil) = kind
        x = torch.linspace(-10, 10, 101, dtype=torch.float64)
        truth = slope(x, function(x))
        n = 4096
        noise = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None].expand(n, len(x))
        means = restored(quantised(truth.expand(n, -1), floor, ceil, noise), floor, ceil, dtype=torch.float64).mean(dim=0)
        assert (means - truth).abs().max() <= (ceil - floor) / 255 / n + 6e-7  # DoubleSwish: 5e-7 below the floor

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_modules_gradient_is_unbiased(self, kind, dtype):
        """The mean over many draws, against its own standard error."""
        make, function, slope, (floor, ceil) = kind
        torch.manual_seed(0)
        n = 20_000
        x = torch.tensor([-7.0, -2.17, -0.3, 0.0, 0.9, 2.8, 4.0, 9.0], dtype=dtype)
        many = x.expand(n, -1).clone().requires_grad_()
        make()(many).sum().backward()
        truth = slope(x, function(x))
        level = (ceil - floor) / 255
        assert (many.grad - truth).abs().max() < level * 1.001
        assert (many.grad.mean(dim=0) - truth).abs().max() < 4.5 * level / 2 / math.sqrt(n) + 6e-7  # the standard deviation of a level is at most half of it
        share = ((truth - floor) / level) % 1
        hits = (many.grad > truth).to(torch.float64).mean(dim=0)
        assert (hits - share).abs().max() < 0.02  # how often it is rounded up

    def test_noise_is_torchs(self, kind):
        x = randn(50, dtype=torch.float32)

        def gradient(seed):
            torch.manual_seed(seed)
            leaf = x.clone().requires_grad_()
            kind[0]()(leaf).sum().backward()
            return leaf.grad

        assert torch.equal(gradient(3), gradient(3)) and not torch.equal(gradient(3), gradient(4))

    def test_gradient_is_multiplied(self, kind):
        make, _, _, (floor, ceil) = kind
        x, g = randn(4, 25, dtype=torch.float32).requires_grad_(), randn(4, 25, seed=1, dtype=torch.float32)
        torch.manual_seed(0)
        (unit,) = torch.autograd.grad(make()(x).sum(), x)
        torch.manual_seed(0)
        (scaled,) = torch.autograd.grad(make()(x), x, g)
        torch.testing.assert_close(scaled, unit * g)
        codes = (unit - floor) * 255 / (ceil - floor)
        torch.testing.assert_close(codes, codes.round(), atol=2e-4, rtol=0)  # really one of 256 levels


class TestWhatIsKept:
    def test_one_byte_for_each_number(self, kind):
        x = randn(30, 40, dtype=torch.float32).requires_grad_()
        assert kept(lambda: kind[0]()(x)) == [(torch.uint8, 1200)]

    @pytest.mark.parametrize("dtype", HALVES + [torch.float64])
    def test_one_byte_for_other_types(self, kind, dtype):
        x = randn(30, 40).to(dtype).requires_grad_()
        assert kept(lambda: kind[0]()(x)) == [(torch.uint8, 1200)]

    def test_nothing_where_no_gradient_is_wanted(self, kind):
        x = randn(30, dtype=torch.float32)
        leaf = x.clone().requires_grad_()
        assert kept(lambda: kind[0]()(x)) == []
        with torch.no_grad():
            assert kept(lambda: kind[0]()(leaf)) == []
        with torch.inference_mode():
            assert kept(lambda: kind[0]()(x)) == []

    def test_fused_keeps_input_weight_and_mask(self):
        layer = ActivationDropoutAndLinear(12, 5, dropout_p=0.5, dropout_shared_dim=0)
        x = randn(7, 3, 12, dtype=torch.float32).requires_grad_()
        assert kept(lambda: layer(x)) == sorted([(torch.float32, 7 * 3 * 12), (torch.float32, 12 * 5), (torch.float32, 3 * 12)], key=str)
        assert kept(lambda: layer.eval()(x)) == sorted([(torch.float32, 7 * 3 * 12), (torch.float32, 12 * 5)], key=str)


class TestModes:
    def test_evaluation_is_the_plain_function(self, kind):
        """Same values; the exact gradient; no random number is drawn."""
        make, function, slope, _ = kind
        x = randn(6, 9, dtype=torch.float32).requires_grad_()
        before = torch.get_rng_state()
        y = make().eval()(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(y, function(x))
        torch.testing.assert_close(gradient, slope(x, y).detach())

    def test_training_gives_the_same_values(self, kind):
        x = randn(6, 9, dtype=torch.float32).requires_grad_()
        module = kind[0]()
        assert torch.equal(module.train()(x), module.eval()(x))

    def test_nothing_is_drawn_without_gradient(self, kind):
        before = torch.get_rng_state()
        kind[0]()(randn(5, dtype=torch.float32))
        assert torch.equal(torch.get_rng_state(), before)

    def test_tracing_takes_the_plain_function(self, kind, monkeypatch):
        x = randn(5, dtype=torch.float32).requires_grad_()
        monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
        before = torch.get_rng_state()
        assert torch.equal(kind[0]()(x), kind[1](x)) and torch.equal(torch.get_rng_state(), before)

    def test_no_parameters(self, kind):
        assert not kind[0]().state_dict()
        copy.deepcopy(kind[0]()).load_state_dict({}, strict=True)

    def test_second_derivative_is_refused(self, kind):
        x = randn(5, dtype=torch.float32).requires_grad_()
        (first,) = torch.autograd.grad(kind[0]()(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()


def plain(layer, x, mask=None):
    """The same in steps, differentiated by autograd."""
    y = (swoosh_l if layer.activation == "SwooshL" else swoosh_r)(x)
    return F.linear(y if mask is None else y * mask, layer.weight, layer.bias)


class TestFusedLinear:
    @pytest.mark.parametrize("activation", ["SwooshL", "SwooshR"])
    @pytest.mark.parametrize("with_mask", [True, False])
    @pytest.mark.parametrize("bias", [True, False])
    def test_gradcheck(self, activation, with_mask, bias):
        x, weight = randn(2, 3, 4, scale=3).requires_grad_(), randn(5, 4, seed=1).requires_grad_()
        b = randn(5, seed=2).requires_grad_() if bias else None
        mask = (torch.rand(2, 1, 4, generator=generator(3)) > 0.3).double() / 0.7 if with_mask else None
        assert torch.autograd.gradcheck(lambda *a: _ActivationDropoutAndLinear.apply(*a, activation, mask), (x, weight, b))

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.integers(1, 4), max_size=3), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.sampled_from(["SwooshL", "SwooshR"]), st.sampled_from([0.0, 0.3, 0.8]),
        st.data(), st.integers(0, 10**6),
    )
    def test_equals_the_steps(self, batch, n_in, n_out, bias, activation, p, data, seed):
        shared = data.draw(st.sampled_from([None, *range(-len(batch) - 1, len(batch) + 1)]))
        layer = ActivationDropoutAndLinear(n_in, n_out, bias=bias, activation=activation, dropout_p=p, dropout_shared_dim=shared).double()
        x = randn(*batch, n_in, seed=seed, scale=3).requires_grad_()
        g = randn(*batch, n_out, seed=seed + 1)
        torch.manual_seed(seed)
        ours = layer(x)
        torch.manual_seed(seed)
        shape = list(x.shape)
        if shared is not None:
            shape[shared] = 1
        mask = (torch.rand(shape) > p).double() / (1 - p) if p else None
        theirs = plain(layer, x, mask)
        torch.testing.assert_close(ours, theirs)
        leaves = [x, *layer.parameters()]
        for a, b in zip(torch.autograd.grad(ours, leaves, g), torch.autograd.grad(theirs, leaves, g)):
            torch.testing.assert_close(a, b)

    def test_only_what_is_wanted(self):
        """Frozen weights, or an input without gradient."""
        layer, x = ActivationDropoutAndLinear(4, 3), randn(2, 4, dtype=torch.float32)
        layer(x).sum().backward()
        assert layer.weight.grad is not None and x.grad is None
        layer.zero_grad(set_to_none=True)
        layer.requires_grad_(False)
        x.requires_grad_()
        layer(x).sum().backward()
        assert x.grad is not None and layer.weight.grad is None and layer.bias.grad is None

    def test_dropout_statistics(self):
        """Inputs of one constant: the sum of the kept ones has the right mean, and whole columns vanish together."""
        torch.manual_seed(0)
        layer = ActivationDropoutAndLinear(2000, 2000, bias=False, dropout_p=0.25, dropout_shared_dim=0)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(2000))
        y = layer(torch.full((6, 2000), 6.0).requires_grad_()) / swoosh_l(torch.tensor(6.0))
        assert torch.equal(y, y[:1].expand_as(y)), "the mask must be shared by all frames"
        assert sorted(v.item() for v in y.detach().unique()) == pytest.approx([0.0, 1 / 0.75])
        assert y.mean().item() == pytest.approx(1.0, abs=4.5 * math.sqrt(0.25 / 0.75 / 2000))

    def test_schedule_as_rate(self):
        rate = ScheduledFloat((0.0, 0.9), (10.0, 0.0))
        layer = ActivationDropoutAndLinear(300, 2, dropout_p=rate, dropout_shared_dim=None)
        x = randn(4, 300, dtype=torch.float32)
        before = torch.get_rng_state()
        torch.testing.assert_close(layer(x), plain(layer, x))  # no step is known: the default, no dropout
        assert torch.equal(torch.get_rng_state(), before)
        rate.batch_count = 0
        assert not torch.allclose(layer(x), plain(layer, x))
        rate.batch_count = 10
        torch.testing.assert_close(layer(x), plain(layer, x))

    def test_evaluation(self):
        layer, x = ActivationDropoutAndLinear(6, 4, dropout_p=0.5).eval(), randn(3, 6, dtype=torch.float32)
        before = torch.get_rng_state()
        with_gradient = layer(x.clone().requires_grad_())
        with torch.no_grad():
            without = layer(x)
        assert torch.equal(with_gradient, without) and torch.equal(without, plain(layer, x)) and torch.equal(torch.get_rng_state(), before)

    def test_dropout_without_gradient(self):
        """In training mode the dropout acts, whether or not a gradient is wanted."""
        layer, x = ActivationDropoutAndLinear(50, 4, dropout_p=0.5), randn(3, 50, dtype=torch.float32)
        torch.manual_seed(0)
        one = layer(x)
        torch.manual_seed(0)
        with torch.no_grad():
            two = layer(x)
        assert torch.equal(one, two) and not torch.equal(one, plain(layer, x))

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("narrow_input", [True, False])
    def test_mixed_precision(self, dtype, narrow_input):
        """Autocast gives 16-bit gradients to weights of 32 bits: the same numbers as from the steps."""
        torch.manual_seed(0)
        layer = ActivationDropoutAndLinear(24, 10, activation="SwooshR")
        x = randn(6, 5, 24, dtype=torch.float32, scale=3)
        x = (x.to(dtype) if narrow_input else x).requires_grad_()
        g = randn(6, 5, 10, seed=1, dtype=torch.float32).to(dtype)
        with torch.autocast("cpu", dtype=dtype):
            ours, theirs = layer(x), plain(layer, x)
        assert ours.dtype == theirs.dtype == dtype and torch.equal(ours, theirs)
        leaves = [x, layer.weight, layer.bias]
        for name, leaf, a, b in zip(("x", "weight", "bias"), leaves, torch.autograd.grad(ours, leaves, g), torch.autograd.grad(theirs, leaves, g)):
            assert a.dtype == leaf.dtype, name
            assert (a - b).abs().max() <= 2 * torch.finfo(dtype).eps * b.abs().max(), name

    @pytest.mark.parametrize("dtype", HALVES)
    def test_all_in_sixteen_bits(self, dtype):
        layer = ActivationDropoutAndLinear(8, 4).to(dtype)
        x = randn(3, 8, scale=4).to(dtype).requires_grad_()
        y = layer(x)
        y.sum().backward()
        wide = copy.deepcopy(layer).double()
        exact_x = x.detach().double().requires_grad_()
        plain(wide, exact_x).sum().backward()
        assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == dtype
        for ours, exact in ((x.grad, exact_x.grad), (layer.weight.grad, wide.weight.grad)):
            assert (ours.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()

    def test_start(self):
        torch.manual_seed(5)
        reference = torch.nn.Linear(40, 30)
        torch.manual_seed(5)
        layer = ActivationDropoutAndLinear(40, 30, initial_scale=0.25)
        torch.testing.assert_close(layer.weight, reference.weight * 0.25)
        assert layer.bias.abs().max() <= 0.025 and layer.bias.abs().max() > 0.015

    def test_names_and_strict_loading(self):
        layer = ActivationDropoutAndLinear(4, 3)
        assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {"weight": (3, 4), "bias": (3,)}
        assert list(ActivationDropoutAndLinear(4, 3, bias=False).state_dict()) == ["weight"]
        other = ActivationDropoutAndLinear(4, 3)
        other.load_state_dict(layer.state_dict(), strict=True)
        x = randn(2, 4, dtype=torch.float32)
        assert torch.equal(layer(x), other(x))
        with pytest.raises(RuntimeError, match="bias"):
            other.load_state_dict({"weight": layer.weight}, strict=True)

    def test_copies(self):
        layer = ActivationDropoutAndLinear(4, 3, dropout_p=ScheduledFloat((0.0, 0.3), (20.0, 0.1)))
        twin = copy.deepcopy(layer)
        stored = io.BytesIO()
        torch.save(layer, stored)
        stored.seek(0)
        loaded = torch.load(stored, weights_only=False)
        x = randn(2, 4, dtype=torch.float32)
        assert torch.equal(twin(x), layer(x)) and torch.equal(loaded(x), layer(x))
        with torch.no_grad():
            twin.weight.add_(1.0)
        twin.dropout_p.batch_count = 3
        assert not torch.equal(twin(x), layer(x)) and layer.dropout_p.batch_count is None

    def test_tracing(self, monkeypatch):
        layer, x = ActivationDropoutAndLinear(4, 3), randn(2, 4, dtype=torch.float32)
        expected = layer(x)
        monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
        traced = layer(x)
        assert torch.equal(traced, expected) and "ActivationDropoutAndLinear" not in type(traced.grad_fn).__name__

    def test_unknown_activation(self):
        with pytest.raises(ValueError, match="'Swish'.*SwooshL or SwooshR"):
            ActivationDropoutAndLinear(4, 3, activation="Swish")
