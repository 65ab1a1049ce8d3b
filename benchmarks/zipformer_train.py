"""Small Zipformers, trained on commands, beside the models of the chapters before: error rates, training time, memory, FLOPs, speed.

    python benchmarks/zipformer_train.py train RUN [RUN ...] [--runs FOLDER] [--fsdd FOLDER] [--threads N]
    python benchmarks/zipformer_train.py cost
    python benchmarks/zipformer_train.py live [--utterances N]

`train` trains and measures; a finished run in FOLDER is only measured. The runs:

`ctc`                    a tiny Zipformer with a CTC head, subwords
`ctc-clean`              the same without changes of the sound by chance
`ctc-short`              the same with as many steps as cost what the run `ctc` of alignment.py costs, by the table of `cost`
`ctc-scaled-adam`        the same with ScaledAdam
`cr-ctc`                 the same with the consistency loss; half as many utterances in a batch, each seen twice
`ctc-masks`              the same masks without the consistency loss
`transducer`             begins with the encoder of `ctc` (run that first)
`ctc+attention`          likewise
`ctc+transducer`         both from the start
`causal`                 as `ctc`, for streams: chunks of 320 ms in the test
`stream-ctc`             as `causal`, with more utterances, digits and real recordings (--fsdd), longer
`stream-transducer`      begins with the encoder of `stream-ctc`, and gets a transducer beside the CTC head
`stream`                 begins with `stream-transducer`, and learns to wait: quiet before and behind the utterances. It is copied into the package

`live` sends the test sentences of commands through the shipped checkpoint `stream` in blocks of 40 ms, one thread: errors, real-time factor, and how long the
first word takes from its true end to the screen.

`cost` compares what one training step and one second of sound cost, in one process with one thread, in turns: nothing is trained.
"""
import argparse
import json
import resource
import statistics
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from alignment import reading, versions

import speechlearn
from speechlearn.checkpoint import load_checkpoint, save_checkpoint
from speechlearn.data.batches import SpeechDataset, make_loader
from speechlearn.data.corpora import fsdd
from speechlearn.data.synthetic import make_corpus
from speechlearn.live import LiveRecogniser, listen
from speechlearn.recipes import Recipe, make_model, run_training
from speechlearn.recogniser import Recogniser, evaluate, load_recogniser
from speechlearn.sound.features import LogMel
from speechlearn.text import error_rate

RESULTS = Path(__file__).parent / "results" / "zipformer_train.json"
COMMON = dict(
    model="zipformer", size="tiny", corpus="commands", utterances=5000, vocabulary="subwords", n_subwords=64, n_bins=60, telephone=0.2, fastest=1.18, hard_cut=0.0,
    steps=900, max_frames=4000, learning_rate=5e-3, schedule_steps=300, validate_every=100,
)
MIXTURE = dict(corpus="commands-xl:12000+digits:3000+fsdd:3000", telephone=0.4, fastest=1.25, hard_cut=0.8, average=0.998, validate_every=250)
RUNS = {
    "ctc": {},
    "ctc-clean": dict(augment=False),
    "ctc-short": dict(steps=614, schedule_steps=205, validate_every=307),
    "ctc-scaled-adam": dict(optimiser="scaled-adam", learning_rate=0.1),
    "cr-ctc": dict(consistency=True, masks=2, max_frames=2000),
    "ctc-masks": dict(masks=2),
    "transducer": dict(heads="transducer", start_from="ctc", learning_rate=3e-3),
    "ctc+attention": dict(heads="ctc+attention", start_from="ctc", learning_rate=3e-3),
    "ctc+transducer": dict(heads="ctc+transducer"),
    "causal": dict(causal=True),
    "stream-ctc": dict(causal=True, **MIXTURE, steps=2000, schedule_steps=600),
    "stream-transducer": dict(causal=True, heads="ctc+transducer", start_from="stream-ctc", **MIXTURE, learning_rate=3e-3, steps=1500, schedule_steps=300),
    "stream": dict(causal=True, heads="ctc+transducer", start_from="stream-transducer", **{**MIXTURE, "average": 0.99}, pauses=3.0, learning_rate=1.5e-3, warmup_steps=50, steps=500, schedule_steps=1),
}
SPLITS = {"unseen voices, unseen sentences": "test", "seen voices, unseen sentences": "seen-voice", "unseen voices, seen sentences": "seen-sentence"}
COST = {  # what `cost` compares: the recipes of the stored runs
    "whole game": dict(model="first-recogniser", vocabulary="letters", d_model=128, n_layers=4),
    "Speech-Transformer's encoder, CTC": dict(model="ctc", vocabulary="letters", d_model=128, n_layers=4),
    "Speech-Transformer's encoder, transducer": dict(model="transducer", vocabulary="letters", d_model=128, n_layers=4),
    "Speech-Transformer": dict(model="speech-transformer", vocabulary="letters", d_model=128, n_layers=4),
    "Zipformer, CTC": dict(COMMON),
    "Zipformer, transducer": dict(COMMON, heads="transducer"),
    "Zipformer, CTC and attention": dict(COMMON, heads="ctc+attention"),
}


def ways_of(recipe):
    ways, heads = {}, recipe.heads.split("+")
    if "ctc" in heads:
        ways |= {"CTC, greedy": dict(way="ctc", beam=1), "CTC, prefix beam 4": dict(way="ctc", beam=4)}
    if "transducer" in heads:
        ways |= {"transducer, greedy": dict(way="transducer", beam=1), "transducer, beam 4": dict(way="transducer", beam=4)}
    if "attention" in heads:
        ways |= {"attention, beam 4": dict(way="attention", beam=4)}
    if {"ctc", "attention"} <= set(heads):
        ways |= {"CTC finds, attention chooses": dict(way="rescoring", beam=8)}
    return ways


def measure(recogniser, recipe):
    record = {}
    more = {}
    if "+" in recipe.corpus:
        more = {"digits, unseen voices": make_corpus("digits", "test"), "FSDD, known speakers, new takes": fsdd(recipe.root, "test", n=300)}
    for name, way in ways_of(recipe).items():
        record[name], corpora = {}, dict(more)
        for label, split in SPLITS.items():
            if label != "unseen voices, unseen sentences" and name in ("CTC, greedy", "transducer, greedy"):
                continue
            corpora[label] = make_corpus("commands", split)
        for label, corpus in corpora.items():
            result = evaluate(reading(recogniser, **way), corpus).summary()
            record[name][label] = {key: result[key] for key in ("wer", "cer", "substitutions", "deletions", "insertions", "words")}
            record[name][label]["real_time_factor"] = round(result["seconds_compute"] / result["seconds_audio"], 5)
        print(name, {label: f"{row['wer']:.2%}" for label, row in record[name].items()}, flush=True)
    return record


def store(name, record):
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(results | {name: record}, indent=1, sort_keys=True) + "\n")


def train_all(args) -> None:
    for name in args.names:
        settings = {**COMMON, **RUNS[name]}
        if settings.get("start_from"):
            settings["start_from"] = str(Path(args.runs) / settings["start_from"] / "recogniser")
        if "fsdd" in settings["corpus"]:
            settings["root"] = args.fsdd
        recipe, folder, start = Recipe(**settings, threads=args.threads), Path(args.runs) / name, time.process_time()
        trained_before = (folder / "recogniser" / "checkpoint.json").exists()
        recogniser = run_training(recipe, folder, resume=True, show="none")
        cpu_minutes = (time.process_time() - start) / 60
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if trained_before:  # only measured again: what the training took is already known
            known = (json.loads(RESULTS.read_text()) if RESULTS.exists() else {}).get(name, {})
            cpu_minutes, peak = known.get("cpu_minutes", 0.0), known.get("peak_mib", 0)
        metadata = json.loads((folder / "recogniser" / "checkpoint.json").read_text())["metadata"]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        record = {
            "recipe": {key: (RUNS[name].get("start_from", "") if key == "start_from" else value) for key, value in asdict(recipe).items() if key != "root"},
            "parameters": sum(p.numel() for p in recogniser.model.parameters()),
            "training_minutes": round(metadata["seconds"] / 60, 2),
            "cpu_minutes": round(cpu_minutes, 2),
            "peak_mib": round(peak),
            "curve": [[line["step"], round(line["valid_loss"], 4)] for line in lines if "valid_loss" in line],
            "tests": measure(recogniser, recipe),
            "command": f"python benchmarks/zipformer_train.py train {name} --threads {args.threads}",
            "versions": versions(args.threads),
        }
        store(name, record)
        if name == "stream":
            ship(folder, record)


def ship(folder, record) -> None:
    loaded = load_checkpoint(folder / "recogniser")
    metadata = {
        "trained_on": record["recipe"]["corpus"], "recipe": record["recipe"], "command": record["command"] + " --fsdd FOLDER",
        "licence": "CC BY-SA 4.0 as far as derived from the Free Spoken Digit Dataset; see NOTICE",
        "attribution": "Free Spoken Digit Dataset, Zohar Jackson and contributors, github.com/Jakobovski/free-spoken-digit-dataset",
        "word_error_rates": {test: round(row["wer"], 5) for test, row in record["tests"]["transducer, beam 4"].items()},
    }
    target = save_checkpoint(Path(speechlearn.__file__).parent / "checkpoints" / "stream", loaded.model, vocabulary=loaded.vocabulary, features=loaded.features, metadata=metadata, dtype="float16")
    print(target.name, sum(p.stat().st_size for p in target.iterdir()), "bytes")


def live(args) -> None:
    torch.set_num_threads(1)
    recogniser, corpus, rows = load_recogniser("stream"), make_corpus("commands", "test", n=args.utterances), {}
    for way in ("ctc", "transducer"):
        for chunk in (16, 32):
            live = LiveRecogniser(recogniser, way=way, chunk_size=chunk, left_context=64)
            texts, first, seconds, compute = [], [], 0.0, 0.0
            for u in corpus:
                live.start()
                waveform = u.waveform(recogniser.sample_rate)
                heard = listen(live, waveform.split(recogniser.sample_rate // 25))
                texts.append(heard.transcript.text)
                seconds, compute = seconds + heard.seconds_audio, compute + heard.seconds_compute
                if heard.transcript.words and heard.transcript.words[0].text == u.words[0].text:
                    first.append(1000 * (heard.shown[0] - u.words[0].end))
            first.sort()
            rows[f"{way}, chunks of {20 * chunk} ms"] = {
                "wer": error_rate([u.text for u in corpus], texts, unit="word").rate, "real_time_factor": round(compute / seconds, 4), "utterances": len(corpus), "first_words": len(first),
                "first_word_ms": {"median": round(statistics.median(first)), "of 10 the latest": round(first[len(first) * 9 // 10])},
            }
            print(way, chunk, rows[f"{way}, chunks of {20 * chunk} ms"], flush=True)
    store("live", {"rows": rows, "command": f"python benchmarks/zipformer_train.py live --utterances {args.utterances}", "versions": versions(1)})


def cost(args) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # inside its fused kernels nobody counts
    corpus = make_corpus("commands", "train", n=400)
    ours = {}
    for name, settings in COST.items():
        recipe = Recipe(**{**dict(corpus="commands", utterances=5000, max_frames=4000, n_bins=80), **settings})
        model, vocabulary = make_model(recipe)
        loader = make_loader(SpeechDataset(corpus, LogMel(n_bins=recipe.n_bins), vocabulary, keep=True), max_frames=4000, seed=1)
        batches = [batch for batch, _ in zip(loader, range(4))]
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step(i, model=model, optimiser=optimiser, batches=batches):
            model.train()
            model.loss(batches[i % len(batches)])["loss"].backward()
            optimiser.step()
            optimiser.zero_grad()

        recogniser = Recogniser(model, vocabulary, features=dict(n_bins=recipe.n_bins))
        encode = model if recipe.model != "speech-transformer" else model.encoder
        ours[name] = dict(step=step, model=model, encode=encode, n_bins=recipe.n_bins, recogniser=recogniser, seconds=[], encoding=[])
    frames = torch.tensor([1000])
    for i in range(args.rounds + 1):
        for name, one in ours.items():
            began = time.process_time()
            one["step"](i)
            stepped = time.process_time()
            one["model"].eval()
            with torch.no_grad():
                x = torch.randn(1, 1000, one["n_bins"])
                half = time.process_time()
                one["encode"](x, frames)
            if i:
                one["seconds"].append(stepped - began)
                one["encoding"].append(time.process_time() - half)
    rows, base = {}, ours["Speech-Transformer's encoder, CTC"]
    for name, one in ours.items():
        with warnings.catch_warnings(), FlopCounterMode(display=False) as counter, torch.no_grad():
            warnings.simplefilter("ignore")
            one["model"].eval()
            one["encode"](torch.randn(1, 1000, one["n_bins"]), frames)
        rows[name] = {
            "parameters": sum(p.numel() for p in one["model"].parameters()), "gflops_per_second_of_sound": round(counter.get_total_flops() / 10 / 1e9, 4),
            "training_step": round(statistics.median(a / b for a, b in zip(one["seconds"], base["seconds"])), 3),
            "encoding": round(statistics.median(a / b for a, b in zip(one["encoding"], base["encoding"])), 3),
            "real_time_factor_encoder": round(statistics.median(one["encoding"]) / 10, 5),
        }
        print(name, rows[name], flush=True)
    store("cost", {"rows": rows, "rounds": args.rounds, "command": f"python benchmarks/zipformer_train.py cost --rounds {args.rounds}", "versions": versions(1)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("train")
    one.add_argument("names", nargs="+", choices=list(RUNS), metavar="RUN")
    one.add_argument("--runs", default="runs", help="folder for checkpoints")
    one.add_argument("--fsdd", default="", help="folder of the Free Spoken Digit Dataset, for `stream`")
    one.add_argument("--threads", type=int, default=1)
    one.set_defaults(run=train_all)
    one = commands.add_parser("cost")
    one.add_argument("--rounds", type=int, default=15)
    one.set_defaults(run=cost)
    one = commands.add_parser("live")
    one.add_argument("--utterances", type=int, default=400)
    one.set_defaults(run=live)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
