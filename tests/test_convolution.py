"""Feed-forward, convolution and pooling modules, and both front ends: plain compositions, padding, chunks, every length, streaming, errors."""
import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from speechlearn.data.batches import assert_batch_independent
from speechlearn.zipformer.activations import SwooshR, swoosh_l, swoosh_r
from speechlearn.zipformer.convolution import (
    Conv2dSubsampling, ConvNeXt, ConvolutionModule, FeedforwardModule, FirstConv2dSubsampling, PoolingModule, encoder_lengths, subsampled_lengths,
)
from speechlearn.zipformer.scaling import ScheduledFloat, set_batch_count
from zipformer_tools import randn


def loud(module, seed=0):
    """The module in 64 bits, with parameters of a size that makes every branch count."""
    module = module.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def draws(monkeypatch, value):
    count = []
    monkeypatch.setattr(random, "random", lambda: count.append(value) or value)
    return count


def small_front(kind=Conv2dSubsampling, bins=8, **kwargs):
    return loud(kind(bins, 5, layer1_channels=2, layer2_channels=3, layer3_channels=4, dropout=kwargs.pop("dropout", 0.0)))


def modules():
    """One of each with its inputs."""
    frames = randn(6, 2, 4)
    return {
        "feedforward": (loud(FeedforwardModule(4, 7, dropout=0.0)), (frames,)),
        "convolution": (loud(ConvolutionModule(4, 3, causal=False)), (frames,)),
        "causal": (loud(ConvolutionModule(4, 3, causal=True)), (frames, None, 2)),
        "pooling": (loud(PoolingModule(4)), (frames,)),
        "convnext": (loud(ConvNeXt(3, kernel_size=(3, 5), layerdrop_rate=0.0)), (randn(2, 3, 6, 5),)),
        "front end": (small_front(), (randn(2, 15, 8), torch.tensor([15, 11]))),
        "first front end": (small_front(FirstConv2dSubsampling), (randn(2, 15, 8),)),
    }


def first(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", modules())
class TestAll:
    def test_evaluation_draws_nothing_and_equals_training(self, name, monkeypatch):
        """No dropout here, so that values are the same; with and without gradients."""
        module, inputs = modules()[name]
        trained = first(module.train()(*inputs))
        count, before = draws(monkeypatch, 0.0), torch.get_rng_state()
        module.eval()
        with_gradient = first(module(*inputs))
        with torch.no_grad():
            without = first(module(*inputs))
        assert not count and torch.equal(torch.get_rng_state(), before)
        torch.testing.assert_close(with_gradient, without, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(trained, without, rtol=1e-12, atol=1e-12)
        # No memory from call to call.
        assert torch.equal(first(module(*inputs)), with_gradient)

    def test_gradcheck_in_evaluation(self, name):
        """The whole module, through all hand-written gradients."""
        module, (x, *others) = modules()[name]
        module.eval()
        x = x.clone().requires_grad_()
        some = [p for p in module.parameters() if p.numel() < 40]
        assert torch.autograd.gradcheck(lambda x, *_: first(module(x, *others)), (x, *some), atol=1e-5, fast_mode=True)

    def test_copies_and_strict_loading(self, name):
        module, inputs = modules()[name]
        module.eval()
        twin, expected = copy.deepcopy(module), first(module(*inputs))
        assert torch.equal(first(twin(*inputs)), expected)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(0.5)
        assert torch.equal(first(module(*inputs)), expected) and not torch.allclose(first(twin(*inputs)), expected)
        twin.load_state_dict(module.state_dict(), strict=True)
        assert torch.equal(first(twin(*inputs)), expected)
        short = dict(list(module.state_dict().items())[1:])
        with pytest.raises(RuntimeError, match="Missing key"):
            twin.load_state_dict(short, strict=True)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_mixed_precision(self, name, dtype):
        """A training step under autocast: gradients of 32 bits, near those without."""
        module, inputs = modules()[name]
        module.float().eval()
        inputs = tuple(v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in inputs)

        def gradients(enabled):
            module.zero_grad(set_to_none=True)
            with torch.autocast("cpu", dtype=dtype, enabled=enabled):
                y = first(module(*inputs))
            y.float().square().sum().backward()
            return torch.cat([p.grad.flatten() for p in module.parameters()])

        narrow, wide = gradients(True), gradients(False)
        assert narrow.dtype == torch.float32
        assert F.cosine_similarity(narrow, wide, dim=0) > 0.999 and (narrow - wide).norm() < 0.05 * wide.norm() and not torch.equal(narrow, wide)
        module.train()
        assert gradients(True).isfinite().all()


def shapes(module):
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


class TestNames:
    def test_feedforward(self):
        assert shapes(FeedforwardModule(4, 7, 0.1)) == {"in_proj.weight": (7, 4), "in_proj.bias": (7,), "out_proj.weight": (4, 7), "out_proj.bias": (4,)}

    def test_convolution(self):
        common = {"in_proj.weight": (8, 4), "in_proj.bias": (8,), "out_proj.weight": (4, 4), "out_proj.bias": (4,)}
        assert shapes(ConvolutionModule(4, 5, False)) == {**common, "depthwise_conv.weight": (4, 1, 5), "depthwise_conv.bias": (4,)}
        assert shapes(ConvolutionModule(4, 5, True)) == {
            **common, "depthwise_conv.chunkwise_conv_scale": (2, 4, 5), "depthwise_conv.causal_conv.weight": (4, 1, 3), "depthwise_conv.causal_conv.bias": (4,),
            "depthwise_conv.chunkwise_conv.weight": (4, 1, 5), "depthwise_conv.chunkwise_conv.bias": (4,),
        }

    def test_front_end(self):
        """Keys, shapes and the number of parameters that the specification counted."""
        front = Conv2dSubsampling(80, 192)
        expected = {
            "conv.0": (8, 1, 3, 3), "conv.4": (32, 8, 3, 3), "conv.7": (128, 32, 3, 3), "convnext.depthwise_conv": (128, 1, 7, 7), "convnext.pointwise_conv1": (384, 128, 1, 1),
            "convnext.pointwise_conv2": (128, 384, 1, 1), "out": (192, 128 * 19),
        }
        expected = {f"{k}.weight": v for k, v in expected.items()} | {f"{k}.bias": v[:1] for k, v in expected.items()} | {"out_norm.log_scale": (), "out_norm.bias": (192,)}
        assert shapes(front) == expected and sum(p.numel() for p in front.parameters()) == 611_953

    def test_first_front_end(self):
        expected = {"conv.0": (8, 1, 3, 3), "conv.3": (32, 8, 3, 3), "conv.6": (128, 32, 3, 3), "out": (384, 128 * 19)}
        expected = {f"{k}.weight": v for k, v in expected.items()} | {f"{k}.bias": v[:1] for k, v in expected.items()} | {f"conv.{i}.count": () for i in (1, 4, 7)}
        assert shapes(FirstConv2dSubsampling(80, 384)) == expected

    def test_pooling(self):
        torch.manual_seed(0)
        plain = torch.nn.Linear(6, 6, bias=False)
        torch.manual_seed(0)
        pooling = PoolingModule(6)
        assert shapes(pooling) == {"proj.weight": (6, 6)}
        torch.testing.assert_close(pooling.proj.weight, 0.1 * plain.weight)


class TestFeedforward:
    @settings(max_examples=20, deadline=None)
    @given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 5), st.integers(1, 8), st.integers(0, 10**6))
    def test_plain_composition(self, n, batch, channels, hidden, seed):
        module, x = loud(FeedforwardModule(channels, hidden, 0.3), seed).eval(), randn(n, batch, channels, seed=seed)
        expected = F.linear(swoosh_l(F.linear(x, module.in_proj.weight, module.in_proj.bias)), module.out_proj.weight, module.out_proj.bias)
        torch.testing.assert_close(module(x), expected)

    def test_dropout_is_the_same_for_all_frames(self):
        torch.manual_seed(0)
        module = loud(FeedforwardModule(4, 40, dropout=ScheduledFloat((0, 0.5), (10, 0.0))))
        x = randn(1, 2, 4).expand(6, 2, 4)
        assert torch.equal(module(x), module(x))
        set_batch_count(module, 0)
        y = module(x)
        assert torch.equal(y, y[:1].expand_as(y)) and not torch.allclose(y[0, 0], module(x)[0, 0])
        assert not torch.allclose(module(x[:, :1].expand(6, 2, 4))[0, 0], module(x[:, :1].expand(6, 2, 4))[0, 1])  # another one for each utterance
        set_batch_count(module, 10)
        assert torch.equal(module(x), module.eval()(x))

    def test_frames_alone(self):
        module, x = loud(FeedforwardModule(4, 7, 0.0)).eval(), randn(6, 2, 4)
        other = x.clone()
        other[3:] += 1
        torch.testing.assert_close(module(other)[:3], module(x)[:3], rtol=1e-12, atol=1e-12)


def plain_convolution(module, x, padding=None, chunk_size=-1):
    x = F.glu(F.linear(x, module.in_proj.weight, module.in_proj.bias), dim=-1).permute(1, 2, 0)
    if padding is not None:
        x = torch.where(padding[:, None], torch.zeros((), dtype=x.dtype), x)
    if module.causal:
        x = module.depthwise_conv(x, chunk_size)
    else:
        kernel = module.depthwise_conv.weight
        x = F.conv1d(F.pad(x, (kernel.shape[2] // 2,) * 2), kernel, module.depthwise_conv.bias, groups=x.shape[1])
    return F.linear(swoosh_r(x.permute(2, 0, 1)), module.out_proj.weight, module.out_proj.bias)


def mask_of(lengths, n):
    return torch.arange(n)[None] >= torch.as_tensor(lengths)[:, None]


class TestConvolutionModule:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 4), st.booleans(), st.data(), st.integers(0, 10**6))
    def test_plain_composition(self, n, channels, half, causal, data, seed):
        module, x = loud(ConvolutionModule(channels, 2 * half + 1, causal), seed).eval(), randn(n, 2, channels, seed=seed)
        lengths = data.draw(st.lists(st.integers(1, n), min_size=2, max_size=2))
        padding = data.draw(st.sampled_from([None, mask_of(lengths, n)]))
        chunk_size = data.draw(st.integers(1, 10)) if causal else -1
        torch.testing.assert_close(module(x, padding, chunk_size), plain_convolution(module, x, padding, chunk_size))

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 4), st.sampled_from([None, -1, 1, 3, 4, 20]), st.sampled_from([0.0, 1e3, float("nan")]), st.integers(0, 10**6))
    def test_padding_never_reaches_real_frames(self, lengths, half, chunk_size, filling, seed):
        """Each utterance gives what it gives alone, whatever stands in the padding."""
        causal, n = chunk_size is not None, max(lengths)
        module = loud(ConvolutionModule(3, 2 * half + 1, causal), seed).eval()
        x = randn(n, len(lengths), 3, seed=seed)
        for i, length in enumerate(lengths):
            x[length:, i] = filling
        kwargs = {"chunk_size": chunk_size} if causal and chunk_size != -1 else {}
        together = module(x, mask_of(lengths, n), **kwargs)
        for i, length in enumerate(lengths):
            if causal and length < n and not 0 < chunk_size <= length:
                continue  # alone its only chunk would be shorter, with another right edge; see below
            alone = module(x[:length, i : i + 1], None, **kwargs)
            torch.testing.assert_close(together[:length, i], alone[:, 0])

    @pytest.mark.parametrize("causal, chunk_size", [(False, -1), (True, -1), (True, 4), (True, 5)])
    def test_what_stands_in_the_padding_does_not_matter(self, causal, chunk_size):
        module, x, padding = loud(ConvolutionModule(3, 7, causal)).eval(), randn(13, 2, 3), mask_of([13, 8], 13)
        other = x.clone()
        other[8:, 1] = randn(5, 3, seed=4, scale=100)
        assert torch.equal(module(other, padding, chunk_size), module(x, padding, chunk_size))
        without = (module(other, None, chunk_size) - module(x, None, chunk_size)).abs().amax(dim=(1, 2))
        assert without[8:].max() > 1e-3 and (without[5:8].max() > 1e-3 or chunk_size == 4)  # without the mask it does matter; chunks of 4 end at 8

    @pytest.mark.parametrize("n, length", [(16, 9), (9, 9)])
    def test_one_chunk_ends_with_the_longest(self, n, length):
        """With everything as one chunk, the learnt factors of the right edge belong to the end of the batch; they start at zero."""
        module, x = loud(ConvolutionModule(3, 5, True)).eval(), randn(n, 2, 3)
        same = lambda: torch.allclose(module(x, mask_of([n, length], n))[:length, 1], module(x[:length, 1:])[:, 0])  # noqa: E731
        assert same() == (n == length)
        with torch.no_grad():
            module.depthwise_conv.chunkwise_conv_scale.zero_()
        assert same()

    @pytest.mark.parametrize("kernel_size", [3, 15])
    @pytest.mark.parametrize("chunk_size", [1, 2, 4, 5, 16])
    def test_causality(self, kernel_size, chunk_size):
        module, x = loud(ConvolutionModule(3, kernel_size, True)).eval(), randn(20, 1, 3)
        for changed in range(20):
            other = x.clone()
            other[changed:] = randn(20 - changed, 1, 3, seed=changed + 1)
            begin = changed - changed % chunk_size  # frames of the same chunk may look ahead, earlier ones not
            moved = (module(other, chunk_size=chunk_size) - module(x, chunk_size=chunk_size)).abs().amax(dim=(1, 2))
            assert moved[:begin].max() < 1e-12 if begin else True
            assert moved[changed] > 1e-6

    @pytest.mark.parametrize("kernel_size", [1, 5, 15])
    @pytest.mark.parametrize("chunk_size", [1, 2, 3, 4, 6, 8, 12, 24])
    def test_streaming_equals_offline(self, kernel_size, chunk_size):
        """With an utterance that ends before the other."""
        module, x, padding = loud(ConvolutionModule(3, kernel_size, True)).eval(), randn(24, 2, 3), mask_of([24, 17], 24)
        with torch.no_grad():
            whole = module(x, padding, chunk_size)
            cache, pieces = torch.zeros(2, 3, kernel_size // 2, dtype=torch.float64), []
            for start in range(0, 24, chunk_size):
                y, cache = module.streaming_forward(x[start : start + chunk_size], cache, padding[:, start : start + chunk_size])
                pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces), whole)

    def test_three_decisions(self, monkeypatch):
        """Two balancers and a whitener; their acting changes no value, only gradients."""
        module, x = loud(ConvolutionModule(3, 5, False)), randn(9, 2, 3)
        count = draws(monkeypatch, 0.999)
        passive = module(x)
        assert len(count) == 3
        gradients = torch.autograd.grad(passive.square().sum(), module.in_proj.weight)[0]
        draws(monkeypatch, 0.0)
        acted = module(x)
        assert torch.equal(acted, passive)
        assert not torch.allclose(torch.autograd.grad(acted.square().sum(), module.in_proj.weight)[0], gradients, rtol=1e-6)

    def test_refused(self):
        with pytest.raises(ValueError, match="kernel_size is 4.*odd"):
            ConvolutionModule(3, 4, causal=False)
        with pytest.raises(ValueError, match="not causal.*construct it with causal=True"):
            ConvolutionModule(3, 5, causal=False)(torch.zeros(4, 1, 3), chunk_size=2)
        with pytest.raises(ValueError, match="only a causal.*causal=True"):
            ConvolutionModule(3, 5, causal=False).streaming_forward(torch.zeros(4, 1, 3), torch.zeros(1, 3, 2), mask_of([4], 4))
        with pytest.raises(ValueError, match="in chunks of 0"):
            ConvolutionModule(3, 5, causal=True)(torch.zeros(4, 1, 3), chunk_size=0)
        with pytest.raises(ValueError, match="cache holds 4 steps"):
            ConvolutionModule(3, 5, causal=True).streaming_forward(torch.zeros(4, 1, 3), torch.zeros(1, 3, 4), mask_of([4], 4))


class TestPooling:
    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 4), st.floats(-1e6, 1e6), st.integers(0, 10**6))
    def test_the_mean_of_each_utterance(self, lengths, channels, filling, seed):
        module, x = loud(PoolingModule(channels), seed), randn(max(lengths), len(lengths), channels, seed=seed)
        expected = torch.stack([x[:length, i].mean(dim=0) @ module.proj.weight.T for i, length in enumerate(lengths)])[None]
        for i, length in enumerate(lengths):
            x[length:, i] = filling
        torch.testing.assert_close(module(x, mask_of(lengths, max(lengths))), expected)

    def test_without_mask(self):
        module, x = loud(PoolingModule(3)), randn(5, 2, 3)
        torch.testing.assert_close(module(x), module(x, torch.zeros(2, 5, dtype=torch.bool)))
        torch.testing.assert_close(module(x), (x.mean(dim=0) @ module.proj.weight.T)[None])


FRONTS = [Conv2dSubsampling, FirstConv2dSubsampling]


class TestLengths:
    @pytest.mark.parametrize("kind", FRONTS)
    def test_every_length(self, kind):
        """From 1 to 400: what the formula says is what comes out; shorter ones are refused with their number."""
        front = kind(7, 3, layer1_channels=1, layer2_channels=1, layer3_channels=1, dropout=0.0).eval()
        x = randn(1, 400, 7, dtype=torch.float32)
        with torch.no_grad():
            for n in range(1, 401):
                lengths, features = torch.tensor([n]), x[:, :n]
                run = lambda: front(features, lengths) if kind is Conv2dSubsampling else (front(features), None)  # noqa: E731
                if n < 9:
                    with pytest.raises(ValueError, match=f"has {n} frames|have {n} frames") as refused:
                        run()
                    assert "at least 9" in str(refused.value)
                    with pytest.raises(ValueError, match=f"utterance 1 .* has {n} frames"):
                        subsampled_lengths(torch.tensor([50, n]))
                    continue
                y, left = run()
                assert y.shape[1] == subsampled_lengths(lengths).item() == (n - 7) // 2
                assert left is None or left.tolist() == [y.shape[1]]
                assert encoder_lengths(lengths).item() == F.avg_pool1d(y.transpose(1, 2), 2, ceil_mode=True).shape[2]  # the last step halves, rounding up

    def test_by_hand(self):
        """Frames and what the specification says is left."""
        lengths = torch.tensor([9, 16, 80, 100, 1000])
        assert subsampled_lengths(lengths).tolist() == [1, 4, 36, 46, 496] and encoder_lengths(lengths).tolist() == [1, 2, 18, 23, 248]

    def test_empty_and_short(self):
        with pytest.raises(ValueError, match="utterance 0 .* has 0 frames"):
            encoder_lengths(torch.tensor([0, 5]))

    def test_lengths_that_do_not_fit(self):
        front = small_front().eval()
        for width, lengths in ((30, [20, 12]), (30, [40, 12]), (8, [9, 9]), (3, [30, 9])):
            with pytest.raises(ValueError, match=rf"x has {width} frames.*\[{lengths[0]}, {lengths[1]}\]"):
                front(randn(2, width, 8), torch.tensor(lengths))
        front(randn(2, 30, 8), torch.tensor([29, 9]))  # an odd frame too many is no harm

    @pytest.mark.parametrize("kind", FRONTS)
    @pytest.mark.parametrize("bins", range(7, 30))
    def test_bins(self, kind, bins):
        front = kind(bins, 3, layer1_channels=1, layer2_channels=1, layer3_channels=2)
        assert front.out.in_features == 2 * (((bins - 1) // 2 - 1) // 2)
        x = torch.zeros(1, 9, bins)
        assert (front(x, torch.tensor([9]))[0] if kind is Conv2dSubsampling else front(x)).shape == (1, 1, 3)

    @pytest.mark.parametrize("kind", FRONTS)
    def test_too_few_bins(self, kind):
        with pytest.raises(ValueError, match="in_channels is 6.*at least 7 bins"):
            kind(6, 3)


class TestFrontEnd:
    @pytest.mark.parametrize("kind, reach", [(Conv2dSubsampling, 3), (FirstConv2dSubsampling, 0)])
    def test_what_each_step_sees(self, kind, reach):
        """Step t sees the nine frames 2t … 2t + 8, and with ConvNeXt those of three more steps to either side."""
        front, x, n = small_front(kind).eval(), randn(1, 41, 8).requires_grad_(), 17
        y = front(x, torch.tensor([41]))[0] if reach else front(x)
        for t in range(n):
            (g,) = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)
            first_step, last_step = max(0, t - reach), min(n - 1, t + reach)
            assert g[0].abs().sum(dim=1).nonzero()[:, 0].tolist() == list(range(2 * first_step, 2 * last_step + 9))

    def test_plain_composition(self):
        """The layout before the linear layer is channel by channel."""
        front, x = small_front(FirstConv2dSubsampling, bins=11).eval(), randn(2, 15, 11)
        swish = lambda v: v * torch.sigmoid(v - 1)  # noqa: E731
        y = x[:, None]
        for index, options in ((0, {"padding": (0, 1)}), (3, {"stride": 2}), (6, {"stride": (1, 2)})):
            y = swish(F.conv2d(y, front.conv[index].weight, front.conv[index].bias, **options))
        assert y.shape == (2, 4, 4, 2)
        flat = torch.stack([y[:, channel, :, band] for channel in range(4) for band in range(2)], dim=-1)
        torch.testing.assert_close(front(x), F.linear(flat, front.out.weight, front.out.bias))

    def test_plain_composition_of_the_current_one(self):
        front, x = small_front(bins=11).eval(), randn(2, 15, 11)
        y = x[:, None]
        for index, options in ((0, {"padding": (0, 1)}), (4, {"stride": 2}), (7, {"stride": (1, 2)})):
            y = swoosh_r(F.conv2d(y, front.conv[index].weight, front.conv[index].bias, **options))
        y = plain_convnext(front.convnext, y)
        flat = torch.stack([y[:, channel, :, band] for channel in range(4) for band in range(2)], dim=-1)
        y = F.linear(flat, front.out.weight, front.out.bias)
        y = y / (y - front.out_norm.bias).square().mean(dim=-1, keepdim=True).sqrt() * front.out_norm.log_scale.exp()
        torch.testing.assert_close(front(x, torch.tensor([15, 15]))[0], y)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(9, 60), st.integers(0, 30), st.floats(-100, 100), st.integers(0, 10**6))
    def test_padding(self, length, more, filling, seed):
        """The first version is clean. ConvNeXt lets padding into the last three steps, and only into these."""
        x = randn(2, length + more, 8, seed=seed)
        x[1, length:] = filling
        left = (length - 7) // 2
        old = small_front(FirstConv2dSubsampling).eval()
        torch.testing.assert_close(old(x)[1, :left], old(x[1:, :length])[0])
        new = small_front().eval()
        together, out_lens = new(x, torch.tensor([length + more, length]))
        alone, _ = new(x[1:, :length], torch.tensor([length]))
        assert out_lens.tolist() == [(length + more - 7) // 2, left] and alone.shape[1] == left
        gap = (together[1, :left] - alone[0]).abs().amax(dim=1)
        clean = max(0, left - 3)
        assert gap[:clean].max() < 1e-10 if clean else True
        leaking = min(together.shape[1] - left, 3)  # steps that padding has made
        assert (gap[left - min(leaking, left) :] > 1e-9).all() if leaking else gap.max() < 1e-10

    def test_the_leak_is_noticed(self):
        front = small_front().eval()
        with pytest.raises(AssertionError):
            assert_batch_independent(front, randn(2, 40, 8), torch.tensor([40, 25]))

    def test_first_convolution_sees_a_fifth_of_the_gradient(self, monkeypatch):
        """Exact slopes, and no module acts."""
        monkeypatch.setattr(SwooshR, "forward", lambda self, x: swoosh_r(x))
        draws(monkeypatch, 0.999)
        front, x = small_front(), randn(2, 15, 8)
        front.convnext.activation.eval()
        del front.convnext.layerdrop_rate
        front.convnext.layerdrop_rate = 0.0
        gradients = []
        for training in (True, False):
            front.train(training)
            front.convnext.activation.eval()
            gradients.append(torch.autograd.grad(front(x, torch.tensor([15, 15]))[0].square().sum(), [front.conv[0].weight, front.conv[4].weight]))
        torch.testing.assert_close(gradients[0][0], 0.2 * gradients[1][0])
        torch.testing.assert_close(gradients[0][1], gradients[1][1])

    def test_dropout(self):
        """One mask for all steps of an utterance, after the norm; the first version has torch's."""
        front, x = small_front(dropout=0.5), randn(2, 60, 8)
        torch.manual_seed(1)
        y, _ = front.train()(x, torch.tensor([60, 60]))
        dropped = (y == 0).all(dim=1)
        assert torch.equal((y == 0).any(dim=1), dropped) and 0 < dropped.sum() < 10
        front.eval()
        rows = ~dropped
        torch.testing.assert_close(y.transpose(1, 2)[rows], 2 * front(x, torch.tensor([60, 60]))[0].transpose(1, 2)[rows])

    def test_eight_decisions(self, monkeypatch):
        """Five balancers, two whiteners, and the limiter of the norm."""
        count = draws(monkeypatch, 0.999)
        small_front().train()(randn(1, 15, 8), torch.tensor([15]))
        assert len(count) == 8
        count.clear()
        small_front(FirstConv2dSubsampling).train()(randn(1, 15, 8))
        assert len(count) == 6  # three balancers: the counter, and whether to act


def plain_convnext(module, x):
    y = F.conv2d(x, module.depthwise_conv.weight, module.depthwise_conv.bias, padding="same", groups=x.shape[1])
    y = swoosh_l(torch.einsum("hc,bctf->bhtf", module.pointwise_conv1.weight[:, :, 0, 0], y) + module.pointwise_conv1.bias[:, None, None])
    return x + torch.einsum("ch,bhtf->bctf", module.pointwise_conv2.weight[:, :, 0, 0], y) + module.pointwise_conv2.bias[:, None, None]


def metric_of_channels(y):
    """The whitening metric, with the channels on axis 1."""
    values = torch.linalg.eigvalsh(torch.cov(y.transpose(0, 1).flatten(1)))
    return values.square().mean() / values.mean().square()


class TestConvNeXt:
    @pytest.mark.parametrize("kernel_size", [(7, 7), (3, 5), (1, 3), (5, 1)])
    def test_plain_composition(self, kernel_size):
        module, x = loud(ConvNeXt(3, hidden_ratio=2, kernel_size=kernel_size)).eval(), randn(2, 3, 9, 6)
        torch.testing.assert_close(module(x), plain_convnext(module, x))

    def test_layerdrop(self):
        """Whole utterances lose the branch; the others keep it as it is; no gradient reaches it from those that lost it."""
        torch.manual_seed(0)
        module, x = loud(ConvNeXt(2, kernel_size=(3, 3), layerdrop_rate=0.3)), randn(200, 2, 3, 3)
        with torch.no_grad():
            y = module.train()(x)
            kept = module.eval()(x)
        without = (y == x).flatten(1).all(dim=1)
        torch.testing.assert_close(y[~without], kept[~without])
        assert without.double().mean().item() == pytest.approx(0.3, abs=4.5 * (0.3 * 0.7 / 200) ** 0.5)
        torch.manual_seed(0)
        gone = loud(ConvNeXt(2, kernel_size=(3, 3), layerdrop_rate=1.0))
        gone(x[:3]).sum().backward()
        assert not gone.depthwise_conv.weight.grad.any()

    def test_layerdrop_follows_its_schedule(self):
        module, x = loud(ConvNeXt(2, kernel_size=(3, 3))), randn(300, 2, 3, 3)
        for step, rate in ((0, 0.2), (20000, 0.015)):
            set_batch_count(module, step)
            assert float(module.layerdrop_rate) == pytest.approx(rate)
        with torch.no_grad():
            set_batch_count(module, 0)
            assert 0.08 < (module(x) == x).flatten(1).all(dim=1).double().mean() < 0.32
            before = torch.get_rng_state()
            torch.testing.assert_close(module.eval()(x), plain_convnext(module, x))
            assert torch.equal(torch.get_rng_state(), before)

    def test_whitening_is_over_the_channels(self, monkeypatch):
        """As many channels as frames and bands, so that only the axis decides."""
        module, x, g = loud(ConvNeXt(4, kernel_size=(3, 3), layerdrop_rate=0.0)), randn(2, 4, 4, 4), randn(2, 4, 4, 4, seed=1)
        del module.out_balancer.prob, module.hidden_balancer.prob  # schedules are modules, and torch does not let a number take their place
        module.hidden_balancer.prob = module.out_balancer.prob = 0.0
        module.out_whiten.whitening_limit = 1.0
        module.activation.eval()
        draws(monkeypatch, 0.0)
        x = x.requires_grad_()
        y = plain_convnext(module, x)
        (hint,) = torch.autograd.grad(metric_of_channels(y), y, retain_graph=True)
        nudged = g + hint * (0.01 * g.norm() / hint.norm())
        torch.testing.assert_close(torch.autograd.grad(module(x), x, g)[0], torch.autograd.grad(y, x, nudged)[0])

    @pytest.mark.parametrize("kernel_size", [(7, 7), (3, 5), (1, 3)])
    @pytest.mark.parametrize("step", [1, 2, 5])
    def test_streaming_equals_offline(self, kernel_size, step):
        """Each chunk brings the frames ahead; what comes out ends that much earlier."""
        module, x, ahead = loud(ConvNeXt(3, kernel_size=kernel_size)).eval(), randn(2, 3, 20 + kernel_size[0] // 2, 6), kernel_size[0] // 2
        with torch.no_grad():
            whole = module(x)
            state, pieces = torch.zeros(2, 3, ahead, 6, dtype=torch.float64), []
            for start in range(0, 20, step):
                y, state = module.streaming_forward(x[:, :, start : start + step + ahead], state)
                assert y.shape[2] == step and state.shape[2] == ahead
                pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, dim=2), whole[:, :, :20])


class TestStreamingFrontEnd:
    @pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 8, 16, 24])
    def test_equals_offline(self, chunk):
        """Chunks of 2c + 13 frames, c steps each; the last three steps of the whole have no right context."""
        front, n_steps = small_front().eval(), 48 // chunk * chunk
        x = randn(2, 2 * n_steps + 13, 8)
        with torch.no_grad():
            whole, lengths = front(x, torch.tensor([x.shape[1]] * 2))
            assert lengths.tolist() == [n_steps + 3] * 2
            state, pieces = front.get_init_states(batch_size=2).double(), []
            for start in range(0, 2 * n_steps, 2 * chunk):
                piece = x[:, start : start + 2 * chunk + 13]
                y, out_lens, state = front.streaming_forward(piece, torch.tensor([piece.shape[1]] * 2), state)
                assert out_lens.tolist() == [chunk] * 2 and y.shape[1] == chunk and state.shape == (2, 4, 3, 1)
                pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole[:, :n_steps])

    def test_state_matters(self):
        front, x = small_front().eval(), randn(1, 21, 8)
        lengths = torch.tensor([21])
        zero = front.get_init_states()
        one, _, state = front.streaming_forward(x, lengths, zero.double())
        two, _, _ = front.streaming_forward(x, lengths, state)
        assert zero.shape == (1, 4, 3, 1) and not zero.any() and not torch.allclose(one, two)

    @pytest.mark.parametrize("n", [3, 9, 13, 14])
    def test_too_short_a_chunk(self, n):
        front = small_front().eval()
        with pytest.raises(ValueError, match=f"a chunk of {n} frames leaves no step; one step needs 15"):
            front.streaming_forward(randn(1, n, 8), torch.tensor([n]), front.get_init_states().double())
