"""Train and measure the Speech-Transformer of chapter 12: error rates of every way to read its output, on every split.

    python benchmarks/speech_transformer.py RUN… [--fsdd FOLDER] [--runs FOLDER] [--threads N]

RUN is one of: book (the run that a reader starts, about five minutes on two cores), shipped (the checkpoint `commands`), first-recogniser (the whole
game's model on the same sentences, as long as the book run). Each adds its numbers to benchmarks/results/speech_transformer.json, with the command,
the versions and the time it took. `shipped` is also copied into the package.
"""
import argparse
import collections
import json
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path

import torch

import speechlearn
from speechlearn.checkpoint import load_checkpoint, save_checkpoint
from speechlearn.recipes import Recipe, run_training
from speechlearn.data.batches import SpeechDataset, make_loader
from speechlearn.data.corpora import fsdd
from speechlearn.data.synthetic import make_corpus
from speechlearn.decoding import greedy_search
from speechlearn.recogniser import Recogniser, evaluate
from speechlearn.sound.features import LogMel
from speechlearn.text import edit_distance
from speechlearn.transformer.blocks import shifted
from speechlearn.whole_game import spikes, words_of

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "speech_transformer.json"

COMMANDS = dict(corpus="commands", utterances=5000, vocabulary="letters", fastest=1.18, telephone=0.2, hard_cut=0.0)
RECIPES = {
    "book": Recipe(
        model="speech-transformer", d_model=128, n_layers=4, n_decoder_layers=2, ctc_weight=0.7, steps=1100, warmup_steps=100, learning_rate=3e-3, max_frames=5000,
        validate_every=100, **COMMANDS,
    ),
    "first-recogniser": Recipe(d_model=128, n_layers=4, steps=1300, warmup_steps=100, learning_rate=3e-3, max_frames=5000, validate_every=100, **COMMANDS),
    "shipped": Recipe(
        model="speech-transformer", corpus="commands-xl:12000+digits:3000+fsdd:3000", vocabulary="letters", d_model=144, n_layers=4, n_decoder_layers=2, ctc_weight=0.5,
        steps=6500, learning_rate=0.003, warmup_steps=300, max_frames=5000, validate_every=500, average=0.998, fastest=1.25, telephone=0.4, masks=1,
    ),
}


class Reading:
    """A model whose output is read in one particular way."""

    def __init__(self, model, way: str):
        self.model, self.way, self.frame_seconds = model, way, model.frame_seconds

    def eval(self):
        return self

    @torch.no_grad()
    def recognise(self, features, lengths, vocabulary):
        c, model = self.model.config, self.model
        if self.way == "beam of 4":
            return model.recognise(features, lengths, vocabulary, beam=4, ctc_weight=0.0)
        if self.way == "beam of 4, chosen with CTC":
            return model.recognise(features, lengths, vocabulary)
        state = model.start(features, lengths)
        steps = state.memory_mask[:, 0, 0].sum(dim=-1)
        if self.way == "greedy":
            found = greedy_search(model.step, state, len(features), sos=c.sos, eos=c.eos, max_length=steps, never=(c.blank, c.pad, c.sos))
            return [words_of([(token, 0, 0) for token in h.tokens], vocabulary) for h in found]
        best = model.ctc_head(state.memory).argmax(dim=-1)
        return [words_of(spikes(row[:n].tolist()), vocabulary) for row, n in zip(best, steps.tolist())]


WAYS = ("greedy", "beam of 4", "beam of 4, chosen with CTC", "CTC head alone")


def numbers(evaluation) -> dict:
    summary = evaluation.summary()
    kept = ("wer", "cer", "substitutions", "deletions", "insertions", "utterances", "words", "wrong_utterances", "seconds_audio", "seconds_compute")
    return {key: summary[key] for key in kept if key in summary}


def teacher_forced(recogniser, corpus) -> dict:
    """How often the next symbol is right when all symbols so far are; and how many texts are right when the model reads its own."""
    data = SpeechDataset(corpus, recogniser.features, recogniser.vocabulary)
    model, c, right, counted = recogniser.model, recogniser.model.config, 0, 0
    with torch.no_grad():
        for batch in make_loader(data, shuffle=False):
            seen, answer = shifted(batch.targets, batch.target_lengths, sos=c.sos, eos=c.eos, pad=c.pad)
            predicted = model(batch.features, batch.feature_lengths, seen).argmax(dim=-1)
            right += int(((predicted == answer) & (answer != c.pad)).sum())
            counted += int((answer != c.pad).sum())
    return {"symbols": counted, "right": round(right / counted, 5)}


def confusions(recogniser, corpus, most: int = 12) -> list:
    """The commonest substituted, deleted and inserted words: [said, heard, times]."""
    counts = collections.Counter()
    for utterance in corpus:
        heard = recogniser.transcribe(utterance.waveform(recogniser.sample_rate), recogniser.sample_rate).text
        counts.update((a, b) for a, b in edit_distance(utterance.text.split(), heard.split()).pairs if a != b)
    return [[a or "", b or "", n] for (a, b), n in counts.most_common(most)]


def measure(recogniser, root: str | None) -> dict:
    is_transformer = hasattr(recogniser.model, "decoder")
    tests = {
        "unseen voices, unseen sentences": make_corpus("commands", "test"),
        "seen voices, unseen sentences": make_corpus("commands", "seen-voice"),
        "unseen voices, seen sentences": make_corpus("commands", "seen-sentence"),
        "digits, unseen voices": make_corpus("digits", "test"),
    }
    if root:
        tests["FSDD, known speakers, new takes"] = fsdd(root, "test", n=300)
    record = {"tests": {}}
    for name, corpus in tests.items():
        if not is_transformer:
            record["tests"][name] = {"CTC": numbers(evaluate(recogniser, corpus))}
            continue
        record["tests"][name] = {}
        for way in WAYS if "unseen sentences" in name else WAYS[2:3]:
            reading = Recogniser.__new__(Recogniser)
            reading.__dict__.update(recogniser.__dict__, model=Reading(recogniser.model, way))
            record["tests"][name][way] = numbers(evaluate(reading, corpus))
            print(name, way, record["tests"][name][way]["wer"], flush=True)
    if is_transformer:
        record["teacher forcing"] = teacher_forced(recogniser, tests["unseen voices, unseen sentences"])
    record["confusions"] = confusions(recogniser, tests["unseen voices, unseen sentences"])
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(RECIPES), metavar="RUN")
    parser.add_argument("--fsdd", default=os.environ.get("SPEECHLEARN_FSDD"))
    parser.add_argument("--runs", default="runs", help="folder for checkpoints")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    for name in args.names:
        recipe = Recipe(**{**asdict(RECIPES[name]), "root": args.fsdd or "", "threads": args.threads})
        folder, start = Path(args.runs) / name, time.process_time()
        recogniser = run_training(recipe, folder, resume=True, show="none")
        cpu_seconds = time.process_time() - start
        seconds = json.loads((folder / "recogniser" / "checkpoint.json").read_text())["metadata"]["seconds"]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        record = {
            "recipe": {key: value for key, value in asdict(recipe).items() if key != "root"},
            "parameters": sum(p.numel() for p in recogniser.model.parameters()),
            "training_minutes": round(seconds / 60, 2),
            "cpu_minutes": round(cpu_seconds / 60, 2),  # 0 where a finished run was only measured
            "curve": [[line["step"], round(line["valid_loss"], 4)] for line in lines if "valid_loss" in line],
            **measure(recogniser, args.fsdd if "fsdd" in recipe.corpus or name == "shipped" else None),
            "command": f"python benchmarks/speech_transformer.py {name} --fsdd FOLDER --threads {args.threads}",
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "speechlearn": speechlearn.__version__, "machine": f"{platform.machine()}, {os.cpu_count()} cores"},
        }
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[name] = record
        beside = RESULTS.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        os.replace(beside, RESULTS)
        if name == "shipped":
            ship(folder, record)


def ship(folder: Path, record: dict) -> None:
    loaded = load_checkpoint(folder / "recogniser")
    metadata = {
        "trained_on": record["recipe"]["corpus"],
        "recipe": record["recipe"],
        "licence": "CC BY-SA 4.0 as far as derived from the Free Spoken Digit Dataset; see NOTICE",
        "attribution": "Free Spoken Digit Dataset, Zohar Jackson and contributors, github.com/Jakobovski/free-spoken-digit-dataset",
        "command": record["command"],
        "word_error_rates": {test: round(ways["beam of 4, chosen with CTC"]["wer"], 5) for test, ways in record["tests"].items()},
    }
    target = save_checkpoint(
        ROOT / "speechlearn" / "checkpoints" / "commands", loaded.model, vocabulary=loaded.vocabulary, features=loaded.features, metadata=metadata, dtype="float16"
    )
    print(target.name, sum(p.stat().st_size for p in target.iterdir()), "bytes")


if __name__ == "__main__":
    main()
