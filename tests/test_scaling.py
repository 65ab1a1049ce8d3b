"""Initial scales, schedules against numpy, tools that touch only gradients, dropout, and the chunked convolution against sums written out."""
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
from torch.nn import functional as F

from speechlearn.zipformer.scaling import (
    ChunkCausalDepthwiseConv1d, CutoffEstimator, Dropout2, Dropout3, Identity, PiecewiseLinear, ScaledConv1d, ScaledConv2d, ScaledLinear, ScaleGrad, ScheduledFloat, SoftmaxFunction,
    convert_num_channels, effective_batch_count, penalize_abs_values_gt, set_batch_count, softmax, with_loss,
)
from zipformer_tools import randn

HALVES = [torch.float16, torch.bfloat16]


def kept(function):
    """Type and number of elements of each tensor that autograd keeps."""
    found = []

    def note(tensor):
        found.append((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = function()
    del result
    return found


class TestScaledLayers:
    @pytest.mark.parametrize(
        "scaled, make, args", [(ScaledLinear, nn.Linear, (50, 40)), (ScaledConv1d, nn.Conv1d, (8, 40, 3)), (ScaledConv2d, nn.Conv2d, (8, 40, (3, 2)))],
    )
    @pytest.mark.parametrize("scale", [0.05, 1.0, 3.0])
    def test_start(self, scaled, make, args, scale):
        torch.manual_seed(3)
        theirs = make(*args)
        torch.manual_seed(3)
        ours = scaled(*args, initial_scale=scale)
        assert type(ours) is make and ours.state_dict().keys() == theirs.state_dict().keys()
        torch.testing.assert_close(ours.weight, theirs.weight * scale)
        assert 0.08 * scale < ours.bias.abs().max() <= 0.1 * scale and ours.bias.min() < 0 < ours.bias.max()
        assert ours.weight.requires_grad and ours.weight.is_leaf
        assert scaled(*args, initial_scale=scale, bias=False).bias is None
        ours.load_state_dict(theirs.state_dict(), strict=True)

    def test_other_arguments_go_through(self):
        conv = ScaledConv1d(4, 4, 3, groups=4, padding=1, initial_scale=0.1)
        assert conv(torch.zeros(1, 4, 7)).shape == (1, 4, 7) and conv.weight.shape == (4, 1, 3)


@st.composite
def piecewise(draw):
    xs = sorted(draw(st.sets(st.integers(-40, 40), min_size=1, max_size=6)))
    return PiecewiseLinear(*[(x / 2, draw(st.floats(-10, 10))) for x in xs])


GRID = [x / 8 for x in range(-200, 201)]


class TestPiecewiseLinear:
    @settings(max_examples=80, deadline=None)
    @given(piecewise())
    def test_equals_numpy(self, p):
        xs, ys = zip(*p.pairs)
        np.testing.assert_allclose([p(x) for x in GRID], np.interp(GRID, xs, ys), atol=1e-12)

    @settings(max_examples=80, deadline=None)
    @given(piecewise(), piecewise(), st.floats(-5, 5))
    def test_algebra(self, p, q, number):
        """Each operation on functions is the operation on values, everywhere: also between the points, and outside."""
        tested = [
            (p + q, lambda x: p(x) + q(x)), (p + number, lambda x: p(x) + number), (p * number, lambda x: p(x) * number), (p.max(q), lambda x: max(p(x), q(x))),
            (p.min(q), lambda x: min(p(x), q(x))), (p.max(number), lambda x: max(p(x), number)), (p.min(number), lambda x: min(p(x), number)),
        ]
        for result, expected in tested:
            np.testing.assert_allclose([result(x) for x in GRID], [expected(x) for x in GRID], atol=1e-9)
            xs = [x for x, _ in result.pairs]
            assert all(a < b for a, b in zip(xs, xs[1:]))
        assert p.max(q) == q.max(p) or any(abs(p.max(q)(x) - q.max(p)(x)) < 1e-9 for x in GRID)
        assert p + q == q + p

    def test_crossing_by_hand(self):
        """0 → 1 and 1 → 0 over [0, 4] meet at (2, 0.5)."""
        p, q = PiecewiseLinear((0, 0), (4, 1)), PiecewiseLinear((0, 1), (4, 0))
        assert p.max(q).pairs == [(0.0, 1.0), (2.0, 0.5), (4.0, 1.0)]
        assert p.min(q).pairs == [(0.0, 0.0), (2.0, 0.5), (4.0, 0.0)]
        assert (p + q).pairs == [(0.0, 1.0), (4.0, 1.0)]
        assert p.max(0.25).pairs == [(0.0, 0.25), (1.0, 0.25), (4.0, 1.0)]

    def test_points_and_outside(self):
        p = PiecewiseLinear((0, 0.3), (20000, 0.1))
        assert [p(x) for x in (-1e9, 0, 5000, 20000, 1e9)] == [0.3, 0.3, 0.25, 0.1, 0.1]
        assert PiecewiseLinear((5, 2))(-3) == PiecewiseLinear((5, 2))(99) == 2.0

    def test_copy_and_equality(self):
        p = PiecewiseLinear((0, 1), (2, 3))
        q = PiecewiseLinear(p)
        assert p == q and q.pairs is not p.pairs and p != PiecewiseLinear((0, 1), (2, 4)) and p != 1.0
        q.pairs.append((9.0, 9.0))
        assert p != q and str(p) == "PiecewiseLinear((0.0, 1.0), (2.0, 3.0))"
        with pytest.raises(TypeError, match="unhashable"):
            hash(p)

    def test_operands_stay(self):
        p, q = PiecewiseLinear((0, 1), (2, 3)), PiecewiseLinear((1, 5))
        p + q, p * 2, p.max(q), p.min(0.0), p + 1
        assert p.pairs == [(0.0, 1.0), (2.0, 3.0)] and q.pairs == [(1.0, 5.0)]

    def test_refused(self):
        with pytest.raises(ValueError, match="at least one point"):
            PiecewiseLinear()
        with pytest.raises(ValueError, match="must rise.*3.0 follows 3.0"):
            PiecewiseLinear((0, 1), (3, 1), (3, 2))
        with pytest.raises(ValueError, match="must rise.*1.0 follows 3.0"):
            PiecewiseLinear((3, 1), (1, 2))


class Parent(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = ScheduledFloat((0, 1.0), (10, 0.0))
        self.a, self.b = Dropout2(self.shared), Dropout2(self.shared)
        self.c = Dropout3(ScheduledFloat((0, 0.5)), shared_dim=0)


class TestScheduledFloat:
    def test_who_sees_the_schedule(self, monkeypatch):
        s = ScheduledFloat((0, 1.0), (10, 0.0), default=0.7)
        assert float(s) == 0.7  # nobody has told the step
        s.batch_count = 5
        assert float(s) == 0.5
        s.batch_count = 0  # zero is a step, and not "unknown"
        assert float(s) == 1.0
        s.eval()
        assert float(s) == 0.7
        s.train()
        s.batch_count = 1e9
        assert float(s) == 0.0
        monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
        assert float(s) == 0.7
        assert float(ScheduledFloat((0, 3.0))) == 0.0  # the default's default
        t = ScheduledFloat((0, 3))
        t.batch_count = 2
        assert isinstance(float(t), float)

    def test_algebra(self):
        s, t = ScheduledFloat((0, 1.0), (10, 0.0), default=0.7), ScheduledFloat((0, 0.0), (10, 1.0), default=0.2)
        cases = [
            (s + t, 0.9, lambda x, y: x + y), (s + 2.0, 0.7, lambda x, y: x + 2), (s.max(t), 0.7, max), (t.max(s), 0.7, max), (t.max(0.4), 0.2, lambda x, y: max(y, 0.4)),
        ]
        for result, default, function in cases:
            assert isinstance(result, ScheduledFloat) and result.batch_count is None and float(result) == pytest.approx(default)
            for step in (0, 2, 4.5, 5, 8, 10, 11):
                result.batch_count = s.batch_count = t.batch_count = step
                assert float(result) == pytest.approx(function(float(s), float(t)))
            result.batch_count = s.batch_count = t.batch_count = None

    def test_in_a_tree_of_modules(self):
        model = Parent()
        assert not model.state_dict() and not list(model.parameters())
        assert set_batch_count(model, 5) == 2  # the shared one once
        assert float(model.a.p) == 0.5 and model.shared.name == "shared" and model.c.p.name == "c.p"
        twin = copy.deepcopy(model)
        assert twin.a.p is twin.b.p is twin.shared and twin.shared is not model.shared
        set_batch_count(twin, 10)
        assert float(model.a.p) == 0.5 and float(twin.b.p) == 0.0
        model.eval()
        assert float(model.a.p) == 0.0 and float(model.c.p) == 0.0
        stored = io.BytesIO()
        torch.save(twin, stored)
        stored.seek(0)
        assert float(torch.load(stored, weights_only=False).shared) == 0.0

    def test_set_batch_count_leaves_others_alone(self):
        model = nn.Sequential(nn.Linear(2, 2), Identity())
        assert set_batch_count(model, 5) == 0 and not hasattr(model[0], "batch_count") and not hasattr(model[0], "name")

    def test_shown(self):
        s = ScheduledFloat((0, 1.0), default=0.5)
        s.batch_count = 3
        assert repr(s) == "ScheduledFloat(batch_count=3, schedule=PiecewiseLinear((0.0, 1.0)), default=0.5)"

    def test_refused(self):
        with pytest.raises(ValueError, match="at least one point"):
            ScheduledFloat()

    @pytest.mark.parametrize("batches, seconds, reference, expected", [(1000, 600, 600, 1000), (1000, 60, 600, 100), (7, 4 * 1000, 600, 7 * 4000 / 600), (10, 30, 60.0, 5)])
    def test_clock(self, batches, seconds, reference, expected):
        assert effective_batch_count(batches, seconds_per_batch=seconds, reference_seconds=reference) == pytest.approx(expected)


class TestGradientTools:
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(1, 4), max_size=3), st.lists(st.integers(1, 4), max_size=3), st.integers(0, 10**6))
    def test_with_loss(self, x_shape, y_shape, seed):
        """As if the sum of y were added to the loss, whatever the gradient of x is."""
        x, y = randn(*x_shape, seed=seed).requires_grad_(), randn(*y_shape, seed=seed + 1).requires_grad_()
        g = randn(*x_shape, seed=seed + 2)
        result = with_loss(x, y.square())
        assert torch.equal(result, x)
        got = torch.autograd.grad(result, [x, y], g)
        expected = torch.autograd.grad((x * g).sum() + y.square().sum(), [x, y])
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 30), st.floats(0.1, 3), st.floats(0.001, 2), st.booleans(), st.integers(0, 10**6))
    def test_penalty(self, n, limit, penalty, zero_upstream, seed):
        x = randn(n, seed=seed, scale=2).requires_grad_()
        g = randn(n, seed=seed + 1) * (not zero_upstream)
        y = penalize_abs_values_gt(x, limit, penalty)
        assert torch.equal(y, x)
        (got,) = torch.autograd.grad(y, x, g)
        torch.testing.assert_close(got, g + penalty * torch.sign(x.detach()) * (x.detach().abs() > limit))

    def test_scale_grad(self):
        module, x, g = ScaleGrad(0.2), randn(3, 4).requires_grad_(), randn(3, 4, seed=1)
        assert torch.equal(module(x), x)
        torch.testing.assert_close(torch.autograd.grad(module(x), x, g)[0], 0.2 * g)
        assert torch.equal(torch.autograd.grad(module.eval()(x) * 1, x, g)[0], g)
        assert torch.autograd.gradcheck(ScaleGrad(1.0), x)
        assert torch.autograd.gradgradcheck(ScaleGrad(1.0), x)
        with torch.no_grad():
            assert module.train()(x) is x
        assert not module.state_dict() and copy.deepcopy(module).alpha == 0.2

    def test_identity(self):
        x = randn(3).requires_grad_()
        y = Identity()(x)
        assert torch.equal(y, x) and y is not x and y.data_ptr() == x.data_ptr()
        assert torch.autograd.gradcheck(Identity(), x) and not Identity().state_dict()


class TestSoftmax:
    @pytest.mark.parametrize("dim", [0, 1, -1])
    def test_gradcheck(self, dim):
        assert torch.autograd.gradcheck(lambda x: SoftmaxFunction.apply(x, dim), randn(3, 4, 5, scale=3).requires_grad_())

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data(), st.floats(0.1, 50), st.integers(0, 10**6))
    def test_equals_torch(self, shape, data, scale, seed):
        dim = data.draw(st.integers(-len(shape), len(shape) - 1))
        x, g = randn(*shape, seed=seed, scale=scale).requires_grad_(), randn(*shape, seed=seed + 1)
        ours, theirs = softmax(x, dim), x.softmax(dim)
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(torch.autograd.grad(ours, x, g)[0], torch.autograd.grad(theirs, x, g)[0], atol=1e-12, rtol=1e-9)

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))])
    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("autocast", [True, False])
    def test_sixteen_bits(self, dtype, autocast, device):
        """Only the result is kept, with 16 bits; under autocast, too, which on a GPU would widen it."""
        x = randn(6, 50, scale=4).to(device, dtype).requires_grad_()
        g = randn(6, 50, seed=1).to(device, dtype)
        with torch.autocast(device, dtype=dtype, enabled=autocast):
            assert kept(lambda: softmax(x, -1)) == [(dtype, 300)]
            y = softmax(x, -1)
        y.backward(g)
        p = y.detach().double()
        exact = g.double() * p - p * (g.double() * p).sum(dim=-1, keepdim=True)
        assert y.dtype == x.grad.dtype == dtype
        torch.testing.assert_close(x.grad.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)  # the sum ran in 32 bits

    def test_huge_scores(self):
        x = torch.tensor([[1e30, 1e30, -1e30], [-1000.0, -1000.0, -1000.0]], requires_grad=True)
        y = softmax(x, -1)
        y[:, 0].sum().backward()
        assert torch.allclose(y, torch.tensor([[0.5, 0.5, 0], [1 / 3] * 3])) and x.grad.isfinite().all()

    def test_tracing(self, monkeypatch):
        monkeypatch.setattr(torch.jit, "is_tracing", lambda: True)
        assert "Softmax" in type(softmax(randn(2, 3).requires_grad_(), -1).grad_fn).__name__.replace("SoftmaxFunction", "")


class TestDropout:
    def test_dropout2_is_torchs(self):
        x, rate = randn(40, 40), ScheduledFloat((0, 0.5), (10, 0.0))
        module = Dropout2(rate)
        assert torch.equal(module(x), x)  # default 0
        rate.batch_count = 0
        torch.manual_seed(1)
        ours = module(x)
        torch.manual_seed(1)
        assert torch.equal(ours, F.dropout(x, 0.5))
        assert torch.equal(module.eval()(x), x)

    @pytest.mark.parametrize("shared_dim", [0, 1, 2, -1])
    @pytest.mark.parametrize("p", [0.25, ScheduledFloat((0, 0.25), default=0.25)])
    def test_dropout3(self, shared_dim, p):
        torch.manual_seed(0)
        x = torch.ones(30, 30, 30, dtype=torch.float64, requires_grad=True)
        y = Dropout3(p, shared_dim=shared_dim)(x)
        one = y.select(shared_dim, 0)
        assert torch.equal(y, one.unsqueeze(shared_dim).expand_as(y)), "one mask along the shared axis"
        assert sorted(one.detach().unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
        assert one.mean().item() == pytest.approx(1.0, abs=4.5 * math.sqrt(0.25 / 0.75 / 900))
        y.sum().backward()
        assert torch.equal(x.grad, y.detach())
        kept_rows = (one != 0).double().mean(dim=0)
        assert 0.3 < kept_rows.min() and kept_rows.std() > 0.03  # not shared along the others

    @pytest.mark.parametrize("module, training", [(Dropout3(0.5, 1), False), (Dropout3(0.0, 1), True), (Dropout3(ScheduledFloat((0, 0.5)), 1), True)])
    def test_nothing_happens(self, module, training):
        x = randn(5, 5)
        before = torch.get_rng_state()
        assert torch.equal(module.train(training)(x), x) and torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("dtype", HALVES)
    def test_types(self, dtype):
        assert Dropout3(0.5, 0)(torch.ones(4, 4, dtype=dtype)).dtype == dtype


class TestSmallTools:
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(0, 3), max_size=2), st.integers(0, 6), st.integers(0, 9), st.integers(0, 99))
    def test_convert_num_channels(self, batch, n, wanted, seed):
        x = randn(*batch, n, seed=seed)
        y = convert_num_channels(x, wanted)
        assert y.shape == (*batch, wanted)
        common = min(n, wanted)
        assert torch.equal(y[..., :common], x[..., :common]) and not y[..., common:].any()

    def test_cutoff_by_hand(self):
        estimator = CutoffEstimator(0.05)
        assert estimator(10.0) is True
        assert estimator.cutoff == pytest.approx(0.95 * 10)  # 1 of 1 above: 0.95 too many
        assert estimator(1.0) is False
        assert estimator.cutoff == pytest.approx(9.5)  # too many were above, but this one was not: it stays
        for _ in range(38):
            estimator(1.0)
        assert estimator.count == 40 and estimator.count_above == 1
        cutoff, share = estimator.cutoff, 1 / 41
        assert estimator(2.0) is False  # too few are above: down towards this one
        assert estimator.cutoff == pytest.approx((0.05 - share) * 2 + (1 - (0.05 - share)) * cutoff)

    @pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
    @pytest.mark.parametrize("scale", [1.0, 1e6])
    def test_cutoff_in_the_long_run(self, p, scale):
        drawn, estimator = random.Random(0), CutoffEstimator(p)
        assert sum(estimator(scale * drawn.random()) for _ in range(5000)) / 5000 == pytest.approx(p, abs=0.02)


def make_conv(channels=2, kernel_size=5, seed=0, bias=True):
    torch.manual_seed(seed)
    conv = ChunkCausalDepthwiseConv1d(channels, kernel_size, bias=bias).double()
    with torch.no_grad():
        conv.chunkwise_conv_scale.copy_(randn(2, channels, kernel_size, seed=seed))
    return conv


def written_out(conv, x, chunk_size):
    """The definition, one sum for each output."""
    batch, channels, n = x.shape
    size, half = conv.kernel_size, conv.kernel_size // 2
    length = n if chunk_size < 0 or chunk_size > n else chunk_size
    y = torch.zeros_like(x)
    for t in range(n):
        start = t - t % length
        causal = conv.causal_conv.bias.expand(batch, -1)
        for j in range(half + 1):
            if t - half + j >= 0:
                causal = causal + conv.causal_conv.weight[:, 0, j] * x[:, :, t - half + j]
        chunk = x.new_zeros(batch, channels) if conv.chunkwise_conv.bias is None else conv.chunkwise_conv.bias.expand(batch, -1)
        for j in range(size):
            if start <= t - half + j < min(start + length, n):
                chunk = chunk + conv.chunkwise_conv.weight[:, 0, j] * x[:, :, t - half + j]
        from_left, from_right = t - start, start + length - 1 - t
        factor = torch.ones(channels, dtype=x.dtype)
        if from_left < size:
            factor = factor + conv.chunkwise_conv_scale[0, :, from_left]
        if from_right < size:
            factor = factor + conv.chunkwise_conv_scale[1, :, size - 1 - from_right]
        y[:, :, t] = causal + chunk * factor
    return y


class TestChunkCausalConvolution:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 2), st.integers(1, 3), st.integers(0, 4), st.integers(1, 17), st.integers(-1, 20).filter(bool), st.booleans(), st.integers(0, 10**6))
    def test_equals_the_definition(self, batch, channels, half, n, chunk_size, bias, seed):
        conv, x = make_conv(channels, 2 * half + 1, seed=seed, bias=bias), randn(batch, channels, n, seed=seed)
        with torch.no_grad():
            torch.testing.assert_close(conv(x, chunk_size=chunk_size), written_out(conv, x, chunk_size))

    @pytest.mark.parametrize("kernel_size", [1, 3, 7, 15])
    @pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 8, 13, 40, 100, -1])
    def test_what_each_output_sees(self, kernel_size, chunk_size):
        """Half a kernel back, and ahead to the end of the chunk or half a kernel, whichever comes first. The future beyond changes nothing."""
        conv, n, half = make_conv(1, kernel_size), 40, kernel_size // 2
        x = randn(1, 1, n).requires_grad_()
        y = conv(x, chunk_size=chunk_size)
        for t in range(n):
            (g,) = torch.autograd.grad(y[0, 0, t], x, retain_graph=True)
            end = n - 1 if chunk_size < 0 or chunk_size > n else min(t - t % chunk_size + chunk_size - 1, n - 1)
            assert g[0, 0].nonzero()[:, 0].tolist() == list(range(max(0, t - half), min(t + half, end) + 1))

    @pytest.mark.parametrize("kernel_size", [1, 5, 9, 15])
    @pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 5, 7, 8, 16, 24, 48])
    def test_streaming_equals_offline(self, kernel_size, chunk_size):
        """The last chunk is filled with zeros, as the whole does it."""
        conv, n = make_conv(3, kernel_size), 48
        x = randn(2, 3, n)
        with torch.no_grad():
            whole = conv(x, chunk_size=chunk_size)
            cache, pieces = torch.zeros(2, 3, kernel_size // 2, dtype=torch.float64), []
            for piece in F.pad(x, (0, -n % chunk_size)).split(chunk_size, dim=2):
                y, cache = conv.streaming_forward(piece, cache)
                pieces.append(y)
                assert cache.shape == (2, 3, kernel_size // 2)
        torch.testing.assert_close(torch.cat(pieces, dim=2)[..., :n], whole)

    def test_cache_shorter_than_the_chunk_is_kept(self):
        """Chunks of 2 under a kernel of 9: the cache is older than the last chunk."""
        conv = make_conv(1, 9)
        cache = torch.arange(4.0, dtype=torch.float64)[None, None]
        with torch.no_grad():
            _, cache = conv.streaming_forward(torch.tensor([[[10.0, 11.0]]], dtype=torch.float64), cache)
        assert cache.flatten().tolist() == [2, 3, 10, 11]

    def test_gradcheck(self):
        conv = make_conv(2, 5)
        names, parameters = zip(*conv.named_parameters())
        function = lambda x, *p: torch.func.functional_call(conv, dict(zip(names, p)), (x,), {"chunk_size": 3})  # noqa: E731
        assert torch.autograd.gradcheck(function, (randn(1, 2, 8).requires_grad_(), *parameters))

    def test_start(self):
        """Edge factors start at one; both weights are scaled; the causal bias is drawn from a tenth of the scale."""
        torch.manual_seed(1)
        plain = [nn.Conv1d(20, 20, 8, groups=20), nn.Conv1d(20, 20, 15, groups=20)]
        torch.manual_seed(1)
        conv = ChunkCausalDepthwiseConv1d(20, 15, initial_scale=0.3)
        assert not conv.chunkwise_conv_scale.any()
        torch.testing.assert_close(conv.causal_conv.weight, plain[0].weight * 0.3)
        torch.testing.assert_close(conv.chunkwise_conv.weight, plain[1].weight * 0.3)
        torch.testing.assert_close(conv.chunkwise_conv.bias, plain[1].bias)
        assert 0.02 < conv.causal_conv.bias.abs().max() <= 0.03

    def test_names_and_strict_loading(self):
        conv = ChunkCausalDepthwiseConv1d(6, 7)
        assert {k: tuple(v.shape) for k, v in conv.state_dict().items()} == {
            "chunkwise_conv_scale": (2, 6, 7), "causal_conv.weight": (6, 1, 4), "causal_conv.bias": (6,), "chunkwise_conv.weight": (6, 1, 7), "chunkwise_conv.bias": (6,),
        }
        assert "chunkwise_conv.bias" not in ChunkCausalDepthwiseConv1d(6, 7, bias=False).state_dict()
        other, x = ChunkCausalDepthwiseConv1d(6, 7), randn(1, 6, 9, dtype=torch.float32)
        other.load_state_dict(conv.state_dict(), strict=True)
        assert torch.equal(copy.deepcopy(other)(x, 4), conv(x, 4))

    def test_modes_are_the_same(self):
        conv, x = make_conv(), randn(1, 2, 9)
        assert torch.equal(conv.train()(x, 4), conv.eval()(x, 4))

    def test_refused(self):
        with pytest.raises(ValueError, match="kernel_size is 8.*odd"):
            ChunkCausalDepthwiseConv1d(2, 8)
        conv = make_conv(2, 5)
        with pytest.raises(ValueError, match="9 steps in chunks of 0"):
            conv(randn(1, 2, 9), chunk_size=0)
        with pytest.raises(ValueError, match="0 steps"):
            conv(torch.zeros(1, 2, 0, dtype=torch.float64), chunk_size=4)
        with pytest.raises(ValueError, match="the cache holds 3 steps; a kernel of 5 needs 2"):
            conv.streaming_forward(randn(1, 2, 4), torch.zeros(1, 2, 3, dtype=torch.float64))
