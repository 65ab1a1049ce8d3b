"""The whole model: attention decoder, consistency loss, heads and their sum, published sizes, and weights that come from elsewhere."""
import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from speechlearn.alignment.transducer import Decoder
from speechlearn.models import AsrModel, AttentionDecoderModel, BalancedDecoder, Losses, MultiHeadAttention, consistency_loss, load_reference, make_asr_model, total_loss
from speechlearn.zipformer.convolution import Conv2dSubsampling
from speechlearn.zipformer.encoder import Zipformer2

LISTS = Path(__file__).parent / "golden" / "zipformer"
TINY = dict(
    downsampling_factor=(1, 2), encoder_dim=(12, 16), num_encoder_layers=1, encoder_unmasked_dim=12, query_head_dim=5, pos_head_dim=3, value_head_dim=4, num_heads=2, feedforward_dim=16, cnn_module_kernel=5,
    pos_dim=8,
)
HEADS = dict(use_transducer=False, use_ctc=False, use_attention_decoder=False)
ALL = dict(use_transducer=True, use_ctc=True, use_attention_decoder=True)
TARGETS, TARGET_LENGTHS = torch.tensor([[4, 7, 5], [6, 0, 0]]), torch.tensor([3, 1])


def tiny_model(causal=False, bins=12, vocab=11, width=16, **heads):
    torch.manual_seed(0)
    sizes = TINY | {"encoder_dim": (12, width)}
    aed = dict(decoder_dim=8, num_decoder_layers=1, attention_dim=8, num_heads=2, feedforward_dim=12)
    return AsrModel(Conv2dSubsampling(bins, 12, 2, 3, 4), Zipformer2(**sizes, causal=causal), width, vocab, decoder_dim=8, joiner_dim=8, attention_decoder=aed, **HEADS | heads).eval()


def batch(seed=1, n=2, n_frames=61):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, n_frames, 12, generator=generator), torch.tensor([n_frames, n_frames - 8][:n])


def aed(seed=0, **changes):
    torch.manual_seed(seed)
    model = AttentionDecoderModel(**dict(vocab_size=9, decoder_dim=8, num_decoder_layers=2, attention_dim=12, num_heads=3, feedforward_dim=16, memory_dim=6) | changes).double().eval()
    with torch.no_grad():
        model.decoder.output_layer.weight.mul_(4)
    return model


def remembered(n_frames=7, n=2, dim=6, seed=3):
    return torch.randn(n, n_frames, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestBalancedDecoder:
    @pytest.mark.parametrize("context", [1, 2, 3])
    @pytest.mark.parametrize("training", [False, True])
    def test_values_and_names_of_the_plain_one(self, context, training):
        plain, balanced = Decoder(9, 8, 0, context).train(training), BalancedDecoder(9, 8, 0, context).train(training)
        balanced.load_state_dict(plain.state_dict(), strict=True)
        y = torch.tensor([[0, 3, 5, 8], [-1, 0, 2, 2]])
        torch.testing.assert_close(balanced(y), plain(y))
        torch.testing.assert_close(balanced(y[:, -context:], need_pad=False), plain(y[:, -context:], need_pad=False))

    def test_wrong_number_of_symbols(self):
        with pytest.raises(ValueError, match="exactly 3 symbols, got 2"):
            BalancedDecoder(9, 8, 0, 3)(torch.tensor([[0, 1]]), need_pad=False)

    @pytest.mark.parametrize("training, draw, bent", [(True, 0.0, True), (True, 0.06, False), (False, 0.0, False)])
    def test_gradients_bend_in_training_in_one_of_twenty_draws(self, monkeypatch, training, draw, bent):
        monkeypatch.setattr(random, "random", lambda: draw)
        torch.manual_seed(0)
        plain, balanced = Decoder(9, 8, 0, 2).train(training), BalancedDecoder(9, 8, 0, 2).train(training)
        with torch.no_grad():
            plain.embedding.weight.mul_(5)  # mean absolute value about 4, beyond 1
        balanced.load_state_dict(plain.state_dict())
        y, weight = torch.randint(0, 9, (4, 30)), torch.randn(4, 30, 8)
        gradients = [torch.autograd.grad((module(y) * weight).sum(), [module.embedding.weight, module.conv.weight]) for module in (plain, balanced)]
        for ours, other in zip(*gradients):
            assert torch.equal(ours, other) is not bent
            assert not bent or 1e-3 < (ours - other).abs().max() / other.abs().max() < 0.5


class TestAttention:
    def test_against_torch(self):
        """With equal sizes it is the library's attention, whose three projections stand in one matrix."""
        torch.manual_seed(0)
        ours, library = MultiHeadAttention(8, 8, 8, 2).double().eval(), nn.MultiheadAttention(8, 2, batch_first=True).double().eval()
        with torch.no_grad():
            library.in_proj_weight.copy_(torch.cat([ours.linear_q.weight, ours.linear_k.weight, ours.linear_v.weight]))
            library.in_proj_bias.copy_(torch.cat([ours.linear_q.bias, ours.linear_k.bias, ours.linear_v.bias]))
        library.out_proj.load_state_dict(ours.out_proj.state_dict())
        x, memory = remembered(4, dim=8), remembered(5, dim=8, seed=4)
        hidden = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        torch.testing.assert_close(ours(x, memory, hidden[:, None]), library(x, memory, memory, key_padding_mask=hidden)[0])

    def test_sizes(self):
        assert MultiHeadAttention(8, 6, 12, 3)(torch.zeros(2, 4, 8), torch.zeros(2, 5, 6), torch.zeros(1, 1, 5, dtype=torch.bool)).shape == (2, 4, 8)
        with pytest.raises(ValueError, match=r"attention_dim \(10\) must be a multiple of num_heads \(3\)"):
            MultiHeadAttention(8, 6, 10, 3)

    def test_the_penalty_is_for_training_only(self):
        attention, hidden = MultiHeadAttention(4, 4, 4, 1).double(), torch.zeros(1, 1, 6, dtype=torch.bool)
        with torch.no_grad():
            attention.linear_q.weight.mul_(40)
            attention.linear_k.weight.mul_(40)
        x = remembered(6, dim=4)
        out, gradients = {}, {}
        for training in (True, False):
            attention.train(training)
            out[training] = attention(x, x, hidden)
            (gradients[training],) = torch.autograd.grad(out[training].sum(), attention.linear_q.weight)
        assert torch.equal(out[True], out[False]) and not torch.allclose(gradients[True], gradients[False])


class TestAttentionDecoder:
    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.lists(st.integers(2, 8), max_size=5), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 8))
    def test_ends(self, texts, wider, filler):
        model = aed(sos_id=0, eos_id=1)
        width = max(map(len, texts)) + wider
        targets = torch.tensor([text + [filler] * (width - len(text)) for text in texts], dtype=torch.long).view(len(texts), width)
        ys_in, ys_out, lens = model.with_ends(targets, torch.tensor([len(text) for text in texts]))
        assert lens.tolist() == [len(text) + 1 for text in texts]
        assert ys_in.tolist() == [[0] + text + [1] * (width - len(text)) for text in texts]
        assert ys_out.tolist() == [text + [1] + [-1] * (width - len(text)) for text in texts]

    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 1000), st.sampled_from([0.0, 0.1, 0.5]), st.lists(st.integers(0, 5), min_size=1, max_size=4))
    def test_loss_is_torchs_cross_entropy(self, seed, smoothing, lengths):
        model, generator = aed(label_smoothing=smoothing), torch.Generator().manual_seed(seed)
        targets, target_lengths = torch.randint(0, 9, (len(lengths), max(lengths)), generator=generator), torch.tensor(lengths)
        memory, memory_lens = remembered(n=len(lengths), seed=seed), torch.randint(1, 8, (len(lengths),), generator=generator)
        ys_in, ys_out, lens = model.with_ends(targets, target_lengths)
        logits = model.decoder(ys_in, lens, memory, memory_lens)
        library = F.cross_entropy(logits.flatten(0, 1), ys_out.flatten(), ignore_index=-1, label_smoothing=smoothing, reduction="sum")
        torch.testing.assert_close(model(memory, memory_lens, targets, target_lengths), library)
        each = F.cross_entropy(logits.transpose(1, 2), ys_out, ignore_index=-1, reduction="none")
        torch.testing.assert_close(model.nll(memory, memory_lens, targets, target_lengths), each)

    def test_another_ignored_number_and_symbol_one_as_text(self):
        """The end symbol inside a text counts like any other."""
        model, memory = aed(), remembered()
        targets = torch.tensor([[1, 4, 1], [1, 0, 0]])
        nll = model.nll(memory, torch.tensor([7, 7]), targets, TARGET_LENGTHS)
        assert (nll[0] > 0).all() and (nll[1, :2] > 0).all() and (nll[1, 2:] == 0).all()
        other = aed(ignore_id=-100)
        assert torch.equal(other.nll(memory, torch.tensor([7, 7]), targets, TARGET_LENGTHS), nll)

    def test_batch_equals_single(self):
        """Neither padded symbols nor padded frames change anything."""
        model, memory, lens = aed(), remembered(), torch.tensor([7, 4])
        nll, loss = model.nll(memory, lens, TARGETS, TARGET_LENGTHS), model(memory, lens, TARGETS, TARGET_LENGTHS)
        singles = 0
        for i, (frames, symbols) in enumerate([(7, 3), (4, 1)]):
            one = memory[i : i + 1, :frames], lens[i : i + 1], TARGETS[i : i + 1, :symbols], TARGET_LENGTHS[i : i + 1]
            torch.testing.assert_close(model.nll(*one)[0], nll[i, : symbols + 1])
            singles = singles + model(*one)
        torch.testing.assert_close(loss, singles)
        dirty, filler = memory.clone(), TARGETS.clone()
        dirty[1, 4:], filler[1, 1:] = 1e6, 8
        torch.testing.assert_close(model(dirty, lens, filler, TARGET_LENGTHS), loss)

    @pytest.mark.parametrize("place", [1, 2, 3])
    def test_no_look_ahead(self, place):
        model, memory = aed(), remembered(n=1)
        y = torch.tensor([[1, 4, 7, 5]])
        other = y.clone()
        other[0, place] = 8
        lens, memory_lens = torch.tensor([4]), torch.tensor([7])
        one, two = model.decoder(y, lens, memory, memory_lens), model.decoder(other, lens, memory, memory_lens)
        torch.testing.assert_close(one[:, :place], two[:, :place], atol=1e-12, rtol=0)
        assert ((one - two)[:, place:].abs().amax(dim=-1) > 1e-4).all()

    def test_probabilities_of_all_texts_of_two_symbols(self):
        """Over all second symbols, and over all first ones, probabilities add up to 1."""
        model, memory = aed(), remembered(n=1).expand(81, -1, -1)
        texts = torch.cartesian_prod(torch.arange(9), torch.arange(9))
        nll = model.nll(memory, torch.full((81,), 7), texts, torch.full((81,), 2))
        assert nll[:, :2].sum(dim=1).neg().exp().sum().item() == pytest.approx(1, abs=1e-9)


class TestConsistency:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 1000), st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(2, 6))
    def test_against_torch(self, seed, lengths, vocab):
        """The library's divergence of both directions, over real frames, and its gradients with targets held fast."""
        logits = torch.randn(2 * len(lengths), 5, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
        log_probs = logits.log_softmax(dim=-1)
        ours, first, second = consistency_loss(log_probs, torch.tensor(lengths * 2)), *log_probs.chunk(2)
        library = sum(
            F.kl_div(one[i, :n], other[i, :n].detach(), log_target=True, reduction="sum") for one, other in ((first, second), (second, first)) for i, n in enumerate(lengths)
        )
        torch.testing.assert_close(ours, library)
        if sum(lengths):
            torch.testing.assert_close(*(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, library)))
        assert ours >= -1e-12

    def test_targets_get_no_gradient(self):
        """By hand: with respect to log p the gradient of −Σ t log p is −t, and nothing comes from the other direction."""
        log_probs = torch.tensor([[[0.8, 0.2]], [[0.6, 0.4]]], dtype=torch.float64).log().requires_grad_()
        loss = consistency_loss(log_probs, torch.tensor([1, 1]))
        loss.backward()
        torch.testing.assert_close(log_probs.grad, -torch.tensor([[[0.6, 0.4]], [[0.8, 0.2]]], dtype=torch.float64))
        assert loss.item() == pytest.approx(0.8 * math.log(4 / 3) + 0.2 * math.log(1 / 2) + 0.6 * math.log(3 / 4) + 0.4 * math.log(2))

    def test_equal_copies(self):
        log_probs = torch.randn(2, 5, 4).log_softmax(dim=-1)
        assert consistency_loss(log_probs.repeat(2, 1, 1), torch.tensor([5, 3] * 2)).item() == 0

    @pytest.mark.parametrize("lengths", [[5, 4, 5], [5, 4, 4, 5], [5, 4]])
    def test_no_two_halves(self, lengths):
        with pytest.raises(ValueError, match="two halves of equal lengths"):
            consistency_loss(torch.zeros(len(lengths), 5, 4), torch.tensor(lengths))


class TestAsrModel:
    @pytest.mark.parametrize("transducer, ctc, attention", [(t, c, a) for t in (0, 1) for c in (0, 1) for a in (0, 1) if t + c + a])
    @pytest.mark.parametrize("twice", [False, True])
    def test_each_head_has_its_losses(self, transducer, ctc, attention, twice):
        model = tiny_model(use_transducer=bool(transducer), use_ctc=bool(ctc), use_attention_decoder=bool(attention))
        x, lens = batch()
        copies = (x.repeat(2, 1, 1), lens.repeat(2), TARGETS.repeat(2, 1), TARGET_LENGTHS.repeat(2)) if twice else (x, lens, TARGETS, TARGET_LENGTHS)
        losses = model(*copies, twice=twice)
        there = {name for name, value in losses._asdict().items() if value is not None}
        expected = ({"simple", "pruned"} if transducer else set()) | ({"ctc"} if ctc else set()) | ({"consistency"} if ctc and twice else set()) | ({"attention"} if attention else set())
        assert there == expected and all(value.dim() == 0 and value.isfinite() for value in losses if value is not None)

    def test_no_head(self):
        with pytest.raises(ValueError, match="a model without a head writes nothing"):
            tiny_model()

    def test_twice_the_same_is_once(self):
        """Two equal copies, each of half a weight, give the losses of one, and nothing to agree upon."""
        model, (x, lens) = tiny_model(**ALL), batch()
        once = model(x, lens, TARGETS, TARGET_LENGTHS)
        twice = model(x.repeat(2, 1, 1), lens.repeat(2), TARGETS.repeat(2, 1), TARGET_LENGTHS.repeat(2), twice=True)
        for name in ("ctc", "simple", "pruned", "attention"):
            torch.testing.assert_close(getattr(twice, name), getattr(once, name), rtol=1e-5, atol=0)
        assert twice.consistency.abs() < 1e-5

    def test_twice_with_two_looks(self):
        model, (x, lens), (y, _) = tiny_model(**ALL), batch(1), batch(2)
        both = model(torch.cat([x, y]), lens.repeat(2), TARGETS.repeat(2, 1), TARGET_LENGTHS.repeat(2), twice=True)
        singles = [model(looked, lens, TARGETS, TARGET_LENGTHS) for looked in (x, y)]
        for name in ("ctc", "simple", "pruned", "attention"):
            torch.testing.assert_close(getattr(both, name), sum(getattr(one, name) for one in singles) / 2, rtol=1e-5, atol=0)
        first, second = (model.ctc_output(model.forward_encoder(looked, lens)[0]) for looked in (x, y))
        out_lens = model.forward_encoder(x, lens)[1].tolist()
        library = sum(F.kl_div(a[i, :n], b[i, :n], log_target=True, reduction="sum") for a, b in ((first, second), (second, first)) for i, n in enumerate(out_lens)) / 2
        torch.testing.assert_close(both.consistency, library, rtol=1e-4, atol=1e-7)

    def test_ctc_is_torchs(self):
        model, (x, lens) = tiny_model(use_ctc=True), batch()
        out, out_lens = model.forward_encoder(x, lens)
        library = F.ctc_loss(model.ctc_output(out).transpose(0, 1), TARGETS, out_lens, TARGET_LENGTHS, blank=0, reduction="sum")
        torch.testing.assert_close(model(x, lens, TARGETS, TARGET_LENGTHS).ctc, library, rtol=1e-5, atol=0)

    def test_encoder_output(self):
        """Lengths halved twice, batch first; what stands in the padding of one utterance is nothing to another."""
        model, (x, lens) = tiny_model(causal=True, use_ctc=True), batch()
        out, out_lens = model.forward_encoder(x, lens)
        assert out.shape == (2, 14, 16) and out_lens.tolist() == [14, 12]
        steps = (lens - 7) // 2
        assert out_lens.tolist() == ((steps + 1) // 2).tolist()
        dirty = x.clone()
        dirty[1, 53:] = 3.0
        torch.testing.assert_close(model.forward_encoder(dirty, lens)[0][0], out[0])

    def test_heads_on_a_batch_equal_heads_on_singles(self):
        """All heads, given the same vectors: the sum over a padded batch is the sum of its utterances."""
        model, lens = tiny_model(**ALL), torch.tensor([14, 9])
        out = torch.randn(2, 14, 16, generator=torch.Generator().manual_seed(4))
        model.forward_encoder = lambda x, x_lens: (x, x_lens)
        together = model(out, lens, TARGETS, TARGET_LENGTHS)
        alone = [model(out[i : i + 1, :n], lens[i : i + 1], TARGETS[i : i + 1, :s], TARGET_LENGTHS[i : i + 1]) for i, (n, s) in enumerate([(14, 3), (9, 1)])]
        for name in ("ctc", "simple", "pruned", "attention"):
            torch.testing.assert_close(getattr(together, name), sum(getattr(one, name) for one in alone), rtol=1e-5, atol=0)

    def test_gradients_reach_all_that_is_used(self):
        torch.manual_seed(0)
        random.seed(0)
        model, (x, lens) = tiny_model(**ALL).train(), batch()
        total_loss(model(x, lens, TARGETS, TARGET_LENGTHS), 100).backward()
        without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        assert not {name for name in without if not name.startswith("encoder.")}

    def test_initial_projections_are_small(self):
        torch.manual_seed(0)
        model = AsrModel(nn.Identity(), nn.Identity(), 400, 50, decoder_dim=100)
        for layer, width in ((model.simple_am_proj, 400), (model.simple_lm_proj, 100)):
            assert layer.bias.abs().max() <= 0.025 and layer.bias.abs().max() > 0.02
            assert layer.weight.abs().max().item() == pytest.approx(0.25 / math.sqrt(width), rel=0.01)


class TestTotal:
    FIVE = Losses(ctc=torch.tensor(1.0), consistency=torch.tensor(10.0), simple=torch.tensor(100.0), pruned=torch.tensor(1000.0), attention=torch.tensor(10000.0))

    @pytest.mark.parametrize("at, by_hand", [(0, 0.2 + 0 + 100 + 100 + 8000), (500, 0.2 + 0.5 + 87.5 + 325 + 8000), (1000, 0.2 + 1 + 75 + 550 + 8000), (2000, 0.2 + 2 + 50 + 1000 + 8000), (9999, 0.2 + 2 + 50 + 1000 + 8000)])
    def test_by_hand(self, at, by_hand):
        assert total_loss(self.FIVE, at).item() == pytest.approx(by_hand)

    def test_ctc_counts_fully_alone(self):
        one = torch.tensor(1.0)
        assert total_loss(Losses(ctc=one), 0).item() == 1
        assert total_loss(Losses(ctc=one, consistency=one), 1000).item() == pytest.approx(1.1)
        assert total_loss(Losses(ctc=one, attention=0 * one), 0).item() == pytest.approx(0.2)
        assert total_loss(Losses(ctc=one, simple=0 * one, pruned=0 * one), 0).item() == pytest.approx(0.2)

    def test_other_scales(self):
        """Of CTC beside an attention decoder, as in the recipe: 0.1 and 0.9; with a shorter warm-up."""
        changes = dict(warm_step=100, simple_scale=0.25, ctc_scale=0.1, attention_scale=0.9, consistency_scale=0.02)
        assert total_loss(self.FIVE, 50, **changes).item() == pytest.approx(0.1 + 0.1 + 62.5 + 550 + 9000)

    def test_nothing(self):
        with pytest.raises(ValueError, match="the model has no head"):
            total_loss(Losses(), 3)


class TestPublishedSizes:
    @pytest.mark.parametrize(
        "heads, counts",
        [
            ("ctc", (22_118_279, 64_250_603, 147_010_094)), ("transducer", (23_285_615, 65_549_011, 148_439_574)), ("transducer ctc", (23_414_115, 65_805_511, 148_824_074)),
            ("ctc attention_decoder", (46_282_107, 89_987_295, 174_319_650)), ("causal transducer", (23_627_887, 66_110_931, 149_281_046)), ("causal ctc", (22_460_551, 64_812_523, 147_851_566)),
        ],
    )
    def test_counts(self, heads, counts):
        chosen = HEADS | {f"use_{head}": True for head in heads.split() if head != "causal"}
        for size, expected in zip("SML", counts):
            with torch.device("meta"):
                model = make_asr_model(size, causal="causal" in heads, **chosen)
            assert sum(parameter.numel() for parameter in model.parameters()) == expected

    def test_counts_of_the_heads(self):
        with torch.device("meta"):
            models = [make_asr_model(size, **ALL) for size in "SML"]
        count = lambda part: sum(parameter.numel() for parameter in part.parameters())
        assert [count(model.decoder) for model in models] == [260_096] * 3
        assert [count(model.joiner) for model in models] == [650_740, 781_812, 912_884]
        assert [count(model.attention_decoder) for model in models] == [24_163_828, 25_736_692, 27_309_556]

    @pytest.mark.parametrize("name", ["S_noncausal_transducer_ctc_aed", "M_causal_transducer", "L_noncausal_ctc"])
    def test_names_and_shapes(self, name):
        stored = json.loads((LISTS / f"state_dict_{name}.json").read_text(encoding="utf-8"))
        with torch.device("meta"):
            model = make_asr_model(stored["config"], vocab_size=stored["vocab_size"], **{key: stored[key] for key in ("causal", "use_transducer", "use_ctc", "use_attention_decoder")})
        assert {key: list(value.shape) for key, value in model.state_dict().items()} == stored["shapes"]

    def test_changes(self):
        with torch.device("meta"):
            model = make_asr_model("S", causal=True, vocab_size=33, use_ctc=True, n_bins=40, chunk_size=(32,), num_encoder_layers=1)
        assert model.encoder.chunk_size == (32,) and model.ctc_output[1].out_features == 33 and model.encoder_embed.out_width == 9 and model.encoder.num_encoder_layers == (1,) * 6


class TestOfficialPackage:
    """What `benchmarks/zipformer_models.py` found; the package itself cannot be installed here."""

    ROWS = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "zipformer_models.json").read_text(encoding="utf-8"))["weights"]
    ENCODERS = {"S": (21_377_826, 21_720_098), "M": (63_382_150, 63_944_070), "L": (146_013_641, 146_855_113)}

    def test_all_sizes_are_there(self):
        assert set(self.ROWS) == {"S", "S, causal", "M", "M, causal", "L", "L, causal"}

    @pytest.mark.parametrize("name", ROWS)
    def test_every_tensor_went_over_and_every_head_computes_the_same(self, name):
        row = self.ROWS[name]
        assert row["missing"] == row["unexpected"] == 0 and row["weights equal"] is True
        compared = {"encoder output", "CTC log-probabilities", "joiner logits", "attention decoder logits"} | ({"streamed output"} if "causal" in name else set())
        assert compared <= set(row["differences"]) and any("states" in key for key in row["differences"]) is ("causal" in name)
        assert all(0 <= difference[kind] <= 1e-4 for difference in row["differences"].values() for kind in ("absolute", "relative"))

    @pytest.mark.parametrize("name", ROWS)
    def test_numbers_of_parameters(self, name):
        row, size, causal = self.ROWS[name], name[0], "causal" in name
        assert row["parts"]["encoder"] == self.ENCODERS[size][causal]
        assert row["parameters"] == row["parameters of theirs"] == sum(row["parts"].values())
        with torch.device("meta"):
            model = make_asr_model(size, causal=causal, **ALL)
        assert row["tensors"] == len(model.state_dict())
        assert row["parts"] == {part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()}


class Loud:
    """Unpickling it would write a file: code in a checkpoint."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def weights(seed=1, **heads):
    """Of a model with other numbers than `tiny_model` makes."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in tiny_model(**heads).state_dict().items()}


def loaded(model, state, rtol=0.0):
    ours = model.state_dict()
    return not model.training and ours.keys() == state.keys() and all(torch.allclose(ours[name], state[name].float(), rtol=rtol, atol=0) for name in state)


class TestLoading:
    @pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s, "optimizer": {"state": {}}, "batch_idx_train": 3}, lambda s: {f"module.{name}": t for name, t in s.items()}])
    @pytest.mark.parametrize("form", ["dict", "pt", "text path"])
    def test_torchs_files(self, tmp_path, wrap, form):
        state, path = weights(**ALL), tmp_path / "epoch-30.pt"
        torch.save(wrap(state), path)
        model = tiny_model(**ALL).train()
        assert not loaded(model, state)
        assert load_reference({"dict": wrap(state), "pt": path, "text path": str(path)}[form], model) is model
        assert loaded(model, state)

    @pytest.mark.parametrize("prefix", ["", "module."])
    def test_safetensors(self, tmp_path, prefix):
        state = weights(use_ctc=True)
        save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "model.safetensors")
        assert loaded(load_reference(tmp_path / "model.safetensors", tiny_model(use_ctc=True)), state)

    def test_averages(self, tmp_path):
        """The running average is kept in 64 bits."""
        state, average = weights(1, use_ctc=True), weights(2, use_ctc=True)
        torch.save({"model": state, "model_avg": {name: tensor.double() for name, tensor in average.items()}}, tmp_path / "checkpoint-8000.pt")
        assert loaded(load_reference(tmp_path / "checkpoint-8000.pt", tiny_model(use_ctc=True)), state)
        model = load_reference(tmp_path / "checkpoint-8000.pt", tiny_model(use_ctc=True), which="model_avg")
        assert loaded(model, average) and {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
    def test_16_bits(self, tmp_path, dtype, suffix):
        state, path = {name: tensor.to(dtype) for name, tensor in weights(use_ctc=True).items()}, tmp_path / f"half{suffix}"
        (torch.save if suffix == ".pt" else save_file)(state, path)
        model = load_reference(path, tiny_model(use_ctc=True))
        assert loaded(model, state) and {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    def test_the_loaded_model_computes_the_same(self, tmp_path):
        first, (x, lens) = tiny_model(**ALL), batch()
        with torch.no_grad():
            for parameter in first.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        torch.save({"model": first.state_dict()}, tmp_path / "epoch-1.pt")
        second = load_reference(tmp_path / "epoch-1.pt", tiny_model(**ALL))
        assert all(torch.equal(a, b) for a, b in zip(first(x, lens, TARGETS, TARGET_LENGTHS), second(x, lens, TARGETS, TARGET_LENGTHS)) if a is not None)


class TestNotLoading:
    @pytest.mark.parametrize(
        "of, into, hints",
        [
            (dict(use_ctc=True, use_transducer=True), dict(use_transducer=True), ["the file has a CTC head: make the model with it"]),
            (dict(use_ctc=True), dict(use_ctc=True, use_attention_decoder=True), ["the file has not an attention decoder: make the model without it"]),
            (dict(use_ctc=True), dict(use_transducer=True), ["the file has a CTC head", "the file has not a transducer"]),
            (dict(use_ctc=True, use_attention_decoder=True), dict(use_ctc=True), ["the file has an attention decoder: make the model with it"]),
            (dict(use_ctc=True, causal=True), dict(use_ctc=True), ["the file is of a causal model: causal=True"]),
            (dict(use_ctc=True), dict(use_ctc=True, causal=True), ["the file is of a model that is not causal: causal=False"]),
            (dict(use_ctc=True, width=20), dict(use_ctc=True), ["shapes differ: another size, vocabulary or number of bins"]),
            (dict(use_ctc=True, vocab=13), dict(use_ctc=True), ["shapes differ", r"ctc_output.1.weight is (13, 16), not (11, 16)"]),
            (dict(use_ctc=True, bins=20), dict(use_ctc=True), ["shapes differ", "encoder_embed.out.weight is (12, 16), not (12, 8)"]),
        ],
    )
    def test_hints(self, of, into, hints):
        model = tiny_model(**into)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match="these weights do not fit the model") as error:
            load_reference(weights(**of), model)
        assert all(hint in str(error.value) for hint in hints), str(error.value)
        said = str(error.value).count("the file ")
        assert said == sum(hint.startswith("the file ") for hint in hints)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    def test_the_first_version(self):
        state = weights(use_ctc=True) | {"encoder.encoders.0.layers.0.pooling.proj.weight": torch.zeros(4, 4)}
        with pytest.raises(ValueError, match=r"not expected: 1, first encoder.*pooling.*first version \(2022\): speechlearn.zipformer.v1"):
            load_reference(state, tiny_model(use_ctc=True))

    def test_a_part_that_is_not_there(self):
        with pytest.raises(ValueError, match="no part 'model_avg' with weights; the parts are: model, optimizer"):
            load_reference({"model": weights(use_ctc=True), "optimizer": {}}, tiny_model(use_ctc=True), which="model_avg")

    @pytest.mark.parametrize("name", ["epoch-1.pt", "model.safetensors"])
    @pytest.mark.parametrize("content", [b"", b"no weights", None])
    def test_damaged_files(self, tmp_path, name, content):
        path, state = tmp_path / name, weights(use_ctc=True)
        (torch.save if path.suffix == ".pt" else save_file)(state, path)
        path.write_bytes(path.read_bytes()[:-3000] if content is None else content)
        with pytest.raises(ValueError, match=f"{name}' cannot be read as weights"):
            load_reference(path, tiny_model(use_ctc=True))

    def test_code_in_a_file(self, tmp_path):
        torch.save({"model": weights(use_ctc=True), "extra": Loud(tmp_path / "written")}, tmp_path / "epoch-1.pt")
        with pytest.raises(ValueError, match="cannot be read as weights.*tensors and plain values only"):
            load_reference(tmp_path / "epoch-1.pt", tiny_model(use_ctc=True))
        assert not (tmp_path / "written").exists()

    @pytest.mark.parametrize("thing, name", [([torch.zeros(3)], "list"), (torch.zeros(3), "Tensor"), ({"epoch": 3}, "dict"), ({}, "dict")])
    def test_files_without_weights(self, tmp_path, thing, name):
        torch.save(thing, tmp_path / "other.pt")
        with pytest.raises(ValueError, match=f"holds no state dict, but {name}"):
            load_reference(tmp_path / "other.pt", tiny_model(use_ctc=True))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_weights_that_are_no_numbers(self, bad):
        state = weights(use_ctc=True)
        state["ctc_output.1.bias"][3] = bad
        model = tiny_model(use_ctc=True)
        with pytest.raises(ValueError, match="1 tensors hold NaN or infinite numbers, first ctc_output.1.bias"):
            load_reference(state, model)
        assert all(tensor.isfinite().all() for tensor in model.state_dict().values())

    @pytest.mark.parametrize("name", ["nothing.pt", "nothing.safetensors"])
    def test_no_file(self, tmp_path, name):
        with pytest.raises(FileNotFoundError, match=f"there is no file '.*{name}'"):
            load_reference(tmp_path / name, tiny_model(use_ctc=True))


def test_impossible_symbols_of_the_target_cost_nothing():
    """0 · log 0 counts as 0, in the value and in the gradient; giving an impossible symbol a share costs infinitely much, and is no NaN."""
    log_probs = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]]).log().requires_grad_()
    loss = consistency_loss(log_probs, torch.tensor([1, 1]))
    loss.backward()
    assert loss.item() == float("inf")  # the second row thinks impossible what the first one does not
    assert torch.equal(log_probs.grad, -torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]]))


@pytest.mark.parametrize("lengths", [[0, 5], [3, 6]])
def test_an_attention_decoder_needs_real_frames_to_look_at(lengths):
    with pytest.raises(ValueError, match="expected 1 to 5"):
        aed()(torch.zeros(2, 5, 6, dtype=torch.float64), torch.tensor(lengths), TARGETS, TARGET_LENGTHS)
