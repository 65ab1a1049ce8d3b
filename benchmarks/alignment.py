"""CTC and transducer on the same encoder: error rates, training time, memory, and how late words come.

    python benchmarks/alignment.py RUN [RUN ...] [--runs FOLDER] [--threads N] [--max-symbols N [N ...]]

`ctc`                      the encoder with a CTC head
`transducer`               the same encoder with a transducer, from the start
`transducer-from-ctc`      the transducer begins with the encoder that `ctc` has trained (run `ctc` first)
`both`                     one encoder with both heads
`transducer-fast-emit`     as `transducer-from-ctc`, with FastEmit

All train for 1,100 steps on 5,000 synthetic commands, letters. A finished run in FOLDER is only measured. The delay of a word is the end of the step at which
its last letter is written, minus the true end of the word, over texts that are recognised without error.
With --max-symbols the error rates of RUN are measured only for these limits of symbols at one step, and nothing else is stored.
"""
import argparse
import json
import os
import platform
import resource
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch

import speechlearn
from speechlearn.data.synthetic import make_corpus
from speechlearn.recipes import Recipe, run_training
from speechlearn.recogniser import Recogniser, evaluate

RESULTS = Path(__file__).parent / "results" / "alignment.json"
COMMON = dict(
    corpus="commands", utterances=5000, vocabulary="letters", telephone=0.2, fastest=1.18, hard_cut=0.0, d_model=128, n_layers=4, steps=1100, max_frames=5000, validate_every=100
)
RUNS = {
    "ctc": dict(model="ctc"),
    "transducer": dict(model="transducer"),
    "transducer-from-ctc": dict(model="transducer", start_from="ctc"),
    "both": dict(model="ctc+transducer"),
    "transducer-fast-emit": dict(model="transducer", start_from="ctc", fast_emit=0.02),
}


class Reading:
    """A model that is always read in one way."""

    def __init__(self, model, **way):
        self.model, self.way, self.frame_seconds, self.config = model, way, model.frame_seconds, model.config
        self.normalise = getattr(model, "normalise", "utterance")

    def recognise(self, features, lengths, vocabulary):
        return self.model.recognise(features, lengths, vocabulary, **self.way)


def reading(recogniser, **way):
    copy = Recogniser.__new__(Recogniser)
    copy.__dict__.update(recogniser.__dict__, model=Reading(recogniser.model, **way))
    return copy


def delays(recogniser, corpus):
    """Median delay of first words and of all words, in milliseconds."""
    first, every = [], []
    for u in corpus:
        words = recogniser.transcribe(u.waveform(16_000), 16_000).words
        if [w.text for w in words] != u.text.split():
            continue
        late = [1000 * (ours.end - true.end) for ours, true in zip(words, u.words, strict=True)]
        first.append(late[0])
        every += late[:-1]  # the last word ends with the recording
    return {"first_word_ms": round(statistics.median(first), 1), "all_words_ms": round(statistics.median(every), 1), "texts": len(first)}


def measure(recogniser):
    model, record = recogniser.model, {}
    ways = {}
    if model.ctc_output is not None:
        ways |= {"CTC, greedy": dict(way="ctc", beam=1), "CTC, prefix beam 4": dict(way="ctc", beam=4)}
    if model.decoder is not None:
        ways |= {"transducer, beam 1": dict(way="transducer", beam=1), "transducer, beam 4": dict(way="transducer", beam=4)}
    splits = {"unseen voices, unseen sentences": "test", "seen voices, unseen sentences": "seen-voice", "unseen voices, seen sentences": "seen-sentence"}
    for name, way in ways.items():
        record[name] = {}
        for label, split in splits.items():
            if label != "unseen voices, unseen sentences" and not name.endswith("4"):
                continue
            result = evaluate(reading(recogniser, **way), make_corpus("commands", split)).summary()
            record[name][label] = {key: result[key] for key in ("wer", "cer", "substitutions", "deletions", "insertions", "words")}
            record[name][label]["real_time_factor"] = round(result["seconds_compute"] / result["seconds_audio"], 5)
        record[name]["delay"] = delays(reading(recogniser, **way), make_corpus("commands", "test", n=200))
        print(name, record[name], flush=True)
    return record


def limits(recogniser, most, beams=(1, 4)):
    """Error rates of a transducer's search with different limits of symbols at one step."""
    rows = []
    for beam in beams:
        for n in most:
            result = evaluate(reading(recogniser, way="transducer", beam=beam, max_symbols=n), make_corpus("commands", "test")).summary()
            rows.append({"max_symbols": n, "beam": beam, "wer": result["wer"], "cer": result["cer"], "real_time_factor": round(result["seconds_compute"] / result["seconds_audio"], 5)})
            print(rows[-1], flush=True)
    return rows


def versions(threads):
    return {"python": platform.python_version(), "torch": torch.__version__, "speechlearn": speechlearn.__version__, "machine": f"{platform.machine()}, {threads} thread of {os.cpu_count()} cores"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=list(RUNS), metavar="RUN")
    parser.add_argument("--runs", default="runs", help="folder for checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-symbols", type=int, nargs="+", default=[], metavar="N")
    args = parser.parse_args()
    for name in args.names:
        settings = {**COMMON, **RUNS[name]}
        if settings.get("start_from"):
            settings["start_from"] = str(Path(args.runs) / settings["start_from"] / "recogniser")
        recipe = Recipe(**settings, threads=args.threads)
        folder, start = Path(args.runs) / name, time.process_time()
        recogniser = run_training(recipe, folder, resume=True, show="none")
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if args.max_symbols:
            command = f"python benchmarks/alignment.py {name} --threads {args.threads} --max-symbols {' '.join(map(str, args.max_symbols))}"
            record = {"run": name, "rows": limits(recogniser, args.max_symbols), "command": command, "versions": versions(args.threads)}
            RESULTS.write_text(json.dumps(results | {"max-symbols": record}, indent=1, sort_keys=True) + "\n")
            continue
        cpu_minutes = (time.process_time() - start) / 60
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        metadata = json.loads((folder / "recogniser" / "checkpoint.json").read_text())["metadata"]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        record = {
            "recipe": {key: (RUNS[name].get("start_from", "") if key == "start_from" else value) for key, value in asdict(recipe).items() if key != "root"},
            "parameters": sum(p.numel() for p in recogniser.model.parameters()),
            "training_minutes": round(metadata["seconds"] / 60, 2),
            "cpu_minutes": round(cpu_minutes, 2),  # 0 where a finished run was only measured
            "peak_mib": round(peak),
            "curve": [[line["step"], round(line["valid_loss"], 4)] for line in lines if "valid_loss" in line],
            "tests": measure(recogniser),
            "command": f"python benchmarks/alignment.py {name} --threads {args.threads}",
            "versions": versions(args.threads),
        }
        RESULTS.write_text(json.dumps(results | {name: record}, indent=1, sort_keys=True) + "\n")
        print(name, "stored", flush=True)


if __name__ == "__main__":
    main()
