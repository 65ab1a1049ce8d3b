"""Features: values by hand, identities, agreement with torchaudio, gradients, independence of the batch, errors."""
import copy
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

import speechlearn  # noqa: F401  before torchaudio, so that it loads beside a CPU build of PyTorch

import torchaudio
from torchaudio.compliance import kaldi

from speechlearn.data.synthetic import sampler
from speechlearn.sound.features import (
    GlobalNormalisation, KaldiFbank, LogMel, RunningNormalisation, SpecAugment, VocalTractWarp, _checked_lengths, frame_signal, hz_to_mel, kaldi_fbank, log_mel, mel_filter_bank, mel_to_hz, n_frames, normalise_running, normalise_utterance, plot_spectrogram, power_spectrum, warp_frequencies, window_function,
)

KALDI_NAMES = {"povey": "povey", "hann_symmetric": "hanning", "hamming": "hamming", "rectangular": "rectangular"}
SAMPLES = [4_000, 400, 5_555, 559]  # 400 is one window, 559 one sample too short for a second frame


def noise(*shape, seed=0, dtype=torch.float32):
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def voice(sample_rate, seconds=1.0):
    """Harmonics of a gliding pitch under two formants, and a floor of noise 70 dB below."""
    t = torch.arange(round(sample_rate * seconds), dtype=torch.float64) / sample_rate
    pitch = 120 + 30 * torch.sin(2 * math.pi * 0.7 * t)
    phase = 2 * math.pi * torch.cumsum(pitch, 0) / sample_rate
    signal = torch.zeros_like(t)
    for k in range(1, int(0.45 * sample_rate / 150)):
        signal += sum(torch.sin(k * phase) / (1 + ((k * pitch - formant) / 100) ** 2) for formant in (600, 1700))
    return (0.5 * signal / signal.abs().max() + noise(len(t), dtype=torch.float64) * 10 ** (-50 / 20)).float()


SIGNALS = {"noise": lambda rate: noise(rate), "voice": voice}


def padded(samples=SAMPLES, fill=0.0):
    """A batch of noise and its lengths; `fill` stands in the padding."""
    batch = torch.full((len(samples), max(samples)), fill)
    for i, n in enumerate(samples):
        batch[i, :n] = noise(n, seed=i)
    return batch, torch.tensor(samples)


def relative_gap(ours, theirs):
    assert ours.shape == theirs.shape
    return float(((ours - theirs).abs() / theirs.abs().clamp(min=1)).max())


def assert_refused(function, *arguments, message):
    """A ValueError with this message; where the tests check shapes, the annotation may speak first."""
    with pytest.raises((ValueError, TypeCheckError)) as caught:
        function(*arguments)
    assert isinstance(caught.value, TypeCheckError) or re.search(message, str(caught.value)), caught.value


# ---- frames -------------------------------------------------------------------------------------------


def test_ten_samples_by_hand():
    frames = frame_signal(torch.arange(10.0), 4, 3)
    assert frames.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]


@pytest.mark.parametrize("samples, expected", [(4, 1), (5, 1), (6, 2), (7, 2), (8, 3), (10, 4)])
def test_number_of_frames_by_hand(samples, expected):
    assert n_frames(torch.tensor([samples]), 4, 2).tolist() == [expected]
    assert frame_signal(torch.zeros(samples), 4, 2).shape == (expected, 4)


def test_a_second_has_98_frames():
    features, lengths = LogMel()(torch.zeros(1, 16_000), torch.tensor([16_000]))
    assert features.shape == (1, 98, 80) and lengths.tolist() == [98] and lengths.dtype == torch.int64


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_last_frame_fits_and_a_further_one_does_not(samples, window, hop):
    if samples < window:
        with pytest.raises(ValueError, match=f"has {samples} samples; one window needs {window}"):
            n_frames(torch.tensor([samples]), window, hop)
        return
    n = int(n_frames(torch.tensor([samples]), window, hop))
    assert (n - 1) * hop + window <= samples < n * hop + window
    frames = frame_signal(torch.arange(samples).float(), window, hop)
    assert len(frames) == n and frames[-1, 0] == (n - 1) * hop


def test_frames_of_a_batch_are_frames_of_each():
    x = noise(2, 3, 50)
    frames = frame_signal(x, 8, 5)
    assert frames.shape == (2, 3, 9, 8)
    assert torch.equal(frames[1, 2], frame_signal(x[1, 2], 8, 5))


def test_too_short_names_the_utterance():
    with pytest.raises(ValueError, match=r"utterance 1 of the batch has 399 samples; one window needs 400.*pad the waveform"):
        LogMel()(torch.zeros(3, 500), torch.tensor([500, 399, 400]))
    with pytest.raises(ValueError, match="utterance 1 of the batch has 12 samples"):
        KaldiFbank()(torch.zeros(2, 500), torch.tensor([500, 12]))


# ---- windows and spectrum -----------------------------------------------------------------------------


def test_windows_by_hand():
    assert window_function("hann", 4).tolist() == pytest.approx([0, 0.5, 1, 0.5], abs=1e-7)
    assert window_function("hann_symmetric", 5).tolist() == pytest.approx([0, 0.5, 1, 0.5, 0], abs=1e-7)
    assert window_function("hamming", 5).tolist() == pytest.approx([0.08, 0.54, 1, 0.54, 0.08], abs=1e-6)
    assert window_function("povey", 5).tolist() == pytest.approx([0, 0.5**0.85, 1, 0.5**0.85, 0], abs=1e-6)
    assert window_function("rectangular", 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["hann_symmetric", "hamming", "povey"])
def test_symmetric_windows(kind):
    window = window_function(kind, 401)
    torch.testing.assert_close(window, window.flip(0))
    assert int(window.argmax()) == 200


def test_shifted_periodic_hann_windows_add_up_to_one():
    window = window_function("hann", 400)
    torch.testing.assert_close(window[:200] + window[200:], torch.ones(200))


def test_unknown_window():
    with pytest.raises(ValueError, match="no window called 'triangle'; choose hann, hann_symmetric, hamming, povey or rectangular"):
        window_function("triangle", 4)


def test_spectrum_by_hand():
    # one turn of a cosine in four samples: everything at k = 1, with amplitude N / 2
    assert power_spectrum(torch.tensor([1.0, 0.0, -1.0, 0.0]), 4).tolist() == pytest.approx([0, 4, 0], abs=1e-6)
    assert power_spectrum(torch.ones(4), 4).tolist() == pytest.approx([16, 0, 0], abs=1e-6)
    assert power_spectrum(torch.tensor([1.0, -1.0, 1.0, -1.0]), 4).tolist() == pytest.approx([0, 0, 16], abs=1e-6)


def test_spectrum_is_a_sum_of_cosines_and_sines():
    x = noise(3, 30, dtype=torch.float64)
    angle = 2 * math.pi * torch.arange(33)[:, None] * torch.arange(30) / 64  # frames of 30 filled up to 64
    expected = (x @ angle.cos().double().T) ** 2 + (x @ angle.sin().double().T) ** 2
    torch.testing.assert_close(power_spectrum(x, 64), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("n_fft", [64, 63])
def test_parseval(n_fft):
    x = noise(5, n_fft, dtype=torch.float64)
    power = power_spectrum(x, n_fft)
    twice = torch.full((power.shape[1],), 2.0, dtype=torch.float64)
    twice[0] = 1
    if n_fft % 2 == 0:
        twice[-1] = 1  # half the sample rate has no mirror image
    torch.testing.assert_close((power * twice).sum(dim=1) / n_fft, x.square().sum(dim=1))


def test_spectrum_does_not_depend_on_where_in_the_buffer_a_frame_lies():
    x = noise(40, dtype=torch.float64)
    late = torch.cat([torch.zeros(24, dtype=torch.float64), x])
    torch.testing.assert_close(power_spectrum(x, 64), power_spectrum(late, 64))


def test_spectrum_refuses_a_short_transform():
    with pytest.raises(ValueError, match="n_fft is 256, shorter than the window of 400 samples"):
        power_spectrum(torch.zeros(400), 256)


# ---- mel ----------------------------------------------------------------------------------------------


def test_mel_by_hand():
    got = hz_to_mel(torch.tensor([0.0, 700.0, 1_000.0], dtype=torch.float64))
    assert got.tolist() == pytest.approx([0, 2595 * math.log10(2), 999.9855], abs=1e-3)


@given(st.floats(0, 24_000))
@settings(max_examples=50, deadline=None)
def test_mel_and_back(frequency):
    x = torch.tensor(frequency, dtype=torch.float64)
    assert float(mel_to_hz(hz_to_mel(x))) == pytest.approx(frequency, abs=1e-8)


def test_mel_rises_and_flattens():
    mel = hz_to_mel(torch.arange(0.0, 8_001.0, 100.0, dtype=torch.float64))
    assert (mel.diff() > 0).all() and (mel.diff().diff() < 0).all()


@pytest.mark.parametrize("straight_in", ["hertz", "mel"])
def test_filters_overlap_to_one_between_first_and_last_centre(straight_in):
    bank = mel_filter_bank(20, 8192, 16_000, straight_in=straight_in)
    assert bank.shape == (4097, 20) and (bank >= 0).all() and (bank <= 1).all()
    first, last = int(bank[:, 0].argmax()) + 1, int(bank[:, -1].argmax())
    torch.testing.assert_close(bank[first:last].sum(dim=1), torch.ones(last - first), atol=1e-5, rtol=0)
    assert ((bank > 0).sum(dim=1) <= 2).all()


def test_filters_grow_wider():
    widths = (mel_filter_bank(20, 8192, 16_000) > 0).sum(dim=0)
    assert (widths.diff() > 0).all()


def test_filters_keep_their_limits():
    bank = mel_filter_bank(10, 512, 16_000, f_min=1_000.0, f_max=4_000.0)
    assert bank[:33].sum() == 0 and bank[128:].sum() == 0 and bank[33:128].sum() > 0  # bins are 31.25 Hz apart


@pytest.mark.parametrize("n_bins, n_fft, sample_rate", [(23, 512, 16_000), (40, 512, 8_000), (80, 512, 16_000), (80, 1024, 16_000)])
def test_filters_equal_both_of_torchaudio(n_bins, n_fft, sample_rate):
    straight = torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 20.0, sample_rate / 2, n_bins, sample_rate)
    torch.testing.assert_close(mel_filter_bank(n_bins, n_fft, sample_rate), straight, atol=1e-4, rtol=0)
    curved, _ = kaldi.get_mel_banks(n_bins, n_fft, float(sample_rate), 20.0, 0.0, 100.0, -500.0, 1.0)
    torch.testing.assert_close(mel_filter_bank(n_bins, n_fft, sample_rate, straight_in="mel")[:-1].T, curved, atol=1e-4, rtol=0)


def test_the_two_kinds_of_filters_differ():
    gap = mel_filter_bank(23, 512, 16_000) - mel_filter_bank(23, 512, 16_000, straight_in="mel")
    assert gap.abs().max() > 0.01


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(n_bins=128, n_fft=512, sample_rate=16_000), r"mel bin \d+ of 128 is so narrow.*spacing 31\.2 Hz.*larger n_fft"),
        (dict(n_bins=80, n_fft=512, sample_rate=16_000, f_max=9_000.0), r"from 20\.0 to 9000\.0 Hz.*f_max <= 8000\.0 Hz, half the sample rate"),
        (dict(n_bins=80, n_fft=512, sample_rate=16_000, f_min=-1.0), r"from -1\.0 to"),
        (dict(n_bins=80, n_fft=512, sample_rate=16_000, f_min=5_000.0, f_max=4_000.0), "f_min < f_max"),
        (dict(n_bins=80, n_fft=512, sample_rate=16_000, straight_in="bark"), "straight_in is 'bark'; expected 'hertz' or 'mel'"),
    ],
)
def test_filter_bank_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        mel_filter_bank(**arguments)


# ---- log-mel ------------------------------------------------------------------------------------------


def test_log_mel_by_hand():
    # Frames of four samples, one filter that adds up all powers: 4 x the sum of squares, counted as Parseval does
    x = torch.tensor([1.0, 0.0, -1.0, 0.0, 3.0, 0.0])
    got = log_mel(x, window=torch.ones(4), hop=2, bank=torch.tensor([[0.0], [1.0], [0.0]]), floor=0.0)
    assert got.exp().flatten().tolist() == pytest.approx([4.0, 16.0], rel=1e-5)


def test_twice_as_loud_is_a_step():
    x, lengths = voice(16_000)[None], torch.tensor([16_000])
    quiet, _ = LogMel(floor=0.0)(x, lengths)
    loud, _ = LogMel(floor=0.0)(2 * x, lengths)
    torch.testing.assert_close(loud - quiet, torch.full_like(quiet, math.log(4)), atol=1e-4, rtol=0)


def test_silence_is_the_logarithm_of_the_floor():
    features, _ = LogMel()(torch.zeros(1, 1_000), torch.tensor([1_000]))
    assert features.unique().tolist() == pytest.approx([math.log(1e-10)])
    kaldi_features, _ = KaldiFbank()(torch.zeros(1, 1_000), torch.tensor([1_000]))
    assert kaldi_features.unique().tolist() == pytest.approx([math.log(torch.finfo(torch.float32).eps)])


def test_a_tone_is_loudest_in_its_own_bin():
    tone = torch.sin(2 * math.pi * 1_000 * torch.arange(16_000) / 16_000)
    features, _ = LogMel(n_bins=40)(tone[None], torch.tensor([16_000]))
    assert (features[0].argmax(dim=1) == int(mel_filter_bank(40, 512, 16_000)[32].argmax())).all()  # 1000 Hz is 32 x 31.25 Hz


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("sample_rate, n_fft", [(16_000, 512), (16_000, 400), (16_000, 1024), (8_000, 512)])
@pytest.mark.parametrize("n_bins", [23, 40, 80])
def test_log_mel_equals_torchaudio(signal, sample_rate, n_fft, n_bins):
    x = SIGNALS[signal](sample_rate)
    window, hop = sample_rate // 40, sample_rate // 100
    ours, _ = LogMel(sample_rate, n_bins, n_fft=n_fft)(x[None], torch.tensor([len(x)]))
    reference = torchaudio.transforms.MelSpectrogram(
        sample_rate, n_fft=n_fft, win_length=window, hop_length=hop, f_min=20.0, n_mels=n_bins, center=False
    )
    shift = (n_fft - window) // 2  # torchaudio lays the window in the middle of the n_fft samples
    theirs = torch.log(reference(torch.nn.functional.pad(x, (shift, n_fft - window - shift))).T + 1e-10)
    assert relative_gap(ours[0], theirs) <= 1e-4


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("sample_rate", [8_000, 16_000])
@pytest.mark.parametrize("n_bins", [23, 40, 80])
@pytest.mark.parametrize("kind", ["povey", "hann_symmetric", "hamming"])
@pytest.mark.parametrize("snip_edges", [True, False])
def test_kaldi_equals_torchaudio(signal, sample_rate, n_bins, kind, snip_edges):
    x = SIGNALS[signal](sample_rate)
    ours = kaldi_fbank(x, sample_rate=sample_rate, n_bins=n_bins, kind=kind, snip_edges=snip_edges)
    theirs = kaldi.fbank(
        x[None], sample_frequency=float(sample_rate), num_mel_bins=n_bins, window_type=KALDI_NAMES[kind], snip_edges=snip_edges,
        energy_floor=1.0, dither=0.0,
    )
    assert relative_gap(ours, theirs) <= 1e-4


@pytest.mark.parametrize("options", [dict(preemphasis=0.0), dict(f_min=100.0, f_max=3_700.0), dict(window_ms=20.0, hop_ms=12.5), dict(kind="rectangular")])
def test_kaldi_options_equal_torchaudio(options):
    x = voice(16_000)
    names = dict(preemphasis="preemphasis_coefficient", f_min="low_freq", f_max="high_freq", window_ms="frame_length", hop_ms="frame_shift", kind="window_type")
    theirs = kaldi.fbank(x[None], num_mel_bins=40, dither=0.0, **{names[k]: v for k, v in options.items()})
    assert relative_gap(kaldi_fbank(x, n_bins=40, **options), theirs) <= 1e-4


@pytest.mark.parametrize("samples", [400, 401, 480, 559, 1_000, 1_039, 1_040])
def test_mirrored_ends_equal_torchaudio_at_every_remainder(samples):
    x = noise(samples)
    theirs = kaldi.fbank(x[None], num_mel_bins=23, snip_edges=False, dither=0.0)
    assert relative_gap(kaldi_fbank(x, n_bins=23, snip_edges=False), theirs) <= 1e-4


def test_mirror_reaches_further_than_a_very_short_utterance():
    """100 samples give one frame of 400 where torchaudio gives up: the mirror image is mirrored again."""
    x = noise(100)
    around = torch.cat([x.flip(0), x, x.flip(0), x])  # from sample -100 on
    expected = kaldi_fbank(torch.cat([x, around])[80:480], n_bins=23)  # the frame reaches from -120 to 280
    assert torch.equal(kaldi_fbank(x, n_bins=23, snip_edges=False), expected)


def test_kaldi_ignores_a_constant_offset():
    x = voice(16_000)
    torch.testing.assert_close(kaldi_fbank(x + 0.25), kaldi_fbank(x), atol=0.02, rtol=0)
    assert (kaldi_fbank(x + 0.25) - kaldi_fbank(x)).abs().mean() < 1e-4


def test_kaldi_batch_independence_includes_leading_axes():
    x = noise(2, 3, 1_000)
    torch.testing.assert_close(kaldi_fbank(x)[1, 2], kaldi_fbank(x[1, 2]), atol=1e-5, rtol=0)


# ---- batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [LogMel(), KaldiFbank(), LogMel(n_bins=23, n_fft=1024), KaldiFbank(n_bins=40, kind="hamming")])
def test_an_utterance_is_the_same_alone_and_in_a_batch(module):
    waveforms, lengths = padded()
    together, feature_lengths = module(waveforms, lengths)
    assert feature_lengths.tolist() == [1 + (n - 400) // 160 for n in SAMPLES]
    for i, n in enumerate(SAMPLES):
        alone, m = module(waveforms[i : i + 1, :n], lengths[i : i + 1])
        assert alone.shape[1] == int(m) == int(feature_lengths[i])
        torch.testing.assert_close(together[i, : int(m)], alone[0], atol=1e-5, rtol=0)
        assert (together[i, int(m) :] == 0).all()


@pytest.mark.parametrize("fill", [1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("module", [LogMel(), KaldiFbank()])
def test_what_stands_in_the_padding_never_matters(module, fill):
    expected, _ = module(*padded())
    got, _ = module(*padded(fill=fill))
    assert torch.equal(got, expected)


def test_order_of_the_batch_does_not_matter():
    waveforms, lengths = padded()
    order = torch.tensor([2, 0, 3, 1])
    features, feature_lengths = LogMel()(waveforms, lengths)
    shuffled, shuffled_lengths = LogMel()(waveforms[order], lengths[order])
    assert torch.equal(shuffled_lengths, feature_lengths[order])
    torch.testing.assert_close(shuffled, features[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("module", [LogMel(), KaldiFbank()])
@pytest.mark.parametrize(
    "shape, lengths, message",
    [
        ((2, 800), [800], r"lengths has shape \(1,\) for a batch of 2"),
        ((2, 800), [800, 801], r"utterance 1 claims 801 samples, but the batch holds only 800; lengths count samples, not frames or seconds"),
        ((2, 800), [800, 0], "utterance 1 of the batch has 0 samples"),
        ((2, 800), [800, -5], "utterance 1 of the batch has -5 samples"),
    ],
)
def test_bad_lengths_are_refused(module, shape, lengths, message):
    assert_refused(module, torch.zeros(shape), torch.tensor(lengths), message=message)


def test_messages_about_shapes():
    with pytest.raises(ValueError, match=r"waveforms has shape \(800,\); expected two axes, \(batch, samples\).*waveform\[None\]"):
        _checked_lengths(torch.zeros(800), torch.tensor([800]))
    with pytest.raises(ValueError, match=r"lengths has shape \(1,\) for a batch of 2; expected one length for each waveform"):
        _checked_lengths(torch.zeros(2, 800), torch.tensor([800]))
    assert_refused(LogMel(), torch.zeros(800), torch.tensor([800]), message="expected two axes")


def test_buffers_are_no_weights():
    assert list(LogMel().state_dict()) == [] and list(KaldiFbank().state_dict()) == []
    assert {name for name, _ in LogMel().named_buffers()} == {"window", "bank"}


def test_settings_rebuild_the_module():
    waveforms, lengths = padded()
    for module in (LogMel(n_bins=30, hop_ms=5.0, f_max=4_000.0), KaldiFbank(n_bins=30, hop_ms=5.0, f_max=4_000.0)):
        again = type(module)(**module.settings)
        assert torch.equal(again(waveforms, lengths)[0], module(waveforms, lengths)[0])


def test_mirrored_ends_in_a_batch_are_those_of_each_utterance():
    samples = [4_000, 100, 5_555, 559]
    waveforms, lengths = padded(samples, fill=float("nan"))
    together, feature_lengths = KaldiFbank(snip_edges=False, f_max=7_600.0)(waveforms, lengths)
    assert feature_lengths.tolist() == [25, 1, 35, 3]
    for i, n in enumerate(samples):
        alone = kaldi_fbank(waveforms[i, :n], snip_edges=False, f_max=7_600.0)
        torch.testing.assert_close(together[i, : len(alone)], alone, atol=1e-5, rtol=0)
        assert len(alone) == int(feature_lengths[i]) and (together[i, len(alone) :] == 0).all()


def test_double_precision_goes_through():
    waveforms, lengths = padded()
    features, _ = LogMel().double()(waveforms.double(), lengths)
    assert features.dtype == torch.float64
    torch.testing.assert_close(features.float(), LogMel()(waveforms, lengths)[0], atol=1e-4, rtol=0)
    assert KaldiFbank()(waveforms.double(), lengths)[0].dtype == torch.float64


# ---- gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda x: LogMel(8_000, 4, window_ms=4.0, hop_ms=2.0, n_fft=64).double()(x, torch.tensor([60, 40]))[0],
        lambda x: KaldiFbank(8_000, 4, window_ms=4.0, hop_ms=2.0)(x, torch.tensor([60, 40]))[0],
        lambda x: kaldi_fbank(x, sample_rate=8_000, n_bins=4, window_ms=4.0, hop_ms=2.0, snip_edges=False),
    ],
    ids=["LogMel", "KaldiFbank", "mirrored"],
)
def test_gradients_flow_to_the_waveform(function):
    x = noise(2, 60, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, (x,))


def test_gradients_stay_out_of_the_padding():
    waveforms, lengths = padded()
    waveforms.requires_grad_()
    LogMel()(waveforms, lengths)[0].sum().backward()
    for i, n in enumerate(SAMPLES):
        assert waveforms.grad[i, :n].abs().sum() > 0 and (waveforms.grad[i, n:] == 0).all()


def test_silence_has_finite_gradients():
    x = torch.zeros(1, 800, requires_grad=True)
    for module in (LogMel(), KaldiFbank()):
        (gradient,) = torch.autograd.grad(module(x, torch.tensor([800]))[0].sum(), x)
        assert gradient.isfinite().all()


def test_gradients_through_normalisation():
    x = noise(2, 5, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: normalise_utterance(x, torch.tensor([5, 3])), (x,))


def test_gradients_through_a_constant_bin_are_finite():
    x = torch.ones(1, 4, 2, requires_grad=True)
    normalise_utterance(x, torch.tensor([4])).sum().backward()
    assert x.grad.isfinite().all()


# ---- normalisation ------------------------------------------------------------------------------------


def test_normalisation_by_hand():
    x = torch.tensor([[[1.0], [3.0], [99.0]], [[0.0], [3.0], [6.0]]])
    got = normalise_utterance(x, torch.tensor([2, 3]), floor=0.0)
    assert got[0].flatten().tolist() == pytest.approx([-1, 1, 0])
    assert got[1].flatten().tolist() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])


def test_normalisation_adds_its_floor_to_the_deviation():
    x = torch.tensor([[[1.0], [3.0]]])  # deviation 1
    assert normalise_utterance(x, torch.tensor([2])).flatten().tolist() == pytest.approx([-1 / 1.1, 1 / 1.1])


def test_normalised_utterances_have_mean_0_and_deviation_1():
    x, lengths = 5 + 3 * torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([50, 7, 23])
    got = normalise_utterance(x, lengths, floor=0.0)
    for item, n in zip(got, lengths.tolist()):
        assert item[:n].mean(dim=0).abs().max() < 1e-5
        torch.testing.assert_close(item[:n].std(dim=0, unbiased=False), torch.ones(4))
        assert (item[n:] == 0).all()


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 5), st.sampled_from([0.0, 1e6, float("nan")]))
@settings(max_examples=40, deadline=None)
def test_normalisation_never_reads_padding(lengths, extra, fill):
    batch = torch.full((len(lengths), max(lengths) + extra, 3), fill)
    for i, n in enumerate(lengths):
        batch[i, :n] = noise(n, 3, seed=i)
    together = normalise_utterance(batch, torch.tensor(lengths))
    for i, n in enumerate(lengths):
        alone = normalise_utterance(batch[i : i + 1, :n], torch.tensor([n]))
        torch.testing.assert_close(together[i, :n], alone[0], atol=1e-5, rtol=1e-5)


def test_loudness_disappears():
    x, lengths = voice(16_000)[None], torch.tensor([16_000])
    features, feature_lengths = LogMel(floor=0.0)(x, lengths)
    louder, _ = LogMel(floor=0.0)(4 * x, lengths)
    torch.testing.assert_close(normalise_utterance(louder, feature_lengths), normalise_utterance(features, feature_lengths), atol=1e-3, rtol=0)


def test_a_constant_bin_is_zero_and_one_frame_is_enough():
    got = normalise_utterance(torch.full((1, 4, 2), 7.0), torch.tensor([4]))
    assert (got == 0).all()
    assert (normalise_utterance(noise(1, 1, 5), torch.tensor([1])) == 0).all()


@pytest.mark.parametrize("lengths", [[4, 6], [4, 0], [4, -1], [4]])
def test_normalisation_refuses_lengths_that_do_not_fit(lengths):
    assert_refused(normalise_utterance, torch.zeros(2, 5, 3), torch.tensor(lengths), message="do not fit a batch of 2 utterances with 5 frames")


def corpus():
    generator = torch.Generator().manual_seed(3)
    for lengths in ([9, 4], [6], [2, 5, 1]):
        features = 4 + 2 * torch.randn(len(lengths), max(lengths), 3, generator=generator)
        for item, n in zip(features, lengths):
            item[n:] = 1e4  # padding that would show
        yield features, torch.tensor(lengths)


def test_global_statistics_are_those_of_all_valid_frames():
    frames = torch.cat([item[:n] for features, lengths in corpus() for item, n in zip(features, lengths.tolist())])
    normalise = GlobalNormalisation(3).fit(corpus())
    torch.testing.assert_close(normalise.mean, frames.mean(dim=0))
    torch.testing.assert_close(normalise.deviation, frames.std(dim=0, unbiased=False))
    assert int(normalise.n_fitted) == len(frames) == 27
    features, lengths = next(corpus())
    got = normalise(features, lengths)
    torch.testing.assert_close(got[1, :4], (features[1, :4] - frames.mean(dim=0)) / frames.std(dim=0, unbiased=False))
    assert (got[1, 4:] == 0).all()


def test_global_statistics_survive_a_large_mean():
    x = 1e4 + torch.randn(1, 2_000, 1, generator=torch.Generator().manual_seed(0))
    fitted = GlobalNormalisation(1).fit([(x, torch.tensor([2_000]))])
    assert float(fitted.deviation) == pytest.approx(float(x.double().std(unbiased=False)), rel=1e-3)


def test_global_statistics_are_saved():
    fitted, fresh = GlobalNormalisation(3).fit(corpus()), GlobalNormalisation(3)
    fresh.load_state_dict(fitted.state_dict())
    features, lengths = next(corpus())
    assert torch.equal(fresh(features, lengths), fitted(features, lengths))


def test_global_normalisation_works_frame_by_frame():
    fitted = GlobalNormalisation(3).fit(corpus())
    x = noise(1, 6, 3)
    pieces = [fitted(x[:, i : i + 2], torch.tensor([2])) for i in (0, 2, 4)]
    assert torch.equal(torch.cat(pieces, dim=1), fitted(x, torch.tensor([6])))


def test_global_normalisation_refuses_to_work_unfitted_or_on_nothing():
    with pytest.raises(ValueError, match="has not been fitted; call fit"):
        GlobalNormalisation(3)(torch.zeros(1, 2, 3), torch.tensor([2]))
    with pytest.raises(ValueError, match="fit saw 0 frames"):
        GlobalNormalisation(3).fit([])


# ---- SpecAugment --------------------------------------------------------------------------------------


def spec_augment(seed=0, **settings):
    return SpecAugment(generator=torch.Generator().manual_seed(seed), **settings)


def ones(batch, frames, bins=20):
    return torch.ones(batch, frames, bins), torch.full((batch,), frames)


def test_augment_hides_one_band_and_one_stretch():
    features, lengths = ones(200, 100)
    hidden = spec_augment(max_bins=6, max_frames=15)(features, lengths) == 0
    for item in hidden:
        bins, frames = item.all(dim=0), item.all(dim=1)
        assert bins.sum() <= 6 and frames.sum() <= 15
        assert torch.equal(item, bins[None, :] | frames[:, None])  # a cross of one band and one stretch
        for line in (bins, frames):
            assert line.long().diff().clamp(min=0).sum() + line[0].long() <= 1  # in one piece


def test_augment_uses_every_width_and_place():
    features, lengths = ones(4_000, 30, bins=5)
    hidden = spec_augment(max_bins=3, n_time_masks=0)(features, lengths)[:, 0] == 0
    widths = hidden.sum(dim=1).bincount(minlength=4)
    assert len(widths) == 4 and ((widths - 1_000).abs() < 120).all()  # 0, 1, 2, 3 equally often
    single = hidden[hidden.sum(dim=1) == 1].sum(dim=0)
    assert (single > 130).all()  # 200 expected at each of five places


def test_augment_keeps_time_masks_within_the_fraction_and_the_utterance():
    features, _ = ones(300, 100)
    lengths = torch.arange(1, 301).clamp(max=100)
    out = spec_augment(n_frequency_masks=0, max_frames=50, max_fraction=0.3)(features, lengths)
    for item, n in zip(out, lengths.tolist()):
        stretch = (item == 0).all(dim=1)
        assert stretch[:n].sum() <= int(0.3 * n + 1e-4) and not stretch[n:].any()


def test_augment_differs_between_utterances_and_calls():
    features, lengths = ones(8, 100)
    augment = spec_augment()
    first, second = augment(features, lengths), augment(features, lengths)
    assert not torch.equal(first, second)
    assert any(not torch.equal(first[0], item) for item in first[1:])


def test_augment_depends_on_its_generator_alone():
    features, lengths = ones(4, 100)
    expected = spec_augment(5)(features, lengths)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(spec_augment(5)(features, lengths), expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(spec_augment(6)(features, lengths), expected)


def test_augment_resumes_from_the_state_of_its_generator():
    features, lengths = ones(4, 100)
    augment = spec_augment()
    augment(features, lengths)
    state = augment.generator.get_state()
    expected = augment(features, lengths)
    fresh = spec_augment(99)
    fresh.generator.set_state(state)
    assert torch.equal(fresh(features, lengths), expected)
    assert torch.equal(copy.deepcopy(fresh)(features, lengths), fresh(features, lengths))


def test_augment_leaves_its_input_and_evaluation_alone():
    features, lengths = ones(4, 100)
    augment = spec_augment(n_time_masks=3)
    augment(features, lengths)
    assert (features == 1).all()
    state = augment.generator.get_state()
    assert torch.equal(augment.eval()(features, lengths), features)
    assert torch.equal(augment.generator.get_state(), state)  # and draws nothing


def test_augment_stops_gradients_where_it_hides():
    features, lengths = ones(2, 50)
    features.requires_grad_()
    out = spec_augment()(features, lengths)
    out.sum().backward()
    assert torch.equal(features.grad == 0, out == 0) and (out == 0).any()


def test_augment_without_masks_changes_nothing():
    features, lengths = ones(2, 50)
    assert torch.equal(spec_augment(n_frequency_masks=0, n_time_masks=0)(features, lengths), features)
    assert torch.equal(spec_augment(max_bins=0, max_frames=0)(features, lengths), features)


@pytest.mark.parametrize("settings_", [dict(n_time_masks=-1), dict(max_bins=-2), dict(max_fraction=1.5)])
def test_augment_refuses(settings_):
    with pytest.raises(ValueError, match="must not be negative, and max_fraction must lie between 0 and 1"):
        SpecAugment(**settings_)


# ---- picture, import ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_spectrogram_has_units_and_the_right_extent():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    features = torch.arange(12.0).reshape(4, 3).requires_grad_()
    ax = plot_spectrogram(features, hop_ms=20.0)
    assert ax.get_xlabel() == "time (s)" and ax.get_ylabel() == "mel bin"
    (image,) = ax.images
    assert image.get_extent() == pytest.approx([0, 0.08, 0, 3]) and image.get_array().tolist() == features.T.tolist()
    _, own = plt.subplots()
    assert plot_spectrogram(features, ax=own) is own
    plt.close("all")


def test_importing_features_loads_neither_torchaudio_nor_matplotlib():
    code = "import sys, speechlearn.sound.features; sys.exit(bool({'torchaudio', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- once wrong, mended: these keep it so -------------------------------------------------------------


def test_benchmark_of_equality_finds_nothing_over_its_limit():
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "features.py"
    spec = importlib.util.spec_from_file_location("features_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    rows = benchmark.equality()
    assert len(rows) == 306 and all(row["frames"] == row["frames_torchaudio"] for row in rows)
    assert max(row["relative"] for row in rows) <= 1e-4


def test_kaldi_window_at_11025_hertz():
    x = noise(11_025)
    theirs = kaldi.fbank(x[None], sample_frequency=11_025.0, num_mel_bins=23, dither=0.0)
    assert relative_gap(kaldi_fbank(x, sample_rate=11_025, n_bins=23), theirs) <= 1e-4


def test_odd_n_fft_is_refused_or_right():
    x = noise(1, 4_000)
    try:
        features, _ = LogMel(n_fft=511)(x, torch.tensor([4_000]))
    except ValueError:
        return
    power = power_spectrum(frame_signal(x[0], 400, 160) * window_function("hann", 400), 511)
    torch.testing.assert_close(features[0], torch.log(power @ mel_filter_bank(80, 511, 16_000) + 1e-10))


def test_spectrogram_is_drawn_without_warnings():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    try:
        plot_spectrogram(torch.zeros(4, 3))
    finally:
        plt.close("all")


def test_a_waveform_with_nan_is_refused():
    x = torch.zeros(2, 800)
    x[1, 3] = float("nan")
    with pytest.raises(ValueError, match="utterance 1"):
        LogMel()(x, torch.tensor([800, 800]))


@pytest.mark.parametrize("make", [lambda: LogMel(n_bins=23, n_fft=256), lambda: LogMel(hop_ms=0.0), lambda: KaldiFbank(n_bins=200), lambda: KaldiFbank(preemphasis=7.0)])
def test_bad_settings_are_refused_on_creation(make):
    with pytest.raises(ValueError):
        make()


# ---- vocal tract length -----------------------------------------------------------------------------------


def test_warping_reads_each_bin_at_another_frequency():
    """Against numpy's interpolation on the same mel axis."""
    features, factors = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)), torch.tensor([0.85, 1.2])
    mel = lambda f: 1127.01048 * np.log1p(np.asarray(f) / 700)  # noqa: E731
    axis = np.linspace(mel(20.0), mel(4000.0), 42)[1:-1]
    hertz = 700 * np.expm1(axis / 1127.01048)
    got = warp_frequencies(features, factors, f_max=4000.0)
    for row, factor, result in zip(features, factors.tolist(), got):
        for frame, expected in zip(row.numpy(), result.numpy()):
            np.testing.assert_allclose(np.interp(mel(hertz * factor), axis, frame), expected, atol=2e-4)


def test_warping_by_one_and_back():
    smooth = torch.linspace(0, 3, 80).sin().expand(1, 4, 80).contiguous()
    torch.testing.assert_close(warp_frequencies(smooth, torch.ones(1)), smooth, atol=1e-4, rtol=0)
    there = warp_frequencies(smooth, torch.tensor([1.1]))
    back = warp_frequencies(there, torch.tensor([1 / 1.1]))
    assert (there - smooth).abs().max() > 0.05
    torch.testing.assert_close(back[..., 5:70], smooth[..., 5:70], atol=2e-3, rtol=0)


def test_warping_moves_peaks_and_keeps_padding():
    peak = torch.zeros(1, 2, 80)
    peak[0, 0, 40] = 1.0
    up, down = (warp_frequencies(peak, torch.tensor([f])) for f in (0.9, 1.1))
    assert int(up[0, 0].argmax()) > 40 > int(down[0, 0].argmax())
    assert not up[0, 1].any()


def test_vocal_tract_warp_only_in_training_and_from_its_generator():
    features, lengths = torch.randn(3, 5, 80, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 4, 2])
    make = lambda seed: VocalTractWarp(0.2, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(make(1)(features, lengths), make(1)(features, lengths))
    assert not torch.equal(make(1)(features, lengths), make(2)(features, lengths))
    assert make(1).eval()(features, lengths) is features
    assert VocalTractWarp(0.0)(features, lengths) is features
    with pytest.raises(ValueError, match="strength is 2"):
        VocalTractWarp(2.0)
    with pytest.raises(ValueError, match="expected one above zero for each of the 3 utterances"):
        warp_frequencies(features, torch.tensor([1.0, 0.0, 1.0]))


def test_factors_of_the_warp_stay_in_their_range(monkeypatch):
    seen = []
    monkeypatch.setattr("speechlearn.sound.features.warp_frequencies", lambda x, factors, **k: seen.append(factors) or x)
    VocalTractWarp(0.25, generator=torch.Generator().manual_seed(0))(torch.zeros(500, 1, 8), torch.ones(500, dtype=torch.long))
    assert 0.8 <= seen[0].min() < 0.82 and 1.23 < seen[0].max() <= 1.25 and seen[0].log().mean().abs() < 0.02


class TestRunningNormalisation:
    @staticmethod
    def one_by_one(x):
        """The statistics as the chapter's words say them, frame by frame, in plain Python."""
        n_bins = x.shape[1]
        loudest, heard, rows = -4.0, [], []  # frames that count: [age, values]
        for values in x.tolist():
            loudness = sum(values) / n_bins
            loudest = max(loudest - 4.6 / 6000, loudness)
            for entry in heard:
                entry[0] += 1
            if loudness > max(loudest - 4.6, -10.9):
                heard.append([0, values])
            weights = [math.exp(-age / 600) for age, _ in heard]
            row = []
            for k in range(n_bins):
                count = 30 + sum(weights)
                mean = (30 * -4.0 + sum(w * v[k] for w, (_, v) in zip(weights, heard))) / count
                square = (30 * (2.5**2 + 16.0) + sum(w * v[k] ** 2 for w, (_, v) in zip(weights, heard))) / count
                row.append((values[k] - mean) / math.sqrt(max(square - mean**2, 0.25)))
            rows.append(row)
        return torch.tensor(rows)

    def test_against_plain_python(self):
        generator = torch.Generator().manual_seed(0)
        loudness = torch.tensor([-14.0] * 20 + [-3.0] * 60 + [-13.0] * 60 + [2.0] * 30 + [-5.0] * 30)  # silence, a word, a pause, a shout, a distant voice
        x = torch.randn(200, 3, generator=generator) + loudness[:, None]
        torch.testing.assert_close(RunningNormalisation(3).accept(x), self.one_by_one(x), atol=1e-5, rtol=1e-5)

    @given(cuts=st.lists(st.integers(0, 4500), max_size=6), seed=st.integers(0, 99))
    def test_cut_anywhere(self, cuts, seed):
        x = 4 * torch.randn(4500, 2, generator=torch.Generator().manual_seed(seed)) - 5
        whole, one, cuts = RunningNormalisation(2).accept(x), RunningNormalisation(2), sorted(cuts)
        parts = [one.accept(x[a:b]) for a, b in zip([0, *cuts], [*cuts, 4500])]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)

    def test_a_pause_is_no_shock(self):
        """After a minute of hiss the next word looks as it would have looked without it."""
        generator = torch.Generator().manual_seed(1)
        word, hiss = 2.5 * torch.randn(100, 4, generator=generator) - 3, 0.6 * torch.randn(6000, 4, generator=generator) - 12
        one = RunningNormalisation(4)
        one.accept(word)
        before = copy.deepcopy(one).accept(word)
        assert one.accept(hiss).max() < 0, "hiss stays below what is normal"
        after = one.accept(word)
        assert (after - before).abs().mean() < 0.4 and after.abs().max() < 6

    def test_level_is_learnt(self):
        utterance = sampler()[0]
        mel, lengths = LogMel(n_bins=20)(utterance.waveform(16_000)[None], torch.tensor([len(utterance.waveform(16_000))]))
        n = int(lengths[0])
        near, far = normalise_running(mel + 2.3, lengths)[0], normalise_running(mel - 2.3, lengths)[0]
        loud = mel[0].mean(dim=1) > mel[0].mean(dim=1).max() - 4
        late = loud & (torch.arange(mel.shape[1]) > n // 2)
        assert (near - far)[late].abs().mean() < 0.3 * 4.6 / 2.5, "the level is passed on"

    def test_padding_and_errors(self):
        x = torch.randn(2, 9, 3) - 4
        y = normalise_running(x, torch.tensor([9, 4]))
        assert torch.equal(y[1, 4:], torch.zeros(5, 3)) and torch.equal(y[1, :4], RunningNormalisation(3).accept(x[1, :4]))
        assert RunningNormalisation(3).accept(x[0, :0]).shape == (0, 3)
        one = RunningNormalisation(3)
        with pytest.raises(ValueError, match="made for 3"):
            one.accept(torch.zeros(5, 4))
        with pytest.raises(ValueError, match="NaN"):
            one.accept(torch.full((5, 3), math.nan))
        torch.testing.assert_close(one.accept(x[0]), RunningNormalisation(3).accept(x[0]))  # what was refused has changed nothing
