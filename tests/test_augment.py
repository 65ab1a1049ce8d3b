"""data.augment: each change does what it says, by measure."""
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlearn.data.augment import Augment, add_noise, band_limit, gain, pink_noise, reverb, speed, tilt, white_noise
from speechlearn.sound.waveform import rms_db


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def speech(samples=16_000):
    return 0.2 * torch.randn(samples, generator=seeded(1)) * torch.hann_window(samples)


@settings(max_examples=40, deadline=None)
@given(st.floats(-10, 40), st.integers(100, 5000))
def test_noise_has_the_wanted_ratio(snr_db, samples):
    x = speech(samples)
    added = add_noise(x, white_noise(samples, generator=seeded(2)), snr_db) - x
    assert rms_db(x) - rms_db(added) == pytest.approx(snr_db, abs=0.1)


def test_noise_on_silence_and_bad_noise():
    assert torch.equal(add_noise(torch.zeros(10), torch.ones(10), 10.0), torch.zeros(10))
    with pytest.raises(ValueError, match="10 samples and the noise 9"):
        add_noise(torch.ones(10), torch.ones(9), 10.0)
    with pytest.raises(ValueError, match="digital silence"):
        add_noise(torch.ones(10), torch.zeros(10), 10.0)


def test_pink_noise_falls_three_decibels_an_octave():
    power = torch.stack([torch.fft.rfft(pink_noise(1 << 15, generator=seeded(i))).abs().square() for i in range(20)]).mean(dim=0)
    octaves = [10 * math.log10(float(power[1 << k : 2 << k].mean())) for k in range(5, 13)]
    steps = [b - a for a, b in zip(octaves, octaves[1:])]
    assert all(-4 < step < -2 for step in steps)
    assert float(pink_noise(1000, generator=seeded()).square().mean()) == pytest.approx(1, abs=1e-4)


def test_reverb_is_causal_and_decays_by_sixty_decibels():
    click = torch.zeros(8_000)
    click[50] = 1.0
    room = reverb(click, 16_000, 0.2, mix=0.5, generator=seeded())
    assert len(room) == 8_000 and room[:50].abs().max() < 1e-5 and float(room[50]) == pytest.approx(1, abs=1e-4)
    tail = room[51:3250]
    assert float(tail.square().sum()) == pytest.approx(0.5, rel=1e-3)
    start, end = rms_db(tail[:160]), rms_db(tail[-160:])
    assert -66 < end - start < -50
    with pytest.raises(ValueError, match="above zero"):
        reverb(click, 16_000, 0.0)


def test_reverb_equals_direct_convolution():
    x = torch.randn(300, generator=seeded(), dtype=torch.float64)
    response = reverb(torch.eye(1, 200, dtype=torch.float64)[0], 16_000, 0.005, generator=seeded(3))[:80]
    direct = torch.nn.functional.conv1d(x[None, None], response.flip(0)[None, None], padding=79)[0, 0, :300]
    assert torch.allclose(reverb(x, 16_000, 0.005, generator=seeded(3)), direct, atol=1e-6)


@pytest.mark.parametrize("factor", [0.5, 0.85, 1.0, 1.18, 2.0])
def test_speed_changes_length_and_pitch(factor):
    x = torch.sin(2 * math.pi * 500 * torch.arange(16_000) / 16_000)
    y = speed(x, factor)
    assert abs(len(y) - 16_000 / factor) <= 2
    peak = torch.fft.rfft(y * torch.hann_window(len(y))).abs().argmax() * 16_000 / len(y)
    assert float(peak) == pytest.approx(500 * factor, abs=2)
    with pytest.raises(ValueError, match="expected 0.5 to 2"):
        speed(x, 3.0)


def test_tilt_keeps_power_and_tints():
    x = speech()
    for amount in (-0.6, 0.6):
        y = tilt(x, amount)
        assert rms_db(y) == pytest.approx(rms_db(x), abs=0.01)
        spectrum = torch.fft.rfft(y).abs().square()
        assert (spectrum[4000:].sum() > spectrum[:4000].sum()) == (amount > 0)
    assert torch.equal(tilt(torch.zeros(5), 0.5), torch.zeros(5))
    with pytest.raises(ValueError, match="tilt is 1.0"):
        tilt(x, 1.0)


def test_band_limit_and_gain():
    x = speech()
    spectrum = torch.fft.rfft(band_limit(x, 16_000)).abs().square()
    assert spectrum[4400:].sum() < 1e-4 * spectrum[:3600].sum() and len(band_limit(x, 16_000)) == len(x)
    assert rms_db(gain(x, -6.0)) == pytest.approx(rms_db(x) - 6, abs=0.01)
    assert float(gain(x, 80.0).abs().max()) == pytest.approx(1.0)


def test_the_same_generator_gives_the_same_sound_whatever_else_is_drawn():
    augment, x = Augment(), speech()
    for seed in range(12):
        torch.manual_seed(seed)
        first = augment(x, 16_000, seeded(seed))
        torch.manual_seed(99)
        assert torch.equal(first, augment(x, 16_000, seeded(seed)))
    assert not torch.equal(augment(x, 16_000, seeded(1)), augment(x, 16_000, seeded(2)))


def test_input_is_not_changed_and_the_output_is_sound():
    x = speech()
    kept = x.clone()
    for seed in range(30):
        y = Augment()(x, 16_000, seeded(seed))
        assert torch.isfinite(y).all() and y.dtype == x.dtype and y.abs().max() < 1.05
        assert 16_000 / 1.19 <= len(y) <= 16_000 / 0.84
        assert (y != 0).float().mean() > 0.99  # no digital zeros are left
    assert torch.equal(x, kept)


def test_silence_stays_finite():
    y = Augment(p_noise=1.0, p_reverb=1.0, p_tilt=1.0)(torch.zeros(8_000), 16_000, seeded())
    assert torch.isfinite(y).all() and rms_db(y) < -55


def test_switched_off_only_level_and_floor_remain():
    off = Augment(p_speed=0.0, p_reverb=0.0, p_noise=0.0, p_tilt=0.0, p_band_limit=0.0, level_db=(-20.0, -20.0), floor_db=(-90.0, -90.0))
    x = speech()
    y = off(x, 16_000, seeded())
    assert rms_db(y) == pytest.approx(-20, abs=0.05)
    assert torch.nn.functional.cosine_similarity(x, y, dim=0) > 0.999


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="p_noise is 1.5"):
        Augment(p_noise=1.5)
    with pytest.raises(ValueError, match="must not be above"):
        replace(Augment(), snr_db=(30.0, 10.0))


def test_pauses_lie_before_and_behind_and_are_no_digital_silence():
    quiet = replace(Augment(), p_speed=0.0, p_reverb=0.0, p_noise=0.0, p_tilt=0.0, p_band_limit=0.0, p_pause=1.0, pause_seconds=(0.5, 2.0))
    x, lengths = speech(), set()
    for seed in range(20):
        y = quiet(x, 16_000, seeded(seed))
        # Where is the speech? Where the correlation with it is highest; before and behind it nothing but the floor.
        place = int(torch.nn.functional.conv1d(y[None, None], x[None, None]).argmax())
        before, behind = place, len(y) - place - len(x)
        assert 8000 <= before <= 32_000 and 8000 <= behind <= 32_000
        for part in (y[:place], y[place + len(x) :]):
            assert -91 < rms_db(part) < -59
        lengths.add(len(y))
    assert len(lengths) > 15


def test_without_pauses_nothing_else_changes():
    """The draw for pauses is made only where there are some: stored runs can be repeated."""
    x = speech()
    assert torch.equal(Augment()(x, 16_000, seeded(3)), replace(Augment(), pause_seconds=(1.0, 9.0))(x, 16_000, seeded(3)))
