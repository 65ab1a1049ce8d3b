"""Blocks: equal to torch's layers, blind to the future and to padding, and exactly as large as counted."""
import dataclasses
import math

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from speechlearn.data.batches import assert_batch_independent, is_padding
from speechlearn.transformer.attention import Attention, causal_mask, padding_mask
from speechlearn.transformer.blocks import (
    BlockCache, EncoderDecoder, EncoderDecoderConfig, FeedForward, LayerNorm, TokenBatch, TokenDecoder, TransformerBlock, TransformerStack, count_flops,
    count_parameters, embedding, layer_norm, post_norm, pre_norm, sequence_loss, shifted,
)
from speechlearn.transformer.positions import RotaryPositions


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class TestLayerNorm:
    def test_by_hand(self):
        y = layer_norm(torch.tensor([1.0, 3, 5, 7]), torch.ones(4), torch.zeros(4), eps=0.0)
        assert y.tolist() == pytest.approx([v / 5**0.5 for v in (-3, -1, 1, 3)])
        assert layer_norm(torch.full((4,), 2.0), torch.ones(4), torch.full((4,), 7.0)).tolist() == [7.0] * 4

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 10**6))
    def test_equals_torch(self, n, d, seed):
        x, w, b = noise(n, d, seed=seed, dtype=torch.float64).requires_grad_(), noise(d, seed=seed + 1, dtype=torch.float64), noise(d, seed=seed + 2, dtype=torch.float64)
        ours, theirs = layer_norm(x, w, b), F.layer_norm(x, (d,), w, b)
        assert torch.allclose(ours, theirs, atol=1e-10)
        assert torch.allclose(*[torch.autograd.grad(y.pow(3).sum(), x)[0] for y in (ours, theirs)], atol=1e-7)

    def test_gradcheck_and_module(self):
        x, w, b = (noise(*s, seed=i, dtype=torch.float64).requires_grad_() for i, s in enumerate([(2, 5), (5,), (5,)]))
        assert torch.autograd.gradcheck(layer_norm, (x, w, b))
        module = LayerNorm(5).double()
        assert torch.allclose(module(x), layer_norm(x, module.weight, module.bias))

    def test_module_is_torchs_forward_and_backward(self):
        theirs, ours, x = nn.LayerNorm(6, eps=1e-3), LayerNorm(6, eps=1e-3), noise(3, 4, 6) * 0.01  # so small that eps matters
        nn.init.normal_(theirs.weight, generator=torch.Generator().manual_seed(1))
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(ours(x), theirs(x)) and torch.allclose(layer_norm(x, ours.weight, ours.bias, eps=1e-3), theirs(x), atol=1e-6)
        for module in (ours, theirs):
            (module(x) * noise(3, 4, 6, seed=2)).sum().backward()
        assert torch.allclose(ours.weight.grad, theirs.weight.grad, atol=1e-6) and torch.allclose(ours.bias.grad, theirs.bias.grad, atol=1e-6)

    @settings(max_examples=30, deadline=None)
    @given(st.floats(-50, 50), st.floats(0.1, 50), st.integers(0, 10**6))
    def test_shift_and_scale_of_the_input_are_forgotten(self, shift, scale, seed):
        x, one, zero = noise(4, 7, seed=seed, dtype=torch.float64), torch.ones(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
        assert torch.allclose(layer_norm(x * scale + shift, one, zero, eps=0.0), layer_norm(x, one, zero, eps=0.0), atol=1e-8)

    def test_each_position_alone(self):
        x, one, zero = noise(2, 5, 8), torch.ones(8), torch.zeros(8)
        other = x.clone()
        other[0, 2] += 100
        changed = (layer_norm(x, one, zero) - layer_norm(other, one, zero)).abs().amax(-1) > 1e-4
        assert not changed.any()  # adding the same number to a whole position changes nothing, anywhere
        other[0, 2, 0] += 1
        changed = (layer_norm(x, one, zero) - layer_norm(other, one, zero)).abs().amax(-1) > 1e-4
        assert changed.nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("activation, bend", [("relu", F.relu), ("gelu", F.gelu), ("swish", lambda y: y * y.sigmoid())])
def test_feed_forward_against_two_linear_maps(activation, bend):
    torch.manual_seed(0)
    module, x = FeedForward(6, 12, activation=activation), noise(2, 3, 6)
    assert torch.allclose(module(x), F.linear(bend(F.linear(x, module.inner.weight, module.inner.bias)), module.outer.weight, module.outer.bias), atol=1e-6)


def test_feed_forward_drops_inner_numbers_in_training():
    torch.manual_seed(0)
    module = FeedForward(50, 50, dropout=0.5)
    with torch.no_grad():
        module.inner.weight.zero_()
        module.inner.bias.fill_(1.0)
        module.outer.weight.copy_(torch.eye(50))
    assert set(module(torch.zeros(1, 4, 50)).unique().tolist()) == {0.0, 2.0}
    assert set(module.eval()(torch.zeros(1, 4, 50)).unique().tolist()) == {1.0}


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="activation is 'tanh'; choose relu, gelu, swish"):
        FeedForward(6, 12, activation="tanh")


def test_residuals_by_hand():
    x = torch.tensor([1.0, 2.0])
    assert pre_norm(x, lambda y: y * 10, lambda y: y + 1).tolist() == [12, 23]
    assert post_norm(x, lambda y: y * 10, lambda y: y + 1).tolist() == [30, 50]


def copy_attention(theirs, ours):
    names = ("query", "key", "value")
    theirs.in_proj_weight.copy_(torch.cat([rearrange(getattr(ours, f"{name}_weight"), "n e h -> (n h) e") for name in names]))
    theirs.in_proj_bias.copy_(torch.cat([getattr(ours, f"{name}_bias").flatten() for name in names]))
    theirs.out_proj.weight.copy_(rearrange(ours.output_weight, "n h e -> e (n h)"))
    theirs.out_proj.bias.copy_(ours.output_bias)


@torch.no_grad()
def twin_of(block, activation):
    kind = nn.TransformerEncoderLayer if block.cross_attention is None else nn.TransformerDecoderLayer
    twin = kind(16, 4, 24, dropout=0.0, activation=activation, batch_first=True, norm_first=block.norm_first)
    copy_attention(twin.self_attn, block.self_attention)
    norms = [block.self_norm, block.feed_forward_norm]
    if block.cross_attention is not None:
        copy_attention(twin.multihead_attn, block.cross_attention)
        norms.insert(1, block.cross_norm)
    for theirs, ours in zip((twin.norm1, twin.norm2, getattr(twin, "norm3", None)), norms):
        theirs.load_state_dict(ours.state_dict())
    twin.linear1.load_state_dict(block.feed_forward.inner.state_dict())
    twin.linear2.load_state_dict(block.feed_forward.outer.state_dict())
    return twin


def parameter_pairs(block, twin):
    """(name, our gradient, torch's gradient) for each parameter, in the layout of torch's."""
    attentions = [("self", block.self_attention, twin.self_attn)]
    norms = [(block.self_norm, twin.norm1), (block.feed_forward_norm, twin.norm2)]
    if block.cross_attention is not None:
        attentions.append(("cross", block.cross_attention, twin.multihead_attn))
        norms = [(block.self_norm, twin.norm1), (block.cross_norm, twin.norm2), (block.feed_forward_norm, twin.norm3)]
    for name, ours, theirs in attentions:
        yield f"{name} in", torch.cat([rearrange(getattr(ours, f"{k}_weight").grad, "n e h -> (n h) e") for k in ("query", "key", "value")]), theirs.in_proj_weight.grad
        yield f"{name} in bias", torch.cat([getattr(ours, f"{k}_bias").grad.flatten() for k in ("query", "key", "value")]), theirs.in_proj_bias.grad
        yield f"{name} out", rearrange(ours.output_weight.grad, "n h e -> e (n h)"), theirs.out_proj.weight.grad
        yield f"{name} out bias", ours.output_bias.grad, theirs.out_proj.bias.grad
    for i, (ours, theirs) in enumerate(norms):
        yield f"norm {i}", ours.weight.grad, theirs.weight.grad
        yield f"norm bias {i}", ours.bias.grad, theirs.bias.grad
    for name, ours, theirs in (("inner", block.feed_forward.inner, twin.linear1), ("outer", block.feed_forward.outer, twin.linear2)):
        yield name, ours.weight.grad, theirs.weight.grad
        yield f"{name} bias", ours.bias.grad, theirs.bias.grad


class TestBlock:
    @pytest.mark.parametrize("cross", [False, True])
    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("activation", ["relu", "gelu"])
    @pytest.mark.parametrize("fast", [False, True])
    def test_equals_torch_forward_and_backward(self, cross, norm_first, activation, fast):
        torch.manual_seed(1)
        block = TransformerBlock(16, 4, 24, cross_attention=cross, norm_first=norm_first, activation=activation, fast=fast)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.3)
        twin, x, memory, lengths = twin_of(block, activation), noise(2, 5, 16).requires_grad_(), noise(2, 7, 16, seed=1), torch.tensor([7, 3])
        if cross:
            ours = block(x, memory, mask=causal_mask(5), memory_mask=padding_mask(lengths))
            theirs = twin(x, memory, tgt_mask=~causal_mask(5), memory_key_padding_mask=is_padding(lengths))
        else:
            ours, theirs = block(x, mask=causal_mask(5)), twin(x, src_mask=~causal_mask(5))
        assert torch.allclose(ours, theirs, atol=1e-5)
        a, b = (torch.autograd.grad((y * noise(2, 5, 16, seed=2)).sum(), [x]) for y in (ours, theirs))
        assert torch.allclose(a[0], b[0], atol=1e-4)

    @pytest.mark.parametrize("cross", [False, True])
    @pytest.mark.parametrize("norm_first", [False, True])
    def test_gradients_of_every_parameter_and_of_the_memory_equal_torchs(self, cross, norm_first):
        torch.manual_seed(2)
        block = TransformerBlock(16, 4, 24, cross_attention=cross, norm_first=norm_first)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.3)
        twin, x, memory = twin_of(block, "relu"), noise(2, 5, 16), noise(2, 7, 16, seed=1).requires_grad_()
        given_memory = (memory,) if cross else ()
        memory_gradients = []
        for module in (block, twin):
            (module(x, *given_memory) * noise(2, 5, 16, seed=2)).sum().backward()
            memory_gradients.append(memory.grad)
            memory.grad = None
        for name, ours, theirs in parameter_pairs(block, twin):
            assert theirs.abs().sum() > 0 or "key" in name, name
            assert torch.allclose(ours, theirs, atol=2e-5, rtol=1e-4), name
        if cross:
            assert torch.allclose(*memory_gradients, atol=1e-5) and memory_gradients[0].abs().sum() > 0

    @pytest.mark.parametrize("norm_first", [False, True])
    def test_a_stack_equals_torchs_encoder_and_decoder(self, norm_first):
        for cross, kind, layer_name in ((False, nn.TransformerEncoder, "src"), (True, nn.TransformerDecoder, "tgt")):
            torch.manual_seed(3)
            stack = TransformerStack(3, 16, 4, 24, cross_attention=cross, norm_first=norm_first)
            options = {} if cross else {"enable_nested_tensor": False}
            twin = kind(twin_of(stack.blocks[0], "relu"), 3, norm=nn.LayerNorm(16) if norm_first else None, **options)
            for i, block in enumerate(stack.blocks):
                twin.layers[i].load_state_dict(twin_of(block, "relu").state_dict())
            memory = (noise(2, 7, 16, seed=1),) if cross else ()
            mask = {f"{'tgt_mask' if cross else 'mask'}": ~causal_mask(5)}
            assert torch.allclose(stack(noise(2, 5, 16), *memory, mask=causal_mask(5)), twin(noise(2, 5, 16), *memory, **mask), atol=1e-5), layer_name

    @pytest.mark.parametrize("norm_first", [False, True])
    def test_gradcheck(self, norm_first):
        torch.manual_seed(0)
        block = TransformerBlock(4, 2, 6, cross_attention=True, norm_first=norm_first, activation="swish", fast=False).double()
        x, memory = noise(1, 3, 4, dtype=torch.float64).requires_grad_(), noise(1, 2, 4, seed=1, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradcheck(lambda a, b: block(a, b, mask=causal_mask(3)), (x, memory))

    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("pieces", [[6], [1] * 6, [2, 1, 3], [5, 1]])
    def test_pieces_of_any_size_with_caches_equal_the_whole(self, norm_first, pieces):
        torch.manual_seed(0)
        stack = TransformerStack(2, 16, 4, 24, cross_attention=True, norm_first=norm_first).eval()
        x, memory, memory_mask, caches = noise(2, 6, 16), noise(2, 5, 16, seed=1), padding_mask(torch.tensor([5, 2])), [BlockCache(), BlockCache()]
        whole, parts, start = stack(x, memory, mask=causal_mask(6), memory_mask=memory_mask), [], 0
        for n in pieces:
            parts.append(stack(x[:, start : start + n], memory, mask=causal_mask(n, start + n), memory_mask=memory_mask, caches=caches))
            start += n
            assert len(caches[1].self_attention) == start and len(caches[1].cross_attention) == 5
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)

    def test_rotary_positions_in_self_attention_only(self):
        torch.manual_seed(0)
        block = TransformerBlock(16, 2, 24, cross_attention=True, rotary=RotaryPositions(8)).eval()
        plain = TransformerBlock(16, 2, 24, cross_attention=True).eval()
        plain.load_state_dict(block.state_dict(), strict=False)
        x, memory, cache = noise(1, 4, 16), noise(1, 5, 16, seed=1), BlockCache()
        whole = block(x, memory, mask=causal_mask(4))
        assert not torch.allclose(whole, plain(x, memory, mask=causal_mask(4)), atol=1e-3)
        steps = [block(x[:, i : i + 1], memory, cache=cache) for i in range(4)]
        assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5) and block.cross_attention.rotary is None

    def test_memory_is_projected_once_while_decoding(self):
        torch.manual_seed(0)
        block, cache, memory = TransformerBlock(16, 4, 24, cross_attention=True).eval(), BlockCache(), noise(1, 5, 16, seed=1)
        block(noise(1, 1, 16), memory, cache=cache)
        keys = cache.cross_attention.keys
        block(noise(1, 1, 16, seed=2), memory, cache=cache)
        assert cache.cross_attention.keys is keys and len(cache.self_attention) == 2

    def test_select_of_a_block_cache(self):
        cache = BlockCache()
        cache.select(torch.tensor([0]))  # nothing there yet: nothing to do
        keys, memory_keys = noise(3, 2, 1, 4), noise(3, 2, 5, 4, seed=1)
        cache.self_attention.append(keys, keys + 1)
        cache.cross_attention.append(memory_keys, memory_keys + 1)
        cache.select(torch.tensor([2, 0, 2]))
        assert torch.equal(cache.self_attention.keys, keys[[2, 0, 2]]) and torch.equal(cache.self_attention.values, keys[[2, 0, 2]] + 1)
        assert torch.equal(cache.cross_attention.keys, memory_keys[[2, 0, 2]]) and torch.equal(cache.cross_attention.values, memory_keys[[2, 0, 2]] + 1)

    def test_caches_of_two_blocks_are_not_shared(self):
        assert BlockCache().self_attention is not BlockCache().self_attention

    def test_what_stands_in_the_padding_of_the_memory_does_not_matter(self):
        torch.manual_seed(0)
        block, lengths = TransformerBlock(16, 4, 24, cross_attention=True).eval(), torch.tensor([7, 3])
        memory = noise(2, 7, 16, seed=1)
        other = torch.where(is_padding(lengths)[..., None], 1e4, memory)
        a, b = (block(noise(2, 5, 16), m, memory_mask=padding_mask(lengths)) for m in (memory, other))
        assert torch.equal(a, b) and not torch.allclose(block(noise(2, 5, 16), other)[1], a[1])

    @pytest.mark.parametrize("norm_first", [False, True])
    def test_dropout_only_in_training(self, norm_first):
        torch.manual_seed(0)
        block, x = TransformerBlock(16, 4, 24, dropout=0.5, norm_first=norm_first, fast=False), noise(1, 3, 16)
        plain = TransformerBlock(16, 4, 24, norm_first=norm_first, fast=False)
        plain.load_state_dict(block.state_dict())
        assert not torch.equal(block(x), block(x))
        assert torch.equal(block.eval()(x), plain(x))

    @pytest.mark.parametrize("part", ["self_attention", "cross_attention", "feed_forward"])
    def test_what_a_sublayer_writes_is_dropped_out(self, part):
        """One sub-layer writes ones, the others nothing: a quarter of the ones is dropped, the others grow to keep the mean."""
        torch.manual_seed(0)
        block = TransformerBlock(64, 4, 8, cross_attention=True, dropout=0.25).train()
        assert block.self_attention.dropout == block.cross_attention.dropout == block.feed_forward.dropout.p == 0.25
        for name in ("self_attention", "cross_attention"):
            nn.init.zeros_(getattr(block, name).output_weight)
            nn.init.constant_(getattr(block, name).output_bias, float(name == part))
        nn.init.zeros_(block.feed_forward.outer.weight)
        nn.init.constant_(block.feed_forward.outer.bias, float("feed_forward" == part))
        added = block(torch.zeros(20, 10, 64), torch.zeros(20, 3, 64))
        assert (added == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
        assert added.max().item() == pytest.approx(1 / 0.75)

    def test_pre_norm_keeps_the_straight_way_open(self):
        """With sub-layers that write nothing, pre-norm hands the stream on as it is; post-norm does not."""
        for norm_first in (True, False):
            block, x = TransformerBlock(16, 4, 24, norm_first=norm_first), noise(1, 3, 16) * 5
            for weight in (block.self_attention.output_weight, block.feed_forward.outer.weight):
                nn.init.zeros_(weight)
            assert torch.equal(block(x), x) == norm_first

    def test_order_of_the_batch_does_not_matter(self):
        torch.manual_seed(0)
        stack, x, order = TransformerStack(2, 16, 4, 24).eval(), noise(4, 5, 16), torch.tensor([3, 1, 0, 2])
        assert torch.allclose(stack(x[order]), stack(x)[order], atol=1e-6)

    def test_wrong_sizes_are_named(self):
        with pytest.raises(ValueError, match=r"d_model \(10\) is no multiple of n_heads \(3\)"):
            TransformerBlock(10, 3, 24)
        with pytest.raises(ValueError, match="the input has 8 numbers per position; this attention was made for d_model=16"):
            TransformerBlock(16, 4, 24, norm_first=False)(noise(1, 2, 8))
        with pytest.raises(ValueError, match="dropout is 1.0"):
            TransformerBlock(16, 4, 24, dropout=1.0)

    def test_memory_needed_exactly_with_cross_attention(self):
        x = noise(1, 2, 16)
        with pytest.raises(ValueError, match="has cross-attention, but got no memory"):
            TransformerBlock(16, 4, 24, cross_attention=True)(x)
        with pytest.raises(ValueError, match="would ignore the memory"):
            TransformerBlock(16, 4, 24)(x, x)

    def test_last_norm_only_with_pre_norm(self):
        assert isinstance(TransformerStack(2, 16, 4, 24).norm, LayerNorm)
        assert isinstance(TransformerStack(2, 16, 4, 24, norm_first=False).norm, nn.Identity)

    def test_layers_start_with_weights_of_their_own(self):
        stack = TransformerStack(2, 16, 4, 24)
        assert not torch.equal(stack.blocks[0].self_attention.query_weight, stack.blocks[1].self_attention.query_weight)

    def test_wrong_stacks(self):
        with pytest.raises(ValueError, match="n_layers is 0"):
            TransformerStack(0, 16, 4, 24)
        with pytest.raises(ValueError, match="1 caches for 2 blocks"):
            TransformerStack(2, 16, 4, 24)(noise(1, 2, 16), caches=[BlockCache()])

    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("activation", ["relu", "gelu", "swish"])
    def test_batch_independence(self, norm_first, activation):
        torch.manual_seed(0)
        stack = TransformerStack(2, 16, 4, 24, norm_first=norm_first, activation=activation).eval()
        assert_batch_independent(lambda x, n: (stack(x, mask=padding_mask(n, x.shape[1])), n), noise(3, 8, 16), torch.tensor([8, 3, 1]))
        with pytest.raises(AssertionError, match="changes with its batch mates"):
            assert_batch_independent(lambda x, n: (stack(x), n), noise(3, 8, 16), torch.tensor([8, 3, 1]))


class TestShifted:
    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.lists(st.integers(4, 9), min_size=1, max_size=6), min_size=1, max_size=4))
    def test_against_lists(self, rows):
        width = max(map(len, rows))
        targets = torch.tensor([row + [1] * (width - len(row)) for row in rows])
        seen, answer = shifted(targets, torch.tensor([len(row) for row in rows]), sos=2, eos=3, pad=1)
        for i, row in enumerate(rows):
            rest = [1] * (width - len(row))
            assert seen[i].tolist() == [2, *row, *rest] and answer[i].tolist() == [*row, 3, *rest]

    def test_a_text_without_symbols_is_answered_by_the_end(self):
        seen, answer = shifted(torch.tensor([[7, 8], [1, 1]]), torch.tensor([2, 0]), sos=2, eos=3, pad=1)
        assert seen.tolist() == [[2, 7, 8], [2, 1, 1]] and answer.tolist() == [[7, 8, 3], [3, 1, 1]]

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6))
    def test_the_answer_is_what_is_seen_next(self, batch, n, seed):
        g = torch.Generator().manual_seed(seed)
        targets, lengths = torch.randint(4, 30, (batch, n), generator=g), torch.randint(1, n + 1, (batch,), generator=g)
        before = targets.clone()
        seen, answer = shifted(targets, lengths, sos=2, eos=3, pad=1)
        assert torch.equal(targets, before)  # the caller's batch is not touched
        real = seen[:, 1:] != 1
        assert torch.equal(answer[:, :-1][real], seen[:, 1:][real])
        assert (answer == 3).sum(1).tolist() == [1] * batch and (seen[:, 0] == 2).all() and not (seen == 3).any()
        assert ((answer != 1).sum(1) == lengths + 1).all() and ((seen != 1).sum(1) == lengths + 1).all()

    def test_other_numbers_for_the_special_symbols(self):
        seen, answer = shifted(torch.tensor([[7]]), torch.tensor([1]), sos=50, eos=60, pad=0)
        assert seen.tolist() == [[50, 7]] and answer.tolist() == [[7, 60]]

    def test_a_length_beyond_the_text(self):
        with pytest.raises(ValueError, match="utterance 1 has length 3, but the rectangle is only 2 wide"):
            shifted(torch.tensor([[7, 8], [7, 8]]), torch.tensor([1, 3]), sos=2, eos=3, pad=1)

    def test_what_stands_in_the_padding_does_not_matter(self):
        seen, answer = shifted(torch.tensor([[7, 99, 98]]), torch.tensor([1]), sos=2, eos=3, pad=1)
        assert seen.tolist() == [[2, 7, 1, 1]] and answer.tolist() == [[7, 3, 1, 1]]


class TestSequenceLoss:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 3), st.integers(1, 5), st.integers(3, 8), st.sampled_from([0.0, 0.1, 0.5]), st.integers(0, 10**6))
    def test_equals_cross_entropy(self, batch, n, vocab, smoothing, seed):
        g = torch.Generator().manual_seed(seed)
        scores = torch.randn(batch, n, vocab, generator=g, dtype=torch.float64).requires_grad_()
        answer = torch.randint(vocab, (batch, n), generator=g)
        answer[0, 0] = 2
        ours = sequence_loss(scores.log_softmax(-1), answer, pad=1, label_smoothing=smoothing)
        theirs = F.cross_entropy(scores.flatten(0, 1), answer.flatten(), ignore_index=1, label_smoothing=smoothing)
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-9)
        assert torch.allclose(*[torch.autograd.grad(y, scores, retain_graph=True)[0] for y in (ours, theirs)], atol=1e-10)

    def test_by_hand(self):
        log_probs = torch.tensor([[[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]]).log()
        assert sequence_loss(log_probs, torch.tensor([[0, 0]]), pad=1).item() == pytest.approx(math.log(2) * (1 + 3) / 2)
        assert sequence_loss(log_probs, torch.tensor([[0, 1]]), pad=1).item() == pytest.approx(math.log(2))
        mean = (math.log(2) + 2 * math.log(4)) / 3
        assert sequence_loss(log_probs, torch.tensor([[0, 1]]), pad=1, label_smoothing=0.3).item() == pytest.approx(0.7 * math.log(2) + 0.3 * mean)

    @pytest.mark.parametrize("smoothing", [0.1, 0.4])
    def test_smoothing_is_lowest_at_the_smoothed_answer(self, smoothing):
        answer, vocab = torch.tensor([[2]]), 5
        best = torch.full((vocab,), smoothing / vocab, dtype=torch.float64)
        best[2] += 1 - smoothing
        lowest = sequence_loss(best.log()[None, None], answer, pad=1, label_smoothing=smoothing).item()
        assert lowest == pytest.approx(-(best * best.log()).sum().item())
        for seed in range(20):
            other = (best.log() + 0.1 * noise(vocab, seed=seed, dtype=torch.float64)).log_softmax(-1)
            assert sequence_loss(other[None, None], answer, pad=1, label_smoothing=smoothing).item() > lowest

    def test_what_is_said_in_the_padding_does_not_matter(self):
        log_probs, answer = noise(2, 3, 5).log_softmax(-1).requires_grad_(), torch.tensor([[2, 3, 1], [4, 1, 1]])
        loss = sequence_loss(log_probs, answer, pad=1, label_smoothing=0.1)
        gradient = torch.autograd.grad(loss, log_probs)[0]
        assert not gradient[answer == 1].any() and gradient[answer != 1].all()
        other = torch.where((answer == 1)[..., None], -99.0, log_probs.detach())
        assert torch.equal(sequence_loss(other, answer, pad=1, label_smoothing=0.1), loss)

    def test_every_symbol_counts_the_same_however_the_batch_is_padded(self):
        log_probs, answer = noise(2, 3, 5).log_softmax(-1), torch.tensor([[2, 3, 4], [4, 1, 1]])
        first, second = (sequence_loss(log_probs[i : i + 1], answer[i : i + 1], pad=1).item() for i in (0, 1))
        assert sequence_loss(log_probs, answer, pad=1).item() == pytest.approx((3 * first + second) / 4)

    @pytest.mark.parametrize("vocab", [2, 30, 500])
    def test_softmax_twice_has_a_floor(self, vocab):
        perfect = torch.full((1, 1, vocab), -1e9)
        perfect[0, 0, 0] = 0.0
        answer = torch.tensor([[0]])
        assert sequence_loss(perfect.log_softmax(-1), answer, pad=1).item() == pytest.approx(0, abs=1e-6)
        twice = sequence_loss(perfect.softmax(-1).log_softmax(-1), answer, pad=1).item()
        assert twice == pytest.approx(math.log(1 + (vocab - 1) / math.e), rel=1e-5)

    def test_log_softmax_of_log_probabilities_changes_nothing(self):
        log_probs = noise(2, 3, 5).log_softmax(-1)
        assert torch.allclose(log_probs.log_softmax(-1), log_probs, atol=1e-6)

    def test_nothing_to_learn_from(self):
        with pytest.raises(ValueError, match="all answers are padding"):
            sequence_loss(torch.zeros(1, 2, 4), torch.ones(1, 2, dtype=torch.long), pad=1)


def make(seed=0, **options):
    torch.manual_seed(seed)
    return EncoderDecoder(EncoderDecoderConfig(12, 12, **{"d_model": 16, "n_heads": 2, "d_feedforward": 24, **options})).eval()


def batch():
    g = torch.Generator().manual_seed(3)
    return TokenBatch(torch.randint(4, 12, (3, 6), generator=g), torch.tensor([6, 4, 1]), torch.randint(4, 12, (3, 4), generator=g), torch.tensor([4, 1, 2]))


class TestEncoderDecoder:
    @pytest.mark.parametrize("norm_first", [True, False])
    @pytest.mark.parametrize("use_cache", [True, False])
    def test_steps_equal_the_whole(self, norm_first, use_cache):
        model, b = make(norm_first=norm_first), batch()
        seen, _ = shifted(b.targets, b.target_lengths, sos=2, eos=3, pad=1)
        whole, state = model(b.source, b.source_lengths, seen), model.start(b.source, b.source_lengths, use_cache=use_cache)
        steps = torch.stack([model.step(seen[:, i], state) for i in range(5)], 1)
        assert torch.allclose(steps, whole, atol=1e-5)
        assert torch.equal(state.tokens, seen) and (state.caches is None) == (not use_cache)

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_state_rows_can_be_chosen(self, use_cache):
        model, b = make(), batch()
        state = model.start(b.source, b.source_lengths, use_cache=use_cache)
        model.step(torch.tensor([2, 2, 2]), state)
        state.select(torch.tensor([2, 2, 0]))
        assert state.tokens.shape == (3, 1) and state.memory.shape == (3, 6, 16)
        state.select(torch.tensor([0, 2]))  # fewer rows than before, and back to three
        assert len(state.tokens) == len(state.memory) == len(state.memory_mask) == 2
        state.select(torch.tensor([0, 0, 1]))
        got = model.step(torch.tensor([5, 6, 7]), state)
        rows = [2, 2, 0]
        expected = model(b.source[rows], b.source_lengths[rows], torch.tensor([[2, 5], [2, 6], [2, 7]]))[:, -1]
        assert torch.allclose(got, expected, atol=1e-5)

    def test_the_future_does_not_matter(self):
        model, b = make(), batch()
        tokens = torch.tensor([[2, 5, 6, 7]] * 3)
        other = tokens.clone()
        other[:, 2:] = 9
        a, c = (model(b.source, b.source_lengths, t) for t in (tokens, other))
        assert torch.equal(a[:, :2], c[:, :2]) and not torch.allclose(a[:, 2:], c[:, 2:])

    @pytest.mark.parametrize("norm_first", [True, False])
    @pytest.mark.parametrize("place", [1, 2, 3, 4])
    def test_a_later_symbol_never_changes_an_earlier_answer(self, norm_first, place):
        model, b = make(norm_first=norm_first), batch()
        tokens = torch.tensor([[2, 5, 6, 7, 8]] * 3)
        other = tokens.clone()
        other[:, place] = 10
        gap = (model(b.source, b.source_lengths, tokens) - model(b.source, b.source_lengths, other)).abs().amax(dim=(0, 2))
        assert not gap[:place].any() and gap[place] > 1e-4

    def test_every_source_symbol_reaches_every_answer(self):
        model, b = make(), batch()
        tokens = torch.tensor([[2, 5]] * 3)
        base = model(b.source, b.source_lengths, tokens)
        for place in range(6):
            other = b.source.clone()
            other[:, place] = 4 + (other[:, place] - 4 + 1) % 8
            changed = (model(other, b.source_lengths, tokens) - base).abs().amax(dim=2) > 0
            assert changed.all(dim=1).tolist() == changed.any(dim=1).tolist() == (b.source_lengths > place).tolist()

    @settings(max_examples=10, deadline=None)
    @given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=4), st.integers(0, 10**6))
    def test_answers_do_not_depend_on_batch_mates(self, sizes, seed):
        g, model = torch.Generator().manual_seed(seed), make(tie_weights=bool(seed % 2))
        n, m = (torch.tensor(x) for x in zip(*sizes))
        source, targets = torch.randint(4, 12, (len(sizes), int(n.max())), generator=g), torch.randint(4, 12, (len(sizes), int(m.max())), generator=g)
        seen, _ = shifted(targets, m, sos=2, eos=3, pad=1)
        together = model(source, n, seen)
        for i, (a, c) in enumerate(sizes):
            alone = model(source[i : i + 1, :a], n[i : i + 1], seen[i : i + 1, : c + 1])
            assert torch.allclose(together[i, : c + 1], alone[0], atol=1e-5)

    def test_padding_of_both_sides_does_not_matter(self):
        model, b = make(), batch()
        assert_batch_independent(lambda x, n: (model.encode(x, n)[0], n), b.source, b.source_lengths)
        loss = model.loss(b)
        filled = TokenBatch(b.source.masked_fill(is_padding(b.source_lengths), 7), b.source_lengths, b.targets.masked_fill(is_padding(b.target_lengths), 8), b.target_lengths)
        assert torch.equal(model.loss(filled), loss)
        singles = [model.loss(TokenBatch(b.source[i : i + 1, :n], b.source_lengths[i : i + 1], b.targets[i : i + 1, :m], b.target_lengths[i : i + 1])) for i, (n, m) in enumerate(zip((6, 4, 1), (4, 1, 2)))]
        counts = b.target_lengths + 1
        assert loss.item() == pytest.approx(sum(x.item() * int(n) for x, n in zip(singles, counts)) / int(counts.sum()), abs=1e-5)

    def test_probabilities_sum_to_one(self):
        model, b = make(), batch()
        assert torch.allclose(model(b.source, b.source_lengths, b.targets).exp().sum(-1), torch.ones(3, 4), atol=1e-5)

    def test_smoothing_only_in_training(self):
        model, plain, b = make(label_smoothing=0.2), make(), batch()
        assert torch.equal(model.loss(b), plain.loss(b))
        assert model.train().loss(b) != plain.loss(b)

    def test_smoothing_in_training_is_the_losss(self):
        model, b = make(label_smoothing=0.2).train(), batch()
        seen, answer = shifted(b.targets, b.target_lengths, sos=2, eos=3, pad=1)
        expected = F.cross_entropy(model(b.source, b.source_lengths, seen).flatten(0, 1), answer.flatten(), ignore_index=1, label_smoothing=0.2)
        assert model.loss(b).item() == pytest.approx(expected.item(), abs=1e-5)

    def test_dropout_only_in_training(self):
        model, plain, b = make(dropout=0.3), make(), batch()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(model.loss(b), plain.loss(b))
        model.train()
        assert model.loss(b) != model.loss(b)

    def test_dropout_reaches_every_part(self):
        model = make(dropout=0.3)
        layers = [m for m in model.modules() if isinstance(m, nn.Dropout)]
        attentions = [m for m in model.modules() if isinstance(m, Attention)]
        assert len(layers) == 2 * 2 + 2 * 2 + 2 and {m.p for m in layers} == {0.3}  # two in each block, one in each table of positions
        assert len(attentions) == 2 + 2 * 2 and {m.dropout for m in attentions} == {0.3}

    def test_special_symbols_of_the_config_are_used(self):
        model, b = make(pad=0, sos=9, eos=10), batch()
        seen, answer = shifted(b.targets, b.target_lengths, sos=9, eos=10, pad=0)
        expected = F.cross_entropy(model(b.source, b.source_lengths, seen).flatten(0, 1), answer.flatten(), ignore_index=0)
        assert model.loss(b).item() == pytest.approx(expected.item(), abs=1e-5) and not model.decoder.embedding.weight[0].any()

    def test_it_learns_what_it_is_shown(self):
        model, b = make(d_model=32).train(), batch()
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        first = model.loss(b).item()
        for _ in range(40):
            optimiser.zero_grad()
            model.loss(b).backward()
            optimiser.step()
        state, tokens = model.eval().start(b.source, b.source_lengths), torch.full((3,), 2)
        written = []
        for _ in range(5):
            tokens = model.step(tokens, state).argmax(-1)
            written.append(tokens)
        for i, n in enumerate(b.target_lengths.tolist()):
            assert torch.stack(written, 1)[i, : n + 1].tolist() == [*b.targets[i, :n].tolist(), 3]
        assert first > math.log(6) and model.loss(b).item() < 0.1

    def test_weights_survive_saving_and_loading(self):
        for tie in (False, True):
            model, other, b = make(1, tie_weights=tie), make(2, tie_weights=tie), batch()
            assert model.loss(b) != other.loss(b)
            other.load_state_dict(model.state_dict())
            assert torch.equal(model.loss(b), other.loss(b)) and (other.decoder.head.weight is other.decoder.embedding.weight) == tie

    def test_the_first_answers_are_near_even(self):
        """Before training no symbol may be favoured much: the loss starts near that of guessing."""
        model, b = make(d_model=64, n_heads=4), batch()
        assert model.loss(b).item() == pytest.approx(math.log(12), abs=1.2)

    def test_config_is_frozen_and_survives_a_dictionary(self):
        config = EncoderDecoderConfig(5, 9, d_model=8, dropout=0.1)
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.d_model = 16
        assert EncoderDecoderConfig(**dataclasses.asdict(config)) == config

    def test_wrong_sizes_are_named(self):
        for options, message in (({"n_encoder_layers": 0}, "layers is 0"), ({"n_decoder_layers": 0}, "layers is 0"), ({"d_model": 15, "n_heads": 3}, "d_model is 15"), ({"n_heads": 3}, "no multiple of n_heads")):
            with pytest.raises(ValueError, match=message):
                make(**options)

    def test_lengths_beyond_the_rectangle(self):
        b = batch()
        with pytest.raises(ValueError, match="utterance 0 has length 7, but the rectangle is only 6 wide"):
            make().loss(TokenBatch(b.source, b.source_lengths + 1, b.targets, b.target_lengths))

    def test_start_state_is_empty(self):
        model, b = make(n_decoder_layers=3), batch()
        state = model.start(b.source, b.source_lengths)
        assert state.tokens.shape == (3, 0) and len(state.caches) == 3 and state.memory.shape == (3, 6, 16)
        assert not any(len(cache.self_attention) for cache in state.caches)

    def test_tied_weights(self):
        tied = make(tie_weights=True)
        assert tied.decoder.head.weight is tied.decoder.embedding.weight
        assert sum(p.numel() for p in make().parameters()) - sum(p.numel() for p in tied.parameters()) == 12 * 16 + 12
        tied.loss(batch()).backward()
        assert tied.decoder.embedding.weight.grad is not None

    def test_gradients_reach_every_parameter(self):
        model = make()
        model.loss(batch()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "key_bias" not in name)

    def test_the_seed_decides(self):
        a, b, c = make(1), make(1), make(2)
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
        assert not torch.equal(a.decoder.head.weight, c.decoder.head.weight)

    def test_wrong_special_symbols(self):
        with pytest.raises(ValueError, match="target_vocab is 3, but pad, sos and eos are 1, 2 and 3"):
            EncoderDecoderConfig(5, 3)

    def test_position_is_as_loud_as_content(self):
        """Scaled by sqrt(d_model), our rows are about as large as sines and cosines; torch's own would be sqrt(d_model) times that."""
        torch.manual_seed(0)
        position = make().source_positions.__class__(64, dropout=0.0)(torch.zeros(1, 50, 64)).square().mean().sqrt().item()
        ours, theirs = (table.weight.detach().square().mean().sqrt().item() * 8 for table in (embedding(2000, 64), nn.Embedding(2000, 64)))
        assert ours / position == pytest.approx(2**0.5, rel=0.02) and theirs / position == pytest.approx(8 * 2**0.5, rel=0.02)

    def test_embedding_without_pad_has_no_empty_row(self):
        table = embedding(50, 16)
        assert table.padding_idx is None and table.weight.abs().sum(1).min() > 0

    def test_embedding_spread(self):
        torch.manual_seed(0)
        table = embedding(2000, 64, pad=1).weight.detach()
        assert table.std() == pytest.approx(1 / 8, rel=0.02) and not table[1].any()

    def test_decoder_alone_is_a_language_model_with_memory(self):
        torch.manual_seed(0)
        decoder = TokenDecoder(9, 16, 2, 1, 24).eval()
        out = decoder(torch.tensor([[2, 4]]), noise(1, 3, 16))
        assert out.shape == (1, 2, 9)


class TestCounts:
    @settings(max_examples=20, deadline=None)
    @given(st.integers(1, 3), st.sampled_from([8, 12, 20]), st.integers(1, 30), st.booleans(), st.booleans())
    def test_parameters(self, n_layers, d_model, d_feedforward, cross, norm_first):
        stack = TransformerStack(n_layers, d_model, 2, d_feedforward, cross_attention=cross, norm_first=norm_first)
        counted = count_parameters(n_layers, d_model, d_feedforward, cross_attention=cross, norm_first=norm_first)
        assert counted["total"] == sum(p.numel() for p in stack.parameters())
        assert counted["feed-forward"] == sum(p.numel() for b in stack.blocks for p in b.feed_forward.parameters())

    def test_by_hand(self):
        assert count_parameters(1, 2, 3, cross_attention=True) == {"self-attention": 24, "cross-attention": 24, "feed-forward": 17, "norms": 16, "total": 81}
        assert count_flops(1, 3, 2, 5) == {
            "self-attention, projections": 96, "self-attention, scores and means": 72, "cross-attention, projections": 0, "cross-attention, scores and means": 0,
            "feed-forward": 120, "total": 288,
        }

    def test_only_scores_grow_with_the_square_of_the_length(self):
        short, long = count_flops(2, 10, 16, 64, n_memory=7), count_flops(2, 20, 16, 64, n_memory=7)
        assert {part for part in short if long[part] == 4 * short[part]} == {"self-attention, scores and means"}
        assert long["feed-forward"] == 2 * short["feed-forward"]

    def test_scores_cost_as_much_as_the_rest_at_six_times_d_model(self):
        flops = count_flops(1, 6 * 64, 64, 4 * 64)
        assert 2 * flops["self-attention, scores and means"] == flops["total"]

    @pytest.mark.parametrize("tie", [False, True])
    def test_a_whole_encoder_decoder(self, tie):
        model = make(n_encoder_layers=1, n_decoder_layers=3, tie_weights=tie)
        stacks = count_parameters(1, 16, 24)["total"] + count_parameters(3, 16, 24, cross_attention=True)["total"]
        tables = 2 * 12 * 16 + (0 if tie else 12 * 16 + 12)
        assert sum(p.numel() for p in model.parameters()) == stacks + tables

    @pytest.mark.parametrize("n, n_memory", [(5, 0), (1, 0), (4, 9), (13, 2)])
    def test_flops(self, n, n_memory):
        stack = TransformerStack(2, 12, 3, 20, cross_attention=n_memory > 0, fast=False)
        with FlopCounterMode(display=False) as counter:
            stack(noise(1, n, 12), noise(1, n_memory, 12)) if n_memory else stack(noise(1, n, 12))
        assert count_flops(2, n, 12, 20, n_memory=n_memory)["total"] == counter.get_total_flops()

    @pytest.mark.parametrize("n_layers, n, d_model, d_feedforward", [(1, 7, 8, 3), (3, 2, 16, 64), (2, 31, 4, 5)])
    def test_flops_of_encoders_of_many_sizes(self, n_layers, n, d_model, d_feedforward):
        stack = TransformerStack(n_layers, d_model, 2, d_feedforward, fast=False)
        with FlopCounterMode(display=False) as counter:
            stack(noise(1, n, d_model))
        assert count_flops(n_layers, n, d_model, d_feedforward)["total"] == counter.get_total_flops()


def last_gradient(n_layers, norm_first):
    """Geometric mean over seeds of the gradient of the last layer's inner map, before any training."""
    logs = []
    for seed in range(3):
        torch.manual_seed(seed)
        stack = TransformerStack(n_layers, 32, 4, 64, norm_first=norm_first)
        (stack(noise(4, 6, 32, seed=seed)) * noise(4, 6, 32, seed=seed + 100)).mean().backward()
        logs.append(math.log(stack.blocks[-1].feed_forward.inner.weight.grad.norm()))
    return math.exp(sum(logs) / len(logs))


def test_last_gradient_falls_with_the_root_of_the_depth_in_pre_norm_only():
    """Xiong et al., 2020, theorem 1: as large at any depth with post-norm, 1/sqrt(depth) with pre-norm."""
    post, pre = (last_gradient(20, norm_first) / last_gradient(2, norm_first) for norm_first in (False, True))
    assert pre == pytest.approx(10**-0.5, rel=0.35)
    assert 0.6 < post < 1.7


@torch.no_grad()
def test_without_the_stream_all_positions_become_the_same():
    """Attention alone mixes until every position is the mean of all; the stream keeps them apart."""
    torch.manual_seed(0)
    stack, x = TransformerStack(6, 32, 4, 64), noise(1, 10, 32)

    def likeness(step):
        y = x
        for block in stack.blocks:
            y = step(step(y, block.self_norm, block.self_attention), block.feed_forward_norm, block.feed_forward)
        return float(torch.cosine_similarity(y[:, :, None], y[:, None], dim=-1).mean())

    assert likeness(lambda y, norm, sublayer: norm(sublayer(y))) > 0.99
    assert likeness(pre_norm) < 0.85
