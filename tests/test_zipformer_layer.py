"""The Zipformer's layer: names, sizes and schedules by hand; what chance leaves out; who sees whom; streams; 16 bits; a task."""
import copy
import io
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from speechlearn.optim import ScaledAdam
from speechlearn.zipformer.attention import CompactRelPositionalEncoding
from speechlearn.zipformer.layer import Zipformer2EncoderLayer
from speechlearn.zipformer.scaling import ScheduledFloat, set_batch_count
from zipformer_tools import frames, shaken

SIZES = dict(embed_dim=12, pos_dim=8, num_heads=2, query_head_dim=5, pos_head_dim=3, value_head_dim=4, feedforward_dim=16, cnn_module_kernel=5)
RATES = ["attention_skip_rate", "conv_skip_rate", "const_attention_rate", "ff2_skip_rate", "ff3_skip_rate", "bypass_skip_rate"]
CALM = dict.fromkeys(RATES, 0.0) | {"dropout": 0.0}
# What each kind of skipping switches off: modules whose last projection is set to zero instead.
SKIPS = {
    "attention_skip_rate": ["nonlin_attention", "self_attn1", "self_attn2"],
    "conv_skip_rate": ["conv_module1", "conv_module2"],
    "ff2_skip_rate": ["feed_forward2"],
    "ff3_skip_rate": ["feed_forward3"],
}


def made(**changes):
    torch.manual_seed(0)
    return shaken(Zipformer2EncoderLayer(**SIZES | changes))


def positions(x, left=0):
    return CompactRelPositionalEncoding(8, dropout_rate=0.0)(x, left)


def run(layer, x, **kwargs):
    return layer(x, positions(x), **kwargs)


@pytest.fixture
def no_branches(monkeypatch):
    """No balancer, whitener, limiter or constant attention acts."""
    monkeypatch.setattr(random, "random", lambda: 0.999999)


def without(layer, modules):
    """The layer, with modules that give zero."""
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for name in modules:
            for parameter in getattr(other, name).out_proj.parameters():
                parameter.zero_()
    return other


def expected_shapes(d, h, q, p, v, F, K, P, causal):
    """Names and shapes of section 23 of the specification."""
    H = 3 * d // 4
    shapes = {"bypass_scale": (d,), "bypass.bypass_scale": (d,), "bypass_mid.bypass_scale": (d,), "norm.log_scale": (), "norm.bias": (d,), "self_attn_weights.linear_pos.weight": (h * p, P)}

    def linear(name, a, b):
        shapes.update({f"{name}.weight": (b, a), f"{name}.bias": (b,)})

    linear("self_attn_weights.in_proj", d, h * (2 * q + p))
    for i in (1, 2):
        linear(f"self_attn{i}.in_proj", d, h * v)
        linear(f"self_attn{i}.out_proj", h * v, d)
        linear(f"conv_module{i}.in_proj", d, 2 * d)
        linear(f"conv_module{i}.out_proj", d, d)
        conv = f"conv_module{i}.depthwise_conv"
        if causal:
            shapes.update({f"{conv}.chunkwise_conv_scale": (2, d, K), f"{conv}.causal_conv.weight": (d, 1, (K + 1) // 2), f"{conv}.causal_conv.bias": (d,)})
            conv += ".chunkwise_conv"
        shapes.update({f"{conv}.weight": (d, 1, K), f"{conv}.bias": (d,)})
    for i, f in enumerate((3 * F // 4, F, 5 * F // 4), 1):
        linear(f"feed_forward{i}.in_proj", d, f)
        linear(f"feed_forward{i}.out_proj", f, d)
    linear("nonlin_attention.in_proj", d, 3 * H)
    linear("nonlin_attention.out_proj", H, d)
    return shapes


def formula(d, h, q, p, v, F, K, P, causal):
    """The count of section 22."""
    H = 3 * d // 4
    c = d * ((K + 1) // 2 + 1) + d * (K + 1) + 2 * d * K if causal else d * (K + 1)
    return (
        (d + 1) * h * (2 * q + p) + P * h * p + 2 * ((d + 1) * h * v + (h * v + 1) * d) + sum((d + 1) * f + (f + 1) * d for f in (3 * F // 4, F, 5 * F // 4))
        + 3 * (d + 1) * H + (H + 1) * d + 2 * (2 * d * (d + 1) + c + d * (d + 1)) + 3 * d + d + 1
    )


class TestParameters:
    @settings(max_examples=30, deadline=None)
    @given(st.integers(2, 40), st.integers(1, 5), st.integers(1, 9), st.integers(1, 5), st.integers(1, 9), st.integers(4, 50), st.integers(0, 8), st.integers(1, 20), st.booleans())
    def test_names_shapes_and_count(self, d, h, q, p, v, F, half_kernel, P, causal):
        with torch.device("meta"):
            layer = Zipformer2EncoderLayer(d, P, h, q, p, v, F, cnn_module_kernel=2 * half_kernel + 1, causal=causal)
        sizes = (d, h, q, p, v, F, 2 * half_kernel + 1, P, causal)
        assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == expected_shapes(*sizes)
        assert sum(parameter.numel() for parameter in layer.parameters()) == formula(*sizes)
        assert not list(layer.buffers())

    def test_start(self):
        torch.manual_seed(0)
        layer = Zipformer2EncoderLayer(**SIZES)
        for scale in (layer.bypass_scale, layer.bypass.bypass_scale, layer.bypass_mid.bypass_scale):
            assert torch.equal(scale, torch.full((12,), 0.5))
        assert layer.norm.log_scale.item() == 1.0
        assert layer.self_attn1.out_proj.weight.abs().max() < 0.05 and layer.nonlin_attention.out_proj.weight.abs().max() < 0.05

    @pytest.mark.parametrize("training", [True, False])
    def test_every_parameter_but_one_has_a_gradient(self, training, no_branches):
        layer = made(causal=True).train(training)
        run(layer, frames(9, 2), chunk_size=3).square().sum().backward()
        assert [name for name, p in layer.named_parameters() if p.grad is None] == ["bypass_scale"]
        assert [name for name, p in layer.named_parameters() if p.grad is not None and not p.grad.any()] == []

    def test_the_layers_own_scale_is_used_by_nothing(self):
        layer, x = made().eval(), frames(7)
        before = run(layer, x)
        with torch.no_grad():
            layer.bypass_scale.fill_(float("nan"))
        assert torch.equal(run(layer, x), before)

    def test_save_and_load(self):
        layer, x = made().eval(), frames(7, 2)
        stored = io.BytesIO()
        torch.save(layer.state_dict(), stored)
        stored.seek(0)
        other = Zipformer2EncoderLayer(**SIZES).double().eval()
        assert not torch.allclose(run(other, x), run(layer, x))
        other.load_state_dict(torch.load(stored, weights_only=True), strict=True)
        assert torch.equal(run(other, x), run(layer, x))
        with pytest.raises(RuntimeError, match="conv_module1.depthwise_conv.causal_conv"):
            Zipformer2EncoderLayer(**SIZES, causal=True).load_state_dict(layer.state_dict(), strict=True)

    @pytest.mark.parametrize("kernel", [4, 0])
    def test_even_kernels_are_refused(self, kernel):
        with pytest.raises(ValueError, match=f"{kernel}"):
            Zipformer2EncoderLayer(**SIZES | {"cnn_module_kernel": kernel})


class TestSchedules:
    # By hand: between the points of the schedules straight lines.
    BY_HAND = {
        "attention_skip_rate": {0: 0.2, 2000: 0.125, 4000: 0.05, 10_000: 0.025, 16_000: 0.0, 10**6: 0.0},
        "conv_skip_rate": {0: 0.2, 2000: 0.125, 4000: 0.05, 10_000: 0.025, 16_000: 0.0, 10**6: 0.0},
        "const_attention_rate": {0: 0.25, 2000: 0.1375, 4000: 0.025, 10**6: 0.025},
        "ff2_skip_rate": {0: 0.1, 2000: 0.055, 4000: 0.01, 27_000: 0.005, 50_000: 0.0},
        "ff3_skip_rate": {0: 0.1, 2000: 0.055, 4000: 0.01, 27_000: 0.005, 50_000: 0.0},
        "bypass.skip_rate": {0: 0.5, 2000: 0.26, 4000: 0.02, 10**6: 0.02},
    }

    @pytest.mark.parametrize("name", BY_HAND)
    def test_rates_by_hand(self, name):
        layer = Zipformer2EncoderLayer(**SIZES)
        rate = layer.get_submodule(name)
        assert float(rate) == 0.0, "no step is known"
        for count, expected in self.BY_HAND[name].items():
            set_batch_count(layer, count)
            assert float(rate) == pytest.approx(expected, abs=1e-12), count
        set_batch_count(layer, 0)
        layer.eval()
        assert float(rate) == 0.0

    @pytest.mark.parametrize(
        "name, bounds, start, end, prob",
        [
            ("balancer1", (0.45, 0.55), (0.2, 4.0), (0.2, 4.0), None), ("balancer2", (0.45, 0.55), (0.1, 4.0), (0.1, 4.0), None), ("balancer_na", (0.3, 0.7), (0.004, 100.0), (0.02, 100.0), 0.05),
            ("balancer_ff2", (0.3, 0.7), (0.0, 2.0), (0.1, 2.0), 0.05), ("balancer_ff3", (0.3, 0.7), (0.0, 4.0), (0.2, 4.0), 0.05),
        ],
    )
    def test_balancers(self, name, bounds, start, end, prob):
        layer = Zipformer2EncoderLayer(**SIZES)
        balancer = getattr(layer, name)
        assert (float(balancer.min_positive), float(balancer.max_positive)) == bounds and balancer.channel_dim in (-1, 2)
        for count, expected in ((0, start), (4000, end), (2000, tuple((a + b) / 2 for a, b in zip(start, end)))):
            set_batch_count(layer, count)
            assert (float(balancer.min_abs), float(balancer.max_abs)) == pytest.approx(expected), count
        if prob is not None:
            assert float(balancer.prob) == prob
        else:  # the schedule of all balancers, chapter 18
            set_batch_count(layer, 0)
            early = float(balancer.prob)
            set_batch_count(layer, 10**6)
            assert early > float(balancer.prob) > 0.05

    def test_whitener(self):
        layer = Zipformer2EncoderLayer(**SIZES)
        assert float(layer.whiten.whitening_limit) == 4.0
        for count, expected in ((0, 4.0), (10_000, 8.0), (20_000, 12.0)):
            set_batch_count(layer, count)
            assert float(layer.whiten.whitening_limit) == expected
        assert (layer.whiten.min_prob, layer.whiten.max_prob, layer.whiten.grad_scale, layer.whiten.num_groups) == (0.025, 0.25, 0.01, 1)

    def test_layers_do_not_share_schedules(self):
        one, two = Zipformer2EncoderLayer(**SIZES), Zipformer2EncoderLayer(**SIZES)
        third = copy.deepcopy(one)
        schedules = [{id(m) for m in layer.modules() if isinstance(m, ScheduledFloat)} for layer in (one, two, third)]
        assert len(schedules[0]) == len(schedules[2]) > 10 and not (schedules[0] & schedules[1] | schedules[0] & schedules[2])
        set_batch_count(one, 0)
        assert float(one.conv_skip_rate) == 0.2 and float(two.conv_skip_rate) == float(third.conv_skip_rate) == 0.0
        assert all(m.batch_count is None for layer in (two, third) for m in layer.modules() if isinstance(m, ScheduledFloat))

    @pytest.mark.parametrize("name", RATES)
    def test_given_schedules_are_copied(self, name):
        given = ScheduledFloat((0.0, 0.7), (10.0, 0.1))
        layer = Zipformer2EncoderLayer(**SIZES | {name: given})
        mine = layer.bypass.skip_rate if name == "bypass_skip_rate" else getattr(layer, name)
        assert mine is not given and mine.schedule == given.schedule
        set_batch_count(layer, 5)
        assert float(mine) == pytest.approx(0.4) and given.batch_count is None

    def test_dropout_of_all_feed_forwards(self):
        layer = Zipformer2EncoderLayer(**SIZES | {"dropout": ScheduledFloat((0.0, 0.3), (20_000.0, 0.1))})
        set_batch_count(layer, 10_000)
        for module in (layer.feed_forward1, layer.feed_forward2, layer.feed_forward3):
            assert float(module.out_proj.dropout_p) == pytest.approx(0.2)
        assert float(layer.self_attn_weights.dropout.p if hasattr(layer.self_attn_weights.dropout, "p") else layer.self_attn_weights.dropout) == 0.0


class TestSkipping:
    @pytest.mark.parametrize("rate", SKIPS)
    def test_always(self, rate, no_branches):
        """At a rate of 1 the layer is one whose modules give zero; and not otherwise."""
        x = frames(8, 3)
        layer = made(**CALM | {rate: 1.0}).train()
        whole, hollow = made(**CALM).train(), without(made(**CALM), SKIPS[rate]).train()
        torch.testing.assert_close(run(layer, x), run(hollow, x))
        assert (run(layer, x) - run(whole, x)).abs().max() > 0.01
        torch.testing.assert_close(run(layer.eval(), x), run(whole.eval(), x))

    @pytest.mark.parametrize("rate", SKIPS)
    def test_whole_utterances_without_rescaling(self, rate, no_branches):
        """Each utterance is left whole, or goes without; nothing else happens to it."""
        x = frames(6, 200)
        y = run(made(**CALM | {rate: 0.3}).train(), x)
        whole, hollow = run(made(**CALM).train(), x), run(without(made(**CALM), SKIPS[rate]).train(), x)
        is_whole, is_hollow = ((y - other).abs().amax(dim=(0, 2)) < 1e-10 for other in (whole, hollow))
        assert not (is_whole & is_hollow).any()
        if rate == "conv_skip_rate":  # two draws: some lose only one of the two
            neither = ~(is_whole | is_hollow)
            assert is_hollow.sum() < neither.sum() < is_whole.sum()
            one = run(without(made(**CALM), ["conv_module1"]).train(), x), run(without(made(**CALM), ["conv_module2"]).train(), x)
            gaps = torch.stack([(y - other).abs().amax(dim=(0, 2)) for other in one])
            assert gaps.amin(dim=0)[neither].max() < 1e-10
            assert is_whole.float().mean().item() == pytest.approx(0.49, abs=0.15)
        else:
            assert (is_whole | is_hollow).all(), "the users of the weights must share one mask"
            assert is_hollow.float().mean().item() == pytest.approx(0.3, abs=0.13)  # 4 standard errors

    def test_past_the_whole_layer(self, no_branches):
        x = frames(6, 5)
        assert torch.equal(run(made(**CALM | {"bypass_skip_rate": 1.0}).train(), x), x)

    def test_the_first_feed_forward_is_never_skipped(self, no_branches):
        x = frames(6, 5)
        layer = made(**CALM | dict.fromkeys(["attention_skip_rate", "conv_skip_rate", "ff2_skip_rate", "ff3_skip_rate"], 1.0)).train()
        assert (run(layer, x) - run(without(layer, ["feed_forward1"]), x)).abs().max() > 0.01

    def test_order_and_shapes_of_the_draws(self, monkeypatch, no_branches):
        """As section 13 has it: each feed-forward draws its dropout when it is called; F is 16."""
        shapes, true_rand = [], torch.rand

        def noted(*shape, **kwargs):
            shapes.append(tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape)
            return true_rand(*shape, **kwargs)

        monkeypatch.setattr(torch, "rand", noted)
        layer, mask = made().train(), (3, 1)
        set_batch_count(layer, 0)
        set_of = lambda n: (1, 3, n)
        run(layer, frames(6, 3))
        assert shapes == [set_of(12), mask, mask, set_of(16), mask, mask, set_of(20), mask, mask]
        shapes.clear()
        calm = made(**CALM).train()
        run(calm, frames(6, 3))
        assert shapes == []

    @pytest.mark.parametrize("rate, training", [(0.5, False), (0.0, True), (ScheduledFloat((0.0, 0.5)), True)])
    def test_no_mask(self, rate, training):
        before = torch.get_rng_state()
        assert made().train(training).sequence_mask(frames(4, 3), rate) is None
        assert torch.equal(torch.get_rng_state(), before)

    def test_mask(self):
        torch.manual_seed(0)
        mask = made().train().sequence_mask(frames(2, 10_000), 0.3)
        assert mask.shape == (10_000, 1) and mask.dtype == torch.float64 and set(mask.flatten().tolist()) == {0.0, 1.0}
        assert mask.mean().item() == pytest.approx(0.7, abs=0.02)


class TestConstantAttention:
    def weights_seen(self, layer, x, **kwargs):
        """What the attention module gives, and what NonlinAttention gets."""
        found = []
        hooks = [layer.self_attn_weights.register_forward_hook(lambda m, a, out: found.append(out)), layer.nonlin_attention.register_forward_pre_hook(lambda m, a: found.append(a[1]))]
        run(layer, x, **kwargs)
        for hook in hooks:
            hook.remove()
        return found

    def test_equal_weights_for_what_may_be_seen(self):
        layer, x = made(**CALM | {"const_attention_rate": 1.0}).train(), frames(6, 2)
        hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
        padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
        _, seen = self.weights_seen(layer, x, attn_mask=hidden, src_key_padding_mask=padding)
        expected = torch.zeros(1, 2, 6, 6, dtype=torch.float64)
        for i in range(6):
            expected[0, 0, i, : i + 1] = 1 / (i + 1)
            expected[0, 1, i, : min(i + 1, 4)] = 1 / min(i + 1, 4)
        torch.testing.assert_close(seen, expected)

    @pytest.mark.parametrize("rate, training", [(1.0, False), (0.0, True)])
    def test_otherwise_head_0(self, rate, training):
        weights, seen = self.weights_seen(made(**CALM | {"const_attention_rate": rate}).train(training), frames(6, 2))
        assert torch.equal(seen, weights[:1]) and not torch.equal(seen, weights[1:])

    def test_how_often(self, monkeypatch):
        layer, weights = made(**CALM | {"const_attention_rate": 0.25}).train(), torch.tensor([[[[0.75, 0.25]]]])
        draws = [i / 100 for i in range(100)]
        monkeypatch.setattr(random, "random", lambda: draws.pop(0))
        constant = [layer._first_head(weights)[0, 0, 0, 0].item() == 0.5 for _ in range(100)]
        assert constant == [True] * 25 + [False] * 75

    def test_self_attention_keeps_its_weights(self, no_branches, monkeypatch):
        layer, found = made(**CALM | {"const_attention_rate": 1.0}).train(), []
        monkeypatch.setattr(random, "random", lambda: 0.5)
        layer.self_attn_weights.register_forward_hook(lambda m, a, out: found.append(out))
        for module in (layer.self_attn1, layer.self_attn2):
            module.register_forward_pre_hook(lambda m, a: found.append(a[1]))
        run(layer, frames(6, 2))
        assert found[0].shape[0] == 2 and found[1] is found[0] and found[2] is found[0]


class TestSteps:
    def test_against_a_sum_of_parts(self):
        """The twelve steps of the table, written out."""
        layer, src = made().eval(), frames(7, 2)
        weights = layer.self_attn_weights(src, pos_emb=positions(src))
        x = src + layer.feed_forward1(src)
        x = x + layer.nonlin_attention(x, weights[:1])
        x = x + layer.self_attn1(x, weights)
        x = x + layer.conv_module1(x)
        x = x + layer.feed_forward2(x)
        x = src + layer.bypass_mid.bypass_scale * (x - src)
        x = x + layer.self_attn2(x, weights)
        x = x + layer.conv_module2(x)
        x = x + layer.feed_forward3(x)
        y = x * layer.norm.log_scale.exp() / (x - layer.norm.bias).square().mean(dim=2, keepdim=True).sqrt()
        torch.testing.assert_close(run(layer, src), src + layer.bypass.bypass_scale * (y - src))

    def test_order_of_the_parts(self):
        """With the balancers, which change no output."""
        layer, called = made().train(), []
        for name, module in layer.named_children():
            module.register_forward_hook(lambda module, args, out, name=name: called.append(name))
        run(layer, frames(5, 2))
        assert called == (
            "self_attn_weights feed_forward1 nonlin_attention balancer_na self_attn1 conv_module1 feed_forward2 balancer_ff2 bypass_mid "
            "self_attn2 conv_module2 feed_forward3 balancer_ff3 balancer1 norm bypass balancer2 whiten"
        ).split()

    def test_evaluation_draws_nothing(self, monkeypatch):
        layer, x = made().eval(), frames(7, 2)
        set_batch_count(layer, 0)
        forbidden = lambda *args, **kwargs: pytest.fail("a draw in evaluation")
        for owner, name in ((random, "random"), (random, "choice"), (torch, "rand"), (torch, "rand_like"), (torch, "bernoulli")):
            monkeypatch.setattr(owner, name, forbidden)
        before = torch.get_rng_state()
        one, two = run(layer, x.requires_grad_()), run(layer, x)
        one.sum().backward()
        assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), before)

    def test_batch_equals_single(self):
        layer, x = made().eval(), frames(7, 4)
        y = run(layer, x)
        for i in range(4):
            torch.testing.assert_close(run(layer, x[:, i : i + 1]), y[:, i : i + 1])
        order = [2, 0, 3, 1]
        torch.testing.assert_close(run(layer, x[:, order]), y[:, order])

    @pytest.mark.parametrize("causal, chunk_size", [(False, -1), (True, -1), (True, 4)])
    def test_padding_is_never_seen(self, causal, chunk_size):
        layer, x = made(causal=causal).eval(), frames(12, 3).requires_grad_()
        if causal and chunk_size < 0:
            self.without_edges(layer)
        lengths = torch.tensor([12, 8, 4])
        padding = torch.arange(12) >= lengths[:, None]
        mask = None if chunk_size < 0 else torch.arange(12)[None] // 4 > torch.arange(12)[:, None] // 4
        y = run(layer, x, src_key_padding_mask=padding, chunk_size=chunk_size, attn_mask=mask)
        (grad,) = torch.autograd.grad(y[~padding.T].square().sum(), x)
        assert (grad[padding.T] == 0).all() and (grad[~padding.T] != 0).all()
        for i, n in enumerate(lengths):
            alone = run(layer, x[:n, i : i + 1], chunk_size=chunk_size, attn_mask=None if mask is None else mask[:n, :n])
            torch.testing.assert_close(y[:n, i : i + 1], alone)

    def without_edges(self, layer):
        with torch.no_grad():
            for module in (layer.conv_module1, layer.conv_module2):
                module.depthwise_conv.chunkwise_conv_scale.zero_()

    def test_without_chunks_a_causal_layer_sees_where_the_batch_ends(self):
        """As in the reference: all frames, with padding, are one chunk, and learnt factors stand at its edges. The values of the padding do not matter."""
        layer, x = made(causal=True).eval(), frames(12, 1)
        other, padding = x.clone(), torch.arange(12)[None] >= 8
        other[8:] = 100.0
        y, alone = run(layer, x, src_key_padding_mask=padding)[:8], run(layer, x[:8])
        assert torch.equal(run(layer, other, src_key_padding_mask=padding)[:8], y)
        assert (y - alone).abs().max() > 1e-3
        self.without_edges(layer)
        torch.testing.assert_close(run(layer, x, src_key_padding_mask=padding)[:8], run(layer, x[:8]))

    def test_chunks_need_a_causal_layer(self):
        with pytest.raises(ValueError, match="chunk_size.*4.*causal|causal.*chunk_size|causal"):
            run(made().eval(), frames(8), chunk_size=4)


def sees(n_frames, kernel, chunk_size, hidden):
    """Who depends on whom, by products of tables of 0 and 1: attention, attention, convolution, attention, convolution."""
    i, j = torch.arange(n_frames)[:, None], torch.arange(n_frames)[None]
    half, same = kernel // 2, (i // chunk_size == j // chunk_size)
    convolution = ((i - j >= 0) | same) & ((i - j).abs() <= half)
    attention = ~hidden | (i == j)
    table = torch.eye(n_frames)
    for step in (attention, attention, convolution, attention, convolution):
        table = (step.float() @ table).clamp(max=1)
    return table > 0


class TestWhoSeesWhom:
    @pytest.mark.parametrize("chunk_size, left_chunks", [(1, 2), (2, 0), (2, 1), (3, -1), (4, 1), (5, 0), (24, 0)])
    def test_the_gradient_against_a_table(self, chunk_size, left_chunks):
        """Zero exactly where nothing may be seen, and nowhere else."""
        n = 24
        layer, x = made(causal=True).eval(), frames(n).requires_grad_()
        number = torch.arange(n) // chunk_size
        hidden = number[None] > number[:, None]
        if left_chunks >= 0:
            hidden |= number[None] < number[:, None] - left_chunks
        y = run(layer, x, chunk_size=chunk_size, attn_mask=hidden)
        influence = torch.stack([torch.autograd.grad(frame.square().sum(), x, retain_graph=True)[0][:, 0].abs().amax(dim=1) for frame in y])
        expected = sees(n, 5, chunk_size, hidden)
        assert torch.equal(influence > 0, expected)
        assert not expected[number[:, None] < number[None]].any(), "later chunks"

    def test_everything_without_chunks(self):
        for causal in (True, False):
            x = frames(10).requires_grad_()
            y = run(made(causal=causal).eval(), x)
            for i in (0, 9):
                assert (torch.autograd.grad(y[i].square().sum(), x, retain_graph=True)[0] != 0).all()


class TestStreaming:
    def states(self, batch, left, kernel=5):
        shapes = (left, batch, 10), (1, batch, left, 9), (left, batch, 8), (left, batch, 8), (batch, 12, kernel // 2), (batch, 12, kernel // 2)
        return [torch.zeros(shape, dtype=torch.float64) for shape in shapes]

    @pytest.mark.parametrize("chunk_size, left, n_chunks, kernel", [(4, 8, 5, 5), (2, 2, 7, 5), (3, 9, 3, 7), (6, 6, 4, 9), (1, 4, 9, 5)])
    def test_chunk_by_chunk_equals_the_mask(self, chunk_size, left, n_chunks, kernel):
        layer, n = made(causal=True, cnn_module_kernel=kernel).eval(), chunk_size * n_chunks
        x, number = frames(n, 3), torch.arange(n) // chunk_size
        hidden = (number[None] > number[:, None]) | (number[None] < number[:, None] - left // chunk_size)
        whole = run(layer, x, chunk_size=chunk_size, attn_mask=hidden)
        states, pieces = self.states(3, left, kernel), []
        for k in range(n_chunks):
            chunk = x[k * chunk_size : (k + 1) * chunk_size]
            unseen = (k * chunk_size <= left - 1 - torch.arange(left)).expand(3, left)
            padding = torch.cat([unseen, torch.zeros(3, chunk_size, dtype=torch.bool)], dim=1)
            shapes = [state.shape for state in states]
            out, *states = layer.streaming_forward(chunk, positions(chunk, left), *states, left_context_len=left, src_key_padding_mask=padding)
            assert [state.shape for state in states] == shapes
            pieces.append(out)
        torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-10, rtol=0)

    def test_a_wrong_cache(self):
        layer, x = made(causal=True).eval(), frames(4)
        with pytest.raises(ValueError, match="the cache holds 8 frames.*left_context_len is 6"):
            layer.streaming_forward(x, positions(x, 6), *self.states(1, 8), left_context_len=6, src_key_padding_mask=torch.zeros(1, 10, dtype=torch.bool))


class TestTraining:
    @pytest.mark.parametrize("draw", [0.0, 0.999999])
    def test_sixteen_bits(self, draw, monkeypatch):
        """All balancers, whiteners and limiters act, or none."""
        torch.manual_seed(0)
        monkeypatch.setattr(random, "random", lambda: draw)
        layer, x = Zipformer2EncoderLayer(**SIZES, causal=True).train(), frames(12, 4).float().requires_grad_()
        set_batch_count(layer, 100)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = run(layer, x, chunk_size=4, src_key_padding_mask=torch.arange(12) >= torch.tensor([12, 8, 5, 1])[:, None])
            loss = y.float().square().mean()
        loss.backward()
        assert y.isfinite().all() and x.grad.isfinite().all() and x.grad.any()
        idle = {"bypass_scale"} | ({"self_attn_weights.linear_pos.weight"} if draw == 0.0 else set())  # positions are left out now and then, too
        for name, parameter in layer.named_parameters():
            assert name in idle or parameter.grad.isfinite().all() and parameter.grad.dtype == torch.float32, name

    def test_sixteen_bits_are_near_thirty_two(self):
        torch.manual_seed(0)
        layer, x = Zipformer2EncoderLayer(**SIZES).eval(), frames(12, 4).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = run(layer, x)
        wide = run(layer, x)
        assert 0 < (narrow - wide).abs().max() < 0.05 * wide.abs().max()

    def test_learns(self):
        """Which of four vectors came one frame ago? A frame alone does not tell."""
        torch.manual_seed(0), random.seed(0)
        layer, out, vectors = Zipformer2EncoderLayer(**SIZES), nn.Linear(12, 4), torch.randn(4, 12)
        model = nn.ModuleList([layer, out])
        optimiser = ScaledAdam(list(model.parameters()), lr=0.05, clipping_scale=2.0)
        losses = []
        for step in range(100):
            set_batch_count(model, 100.0 * step)
            labels = torch.randint(4, (20, 16))
            logits = out(run(layer, vectors[labels]))
            loss = nn.functional.cross_entropy(logits[1:].flatten(0, 1), labels[:-1].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert sum(losses[:5]) / 5 > 1.3  # ln 4 = 1.386
        assert sum(losses[-10:]) / 10 < 0.7
        assert layer.ff2_skip_rate.batch_count == 9900
