"""The Zipformer's attention: positions, weights, and the two modules that use them; against plain loops, einsum and streaming."""
import copy
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from speechlearn.zipformer.attention import (
    CompactRelPositionalEncoding, NonlinAttention, RelPositionMultiheadAttentionWeights, SelfAttention, compact_angles, compact_encoding, offsets_to_keys,
)
from speechlearn.zipformer.scaling import ScheduledFloat, set_batch_count
from zipformer_tools import randn

CHANNELS, POS_DIM = 6, 8
QUERY, POS_QUERY = 5, 3  # numbers of a head; nowhere equal to another size


def lively(module, seed=0):
    """In float64, with parameters that are not small, in evaluation."""
    module = module.double().eval()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(randn(*parameter.shape, seed=1000 * seed + i, scale=0.7))
    return module


def make_weights(n_heads=2, seed=0, **settings):
    return lively(RelPositionMultiheadAttentionWeights(CHANNELS, POS_DIM, n_heads, QUERY, POS_QUERY, **settings), seed)


def positions(n_frames, left=0):
    return CompactRelPositionalEncoding(POS_DIM, 0.0, max_len=n_frames + left).eval()(torch.zeros(n_frames, 1, 1, dtype=torch.float64), left_context_len=left)


def split(x, n_heads):
    return x.reshape(*x.shape[:-1], n_heads, x.shape[-1] // n_heads)


def plain_weights(module, x, pos_emb, allowed):
    """The weights from the formulas; `allowed` is True where a query may look at a key."""
    n_frames, h = len(x), module.num_heads
    z = torch.einsum("tnc,oc->tno", x, module.in_proj.weight) + module.in_proj.bias
    q, k, p = (split(part, h) for part in (z[..., : h * QUERY], z[..., h * QUERY : 2 * h * QUERY], z[..., 2 * h * QUERY :]))
    table = split(torch.einsum("oc,rc->ro", module.linear_pos.weight, pos_emb[0]), h)
    row = torch.tensor([[j - i + n_frames - 1 for j in range(n_frames)] for i in range(n_frames)])
    scores = torch.einsum("inhd,jnhd->hnij", q, k) + torch.einsum("inhd,ijhd->hnij", p, table[row])
    exp = (scores - scores.masked_fill(~allowed, -math.inf).amax(dim=-1, keepdim=True)).exp() * allowed
    return exp / exp.sum(dim=-1, keepdim=True)


def plain_self_attention(module, x, w):
    v = split(torch.einsum("tnc,oc->tno", x, module.in_proj.weight) + module.in_proj.bias, len(w))
    mixed = torch.einsum("hnij,jnhd->inhd", w, v).flatten(start_dim=2)
    return torch.einsum("tnc,oc->tno", mixed, module.out_proj.weight) + module.out_proj.bias


def plain_nonlin(module, x, w):
    size = module.hidden_channels
    z = torch.einsum("tnc,oc->tno", x, module.in_proj.weight) + module.in_proj.bias
    gated = split(z[..., size : 2 * size] * z[..., :size].tanh(), len(w))
    mixed = torch.einsum("hnij,jnhd->inhd", w, gated).flatten(start_dim=2) * z[..., 2 * size :]
    return torch.einsum("tnc,oc->tno", mixed, module.out_proj.weight) + module.out_proj.bias


def no_draws(monkeypatch):
    def refuse(*args):
        raise AssertionError("a random number was drawn")

    monkeypatch.setattr(random, "random", refuse)


class TestAngles:
    def test_by_hand(self):
        """E = 4, so the length is 2: offset 2 gives 2 ln 2 · 2π / 4, offset −6 gives −2 ln 4 · 2π / 4."""
        offsets = torch.tensor([2.0, -6.0, 0.0], dtype=torch.float64)
        assert compact_angles(offsets, 4).tolist() == pytest.approx([math.atan(math.pi * math.log(2)), -math.atan(2 * math.pi * math.log(2)), 0.0], abs=1e-12)
        assert compact_angles(offsets, 4, 2.0).tolist() == pytest.approx([math.atan(0.5 * math.pi * math.log(2)), -math.atan(math.pi * math.log(2)), 0.0], abs=1e-12)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 100), st.floats(0.25, 8), st.integers(1, 10**6))
    def test_odd_monotone_within_90_degrees(self, half, length_factor, far):
        offsets = torch.tensor(sorted({*range(-20, 21), far, -far}), dtype=torch.float64)
        angles = compact_angles(offsets, 2 * half, length_factor)
        assert (angles.diff() > 0).all() and angles.abs().max() < math.pi / 2
        torch.testing.assert_close(angles, -angles.flip(0), rtol=1e-12, atol=0)

    def test_length_factor_squeezes_the_near_and_spreads_the_far(self):
        near, far = torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([1000.0, 2000.0], dtype=torch.float64)
        gap = lambda offsets, factor: compact_angles(offsets, 48, factor).diff().item()
        assert gap(near, 3.0) < gap(near, 1.0) and gap(far, 3.0) > gap(far, 1.0)


class TestTable:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 12), st.integers(1, 60), st.floats(0.5, 4))
    def test_columns(self, half, reach, length_factor):
        offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
        table, angles = compact_encoding(offsets, 2 * half, length_factor), compact_angles(offsets, 2 * half, length_factor)
        assert table.shape == (2 * reach + 1, 2 * half) and (table[:, -1] == 1).all()
        mirrored = table.flip(0)
        torch.testing.assert_close(table[:, 0::2], mirrored[:, 0::2])  # cosines do not know the sign
        torch.testing.assert_close(table[:, 1:-1:2], -mirrored[:, 1:-1:2])  # sines turn it round
        for k in range(half):
            torch.testing.assert_close(table[:, 2 * k], (angles * (k + 1)).cos())
            if k < half - 1:
                torch.testing.assert_close(table[:, 2 * k + 1], (angles * (k + 1)).sin())

    def test_on_the_device_of_the_offsets(self):
        assert compact_encoding(torch.zeros(3, device="meta"), 8).device.type == "meta"

    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 9), st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), min_size=1, max_size=5))
    def test_rows_are_the_offsets_however_the_table_grew(self, max_len, calls):
        module = CompactRelPositionalEncoding(10, 0.0, max_len=max_len, length_factor=1.5)
        for n_frames, left in calls:
            rows = module(torch.zeros(n_frames, 1, 1), left_context_len=left)
            wanted = compact_encoding(torch.arange(-(n_frames + left - 1.0), n_frames), 10, 1.5)
            assert rows.shape == (1, 2 * n_frames + left - 1, 10)
            torch.testing.assert_close(rows[0], wanted, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_type_and_device_follow_x(self, dtype):
        module = CompactRelPositionalEncoding(8, 0.0, max_len=4)
        exact = module(torch.zeros(3, 1, 1))
        rows = module(torch.zeros(3, 1, 1, dtype=dtype))
        assert rows.dtype == dtype and torch.equal(rows, exact.to(dtype))
        assert module(torch.zeros(3, 1, 1, device="meta")).device.type == "meta"

    def test_sixteen_bits_leave_no_trace(self):
        module = CompactRelPositionalEncoding(8, 0.0, max_len=4)
        before = module(torch.zeros(4, 1, 1))
        module(torch.zeros(4, 1, 1, dtype=torch.float16))
        assert torch.equal(module(torch.zeros(4, 1, 1)), before)

    def test_a_table_that_grew_while_decoding_serves_training(self):
        module, layer = CompactRelPositionalEncoding(8, 0.0, max_len=2), nn.Linear(8, 3)
        with torch.inference_mode():
            module(torch.zeros(20, 1, 1))
        layer(module(torch.zeros(20, 1, 1))).sum().backward()
        assert layer.weight.grad.isfinite().all()

    def test_nothing_to_learn_or_store(self):
        module = CompactRelPositionalEncoding(8, ScheduledFloat((0, 0.5), (10, 0.1)))
        assert not module.state_dict() and not list(module.parameters()) and not list(module.buffers())
        assert copy.deepcopy(module).pe is not module.pe

    def test_dropout(self):
        module = CompactRelPositionalEncoding(8, ScheduledFloat((0, 0.5), (10, 0.0), default=0.0), max_len=500)
        x, whole = torch.zeros(500, 1, 1), module.eval()(torch.zeros(500, 1, 1))
        module.train()
        set_batch_count(module, 0)
        torch.manual_seed(0)
        rows = module(x)
        dropped = rows == 0
        assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.03)
        torch.testing.assert_close(rows[~dropped], 2 * whole[~dropped])
        set_batch_count(module, 10)
        assert torch.equal(module(x), whole)
        set_batch_count(module, 0)
        assert torch.equal(module.eval()(x), whole)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (dict(embed_dim=7), r"embed_dim \(7\) must be even"), (dict(embed_dim=0), r"embed_dim \(0\)"), (dict(embed_dim=8, max_len=0), r"max_len \(0\) 1 or more"),
            (dict(embed_dim=8, length_factor=0), r"length_factor \(0\) positive"),
        ],
    )
    def test_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            CompactRelPositionalEncoding(dropout_rate=0.0, **arguments)


def gathered(by_offset):
    """Every element fetched by its index."""
    n_queries, n_offsets = by_offset.shape[-2:]
    n_keys = n_offsets - n_queries + 1
    index = torch.tensor([[j - i + n_queries - 1 for j in range(n_keys)] for i in range(n_queries)])
    return by_offset.gather(-1, index.expand(*by_offset.shape[:-1], n_keys))


class TestOffsetsToKeys:
    @settings(max_examples=80, deadline=None)
    @given(st.lists(st.integers(1, 3), max_size=2), st.integers(1, 9), st.integers(0, 9))
    def test_equals_a_gather(self, batch, n_queries, left):
        x = torch.arange(math.prod(batch) * n_queries * (2 * n_queries - 1 + left), dtype=torch.float64).reshape(*batch, n_queries, -1).requires_grad_()
        out = offsets_to_keys(x)
        assert out.shape == (*batch, n_queries, n_queries + left) and torch.equal(out, gathered(x))
        assert out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr(), "nothing is copied"
        g = randn(*out.shape)
        ours, theirs = torch.autograd.grad(out, x, g)[0], torch.autograd.grad(gathered(x), x, g)[0]
        assert torch.equal(ours, theirs)

    def test_of_a_transposed_tensor(self):
        x = randn(2, 9, 4).transpose(1, 2)
        assert torch.equal(offsets_to_keys(x), gathered(x))

    @pytest.mark.parametrize("n_queries, left", [(1, 0), (1, 3), (4, 0), (3, 2)])
    def test_gradcheck(self, n_queries, left):
        assert torch.autograd.gradcheck(offsets_to_keys, randn(2, n_queries, 2 * n_queries - 1 + left).requires_grad_())


class TestWeights:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.sampled_from(["none", "padding", "one for all", "one each", "both"]), st.integers(0, 10**6))
    def test_equal_the_formulas(self, n_frames, batch, n_heads, kind, seed):
        module, x, pos_emb = make_weights(n_heads, seed=seed % 7), randn(n_frames, batch, CHANNELS, seed=seed), positions(n_frames)
        draw = torch.Generator().manual_seed(seed)
        padding = attn_mask = None
        if kind in ("padding", "both"):
            padding = torch.arange(n_frames) >= torch.randint(1, n_frames + 1, (batch, 1), generator=draw)
        if kind in ("one for all", "one each", "both"):
            shape = (n_frames, n_frames) if kind == "one for all" else (batch, n_frames, n_frames)
            attn_mask = torch.rand(shape, generator=draw) < 0.4
            attn_mask[..., 0] = False  # nobody sees nothing: that case is below
        allowed = torch.ones(batch, n_frames, n_frames, dtype=torch.bool)
        allowed = allowed & ~padding[:, None] if padding is not None else allowed
        allowed = allowed & ~attn_mask if attn_mask is not None else allowed
        w = module(x, pos_emb, key_padding_mask=padding, attn_mask=attn_mask)
        torch.testing.assert_close(w, plain_weights(module, x, pos_emb, allowed), atol=1e-10, rtol=0)
        torch.testing.assert_close(w.sum(dim=-1), torch.ones(n_heads, batch, n_frames, dtype=torch.float64))
        assert (w[~allowed.expand_as(w)] == 0).all(), "masked keys get exactly nothing"

    def test_fully_masked_rows(self):
        """Uniform, finite, and nothing flows back through them."""
        module, x = make_weights(), randn(5, 2, CHANNELS).requires_grad_()
        padding = torch.tensor([[False] * 5, [True] * 5])
        w = module(x, positions(5), key_padding_mask=padding)
        torch.testing.assert_close(w[:, 1], torch.full((2, 5, 5), 0.2, dtype=torch.float64))
        (w * randn(*w.shape)).sum().backward()
        assert x.grad.isfinite().all() and (x.grad[:, 1] == 0).all() and x.grad[:, 0].abs().min() > 0
        assert all(p.grad.isfinite().all() for p in module.parameters())
        one_query = torch.zeros(5, 5, dtype=torch.bool)
        one_query[2] = True
        w = module(x, positions(5), attn_mask=one_query)
        torch.testing.assert_close(w[:, :, 2], torch.full((2, 2, 5), 0.2, dtype=torch.float64))

    def test_one_mask_for_all_is_the_same_mask_for_each(self):
        module, x, mask = make_weights(), randn(6, 3, CHANNELS), torch.ones(6, 6, dtype=torch.bool).triu(1)
        assert torch.equal(module(x, positions(6), attn_mask=mask), module(x, positions(6), attn_mask=mask.expand(3, 6, 6)))

    def test_masks_each_for_its_own_utterance(self):
        module, x = make_weights(), randn(6, 2, CHANNELS)
        masks = torch.stack([torch.ones(6, 6, dtype=torch.bool).triu(1), torch.ones(6, 6, dtype=torch.bool).tril(-1)])
        together = module(x, positions(6), attn_mask=masks)
        for n in range(2):
            torch.testing.assert_close(together[:, n : n + 1], module(x[:, n : n + 1], positions(6), attn_mask=masks[n]))

    def test_positions_alone_depend_on_the_offset_alone(self):
        """Without content and with equal position queries, scores are constant along diagonals; log-weights are that but for a number for each row."""
        module, pos_emb = make_weights(), positions(7)
        with torch.no_grad():
            module.in_proj.weight.zero_()
            module.in_proj.bias[: 2 * 2 * QUERY] = 0
        logs = module(randn(7, 1, CHANNELS), pos_emb).log()[:, 0]
        table = split(module.linear_pos(pos_emb[0]), 2)
        by_offset = torch.einsum("hd,rhd->hr", split(module.in_proj.bias[2 * 2 * QUERY :], 2), table)
        for i in range(7):
            differences = logs[:, i] - logs[:, i, :1]
            torch.testing.assert_close(differences, by_offset[:, 6 - i : 13 - i] - by_offset[:, 6 - i : 7 - i])  # key 0 has offset −i, row 6 − i

    def test_without_positions_time_has_no_order(self):
        module, x = make_weights(), randn(6, 2, CHANNELS)
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        assert not torch.allclose(module(x[order], positions(6)), module(x, positions(6))[:, :, order][..., order])
        nn.init.zeros_(module.linear_pos.weight)
        torch.testing.assert_close(module(x[order], positions(6)), module(x, positions(6))[:, :, order][..., order])

    def test_gradcheck(self):
        module, pos_emb = make_weights(), positions(3)
        mask = torch.tensor([[False, True, False], [False, False, True], [False, False, False]])
        run = lambda x, pos_emb, *_: module(x, pos_emb, attn_mask=mask)
        assert torch.autograd.gradcheck(run, (randn(3, 2, CHANNELS).requires_grad_(), pos_emb.detach().requires_grad_(), *module.parameters()))

    @pytest.mark.parametrize("n_rows", [8, 10, 1])
    def test_wrong_number_of_positions(self, n_rows):
        with pytest.raises(ValueError, match=rf"pos_emb has rows for {n_rows} offsets; 5 queries and 5 keys need 9"):
            make_weights()(randn(5, 1, CHANNELS), randn(1, n_rows, POS_DIM))
        with pytest.raises(ValueError, match=rf"pos_emb has rows for {n_rows} offsets; 5 queries and 7 keys need 11"):
            make_weights().streaming_forward(randn(5, 1, CHANNELS), randn(1, n_rows, POS_DIM), randn(2, 1, 2 * QUERY), 2, torch.zeros(1, 7, dtype=torch.bool))

    def test_evaluation_draws_nothing(self, monkeypatch):
        no_draws(monkeypatch)
        weights, attention, nonlin = make_weights(dropout=0.5), lively(SelfAttention(CHANNELS, 2, 3)), lively(NonlinAttention(CHANNELS, 4))
        x, state = randn(4, 2, CHANNELS).requires_grad_(), torch.get_rng_state()
        w = weights(x, positions(4))
        (attention(x, w) + nonlin(x, w)).sum().backward()
        assert torch.equal(torch.get_rng_state(), state)
        weights.train()
        with pytest.raises(AssertionError, match="was drawn"):
            weights(x, positions(4))

    def test_how_often_positions_are_left_out(self, monkeypatch):
        module, x, pos_emb = make_weights(pos_emb_skip_rate=ScheduledFloat((0, 0.5), (4000, 0.0), default=0.0)), randn(4, 2, CHANNELS), positions(4)
        with_positions = module(x, pos_emb)
        without = make_weights()
        nn.init.zeros_(without.linear_pos.weight)
        without = without(x, pos_emb)
        module.train()
        for batch_count, draw, expected in ((0, 0.499, without), (0, 0.5, with_positions), (2000, 0.249, without), (2000, 0.25, with_positions), (4000, 0.0, with_positions)):
            set_batch_count(module, batch_count)
            monkeypatch.setattr(random, "random", lambda: draw)
            torch.testing.assert_close(module(x, pos_emb), expected)

    def test_rate_belongs_to_one_module(self):
        first, second = make_weights().train(), make_weights().train()
        set_batch_count(first, 0)
        assert float(first.pos_emb_skip_rate) == 0.5 and float(second.pos_emb_skip_rate) == 0.0
        rate = ScheduledFloat((0, 0.5), (10, 0.1))
        assert make_weights(pos_emb_skip_rate=rate).pos_emb_skip_rate is not rate

    def test_large_scores_are_pulled_back_in_a_tenth_of_the_calls(self, monkeypatch):
        """One query channel of 6 and keys of 6 and −5: scores 36 and −30; only the penalty reaches a gradient of zeros."""
        module, x = make_weights(1), randn(2, 1, CHANNELS)
        with torch.no_grad():
            module.in_proj.weight.zero_()
            module.in_proj.bias.zero_()
            module.linear_pos.weight.zero_()
            module.in_proj.weight[0, 0] = module.in_proj.weight[QUERY, 1] = 1.0
            x.zero_()
            x[:, 0, 0], x[0, 0, 1], x[1, 0, 1] = 6.0, 6.0, -5.0  # queries 6; keys 6 and −5
        module.train()
        for draw, penalty in ((0.0999, 1e-4), (0.1, 0.0)):
            monkeypatch.setattr(random, "random", lambda: draw)
            leaf = x.clone().requires_grad_()
            (module(leaf, positions(2)) * 0).sum().backward()
            wanted = torch.zeros_like(x)
            # d penalty · (|q k0| + |q k1| − 50): for each query k0 − k1, for the keys the sum of the queries, with their signs.
            wanted[:, 0, 0], wanted[0, 0, 1], wanted[1, 0, 1] = penalty * 11, penalty * 12, -penalty * 12
            torch.testing.assert_close(leaf.grad, wanted)

    def test_dropout(self):
        module, x = make_weights(dropout=0.25, pos_emb_skip_rate=0.0), randn(40, 3, CHANNELS)
        whole = module(x, positions(40))
        module.train()
        torch.manual_seed(0)
        w = module(x, positions(40))
        dropped = w == 0
        assert dropped.double().mean().item() == pytest.approx(0.25, abs=0.02)
        torch.testing.assert_close(w[~dropped], whole[~dropped] / 0.75)

    def test_sixteen_bits(self):
        torch.manual_seed(0)
        module = RelPositionMultiheadAttentionWeights(CHANNELS, POS_DIM, 2, QUERY, POS_QUERY).eval()
        x, padding = randn(9, 2, CHANNELS, dtype=torch.float32), torch.arange(9) >= torch.tensor([[9], [4]])
        exact = module(x, positions(9).float(), key_padding_mask=padding)
        with torch.autocast("cpu", torch.bfloat16):
            w = module(x, positions(9).float(), key_padding_mask=padding)
        torch.testing.assert_close(w.float(), exact, atol=0.02, rtol=0)
        assert (w[:, 1, :, 4:] == 0).all()


class TestModules:
    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6))
    def test_equal_einsum(self, n_frames, batch, n_heads, seed):
        x, w = randn(n_frames, batch, CHANNELS, seed=seed), randn(n_heads, batch, n_frames, n_frames, seed=seed + 1).softmax(dim=-1)
        attention, nonlin = lively(SelfAttention(CHANNELS, n_heads, 4)), lively(NonlinAttention(CHANNELS, 6))
        torch.testing.assert_close(attention(x, w), plain_self_attention(attention, x, w))
        torch.testing.assert_close(nonlin(x, w), plain_nonlin(nonlin, x, w))
        torch.testing.assert_close(nonlin(x, w[:1]), plain_nonlin(nonlin, x, w[:1]))

    @pytest.mark.parametrize("make", [lambda: SelfAttention(CHANNELS, 2, 3), lambda: NonlinAttention(CHANNELS, 4)])
    def test_gradcheck(self, make):
        module, w = lively(make()), randn(2, 2, 3, 3).softmax(dim=-1).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, w, *_: module(x, w), (randn(3, 2, CHANNELS).requires_grad_(), w, *module.parameters()))

    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 10**6))
    def test_padding_never_reaches_real_frames(self, length, n_padding, seed):
        weights, modules = make_weights(), [lively(SelfAttention(CHANNELS, 2, 4)), lively(NonlinAttention(CHANNELS, 4))]
        x = randn(length + n_padding, 2, CHANNELS, seed=seed)
        x[length:, 0] = 1e3 * randn(n_padding, CHANNELS, seed=seed + 1)
        padding = torch.zeros(2, len(x), dtype=torch.bool)
        padding[0, length:] = True
        w, alone = weights(x, positions(len(x)), key_padding_mask=padding), weights(x[:length, :1], positions(length))
        for module in modules:
            torch.testing.assert_close(module(x, w)[:length, :1], module(x[:length, :1], alone), rtol=1e-9, atol=1e-9)

    def test_names_and_shapes_of_the_published_models(self):
        """A layer of the small model's first stack, and of its fourth."""
        for d, h, hidden in ((192, 4, 144), (256, 8, 192)):
            layer = nn.ModuleDict({"self_attn_weights": RelPositionMultiheadAttentionWeights(d, 48, h, 32, 4), "self_attn1": SelfAttention(d, h, 12), "nonlin_attention": NonlinAttention(d, hidden)})
            shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
            common = {"self_attn_weights.linear_pos.weight": (4 * h, 48), "self_attn1.out_proj.bias": (d,), "nonlin_attention.out_proj.bias": (d,)}
            stored = {
                192: {
                    "self_attn_weights.in_proj.weight": (272, 192), "self_attn_weights.in_proj.bias": (272,), "self_attn1.in_proj.weight": (48, 192), "self_attn1.in_proj.bias": (48,),
                    "self_attn1.out_proj.weight": (192, 48), "nonlin_attention.in_proj.weight": (432, 192), "nonlin_attention.in_proj.bias": (432,), "nonlin_attention.out_proj.weight": (192, 144),
                },
                256: {
                    "self_attn_weights.in_proj.weight": (544, 256), "self_attn_weights.in_proj.bias": (544,), "self_attn1.in_proj.weight": (96, 256), "self_attn1.in_proj.bias": (96,),
                    "self_attn1.out_proj.weight": (256, 96), "nonlin_attention.in_proj.weight": (576, 256), "nonlin_attention.in_proj.bias": (576,), "nonlin_attention.out_proj.weight": (256, 192),
                },
            }[d]
            assert shapes == common | stored

    def test_initial_sizes(self):
        torch.manual_seed(0)
        weights, attention, nonlin = RelPositionMultiheadAttentionWeights(64, 48, 4, 16, 4), SelfAttention(64, 4, 12), NonlinAttention(64, 48)
        # nn.Linear draws from ±1/√inputs; the bias from ±0.1; both times the initial scale.
        for layer, inputs, scale in ((weights.in_proj, 64, 0.5), (weights.linear_pos, 48, 0.05), (attention.out_proj, 48, 0.05), (nonlin.out_proj, 48, 0.05)):
            assert 0.9 < layer.weight.abs().max().item() / (scale * inputs**-0.5) <= 1
            if layer.bias is not None:
                assert 0.8 < layer.bias.abs().max().item() / (0.1 * scale) <= 1

    def test_copies_after_a_backward(self):
        weights, attention, nonlin = (module.train() for module in (make_weights(), lively(SelfAttention(CHANNELS, 2, 3)), lively(NonlinAttention(CHANNELS, 4))))
        x = randn(4, 2, CHANNELS).requires_grad_()
        w = weights(x, positions(4))
        (attention(x, w) + nonlin(x, w)).sum().backward()
        for module, call in ((weights, lambda m: m(x, positions(4))), (attention, lambda m: m(x, w)), (nonlin, lambda m: m(x, w))):
            module.eval()
            twin = copy.deepcopy(module)
            before = call(module)
            assert torch.equal(call(twin), before)
            with torch.no_grad():
                twin.in_proj.bias.add_(randn(*twin.in_proj.bias.shape))
            assert torch.equal(call(module), before) and not torch.equal(call(twin), before)


def chunk_mask(n_frames, chunk, left):
    """True where query i may not see key j: j lies in a later chunk, or more than `left` frames before the query's chunk."""
    mask = torch.ones(n_frames, n_frames, dtype=torch.bool)
    for i in range(n_frames):
        start = i // chunk * chunk
        mask[i, max(0, start - left) : start + chunk] = False
    return mask


class TestStreaming:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(1, 5), st.integers(0, 3), st.integers(1, 17), st.integers(1, 2), st.integers(0, 10**6))
    def test_equals_the_whole_utterance_with_a_chunk_mask(self, chunk, left_chunks, n_frames, batch, seed):
        left = chunk * left_chunks
        weights, attention, nonlin = make_weights(2), lively(SelfAttention(CHANNELS, 2, 4)), lively(NonlinAttention(CHANNELS, 4))
        x = randn(n_frames, batch, CHANNELS, seed=seed)
        w = weights(x, positions(n_frames), attn_mask=chunk_mask(n_frames, chunk, left))
        whole = attention(x, w), nonlin(x, w[:1]), nonlin(x, w)
        keys, values = torch.full((left, batch, 2 * QUERY), 99.0, dtype=torch.float64), torch.full((left, batch, 8), 99.0, dtype=torch.float64)  # never looked at before they are filled
        one, two = torch.full((1, batch, left, 4), 99.0, dtype=torch.float64), torch.full((2, batch, left, 2), 99.0, dtype=torch.float64)
        parts = []
        for start in range(0, n_frames, chunk):
            new = x[start : start + chunk]
            padding = torch.tensor([start <= left - 1 - k for k in range(left)] + [False] * len(new)).expand(batch, -1)
            v, keys = weights.streaming_forward(new, positions(len(new), left), keys, left, padding)
            mixed, values = attention.streaming_forward(new, v, values, left)
            single, one = nonlin.streaming_forward(new, v[:1], one, left)
            double, two = nonlin.streaming_forward(new, v, two, left)
            parts.append((mixed, single, double))
            seen = min(left, start)
            first = slice(start - seen, start + len(new))
            torch.testing.assert_close(v[..., left - seen :], w[:, :, start : start + len(new), first])
            assert (v[..., : left - seen] == 0).all()
            assert len(keys) == len(values) == one.shape[2] == two.shape[2] == left
        for ours, expected in zip(map(torch.cat, zip(*parts)), whole, strict=True):
            torch.testing.assert_close(ours, expected)

    def test_cached_are_the_last_frames(self):
        weights, attention = make_weights(2), lively(SelfAttention(CHANNELS, 2, 4))
        x, zeros = randn(3, 1, CHANNELS), torch.zeros(1, 5, dtype=torch.bool)
        old = randn(2, 1, 2 * QUERY, seed=1)
        w, keys = weights.streaming_forward(x, positions(3, 2), old, 2, zeros)
        torch.testing.assert_close(keys, weights.in_proj(x)[1:, :, 2 * QUERY : 4 * QUERY])
        _, values = attention.streaming_forward(x, w, randn(2, 1, 8), 2)
        torch.testing.assert_close(values, attention.in_proj(x)[1:])
        w, keys = weights.streaming_forward(x[:1], positions(1, 2), old, 2, zeros[:, :3])  # a chunk shorter than the cache: an old key stays
        torch.testing.assert_close(keys[0], old[1])

    def test_training_mode_draws_nothing_either(self, monkeypatch):
        """Streaming has no balancer, no whitener and no dropout in its way."""
        weights = make_weights(2, dropout=0.5)
        arguments = randn(3, 1, CHANNELS), positions(3, 2), randn(2, 1, 2 * QUERY), 2, torch.zeros(1, 5, dtype=torch.bool)
        expected = weights.streaming_forward(*arguments)[0]
        no_draws(monkeypatch)
        assert torch.equal(weights.train().streaming_forward(*arguments)[0], expected)

    def test_wrong_caches(self):
        weights, attention, nonlin = make_weights(2), lively(SelfAttention(CHANNELS, 2, 4)), lively(NonlinAttention(CHANNELS, 4))
        x, w = randn(3, 1, CHANNELS), randn(2, 1, 3, 5).softmax(dim=-1)
        mask = torch.zeros(1, 5, dtype=torch.bool)
        with pytest.raises(ValueError, match="the cache holds 1 frames and the chunk 3, but left_context_len is 2"):
            weights.streaming_forward(x, positions(3, 2), randn(1, 1, 2 * QUERY), 2, mask)
        with pytest.raises(ValueError, match="are for 5 keys; expected 1 and 4"):
            weights.streaming_forward(x, positions(3, 1), randn(1, 1, 2 * QUERY), 1, mask)
        with pytest.raises(ValueError, match="the cache holds 3 frames"):
            attention.streaming_forward(x, w, randn(3, 1, 8), 2)
        with pytest.raises(ValueError, match="are for 5 keys; expected 3 and 6"):
            attention.streaming_forward(x, w, randn(3, 1, 8), 3)
        with pytest.raises(ValueError, match="the cache holds 3 frames"):
            nonlin.streaming_forward(x, w, randn(2, 1, 3, 2), 2)
        with pytest.raises(ValueError, match="are for 5 keys; expected 3 and 6"):
            nonlin.streaming_forward(x, w, randn(2, 1, 3, 2), 3)
        with pytest.raises(ValueError, match="the cache holds 2 frames and the chunk 3, but left_context_len is 1"):
            attention.streaming_forward(x, w, randn(2, 1, 8), 1)  # keys and cache fit each other
