"""The codec: a transform that loses nothing, a distance with known values, lengths, prefixes, training that continues exactly, and codecs of others."""
import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.data import DataLoader

from speechlearn.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from speechlearn.codec import (
    DISTANCE_WINDOWS, Block, Codec, CodecConfig, ConvCodec, LibraryCodec, SoundPieces, bit_rate, cosine_basis, frame_rate, measure_codec, plot_rates, rebuild, spectral_distance, _band_levels,
)
from speechlearn.guitar import Note, random_sound
from speechlearn.training import TrainConfig, train

RATE = 16_000
SMALL = CodecConfig(hop=64, dim=16, width=24, n_blocks=1, n_codebooks=4, codebook_size=16)


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def started(config=SMALL, seed=0):
    """A codec whose codebooks have seen some sound."""
    torch.manual_seed(seed)
    codec = ConvCodec(config).train()
    sounds = torch.stack([random_sound(5, i, seconds=0.25)[0] for i in range(8)])
    with torch.no_grad():
        for _ in range(20):
            codec.loss(sounds)
    return codec.eval()


@pytest.fixture(scope="module")
def codec():
    return started()


class TestTransform:
    @pytest.mark.parametrize("hop", [2, 16, 64, 250])
    def test_loses_nothing_with_all_cosines(self, hop):
        x, basis = noise(2, 1, 7 * hop, dtype=torch.float64), cosine_basis(hop, hop).double()
        framed = F.conv1d(F.pad(x, (hop, hop)), basis, stride=hop)
        assert framed.shape == (2, hop, 8)
        back = F.conv_transpose1d(framed, basis, stride=hop)[..., hop:-hop]
        assert torch.allclose(back, x, atol=1e-5)  # the basis has 32 bits

    def test_cosines_are_orthonormal_within_and_across_frames(self):
        hop = 8
        basis = cosine_basis(hop, hop)[:, 0].double()
        assert torch.allclose(basis @ basis.T, torch.eye(hop, dtype=torch.float64), atol=1e-6)
        assert (basis[:, hop:] @ basis[:, :hop].T).abs().max() < 1e-6

    def test_by_hand(self):
        """hop 1: one cosine of two samples, sqrt(2) sin(π/4) cos(π/2 · (n + 1)) → 0 · and −1."""
        assert torch.allclose(cosine_basis(1, 1)[0, 0], torch.tensor([0.0, -1.0]), atol=1e-6)

    def test_an_untrained_codec_is_the_transform(self):
        config = dataclasses.replace(SMALL, dim=64)
        x = noise(2, 1_000)
        codec = ConvCodec(config).eval()
        with torch.no_grad():
            assert torch.allclose(codec.decode_latents(codec.latents(x), 1_000), x, atol=1e-5)

    def test_a_block_changes_nothing_at_first(self):
        x = noise(2, 5, 11)
        assert torch.equal(Block(5, 7, 3)(x), x)


class TestDistance:
    def test_known_values(self):
        x = 0.1 * noise(2, RATE)
        assert spectral_distance(x, x, RATE).tolist() == [0, 0]
        assert spectral_distance(2 * x, x, RATE).tolist() == pytest.approx([6.02, 6.02], abs=0.1)
        assert spectral_distance(-x, x, RATE).tolist() == [0, 0]

    def test_symmetric_and_each_pair_alone(self):
        a, b = 0.1 * noise(3, 4_000), 0.1 * noise(3, 4_000, seed=1)
        assert torch.allclose(spectral_distance(a, b, RATE), spectral_distance(b, a, RATE))
        assert torch.allclose(spectral_distance(a, b, RATE)[1:2], spectral_distance(a[1:2], b[1:2], RATE), atol=1e-5)

    @pytest.mark.parametrize("hz", [500, 1_000, 2_000, 4_000, 6_000])
    def test_a_full_scale_sine_is_near_zero_decibels_and_silence_at_the_floor(self, hz):
        """A mel band is as loud as a sine in it, give or take the shape of window and triangle."""
        sine = torch.sin(2 * math.pi * hz * torch.arange(RATE) / RATE)[None]
        for window, bins in DISTANCE_WINDOWS.items():
            assert abs(float(_band_levels(sine, window, bins, RATE, -60.0)[0, 10:-10].max())) < 2
            assert _band_levels(torch.zeros(1, RATE), window, bins, RATE, -60.0).unique().tolist() == pytest.approx([-60.0], abs=1e-3)

    def test_below_the_floor_nothing_counts(self):
        x = 1e-6 * noise(1, RATE)
        assert float(spectral_distance(x, torch.zeros_like(x), RATE)) < 0.01
        assert float(spectral_distance(x, torch.zeros_like(x), RATE, floor_db=-150.0)) > 5

    @pytest.mark.parametrize("n", [1, 5, 100, 3_000])
    def test_short_sounds(self, n):
        assert spectral_distance(noise(1, n), noise(1, n, seed=1), RATE).isfinite().all()

    def test_gradient_is_finite_even_at_silence(self):
        x = torch.zeros(1, 4_000, requires_grad=True)
        spectral_distance(x, 0.1 * noise(1, 4_000), RATE).sum().backward()
        assert x.grad.isfinite().all()
        y, target = (0.1 * noise(1, 4_000)).requires_grad_(), 0.1 * noise(1, 4_000, seed=1)
        before = spectral_distance(y, target, RATE).sum()
        before.backward()
        after = spectral_distance(y.detach() - 0.1 * y.grad / y.grad.norm(), target, RATE).sum()
        assert float(after) < float(before.detach()) - 0.05

    def test_refuses_other_shapes(self):
        with pytest.raises(ValueError, match=r"\(1, 10\) and \(1, 11\); expected two equal ones"):
            spectral_distance(noise(1, 10), noise(1, 11), RATE)


class TestLengthsAndCodes:
    @given(n=st.integers(1, 400), k=st.integers(1, 4))
    @settings(deadline=None, max_examples=40)
    def test_as_long_as_before(self, n, k):
        codec = TestLengthsAndCodes.codec
        x = 0.1 * noise(2, n, seed=n)
        codes = codec.encode(x, k)
        assert codes.shape == (2, -(-n // 64) + 1, k) and codes.dtype == torch.int64
        assert 0 <= int(codes.min()) and int(codes.max()) < 16
        assert codec.decode(codes, n).shape == rebuild(codec, x, k).shape == (2, n)

    codec = started()

    def test_what_is_padded_does_not_matter(self, codec):
        """A sound that ends within a frame, and the same with zeros up to the frame's end, have the same codes."""
        x = 0.1 * noise(1, 200)
        assert torch.equal(codec.encode(x), codec.encode(F.pad(x, (0, 56))))

    def test_codes_of_the_first_codebooks_are_a_prefix(self, codec):
        x = random_sound(9, 0)[0][None]
        codes = codec.encode(x)
        assert all(torch.equal(codec.encode(x, k), codes[..., :k]) for k in (1, 2, 3))
        assert torch.allclose(rebuild(codec, x, 2), codec.decode(codes[..., :2], x.shape[1]))

    def test_embed_is_what_is_decoded(self, codec):
        codes = codec.encode(0.1 * noise(2, 500))
        assert codec.embed(codes).shape == (2, 9, 16)
        assert torch.equal(codec.decode_latents(codec.embed(codes)), codec.decode(codes))

    def test_each_sound_of_a_batch_alone(self, codec):
        x = torch.stack([random_sound(9, i, seconds=0.3)[0] for i in range(3)])
        assert torch.equal(codec.encode(x)[1:2], codec.encode(x[1:2]))
        assert torch.allclose(rebuild(codec, x)[2:], rebuild(codec, x[2:]), atol=1e-5)

    def test_silence_and_loudness(self, codec):
        for x in (torch.zeros(1, 300), 100 * noise(1, 300)):
            assert rebuild(codec, x).isfinite().all()

    def test_rates_by_hand(self, codec):
        assert frame_rate(codec) == 250 and bit_rate(codec) == 250 * 4 * 4 and bit_rate(codec, 1) == 1_000
        assert isinstance(codec, Codec)

    def test_errors_say_what_was_wrong(self, codec):
        with pytest.raises(ValueError, match="waveform 1 of the batch holds NaN"):
            codec.encode(torch.stack([torch.zeros(100), torch.full((100,), math.nan)]))
        with pytest.raises(ValueError, match="nothing to encode"):
            codec.encode(torch.zeros(1, 0))
        with pytest.raises(ValueError, match="this codec has 4"):
            codec.encode(torch.zeros(1, 100), 5)
        codes = codec.encode(torch.zeros(1, 100))
        with pytest.raises(ValueError, match="codes run from 0 to 16; this codec has the numbers 0 to 15"):
            codec.decode(codes * 0 + torch.tensor([0, 0, 0, 16]))
        with pytest.raises(ValueError, match="129 samples are wanted, but these frames stand for 128"):
            codec.decode(codes, 129)
        with pytest.raises(ValueError, match="stands for no sample"):
            codec.decode(codes[:, :1])
        with pytest.raises(ValueError, match="1 to 4 codebooks"):
            codec.decode(torch.zeros(1, 3, 5, dtype=torch.long))

    @pytest.mark.parametrize("change, says", [(dict(hop=0), "hop is 0"), (dict(dim=65), "has only 64 cosines"), (dict(codebook_size=1), "at least 2"), (dict(commitment=-1.0), "not negative")])
    def test_settings_are_checked(self, change, says):
        with pytest.raises(ValueError, match=says):
            dataclasses.replace(SMALL, **change)


class TestPieces:
    def test_places_depend_on_seed_epoch_and_number_only(self):
        sounds = [torch.arange(100.0) + 1000 * i for i in range(30)]
        a, b = SoundPieces(sounds, 10, seed=1), SoundPieces(sounds, 10, seed=1)
        assert [float(a[i][0]) for i in range(30)] == [float(b[i][0]) for i in reversed(range(30))][::-1]
        first = [float(p[0]) % 1000 for p in (a[i] for i in range(30))]
        a.set_epoch(1)
        assert first != [float(a[i][0]) % 1000 for i in range(30)]
        assert 6 <= sum(place == 0 for place in first) <= 24 and max(first) <= 90
        assert all(torch.equal(a[3], a[3]) and len(a[i]) == 10 for i in range(30))

    def test_errors(self):
        with pytest.raises(ValueError, match="waveform 1, which has 5"):
            SoundPieces([torch.zeros(9), torch.zeros(5)], 8)
        with pytest.raises(ValueError, match="no waveforms"):
            SoundPieces([], 8)


def loaders():
    sounds = [random_sound(3, i, seconds=0.3, wet=0.5)[0] for i in range(16)]
    return DataLoader(SoundPieces(sounds, 2_048), batch_size=4, shuffle=True)


class TestTraining:
    def test_learns_a_batch_by_heart(self):
        sounds = torch.stack([random_sound(4, i, seconds=0.3)[0] for i in range(4)])
        codec = started()
        with torch.no_grad():
            before = float(codec.loss(sounds)["loss"])
        train(codec, [sounds], config=TrainConfig(n_steps=120, learning_rate=2e-3, warmup_steps=5, accelerator="cpu"), show="none")
        with torch.no_grad():
            assert float(codec.loss(sounds)["loss"]) < 0.85 * before
        rows = measure_codec(codec, sounds)
        assert [row["n_codebooks"] for row in rows] == [1, 2, 3, 4] and [row["bit_rate"] for row in rows] == [1000, 2000, 3000, 4000]
        assert all(later["distance_db"] < row["distance_db"] for row, later in zip(rows, rows[1:]))

    def test_gradients_reach_everything_before_and_behind_the_quantiser(self):
        codec = started().train()
        for block in (*codec.before, *codec.after):
            torch.nn.init.normal_(block.change.weight, std=0.1)
        codec.loss(0.1 * noise(2, 1_000))["loss"].backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in codec.parameters())

    def test_half_precision_quantises_in_full(self):
        codec = started().train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            parts = codec.loss(0.1 * noise(2, 1_000))
        assert parts["loss"].isfinite() and codec.quantiser.levels[0].codebook.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            quantised, codes = codec.eval().quantiser(noise(1, 9, 16).bfloat16())
        assert quantised.dtype == torch.float32 and torch.equal(codes, codec.quantiser(noise(1, 9, 16).bfloat16().float())[1])

    def test_continues_exactly(self, tmp_path):
        """Codebooks, their running means and what was drawn by chance: all come back."""

        def run(folder, steps, resume=False):
            torch.manual_seed(1)
            codec = ConvCodec(SMALL)
            config = TrainConfig(n_steps=12, learning_rate=2e-3, checkpoint_every=5, accelerator="cpu", schedule="constant")
            stop = [0]

            def on_step(model, step):
                if step == steps:
                    raise KeyboardInterrupt

            try:
                return codec, train(codec, loaders(), config=config, directory=folder, resume=resume, on_step=on_step, show="none")
            except KeyboardInterrupt:
                return codec, stop

        whole, result = run(tmp_path / "whole", None)
        run(tmp_path / "parts", 7)
        parts, continued = run(tmp_path / "parts", None, resume=True)
        assert continued.losses == result.losses
        assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values()))
        assert any("codebook" in name for name in whole.state_dict())

    def test_saved_and_read(self, tmp_path, codec):
        save_checkpoint(tmp_path / "c", codec, vocabulary=None, metadata={"what": "test"})
        again = load_checkpoint(tmp_path / "c")
        x = 0.1 * noise(1, 1_000)
        assert isinstance(again.model, ConvCodec) and again.model.config == SMALL and again.vocabulary is None
        assert torch.equal(again.model.encode(x), codec.encode(x)) and torch.equal(rebuild(again.model, x), rebuild(codec, x))
        next((tmp_path / "c").glob("*.safetensors")).write_bytes(b"damaged")
        with pytest.raises(CheckpointError, match="damaged"):
            load_checkpoint(tmp_path / "c")

    def test_figure(self, codec):
        ax = plot_rates({"a": measure_codec(codec, 0.1 * noise(2, 2_000))})
        assert ax.get_xlabel() == "bits per second" and len(ax.lines[0].get_xdata()) == 4


def test_stored_results_are_those_of_this_codec(root):
    stored = json.loads((root / "benchmarks" / "results" / "codec.json").read_text())
    assert stored["parameters"] == sum(p.numel() for p in ConvCodec(CodecConfig()).parameters())
    for rows in (stored["dry"], stored["wet"]):
        assert [row["bit_rate"] for row in rows] == [bit_rate(ConvCodec(CodecConfig()), n) for n in range(1, 9)]
        distances = [row["distance_db"] for row in rows]
        assert all(later < before for before, later in zip(distances, distances[1:]))
    assert stored["command"].startswith("python benchmarks/codec.py") and stored["cpu_minutes"] <= 12
    assert set(stored["pedals"]) == {"overdrive", "delay", "chorus", "tremolo", "reverb"}


class TestLibrary:
    """DAC and EnCodec of transformers, with random weights."""

    @staticmethod
    def dac(**changed):
        transformers = pytest.importorskip("transformers", reason="the library with DAC and EnCodec is not installed (pip install transformers)")
        torch.manual_seed(0)
        settings = dict(encoder_hidden_size=8, decoder_hidden_size=64, downsampling_ratios=[2, 4, 8, 8], n_codebooks=4, codebook_size=32, codebook_dim=4, sampling_rate=RATE)
        return transformers.DacModel(transformers.DacConfig(**{**settings, **changed}))

    @staticmethod
    def encodec(**changed):
        transformers = pytest.importorskip("transformers", reason="the library with DAC and EnCodec is not installed (pip install transformers)")
        torch.manual_seed(0)
        settings = dict(num_filters=4, hidden_size=16, codebook_size=32, codebook_dim=16, target_bandwidths=[1.5, 3.0])
        model = transformers.EncodecModel(transformers.EncodecConfig(**{**settings, **changed}))
        for layer in model.quantizer.layers:  # a fresh one has all entries at zero
            layer.codebook.embed.normal_()
        return model

    @pytest.mark.parametrize("kind", ["dac", "dac with an odd stride", "encodec"])
    @pytest.mark.parametrize("n", [1, 319, 512, 5_000])
    @torch.no_grad()
    def test_shapes_and_lengths(self, kind, n):
        model = self.encodec() if kind == "encodec" else self.dac(**({"downsampling_ratios": [2, 4, 5, 8]} if "odd" in kind else {}))
        codec = LibraryCodec(model)
        assert isinstance(codec, Codec)
        x = 0.1 * noise(2, n)
        codes, frames = codec.encode(x), -(-n // codec.hop)
        assert codec.latents(x).shape == (2, frames, codec.dim)
        assert codes.shape == (2, frames, codec.n_codebooks) and codes.dtype == torch.int64 and int(codes.max()) < 32
        assert codec.embed(codes).shape == (2, frames, codec.dim)
        assert codec.decode(codes, n).shape == rebuild(codec, x).shape == (2, n)
        assert torch.equal(codec.encode(x, 2), codes[..., :2])
        assert codec.decode(codes[..., :2], n).isfinite().all()

    @torch.no_grad()
    def test_equal_to_the_librarys_own_calls(self):
        x = 0.1 * noise(2, 4_096)
        model = self.dac().eval()
        theirs = model.encode(x[:, None])
        codec = LibraryCodec(model)
        assert torch.equal(codec.encode(x), theirs.audio_codes.transpose(1, 2))
        assert torch.allclose(codec.embed(codec.encode(x)), theirs.quantized_representation.transpose(1, 2), atol=1e-5)
        assert torch.allclose(codec.decode(codec.encode(x)), model.decode(audio_codes=theirs.audio_codes).audio_values, atol=1e-5)

        model = self.encodec().eval()
        x = x[:, : 12 * 320]
        theirs = model.encode(x[:, None], bandwidth=3.0)
        codec = LibraryCodec(model)
        assert codec.n_codebooks == theirs.audio_codes.shape[2] and codec.sample_rate == 24_000 and frame_rate(codec) == 75
        assert torch.equal(codec.encode(x), theirs.audio_codes[0].transpose(1, 2))
        assert torch.allclose(codec.decode(codec.encode(x)), model.decode(theirs.audio_codes, theirs.audio_scales).audio_values[:, 0], atol=1e-5)

    def test_local_weights(self, tmp_path):
        model = self.dac()
        model.save_pretrained(tmp_path / "dac")
        codec, x = LibraryCodec.from_folder(str(tmp_path / "dac")), 0.1 * noise(1, 2_000)
        with torch.no_grad():
            assert torch.equal(codec.encode(x), LibraryCodec(model).encode(x))
        with pytest.raises(ValueError, match="no codec can be read from the folder"):
            LibraryCodec.from_folder(str(tmp_path / "nothing"))

    def test_refuses_models_whose_codes_do_not_hold_the_sound(self):
        with pytest.raises(ValueError, match="2 channels and normalises"):
            LibraryCodec(self.encodec(audio_channels=2, normalize=True))
        with pytest.raises(ValueError, match="got 'Linear'"):
            LibraryCodec(torch.nn.Linear(2, 2))

    @torch.no_grad()
    def test_errors(self):
        codec = LibraryCodec(self.dac())
        with pytest.raises(ValueError, match="holds NaN"):
            codec.encode(torch.full((1, 100), math.nan))
        with pytest.raises(ValueError, match="this codec has 4"):
            codec.encode(torch.zeros(1, 600), 9)
        with pytest.raises(ValueError, match="numbers 0 to 31"):
            codec.decode(torch.full((1, 2, 4), 32))

    def test_says_how_to_get_the_library(self, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match="pip install transformers"):
            LibraryCodec.from_folder("anywhere")


def test_a_note_survives_better_than_silence_would(codec):
    """A barely trained codec is already nearer to the note than silence is."""
    note = Note(52, 0.5, seed=0).waveform()[None]
    assert float(spectral_distance(rebuild(codec, note).detach(), note, RATE)) < float(spectral_distance(torch.zeros_like(note), note, RATE))
