"""sound.waveform: damaged files in other containers, disks that fill up while writing, odd numbers. Each was once wrong."""
import math
import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import soundfile
import torch

from speechlearn.sound import waveform as w
from speechlearn.sound.waveform import AudioError, load, stream

NOISE = (np.random.default_rng(0).random(160_000) - 0.5).astype("float32")


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("keep", [0.3, 0.9, 0.9999])
@pytest.mark.parametrize("reader", [load, w.info, lambda path: list(stream(path))], ids=["load", "info", "stream"])
def test_truncated_ogg_is_refused(tmp_path, subtype, keep, reader):
    soundfile.write(tmp_path / "x.ogg", NOISE, 16_000, format="OGG", subtype=subtype)
    assert len(load(tmp_path / "x.ogg")) >= 160_000
    content = (tmp_path / "x.ogg").read_bytes()
    (tmp_path / "x.ogg").write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(AudioError, match="truncated: the mark at its end is missing"):
        reader(tmp_path / "x.ogg")


@pytest.mark.parametrize("kind,endian", [("AIFF", None), ("RF64", None), ("W64", None), ("AU", None), ("WAV", "BIG")])
def test_truncated_rarer_formats_are_refused(tmp_path, kind, endian):
    soundfile.write(tmp_path / "x", NOISE[:32_000], 16_000, format=kind, subtype="PCM_16", endian=endian)
    assert len(load(tmp_path / "x")) == 32_000
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioError, match="truncated: [0-9]+ bytes"):
        load(tmp_path / "x")


@pytest.mark.parametrize("placeholder", [0x7FFFFF00, 0x80000000])
def test_wav_from_arecord_to_a_pipe_is_read(tmp_path, placeholder):
    soundfile.write(tmp_path / "x.wav", NOISE[:8_000], 16_000)
    content = (tmp_path / "x.wav").read_bytes()
    at = content.index(b"data") + 4
    (tmp_path / "x.wav").write_bytes(content[:at] + struct.pack("<I", placeholder) + content[at + 4 :])
    assert len(load(tmp_path / "x.wav")) == 8_000


@pytest.mark.parametrize("reader", [load, w.info, lambda path: list(stream(path))], ids=["load", "info", "stream"])
def test_flac_of_unknown_length(tmp_path, reader):
    soundfile.write(tmp_path / "x.flac", NOISE[:8_000], 16_000)
    content = bytearray((tmp_path / "x.flac").read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    (tmp_path / "x.flac").write_bytes(content)
    with pytest.raises(AudioError, match="does not say how long it is"):
        reader(tmp_path / "x.flac")


@pytest.mark.parametrize("optimise,limit,kind", [([], 100_000, "wav"), (["-O"], 100_000, "wav"), ([], 1_000, "flac")])
def test_a_disk_that_fills_up_while_writing(tmp_path, optimise, limit, kind):
    """A limit on the size of files acts like a full disk, in a process of its own."""
    pytest.importorskip("resource")
    code = f"""
        import resource, signal, sys, pathlib, torch
        from speechlearn.sound.waveform import AudioError, load, save
        path = pathlib.Path({str(tmp_path / ("x." + kind))!r})
        noise = torch.rand(400_000, generator=torch.Generator().manual_seed(0)) - 0.5
        save(path, noise[:16_000], 16_000)
        before = path.read_bytes()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
        try:
            save(path, noise, 16_000)
            print("no error")
        except AudioError as error:
            print("refused" if "cannot write" in str(error) else error)
        print(path.read_bytes() == before, [p.name for p in path.parent.iterdir()] == [path.name])
    """
    done = subprocess.run([sys.executable, *optimise, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout.split() == ["refused", "True", "True"], done.stdout + done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("measure", [w.peak_db, w.rms_db])
def test_a_level_of_nan_or_nothing_is_refused_not_silent(measure):
    for bad, message in ((torch.tensor([0.5, math.nan]), "NaN"), (torch.zeros(0), "no samples")):
        with pytest.raises(AudioError, match=message):
            measure(bad)


@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_rates_that_are_no_numbers(rate):
    with pytest.raises(AudioError, match="expected a whole number of hertz"):
        w._check_rate(rate, "rate")
    for wrong in (None, "abc", [1]):
        with pytest.raises(AudioError, match="expected a whole number of hertz"):
            w._check_rate(wrong, "rate")


def test_a_few_samples_of_many_channels(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.full((160, 6), 0.5, "float32"), 16_000)
    assert load(tmp_path / "x.wav", seconds=1e-5).tolist() == [0.5]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_times_must_be_finite(tmp_path, value):
    soundfile.write(tmp_path / "x.wav", NOISE[:1_600], 16_000)
    for arguments in ({"start": value}, {"seconds": value}):
        with pytest.raises(AudioError, match="both finite"):
            load(tmp_path / "x.wav", **arguments)
    with pytest.raises(AudioError, match="block_seconds"):
        next(stream(tmp_path / "x.wav", block_seconds=math.inf))


def test_too_short_to_resample_is_refused_not_empty(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.ones(1, "float32") / 2, 48_000)
    for reader in (load, lambda path: list(stream(path))):
        with pytest.raises(AudioError, match="too short to give one sample"):
            reader(tmp_path / "x.wav")


def test_load_and_stream_refuse_the_same_rates_and_name_the_file(tmp_path):
    soundfile.write(tmp_path / "slow.wav", NOISE[:800], 500)
    for reader in (load, lambda path: list(stream(path))):
        with pytest.raises(AudioError, match="the sample rate of .*slow.wav.* is 500"):
            reader(tmp_path / "slow.wav")


def test_half_precision_is_resampled_saved_and_played(tmp_path):
    x = torch.from_numpy(NOISE[:1_600]).half()
    assert w.resample(x, 16_000, 8_000).dtype == torch.float16
    w.save(tmp_path / "x.wav", x, 16_000)
    assert torch.allclose(load(tmp_path / "x.wav"), x.float(), atol=1e-4)
    assert w.play(x, 16_000, "noise").flac


@pytest.mark.parametrize("rate", [0, -1])
def test_play_and_plot_refuse_a_rate_that_is_none(rate):
    for show in (lambda: w.play(torch.zeros(9), rate, "x"), lambda: w.plot_waveform(torch.zeros(9), rate)):
        with pytest.raises(AudioError, match="sample_rate"):
            show()


def test_only_formats_that_come_back_are_written(tmp_path):
    for name in ("x.wve", "x.sd2", "x.xi", "x.raw"):
        with pytest.raises(AudioError, match="names no format"):
            w.save(tmp_path / name, torch.zeros(1_600), 16_000)


def test_plot_accepts_no_words():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ax = w.plot_waveform(torch.zeros(9), 16_000, words=None)
    assert not ax.texts
    plt.close(ax.figure)
