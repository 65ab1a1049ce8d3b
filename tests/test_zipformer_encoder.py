"""The Zipformer's encoder: names and sizes of the published models, schedules by hand, masks, padding, causality, streams, 16 bits, a task."""
import copy
import functools
import io
import json
import math
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from speechlearn.optim import ScaledAdam
from speechlearn.zipformer.convolution import Conv2dSubsampling
from speechlearn.zipformer.encoder import (
    DownsampledZipformer2Encoder, Zipformer2, Zipformer2Encoder, chunk_attention_mask, count_parameters, draw_feature_masks, latest_of_each_channel, zipformer_config,
)
from speechlearn.zipformer.layer import Zipformer2EncoderLayer
from speechlearn.zipformer.scaling import ScheduledFloat, set_batch_count
from zipformer_tools import frames, shaken

LISTS = Path(__file__).parent / "golden" / "zipformer"
TINY = dict(
    downsampling_factor=(1, 2, 4, 2), encoder_dim=(12, 16, 20, 16), num_encoder_layers=(1, 2, 1, 1), encoder_unmasked_dim=(12, 12, 14, 12), query_head_dim=5, pos_head_dim=3, value_head_dim=4, num_heads=2,
    feedforward_dim=16, cnn_module_kernel=(7, 5, 5, 5), pos_dim=8,
)
LAYER = dict(pos_dim=8, num_heads=2, query_head_dim=5, pos_head_dim=3, value_head_dim=4, feedforward_dim=16, cnn_module_kernel=5)
SKIPPING = ("attention_skip_rate", "conv_skip_rate", "ff2_skip_rate", "ff3_skip_rate", "const_attention_rate", "skip_rate")


def made(**changes):
    torch.manual_seed(0)
    return shaken(Zipformer2(**TINY | changes)).eval()


def full(x):
    return torch.full((x.shape[1],), len(x))


def run(encoder, x):
    return encoder(x, full(x))[0]


@functools.cache
def on_meta(size, causal=False):
    """A published size, of shapes only; nobody changes it."""
    with torch.device("meta"):
        return Zipformer2(**zipformer_config(size, causal=causal))


class TestPublishedSizes:
    @pytest.mark.parametrize("name, size, causal", [("S_noncausal_transducer_ctc_aed", "S", False), ("M_causal_transducer", "M", True), ("L_noncausal_ctc", "L", False)])
    def test_names_and_shapes_of_the_references_models(self, name, size, causal):
        stored = json.loads((LISTS / f"state_dict_{name}.json").read_text(encoding="utf-8"))
        assert (stored["config"], stored["causal"]) == (size, causal)
        with torch.device("meta"):
            model = nn.ModuleDict({"encoder_embed": Conv2dSubsampling(80, 192), "encoder": Zipformer2(**zipformer_config(size, causal=causal))})
        for part in ("encoder_embed.", "encoder."):
            ours = {key: list(value.shape) for key, value in model.state_dict().items() if key.startswith(part)}
            assert ours == {key: shape for key, shape in stored["shapes"].items() if key.startswith(part)}
            assert len(ours) > 10
        assert not list(model["encoder"].buffers())

    @pytest.mark.parametrize(
        "size, encoder, with_front_end, causal",
        [("S", 21_377_826, 21_989_779, 21_720_098), ("M", 63_382_150, 63_994_103, 63_944_070), ("L", 146_013_641, 146_625_594, 146_855_113)],
    )
    def test_counts(self, size, encoder, with_front_end, causal):
        with torch.device("meta"):
            front_end = Conv2dSubsampling(80, zipformer_config(size)["encoder_dim"][0])
        assert count_parameters(front_end) == 611_953
        assert count_parameters(on_meta(size)) == encoder == with_front_end - 611_953
        assert count_parameters(on_meta(size, causal=True)) == causal

    @pytest.mark.parametrize(
        "size, stacks",
        [
            ("S", [2_058_306, 3_825_764, 3_809_382, 4_049_226, 3_809_382, 3_825_764]), ("M", [2_058_306, 3_825_764, 11_664_631, 30_343_052, 11_664_631, 3_825_764]),
            ("L", [2_058_306, 3_825_764, 29_388_232, 77_527_341, 29_388_232, 3_825_764]),
        ],
    )
    def test_counts_of_the_stacks(self, size, stacks):
        encoder = on_meta(size)
        assert [count_parameters(stack) for stack in encoder.encoders] == stacks
        assert count_parameters(encoder) == sum(stacks) + 2

    @pytest.mark.parametrize("size, heads", [("S", {"ctc": 128_500, "transducer": 1_295_836}), ("M", {"ctc": 256_500, "transducer": 1_554_908}), ("L", {"ctc": 384_500, "transducer": 1_813_980})])
    def test_what_is_left_for_the_heads(self, size, heads):
        """The reference's totals, less front end and encoder, are what its heads have: a linear layer to 500 tokens for CTC."""
        published = {"S": (22_118_279, 23_285_615), "M": (64_250_603, 65_549_011), "L": (147_010_094, 148_439_574)}[size]
        rest = [total - 611_953 - count_parameters(on_meta(size)) for total in published]
        assert rest == [heads["ctc"], heads["transducer"]] and heads["ctc"] == 500 * (max(zipformer_config(size)["encoder_dim"]) + 1)

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("size, layers", [("S", 12), ("M", 16), ("L", 19)])
    def test_configurations(self, size, layers, causal):
        encoder, config = on_meta(size, causal), zipformer_config(size, causal=causal)
        assert sum(isinstance(module, Zipformer2EncoderLayer) for module in encoder.modules()) == layers
        assert encoder.causal is causal and config["downsampling_factor"] == (1, 2, 4, 8, 4, 2)
        assert encoder.chunk_size == ((16, 32, 64, -1) if causal else (-1,)) and encoder.left_context_frames == ((64, 128, 256, -1) if causal else (-1,))
        config["encoder_dim"] = None  # the caller's own copy
        assert zipformer_config(size, causal=causal)["encoder_dim"] is not None

    def test_the_recipes_chunks_fit_the_factors_and_kernels(self):
        encoder = on_meta("M", causal=True)
        x = torch.zeros(128, 1, 1)
        for chunk in (16, 32, 64):
            for left in (64, 128, 256, -1):
                chunks = -1 if left < 0 else max(1, left // chunk)
                assert encoder._attention_mask(x, chunk, chunks).shape == (128, 128)

    def test_unknown_size(self):
        with pytest.raises(ValueError, match="no size 'XL'; choose S, M or L"):
            zipformer_config("XL")

    @settings(max_examples=6, deadline=None)
    @given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 8]), st.integers(4, 20), st.integers(1, 3)), min_size=1, max_size=4), st.booleans())
    def test_random_encoders(self, stacks, causal):
        """A stack has its layers, and at a lower rate its factor and its channels more."""
        factors, dims, layers = zip(*stacks)
        with torch.device("meta"):
            encoder = Zipformer2(downsampling_factor=factors, encoder_dim=dims, num_encoder_layers=layers, encoder_unmasked_dim=1, causal=causal, **{**LAYER, "query_head_dim": 2})
            one = [count_parameters(Zipformer2EncoderLayer(dim, causal=causal, **{**LAYER, "query_head_dim": 2})) for dim in dims]
        expected = [n * each + (ds + dim if ds > 1 else 0) for ds, dim, n, each in zip(factors, dims, layers, one)]
        assert [count_parameters(stack) for stack in encoder.encoders] == expected and count_parameters(encoder) == sum(expected) + 2


class TestStack:
    def stack(self, n=3, **kwargs):
        torch.manual_seed(0)
        return Zipformer2Encoder(Zipformer2EncoderLayer(12, **LAYER, **kwargs), n, pos_dim=8, dropout=0.1, warmup_begin=1000, warmup_end=2000)

    def test_layers_start_equal_and_are_their_own(self):
        given = Zipformer2EncoderLayer(12, **LAYER)
        stack = Zipformer2Encoder(given, 3, pos_dim=8, dropout=0.1, warmup_begin=0, warmup_end=1)
        states = [layer.state_dict() for layer in stack.layers]
        assert all(torch.equal(states[0][key], state[key]) for key in states[0] for state in states)
        for kind in (nn.Parameter, ScheduledFloat):
            own = [{id(v) for v in (layer.parameters() if kind is nn.Parameter else (m for m in layer.modules() if isinstance(m, kind)))} for layer in (given, *stack.layers)]
            assert all(own[i].isdisjoint(own[j]) for i in range(4) for j in range(i)) and len(own[0]) > 10

    def test_layers_part_ways(self):
        stack = shaken(self.stack()).train()
        stack(frames(6, 2)).square().sum().backward()
        grads = [layer.conv_module1.in_proj.weight.grad for layer in stack.layers]
        assert not torch.allclose(grads[0], grads[1]) and not torch.allclose(grads[1], grads[2])

    def test_skip_rates_by_hand(self):
        stack = Zipformer2Encoder(Zipformer2EncoderLayer(12, **LAYER), 2, pos_dim=8, dropout=0.1, warmup_begin=1000, warmup_end=2000, initial_layerdrop_rate=0.6, final_layerdrop_rate=0.1)
        rates = lambda: [float(layer.bypass.skip_rate) for layer in stack.layers]
        assert rates() == [0.0, 0.0]
        for count, expected in {0: [0.6, 0.6], 1000: [0.6, 0.6], 1250: [0.35, 0.6], 1500: [0.1, 0.6], 1600: [0.1, 0.5], 2000: [0.1, 0.1], 10**6: [0.1, 0.1]}.items():
            set_batch_count(stack, count)
            assert rates() == pytest.approx(expected), count
        assert [float(layer.bypass_mid.skip_rate) for layer in stack.layers] == [0.0, 0.0]
        stack.eval()
        assert rates() == [0.0, 0.0]

    def test_rates_of_the_medium_size_by_hand(self):
        """Stack 3 of 6 has four layers between 4000 · 4/7 and 4000 · 5/7, and ends at 0.035 · √8."""
        encoder = on_meta("M")
        for stack, begin in ((0, 4000 / 7), (3, 16_000 / 7), (5, 24_000 / 7)):
            layers, ds = encoder.encoders[stack].layers, (1, 2, 4, 8, 4, 2)[stack]
            part = 4000 / 7 / len(layers)
            for i, layer in enumerate(layers):
                (x0, y0), (x1, y1) = layer.bypass.skip_rate.schedule.pairs
                assert (x0, y0, x1, y1) == pytest.approx((begin + i * part, 0.5, begin + (i + 1) * part, 0.035 * math.sqrt(ds)))
        stack = copy.deepcopy(encoder.encoders[3])
        set_batch_count(stack, 2500)
        assert [float(layer.bypass.skip_rate) for layer in stack.layers] == pytest.approx([0.098995, 0.299497, 0.5, 0.5], abs=1e-6)
        with torch.device("meta"):
            quick = Zipformer2(**TINY, warmup_batches=50)
        assert quick.encoders[3].layers[0].bypass.skip_rate.schedule.pairs[1][0] == pytest.approx(50)

    def test_dropout_schedule_of_the_default(self):
        encoder = Zipformer2(**TINY)
        rates = lambda: {float(m.out_proj.dropout_p) for stack in encoder.encoders for layer in stack.layers for m in (layer.feed_forward1, layer.feed_forward2, layer.feed_forward3)}
        for count, expected in {0: 0.3, 10_000: 0.2, 20_000: 0.1, 10**6: 0.1}.items():
            assert set_batch_count(encoder, count) > 50
            assert sorted(rates()) == pytest.approx([expected]), count

    def test_copies_do_not_share(self):
        given = ScheduledFloat((0.0, 0.3), (20_000.0, 0.1))
        encoder = Zipformer2(**TINY, dropout=given)
        twin = copy.deepcopy(encoder)
        set_batch_count(twin, 0)
        assert all(m.batch_count is None for m in encoder.modules() if isinstance(m, ScheduledFloat)) and given.batch_count is None
        assert all(m.batch_count == 0 for m in twin.modules() if isinstance(m, ScheduledFloat))

    def test_one_table_of_offsets_for_all_layers(self):
        """And its dropout of 0.15 acts in training, whatever the dropout of the feed-forwards is."""
        stack, seen = self.stack(dropout=0.0).train(), []
        for layer in stack.layers:
            layer.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
        torch.manual_seed(0)
        stack(torch.randn(200, 1, 12))
        assert len(seen) == 3 and seen[0] is seen[1] is seen[2] and seen[0].shape == (1, 399, 8)
        assert (seen[0] == 0).float().mean().item() == pytest.approx(0.15, abs=0.03)
        bias = seen[0][0, :, -1]  # 1, where it was not dropped
        assert sorted(set(bias.tolist())) == pytest.approx([0.0, 1 / 0.85])
        stack.eval()(torch.randn(5, 1, 12))
        assert (seen[-1][0, :, -1] == 1).all()

    def test_the_feature_mask_hides_at_every_layer(self):
        stack, x, found = shaken(self.stack()).eval(), frames(5, 2), []
        mask = torch.ones(1, 2, 12, dtype=torch.float64)
        mask[0, 1, 7:] = 0
        for layer in stack.layers:
            layer.register_forward_hook(lambda module, args, out: found.append((args[0], out)))
        y = stack(x, feature_mask=mask)
        for before, after in found:
            assert not before[:, 1, 7:].any() and before[:, 0].all() and after[:, 1, 7:].all()
        assert not y[:, 1, 7:].any() and y[:, 0].all()
        torch.testing.assert_close(y[:, 0], stack(x)[:, 0])

    def test_a_stack_at_a_lower_rate(self):
        """Means of windows by hand; the bypass by hand; the masks as the inner stack gets them."""
        inner, seen = shaken(self.stack(1, causal=True)), []
        slow = DownsampledZipformer2Encoder(inner, 12, 4, 0.1, True).double().eval()
        inner.register_forward_hook(lambda module, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True)
        x, mask = frames(10, 2), chunk_attention_mask(10, 4, 1)
        padding = torch.tensor([[False] * 3, [False, False, True]])
        y = slow(x, chunk_size=4, attn_mask=mask, src_key_padding_mask=padding)
        ((low,), kwargs, out), = seen
        torch.testing.assert_close(low, torch.stack([x[:4].mean(dim=0), x[4:8].mean(dim=0), (x[8] + 3 * x[9]) / 4]))
        assert kwargs["chunk_size"] == 1 and torch.equal(kwargs["src_key_padding_mask"], padding)
        assert kwargs["attn_mask"].tolist() == [[False, True, True], [False, False, True], [True, False, False]]
        torch.testing.assert_close(y, (x + torch.stack([out[i // 4] for i in range(10)])) / 2)  # scales of 0.5
        slow(x)
        assert seen[1][1]["chunk_size"] == -1 and seen[1][1]["attn_mask"] is None
        assert slow.layers is inner.layers and slow.num_layers == 1


class TestWidths:
    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 3), st.integers(1, 2))
    def test_latest_of_each_channel_by_a_loop(self, widths, n_frames, batch):
        outputs = [torch.randn(n_frames, batch, width) for width in widths]
        combined = latest_of_each_channel(outputs)
        assert combined.shape == (n_frames, batch, max(widths))
        for channel in range(max(widths)):
            latest = None
            for output in outputs:
                if output.shape[-1] > channel:
                    latest = output
            assert torch.equal(combined[..., channel], latest[..., channel])

    def test_what_a_stack_gets_and_what_is_combined(self):
        encoder, seen = made(), []
        for stack in encoder.encoders:
            stack.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
        x = frames(8, 2)
        y, lengths = encoder(x, torch.tensor([8, 5]))
        inputs, outputs = zip(*seen)
        assert torch.equal(inputs[0], x)
        assert torch.equal(inputs[1][..., :12], outputs[0]) and not inputs[1][..., 12:].any()
        assert torch.equal(inputs[2][..., :16], outputs[1]) and not inputs[2][..., 16:].any()
        assert torch.equal(inputs[3], outputs[2][..., :16])
        combined = torch.cat([outputs[3], outputs[2][..., 16:]], dim=-1)
        weights = encoder.downsample_output.bias.softmax(dim=0)
        torch.testing.assert_close(y, combined[::2] * weights[0] + combined[1::2] * weights[1])
        assert lengths.tolist() == [4, 3]

    def test_lengths(self):
        encoder = Zipformer2(downsampling_factor=(1, 8), encoder_dim=4, num_encoder_layers=1, encoder_unmasked_dim=4, **LAYER).eval()
        for n in (1, 2, 3, 7, 8, 9, 15, 16, 17, 33):
            y, lengths = encoder(torch.randn(n, 1, 4), torch.tensor([n]))
            assert len(y) == lengths.item() == math.ceil(n / 2)


class TestFeatureMasks:
    def test_shapes_values_and_one_draw_for_all_stacks(self):
        torch.manual_seed(0)
        x, dims, unmasked = torch.zeros(3, 5000, 4, dtype=torch.float64), (6, 9, 16), (6, 4, 8)
        masks = draw_feature_masks(x, dims, unmasked)
        assert [m.shape for m in masks] == [(1, 5000, dim) for dim in dims] and all(m.dtype == torch.float64 for m in masks)
        assert masks[0].all() and masks[1][..., :4].all() and masks[2][..., :8].all()
        first, second = masks[2][0, :, 8], masks[2][0, :, 15]
        for mask, low, middle, high in ((masks[1], 4, 6, 9), (masks[2], 8, 12, 16)):
            assert torch.equal(mask[0, :, low:middle], first[:, None].expand(-1, middle - low))
            assert torch.equal(mask[0, :, middle:high], second[:, None].expand(-1, high - middle))
        assert set(first.tolist()) == {0.0, 1.0} and (second <= first).all()
        assert first.mean().item() == pytest.approx(7 / 8, abs=0.02) and second.mean().item() == pytest.approx(49 / 64, abs=0.025)

    def test_the_two_draws_by_hand(self, monkeypatch):
        draws = iter([torch.tensor([0.1, 0.2, 0.3]).reshape(1, 3, 1), torch.tensor([0.9, 0.05, 0.9]).reshape(1, 3, 1)])
        monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: next(draws))
        (mask,) = draw_feature_masks(torch.zeros(1, 3, 1), [4], [2])
        assert mask[0].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]

    def test_where_they_act(self, monkeypatch):
        encoder, seen = made().train(), []
        assert made().get_feature_masks(frames(4)) == [1.0] * 4
        for stack in encoder.encoders:
            getattr(stack, "encoder", stack).register_forward_hook(lambda module, args, kwargs, out: seen.append((kwargs["feature_mask"], out)), with_kwargs=True)
        torch.manual_seed(0), random.seed(0)
        run(encoder, frames(8, 50))
        assert [mask.shape for mask, _ in seen] == [(1, 50, dim) for dim in TINY["encoder_dim"]]
        assert all(not (out * (1 - mask)).any() for mask, out in seen) and not seen[2][0].all()

    def test_numbers_of_different_lists(self):
        with pytest.raises(ValueError, match="argument 2 is|shorter|longer"):
            draw_feature_masks(torch.zeros(1, 3, 1), [4, 5], [2])


class TestChunks:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 15), st.integers(1, 20), st.integers(-1, 4))
    def test_mask_by_a_loop(self, n, chunk_size, left):
        mask = chunk_attention_mask(n, chunk_size, left)
        assert mask.shape == (n, n) and mask.dtype == torch.bool
        for query in range(n):
            for key in range(n):
                behind = query // chunk_size - key // chunk_size
                assert mask[query, key].item() is (behind < 0 or (left >= 0 and behind > left))

    def test_thinned_is_the_mask_of_the_low_rate(self):
        for ds in (2, 4):
            assert torch.equal(chunk_attention_mask(32, 8, 2)[::ds, ::ds], chunk_attention_mask(32 // ds, 8 // ds, 2))

    def test_what_is_drawn(self):
        assert made().get_chunk_info() == made(chunk_size=(4, 8), left_context_frames=(16,)).get_chunk_info() == (-1, -1)
        assert made(causal=True).get_chunk_info() == (-1, -1)
        one = lambda chunk, left: made(causal=True, chunk_size=(chunk,), left_context_frames=(left,)).get_chunk_info()
        assert [one(16, 64), one(16, 63), one(16, 8), one(16, 0), one(16, -1), one(-1, 64)] == [(16, 4), (16, 3), (16, 1), (16, 1), (16, -1), (-1, -1)]

    @pytest.mark.parametrize("training", [True, False])
    def test_draws_from_both_lists(self, training):
        encoder = made(causal=True, chunk_size=(4, 8, -1), left_context_frames=(16, -1)).train(training)
        random.seed(0)
        drawn = [encoder.get_chunk_info() for _ in range(300)]
        assert set(drawn) == {(4, 4), (4, -1), (8, 2), (8, -1), (-1, -1)}
        assert drawn.count((-1, -1)) == pytest.approx(100, abs=33) and drawn.count((8, 2)) == pytest.approx(50, abs=26)

    def test_one_draw_for_all_stacks(self, monkeypatch):
        encoder, seen, calls = made(causal=True, chunk_size=(4, 8), left_context_frames=(16, 8)), [], []
        for stack in encoder.encoders:
            stack.register_forward_pre_hook(lambda module, args, kwargs: seen.append((kwargs["chunk_size"], kwargs["attn_mask"])), with_kwargs=True)
        true_choice = random.choice
        monkeypatch.setattr(random, "choice", lambda values: calls.append(tuple(values)) or true_choice(values))
        run(encoder, frames(16))
        assert calls == [(4, 8), (16, 8)] and len({chunk for chunk, _ in seen}) == 1 and all(mask is seen[0][1] for _, mask in seen)


class TestErrors:
    @pytest.mark.parametrize("name", ["encoder_dim", "num_encoder_layers", "encoder_unmasked_dim", "query_head_dim", "pos_head_dim", "value_head_dim", "num_heads", "feedforward_dim", "cnn_module_kernel"])
    def test_lists_of_different_lengths(self, name):
        with pytest.raises(ValueError, match=f"^{name} has 3 entries for 4 stacks"):
            Zipformer2(**TINY | {name: (12, 12, 12)})

    @pytest.mark.parametrize("value", [13, (13,), (13,) * 4, [13] * 4])
    def test_one_number_stands_for_all(self, value):
        with torch.device("meta"):
            encoder = Zipformer2(**TINY | {"feedforward_dim": value, "query_head_dim": value, "encoder_dim": value, "encoder_unmasked_dim": 1})
        assert encoder.encoder_dim == encoder.query_head_dim == (13,) * 4
        assert [stack.layers[0].feed_forward2.in_proj.out_features for stack in encoder.encoders] == [13] * 4

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"encoder_unmasked_dim": (12, 17, 14, 12)}, r"encoder_unmasked_dim \(12, 17, 14, 12\) exceeds encoder_dim \(12, 16, 20, 16\)"),
            ({"output_downsampling_factor": 1}, "output_downsampling_factor is 1; only 2"), ({"downsampling_factor": (1, 2, 0, 2)}, "downsample is 0"), ({"cnn_module_kernel": 4}, "kernel.* 4|4.*odd"),
            ({"pos_dim": 7}, r"embed_dim \(7\) must be even"), ({"causal": True, "chunk_size": (8, 0)}, "chunk_size"), ({"causal": True, "chunk_size": ()}, "chunk_size"), ({"causal": True, "chunk_size": (-2,)}, "chunk_size"),
            ({"causal": True, "left_context_frames": ()}, "left_context_frames"),
        ],
    )
    def test_construction(self, changes, message):
        with pytest.raises(ValueError, match=message):
            Zipformer2(**TINY | changes)

    @pytest.mark.parametrize("lengths, message", [([9, 4], "x_lens goes from 4 to 9, but there are 8 frames"), ([8, 0], "x_lens goes from 0 to 8.*expected 1 to 8")])
    def test_lengths(self, lengths, message):
        with pytest.raises(ValueError, match=message):
            made()(frames(8, 2), torch.tensor(lengths))

    @pytest.mark.parametrize(
        "chunk, left, message", [(6, 24, "chunk of 6 frames is no multiple of the downsampling factor 4"), (4, 4, "the left context is 1 × 4 frames, .*kernel 5 at 1/4 of the rate looks back 8"), (4, 0, "the left context is 1 × 4 frames")]
    )
    def test_chunks_that_do_not_fit(self, chunk, left, message):
        encoder = made(causal=True, chunk_size=(chunk,), left_context_frames=(left,))
        with pytest.raises(ValueError, match=message):
            run(encoder, frames(24))

    @pytest.mark.parametrize("changes", [{}, {"causal": True}, {"causal": True, "chunk_size": (8, 16), "left_context_frames": (16,)}, {"causal": True, "chunk_size": (8,), "left_context_frames": (16, 32)}, {"causal": True, "chunk_size": (8,)}])
    def test_no_stream(self, changes):
        encoder = made(**changes)
        with pytest.raises(ValueError, match="a stream needs a causal encoder with one chunk size and one left context"):
            encoder.get_init_states()
        with pytest.raises(ValueError, match="a stream needs"):
            encoder.streaming_forward(frames(8), torch.tensor([8]), [], torch.zeros(1, 24, dtype=torch.bool))

    @pytest.mark.parametrize(
        "chunk, left, message", [(6, 24, "no multiple of the downsampling factor 4"), (8, 20, "left_context_frames.*20.*multiple.*8"), (4, 4, "the left context is 1 × 4 frames"), (8, 4, "left_context_frames.*4.*multiple.*8")]
    )
    def test_streams_that_would_not_equal_the_mask(self, chunk, left, message):
        with pytest.raises(ValueError, match=message):
            made(causal=True, chunk_size=(chunk,), left_context_frames=(left,)).get_init_states()


class TestEvaluation:
    def test_nothing_is_drawn(self, monkeypatch):
        encoder, x = made(chunk_size=(4, 8), left_context_frames=(8, 16)), frames(11, 3)
        set_batch_count(encoder, 0)
        # Not by the state of `random`: the run-time checks of types look at items of lists by chance, and draw them with `random.getrandbits`.
        for owner, name in ((random, "random"), (random, "choice"), (random, "randint"), (torch, "rand"), (torch, "rand_like"), (torch, "bernoulli")):
            monkeypatch.setattr(owner, name, lambda *args, **kwargs: pytest.fail("a draw in evaluation"))
        before = torch.get_rng_state()
        one, two = run(encoder, x.requires_grad_()), run(encoder, x)
        one.sum().backward()
        assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), before)

    def test_training_does_draw(self):
        encoder, x = made().train(), frames(11, 3)
        set_batch_count(encoder, 0)
        assert not torch.allclose(run(encoder, x), run(encoder, x))

    def test_batch_equals_single(self):
        encoder, x = made(), frames(11, 4)
        y = run(encoder, x)
        for i in range(4):
            torch.testing.assert_close(run(encoder, x[:, i : i + 1]), y[:, i : i + 1])

    @pytest.mark.parametrize("changes", [{}, {"causal": True, "chunk_size": (8,), "left_context_frames": (16,)}, {"causal": True, "chunk_size": (8,), "left_context_frames": (-1,)}])
    def test_padding_is_never_seen(self, changes):
        """Where all lengths are multiples of all factors, and of the chunk."""
        encoder, x, lengths = made(**changes), frames(24, 3).requires_grad_(), torch.tensor([24, 16, 8])
        padding = torch.arange(24) >= lengths[:, None]
        y, out_lengths = encoder(x, lengths, padding)
        real = torch.arange(12)[:, None] < out_lengths
        (grad,) = torch.autograd.grad(y[real].square().sum(), x)
        assert (grad[padding.T] == 0).all() and (grad[~padding.T] != 0).all()
        for i, n in enumerate(lengths):
            alone, _ = encoder(x[:n, i : i + 1], lengths[i : i + 1])
            torch.testing.assert_close(y[: n // 2, i : i + 1], alone)

    def test_a_low_frame_is_padding_if_its_first_frame_is(self):
        encoder, seen = made(), []
        for stack in encoder.encoders:
            getattr(stack, "encoder", stack).register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["src_key_padding_mask"].sum(dim=1).tolist()), with_kwargs=True)
        lengths = torch.tensor([13, 9, 1])
        encoder(frames(13, 3), lengths, torch.arange(13) >= lengths[:, None])
        assert seen == [[0, 4, 12], [0, 2, 6], [0, 1, 3], [0, 2, 6]]  # of 13, 7, 4 and 7 frames

    def test_other_lengths_leak_as_in_the_reference(self):
        encoder, x, lengths = made(), frames(24, 2).requires_grad_(), torch.tensor([24, 18])
        padding = torch.arange(24) >= lengths[:, None]
        y, _ = encoder(x, lengths, padding)
        (grad,) = torch.autograd.grad(y[:9, 1].square().sum(), x)
        assert grad[18:20, 1].any() and not grad[20:, 1].any() and not grad[:, 0].any()

    def test_no_parameter_is_idle(self):
        for changes in ({}, {"causal": True, "chunk_size": (4,), "left_context_frames": (8,)}):
            encoder = made(**changes)
            run(encoder, frames(24, 2)).square().sum().backward()
            assert {name.rsplit(".", 1)[1] for name, p in encoder.named_parameters() if p.grad is None} == {"bypass_scale"}
            assert all(name.count("bypass") == 1 and ".layers." in name for name, p in encoder.named_parameters() if p.grad is None)
            assert [name for name, p in encoder.named_parameters() if p.grad is not None and not p.grad.any()] == []

    def test_save_and_load(self):
        encoder, x, stored = made(causal=True), frames(8, 2), io.BytesIO()
        torch.save(encoder.state_dict(), stored)
        stored.seek(0)
        other = Zipformer2(**TINY, causal=True).double().eval()
        other.load_state_dict(torch.load(stored, weights_only=True), strict=True)
        assert torch.equal(run(other, x), run(encoder, x))
        with pytest.raises(RuntimeError, match="encoders.1.encoder.layers.1.conv_module2.depthwise_conv"):
            Zipformer2(**TINY).load_state_dict(encoder.state_dict(), strict=True)


class TestCausality:
    @pytest.mark.parametrize("chunk, left", [(4, 8), (4, -1), (8, 8), (8, 16), (12, 24), (16, -1), (40, 40)])
    def test_later_chunks_have_no_influence(self, chunk, left):
        """The gradient is exactly zero after the own chunk; before it, without a limit, nowhere."""
        encoder, x = made(causal=True, chunk_size=(chunk,), left_context_frames=(left,)), frames(40).requires_grad_()
        y = run(encoder, x)
        for frame in range(20):
            end = (2 * frame // chunk + 1) * chunk
            grad = torch.autograd.grad(y[frame].square().sum(), x, retain_graph=True)[0][:, 0].abs().amax(dim=1)
            assert not grad[end:].any() and grad[end - chunk : end].all()
            if left < 0:
                assert grad[:end].all()

    def test_a_limit_to_the_left(self):
        """5 layers, each looking back 3 times 2 chunks by attention, and by its convolutions: far frames are beyond all of them."""
        encoder, x = made(causal=True, chunk_size=(4,), left_context_frames=(8,)), frames(400).requires_grad_()
        y = run(encoder, x)
        (grad,) = torch.autograd.grad(y[-1].square().sum(), x)
        reach = 5 * (3 * 8 + 2 * 8) + 4
        assert not grad[: 400 - reach].any() and grad[-60:, 0].any(dim=1).all()

    def test_without_chunks_the_future_counts(self):
        x = frames(16).requires_grad_()
        (grad,) = torch.autograd.grad(run(made(causal=True), x)[0].square().sum(), x)
        assert grad[:, 0].any(dim=1).all()


class Stream:
    """Several utterances, chunk by chunk."""

    def __init__(self, encoder, x, lengths):
        self.encoder, self.x, self.lengths, self.at = encoder, x, lengths, 0
        self.chunk, self.left = encoder.chunk_size[0], encoder.left_context_frames[0]
        self.states = [state.double() for state in encoder.get_init_states(x.shape[1])]
        self.out = []

    def mask(self):
        unseen = self.at <= self.left - 1 - torch.arange(self.left)
        new = self.at + torch.arange(self.chunk) >= self.lengths[:, None]
        return torch.cat([unseen.expand(len(self.lengths), -1), new], dim=1)

    def next(self):
        part = self.x[self.at : self.at + self.chunk]
        return part, (self.lengths - self.at).clamp(0, self.chunk), self.mask()

    def step(self):
        part, lengths, mask = self.next()
        shapes = [state.shape for state in self.states]
        out, out_lengths, self.states = self.encoder.streaming_forward(part, lengths, self.states, mask)
        assert [state.shape for state in self.states] == shapes and torch.equal(out_lengths, (lengths + 1) // 2)
        self.out.append(out)
        self.at += self.chunk
        return out


def stacked(states):
    """Streams side by side: keys, hidden values and values on axis 1, the convolutions' on axis 0."""
    return [torch.cat(tensors, dim=1 if i % 6 < 4 else 0) for i, tensors in enumerate(zip(*states))]


def unstacked(states, n):
    parts = [tensor.chunk(n, dim=1 if i % 6 < 4 else 0) for i, tensor in enumerate(states)]
    return [[part[k] for part in parts] for k in range(n)]


class TestStreaming:
    @pytest.mark.parametrize(
        "chunk, left, n_chunks, changes",
        [
            (4, 8, 7, {}), (8, 8, 5, {}), (8, 24, 3, {}), (16, 16, 3, {}), (4, 16, 9, {"num_encoder_layers": 2, "num_heads": (1, 2, 3, 1)}),
            (8, 16, 5, {"downsampling_factor": (1, 2, 4, 8), "cnn_module_kernel": (9, 5, 5, 3)}), (6, 12, 5, {"downsampling_factor": (3, 1, 2, 6), "cnn_module_kernel": 3}), (2, 4, 9, {"downsampling_factor": (1, 2, 1, 2), "cnn_module_kernel": 5}),
        ],
    )
    def test_chunk_by_chunk_equals_the_mask(self, chunk, left, n_chunks, changes):
        encoder = made(causal=True, chunk_size=(chunk,), left_context_frames=(left,), **changes)
        x = frames(chunk * n_chunks, 2)
        stream = Stream(encoder, x, full(x))
        for _ in range(n_chunks):
            stream.step()
        torch.testing.assert_close(torch.cat(stream.out), run(encoder, x), atol=1e-10, rtol=0)

    def test_in_thirty_two_bits(self):
        encoder = made(causal=True, chunk_size=(8,), left_context_frames=(16,)).float()
        x = frames(40, 2).float()
        stream = Stream(encoder, x, full(x))
        stream.states = encoder.get_init_states(2)
        for _ in range(5):
            stream.step()
        assert (torch.cat(stream.out) - run(encoder, x)).abs().max() < 1e-5

    @pytest.mark.parametrize("lengths", [[40, 28, 12], [40, 27, 13], [33, 17, 5]])
    def test_utterances_of_different_lengths(self, lengths):
        """Real frames equal the masked forward, inside a chunk and inside a low frame, too."""
        encoder = made(causal=True, chunk_size=(8,), left_context_frames=(16,))
        x, lengths = frames(40, 3), torch.tensor(lengths)
        stream = Stream(encoder, x, lengths)
        for _ in range(5):
            stream.step()
        whole, out_lengths = encoder(x, lengths, torch.arange(40) >= lengths[:, None])
        for i, n in enumerate(out_lengths):
            torch.testing.assert_close(torch.cat(stream.out)[:n, i], whole[:n, i], atol=1e-10, rtol=0)

    def test_streams_join_and_leave(self):
        """A joins B in the middle, and goes on alone; both as if they had always been alone."""
        encoder = made(causal=True, chunk_size=(8,), left_context_frames=(16,))
        xs = frames(40, 1, seed=2), frames(24, 1, seed=3)
        whole = [run(encoder, x) for x in xs]
        a, b = (Stream(encoder, x, full(x)) for x in xs)
        a.step(), a.step()
        for _ in range(2):  # A is at 16 and 24, B at 0 and 8
            parts, lengths, masks = zip(a.next(), b.next())
            assert not torch.equal(masks[0], masks[1])
            out, out_lengths, states = encoder.streaming_forward(torch.cat(parts, dim=1), torch.cat(lengths), stacked([a.states, b.states]), torch.cat(masks))
            assert out_lengths.tolist() == [4, 4]
            for k, (stream, own) in enumerate(zip((a, b), unstacked(states, 2))):
                stream.states, stream.at = own, stream.at + 8
                stream.out.append(out[:, k : k + 1])
        a.step(), b.step()
        for stream, expected in zip((a, b), whole):
            torch.testing.assert_close(torch.cat(stream.out), expected, atol=1e-10, rtol=0)

    def test_states(self):
        encoder = made(causal=True, chunk_size=(8,), left_context_frames=(16,))
        states = encoder.get_init_states(3)
        assert len(states) == 6 * 5 and all(not state.any() for state in states)
        # The stack at 1/4: 20 channels, 2 heads of 5 and 4, hidden 15, a kernel of 5.
        assert [tuple(state.shape) for state in states[18:24]] == [(4, 3, 10), (1, 3, 4, 15), (4, 3, 8), (4, 3, 8), (3, 20, 2), (3, 20, 2)]
        assert [tuple(state.shape) for state in states[:6]] == [(16, 3, 10), (1, 3, 16, 9), (16, 3, 8), (16, 3, 8), (3, 12, 3), (3, 12, 3)]
        assert all(state.is_meta for state in encoder.get_init_states(device="meta"))


class TestTraining:
    @pytest.mark.parametrize("draw", [0.0, 0.999999])
    def test_sixteen_bits(self, draw, monkeypatch):
        torch.manual_seed(0)
        monkeypatch.setattr(random, "random", lambda: draw)
        encoder, x = Zipformer2(**TINY, causal=True, chunk_size=(8,), left_context_frames=(16,)).train(), frames(24, 3).float().requires_grad_()
        set_batch_count(encoder, 100)
        lengths = torch.tensor([24, 17, 9])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, _ = encoder(x, lengths, torch.arange(24) >= lengths[:, None])
            loss = y.float().square().mean()
        loss.backward()
        assert y.isfinite().all() and x.grad.isfinite().all() and x.grad.any()
        grads = [p.grad for p in encoder.parameters() if p.grad is not None]
        assert len(grads) > 200 and all(g.isfinite().all() and g.dtype == torch.float32 for g in grads)

    def test_learns(self):
        """Is this pair of frames the same vector as the pair before? No frame alone tells."""
        torch.manual_seed(0), random.seed(0)
        encoder, out, vectors = Zipformer2(**TINY), nn.Linear(20, 2), torch.randn(2, 12)
        model = nn.ModuleList([encoder, out])
        optimiser = ScaledAdam(list(model.parameters()), lr=0.05, clipping_scale=2.0)
        losses = []
        for step in range(50):
            set_batch_count(model, 200.0 * step)
            labels = torch.randint(2, (8, 16)).repeat_interleave(2, dim=0)
            y, lengths = encoder(vectors[labels], torch.full((16,), 16))
            target = (labels[::2][1:] == labels[::2][:-1]).long()
            loss = nn.functional.cross_entropy(out(y)[1:].flatten(0, 1), target.flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert sum(losses[:5]) / 5 > 0.65  # ln 2 = 0.693
        assert sum(losses[-10:]) / 10 < 0.4
