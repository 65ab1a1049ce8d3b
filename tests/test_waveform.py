"""sound.waveform: files of all kinds, broken files, resampling, streams."""
import builtins
import errno
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speechlearn.sound import waveform as w
from speechlearn.sound.waveform import AudioError, load, mix_down, peak_db, resample, rms_db, save, stream


def tone(seconds=0.5, rate=16_000, frequency=440.0, amplitude=0.5):
    return amplitude * torch.sin(2 * math.pi * frequency * torch.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("subtype,step", [("PCM_U8", 1 / 128), ("PCM_16", 1 / 32768), ("PCM_24", 2**-23), ("PCM_32", 2**-23), ("FLOAT", 1e-7), ("DOUBLE", 1e-7)])
def test_every_number_format_gives_the_same_sound(tmp_path, subtype, step):
    x = tone()
    soundfile.write(tmp_path / "x.wav", x.numpy(), 16_000, subtype=subtype)
    got = load(tmp_path / "x.wav")
    assert got.dtype == torch.float32 and got.shape == x.shape
    assert (got - x).abs().max() <= step + 1e-7


@pytest.mark.parametrize("kind,subtype,bound", [("FLAC", "PCM_16", 1e-4), ("OGG", "VORBIS", 0.05), ("OGG", "OPUS", 0.05)])
def test_compressed_files(tmp_path, kind, subtype, bound):
    x = tone(1.0)
    soundfile.write(tmp_path / "x", x.numpy(), 16_000, format=kind, subtype=subtype)
    got = load(tmp_path / "x")
    assert abs(len(got) - len(x)) <= 640
    assert abs(rms_db(got) - rms_db(x)) < 0.5
    if subtype == "PCM_16":
        assert (got - x).abs().max() < bound


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000])
def test_any_rate_becomes_the_wanted_one(tmp_path, rate):
    soundfile.write(tmp_path / "x.wav", tone(1.0, rate).numpy(), rate, subtype="FLOAT")
    got = load(tmp_path / "x.wav", 16_000)
    assert abs(len(got) - 16_000) <= 1
    middle = slice(1000, 15_000)
    assert (got[middle] - tone(1.0)[middle]).abs().max() < 2e-3
    assert len(load(tmp_path / "x.wav", None)) == rate


@pytest.mark.parametrize("channels", [2, 6])
def test_channels_are_averaged(tmp_path, channels):
    x = torch.rand(channels, 800, generator=torch.Generator().manual_seed(0)) - 0.5
    soundfile.write(tmp_path / "x.wav", x.T.numpy(), 16_000, subtype="FLOAT")
    assert torch.allclose(load(tmp_path / "x.wav"), x.mean(dim=0), atol=1e-6)
    assert torch.allclose(torch.cat(list(stream(tmp_path / "x.wav", block_seconds=0.01))), x.mean(dim=0), atol=1e-6)


def test_a_part_of_a_file(tmp_path):
    save(tmp_path / "x.wav", tone(1.0), 16_000)
    whole, part = load(tmp_path / "x.wav"), load(tmp_path / "x.wav", start=0.25, seconds=0.5)
    assert torch.equal(part, whole[4000:12_000])
    assert len(load(tmp_path / "x.wav", start=0.9, seconds=5.0)) == 1600
    with pytest.raises(AudioError, match="lasts 1.000 s"):
        load(tmp_path / "x.wav", start=1.0)
    with pytest.raises(AudioError, match="start must not be negative"):
        load(tmp_path / "x.wav", start=-0.1)


@pytest.fixture
def wav(tmp_path):
    save(tmp_path / "good.wav", tone(), 16_000)
    return (tmp_path / "good.wav").read_bytes()


def test_missing_folder_empty_and_text(tmp_path):
    with pytest.raises(AudioError, match="there is no file"):
        load(tmp_path / "none.wav")
    with pytest.raises(AudioError, match="is a folder"):
        load(tmp_path)
    (tmp_path / "empty.wav").write_bytes(b"")
    with pytest.raises(AudioError, match="empty file"):
        load(tmp_path / "empty.wav")
    (tmp_path / "text.wav").write_text("I am no sound")
    with pytest.raises(AudioError, match="(?s)no sound file.*It begins with b'I am no soun'"):
        load(tmp_path / "text.wav")


@pytest.mark.parametrize("reader", [load, w.info, lambda path: list(stream(path))], ids=["load", "info", "stream"])
@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_truncated_wav_is_refused(tmp_path, wav, reader, keep):
    (tmp_path / "cut.wav").write_bytes(wav[: int(len(wav) * keep)])
    with pytest.raises(AudioError, match="truncated"):
        reader(tmp_path / "cut.wav")


def test_truncated_flac_is_refused(tmp_path):
    noise = torch.rand(16_000, generator=torch.Generator().manual_seed(0)) - 0.5
    save(tmp_path / "x.flac", noise, 16_000)
    content = (tmp_path / "x.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioError, match="truncated|damaged"):
        load(tmp_path / "cut.flac")
    with pytest.raises(AudioError, match="truncated|damaged"):
        list(stream(tmp_path / "cut.flac", block_seconds=0.1))


def test_wav_from_a_pipe_has_no_length_and_is_read(tmp_path, wav):
    at = wav.index(b"data") + 4
    (tmp_path / "pipe.wav").write_bytes(wav[:at] + b"\xff\xff\xff\xff" + wav[at + 4 :])
    assert len(load(tmp_path / "pipe.wav")) == 8000


def test_zero_samples_and_not_a_number(tmp_path):
    soundfile.write(tmp_path / "zero.wav", np.zeros(0, "float32"), 16_000)
    with pytest.raises(AudioError, match="zero samples"):
        load(tmp_path / "zero.wav")
    for value in (np.nan, np.inf, -np.inf):
        soundfile.write(tmp_path / "bad.wav", np.array([0, 0, value, 0], "float32"), 16_000, subtype="FLOAT")
        for reader in (load, lambda path: list(stream(path))):
            with pytest.raises(AudioError, match="1 values that are NaN or infinite.* at sample 2"):
                reader(tmp_path / "bad.wav")


def test_silence_is_allowed_and_has_no_level(tmp_path):
    soundfile.write(tmp_path / "quiet.wav", np.zeros(1600, "float32"), 16_000)
    quiet = load(tmp_path / "quiet.wav")
    assert peak_db(quiet) == rms_db(quiet) == -math.inf


@settings(max_examples=25, deadline=None)
@given(st.integers(200, 9000), st.sampled_from([8_000, 11_025, 16_000, 44_100]), st.floats(0.01, 0.4))
def test_stream_equals_load(tmp_path_factory, samples, rate, block_seconds):
    path = tmp_path_factory.mktemp("s") / "x.wav"
    x = torch.rand(samples, generator=torch.Generator().manual_seed(samples)) - 0.5
    soundfile.write(path, x.numpy(), rate, subtype="FLOAT")
    whole, blocks = load(path), torch.cat(list(stream(path, block_seconds=block_seconds)))
    assert abs(len(whole) - len(blocks)) <= 1
    n = min(len(whole), len(blocks))
    assert (whole[:n] - blocks[:n]).abs().max() < 1e-3


def test_an_hour_in_bounded_memory(tmp_path):
    import tracemalloc

    with soundfile.SoundFile(tmp_path / "hour.flac", "w", 8_000, 1, "PCM_16") as file:
        minute = (0.1 * np.sin(np.arange(60 * 8_000) / 9)).astype("float32")
        for _ in range(60):
            file.write(minute)
    tracemalloc.start()
    seconds = sum(len(block) for block in stream(tmp_path / "hour.flac", 8_000, block_seconds=10.0)) / 8_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds == 3600
    assert peak < 8e6  # the whole hour would be 115 MB


def test_resample_removes_what_the_new_rate_cannot_hold():
    assert resample(tone(1.0, frequency=3_000), 16_000, 4_000)[200:-200].abs().max() < 1e-3
    x = tone()
    assert resample(x, 16_000, 16_000) is x
    for bad in (0, -8000, 16_000.5, 1e9, True):
        with pytest.raises(AudioError, match="expected a whole number of hertz"):
            w._check_rate(bad, "rate")


def test_levels_by_hand():
    assert peak_db(torch.tensor([0.5, -1.0])) == 0
    assert abs(peak_db(torch.tensor([0.1])) + 20) < 1e-5
    assert abs(rms_db(torch.tensor([1.0, -1.0, 0.0, 0.0])) + 3.0103) < 1e-3
    assert w.duration(torch.zeros(8_000), 16_000) == 0.5


def test_mix_down_refuses_swapped_axes():
    with pytest.raises(AudioError, match="probably swapped"):
        mix_down(torch.zeros(800, 2))


def test_save_and_what_it_refuses(tmp_path):
    x = tone()
    for name in ("x.wav", "x.flac", "x.ogg"):
        save(tmp_path / name, x, 16_000)
        assert w.info(tmp_path / name).sample_rate == 16_000
    with pytest.raises(AudioError, match="reaches 1.500"):
        save(tmp_path / "loud.wav", 3 * x, 16_000)
    with pytest.raises(AudioError, match="names no format"):
        save(tmp_path / "x.doc", x, 16_000)
    with pytest.raises(AudioError, match="NaN"):
        save(tmp_path / "nan.wav", torch.tensor([math.nan]), 16_000)
    with pytest.raises(AudioError, match="cannot write"):
        save(tmp_path / "no" / "such" / "folder.wav", x, 16_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.flac", "x.ogg", "x.wav"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_full_disk_and_no_permission_keep_the_old_file(tmp_path, monkeypatch, code):
    save(tmp_path / "x.wav", tone(), 16_000)
    before = (tmp_path / "x.wav").read_bytes()

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        if code == errno.ENOSPC:
            patch.setattr(w.os, "fsync", refuse)
        else:
            real = builtins.open
            patch.setattr(builtins, "open", lambda path, mode="r", *a, **k: refuse() if "w" in mode else real(path, mode, *a, **k))
        with pytest.raises(AudioError, match=os.strerror(code)):
            save(tmp_path / "x.wav", tone(frequency=100), 16_000)
    assert (tmp_path / "x.wav").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.wav"]


def test_player_carries_label_and_sound():
    page = w.play(tone(), 16_000, 'a "tone"')._repr_html_()
    assert "&quot;tone&quot;" in page and 'src="data:audio/flac;base64,' in page


def test_check_waveform_names_what_is_wrong():
    for bad, message in (
        (torch.zeros(2, 3), "expected one axis"), (torch.zeros(3, dtype=torch.int16), "expected floating point"), (torch.zeros(0), "has no samples"),
    ):
        with pytest.raises(AudioError, match=message):
            w.check_waveform(bad)


def test_reading_sound_needs_no_plots_and_no_torchaudio():
    """Loading a file in a script must not wait for libraries that only pictures and pages need."""
    import subprocess
    import sys

    code = (
        "import sys, speechlearn.sound.waveform; "
        "print([name for name in ('matplotlib', 'IPython', 'torchaudio', 'soxr') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("block_seconds", [0.013, 0.37, 5.0])
def test_stream_equals_load_to_the_last_sample(tmp_path, rate, block_seconds):
    x = torch.rand(rate + 7, generator=torch.Generator().manual_seed(rate)) - 0.5
    soundfile.write(tmp_path / "x.wav", x.numpy(), rate, subtype="FLOAT")
    whole, blocks = load(tmp_path / "x.wav"), torch.cat(list(stream(tmp_path / "x.wav", block_seconds=block_seconds)))
    assert blocks.shape == whole.shape
    assert (blocks - whole).abs().max() < 1e-6


def test_blocks_resampled_alone_would_click(tmp_path):
    """The reason for a stream resampler: without its memory the borders are audible."""
    x = tone(1.0, 8_000, frequency=3_000)
    soundfile.write(tmp_path / "x.wav", x.numpy(), 8_000, subtype="FLOAT")
    whole = load(tmp_path / "x.wav")
    alone = torch.cat([resample(part, 8_000, 16_000) for part in x.split(800)])
    assert (alone - whole).abs().max() > 0.05
    assert (torch.cat(list(stream(tmp_path / "x.wav", block_seconds=0.1))) - whole).abs().max() < 1e-6


def test_stream_gives_no_block_longer_than_asked(tmp_path):
    save(tmp_path / "x.wav", tone(2.0), 16_000)
    assert [len(block) for block in stream(tmp_path / "x.wav", block_seconds=0.75)] == [12_000, 12_000, 8_000]
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(AudioError, match="block_seconds"):
            next(stream(tmp_path / "x.wav", block_seconds=bad))


def test_steps_of_eight_and_sixteen_bits_by_hand(tmp_path):
    x = np.array([-1.0, -0.5, 0.0, 0.5])
    for subtype in ("PCM_U8", "PCM_16", "PCM_24", "PCM_32"):
        soundfile.write(tmp_path / "x.wav", x, 16_000, subtype=subtype)
        assert load(tmp_path / "x.wav").tolist() == x.tolist()
    soundfile.write(tmp_path / "x.wav", np.array([127, -128], "int16") * 256, 16_000, subtype="PCM_U8")
    assert load(tmp_path / "x.wav").tolist() == [127 / 128, -1.0]


def test_float_files_may_be_louder_than_one_and_stay_so(tmp_path):
    soundfile.write(tmp_path / "loud.wav", np.array([0.5, 2.5, -3.0], "float32"), 16_000, subtype="FLOAT")
    loud = load(tmp_path / "loud.wav")
    assert loud.tolist() == [0.5, 2.5, -3.0]
    assert peak_db(loud) > 0
    with pytest.raises(AudioError, match="reaches 3.000; a file would clip it"):
        save(tmp_path / "again.wav", loud, 16_000)


def test_other_chunks_before_and_after_the_sound(tmp_path, wav):
    """An odd chunk is followed by one byte of padding; who forgets it never finds the sound."""
    at = wav.index(b"data")
    odd = b"LIST" + (5).to_bytes(4, "little") + b"INFOx" + b"\0"
    (tmp_path / "chunks.wav").write_bytes(wav[:at] + odd + wav[at:] + odd)
    assert torch.equal(load(tmp_path / "chunks.wav"), load(tmp_path / "good.wav"))
    (tmp_path / "cut.wav").write_bytes((wav[:at] + odd + wav[at:])[:-100])
    with pytest.raises(AudioError, match="truncated: 100 bytes"):
        load(tmp_path / "cut.wav")


def test_a_wav_cut_within_its_header(tmp_path, wav):
    (tmp_path / "cut.wav").write_bytes(wav[:30])
    with pytest.raises(AudioError, match="no sound file that can be read"):
        load(tmp_path / "cut.wav")
    (tmp_path / "cut.wav").write_bytes(wav[: wav.index(b"data") + 8])
    with pytest.raises(AudioError, match="truncated"):
        load(tmp_path / "cut.wav")


def test_truncated_mp3_is_refused(tmp_path):
    noise = torch.rand(32_000, generator=torch.Generator().manual_seed(0)) - 0.5
    save(tmp_path / "x.mp3", noise, 16_000)
    content = (tmp_path / "x.mp3").read_bytes()
    (tmp_path / "cut.mp3").write_bytes(content[: len(content) // 2])
    for reader in (load, lambda path: list(stream(path, block_seconds=0.2))):
        with pytest.raises(AudioError, match="truncated: its header promises"):
            reader(tmp_path / "cut.mp3")


def test_one_wrong_byte_in_a_flac_is_noticed(tmp_path):
    noise = torch.rand(32_000, generator=torch.Generator().manual_seed(0)) - 0.5
    save(tmp_path / "x.flac", noise, 16_000)
    content = bytearray((tmp_path / "x.flac").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "x.flac").write_bytes(content)
    with pytest.raises(AudioError, match="damaged"):
        load(tmp_path / "x.flac")


def test_a_file_that_may_not_be_read(tmp_path, wav, monkeypatch):
    """Simulated, because tests may run as a user who may read everything."""
    def refused(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(w.soundfile, "SoundFile", refused)
    monkeypatch.setattr(w.Path, "open", refused)
    with pytest.raises(AudioError, match="cannot be read: permission denied"):
        load(tmp_path / "good.wav")


def test_a_refused_rename_keeps_the_old_file(tmp_path, monkeypatch):
    save(tmp_path / "x.flac", tone(), 16_000)
    before = (tmp_path / "x.flac").read_bytes()

    def refuse(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(w.os, "replace", refuse)
        with pytest.raises(AudioError, match="What was there before is intact"):
            save(tmp_path / "x.flac", tone(frequency=100), 16_000)
    assert (tmp_path / "x.flac").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.flac"]


@settings(max_examples=30, deadline=None)
@given(st.integers(100, 5000), st.sampled_from([8_000, 16_000, 22_050, 44_100, 48_000]), st.sampled_from([8_000, 16_000, 44_100]))
def test_resampling_keeps_the_seconds(samples, from_rate, to_rate):
    got = resample(torch.zeros(samples), from_rate, to_rate)
    assert abs(len(got) - samples * to_rate / from_rate) <= 1


def test_resampling_up_and_down_gives_the_sound_back():
    x = tone(0.5, 8_000)
    back = resample(resample(x, 8_000, 44_100), 44_100, 8_000)
    assert back.shape == x.shape and (back - x)[200:-200].abs().max() < 1e-3
    assert resample(x.double(), 8_000, 16_000).dtype == torch.float64


def test_every_fourth_sample_moves_a_tone_and_resampling_does_not():
    x = tone(1.0, frequency=3_000)
    spectrum = torch.fft.rfft(x[::4]).abs()
    assert int(spectrum.argmax()) == 1_000  # one second: bins are hertz; 3000 - 4000, mirrored
    assert torch.fft.rfft(resample(x, 16_000, 4_000)[200:-200]).abs().max() < 0.01 * spectrum.max()


def test_player_refuses_nan_and_clips_what_is_too_loud():
    import io

    with pytest.raises(AudioError, match="the waveform to play holds 1 values that are NaN"):
        w.play(torch.tensor([0.0, math.nan]), 16_000, "broken")
    samples, rate = soundfile.read(io.BytesIO(w.play(torch.tensor([0.0, 5.0, -5.0, 0.0]), 8_000, "loud").flac))
    assert rate == 8_000 and samples[1] > 0.99 and samples[2] == -1.0


def test_plot_has_seconds_and_names_words():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots()
    assert w.plot_waveform(tone(0.5), 16_000, ax=ax, words=[SimpleNamespace(text="one", start=0.1, end=0.3)]) is ax
    assert ax.get_xlabel() == "time (s)" and ax.get_xlim() == (0.0, 0.5)
    assert ax.lines[0].get_xdata()[-1] == pytest.approx(7_999 / 16_000)
    assert [text.get_text() for text in ax.texts] == ["one"] and ax.texts[0].get_position()[0] == pytest.approx(0.2)
    plt.close(fig)
