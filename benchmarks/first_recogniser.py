"""Error rates of the whole-game recogniser: synthetic voices, people it knows, people it has never heard.

    python benchmarks/first_recogniser.py RUN… --fsdd FOLDER [--runs FOLDER] [--steps N] [--threads N]

RUN is one of: synthetic, synthetic-whole (words with their quiet edges), people, mixed, mixed-plain (no augmentation), leave-george, leave-jackson, … (mixed, without that speaker).
Each run adds its numbers to benchmarks/results/first_recogniser.json, with the command, the versions and the time it took.
"""
import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch

import speechlearn
from speechlearn.recipes import Recipe, run_training
from speechlearn.data.corpora import fsdd, fsdd_clips
from speechlearn.data.synthetic import make_corpus
from speechlearn.recogniser import evaluate

RESULTS = Path(__file__).parent / "results" / "first_recogniser.json"


def recipe_of(name: str, speakers: list[str], args) -> Recipe:
    # Recordings end at 4 kHz; what lies above must not decide. See chapters 04b and 04c for the other choices.
    common = dict(root=args.fsdd or "", steps=args.steps, threads=args.threads, validate_every=500, n_bins=60, top_hz=3800.0)
    if name == "synthetic":
        return Recipe(corpus="digits", **common)
    if name == "synthetic-whole":
        return Recipe(corpus="digits", hard_cut=0.0, **common)
    if name == "people":
        return Recipe(corpus="fsdd", utterances=8000, **common)
    if name == "mixed":
        return Recipe(corpus="digits+fsdd", **common)
    if name == "mixed-plain":
        return Recipe(corpus="digits+fsdd", augment=False, **common)
    if name.startswith("leave-"):
        left = name.removeprefix("leave-")
        if left not in speakers:
            raise SystemExit(f"there is no speaker {left!r}; choose {', '.join(speakers)}")
        return Recipe(corpus="digits+fsdd", speakers=",".join(s for s in speakers if s != left), **common)
    raise SystemExit(f"there is no run {name!r}")


def measured(result) -> dict:
    return {k: v for k, v in result.summary().items() if k in ("wer", "cer", "utterances", "words", "wrong_utterances", "seconds_audio", "seconds_compute")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="RUN")
    parser.add_argument("--fsdd", default=os.environ.get("SPEECHLEARN_FSDD"))
    parser.add_argument("--runs", default="runs", help="folder for checkpoints")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    speakers = sorted({clip.speaker for clip in fsdd_clips(args.fsdd)}) if args.fsdd else []
    for name in args.names:
        recipe = recipe_of(name, speakers, args)
        folder = Path(args.runs) / f"{name}-{args.steps}"
        recogniser = run_training(recipe, folder, resume=True, show="none")
        # From the run's own clock, so that an interrupted and resumed run counts in full. Loading of batches is included.
        minutes = json.loads((folder / "recogniser" / "checkpoint.json").read_text())["metadata"]["seconds"] / 60
        tests = {"synthetic, unseen voices": measured(evaluate(recogniser, make_corpus("digits", "test")))}
        if args.fsdd:
            left = [name.removeprefix("leave-")] if name.startswith("leave-") else None
            label = f"FSDD, speaker {left[0]} never heard" if left else ("FSDD, speakers never heard" if name.startswith("synthetic") else "FSDD, known speakers, new takes")
            tests[label] = measured(evaluate(recogniser, fsdd(args.fsdd, "test", speakers=left, n=300)))
        record = {
            "recipe": {k: v for k, v in asdict(recipe).items() if k != "root"},
            "parameters": sum(p.numel() for p in recogniser.model.parameters()),
            "training_minutes": round(minutes, 2), "tests": tests,
            "command": f"python benchmarks/first_recogniser.py {name} --fsdd FOLDER --steps {args.steps} --threads {args.threads}",
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "speechlearn": speechlearn.__version__, "machine": f"{platform.machine()}, {os.cpu_count()} cores"},
        }
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[f"{name}-{args.steps}"] = record
        beside = RESULTS.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        os.replace(beside, RESULTS)
        print(name, f"{minutes:.1f} min", {label: f"WER {100 * t['wer']:.2f} %" for label, t in tests.items()}, flush=True)


if __name__ == "__main__":
    sys.exit(main())
