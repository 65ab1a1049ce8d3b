"""Blocks: equal to torch's layers, blind to the future and to padding, and exactly as large as counted."""
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
from speechlearn.transformer.attention import causal_mask, padding_mask
from speechlearn.transformer.blocks import (
    BlockCache, EncoderDecoder, EncoderDecoderConfig, FeedForward, LayerNorm, TokenBatch, TokenDecoder, TransformerBlock, TransformerStack, count_flops,
    count_parameters, embedding, layer_norm, post_norm, pre_norm, sequence_loss, shifted,
)


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


def test_feed_forward_against_two_linear_maps():
    torch.manual_seed(0)
    module, x = FeedForward(6, 12, activation="gelu"), noise(2, 3, 6)
    assert torch.allclose(module(x), F.linear(F.gelu(F.linear(x, module.inner.weight, module.inner.bias)), module.outer.weight, module.outer.bias))
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

    def test_batch_independence(self):
        stack = TransformerStack(2, 16, 4, 24).eval()
        assert_batch_independent(lambda x, n: (stack(x, mask=padding_mask(n, x.shape[1])), n), noise(3, 8, 16), torch.tensor([8, 3, 1]))


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

    @pytest.mark.parametrize("n, n_memory", [(5, 0), (1, 0), (4, 9), (13, 2)])
    def test_flops(self, n, n_memory):
        stack = TransformerStack(2, 12, 3, 20, cross_attention=n_memory > 0, fast=False)
        with FlopCounterMode(display=False) as counter:
            stack(noise(1, n, 12), noise(1, n_memory, 12)) if n_memory else stack(noise(1, n, 12))
        assert count_flops(2, n, 12, 20, n_memory=n_memory)["total"] == counter.get_total_flops()


def test_gradients_of_deep_stacks_grow_with_post_norm_only():
    def ratio(norm_first):
        torch.manual_seed(0)
        stack = TransformerStack(18, 32, 4, 64, norm_first=norm_first)
        (stack(noise(2, 6, 32)) * noise(2, 6, 32, seed=1)).mean().backward()
        norms = [float(b.feed_forward.inner.weight.grad.norm()) for b in stack.blocks]
        assert all(math.isfinite(v) for v in norms)
        return norms[-1] / norms[0]

    assert ratio(False) > 1 > ratio(True)
