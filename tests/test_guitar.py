"""Guitar sounds: loops against a sample-by-sample loop, pitch against cents, pedals against cases computed by hand and against a library."""
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlearn.guitar import (
    PEDALS, Note, all_pass, cents_off, chorus, delay, feedback_line, fractional_delay, library_pedal, midi_to_hz, overdrive, phrase, pluck_burst, random_note, random_pedal, reverb, string_loop,
    through, tremolo,
)
from speechlearn.sound.waveform import AudioError

RATE = 16_000


def noise(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def click(n):
    x = torch.zeros(n, dtype=torch.float64)
    x[0] = 1
    return x


class TestFeedbackLine:
    def test_by_hand(self):
        y = feedback_line(torch.tensor([4.0, 0.0, -4.0, 0.0, 0.0, 0.0, 0.0]), 3, torch.tensor([0.5, 0.5]))
        assert y.tolist() == [4.0, 0.0, -4.0, 2.0, 2.0, -2.0, -1.0]

    @given(n=st.integers(0, 60), length=st.integers(1, 25), n_taps=st.integers(1, 6), seed=st.integers(0, 99))
    @settings(deadline=None, max_examples=60)
    def test_equals_a_loop_over_samples(self, n, length, n_taps, seed):
        x, taps = noise(n, seed), noise(n_taps, seed + 1)
        taps = taps / taps.abs().sum()
        y = []
        for i in range(n):
            y.append(float(x[i]) + sum(float(h) * y[i - length - k] for k, h in enumerate(taps) if i - length - k >= 0))
        assert torch.allclose(feedback_line(x, length, taps), torch.tensor(y, dtype=torch.float64), atol=1e-10)

    def test_the_future_never_matters(self):
        x, taps = noise(200), torch.tensor([0.3, 0.3])
        changed = x.clone()
        changed[120:] = 9.0
        assert torch.equal(feedback_line(x, 7, taps)[:120], feedback_line(changed, 7, taps)[:120])

    def test_the_input_stays_as_it_was(self):
        x = noise(50)
        before = x.clone()
        feedback_line(x, 5, torch.tensor([0.5]))
        assert torch.equal(x, before)

    def test_refuses_what_would_grow(self):
        with pytest.raises(ValueError, match="1.010 times as loud after each round"):
            feedback_line(noise(10), 2, torch.tensor([0.5, 0.51]))
        with pytest.raises(ValueError, match="at least 1 sample"):
            feedback_line(noise(10), 0, torch.tensor([0.5]))


class TestFractionalDelay:
    def test_by_hand(self):
        assert fractional_delay(1.5).tolist() == [-1 / 16, 9 / 16, 9 / 16, -1 / 16]
        assert fractional_delay(1.0).tolist() == [0, 1, 0, 0] and fractional_delay(2.0).tolist() == [0, 0, 1, 0]

    @given(st.floats(1, 2))
    def test_polynomials_of_degree_three_are_delayed_exactly(self, d):
        k = torch.arange(4, dtype=torch.float64)
        for degree in range(4):
            assert float((fractional_delay(d) * k**degree).sum()) == pytest.approx(d**degree, abs=1e-12)

    @pytest.mark.parametrize("d", [1.0, 1.3, 1.5, 1.77, 2.0])
    def test_never_louder_than_one(self, d):
        assert float(torch.fft.rfft(fractional_delay(d), 1024).abs().max()) <= 1 + 1e-12

    def test_refuses_others(self):
        with pytest.raises(ValueError, match="from 1 to 2"):
            fractional_delay(0.5)


class TestPitch:
    def test_the_meter_reads_a_sine(self):
        for frequency, off in ((220.0, 0.0), (220.0, 7.0), (659.3, -33.0)):
            x = torch.sin(2 * math.pi * frequency * 2 ** (off / 1200) * torch.arange(RATE, dtype=torch.float64) / RATE)
            assert cents_off(x, RATE, frequency) == pytest.approx(off, abs=0.1)

    def test_the_meter_wants_enough_sound(self):
        with pytest.raises(ValueError, match="20 are needed"):
            cents_off(noise(800), RATE, 82.4)
        with pytest.raises(AudioError, match="NaN"):
            cents_off(torch.full((RATE,), math.nan), RATE, 220.0)

    @pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100])
    @pytest.mark.parametrize("midi", [28, 40, 45, 52.5, 64, 76, 83])
    def test_notes_are_in_tune(self, midi, rate):
        x = Note(midi, 2.0, decay=4.0, seed=5).waveform(rate)
        assert abs(cents_off(x, rate, midi_to_hz(midi))) < 1.0

    @pytest.mark.parametrize("damping", [0.02, 0.1, 0.2])
    def test_damping_does_not_detune(self, damping):
        x = Note(64, 2.0, damping=damping).waveform(RATE)
        assert abs(cents_off(x, RATE, midi_to_hz(64))) < 1.0

    def test_without_the_fraction_it_would_be_out_of_tune(self):
        length = round(RATE / midi_to_hz(76))
        plain = feedback_line(torch.cat([noise(length) - noise(length).mean(), torch.zeros(2 * RATE, dtype=torch.float64)]), length, torch.tensor([0.5, 0.5]))
        assert cents_off(plain, RATE, midi_to_hz(76)) == pytest.approx(1200 * math.log2(RATE / (length + 0.5) / midi_to_hz(76)), abs=1.0)
        assert abs(cents_off(plain, RATE, midi_to_hz(76))) > 5


class TestString:
    def test_low_harmonics_fall_by_sixty_decibels_in_the_decay(self):
        frequency, decay = 110.0, 1.0
        length, taps = string_loop(frequency, RATE, decay=decay, damping=0.01)
        y = feedback_line(torch.cat([torch.sin(2 * math.pi * frequency * torch.arange(145, dtype=torch.float64) / RATE), torch.zeros(2 * RATE, dtype=torch.float64)]), length, taps)
        early, late = y[1_600:3_200].square().mean(), y[1_600 + RATE : 3_200 + RATE].square().mean()
        assert 10 * math.log10(float(late / early)) == pytest.approx(-60, abs=1.5)

    def test_high_harmonics_die_first(self):
        def brightness(x):
            power = torch.fft.rfft(x.double()).abs().square()
            return float((power * torch.arange(len(power))).sum() / power.sum())

        x = Note(45, 2.0, damping=0.2, seed=1).waveform(RATE)
        assert brightness(x[RATE : RATE + 4_000]) < 0.7 * brightness(x[:4_000])

    @pytest.mark.parametrize("parts", [2, 3, 4])
    def test_the_pick_takes_out_the_harmonics_with_a_node_there(self, parts):
        burst = pluck_burst(480, 100.0, velocity=0.9, pick=1 / parts, generator=torch.Generator().manual_seed(0))
        levels = torch.fft.rfft(burst).abs()
        assert levels[::parts].max() < 1e-9 * levels.max()
        assert levels[1] > 1e-3 * levels.max()

    def test_harder_is_louder_and_brighter(self):
        soft, hard = (Note(45, velocity=v, seed=2).waveform() for v in (0.2, 1.0))
        share = lambda x: float(torch.fft.rfft(x)[2_000:].abs().square().sum() / torch.fft.rfft(x).abs().square().sum())
        assert hard.abs().max() > 3 * soft.abs().max() and share(hard) > 3 * share(soft)

    def test_no_constant_is_left(self):
        assert abs(float(Note(40, 3.0).waveform().mean())) < 1e-4


class TestNotes:
    def test_the_same_everywhere_and_in_any_order(self):
        assert random_note(3, 5) == random_note(3, 5)
        assert torch.equal(random_note(3, 5).waveform(), random_note(3, 5).waveform())
        assert len({random_note(s, i) for s in range(3) for i in range(50)}) == 150
        state = torch.get_rng_state()
        random_note(0, 0).waveform()
        assert torch.equal(torch.get_rng_state(), state), "a note must not draw from the global random numbers"

    def test_all_pitches_occur_and_none_beyond(self):
        found = {random_note(0, i, lowest=50, highest=54).midi for i in range(200)}
        assert found == {50, 51, 52, 53, 54}

    @pytest.mark.parametrize("seconds", [0.001, 0.0501, 0.25, 1.0])
    def test_length(self, seconds):
        x = Note(40, seconds).waveform(RATE)
        assert x.shape == (round(seconds * RATE),) and x.dtype == torch.float32 and x.isfinite().all()

    def test_never_beyond_full_scale(self):
        assert max(float(random_note(9, i).waveform().abs().max()) for i in range(60)) <= 0.6

    @pytest.mark.parametrize("change", [dict(midi=math.nan), dict(midi=200), dict(velocity=0), dict(pick=0.7), dict(seconds=0), dict(decay=-1), dict(damping=0.3)])
    def test_refuses_impossible_notes(self, change):
        with pytest.raises(ValueError, match=f"{next(iter(change))} of a note is"):
            dataclasses.replace(Note(50), **change)

    def test_refuses_what_the_sample_rate_cannot_hold(self):
        with pytest.raises(ValueError, match="take a sample rate of at least"):
            Note(96, 0.5).waveform(8_000)

    def test_phrase_adds(self):
        a, b = Note(50, 0.5, seed=1), Note(57, 0.25, seed=2)
        x = phrase([a, b], [0.0, 0.1], RATE)
        expected = a.waveform(RATE).clone()
        expected[1_600 : 1_600 + 4_000] += b.waveform(RATE)
        assert torch.equal(x, expected)
        with pytest.raises(ValueError, match="as many starts"):
            phrase([a], [0.0, 1.0])


class TestPedals:
    @pytest.mark.parametrize("name", PEDALS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("n", [1, 2, 37, 5_000])
    def test_keep_length_type_and_input(self, name, dtype, n):
        x = noise(n).to(dtype) * 0.1
        before = x.clone()
        y = PEDALS[name](x, RATE)
        assert y.shape == x.shape and y.dtype == dtype and y.isfinite().all()
        assert torch.equal(x, before)

    @pytest.mark.parametrize("name", PEDALS)
    def test_silence_stays_silence_and_damage_is_named(self, name):
        assert PEDALS[name](torch.zeros(2_000), RATE).abs().max() < 1e-12
        damaged = torch.zeros(2_000)
        damaged[7] = math.nan
        with pytest.raises(AudioError, match="the first .nan. at sample 7"):
            PEDALS[name](damaged, RATE)
        with pytest.raises(AudioError, match="no samples"):
            PEDALS[name](torch.zeros(0), RATE)
        with pytest.raises(AudioError, match="hertz"):
            PEDALS[name](torch.zeros(10), 0)

    @pytest.mark.parametrize("name", PEDALS)
    def test_random_settings_are_valid_and_seeded(self, name):
        x = Note(50, 0.2).waveform()
        for seed in range(5):
            pedal = random_pedal(name, torch.Generator().manual_seed(seed))
            assert pedal == random_pedal(name, torch.Generator().manual_seed(seed))
            wet = through(x, RATE, pedal)
            assert wet.isfinite().all() and not torch.allclose(wet, x, atol=1e-4)

    def test_tremolo_by_hand(self):
        y = tremolo(torch.ones(RATE, dtype=torch.float64), RATE, rate_hz=2.0, depth=0.6)
        for n, expected in ((0, 1.0), (2_000, 0.7), (4_000, 0.4), (6_000, 0.7), (8_000, 1.0)):
            assert float(y[n]) == pytest.approx(expected, abs=1e-9)

    def test_delay_by_hand(self):
        y = delay(click(RATE), RATE, seconds=0.2, feedback=0.5, mix=0.25)
        assert {n: float(y[n]) for n in y.nonzero()[:, 0].tolist()} == {0: 0.75, 3_200: 0.25, 6_400: 0.125, 9_600: 0.0625, 12_800: 0.03125}

    @pytest.mark.parametrize("name, settings", [("delay", dict(mix=0.0)), ("chorus", dict(mix=0.0)), ("reverb", dict(mix=0.0)), ("tremolo", dict(depth=0.0)), ("chorus", dict(centre_ms=0.0, depth_ms=0.0, mix=1.0))])
    def test_turned_off_they_change_nothing(self, name, settings):
        x = noise(3_000)
        assert torch.equal(PEDALS[name](x, RATE, **settings), x)

    def test_chorus_of_a_ramp(self):
        n = torch.arange(4_000, dtype=torch.float64)
        y = chorus(n, RATE, rate_hz=3.0, centre_ms=8.0, depth_ms=4.0, mix=1.0)
        expected = n - 16 * (8 + 4 * torch.sin(2 * math.pi * 3 * n / RATE))
        assert torch.allclose(y[200:], expected[200:], atol=1e-9)

    def test_chorus_without_swing_is_one_echo(self):
        x = noise(2_000)
        y = chorus(x, RATE, centre_ms=5.0, depth_ms=0.0, mix=1.0)
        assert torch.allclose(y[80:], x[:-80], atol=1e-12) and not y[:80].any()

    def test_overdrive_by_hand(self):
        x, g = torch.tensor([0.0, 0.1, -0.1, 0.5, 1.0, -1.0], dtype=torch.float64), 10 ** (12 / 20)
        assert torch.allclose(overdrive(x, RATE, drive_db=12.0, oversample=1), (g * x).tanh() / math.tanh(g), atol=1e-12)
        assert overdrive(torch.ones(3), RATE, oversample=1).tolist() == [1, 1, 1]

    def test_overdrive_makes_odd_harmonics_only_and_oversampling_stops_aliases(self):
        sine = 0.8 * torch.sin(2 * math.pi * 3_500 * torch.arange(RATE, dtype=torch.float64) / RATE)
        level = lambda factor, hz, x=sine: 20 * math.log10(float(torch.fft.rfft(overdrive(x, RATE, drive_db=18.0, oversample=factor) * torch.hann_window(RATE, dtype=torch.float64)).abs()[hz]) / 4_000)
        low = 0.8 * torch.sin(2 * math.pi * 400 * torch.arange(RATE, dtype=torch.float64) / RATE)
        assert level(4, 1_200, low) > -20 and level(4, 800, low) < -80
        assert level(1, 5_500) > -20 and level(4, 5_500) < -60

    def test_all_pass_passes_all(self):
        y = all_pass(click(1 << 14), 37, 0.6)
        assert (torch.fft.rfft(y).abs() - 1).abs().max() < 1e-6
        assert [float(y[n]) for n in (0, 37, 74)] == pytest.approx([-0.6, 1 - 0.36, 0.6 * 0.64])

    @pytest.mark.parametrize("seconds", [0.5, 1.5])
    def test_the_room_lasts_as_long_as_asked(self, seconds):
        room = reverb(click(3 * RATE), RATE, seconds=seconds, mix=1.0)
        to_come = room.square().flip(0).cumsum(0).flip(0)
        assert float((10 * torch.log10(to_come / to_come[0]) > -60).sum() / RATE) == pytest.approx(seconds, rel=0.12)

    def test_pedals_in_a_row_and_their_order(self):
        x = Note(50, 0.5).waveform()
        row = through(x, RATE, ("overdrive", dict(drive_db=20.0)), "delay")
        assert torch.equal(row, delay(overdrive(x, RATE, drive_db=20.0), RATE))
        assert not torch.allclose(row, through(x, RATE, "delay", ("overdrive", dict(drive_db=20.0))), atol=1e-3)
        assert torch.equal(through(x, RATE), x)

    @pytest.mark.parametrize(
        "pedal, says",
        [("wah", "there is no pedal 'wah'; there are overdrive, delay"), (("delay", dict(time=1)), "does not take these settings"), (("delay", dict(feedback=1.0)), "feedback is 1.0; expected a number from 0 to 0.99"),
         (("tremolo", dict(depth=math.nan)), "depth is nan"), (("chorus", dict(centre_ms=2.0, depth_ms=3.0)), "depth_ms is 3.0; expected a number from 0 to 2"), (("reverb", dict(seconds=0.0)), "seconds is 0.0")],
    )
    def test_errors_say_what_was_wrong(self, pedal, says):
        with pytest.raises(ValueError, match=says):
            through(noise(100), RATE, pedal)
        if isinstance(pedal, str):
            with pytest.raises(ValueError, match=says):
                random_pedal(pedal, torch.Generator())


class TestLibrary:
    def test_two_pedals_equal_the_librarys(self):
        pytest.importorskip("pedalboard", reason="the effects library pedalboard is not installed (pip install pedalboard)")
        x = phrase([Note(m, 1.0, velocity=0.5, seed=m) for m in (40, 47, 52)], [0.0, 0.1, 0.2])
        theirs = library_pedal("Distortion", drive_db=24.0)(x, RATE)
        assert torch.allclose(theirs, overdrive(x, RATE, drive_db=24.0, oversample=1) * math.tanh(10 ** (24 / 20)), atol=1e-5)
        theirs = library_pedal("Delay", delay_seconds=0.25, feedback=0.45, mix=0.4)(x, RATE)
        assert torch.allclose(theirs, delay(x, RATE, seconds=0.25, feedback=0.45, mix=0.4), atol=1e-5)
        with pytest.raises(ValueError, match="no effect 'Wah'"):
            library_pedal("Wah")

    def test_says_how_to_get_it(self, monkeypatch):
        import sys

        monkeypatch.setitem(sys.modules, "pedalboard", None)
        with pytest.raises(ImportError, match="pip install pedalboard"):
            library_pedal("Delay")


def test_doctests():
    import doctest

    import speechlearn.guitar as module

    found = doctest.testmod(module)
    assert found.attempted >= 3 and found.failed == 0
