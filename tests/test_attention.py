"""Attention: by hand, against torch, in batches, in steps, and where there is nothing to attend to."""
import math

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from speechlearn.data.batches import assert_batch_independent, is_padding
from speechlearn.transformer.attention import (
    Attention, KeyValueCache, causal_mask, fast_scaled_dot_product, padding_mask, plot_attention, recorded_attention, scaled_dot_product,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class TestMasks:
    def test_causal(self):
        assert causal_mask(3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
        assert causal_mask(1, 4).all() and causal_mask(1, 4).shape == (1, 4)
        assert torch.equal(causal_mask(2, 5), causal_mask(5)[3:])

    def test_fewer_keys_than_queries(self):
        with pytest.raises(ValueError, match="3 queries but only 2 keys"):
            causal_mask(3, 2)

    def test_padding(self):
        assert padding_mask(torch.tensor([2, 0]), 3)[:, 0, 0].tolist() == [[True, True, False], [False] * 3]


class TestScaledDotProduct:
    def test_by_hand(self):
        q, k = torch.tensor([[2.0 * math.sqrt(2), 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        v = torch.tensor([[10.0, 0.0], [0.0, 10.0], [5.0, 5.0]])
        answer, weights = scaled_dot_product(q, k, v)
        e = math.e**2
        expected = torch.tensor([e, 1.0, e]) / (2 * e + 1)
        assert torch.allclose(weights[0], expected, atol=1e-6)
        assert torch.allclose(answer[0], expected @ v, atol=1e-5)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.sampled_from(["none", "bool", "float", "causal"]), st.integers(0, 10**6))
    def test_equals_torch(self, batch, n_queries, n_keys, d_head, d_value, kind, seed):
        g = generator(seed)
        if kind == "causal":
            n_keys = n_queries
        q, k, v = (torch.randn(batch, 2, n, d, generator=g, dtype=torch.float64, requires_grad=True) for n, d in ((n_queries, d_head), (n_keys, d_head), (n_keys, d_value)))
        mask = {
            "none": None, "bool": torch.rand(batch, 1, n_queries, n_keys, generator=g) < 0.6, "float": torch.randn(n_queries, n_keys, generator=g, dtype=torch.float64),
            "causal": causal_mask(n_queries),
        }[kind]
        if kind == "bool":
            mask[..., 0] = True  # torch promises nothing for rows without a key
        theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        probe = torch.randn(theirs.shape, generator=g, dtype=torch.float64)
        expected = torch.autograd.grad((theirs * probe).sum(), (q, k, v))
        for ours in (scaled_dot_product(q, k, v, mask=mask)[0], fast_scaled_dot_product(q, k, v, mask=mask)):
            assert torch.allclose(ours, theirs, atol=1e-12)
            for a, b in zip(torch.autograd.grad((ours * probe).sum(), (q, k, v)), expected):
                assert torch.allclose(a, b, atol=1e-11)

    @pytest.mark.parametrize("function", [lambda *a, **k: scaled_dot_product(*a, **k)[0], fast_scaled_dot_product])
    @pytest.mark.parametrize("additive", [False, True])
    def test_nothing_to_attend_to_gives_zeros_and_finite_gradients(self, function, additive):
        q, k, v = (torch.randn(2, 3, 4, generator=generator(i), requires_grad=True) for i in range(3))
        allowed = torch.tensor([[True, True, False], [False, False, False], [True, False, True]])
        mask = torch.zeros(3, 3).masked_fill(~allowed, -math.inf) if additive else allowed
        result = function(q, k, v, mask=mask)
        assert not result[:, 1].any() and result[:, 0].any()
        for gradient in torch.autograd.grad(result.square().sum(), (q, k, v)):
            assert gradient.isfinite().all()
        rest = [0, 2]
        assert torch.allclose(result[:, rest], F.scaled_dot_product_attention(q[:, rest], k, v, attn_mask=allowed[rest]), atol=1e-6)

    def test_weights_sum_to_one_and_respect_the_mask(self):
        q, k, v = (torch.randn(2, 5, 4, generator=generator(i)) for i in range(3))
        _, weights = scaled_dot_product(q, k, v, mask=causal_mask(5))
        assert torch.allclose(weights.sum(-1), torch.ones(2, 5)) and not weights.triu(1).any()

    def test_gradcheck(self):
        inputs = [torch.randn(1, n, 3, generator=generator(n), dtype=torch.float64, requires_grad=True) for n in (2, 4, 4)]
        mask = torch.tensor([[True, False, True, True], [False, False, False, False]])
        assert torch.autograd.gradcheck(lambda *a: scaled_dot_product(*a, mask=mask)[0], inputs)

    def test_order_of_keys_does_not_matter(self):
        q, k, v = (torch.randn(1, 6, 4, generator=generator(i)) for i in range(3))
        order = torch.randperm(6, generator=generator(9))
        assert torch.allclose(scaled_dot_product(q, k, v)[0], scaled_dot_product(q, k[:, order], v[:, order])[0], atol=1e-6)

    @pytest.mark.parametrize("function", [scaled_dot_product, fast_scaled_dot_product])
    def test_wrong_masks(self, function):
        x = torch.randn(1, 3, 4, generator=generator())
        with pytest.raises(TypeError, match=r"dtype torch.int64; expected bool .*mask.bool\(\)"):
            function(x, x, x, mask=torch.ones(3, 3, dtype=torch.long))
        with pytest.raises(ValueError, match=r"\(queries, keys\) = \(3, 2\), but there are 3 queries and 3 keys"):
            function(x, x, x, mask=torch.ones(3, 2, dtype=torch.bool))

    def test_dropout_keeps_the_mean(self):
        torch.manual_seed(0)
        x = torch.ones(1, 1, 400, 4)
        dropped = torch.stack([scaled_dot_product(x, x, x, dropout=0.5)[0] for _ in range(50)])
        assert dropped.std() > 0.01 and dropped.mean() == pytest.approx(1.0, abs=0.02)
        weights = scaled_dot_product(x, x, x, dropout=0.5)[1]
        assert torch.allclose(weights, torch.full_like(weights, 1 / 400))  # the weights are those before dropout


def twin_of(attention):
    twin = nn.MultiheadAttention(attention.d_model, attention.n_heads, batch_first=True, bias=attention.output_bias is not None)
    with torch.no_grad():
        names = ("query", "key", "value")
        twin.in_proj_weight.copy_(torch.cat([rearrange(getattr(attention, f"{name}_weight"), "n e h -> (n h) e") for name in names]))
        twin.out_proj.weight.copy_(rearrange(attention.output_weight, "n h e -> e (n h)"))
        if attention.output_bias is not None:
            twin.in_proj_bias.copy_(torch.cat([getattr(attention, f"{name}_bias").flatten() for name in names]))
            twin.out_proj.bias.copy_(attention.output_bias)
    return twin


def made(d_model=16, n_heads=4, seed=0, **options):
    torch.manual_seed(seed)
    attention = Attention(d_model, n_heads, **options)
    for name, parameter in attention.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return attention


class TestAttention:
    @pytest.mark.parametrize("fast", [True, False])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("kind", ["self", "causal", "cross", "cross with padding", "other values"])
    def test_equals_torch_forward_and_backward(self, fast, bias, kind):
        ours = made(fast=fast, bias=bias)
        theirs = twin_of(ours)
        x, memory, values = (torch.randn(3, n, 16, generator=generator(n), requires_grad=True) for n in (5, 7, 7))
        lengths = torch.tensor([7, 4, 1])
        got, expected = {
            "self": lambda: (ours(x), theirs(x, x, x)[0]),
            "causal": lambda: (ours(x, mask=causal_mask(5)), theirs(x, x, x, attn_mask=~causal_mask(5))[0]),
            "cross": lambda: (ours(x, memory), theirs(x, memory, memory)[0]),
            "cross with padding": lambda: (ours(x, memory, mask=padding_mask(lengths)), theirs(x, memory, memory, key_padding_mask=is_padding(lengths))[0]),
            "other values": lambda: (ours(x, memory, values), theirs(x, memory, values)[0]),
        }[kind]()
        assert torch.allclose(got, expected, atol=1e-6)
        probe = torch.randn(got.shape, generator=generator(1))
        inputs = [x] + ([memory] if kind not in ("self", "causal") else []) + ([values] if kind == "other values" else [])
        for a, b in zip(torch.autograd.grad((got * probe).sum(), inputs, retain_graph=True), torch.autograd.grad((expected * probe).sum(), inputs, retain_graph=True)):
            assert torch.allclose(a, b, atol=1e-5)
        (weight,) = torch.autograd.grad((got * probe).sum(), ours.key_weight, retain_graph=True)
        (theirs_weight,) = torch.autograd.grad((expected * probe).sum(), theirs.in_proj_weight)
        assert torch.allclose(rearrange(weight, "n e h -> (n h) e"), theirs_weight[16:32], atol=1e-5)

    def test_equals_the_einsum_that_spells_it_out(self):
        attention = made(d_model=12, n_heads=2, d_head=5, bias=False)
        x = torch.randn(2, 4, 12, generator=generator())
        q, k, v = (torch.einsum("b s e, n e h -> b s n h", x, getattr(attention, f"{name}_weight")) for name in ("query", "key", "value"))
        weights = (torch.einsum("b q n h, b k n h -> b n q k", q, k) / 5**0.5).softmax(-1)
        expected = torch.einsum("b q n h, n h e -> b q e", torch.einsum("b n q k, b k n h -> b q n h", weights, v), attention.output_weight)
        assert torch.allclose(attention(x), expected, atol=1e-6)
        assert torch.allclose(attention.weights(x), weights, atol=1e-6)

    def test_batch_independence(self):
        attention = made()
        assert_batch_independent(lambda x, n: (attention(x, mask=padding_mask(n, x.shape[1])), n), torch.randn(3, 9, 16, generator=generator()), torch.tensor([9, 5, 1]))

    def test_a_later_position_never_changes_an_earlier_answer(self):
        attention = made()
        x = torch.randn(1, 6, 16, generator=generator())
        changed = x.clone()
        changed[:, 4] += 10
        a, b = (attention(y, mask=causal_mask(6)) for y in (x, changed))
        assert torch.equal(a[:, :4], b[:, :4]) and not torch.allclose(a[:, 4:], b[:, 4:])

    @pytest.mark.parametrize("sizes", [[1] * 6, [3, 1, 2]])
    def test_cache_of_self_attention(self, sizes):
        attention, cache = made(), KeyValueCache()
        x = torch.randn(2, 6, 16, generator=generator())
        pieces, done = [], 0
        for size in sizes:
            pieces.append(attention(x[:, done : done + size], mask=causal_mask(size, done + size), cache=cache))
            done += size
        assert len(cache) == 6
        assert torch.allclose(torch.cat(pieces, 1), attention(x, mask=causal_mask(6)), atol=1e-6)

    def test_cache_of_cross_attention_is_filled_once(self):
        attention, cache = made(), KeyValueCache()
        x, memory = torch.randn(2, 3, 16, generator=generator()), torch.randn(2, 5, 16, generator=generator(1))
        first = attention(x[:, :1], memory, cache=cache)
        keys = cache.keys
        second = attention(x[:, 1:2], memory * 100, cache=cache)  # what the memory is now does not matter
        assert cache.keys is keys and len(cache) == 5
        assert torch.allclose(torch.cat([first, second], 1), attention(x[:, :2], memory), atol=1e-6)

    def test_cache_rows_can_be_chosen(self):
        attention, cache = made(), KeyValueCache()
        x = torch.randn(3, 4, 16, generator=generator())
        attention(x[:, :3], mask=causal_mask(3), cache=cache)
        cache.select(torch.tensor([2, 0, 2]))
        rows = x[[2, 0, 2]]
        assert torch.allclose(attention(rows[:, 3:], cache=cache), attention(rows, mask=causal_mask(4))[:, 3:], atol=1e-6)
        KeyValueCache().select(torch.tensor([0]))  # an empty one has nothing to choose from

    def test_dropout_only_in_training(self):
        attention = made(dropout=0.5)
        x = torch.randn(1, 8, 16, generator=generator())
        attention.eval()
        assert torch.equal(attention(x), attention(x))
        attention.train()
        assert not torch.equal(attention(x), attention(x))

    def test_initial_spread(self):
        torch.manual_seed(0)
        attention = Attention(64, 4)
        limit = math.sqrt(6 / 128)
        for name in ("query", "key", "value", "output"):
            weight = getattr(attention, f"{name}_weight").detach()
            assert weight.abs().max() <= limit and weight.std() == pytest.approx(limit / math.sqrt(3), rel=0.05)
        assert not any(parameter.any() for name, parameter in attention.named_parameters() if name.endswith("bias"))

    @pytest.mark.parametrize(
        "options, message",
        [
            (dict(d_model=10, n_heads=4), r"d_model \(10\) is no multiple of n_heads \(4\).*d_head="),
            (dict(d_model=0, n_heads=1), "both must be at least 1"),
            (dict(d_model=4, n_heads=2, dropout=1.0), "dropout is 1.0"),
        ],
    )
    def test_wrong_sizes(self, options, message):
        with pytest.raises(ValueError, match=message):
            Attention(**options)

    def test_wrong_inputs(self):
        attention = made()
        with pytest.raises(ValueError, match="15 numbers per position; this attention was made for d_model=16"):
            attention(torch.zeros(1, 2, 15))
        with pytest.raises(ValueError, match="value_input without key_input"):
            attention(torch.zeros(1, 2, 16), None, torch.zeros(1, 2, 16))
        with pytest.raises(ValueError, match="rotary positions belong to self-attention"):
            Attention(16, 4, rotary=nn.Identity())(torch.zeros(1, 2, 16), torch.zeros(1, 2, 16))


class TestLooking:
    def test_recorded_weights_are_those_of_the_run(self):
        model = nn.ModuleDict({"a": made(seed=1), "b": made(seed=2)})
        x, memory = torch.randn(2, 3, 16, generator=generator()), torch.randn(2, 5, 16, generator=generator(1))
        with recorded_attention(model) as seen:
            y = model["a"](x, mask=causal_mask(3))
            model["b"](y, memory)
            model["b"](y, key_input=memory)
        assert sorted(seen) == ["a", "b"] and len(seen["b"]) == 2
        assert torch.equal(seen["a"][0], model["a"].weights(x, mask=causal_mask(3)))
        assert seen["b"][0].shape == (2, 4, 3, 5) and torch.equal(*seen["b"])
        model["a"](x)
        assert len(seen["a"]) == 1  # nothing is kept after the block

    def test_recording_with_a_cache_is_refused(self):
        attention = made()
        with recorded_attention(attention), pytest.raises(ValueError, match="cannot be recorded while a cache is in use"):
            attention(torch.zeros(1, 1, 16), cache=KeyValueCache())

    def test_plot(self):
        import matplotlib.pyplot as plt

        weights = torch.rand(3, 2, 4, generator=generator())
        figure = plot_attention(weights, queries=["a", "b"], key_seconds=0.04)
        assert [ax.get_title() for ax in figure.axes] == ["head 1", "head 2", "head 3"]
        assert figure.axes[0].get_xlabel() == "time (s)" and figure.axes[0].images[0].get_extent()[1] == pytest.approx(0.16)
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]
        with pytest.raises(ValueError, match="2 queries but 3 names"):
            plot_attention(weights, queries=["a", "b", "c"])
        with pytest.raises(ValueError, match="3 heads but only 1 axes"):
            plot_attention(weights, axes=[plt.gca()])
        plt.close("all")
