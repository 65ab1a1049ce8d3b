"""The first Zipformer: positions, attention and skipping against plain loops, schedules by hand, masks, wiring, names, sizes and gradients."""
import copy
import functools
import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from speechlearn.alignment.transducer import Decoder, Joiner
from speechlearn.zipformer.encoder import count_parameters
from speechlearn.zipformer.scaling import set_batch_count
from speechlearn.zipformer.v1 import (
    ConvolutionModule, DownsampledZipformerEncoder, FeedforwardModule, RelPositionalEncoding, RelPositionMultiheadAttention, Zipformer, ZipformerEncoder, ZipformerEncoderLayer,
    bypass_minimum, dynamic_dropout, first_zipformer_config, layer_drop_probability, layers_to_drop, skip_layers,
)
from zipformer_tools import randn

STORED = Path(__file__).parent / "golden" / "zipformer_v1" / "recipe_state_dict.json"
CHANNELS, ATTENTION, HEADS, POS = 10, 12, 2, 3  # head sizes: query 6, value 3, position 3
LAYER = dict(d_model=CHANNELS, attention_dim=ATTENTION, nhead=HEADS, feedforward_dim=14, dropout=0.1, cnn_module_kernel=5, pos_dim=POS)
TINY = dict(
    num_features=12, encoder_dims=(8, 10, 10, 12), attention_dim=(8, 8, 16, 8), encoder_unmasked_dims=(4, 6, 10, 8), zipformer_downsampling_factors=(1, 2, 4, 2), nhead=(2,) * 4, feedforward_dim=(12,) * 4,
    num_encoder_layers=(1, 2, 1, 1), cnn_module_kernels=(5, 3, 5, 3), pos_dim=3,
)


def lively(module, seed=0, scale=0.3):
    """In float64, with parameters that are not small, in evaluation."""
    module = module.double().eval()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.add_(randn(*parameter.shape, seed=1000 * seed + i, scale=scale if parameter.dim() else 0.1))
    return module


def drawing(monkeypatch, *values):
    """random.random() gives these numbers, one after the other; the list that comes back holds what is left."""
    left = list(values)
    monkeypatch.setattr(random, "random", lambda: left.pop(0))
    return left


def always(monkeypatch, value):
    monkeypatch.setattr(random, "random", lambda: value)


def positions(n_frames, dim=CHANNELS):
    return RelPositionalEncoding(dim, 0.0, max_len=n_frames).eval()(torch.zeros(n_frames, 1, 1, dtype=torch.float64))


def until(lengths, n_frames):
    return torch.arange(n_frames) >= torch.tensor(lengths)[:, None]


def plain_positions(n_frames, dim):
    rows = []
    for r in range(n_frames - 1, -n_frames, -1):
        row = []
        for k in range(dim // 2):
            angle = r * 10000 ** (-2 * k / dim)
            row += [math.sin(angle), math.cos(angle)]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


class TestPositions:
    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 12), st.integers(1, 9), st.lists(st.integers(1, 50), min_size=1, max_size=5))
    def test_equal_a_plain_loop_however_the_table_grew(self, half, max_len, calls):
        module = RelPositionalEncoding(2 * half, 0.0, max_len=max_len)
        for n_frames in calls:
            rows = module(torch.zeros(n_frames, 1, 1))
            assert rows.shape == (1, 2 * n_frames - 1, 2 * half)
            torch.testing.assert_close(rows[0].double(), plain_positions(n_frames, 2 * half), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_type_and_device_follow_x_and_leave_no_trace(self, dtype):
        module = RelPositionalEncoding(8, 0.0, max_len=4)
        exact = module(torch.zeros(4, 1, 1))
        rows = module(torch.zeros(4, 1, 1, dtype=dtype))
        assert rows.dtype == dtype and torch.equal(rows, exact.to(dtype))
        assert module(torch.zeros(9, 1, 1, device="meta", dtype=dtype)).device.type == "meta"
        assert torch.equal(module(torch.zeros(4, 1, 1)), exact), "16 bits and another device must not stay"

    def test_grown_in_16_bits_is_exact_afterwards(self):
        module = RelPositionalEncoding(8, 0.0, max_len=2)
        module(torch.zeros(30, 1, 1, dtype=torch.float16))
        torch.testing.assert_close(module(torch.zeros(30, 1, 1))[0].double(), plain_positions(30, 8), atol=1e-5, rtol=0)

    def test_a_table_that_grew_while_decoding_serves_training(self):
        module, layer = RelPositionalEncoding(8, 0.0, max_len=2), nn.Linear(8, 3)
        with torch.inference_mode():
            module(torch.zeros(20, 1, 1))
        layer(module(torch.zeros(20, 1, 1))).sum().backward()
        assert layer.weight.grad.isfinite().all()

    def test_made_where_the_default_device_has_no_numbers(self):
        with torch.device("meta"):
            module = RelPositionalEncoding(8, 0.0, max_len=3)
        torch.testing.assert_close(module(torch.zeros(3, 1, 1))[0].double(), plain_positions(3, 8), atol=1e-6, rtol=0)

    def test_not_in_the_state_dict(self):
        module = RelPositionalEncoding(8, 0.5)
        assert not module.state_dict() and not list(module.parameters()) and not list(module.buffers())

    def test_dropout_in_training_only(self):
        module = RelPositionalEncoding(8, 0.5, max_len=500)
        x, whole = torch.zeros(500, 1, 1), module.eval()(torch.zeros(500, 1, 1))
        torch.manual_seed(0)
        rows = module.train()(x)
        dropped = (rows == 0) & (whole != 0)
        assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.03)
        torch.testing.assert_close(rows[~dropped], 2 * whole[~dropped])


def make_attention(seed=0, heads=HEADS):
    torch.manual_seed(seed)
    return lively(RelPositionMultiheadAttention(CHANNELS, 6 * heads, heads, POS), seed)


def plain_heads(x, heads):
    return x.reshape(*x.shape[:-1], heads, -1)


def plain_attention(module, x, pos_emb, bias=0.0, hidden=None):
    """Output and weights from the formulas; bias and hidden: (batch, heads, queries, keys)."""
    T, N, h, A = len(x), x.shape[1], module.num_heads, module.attention_dim
    z = torch.einsum("tnc,oc->tno", x, module.in_proj.weight) + module.in_proj.bias
    q, k, v, p = (plain_heads(part, h) for part in (z[..., :A], z[..., A : 2 * A], z[..., 2 * A : 2 * A + A // 2], z[..., 2 * A + A // 2 :]))
    table = plain_heads(torch.einsum("oc,rc->ro", module.linear_pos.weight, pos_emb[0]), h)
    row = torch.tensor([[T - 1 - i + j for j in range(T)] for i in range(T)])
    scores = torch.einsum("inhd,jnhd->nhij", q, k) + torch.einsum("inhd,ijhd->nhij", p, table[row]) + bias
    allowed = torch.ones_like(scores, dtype=torch.bool) if hidden is None else ~hidden.expand_as(scores)
    scores = scores.masked_fill(~allowed, -1e30)
    exp = (scores - scores.amax(dim=-1, keepdim=True)).exp() * allowed
    w = exp / exp.sum(dim=-1, keepdim=True).clamp(min=1e-300)
    out = torch.einsum("nhij,jnhd->inhd", w, v).flatten(start_dim=2)
    return torch.einsum("tnc,oc->tno", out, module.out_proj.weight) + module.out_proj.bias, w.reshape(N * h, T, T)


def plain_second(module, x, w):
    v = plain_heads(torch.einsum("tnc,oc->tno", x, module.in_proj2.weight), module.num_heads)
    out = torch.einsum("nhij,jnhd->inhd", w.unflatten(0, (-1, module.num_heads)), v).flatten(start_dim=2)
    return torch.einsum("tnc,oc->tno", out, module.out_proj2.weight) + module.out_proj2.bias


class TestAttention:
    @settings(max_examples=50, deadline=None)
    @given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 3), st.sampled_from(["none", "bool", "bool each", "float", "float each"]), st.booleans(), st.integers(0, 10**6))
    def test_equal_the_formulas(self, T, N, heads, kind, padded, seed):
        module, x, pos_emb = make_attention(seed % 5, heads), randn(T, N, CHANNELS, seed=seed), randn(1, 2 * T - 1, CHANNELS, seed=seed + 1)
        draw = torch.Generator().manual_seed(seed)
        shape = (N * heads, T, T) if "each" in kind else (T, T)
        mask, bias, hidden = None, 0.0, None
        full = lambda m: m.reshape(N, heads, T, T) if m.dim() == 3 else m.expand(N, heads, T, T)
        if "bool" in kind:
            mask = torch.rand(shape, generator=draw) < 0.5
            hidden = full(mask)
        elif "float" in kind:
            mask = randn(*shape, seed=seed + 2)
            bias = full(mask)
        padding = until(torch.randint(1, T + 1, (N,), generator=draw).tolist(), T) if padded else None
        if padded:
            hidden = padding[:, None, None] | (False if hidden is None else hidden)
        out, w = module(x, pos_emb, key_padding_mask=padding, attn_mask=mask)
        expected, expected_w = plain_attention(module, x, pos_emb, bias, hidden)
        torch.testing.assert_close(w, expected_w, atol=1e-10, rtol=0)
        torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
        torch.testing.assert_close(module.forward2(2 * x, w), plain_second(module, 2 * x, expected_w), atol=1e-10, rtol=0)

    def test_gradients_equal_those_of_the_formulas(self):
        module, x, pos_emb = make_attention(), randn(5, 2, CHANNELS).requires_grad_(), randn(1, 9, CHANNELS, seed=1).requires_grad_()
        padding = until([3, 5], 5)
        wanted = [x, pos_emb, *module.parameters()]
        out, w = module(x, pos_emb, key_padding_mask=padding)
        ours = torch.autograd.grad((out * randn(*out.shape, seed=2)).sum() + module.forward2(x, w).square().sum(), wanted)
        out, w = plain_attention(module, x, pos_emb, hidden=padding[:, None, None])
        theirs = torch.autograd.grad((out * randn(*out.shape, seed=2)).sum() + plain_second(module, x, w).square().sum(), wanted)
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7)

    def test_bool_mask_equals_minus_infinity(self):
        module, x = make_attention(), randn(6, 2, CHANNELS)
        mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
        added = torch.zeros(6, 6, dtype=torch.float64).masked_fill(mask, -math.inf)
        torch.testing.assert_close(module(x, positions(6), attn_mask=mask), module(x, positions(6), attn_mask=added))

    @pytest.mark.parametrize("how", ["padding", "mask", "both"])
    def test_rows_without_a_key(self, how):
        """Zeros, finite, and no gradient through them."""
        module, x = make_attention(), randn(5, 2, CHANNELS).requires_grad_()
        padding = torch.tensor([[False] * 5, [True] * 5]) if how != "mask" else None
        mask = torch.zeros(5, 5, dtype=torch.bool)
        mask[2] = True
        mask = mask if how != "padding" else None
        with torch.no_grad():
            module.in_proj2.weight.zero_()  # forward2 sees weights only
        out, w = module(x, positions(5), key_padding_mask=padding, attn_mask=mask)
        assert out.isfinite().all()
        if how != "mask":
            assert (w[HEADS:] == 0).all()
            torch.testing.assert_close(out[:, 1], module.out_proj.bias.expand(5, -1))
        if how != "padding":
            assert (w[:, 2] == 0).all()
        (w * randn(*w.shape)).sum().backward()
        assert x.grad.isfinite().all() and x.grad[:, 0].abs().max() > 0
        assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
        if how != "mask":
            assert (x.grad[:, 1] == 0).all()

    def test_the_second_use_has_gradients_into_the_weights(self):
        module, x = make_attention(), randn(4, 2, CHANNELS)
        _, w = module(x, positions(4))
        names = ["in_proj.weight", "linear_pos.weight", "in_proj2.weight", "out_proj2.weight"]
        grads = dict(zip(names, torch.autograd.grad(module.forward2(x, w).square().sum(), [module.get_parameter(n) for n in names])))
        A = ATTENTION
        assert all(g.abs().max() > 0 for g in grads.values())
        values = slice(2 * A, 2 * A + A // 2)
        assert (grads["in_proj.weight"][values] == 0).all() and grads["in_proj.weight"][:A].abs().max() > 0 and grads["in_proj.weight"][values.stop :].abs().max() > 0
        w = w.detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda weights: module.forward2(x, weights), (w,))

    def test_second_use_ignores_the_first_values_and_queries(self):
        module, x = make_attention(), randn(4, 2, CHANNELS)
        w = randn(2 * HEADS, 4, 4).softmax(dim=-1)
        before = module.forward2(x, w)
        nn.init.zeros_(module.in_proj.weight)
        nn.init.zeros_(module.out_proj.weight)
        assert torch.equal(module.forward2(x, w), before) and not torch.allclose(module.forward2(x, w.flip(-1)), before)

    def test_row_is_the_offset_query_minus_key(self):
        """With one position query for all and no content, only the row of offset i − j counts."""
        module = make_attention(heads=1)
        with torch.no_grad():
            module.in_proj.weight.zero_()
            module.in_proj.bias.zero_()
            module.in_proj.bias[-POS:] = 1
            module.linear_pos.weight.zero_()
            module.linear_pos.weight[:, 0] = 1 / POS
        pos_emb = torch.zeros(1, 9, CHANNELS, dtype=torch.float64)
        pos_emb[0, 4 - 2, 0] = 30  # rows run from offset 4 down, so this is offset 2
        w = module(randn(5, 1, CHANNELS), pos_emb)[1][0]
        assert [w[i].argmax().item() for i in (2, 3, 4)] == [0, 1, 2] and w[2, 0] > 0.999
        torch.testing.assert_close(w[:2], torch.full((2, 5), 0.2, dtype=torch.float64))

    def test_dropout_on_the_weights_in_training(self, monkeypatch):
        always(monkeypatch, 0.99)
        module = make_attention()
        module.dropout = 0.5
        x = randn(30, 1, CHANNELS)
        whole = module(x, positions(30))[1]
        torch.manual_seed(0)
        w = module.train()(x, positions(30))[1]
        assert (w == 0).double().mean().item() == pytest.approx(0.5, abs=0.05)
        torch.testing.assert_close(w[w != 0], 2 * whole[w != 0])

    def test_initial_sizes(self):
        torch.manual_seed(0)
        module = RelPositionMultiheadAttention(64, 32, 2, 4)
        for layer, inputs, scale in ((module.in_proj, 64, 16**-0.25), (module.linear_pos, 64, 0.05), (module.out_proj, 16, 0.05), (module.in_proj2, 64, 1.0), (module.out_proj2, 16, 0.05)):
            assert 0.9 < layer.weight.abs().max().item() / (scale * inputs**-0.5) <= 1
        assert module.linear_pos.bias is None and module.in_proj2.bias is None

    @pytest.mark.parametrize("attention_dim, heads", [(10, 4), (6, 2), (9, 3)])
    def test_refused(self, attention_dim, heads):
        with pytest.raises(ValueError, match=rf"attention_dim \({attention_dim}\) must be an even number for each of the {heads} heads"):
            RelPositionMultiheadAttention(8, attention_dim, heads, 4)


def test_odd_sizes_are_refused():
    with pytest.raises(ValueError, match="d_model is 7; pairs of sine and cosine need an even number"):
        RelPositionalEncoding(7, 0.0)
    with pytest.raises(ValueError, match="kernel_size is 4; an odd one has a middle"):
        ConvolutionModule(8, 4)


class TestModules:
    def test_feed_forward_is_its_formula(self):
        module, x = lively(FeedforwardModule(CHANNELS, 7, 0.5)), randn(3, 2, CHANNELS)
        z = x @ module.in_proj.weight.T + module.in_proj.bias
        torch.testing.assert_close(module(x), (z * (z - 1).sigmoid()) @ module.out_proj.weight.T + module.out_proj.bias)

    @pytest.mark.parametrize("bias", [True, False])
    def test_convolution_is_a_loop(self, bias):
        module, x, padding = lively(ConvolutionModule(CHANNELS, 5, bias=bias)), randn(7, 2, CHANNELS), until([7, 4], 7)
        b = lambda layer: layer.bias if bias else 0.0
        z = x @ module.pointwise_conv1.weight[..., 0].T + b(module.pointwise_conv1)
        gated = (z[..., :CHANNELS] * z[..., CHANNELS:].sigmoid()) * ~padding.T[..., None]
        expected = torch.zeros_like(gated)
        for t in range(7):
            for k in range(5):
                if 0 <= t + k - 2 < 7:
                    expected[t] += gated[t + k - 2] * module.depthwise_conv.weight[:, 0, k]
        expected = expected + b(module.depthwise_conv)
        expected = (expected * (expected - 1).sigmoid()) @ module.pointwise_conv2.weight[..., 0].T + b(module.pointwise_conv2)
        torch.testing.assert_close(module(x, src_key_padding_mask=padding), expected)


def make_layer(seed=0, **changes):
    torch.manual_seed(seed)
    return lively(ZipformerEncoderLayer(**LAYER | changes), seed)


def only_layer_draws(layer):
    """Training for the layer itself, evaluation for its parts, so that nothing else draws."""
    layer.eval()
    layer.training = True
    return layer


def by_steps(layer, src, pos_emb, use=(True,) * 4, b=None, padding=None):
    """The layer, step by step, with chosen steps 2, 3, 4, 7."""
    pooling, attention, conv1, conv2 = use
    x = src + layer.feed_forward1(src)
    if pooling:
        x = x + layer.pooling(x, key_padding_mask=padding)
    if attention:
        a, w = layer.self_attn(x, pos_emb, key_padding_mask=padding)
        x = x + a
    if conv1:
        x = x + layer.conv_module1(x, src_key_padding_mask=padding)
    x = x + layer.feed_forward2(x)
    if attention:
        x = x + layer.self_attn.forward2(x, w)
    if conv2:
        x = x + layer.conv_module2(x, src_key_padding_mask=padding)
    x = x + layer.feed_forward3(x)
    x = x * (x.square().mean(dim=-1, keepdim=True) + layer.norm_final.eps.exp()) ** -0.5
    b = layer.bypass_scale if b is None else b
    return (1 - b) * src + b * x


class TestLayer:
    def test_the_steps_in_evaluation(self):
        layer, x, padding = make_layer(), randn(6, 2, CHANNELS), until([6, 4], 6)
        torch.testing.assert_close(layer(x, positions(6), src_key_padding_mask=padding), by_steps(layer, x, positions(6), padding=padding))

    @pytest.mark.parametrize("use", [(a, b, c, d) for a in (True, False) for b in (True, False) for c in (True, False) for d in (True, False)])
    def test_which_modules_run(self, use, monkeypatch):
        layer, x, ran = only_layer_draws(make_layer()), randn(6, 2, CHANNELS), []
        expected = by_steps(layer, x, positions(6), use, b=0.8).detach()
        with torch.no_grad():
            layer.bypass_scale.fill_(0.8)
        for name in ("pooling", "self_attn", "conv_module1", "conv_module2", "feed_forward1", "feed_forward2", "feed_forward3"):
            layer.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
        monkeypatch.setattr(layer.self_attn, "forward2", lambda *args, kept=layer.self_attn.forward2: (ran.append("again"), kept(*args))[1])
        left = drawing(monkeypatch, *(0.2 if u else 0.199 for u in use), 0.5)
        layer.batch_count = 2000
        out = layer(x, positions(6))
        assert left == [], "four draws for the modules, one for the bypass"
        pooling, attention, conv1, conv2 = use
        wanted = ["feed_forward1", *["pooling"] * pooling, *["self_attn"] * attention, *["conv_module1"] * conv1, "feed_forward2", *["again"] * attention, *["conv_module2"] * conv2, "feed_forward3"]
        assert ran == wanted
        torch.testing.assert_close(out, expected)

    def test_nothing_is_left_out_after_batch_2000_or_in_evaluation(self, monkeypatch):
        layer, x = only_layer_draws(make_layer()), randn(5, 1, CHANNELS)
        with torch.no_grad():
            layer.bypass_scale.fill_(0.8)
        always(monkeypatch, 0.0)
        layer.batch_count = 2001
        torch.testing.assert_close(layer(x, positions(5)), by_steps(layer, x, positions(5)))
        layer.eval()
        layer.batch_count = 0
        drawing(monkeypatch)  # a draw would fail
        torch.testing.assert_close(layer(x, positions(5)), by_steps(layer, x, positions(5)))

    def test_how_often_modules_are_left_out(self):
        layer, x, ran = only_layer_draws(make_layer()), randn(2, 1, CHANNELS), []
        layer.pooling.register_forward_hook(lambda *_: ran.append(1))
        random.seed(0)
        with torch.no_grad():
            for _ in range(600):
                layer(x, positions(2))
        assert len(ran) / 600 == pytest.approx(0.8, abs=0.05)

    @settings(max_examples=15, deadline=None)
    @given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 10**6))
    def test_padding_never_changes_real_frames(self, length, n_padding, seed):
        layer = make_layer(seed % 3)
        x = randn(length + n_padding, 2, CHANNELS, seed=seed)
        x[length:, 0] = 100 * randn(n_padding, CHANNELS, seed=seed + 1)
        together = layer(x, positions(len(x)), src_key_padding_mask=until([length, len(x)], len(x)))
        torch.testing.assert_close(together[:length, :1], layer(x[:length, :1], positions(length)), rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("learnt, draw, count, expected", [(0.5, 0.5, 0, 0.75), (0.5, 0.0999, 0, 0.5), (0.5, 0.1, 0, 0.75), (0.5, 0.5, 10000, 0.5), (0.3, 0.5, 20000, 0.3), (0.1, 0.5, 50000, 0.25), (1.4, 0.5, 0, 1.0), (1.4, 0.05, 0, 1.4), (0.9, 0.5, 0, 0.9)])
    def test_bypass_scale(self, learnt, draw, count, expected, monkeypatch):
        layer = make_layer().train()
        with torch.no_grad():
            layer.bypass_scale.fill_(learnt)
        layer.batch_count = count
        always(monkeypatch, draw)
        scale = layer.get_bypass_scale()
        assert scale.item() == pytest.approx(expected, abs=1e-12)
        gradient = torch.autograd.grad(scale, layer.bypass_scale, allow_unused=True)[0]
        assert gradient.item() == float(learnt == expected), "clamped: no gradient"
        drawing(monkeypatch)
        assert layer.eval().get_bypass_scale().item() == learnt

    def test_bypass_goes_back_to_the_input(self):
        layer, x = make_layer(), randn(4, 1, CHANNELS)
        with torch.no_grad():
            layer.bypass_scale.zero_()
            torch.testing.assert_close(layer(x, positions(4)), x)
            layer.bypass_scale.fill_(1)
            torch.testing.assert_close(layer(x, positions(4)), by_steps(layer, x, positions(4), b=1.0))

    def test_settings_of_balancers_and_whiteners(self):
        """The table of the recipe: channel axis, shares of positive values, largest mean size, least probability; groups, limit, probabilities, strength."""
        layer = ZipformerEncoderLayer(**LAYER)
        get = lambda name: (lambda b: (b.channel_dim, b.min_positive, b.max_positive, b.min_abs, b.max_abs, b.min_prob, b.num_channels))(layer.get_submodule(name))
        for i in (1, 2, 3):
            assert get(f"feed_forward{i}.balancer") == (-1, 0.05, 0.95, 0.2, 10.0, 0.25, 14)
        for i in (1, 2):
            assert get(f"conv_module{i}.deriv_balancer1") == (1, 0.05, 1.0, 0.2, 10.0, 0.1, 2 * CHANNELS) and get(f"conv_module{i}.deriv_balancer2") == (1, 0.05, 1.0, 0.2, 20.0, 0.1, CHANNELS)
        assert get("balancer") == (-1, 0.45, 0.55, 0.2, 6.0, 0.1, CHANNELS)
        for name, expected in {**dict.fromkeys(("self_attn.whiten_keys", "self_attn.whiten_values", "self_attn.whiten_values2"), (HEADS, 2.0, 0.025, 0.25, 0.025)), "whiten": (1, 5.0, 0.025, 0.25, 0.01)}.items():
            w = layer.get_submodule(name)
            assert (w.num_groups, w.whitening_limit, w.min_prob, w.max_prob, w.grad_scale) == expected

    def test_deterministic_in_evaluation(self):
        layer, x = make_layer(), randn(6, 2, CHANNELS)
        torch.manual_seed(1), random.seed(1)
        first = layer(x, positions(6))
        torch.manual_seed(2), random.seed(2)
        assert torch.equal(layer(x, positions(6)), first)


class TestSchedules:
    def test_by_hand(self):
        assert [bypass_minimum(t) for t in (0, 4000, 10000, 20000, 30000)] == pytest.approx([0.75, 0.65, 0.5, 0.25, 0.25])
        assert [dynamic_dropout(t) for t in (0, 1, 1999, 2000, 2001, 10**6)] == [0.2, 0.2, 0.2, 0.2, 0.0, 0.0]

    def test_skip_dropout(self):
        with torch.device("meta"):
            model = Zipformer(**TINY, warmup_batches=4000)
        found = []
        for t in (0, 1000, 2000, 4000, 9000):
            set_batch_count(model, t)
            found.append(model.skip_dropout())
        assert found == pytest.approx([0.5, 0.38125, 0.2625, 0.025, 0.025])

    def test_layer_drop(self):
        """Stack 0 of the recipe: two layers, from 4000/6 to 8000/6."""
        begin, middle, end = 4000 / 6, 1000.0, 8000 / 6
        assert layer_drop_probability(0, begin, middle) == 0 and layer_drop_probability(1, begin, middle) == 0.5 == layer_drop_probability(begin, begin, middle)
        assert layer_drop_probability(middle, begin, middle) == pytest.approx(0.35) and layer_drop_probability(end, middle, end) == pytest.approx(0.3875)
        assert layer_drop_probability(math.nextafter(end, 1e9), middle, end) == 0.05

    def test_intervals_of_the_published_model(self):
        n_layers, begin = (2, 4, 3, 2, 4), 4000 / 6
        for i, (stack, n) in enumerate(zip(published().encoders, n_layers, strict=True)):
            layers = getattr(stack, "encoder", stack).layers
            ends = [begin * (i + 1) + begin * k / n for k in range(n + 1)]
            assert [layer.warmup_begin for layer in layers] == pytest.approx(ends[:-1]) and [layer.warmup_end for layer in layers] == pytest.approx(ends[1:])


intervals = st.integers(1, 6).flatmap(lambda n: st.tuples(st.floats(1, 3000), st.floats(1, 3000)).map(lambda be: [(be[0] + i * be[1] / n, be[0] + (i + 1) * be[1] / n) for i in range(n)]))


class TestLayersToDrop:
    @settings(max_examples=150, deadline=None)
    @given(st.integers(0, 8000), st.integers(0, 999), st.integers(0, 10**7), st.integers(0, 10**7), intervals)
    def test_properties(self, t, module_seed, seed, other, warmups):
        dropped = layers_to_drop(t, module_seed, seed, warmups)
        assert dropped <= set(range(len(warmups)))
        total = sum(layer_drop_probability(t, *interval) for interval in warmups)
        assert math.floor(total) <= len(dropped) <= math.ceil(total) <= len(warmups)
        assert layers_to_drop(t, module_seed, seed, warmups) == dropped
        assert len(layers_to_drop(t, module_seed, other, warmups)) == len(dropped), "how many is the same on all machines"
        assert layers_to_drop(0, module_seed, seed, warmups) == set()

    def test_the_number_is_right_on_average(self):
        warmups = [(500, 750), (750, 1000), (1000, 1250)]
        for t in (100, 900, 1100, 5000):
            total = sum(layer_drop_probability(t, *interval) for interval in warmups)
            mean = sum(len(layers_to_drop(t, seed, 0, warmups)) for seed in range(4000)) / 4000
            assert mean == pytest.approx(total, abs=0.03)

    def test_machines_choose_on_their_own_and_later_layers_go_more_often(self):
        warmups = [(10, 20), (5000, 6000), (5000, 6000)]  # 0.05, 0.5, 0.5
        chosen = [layers_to_drop(1000, 3, seed, warmups) for seed in range(600)]
        assert len({frozenset(c) for c in chosen}) > 1 and len({len(c) for c in chosen}) == 1
        often = [sum(i in c for c in chosen) / 600 for i in range(3)]
        assert often[0] < 0.5 * min(often[1:])

    def test_seeds_leave_the_global_generator_alone(self, monkeypatch):
        # Not by its state: the run-time checks of types look at items of lists by chance, and draw them with `random.getrandbits`.
        for name in ("random", "randint", "choice", "shuffle", "seed"):
            monkeypatch.setattr(random, name, lambda *args, **kwargs: pytest.fail("a draw from the global generator"))
        assert layers_to_drop(100, 1, 2, [(500, 700)] * 3)


class Add(nn.Module):
    """In place of a layer: adds its number; d_model is what a stack asks for."""

    def __init__(self, number=1.0):
        super().__init__()
        self.d_model, self.number, self.seen = CHANNELS, number, []

    def forward(self, x, pos_emb, src_mask=None, src_key_padding_mask=None):
        self.seen.append((src_mask, src_key_padding_mask))
        return x + self.number


class TestStack:
    def stack(self, n=3, layer=None):
        torch.manual_seed(0)
        stack = ZipformerEncoder(layer or ZipformerEncoderLayer(**LAYER), n, 0.1, 500, 1500)
        for i, each in enumerate(stack.layers):
            each.number = 10.0**i
        return stack

    def test_layers_start_equal_and_are_their_own(self):
        given = ZipformerEncoderLayer(**LAYER)
        stack = self.stack(layer=given)
        for layer in stack.layers:
            assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), given.state_dict().values(), strict=True))
        assert len({id(p) for p in (*given.parameters(), *stack.parameters())}) == 4 * len(list(given.parameters()))

    def test_module_seed_is_one_draw_and_not_saved(self):
        torch.manual_seed(5)
        expected = int(torch.randint(0, 1000, ()))
        after = torch.rand(())
        layer = Add()
        torch.manual_seed(5)
        stack = ZipformerEncoder(layer, 2, 0.0, 0, 1)
        assert stack.module_seed == expected and torch.rand(()) == after and not stack.state_dict()

    def test_dropped_layers_are_passed_by(self, monkeypatch):
        stack, x = self.stack(layer=Add()).train(), torch.zeros(4, 1, CHANNELS)
        for dropped in (set(), {0}, {1, 2}, {0, 1, 2}):
            monkeypatch.setattr(stack, "get_layers_to_drop", lambda seed: dropped)
            assert (stack(x) == sum(10.0**i for i in range(3) if i not in dropped)).all()

    def test_seed_of_the_drop(self, monkeypatch):
        stack, seeds = self.stack(layer=Add()), []
        monkeypatch.setattr(random, "randint", lambda low, high: high if low == 0 else None)
        monkeypatch.setattr(stack, "get_layers_to_drop", lambda seed: seeds.append(seed) or set())
        for mode in (True, False):
            stack.train(mode)(torch.zeros(4, 3, CHANNELS))
        assert seeds == [4 * 3 * CHANNELS + 1000] * 2

    def test_drops_in_training_only_and_as_the_function_says(self):
        stack = self.stack(layer=Add())
        stack.batch_count = 100
        warmups = [(layer.warmup_begin, layer.warmup_end) for layer in stack.layers]
        assert [stack.train().get_layers_to_drop(s) for s in range(9)] == [layers_to_drop(100, stack.module_seed, s, warmups) for s in range(9)]
        assert any(stack.get_layers_to_drop(s) for s in range(9)) and not any(stack.eval().get_layers_to_drop(s) for s in range(9))

    def test_feature_mask_before_and_after_every_layer(self):
        stack = self.stack(n=2, layer=Add()).eval()
        mask = torch.full((4, 1, CHANNELS), 0.5)
        assert (stack(torch.full((4, 2, CHANNELS), 8.0), feature_mask=mask) == ((8 * 0.5 + 1) * 0.5 + 10) * 0.5).all()

    def test_masks_are_handed_on(self):
        stack, mask, padding = self.stack(layer=Add()).eval(), torch.zeros(4, 4), torch.zeros(1, 4, dtype=torch.bool)
        stack(torch.zeros(4, 1, CHANNELS), mask=mask, src_key_padding_mask=padding)
        assert all(layer.seen[0][0] is mask and layer.seen[0][1] is padding for layer in stack.layers)


class TestDownsampledStack:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 13), st.sampled_from([2, 3, 4]), st.sampled_from([6, CHANNELS]), st.integers(0, 10**6))
    def test_by_hand(self, T, ds, before, seed):
        """Windows of frames, the layers at the low rate, every frame repeated, and a mean of input and result."""
        torch.manual_seed(seed % 3)
        inner = ZipformerEncoder(ZipformerEncoderLayer(**LAYER), 2, 0.0, 0, 1)
        module, x = lively(DownsampledZipformerEncoder(inner, before, CHANNELS, ds), seed % 3), randn(T, 2, before, seed=seed)
        low = -(-T // ds)
        padding, mask = until([low, max(1, low - 1)], low), torch.ones(T, T, dtype=torch.bool).triu(1)
        thin = torch.tensor([[bool(mask[i * ds, j * ds]) for j in range(low)] for i in range(low)])
        frames = torch.cat([x] + [x[-1:]] * (low * ds - T))
        y = []
        for k in range(low):
            window = frames[k * ds : (k + 1) * ds]
            weights = (window @ module.downsample.query).softmax(dim=0)
            mean = torch.einsum("sn,snc->nc", weights, window)
            extra = [window.transpose(0, 1).flatten(1) @ module.downsample.extra_proj.weight.T] if before < CHANNELS else []
            y.append(torch.cat([mean, *extra], dim=-1))
        y = inner(torch.stack(y), mask=thin, src_key_padding_mask=padding)
        y = torch.stack([y[t // ds] + module.upsample.bias[t % ds] for t in range(T)])
        w = module.out_combiner.weight1
        expected = w * torch.cat([x, x.new_zeros(T, 2, CHANNELS - before)], dim=-1) + (1 - w) * y
        torch.testing.assert_close(module(x, mask=mask, src_key_padding_mask=padding), expected)

    def test_starts_as_the_processed_version_alone(self):
        torch.manual_seed(0)
        module = DownsampledZipformerEncoder(ZipformerEncoder(ZipformerEncoderLayer(**LAYER), 1, 0.0, 0, 1), CHANNELS, CHANNELS, 2)
        assert module.out_combiner.weight1.item() == 0 and module.out_combiner.min_weight == (0.0, 0.25)


class TestSkipLayers:
    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.sampled_from([1, 2, 3, 4, 8]), max_size=9))
    def test_equals_a_slow_search(self, factors):
        expected = []
        for i in range(len(factors)):
            fits = [j for j in range(i - 1) if factors[j] <= factors[i]]
            expected.append(None if i < 2 or factors[i - 1] <= factors[i] else max(fits, default=0))
        assert skip_layers(factors) == expected

    def test_by_hand(self):
        assert skip_layers([1, 2, 4, 8, 2]) == [None, None, None, None, 1]
        assert skip_layers([8, 4, 2, 1]) == [None, None, 0, 0], "without a fitting stack: the first"


@functools.cache
def published():
    with torch.device("meta"):
        return Zipformer(**first_zipformer_config())


class TestPublishedModel:
    def test_counts(self):
        model = published()
        assert count_parameters(model.encoder_embed) == 973_680
        assert [count_parameters(stack) for stack in model.encoders] == [7_486_724, 14_974_601, 18_319_111, 12_214_917, 14_974_601]
        assert count_parameters(model.skip_modules) == 1 and count_parameters(model.downsample_output) == 384
        assert count_parameters(model) == 68_944_019

    def test_counts_of_a_layer(self):
        narrow, wide = published().encoders[0].layers[0], published().encoders[2].encoder.layers[0]
        assert (count_parameters(narrow), count_parameters(wide)) == (3_743_362, 6_105_730)
        parts = narrow.self_attn, narrow.pooling, narrow.feed_forward1, narrow.conv_module1, narrow.norm_final
        assert [count_parameters(part) for part in parts] == [320_768, 147_456, 787_840, 455_808, 1] and narrow.bypass_scale.numel() == 1

    def test_defaults_of_the_class(self):
        with torch.device("meta"):
            assert count_parameters(Zipformer(80)) == 135_703_586

    @settings(max_examples=15, deadline=None)
    @given(st.integers(2, 12), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 20), st.integers(0, 3))
    def test_formula(self, half, heads, half_head, P, ff, half_kernel):
        d, A, H, K = 2 * half, 2 * half_head * heads, heads, 2 * half_kernel + 1
        layer = ZipformerEncoderLayer(d, A, H, ff, 0.1, K, P)
        attention = d * (2.5 * A + 2 * H * P) + 2.5 * A + H * P + 1.5 * A * d + 2 * d
        assert count_parameters(layer) == attention + d**2 + 3 * (2 * d * ff + ff + d) + 2 * (3 * d**2 + d * K + 4 * d) + 2

    def test_names_shapes_and_types_of_the_whole_transducer(self):
        stored = json.loads(STORED.read_text(encoding="utf-8"))
        with torch.device("meta"):
            heads = {"decoder": Decoder(500, 512, 0, 2), "joiner": Joiner(384, 512, 512, 500), "simple_am_proj": nn.Linear(384, 500), "simple_lm_proj": nn.Linear(512, 500)}
        model = nn.ModuleDict({"encoder": published(), **heads})
        ours = {name: [list(value.shape), str(value.dtype).removeprefix("torch.")] for name, value in model.state_dict().items()}
        assert len(ours) == 682 and ours == stored["state_dict"]
        assert [count_parameters(part) for part in heads.values()] == [260_096, 716_276, 192_500, 256_500]
        assert count_parameters(model) == stored["parameters"] == 70_369_391
        assert count_parameters(model) + count_parameters(nn.Linear(384, 500)) == 70_561_891, "with a CTC head"


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    return lively(Zipformer(**TINY | changes), seed, scale=0.15)


def features(*lengths, seed=1):
    return randn(len(lengths), max(lengths), 12, seed=seed), torch.tensor(lengths)


class TestWhole:
    @settings(max_examples=20, deadline=None)
    @given(st.lists(st.integers(9, 80), min_size=1, max_size=4))
    def test_lengths(self, lengths):
        x, x_lens = features(*lengths)
        with torch.no_grad():
            out, out_lens = tiny()(x, x_lens)
        expected = [-(-((n - 7) // 2) // 2) for n in lengths]
        assert out_lens.tolist() == expected and out.shape == (len(lengths), max(expected), 12) and out.isfinite().all()

    def test_ten_seconds(self):
        with torch.device("meta"):
            model = published()
            assert model.downsample_output(torch.zeros(496, 1, 384)).shape == (248, 1, 384)
        _, lengths = tiny()(*features(1000, 80))
        assert lengths.tolist() == [248, 18]

    def test_padding_is_inert_where_windows_are_full(self):
        """24 frames inside, a multiple of the largest factor, 4; and how much padding follows does not matter."""
        model, (x, _) = tiny(), features(120, 120)
        alone, _ = model(x[:1, :55], torch.tensor([55]))
        for longest in (57, 80, 120):
            out, lengths = model(x[:, :longest], torch.tensor([55, longest]))
            assert lengths[0] == 12
            torch.testing.assert_close(out[0, :12], alone[0], atol=1e-9, rtol=0)

    def test_padding_leaks_where_they_are_not(self):
        """As in the reference: 27 frames inside leave a window of three frames and one of padding."""
        model, (x, _) = tiny(), features(120, 120)
        alone, _ = model(x[:1, :61], torch.tensor([61]))
        outs = [model(x[:, :longest], torch.tensor([61, longest]))[0][0, :14] for longest in (80, 120)]
        assert (outs[0] - alone[0])[-1].abs().max() > 1e-4, "the leak is part of the model"
        torch.testing.assert_close(outs[0], outs[1], atol=1e-9, rtol=0)

    def test_deterministic_in_evaluation(self):
        model, batch = tiny(), features(60, 45)
        random.seed(1), torch.manual_seed(1)
        first = model(*batch)[0]
        random.seed(2), torch.manual_seed(2)
        assert torch.equal(model(*batch)[0], first)
        assert torch.equal(copy.deepcopy(model)(*batch)[0], first)

    def test_stacks_and_shortcuts_are_wired_as_said(self):
        """The forward pass again, from the modules."""
        model, (x, x_lens) = tiny(), features(60, 41)
        inside = (x_lens - 7) // 2
        y = model.encoder_embed(x).transpose(0, 1)
        padding = until(inside.tolist(), len(y))
        a = model.encoders[0](y, src_key_padding_mask=padding)
        b = model.encoders[1](a, src_key_padding_mask=padding[:, ::2])
        c = model.encoders[2](b, src_key_padding_mask=padding[:, ::4])
        w = model.skip_modules[3].weight1
        d = model.encoders[3](w * b + (1 - w) * c, src_key_padding_mask=padding[:, ::2])
        assert model.skip_layers == [None, None, None, 1] and w.abs() > 1e-3
        torch.testing.assert_close(model(x, x_lens)[0], model.downsample_output(d).transpose(0, 1))

    @pytest.mark.parametrize("count, draw, used", [(0, 0.5, False), (0, 0.51, True), (2000, 0.2624, False), (2000, 0.2626, True), (4000, 0.025, False), (4000, 0.026, True), (9000, 0.024, False)])
    def test_a_shortcut_is_left_out_by_chance_in_training(self, count, draw, used, monkeypatch):
        model, ran = tiny(), []
        set_batch_count(model, count)
        model.training = True  # its modules stay in evaluation and draw nothing
        model.skip_modules[3].register_forward_hook(lambda *_: ran.append(1))
        left = drawing(monkeypatch, draw)
        model(*features(40))
        assert bool(ran) == used and left == []
        ran.clear()
        model.eval()
        model(*features(40))
        assert ran == [1], "always at recognition"

    def test_every_parameter_learns(self, monkeypatch):
        model = tiny().train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bypass_scale"):
                    parameter.fill_(0.85)  # inside its range
                if name.endswith("weight1"):
                    parameter.fill_(0.3)
        always(monkeypatch, 0.99)
        torch.manual_seed(0)
        out, _ = model(*features(70, 50))
        (out * randn(*out.shape)).sum().backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
        assert not missing and all(p.grad.isfinite().all() for p in model.parameters())

    def test_trains_with_real_draws(self):
        torch.manual_seed(0), random.seed(0)
        model = Zipformer(**TINY).train()
        touched = set()
        for step in range(12):
            set_batch_count(model, 300 * step)
            x, x_lens = features(50, 33, seed=step)
            model.zero_grad()
            out, _ = model(x.float(), x_lens)
            assert out.isfinite().all()
            out.square().sum().backward()
            touched |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
            assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        missing = {name for name, _ in model.named_parameters()} - touched
        assert all(name.endswith("bypass_scale") for name in missing), "0.5 is below its lower end in most calls, and learns nothing then"

    def test_recognises_in_16_bits_after_inference_mode(self):
        model, (x, x_lens) = tiny().float(), features(60)
        with torch.inference_mode():
            exact = model(x.float(), x_lens)[0]
            rough = model.bfloat16()(x.bfloat16(), x_lens)[0]
        assert rough.dtype == torch.bfloat16 and (rough.float() - exact).abs().max() < 0.1 * exact.abs().max()
        out = model.float().train()(x.float(), x_lens)[0]
        out.sum().backward()

    def test_counts_are_told_to_every_schedule(self):
        model = tiny()
        set_batch_count(model, 77)
        kinds = (Zipformer, ZipformerEncoder, ZipformerEncoderLayer)
        assert [m.batch_count for m in model.modules() if isinstance(m, kinds)] == [77] * (1 + 4 + 5)

    @pytest.mark.parametrize(
        "changes, message",
        [
            (dict(nhead=(2, 2)), r"all lists need one entry for each stack.*\[4, 4, 4, 4, 2, 4, 4, 4\]"),
            ({k: v[:1] for k, v in TINY.items() if isinstance(v, tuple)}, "at least two stacks"),
            (dict(encoder_dims=(8, 12, 10, 12)), "widths must not fall"),
            (dict(encoder_unmasked_dims=(4, 6, 12, 8)), r"encoder_unmasked_dims \(4, 6, 12, 8\) must not exceed encoder_dims \(8, 10, 10, 12\)"),
            (dict(zipformer_downsampling_factors=(1, 1, 4, 2)), "stack 1 has the factor 1 and cannot change the width from 8 to 10"),
            (dict(attention_dim=(8, 8, 6, 8)), r"attention_dim \(6\)"), (dict(cnn_module_kernels=(5, 4, 5, 5)), "kernel_size is 4"), (dict(encoder_dims=(9, 10, 10, 12)), "d_model is 9"),
        ],
    )
    def test_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            Zipformer(**TINY | changes)

    def test_wrong_lengths(self):
        model, (x, _) = tiny(), features(60, 60)
        with pytest.raises(ValueError, match="the longest of x_lens is 50, but the features have 59 or 60 frames; cut the batch"):
            model(x, torch.tensor([50, 40]))
        with pytest.raises(ValueError, match="the longest of x_lens is 62"):
            model(x, torch.tensor([62, 40]))
        for n in (8, 3, 0):
            with pytest.raises(ValueError, match=f"utterance 1 of the batch has {n} frames"):  # nothing would be left of it, and the mean over its frames would be NaN
                model(x, torch.tensor([60, n]))
        assert model(x, torch.tensor([60, 9]))[0].isfinite().all()


class TestFeatureMasks:
    def model(self, factors=(1, 2, 4, 2)):
        with torch.device("meta"):
            return Zipformer(**TINY | dict(zipformer_downsampling_factors=factors)).train()

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 40), st.integers(1, 3), st.integers(0, 10**6))
    def test_slots_of_the_largest_factor(self, T, N, seed):
        model = self.model()
        torch.manual_seed(seed)
        masks = model.get_feature_masks(torch.zeros(T, N, 8, dtype=torch.float64))
        torch.manual_seed(seed)
        keep = (torch.rand(T + 3, N, 1) > 0.15).double()
        for mask, ds, dim, unmasked in zip(masks, (1, 2, 4, 2), TINY["encoder_dims"], TINY["encoder_unmasked_dims"], strict=True):
            assert mask.shape == (-(-T // ds), N, dim) and mask.dtype == torch.float64
            assert (mask[..., :unmasked] == 1).all(), "the first channels are never hidden"
            for t in range(len(mask)):
                assert (mask[t, :, unmasked:] == keep[t * ds // 4]).all(), "one draw for four frames, for all stacks"

    def test_how_often(self):
        torch.manual_seed(0)
        masks = self.model().get_feature_masks(torch.zeros(20_000, 1, 8))
        assert masks[0][..., -1].mean().item() == pytest.approx(0.85, abs=0.02)

    def test_none_in_evaluation(self):
        assert self.model().eval().get_feature_masks(torch.zeros(5, 1, 8)) == [1.0] * 4

    def test_hidden_channels_do_not_leave_their_stack(self, monkeypatch):
        model, seen = tiny(), {}
        for i, stack in enumerate(model.encoders):
            getattr(stack, "encoder", stack).register_forward_hook(lambda module, args, out, i=i: seen.update({i: out}))
        model.training = True
        always(monkeypatch, 0.99)
        monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.zeros(shape))
        model(*features(60))
        for i, (dim, unmasked) in enumerate(zip(TINY["encoder_dims"], TINY["encoder_unmasked_dims"])):
            assert (seen[i][..., unmasked:] == 0).all() and seen[i][..., :unmasked].abs().min() > 0
