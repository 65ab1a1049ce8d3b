"""Features of this package against torchaudio's: equality in many configurations, and speed in one run.

    python benchmarks/features.py            # writes benchmarks/results/features_equality.{json,md}
    python benchmarks/features.py --check    # equality only, writes nothing

Four gaps are reported for each configuration. All are largest values over every frame and bin of float32 features:
- `relative`: |ours - torchaudio| / max(|torchaudio|, 1) of the log features, the numbers a model sees. It must stay below the limit.
- `energy`: |exp(ours - torchaudio) - 1|, the same gap as a part of each bin's energy.
- `ours_exact`, `torchaudio_exact`: `relative` of each side to the same recipe computed in float64 throughout, written out below. They tell who
  is nearer to the formula. Faint bins beside loud ones show float32's rounding here, on both sides alike.
The exit status is 1 when a gap `relative` exceeds the limit or a number of frames differs.
"""
import argparse
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

import speechlearn  # noqa: F401  before torchaudio, so that it loads beside a CPU build of PyTorch

import torchaudio
from torchaudio.compliance import kaldi

from speechlearn.sound.features import KaldiFbank, LogMel, kaldi_fbank

RESULTS = Path(__file__).resolve().parent / "results"
LIMIT = 1e-4
SECONDS = 3.0
COMMAND = "python benchmarks/features.py"
WINDOWS = {"povey": "povey", "hann_symmetric": "hanning", "hamming": "hamming"}  # our name: torchaudio's


def noise(sample_rate: int, seconds: float = SECONDS) -> torch.Tensor:
    """White noise in float64, the least structured input."""
    generator = torch.Generator().manual_seed(0)
    return 0.1 * torch.randn(round(sample_rate * seconds), generator=generator, dtype=torch.float64)


def voice(sample_rate: int, seconds: float = SECONDS) -> torch.Tensor:
    """A gliding voice in float64: harmonics of 90 to 150 Hz under two moving formants, pauses, a floor of noise at -70 dB."""
    t = torch.arange(round(sample_rate * seconds), dtype=torch.float64) / sample_rate
    pitch = 120 + 30 * torch.sin(2 * math.pi * 0.7 * t)
    phase = 2 * math.pi * torch.cumsum(pitch, 0) / sample_rate
    formants = (500 + 200 * torch.sin(2 * math.pi * 1.1 * t), 1500 + 600 * torch.sin(2 * math.pi * 0.6 * t))
    signal = torch.zeros_like(t)
    for k in range(1, int(0.45 * sample_rate / 150)):
        strength = sum(1 / (1 + ((k * pitch - formant) / 100) ** 2) for formant in formants)
        signal = signal + strength * torch.sin(k * phase)
    syllables = torch.sin(2 * math.pi * 2 * t).clamp(min=0)
    signal = signal * syllables
    floor = torch.randn(len(t), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return 0.5 * signal / signal.abs().max() + 10 ** (-70 / 20) * floor


SIGNALS = {"noise": noise, "voice": voice}


def gaps(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """(`relative`, `energy`) as the head of this file defines them."""
    if ours.shape != theirs.shape:
        return math.inf, math.inf
    difference = ours - theirs
    return float((difference.abs() / theirs.abs().clamp(min=1)).max()), float(torch.expm1(difference).abs().max())


def exact_bank(n_bins: int, n_fft: int, sample_rate: int, straight_in_mel: bool) -> torch.Tensor:
    """Triangles in float64, from 20 Hz to half the sample rate."""
    to_mel = lambda hertz: 1127 * math.log(1 + hertz / 700)  # noqa: E731
    corners = torch.linspace(to_mel(20.0), to_mel(sample_rate / 2), n_bins + 2, dtype=torch.float64)
    places = torch.arange(n_fft // 2 + 1, dtype=torch.float64)[:, None] * sample_rate / n_fft
    if straight_in_mel:
        places = 1127 * torch.log1p(places / 700)
    else:
        corners = 700 * torch.expm1(corners / 1127)
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    return torch.minimum((places - left) / (centre - left), (right - places) / (right - centre)).clamp(min=0)


def exact_window(kind: str, size: int) -> torch.Tensor:
    turns = torch.arange(size, dtype=torch.float64) / (size if kind == "hann" else size - 1)
    low = 0.54 if kind == "hamming" else 0.5
    window = low - (1 - low) * torch.cos(2 * math.pi * turns)
    return window**0.85 if kind == "povey" else window


def log_mel_triple(signal: torch.Tensor, sample_rate: int, n_bins: int, n_fft: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-mel of ours, of torchaudio, and exact."""
    window, hop = round(0.025 * sample_rate), round(0.010 * sample_rate)
    signal = signal.float()
    module = LogMel(sample_rate, n_bins, n_fft=n_fft)
    ours = module(signal[None], torch.tensor([len(signal)]))[0][0]
    reference = torchaudio.transforms.MelSpectrogram(
        sample_rate, n_fft=n_fft, win_length=window, hop_length=hop, f_min=20.0, n_mels=n_bins, center=False
    )
    # torchaudio lays a short window in the middle of the n_fft samples; ours begins with the frame.
    shift = (n_fft - window) // 2
    padded = torch.nn.functional.pad(signal, (shift, n_fft - window - shift))
    frames = signal.double().unfold(0, window, hop) * exact_window("hann", window)
    power = torch.fft.rfft(frames, n=n_fft).abs().square()
    exact = torch.log(power @ exact_bank(n_bins, n_fft, sample_rate, False) + module.floor)
    return ours, torch.log(reference(padded).T + module.floor), exact


def kaldi_triple(
    signal: torch.Tensor, sample_rate: int, n_bins: int, kind: str, preemphasis: float, snip_edges: bool, energy_floor: float, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kaldi's filter banks of ours, of torchaudio, and exact."""
    signal = (signal * scale).float()
    ours = kaldi_fbank(signal, sample_rate=sample_rate, n_bins=n_bins, kind=kind, preemphasis=preemphasis, snip_edges=snip_edges)
    theirs = kaldi.fbank(
        signal[None], sample_frequency=float(sample_rate), num_mel_bins=n_bins, window_type=WINDOWS[kind], preemphasis_coefficient=preemphasis,
        snip_edges=snip_edges, energy_floor=energy_floor, dither=0.0,
    )
    window, hop, x = sample_rate // 40, sample_rate // 100, signal.double()
    if not snip_edges:  # mirrored ends, the outermost sample twice
        left, wanted = window // 2 - hop // 2, (len(x) + hop // 2) // hop
        x = torch.cat([x[:left].flip(0), x, x.flip(0)])[: (wanted - 1) * hop + window]
    frames = x.unfold(0, window, hop)
    frames = frames - frames.mean(dim=1, keepdim=True)
    frames = frames - preemphasis * torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    n_fft = 2 ** math.ceil(math.log2(window))
    power = torch.fft.rfft(frames * exact_window(kind, window), n=n_fft).abs().square()
    exact = (power[:, :-1] @ exact_bank(n_bins, n_fft, sample_rate, True)[:-1]).clamp(min=torch.finfo(torch.float32).eps).log()
    return ours, theirs, exact


def compare(name: str, settings: dict, triple: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> dict:
    ours, theirs, exact = triple
    relative, energy = gaps(ours, theirs)
    return {
        "features": name, **settings, "frames": ours.shape[0], "frames_torchaudio": theirs.shape[0], "relative": relative, "energy": energy,
        "ours_exact": gaps(ours.double(), exact)[0], "torchaudio_exact": gaps(theirs.double(), exact)[0],
    }


def equality() -> list[dict]:
    rows = []
    for (signal, make), (sample_rate, n_fft), n_bins in itertools.product(SIGNALS.items(), ((8_000, 512), (16_000, 512), (16_000, 1024)), (23, 40, 80)):
        x = make(sample_rate)
        settings = dict(signal=signal, sample_rate=sample_rate, n_bins=n_bins, n_fft=n_fft)
        rows.append(compare("log_mel", settings, log_mel_triple(x, sample_rate, n_bins, n_fft)))
    for (signal, make), sample_rate, n_bins, window, snip_edges, preemphasis in itertools.product(
        SIGNALS.items(), (8_000, 16_000), (23, 40, 80), WINDOWS, (True, False), (0.97, 0.0)
    ):
        x = make(sample_rate)
        for scale, energy_floor in ((1.0, 0.0), (32768.0, 1.0)):  # -1…1 as in Lhotse; 16-bit range as in Kaldi
            settings = dict(
                signal=signal, sample_rate=sample_rate, n_bins=n_bins, window=window, snip_edges=snip_edges, preemphasis=preemphasis,
                energy_floor=energy_floor, scale=scale,
            )
            triple = kaldi_triple(x, sample_rate, n_bins, window, preemphasis, snip_edges, energy_floor, scale)
            rows.append(compare("kaldi_fbank", settings, triple))
    return rows


def seconds_of(functions: dict, rounds: int) -> dict[str, list[float]]:
    """Wall time of each call, taken in turns so that a busy moment hits all of them."""
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - begin)
    return times


@torch.no_grad()
def speed(rounds: int) -> list[dict]:
    rows = []
    for batch, seconds in ((1, 60.0), (16, 4.0)):
        x = torch.stack([voice(16_000, seconds).float()] * batch)
        lengths = torch.full((batch,), x.shape[1])
        log_mel, theirs = LogMel(), torchaudio.transforms.MelSpectrogram(16_000, n_fft=512, win_length=400, hop_length=160, f_min=20.0, n_mels=80, center=False)
        fbank = KaldiFbank()
        pairs = {
            "LogMel": (lambda: log_mel(x, lengths), lambda: torch.log(theirs(x) + 1e-10)),
            "KaldiFbank": (lambda: fbank(x, lengths), lambda: [kaldi.fbank(item[None], num_mel_bins=80) for item in x]),
        }
        for name, (ours, reference) in pairs.items():
            times = seconds_of({"ours": ours, "torchaudio": reference}, rounds)
            ratios = [b / a for a, b in zip(times["ours"], times["torchaudio"])]
            rows.append({
                "features": name, "batch": batch, "seconds_each": seconds, "rounds": rounds, "ours_ms": 1e3 * statistics.median(times["ours"]),
                "torchaudio_ms": 1e3 * statistics.median(times["torchaudio"]), "times_faster": statistics.median(ratios),
                "times_faster_range": [min(ratios), max(ratios)],
            })
    return rows


def table(report: dict) -> str:
    lines = [
        "# Features against torchaudio", "",
        f"Made by `{report['command']}` (torch {report['versions']['torch']}, torchaudio {report['versions']['torchaudio']}, {report['threads']} thread). "
        "Every number is a largest value over all frames and bins; the columns are defined at the head of `benchmarks/features.py`.", "",
        f"Limit: {report['limit']:g}. {len(report['equality'])} configurations, {report['n_over_limit']} over the limit.", "",
        "| features | signal | rate (Hz) | bins | configurations | relative | energy | ours to exact | torchaudio to exact |", "|---|---|---|---|---|---|---|---|---|",
    ]
    key = lambda row: (row["features"], row["signal"], row["sample_rate"], row["n_bins"])  # noqa: E731
    for group, rows in itertools.groupby(sorted(report["equality"], key=key), key):
        rows = list(rows)
        worst = [max(row[column] for row in rows) for column in ("relative", "energy", "ours_exact", "torchaudio_exact")]
        lines.append(f"| {group[0]} | {group[1]} | {group[2]} | {group[3]} | {len(rows)} | " + " | ".join(f"{value:.1e}" for value in worst) + " |")
    for row in report["equality"]:
        if row["relative"] > report["limit"]:
            lines += ["", "Over the limit: " + ", ".join(f"{name} {value:.2g}" if isinstance(value, float) and name != "scale" else f"{name} {value:g}" if name == "scale" else f"{name} {value}" for name, value in row.items()) + "."]
    lines += [
        "", "Speed at 16 kHz with 80 bins; calls alternate, medians. `times faster` is torchaudio's time divided by ours in the same round (smallest and largest in brackets).", "",
        "| features | batch | seconds each | ours (ms) | torchaudio (ms) | times faster |", "|---|---|---|---|---|---|",
    ]
    for row in report["speed"]:
        low, high = row["times_faster_range"]
        lines.append(
            f"| {row['features']} | {row['batch']} | {row['seconds_each']:g} | {row['ours_ms']:.1f} | {row['torchaudio_ms']:.1f} | {row['times_faster']:.2f} ({low:.2f}–{high:.2f}) |"
        )
    lines += ["", "torchaudio's Kaldi filter banks take one utterance at a time, so a batch is a loop there.", ""]
    return "\n".join(lines)


def as_json(report: dict) -> str:
    """JSON with one measurement on each line, so that a difference between two runs is readable."""
    short = lambda value: float(f"{value:.3g}") if isinstance(value, float) and math.isfinite(value) else value  # noqa: E731
    row_text = lambda row: "  " + json.dumps({name: short(value) for name, value in row.items()})  # noqa: E731
    head = {name: value for name, value in report.items() if name not in ("equality", "speed")}
    lists = [f' "{name}": [\n' + ",\n".join(row_text(row) for row in report[name]) + "\n ]" for name in ("equality", "speed")]
    return json.dumps(head, indent=1)[:-2] + ",\n" + ",\n".join(lists) + "\n}\n"


def write(path: Path, text: str) -> None:
    beside = path.with_suffix(path.suffix + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the features of speechlearn with torchaudio's.")
    parser.add_argument("--check", action="store_true", help="equality only; write nothing")
    parser.add_argument("--rounds", type=int, default=40, help="timed calls of each function")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = equality()
    bad = [row for row in rows if not (row["relative"] <= LIMIT and row["frames"] == row["frames_torchaudio"])]
    for row in bad:
        print("over the limit:", json.dumps(row), file=sys.stderr)
    print(f"{len(rows)} configurations, {len(bad)} over the limit; largest relative gap {max(row['relative'] for row in rows):.1e}")
    if not arguments.check:
        report = {
            "command": COMMAND, "limit": LIMIT, "threads": torch.get_num_threads(), "n_over_limit": len(bad),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchaudio": torchaudio.__version__, "speechlearn": speechlearn.__version__},
            "equality": rows, "speed": speed(arguments.rounds),
        }
        RESULTS.mkdir(exist_ok=True)
        write(RESULTS / "features_equality.json", as_json(report))
        write(RESULTS / "features_equality.md", table(report))
        for row in report["speed"]:
            print(f"{row['features']:10} {row['batch']:2} x {row['seconds_each']:g} s: {row['times_faster']:.2f} times as fast as torchaudio")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
