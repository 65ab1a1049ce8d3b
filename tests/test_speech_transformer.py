"""Speech-Transformer: lengths that equal the convolutions', utterances that ignore their batch mates, and a loss computed a second time by hand."""
import dataclasses
import itertools
import json
import math
import re

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import nn
from torch.nn import functional as F

from speechlearn.data.batches import Batch, SpeechDataset, assert_batch_independent, collate, is_padding
from speechlearn.data.synthetic import sampler
from speechlearn.sound.features import LogMel
from speechlearn.speech_transformer.decoder import SpeechTransformer, base_config, big_config
from speechlearn.speech_transformer.encoder import (
    ConvFrontEnd, SpeechEncoder, SpeechTransformerConfig, TwoDimensionalAttention, check_features, halved, without_padding,
)
from speechlearn.text import CharacterVocabulary
from speechlearn.transformer.attention import Attention, padding_mask
from speechlearn.transformer.blocks import count_parameters, shifted

LENGTHS = torch.tensor([37, 1, 20, 9])
OPTIONS = [
    dict(n_front_attention=n, local_kernel=kernel, ctc_weight=ctc)
    for n, kernel, ctc in itertools.product((0, 1, 2), (0, 5), (0.0, 0.3))
]


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small(**changed) -> SpeechTransformerConfig:
    return SpeechTransformerConfig(
        **{**dict(vocab=11, n_bins=12, d_model=16, n_heads=2, n_encoder_layers=2, n_decoder_layers=2, d_feedforward=24, front_channels=3), **changed}
    )


def built(seed=0, louder=1.0, **changed) -> SpeechTransformer:
    """A small model; `louder` weights make attention uneven, so that what leaks can be seen."""
    torch.manual_seed(seed)
    model = SpeechTransformer(small(**changed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(louder)
    return model


def padded(lengths=LENGTHS, bins=12, seed=0, filler=0.0, extra=0):
    features = noise(len(lengths), int(lengths.max()) + extra, bins, seed=seed)
    return features.masked_fill(is_padding(lengths, features.shape[1])[..., None], filler)


def a_batch(lengths=LENGTHS, target_lengths=(4, 1, 3, 2), vocab=11, seed=0, pad=1) -> Batch:
    target_lengths = torch.tensor(target_lengths)
    generator = torch.Generator().manual_seed(seed + 100)
    targets = torch.randint(4, vocab, (len(lengths), int(target_lengths.max())), generator=generator)
    targets = targets.masked_fill(is_padding(target_lengths, targets.shape[1]), pad)
    n = len(lengths)
    return Batch(padded(lengths, seed=seed), lengths, targets, target_lengths, ["?"] * n, [f"u{i}" for i in range(n)])


def shown(lengths_then_maps):
    """A module on maps, as `assert_batch_independent` wants it: time on the second axis."""
    return lambda x, n: (lambda maps, m: (maps.transpose(1, 2), m))(*lengths_then_maps(x, n))


class TestLengths:
    def test_by_hand(self):
        assert halved(torch.tensor([1, 2, 3, 4, 5, 93])).tolist() == [1, 1, 2, 2, 3, 47]
        assert halved(halved(torch.tensor([93, 9, 4]))).tolist() == [24, 3, 1]
        assert halved(torch.tensor([5])).dtype == torch.int64

    @pytest.mark.parametrize("n", range(1, 41))
    def test_equal_the_convolution(self, n):
        front = ConvFrontEnd(8, 2)
        maps, steps = front(noise(1, n, 8), torch.tensor([n]))
        assert maps.shape[2] == int(steps[0]) == int(halved(halved(torch.tensor([n])))[0]) == math.ceil(math.ceil(n / 2) / 2)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 6))
    def test_of_any_batch_equal_those_alone(self, frames, extra):
        lengths = torch.tensor(frames)
        front = ConvFrontEnd(8, 2)
        maps, steps = front(padded(lengths, 8, extra=extra), lengths)
        alone = [front(noise(1, n, 8), torch.tensor([n]))[0].shape[2] for n in frames]
        assert steps.tolist() == alone
        assert maps.shape[2] >= int(steps.max())

    @pytest.mark.parametrize("bins", [7, 8, 13, 40, 80])
    def test_bands(self, bins):
        front = ConvFrontEnd(bins, 2)
        assert front(noise(1, 5, bins), torch.tensor([5]))[0].shape[3] == front.n_bands


class TestFrontEnd:
    def test_equals_plain_convolutions_for_one_utterance(self):
        torch.manual_seed(0)
        front, x = ConvFrontEnd(12, 3), noise(1, 21, 12)
        plain = nn.Sequential(front.convolutions[0], nn.ReLU(), front.convolutions[1], nn.ReLU())
        assert torch.equal(front(x, torch.tensor([21]))[0], plain(x[:, None]))

    def test_by_hand(self):
        """One frame and one kernel after the other: all weights one, no bias, so each place is a sum of its neighbours."""
        front = ConvFrontEnd(7, 1)
        for convolution in front.convolutions:
            nn.init.ones_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        maps, _ = front(torch.ones(1, 1, 7), torch.tensor([1]))
        # bins in reach of bands 0…3 of the first map: 2, 3, 3, 2; then the second map sums (0, 1) and (1, 2, 3)
        assert maps.flatten().tolist() == [5.0, 8.0]

    def test_a_step_hears_seven_frames(self):
        torch.manual_seed(0)
        front = ConvFrontEnd(12, 8)
        for step, expected in ((0, range(0, 4)), (1, range(1, 8)), (3, range(9, 16)), (5, range(17, 21))):
            x = noise(1, 21, 12).requires_grad_()
            front(x, torch.tensor([21]))[0][:, :, step].sum().backward()
            assert x.grad.abs().sum(dim=(0, 2)).nonzero().flatten().tolist() == list(expected)

    def test_without_padding(self):
        x = noise(2, 3, 5, 4)
        y = without_padding(x, torch.tensor([5, 2]))
        assert torch.equal(y[0], x[0]) and torch.equal(y[1, :, :2], x[1, :, :2])
        assert (y[1, :, 2:] == 0).all()
        assert (x[1, :, 2:] != 0).all(), "the input itself must stay as it was"

    @pytest.mark.parametrize("filler", [0.0, 5.0, math.nan, math.inf])
    def test_batch_independent_whatever_the_padding_holds(self, filler):
        torch.manual_seed(0)
        front = ConvFrontEnd(12, 4)
        assert_batch_independent(shown(front), padded(filler=filler, extra=3), LENGTHS)

    def test_the_check_finds_a_front_end_that_does_not_mask(self):
        torch.manual_seed(0)
        front = ConvFrontEnd(12, 4)

        def careless(x, lengths):
            maps = x[:, None]
            for convolution in front.convolutions:
                maps, lengths = F.relu(convolution(maps)), halved(lengths)
            return without_padding(maps, lengths).transpose(1, 2), lengths  # masked at the end only

        with pytest.raises(AssertionError, match="changes with its batch mates"):
            assert_batch_independent(careless, padded(), LENGTHS)


BAD_FEATURES = {
    "one utterance alone": (torch.zeros(20, 12), torch.tensor([20]), r"shape \(20, 12\); expected \(batch, frames, bins\).*features\[None\]"),
    "with channels": (torch.zeros(2, 1, 20, 12), torch.tensor([20, 3]), r"shape \(2, 1, 20, 12\)"),
    "other bins": (torch.zeros(2, 20, 40), torch.tensor([20, 3]), "40 bins; this model was made for 12"),
    "frames and bins exchanged": (torch.zeros(2, 12, 20), torch.tensor([12, 3]), "20 bins; this model was made for 12"),
    "too long": (torch.zeros(2, 20, 12), torch.tensor([20, 21]), "21.*20"),
    "empty utterance": (torch.zeros(2, 20, 12), torch.tensor([20, 0]), "0.*between 1 and"),
    "negative": (torch.zeros(2, 20, 12), torch.tensor([20, -1]), "-1.*between 1 and"),
    "a length too few": (torch.zeros(2, 20, 12), torch.tensor([20]), "2 utterances"),
    "a length too many": (torch.zeros(2, 20, 12), torch.tensor([20, 20, 20]), "2 utterances"),
}


@pytest.mark.parametrize("name", BAD_FEATURES)
def test_bad_features_are_refused(name):
    features, lengths, message = BAD_FEATURES[name]
    with pytest.raises(ValueError, match=message):
        check_features(features, lengths, 12)
    for module in (ConvFrontEnd(12, 2), SpeechEncoder(small())):  # where shapes are checked at run time, that check may be first
        with pytest.raises((ValueError, TypeCheckError)) as caught:
            module(features, lengths)
        assert isinstance(caught.value, TypeCheckError) or re.search(message, str(caught.value)), caught.value


def test_good_features_are_accepted():
    check_features(torch.zeros(2, 20, 12), torch.tensor([20, 1]), 12)


def slowly(module: TwoDimensionalAttention, maps):
    """2-D attention of one utterance without padding, one head and one position at a time."""
    query, key, value = (convolution(maps[None])[0] for convolution in (module.query, module.key, module.value))
    n_heads, n_steps, n_bands = query.shape
    time, frequency = torch.zeros_like(value), torch.zeros_like(value)
    for h in range(n_heads):
        for t in range(n_steps):
            scores = torch.stack([query[h, t] @ key[h, other] for other in range(n_steps)]) / math.sqrt(n_bands)
            time[h, t] = scores.softmax(dim=0) @ value[h]
        for f in range(n_bands):
            scores = torch.stack([query[h, :, f] @ key[h, :, other] for other in range(n_bands)]) / math.sqrt(n_steps)
            frequency[h, :, f] = value[h] @ scores.softmax(dim=0)
    return maps + F.relu(module.mix(torch.cat([time, frequency])[None])[0])


class TestTwoDimensionalAttention:
    def module(self, louder=1.0, channels=3, n_heads=2):
        torch.manual_seed(1)
        module = TwoDimensionalAttention(channels, n_heads).double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(louder)
        return module

    @torch.no_grad()
    def test_equals_a_slow_version_also_in_a_padded_batch(self):
        module, maps, lengths = self.module(4.0), noise(3, 3, 7, 5, dtype=torch.float64), torch.tensor([7, 4, 1])
        together = module(maps, lengths)
        for i, n in enumerate(lengths.tolist()):
            assert torch.allclose(together[i, :, :n], slowly(module, maps[i, :, :n]), atol=1e-12), f"utterance {i}"

    def test_batch_independent_also_with_uneven_weights(self):
        """Without the utterance's own scale in the frequency attention this fails; with the even weights of a fresh module it would pass by chance."""
        module = self.module(4.0)
        maps = noise(3, 9, 3, 5, seed=2, dtype=torch.float64).masked_fill(is_padding(torch.tensor([9, 5, 2]), 9)[:, :, None, None], math.nan)
        assert_batch_independent(lambda x, n: (module(x.transpose(1, 2), n).transpose(1, 2), n), maps, torch.tensor([9, 5, 2]), atol=1e-10)

    def test_weights(self):
        module, maps, lengths = self.module(3.0), noise(2, 3, 6, 4, dtype=torch.float64), torch.tensor([6, 3])
        time, frequency = module.weights(maps, lengths)
        assert time.shape == (2, 2, 6, 6) and frequency.shape == (2, 2, 4, 4)
        assert torch.allclose(time.sum(dim=-1), torch.ones(2, 2, 6, dtype=torch.float64)) and torch.allclose(frequency.sum(dim=-1), torch.ones(2, 2, 4, dtype=torch.float64))
        assert (time[1, :, :, 3:] == 0).all() and (time[1, :, :3, :3] > 0).all()
        query, key = (convolution(maps[1:, :, :3])[0] for convolution in (module.query, module.key))
        assert torch.allclose(time[1, :, :3, :3], (query @ key.transpose(1, 2) / 2).softmax(dim=-1))
        assert torch.allclose(frequency[1], (query.transpose(1, 2) @ key / math.sqrt(3)).softmax(dim=-1))

    def test_gradcheck(self):
        module, maps, lengths = self.module(2.0, channels=2, n_heads=1), noise(2, 2, 3, 4, seed=5, dtype=torch.float64).requires_grad_(), torch.tensor([3, 2])
        names, values = zip(*((name, p.detach().clone().requires_grad_()) for name, p in module.named_parameters()))

        def run(maps, *values):
            return without_padding(torch.func.functional_call(module, dict(zip(names, values)), (maps, lengths)), lengths)

        assert torch.autograd.gradcheck(run, (maps, *values))

    def test_nothing_flows_back_into_the_padding(self):
        module, maps, lengths = self.module(2.0), noise(1, 3, 6, 4, dtype=torch.float64).requires_grad_(), torch.tensor([4])
        without_padding(module(maps, lengths), lengths).square().sum().backward()
        assert (maps.grad[:, :, 4:] == 0).all() and (maps.grad[:, :, :4] != 0).all()


class TestConfig:
    @settings(max_examples=40, deadline=None)
    @given(
        st.integers(4, 5000), st.integers(1, 8), st.integers(1, 32), st.sampled_from([0, 3, 15]), st.floats(0, 0.99), st.booleans(), st.booleans(), st.floats(0, 1), st.integers(0, 3)
    )
    def test_json_round_trip(self, vocab, heads, half_head, kernel, dropout, tie, norm_first, ctc, front):
        config = SpeechTransformerConfig(
            vocab, d_model=2 * half_head * heads, n_heads=heads, local_kernel=kernel, dropout=dropout, tie_weights=tie, norm_first=norm_first, ctc_weight=ctc, n_front_attention=front
        )
        again = SpeechTransformerConfig.from_json(config.to_json())
        assert again == config and all(type(a) is type(b) for a, b in zip(dataclasses.astuple(again), dataclasses.astuple(config)))
        assert json.loads(config.to_json()) == dataclasses.asdict(config)

    def test_json_with_defaults_left_out(self):
        assert SpeechTransformerConfig.from_json('{"vocab": 30}') == SpeechTransformerConfig(30)

    def test_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            small().d_model = 32

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"vocab": 3}, "vocab is 3.*eos=3|vocab is 3.*between"),
            ({"blank": 40}, "vocab is 11"),
            ({"pad": 2}, "pad, sos and eos must differ; they are 2, 2 and 3"),
            ({"eos": 1}, "must differ; they are 1, 2 and 1"),
            ({"d_model": 18, "n_heads": 4}, r"d_model \(18\) must be even and a multiple of n_heads \(4\)"),
            ({"d_model": 15, "n_heads": 3}, r"d_model \(15\) must be even"),
            ({"n_bins": 0}, "n_bins is 0"),
            ({"local_kernel": 4}, "local_kernel is 4; an odd one has a middle"),
            ({"dropout": 1.0}, "dropout is 1.0; expected at least 0 and below 1"),
            ({"dropout": -0.1}, "dropout is -0.1"),
            ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
            ({"ctc_weight": 1.5}, "ctc_weight is 1.5; expected 0 to 1"),
            ({"ctc_weight": -0.1}, "ctc_weight is -0.1"),
        ],
    )
    def test_refusals(self, changed, message):
        with pytest.raises(ValueError, match=message):
            small(**changed)

    def test_unknown_settings_are_named(self):
        with pytest.raises(ValueError, match=r"\['n_layers'\], which a Speech-Transformer does not; known: vocab, n_bins"):
            SpeechTransformerConfig.from_json('{"vocab": 30, "n_layers": 3}')

    @pytest.mark.parametrize(("make", "layers"), [(base_config, (6, 6)), (big_config, (12, 6))])
    def test_sizes_of_base_and_big(self, make, layers):
        config = make(100, n_bins=40)
        assert (config.n_encoder_layers, config.n_decoder_layers, config.d_model, config.vocab, config.n_bins) == (*layers, 256, 100, 40)


class TestEncoder:
    @pytest.mark.parametrize("options", OPTIONS[::2], ids=str)
    def test_batch_independent(self, options):
        encoder = built(**options).encoder.eval()
        assert_batch_independent(encoder, padded(filler=math.nan, extra=2), LENGTHS, atol=1e-5)

    @pytest.mark.parametrize("options", OPTIONS[::2], ids=str)
    def test_batch_independent_with_uneven_attention(self, options):
        encoder = built(louder=2.0, **options).encoder.eval().double()
        assert_batch_independent(encoder, padded(filler=7.0, extra=5).double(), LENGTHS, atol=1e-9)

    @pytest.mark.parametrize("norm_first", [True, False])
    def test_shape_and_lengths(self, norm_first):
        memory, steps = built(norm_first=norm_first).encoder(padded(), LENGTHS)
        assert memory.shape == (4, 10, 16) and steps.tolist() == [10, 1, 5, 3]

    def test_flattening_is_channel_after_channel(self):
        encoder, caught = built().encoder.eval(), []
        hook = encoder.project.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
        encoder(padded(), LENGTHS)
        hook.remove()
        maps, _ = encoder.front(padded(), LENGTHS)
        for c, t, f in itertools.product(range(3), (0, 4, 9), range(3)):
            assert caught[0][0, t, c * 3 + f] == maps[0, c, t, f]

    def test_the_sound_is_scaled_before_positions_are_added(self):
        encoder, caught = built().encoder.eval(), []
        hook = encoder.positions.register_forward_hook(lambda _, inputs, output: caught.append((inputs[0], output)))
        encoder(padded(), LENGTHS)
        hook.remove()
        content = encoder.project(rearrange(encoder.front(padded(), LENGTHS)[0], "b c t f -> b t (c f)")) * math.sqrt(16)
        assert torch.allclose(caught[0][0], content, atol=1e-6)
        assert torch.allclose(caught[0][1] - content, encoder.positions.table[:10].expand(4, -1, -1), atol=1e-6)

    def test_each_step_hears_the_whole_utterance_and_nothing_else(self):
        encoder, x = built().encoder.eval(), padded().requires_grad_()
        memory, _ = encoder(x, LENGTHS)
        memory[2, 0].square().sum().backward()
        heard = x.grad.abs().sum(dim=2) > 0
        assert heard[2, :20].all() and not heard[2, 20:].any() and not heard[[0, 1, 3]].any()

    def test_longer_than_the_table_of_positions(self):
        encoder = built().encoder.eval()
        with torch.no_grad():
            memory, steps = encoder(noise(1, 1101, 12), torch.tensor([1101]))
        assert memory.shape == (1, 276, 16) and steps.tolist() == [276] and memory.isfinite().all()

    def test_ends_in_the_norm_of_the_stack(self):
        encoder, caught = built(louder=2.0).encoder.eval(), []
        hook = encoder.positions.register_forward_hook(lambda _, inputs, output: caught.append(output))
        memory, steps = encoder(padded(), LENGTHS)
        hook.remove()
        assert torch.allclose(memory, encoder.stack(caught[0], mask=padding_mask(steps, memory.shape[1])), atol=1e-6)

    def test_dropout_is_everywhere_the_same(self):
        model = built(dropout=0.3, local_kernel=5)
        rates = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
        rates |= {name: module.dropout for name, module in model.named_modules() if isinstance(module, Attention)}
        assert set(rates.values()) == {0.3} and {"encoder.positions.dropout", "encoder.local.0.dropout", "decoder.positions.dropout"} < set(rates)

    @pytest.mark.parametrize("norm_first", [True, False])
    def test_both_halves_know_where_the_norm_stands(self, norm_first):
        model = built(norm_first=norm_first)
        assert [block.norm_first for stack in (model.encoder.stack, model.decoder.stack) for block in stack.blocks] == [norm_first] * 4

    def test_options_build_what_they_say(self):
        encoder = built(n_front_attention=2, local_kernel=5).encoder
        assert len(encoder.front_attention) == 2 and [m.convolution.kernel_size for m in encoder.local] == [(5,), (5,)]
        assert len(built().encoder.front_attention) == len(built().encoder.local) == 0

    def test_local_mixers_are_used(self):
        encoder = built(local_kernel=5).encoder.eval()
        before, _ = encoder(padded(), LENGTHS)
        with torch.no_grad():
            encoder.local[1].project.bias.add_(1.0)
        assert not torch.allclose(before, encoder(padded(), LENGTHS)[0])


class TestForward:
    def test_the_learners_shape_test(self):
        vocabulary, text = CharacterVocabulary(), "listening is a practice of freedom"
        targets, lengths = vocabulary.encode_batch([text, text])
        torch.manual_seed(0)
        model = SpeechTransformer(SpeechTransformerConfig(len(vocabulary), d_model=32, n_encoder_layers=1, n_decoder_layers=1, d_feedforward=64)).eval()
        seen, answer = shifted(targets, lengths, sos=vocabulary.sos, eos=vocabulary.eos, pad=vocabulary.pad)
        with torch.no_grad():
            log_probs = model(noise(2, 300, 80), torch.tensor([300, 211]), seen)
        assert log_probs.shape == (2, len(text) + 1, len(vocabulary)) and seen.shape == answer.shape
        assert torch.allclose(log_probs.exp().sum(dim=-1), torch.ones(2, len(text) + 1), atol=1e-5)
        assert vocabulary.decode(answer[0]) == text

    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @torch.no_grad()
    def test_batch_independent_from_sound_to_text(self, options):
        model = built(louder=1.5, **options).eval()
        tokens, features = torch.tensor([[2, 5, 6, 7, 8]] * 4), padded(filler=math.nan, extra=3)
        together = model(features, LENGTHS, tokens)
        for i, n in enumerate(LENGTHS.tolist()):
            alone = model(features[i : i + 1, :n], LENGTHS[i : i + 1], tokens[i : i + 1])
            assert (together[i] - alone[0]).abs().max() <= 1e-5, f"utterance {i}"

    @torch.no_grad()
    def test_blind_to_what_is_not_written_yet(self):
        model, tokens = built().eval(), torch.tensor([[2, 5, 6, 7, 8]] * 4)
        changed = tokens.clone()
        changed[:, 3:] = 9
        a, b = model(padded(), LENGTHS, tokens), model(padded(), LENGTHS, changed)
        assert torch.allclose(a[:, :3], b[:, :3], atol=1e-6) and not torch.allclose(a[:, 3], b[:, 3], atol=1e-4)

    @torch.no_grad()
    def test_hears_the_sound(self):
        model, tokens = built().eval(), torch.tensor([[2, 5]] * 4)
        assert not torch.allclose(model(padded(), LENGTHS, tokens), model(padded(seed=9), LENGTHS, tokens), atol=1e-4)

    @pytest.mark.parametrize("options", [{}, {"tie_weights": True}, {"norm_first": False}, {"n_front_attention": 1, "local_kernel": 5}], ids=str)
    @pytest.mark.parametrize("use_cache", [True, False])
    @torch.no_grad()
    def test_steps_equal_the_whole(self, options, use_cache):
        model, tokens = built(**options).eval(), torch.tensor([[2, 5, 6, 7, 8, 9]] * 4)
        whole, state = model(padded(), LENGTHS, tokens), model.start(padded(), LENGTHS, use_cache=use_cache)
        for u in range(tokens.shape[1]):
            assert torch.allclose(model.step(tokens[:, u], state), whole[:, u], atol=1e-5), f"token {u}"

    @torch.no_grad()
    def test_rows_can_be_chosen_while_writing(self):
        model, tokens = built().eval(), torch.tensor([[2, 5, 6], [2, 7, 8], [2, 9, 4], [2, 6, 6]])
        state = model.start(padded(), LENGTHS)
        model.step(tokens[:, 0], state)
        model.step(tokens[:, 1], state)
        rows = torch.tensor([2, 0, 2])
        state.select(rows)
        assert torch.allclose(model.step(tokens[rows, 2], state), model(padded(), LENGTHS, tokens)[rows, 2], atol=1e-5)


class TestLoss:
    def by_hand(self, model, batch, smoothing):
        config = model.config
        memory, steps = model.encoder(batch.features, batch.feature_lengths)
        total = count = 0
        for i, n in enumerate(batch.target_lengths.tolist()):
            text = batch.targets[i, :n].tolist()
            log_probs = model.decoder(torch.tensor([[config.sos, *text]]), memory[i : i + 1, : int(steps[i])])[0]
            total = total + F.cross_entropy(log_probs, torch.tensor([*text, config.eos]), reduction="sum", label_smoothing=smoothing)
            count += n + 1
        return total / count

    @pytest.mark.parametrize("training", [True, False])
    def test_equals_torch_and_smooths_only_in_training(self, training):
        model, batch = built(dropout=0.0, label_smoothing=0.2).train(training), a_batch()
        losses = model.loss(batch)
        assert set(losses) == {"loss"}
        assert torch.allclose(losses["loss"], self.by_hand(model, batch, 0.2 if training else 0.0), atol=1e-5)
        assert not torch.allclose(losses["loss"], self.by_hand(model, batch, 0.0 if training else 0.2), atol=1e-3)

    @pytest.mark.parametrize("weight", [0.3, 1.0])
    def test_with_a_ctc_head(self, weight):
        model, batch = built(dropout=0.0, label_smoothing=0.0, ctc_weight=weight), a_batch(torch.tensor([37, 30, 40, 33]))
        losses = model.loss(batch)
        memory, steps = model.encoder(batch.features, batch.feature_lengths)
        ctc = F.ctc_loss(model.ctc_head(memory).log_softmax(-1).transpose(0, 1), batch.targets, steps, batch.target_lengths, blank=0)
        attention = self.by_hand(model, batch, 0.0)
        assert torch.allclose(losses["ctc"], ctc, atol=1e-5) and torch.allclose(losses["attention"], attention, atol=1e-5)
        assert torch.allclose(losses["loss"], (1 - weight) * attention + weight * ctc, atol=1e-5)
        assert losses["too_short"] == 0 and not losses["ctc"].requires_grad and losses["loss"].requires_grad

    def test_too_short_utterances_are_counted_and_left_out_of_ctc(self):
        model = built(dropout=0.0, ctc_weight=0.5).eval()
        frames, symbols = torch.tensor([37, 8, 20, 12]), (4, 4, 3, 3)  # 10, 2, 5 and 3 steps
        batch = a_batch(frames, symbols)
        batch.targets[3, :3] = torch.tensor([5, 5, 6])  # three symbols, and a blank between the equal ones: four steps needed
        batch.targets[0, :4], batch.targets[2, :3] = torch.tensor([5, 6, 7, 8]), torch.tensor([5, 6, 7])
        losses = model.loss(batch)
        assert losses["too_short"] == 0.5
        kept = [0, 2]
        fewer = Batch(batch.features[kept], frames[kept], batch.targets[kept], batch.target_lengths[kept], ["?"] * 2, ["a", "b"])
        assert torch.allclose(losses["ctc"], model.loss(fewer)["ctc"], atol=1e-5)
        assert torch.allclose(losses["attention"], self.by_hand(model, batch, 0.0), atol=1e-5), "the decoder learns from all of them"

    def test_a_batch_of_too_short_utterances_only(self):
        model, batch = built(dropout=0.0, ctc_weight=0.5), a_batch(torch.tensor([8, 4]), (4, 3))
        losses = model.loss(batch)
        losses["loss"].backward()
        assert losses["too_short"] == 1 and losses["ctc"] == 0
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

    def test_does_not_depend_on_the_size_of_the_rectangle(self):
        model, batch = built(n_front_attention=1, local_kernel=5, ctc_weight=0.3).eval(), a_batch()
        wider = dataclasses.replace(batch, features=F.pad(batch.features, (0, 0, 0, 9), value=3.0), targets=F.pad(batch.targets, (0, 4), value=7))
        a, b = model.loss(batch), model.loss(wider)
        assert all(torch.allclose(a[name], b[name], atol=1e-5) for name in a)

    def test_of_a_fresh_model_is_about_the_logarithm_of_the_vocabulary(self):
        torch.manual_seed(0)
        model = SpeechTransformer(SpeechTransformerConfig(33, label_smoothing=0.0)).eval()
        batch = a_batch(vocab=33)
        batch.features = noise(4, 37, 80)
        assert abs(float(model.loss(batch)["loss"].detach()) - math.log(33)) < 0.7

    @pytest.mark.parametrize("options", [{}, {"n_front_attention": 2, "local_kernel": 5, "ctc_weight": 0.3}, {"tie_weights": True, "norm_first": False}], ids=str)
    def test_gradients_reach_every_parameter(self, options):
        model = built(front_channels=8, dropout=0.0, **options)
        model.loss(a_batch(torch.tensor([37, 30, 40, 33])))["loss"].backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            # A bias of the keys adds the same to all scores of a query, and softmax takes it away again.
            if not (name.endswith("key_bias") or name.endswith("key.bias")):
                assert parameter.grad.abs().max() > 0, name

    def test_double_precision_gradient_against_differences(self):
        model, batch = built(dropout=0.0, n_front_attention=1, local_kernel=3, ctc_weight=0.4, n_encoder_layers=1, n_decoder_layers=1).double(), a_batch()
        batch.features = batch.features.double()
        parameter = model.encoder.front.convolutions[0].weight
        (gradient,) = torch.autograd.grad(model.loss(batch)["loss"], parameter)
        with torch.no_grad():
            for place in ((0, 0, 1, 1), (2, 0, 0, 2)):
                values = []
                for sign in (1, -1):
                    parameter[place] += sign * 1e-6
                    values.append(float(model.loss(batch)["loss"]))
                    parameter[place] -= sign * 1e-6
                assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(gradient[place]), rel=1e-4, abs=1e-8)


class TestParameters:
    @pytest.mark.parametrize("config", [small(), base_config(100), big_config(100), big_config(1000, n_bins=40), small(local_kernel=5, n_front_attention=1, ctc_weight=0.2)])
    @pytest.mark.parametrize("tied", [False, True])
    def test_counts_by_formula(self, config, tied):
        c = dataclasses.replace(config, tie_weights=tied)
        with torch.device("meta"):
            model = SpeechTransformer(c)
        bands = -(-(-(-c.n_bins // 2)) // 2)
        channels, d = c.front_channels, c.d_model
        front = 9 * channels + channels + 9 * channels * channels + channels
        two_d = c.n_front_attention * (3 * (9 * channels * c.n_heads + c.n_heads) + 9 * 2 * c.n_heads * channels + channels)
        project = channels * bands * d + d
        mixer = 2 * d + (2 * d * d + 2 * d) + (c.local_kernel * d + d) + (d * d + d)
        encoder = count_parameters(c.n_encoder_layers, d, c.d_feedforward)["total"] + (c.n_encoder_layers * mixer if c.local_kernel else 0)
        decoder = c.vocab * d + count_parameters(c.n_decoder_layers, d, c.d_feedforward, cross_attention=True)["total"] + (0 if tied else c.vocab * d + c.vocab)
        head = d * c.vocab + c.vocab if c.ctc_weight else 0
        assert sum(p.numel() for p in model.parameters()) == front + two_d + project + encoder + decoder + head

    def test_tying_is_one_table(self):
        model = built(tie_weights=True, dropout=0.0)
        assert model.decoder.head.weight is model.decoder.embedding.weight and model.decoder.head.bias is None
        assert built().decoder.head.weight is not built().decoder.embedding.weight

    def test_the_same_seed_gives_the_same_model(self):
        a, b, c = built(3), built(3), built(4)
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
        assert not all(torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters()))

    def test_chance_belongs_to_training_only(self):
        model, batch = built(dropout=0.3, local_kernel=5, ctc_weight=0.3), a_batch()
        torch.manual_seed(0)
        first, second = (float(model.loss(batch)["loss"].detach()) for _ in range(2))
        torch.manual_seed(0)
        assert first != second and float(model.loss(batch)["loss"].detach()) == first
        model.eval()
        state = torch.get_rng_state()
        assert torch.equal(model.loss(batch)["loss"], model.loss(batch)["loss"])
        assert torch.equal(state, torch.get_rng_state())

    @pytest.mark.parametrize("options", [*OPTIONS[:2], OPTIONS[-1], {"tie_weights": True}], ids=str)
    @torch.no_grad()
    def test_save_and_load_strictly(self, options, tmp_path):
        from safetensors.torch import load_model, save_model

        model, other = built(0, **options).eval(), built(1, **options).eval()
        model.encoder(noise(1, 1101, 12), torch.tensor([1101]))  # its table of positions has grown; that is no weight
        tokens = torch.tensor([[2, 5, 6]] * 4)
        assert not torch.allclose(model(padded(), LENGTHS, tokens), other(padded(), LENGTHS, tokens), atol=1e-4)
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(model(padded(), LENGTHS, tokens), other(padded(), LENGTHS, tokens))
        save_model(model, str(tmp_path / "weights.safetensors"))
        third = built(2, **options).eval()
        load_model(third, str(tmp_path / "weights.safetensors"), strict=True)
        assert torch.equal(model(padded(), LENGTHS, tokens), third(padded(), LENGTHS, tokens))
        assert SpeechTransformer.from_config(SpeechTransformerConfig.from_json(model.config.to_json())).state_dict().keys() == model.state_dict().keys()

    def test_weights_of_another_shape_are_refused(self):
        with pytest.raises(RuntimeError, match="ctc_head"):
            built().load_state_dict(built(ctc_weight=0.3).state_dict())


@pytest.fixture(scope="module")
def by_heart():
    """A model that has learned four sentences of the sampler by heart, and their batch."""
    vocabulary = CharacterVocabulary()
    corpus = sampler()
    data = SpeechDataset(corpus, LogMel(), vocabulary)
    batch = collate([data[i] for i in (0, 2, 7, 12)])
    torch.manual_seed(0)
    model = SpeechTransformer(
        SpeechTransformerConfig(len(vocabulary), d_model=48, n_encoder_layers=1, n_decoder_layers=1, d_feedforward=96, front_channels=8, dropout=0.0, label_smoothing=0.0, ctc_weight=0.3)
    )
    optimiser, history = torch.optim.Adam(model.parameters(), lr=4e-3), []
    for _ in range(90):
        losses = model.loss(batch)
        optimiser.zero_grad()
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        history.append(float(losses["attention"]))
    return model.eval(), batch, vocabulary, history


class TestByHeart:
    def test_the_loss_falls_to_almost_nothing(self, by_heart):
        history = by_heart[3]
        assert history[0] > 2.5 and history[-1] < 0.1

    @torch.no_grad()
    def test_it_writes_what_was_said(self, by_heart):
        model, batch, vocabulary, _ = by_heart
        state, tokens, written = model.start(batch.features, batch.feature_lengths), torch.full((4,), vocabulary.sos), []
        for _ in range(40):
            tokens = model.step(tokens, state).argmax(dim=-1)
            written.append(tokens)
        rows = torch.stack(written, dim=1).tolist()
        assert all(vocabulary.eos in row for row in rows)
        assert [vocabulary.decode(row[: row.index(vocabulary.eos)]) for row in rows] == batch.texts

    @pytest.mark.parametrize("settings_of_search", [{}, {"beam": 1}, {"beam": 2, "ctc_weight": 0.0}, {"beam": 3, "ctc_weight": 1.0}], ids=str)
    def test_recognise_gives_words_in_order(self, by_heart, settings_of_search):
        model, batch, vocabulary, _ = by_heart
        found = model.recognise(batch.features, batch.feature_lengths, vocabulary, **settings_of_search)
        steps = halved(halved(batch.feature_lengths)).tolist()
        if settings_of_search.get("ctc_weight") != 1.0:  # the small CTC head alone need not be right yet
            assert [" ".join(word for word, _, _ in words) for words in found] == batch.texts
        for words, n in zip(found, steps):
            places = [place for _, first, last in words for place in (first, last)]
            assert places == sorted(places) and 0 <= places[0] and places[-1] < n

    def test_recognise_is_the_same_alone(self, by_heart):
        model, batch, vocabulary, _ = by_heart
        together = model.recognise(batch.features, batch.feature_lengths, vocabulary)
        for i, n in enumerate(batch.feature_lengths.tolist()):
            assert model.recognise(batch.features[i : i + 1, :n], batch.feature_lengths[i : i + 1], vocabulary)[0] == together[i]

    @torch.no_grad()
    def test_places_are_not_found_in_the_padding(self, by_heart):
        model, batch, vocabulary, _ = by_heart
        state = model.start(batch.features, batch.feature_lengths)
        texts = [vocabulary.encode(text) for text in batch.texts]
        before = model._steps_of(texts, state.memory, state.memory_mask)
        noisy = state.memory.where(state.memory_mask[:, 0, 0, :, None], 20 * noise(*state.memory.shape))
        assert model._steps_of(texts, noisy, state.memory_mask) == before

    @torch.no_grad()
    def test_most_of_what_a_taught_decoder_gets_right_it_knows_from_spelling(self, by_heart):
        """With another utterance's sound the next character is still right more often than not, but no free text is."""
        model, batch, vocabulary, _ = by_heart
        seen, answer = shifted(batch.targets, batch.target_lengths, sos=vocabulary.sos, eos=vocabulary.eos, pad=vocabulary.pad)
        counted = answer != vocabulary.pad
        right = lambda features, lengths: float((model(features, lengths, seen).argmax(-1) == answer)[counted].float().mean())  # noqa: E731
        own, foreign = right(batch.features, batch.feature_lengths), right(batch.features.roll(1, 0), batch.feature_lengths.roll(1, 0))
        assert own > 0.98 and 0.3 < foreign < own
        heard = model.recognise(batch.features.roll(1, 0), batch.feature_lengths.roll(1, 0), vocabulary)
        assert not any(" ".join(word for word, _, _ in words) == text for words, text in zip(heard, batch.texts))


def test_recognise_of_an_untrained_model_without_ctc_head_ends():
    model, vocabulary = built(vocab=len(CharacterVocabulary())).eval(), CharacterVocabulary()
    found = model.recognise(padded(), LENGTHS, vocabulary, beam=2)
    assert len(found) == 4 and all(isinstance(words, list) for words in found)
