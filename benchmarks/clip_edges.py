"""How quiet are the quietest 20 ms of single words, relative to the whole word? Recorded clips and synthetic words.

    python benchmarks/clip_edges.py --fsdd FOLDER
"""
import argparse
import json
import os
import platform
from pathlib import Path

import torch

import speechlearn
from speechlearn.data.corpora import fsdd_clips
from speechlearn.data.synthetic import make_corpus
from speechlearn.sound.waveform import load

RESULTS = Path(__file__).parent / "results" / "clip_edges.json"
RATE = 8000


def quietest(word: torch.Tensor) -> float:
    """RMS of the quietest 20 ms in decibels, relative to the RMS of the word."""
    frames = word[: len(word) // 160 * 160].view(-1, 160)
    return float(10 * torch.log10((frames.square().mean(dim=1).min() + 1e-12) / (word.square().mean() + 1e-12)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsdd", default=os.environ.get("SPEECHLEARN_FSDD"), required="SPEECHLEARN_FSDD" not in os.environ)
    args = parser.parse_args()
    clips, medians = fsdd_clips(args.fsdd), {}
    for speaker in sorted({clip.speaker for clip in clips}):
        medians[speaker] = [quietest(load(clip.path, RATE)) for clip in clips if clip.speaker == speaker]
    medians["synthetic"] = []
    for utterance in make_corpus("digits", "train", n=100):
        waveform = utterance.waveform(RATE)
        medians["synthetic"] += [quietest(waveform[round(w.start * RATE) : round(w.end * RATE)]) for w in utterance.words if w.end - w.start > 0.1]
    result = {
        "quietest_db": {name: round(float(torch.tensor(values).median()), 1) for name, values in medians.items()},
        "words": {name: len(values) for name, values in medians.items()},
        "command": "python benchmarks/clip_edges.py --fsdd FOLDER",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "speechlearn": speechlearn.__version__},
    }
    RESULTS.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    print(result["quietest_db"])


if __name__ == "__main__":
    main()
