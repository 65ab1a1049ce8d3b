"""Whole models of ours against those of the official package `zipformer` 0.1.3: weights that go over, values, gradients, time and memory.

    python benchmarks/zipformer_models.py [--rounds N] [--only weights values memory time compiled]

It needs the environment that is described at the beginning of `zipformer_parts.py`, from which it takes its ways to measure.

- weights: models of the package, sizes S, M and L, causal or not, with all three heads and random numbers in every parameter, are saved as a file and loaded by
  `speechlearn.models.load_reference`: bare state dicts, and for the M models as a training checkpoint with the part "model". Then both sides get the same random features of
  unequal lengths, in evaluation mode: encoder output, log-probabilities of CTC, logits of the joiner on a small grid of frames and texts, logits of the attention decoder for the real symbols. Causal
  models have one chunk size and one left context; there some chunks go through both sides' streaming, too, and the states at the end are compared. A difference is the largest
  one over all numbers of a tensor, as it is, and relative to the largest number.
- speed: Zipformer-S, not causal, with a CTC head and torch's CTC loss on both sides; {batch} utterances of 10 s, {frames} frames of 80 bins, all of equal length. Training is forward and
  backward with the schedules at batch {count}; a second row adds the step of each side's own ScaledAdam. Inference is the log-probabilities in evaluation mode without gradients.
  How long a training step lasts depends on how many balancers and whiteners act, which is a matter of chance. So both sides get the same draws: `random.random()` is replaced by
  one repeatable stream for each place of the code that draws, and the seed changes from step to step ("drawn"). Two more rows have all draws pinned, so that all balancers, whiteners
  and limits act, or none.
  Both sides take turns in one process. With one thread the time is processor time, and the ratio is the median over the rounds of ours / theirs; with two it is time on the clock, and
  the ratio that of the shortest times, because a neighbour on the machine can slow down any round. Theirs is the package as it is: its activations are compiled by torch.compile
  when they are first used.
- two settings of the C library's memory: "default", and "kept", where freed memory stays with the process ({malloc}). The second
  avoids most page faults, which cost much on a virtual machine. Both sides of a row always have the same one.
- memory of one training step: bytes that autograd keeps between forward and backward (without parameters), and the highest sum of living tensors above the start; for the draws of
  three steps, on the average, and for pinned ones.
- values in training: loss and all gradients for the same seed and draws. The package computes the slopes of its activations exactly (it has no kernel for the byte), so ours are exact
  for this comparison, too. All gradients are compared as one long vector (the norm of the difference), and one by one, where a gradient that should be zero is left out: its norm is
  below 1e-4 of the whole. As a yardstick, both sides are also compared with ours in 64 bits: so much is rounding.
- compiled: ours under `torch.compile` against theirs as it is, one thread, "kept", nothing acts.

Ratios below 1 mean that ours needs less.
"""
import argparse
import contextlib
import copy
import importlib.metadata
import json
import logging
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch

import torch
import zipformer_parts as parts
from torch.nn import functional as F

import speechlearn
from speechlearn.models import load_reference, make_asr_model
from speechlearn.optim import ScaledAdam
from speechlearn.zipformer.encoder import zipformer_config

RESULTS = Path(__file__).parent / "results" / "zipformer_models.json"
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "34359738368", "MALLOC_TOP_PAD_": "268435456"}
BATCH, FRAMES, COUNT, VOCAB = 4, 998, 5000.0, 500
CHUNK, LEFT, CHUNKS = 16, 64, 6
__doc__ = __doc__.format(batch=BATCH, frames=FRAMES, count=int(COUNT), malloc=", ".join(f"{name}={value}" for name, value in KEPT.items()))


# ---- models ------------------------------------------------------------------------------------


def official(size, causal, ctc=True, transducer=True, attention_decoder=True):
    """Their model of a published size; lists of numbers are strings there."""
    config = zipformer_config(size, causal=causal) | (dict(chunk_size=(CHUNK,), left_context_frames=(LEFT,)) if causal else dict(chunk_size=(-1,), left_context_frames=(-1,)))
    numbers = {name: value if name in ("pos_dim", "causal") else ",".join(map(str, value)) if isinstance(value, tuple) else str(value) for name, value in config.items()}
    return parts.attribute("zipformer.modules", "model:AsrModel")(
        feature_dim=80, vocab_size=VOCAB, use_ctc=ctc, use_transducer=transducer, use_attention_decoder=attention_decoder, attention_decoder_num_layers=6, sos_id=1, eos_id=1, **numbers
    )


def ours(size, causal, ctc=True, transducer=True, attention_decoder=True):
    chunks = dict(chunk_size=(CHUNK,), left_context_frames=(LEFT,)) if causal else {}
    return make_asr_model(size, causal=causal, vocab_size=VOCAB, use_ctc=ctc, use_transducer=transducer, use_attention_decoder=attention_decoder, **chunks)


@torch.no_grad()
def stir(model):
    """Random numbers in every parameter, also where all begin alike (bypasses, layers of a stack, edges of chunks)."""
    for parameter in model.parameters():
        spread = float(parameter.std()) if parameter.dim() > 1 else 0.0
        parameter.add_(torch.randn_like(parameter) * (0.5 * spread or 0.1))


# ---- weights -----------------------------------------------------------------------------------


def utterances():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([431, 398, 210])
    texts = torch.randint(2, VOCAB, (3, 7), generator=generator)
    return 3 * torch.randn(3, 431, 80, generator=generator), lengths, texts, torch.tensor([7, 5, 6])


@torch.no_grad()
def heads(model, side):
    """Encoder output and what each head makes of it."""
    x, x_lens, texts, text_lens = utterances()
    out, lens = model.forward_encoder(x, x_lens)
    predicted = model.decoder(F.pad(texts[:, :4], (1, 0)), need_pad=True)
    memory = dict(memory=out, memory_lens=lens)
    before = dict(y=F.pad(texts, (1, 0), value=1), y_lens=text_lens + 1) if side == "ours" else dict(x=F.pad(texts, (1, 0), value=1), x_lens=text_lens + 1)
    logits = model.attention_decoder.decoder(**before, **memory)
    real = torch.arange(logits.shape[1]) < (text_lens + 1)[:, None]
    return {
        "encoder output": out, "lengths": lens, "CTC log-probabilities": model.ctc_output(out), "joiner logits": model.joiner(out[:, 10:18, None], predicted[:, None]),
        "attention decoder logits": logits[real],
    }


@torch.no_grad()
def streamed(model):
    """Some chunks through the streaming of the front end and of the encoder; output and states. The calls are the same on both sides."""
    generator = torch.Generator().manual_seed(4)
    window, hop = 2 * CHUNK + 13, 2 * CHUNK
    x = 3 * torch.randn(2, hop * (CHUNKS - 1) + window, 80, generator=generator)
    front, states, outputs = model.encoder_embed.get_init_states(2), model.encoder.get_init_states(2), []
    for i in range(CHUNKS):
        y, lens, front = model.encoder_embed.streaming_forward(x[:, i * hop : i * hop + window], torch.full((2,), window), front)
        seen = torch.full((2, 1), i * CHUNK)
        unseen = torch.cat([seen < torch.arange(LEFT, 0, -1), torch.zeros(2, CHUNK, dtype=torch.bool)], dim=1)
        y, _, states = model.encoder.streaming_forward(y.transpose(0, 1), lens, states, unseen)
        outputs.append(y)
    return {"streamed output": torch.cat(outputs)} | {f"state {i}": state for i, state in enumerate([front, *states])}


def difference(a, b):
    assert a.shape == b.shape, (a.shape, b.shape)
    absolute = float((a.double() - b.double()).abs().max())
    return {"absolute": float(f"{absolute:.2g}"), "relative": float(f"{absolute / max(float(b.double().abs().max()), 1e-30):.2g}")}


def loaded(size, causal):
    """One row: a model of theirs, its file, ours with its weights, and what both compute."""
    torch.manual_seed(10 + causal)
    theirs = official(size, causal)
    stir(theirs)
    theirs.eval()
    state, wrapped = theirs.state_dict(), size == "M"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "epoch-1.pt"
        torch.save({"model": state, "batch_idx_train": 1} if wrapped else state, path)
        torch.manual_seed(99)
        mine = ours(size, causal)
        names = set(mine.state_dict())
        load_reference(path, mine)
    counts = lambda model, part: sum(parameter.numel() for parameter in (getattr(model, part) if part else model).parameters())
    row = {
        "file": "checkpoint with the part model" if wrapped else "state dict", "tensors": len(state), "missing": len(names - set(state)), "unexpected": len(set(state) - names),
        "parameters": counts(mine, ""), "parameters of theirs": counts(theirs, ""),
        "parts": {part: counts(mine, part) for part, _ in mine.named_children()},
        "weights equal": all(torch.equal(tensor, state[name]) for name, tensor in mine.state_dict().items()),
        "chunk size": CHUNK if causal else None, "left context": LEFT if causal else None, "differences": {},
    }
    found = {side: heads(model, side) for side, model in (("ours", mine), ("theirs", theirs))}
    assert torch.equal(found["ours"].pop("lengths"), found["theirs"].pop("lengths"))
    row["differences"] = {name: difference(value, found["theirs"][name]) for name, value in found["ours"].items()}
    if causal:
        found = {side: streamed(model) for side, model in (("ours", mine), ("theirs", theirs))}
        assert found["ours"].keys() == found["theirs"].keys()
        each = {name: difference(value, found["theirs"][name]) for name, value in found["ours"].items()}
        row["differences"]["streamed output"] = each.pop("streamed output")
        row["differences"][f"{len(each)} states after {CHUNKS} chunks"] = {kind: max(value[kind] for value in each.values()) for kind in ("absolute", "relative")}
    return row


# ---- speed -------------------------------------------------------------------------------------


def speakers():
    """Two models with the same numbers, S with a CTC head, and a batch."""
    torch.manual_seed(0)
    models = {"official": official("S", False, transducer=False, attention_decoder=False)}
    stir(models["official"])
    models["ours"] = load_reference(models["official"].state_dict(), ours("S", False, transducer=False, attention_decoder=False))
    for model in models.values():
        for module in model.modules():
            if hasattr(module, "batch_count"):
                module.batch_count = COUNT
    generator = torch.Generator().manual_seed(1)
    batch = 3 * torch.randn(BATCH, FRAMES, 80, generator=generator), torch.full((BATCH,), FRAMES), torch.randint(1, VOCAB, (BATCH, 40), generator=generator), torch.full((BATCH,), 40)
    return models, batch


def loss_of(model, batch):
    x, x_lens, texts, text_lens = batch
    out, lens = model.forward_encoder(x, x_lens)
    return F.ctc_loss(model.ctc_output(out).transpose(0, 1), texts, lens, text_lens, reduction="sum")


class Streams:
    """In place of `random.random`: the same draws for both sides, although one of them draws more often (for its log lines)."""

    def __init__(self):
        self.restart(0)

    def restart(self, seed):
        self.seed, self.streams, self.places = seed, {}, {}

    def __call__(self):
        code, line = sys._getframe(1).f_code.co_qualname, sys._getframe(1).f_lineno
        kind = "layer" if "EncoderLayer" in code else code
        number = self.places.setdefault(kind, {}).setdefault(line, len(self.places[kind]))
        if (kind, number) not in self.streams:
            self.streams[kind, number] = random.Random(f"{self.seed} {kind} {number}")
        return self.streams[kind, number].random()


STREAMS = Streams()


@contextlib.contextmanager
def draws(pinned=None):
    """All draws of one number, or of the streams."""
    real = random.random
    random.random = STREAMS if pinned is None else lambda: pinned
    try:
        yield
    finally:
        random.random = real


def trainer(model, batch, optimiser=None, seed=0):
    count = seed

    def step():
        nonlocal count
        STREAMS.restart(count)
        torch.manual_seed(count)
        count += 1
        for parameter in model.parameters():
            parameter.grad = None
        loss_of(model, batch).backward()
        if optimiser is not None:
            optimiser.step()

    return step


def inference(model, batch):
    def task():
        with torch.no_grad():
            model.ctc_output(model.forward_encoder(batch[0], batch[1])[0])

    return task


def optimisers(models):
    kinds = {"ours": ScaledAdam, "official": parts.attribute("zipformer.modules", "optim:ScaledAdam")}
    return {side: kinds[side](list(model.named_parameters()), lr=1e-8, clipping_scale=2.0) for side, model in models.items()}  # steps so small that the models stay alike


def one_pass(model, batch, draw):
    """Loss and gradients of the training mode, with fresh draws."""
    model.train().zero_grad(set_to_none=True)
    STREAMS.restart(7)
    torch.manual_seed(7)
    for module in model.modules():
        if hasattr(module, "max_prob"):
            module.prob = module.max_prob  # as at the start
    with parts.exact_slopes(), draws(draw):
        loss = loss_of(model, batch)
        loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def gradients_apart(mine, theirs):
    """Norm of the difference, relative; and the largest difference in one tensor, relative to the tensor's largest value."""
    names = [name for name in theirs if theirs[name] is not None and mine[name] is not None]
    assert all(mine[name] is not None or not theirs[name].any() for name in theirs if theirs[name] is not None)
    size = sum(float(theirs[name].double().square().sum()) for name in names) ** 0.5
    gap = sum(float((mine[name].double() - theirs[name].double()).square().sum()) for name in names) ** 0.5
    each = {name: parts.worst(mine[name], theirs[name]) for name in names if float(theirs[name].double().norm()) > 1e-4 * size}
    worst = max(each, key=each.get)
    return {"all": float(f"{gap / size:.2g}"), "worst tensor": float(f"{each[worst]:.2g}"), "which": worst}


KINDS = {"drawn": None, "all act": parts.ACTS, "none acts": parts.RESTS}


def in_training():
    found = {}
    for name, draw in KINDS.items():
        models, batch = speakers()
        exact = copy.deepcopy(models["ours"]).double()
        losses, gradients = {}, {}
        for side, model in models.items():
            losses[side], gradients[side] = one_pass(model, batch, draw)
        _, gradients["exact"] = one_pass_in_64_bits(exact, batch, draw)
        found[name] = {
            "loss": losses["ours"], "loss, relative": float(f"{abs(losses['ours'] / losses['official'] - 1):.2g}"), "gradients": gradients_apart(gradients["ours"], gradients["official"]),
            "ours from 64 bits": gradients_apart(gradients["ours"], gradients["exact"]), "theirs from 64 bits": gradients_apart(gradients["official"], gradients["exact"]),
        }
    return found


def one_pass_in_64_bits(model, batch, draw):
    """Masks are drawn in 32 bits, so that they are the same ones."""
    rand = torch.rand

    def narrow(*size, **settings):
        return rand(*size, **(settings | {"dtype": torch.float32}))

    torch.rand = narrow
    try:
        return one_pass(model, (batch[0].double(), *batch[1:]), draw)
    finally:
        torch.rand = rand


def memory(models, batch):
    """Kept and highest bytes of each side, and their ratios."""
    found = {}
    for name, draw in KINDS.items():
        seeds, sides = (0, 1, 2) if draw is None else (0,), {}
        for side, model in models.items():
            model.train()
            kept, peak = [], []
            with draws(draw):
                for seed in seeds:
                    kept.append(kept_bytes(model, batch, seed))

                    def task(model=model, seed=seed):
                        trainer(model, batch, seed=seed)()
                        model.zero_grad(set_to_none=True)

                    peak.append(parts.peak_bytes(task))
            sides[side] = {"kept": sum(kept) // len(kept), "peak": sum(peak) // len(peak)}
        found[name] = {"bytes": sides} | {kind: round(sides["ours"][kind] / sides["official"][kind], 3) for kind in ("kept", "peak")}
    return found


def kept_bytes(model, batch, seed):
    known, kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer(model, batch, seed=seed)()
    return sum(kept.values())


def timed(tasks, rounds):
    """As in the comparison of parts, without its cut of rounds for slow steps."""
    for task in tasks.values():
        for _ in range(3):
            task()  # compiles, and takes the memory that is needed
    seconds = {name: [] for name in tasks}
    for i in range(rounds):
        for name in sorted(tasks, reverse=i % 2 == 1):
            seconds[name].append(parts.seconds_of(tasks[name], 1))
    if torch.get_num_threads() > 1:
        best = {name: min(values) for name, values in seconds.items()}
        return best["ours"] / best["official"], best
    ratio = statistics.median(mine / theirs for mine, theirs in zip(seconds["ours"], seconds["official"]))
    return ratio, {name: statistics.median(values) for name, values in seconds.items()}


def speed(rounds, more, wanted=None):
    """All rows under the present setting of memory."""
    logging.disable(logging.WARNING)  # the package describes each clipped gradient
    models, batch = speakers()
    made, rows = optimisers(models), {}
    cases = [("training step", None), ("training step and ScaledAdam", None), ("inference", None)]
    cases += [(f"training step, {name}", draw) for name, draw in KINDS.items() if draw is not None and more]
    for kind, draw in cases:
        for threads in (1, 2) if draw is None else (1,):
            key = f"{kind}, {threads} thread{'s' * (threads > 1)}"
            if wanted and key not in wanted:
                continue
            torch.set_num_threads(threads)
            tasks = {}
            for side, model in models.items():
                model.train(kind != "inference")
                tasks[side] = inference(model, batch) if kind == "inference" else trainer(model, batch, made[side] if "Adam" in kind else None)
            with draws(draw):
                ratio, seconds = timed(tasks, rounds)
            rows[key] = {"ratio": round(ratio, 3), "seconds": {side: float(f"{value:.3g}") for side, value in seconds.items()}, "rounds": rounds}
            print(key, json.dumps(rows[key]), file=sys.stderr, flush=True)
    return rows


def compiled(rounds):
    """Ratios of ours under torch.compile to theirs."""
    why = parts.no_compiler()
    if why:
        return {"not compiled because": why}
    parts.fresh_compiler()
    models, batch = speakers()
    found = {}
    for kind in ("inference", "training step"):
        for model in models.values():
            model.train(kind != "inference")
        plain, made = models["ours"].forward_encoder, torch.compile(models["ours"].forward_encoder)
        models["ours"].forward_encoder = made
        tasks = {side: inference(model, batch) if kind == "inference" else trainer(model, batch) for side, model in models.items()}
        start = time.perf_counter()
        try:
            with draws(parts.RESTS):
                for _ in range(2):
                    tasks["ours"]()
                lasted = time.perf_counter() - start
                ratio, _ = timed(tasks, rounds)
            found[kind] = {"ratio": round(ratio, 3), "seconds to compile": round(lasted)}
        except Exception as error:  # a compiler may fail in many ways; the row then says how
            found[kind] = {"ratio": None, "not compiled because": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
        models["ours"].forward_encoder = plain
        print(json.dumps({kind: found[kind]}), flush=True)
    return found


# ---- tables ------------------------------------------------------------------------------------


def table(record):
    lines = [
        "# Whole models: ours against the official package", "", "How it was measured: `benchmarks/zipformer_models.py`. Ratios are ours / official: below 1, ours needs less.", "", "## Weights of the package, loaded into ours", "",
        "| model | parameters | tensors | missing | unexpected | encoder output | CTC | joiner | attention decoder | streamed output | states |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in record.get("weights", {}).items():
        d = row["differences"]
        states = next((value for key, value in d.items() if " states " in key), None)
        cells = [d["encoder output"], d["CTC log-probabilities"], d["joiner logits"], d["attention decoder logits"], d.get("streamed output"), states]
        cells = ["–" if cell is None else f"{cell['absolute']:.0e} ({cell['relative']:.0e})" for cell in cells]
        lines.append(f"| {name} | {row['parameters']:,} | {row['tensors']} | {row['missing']} | {row['unexpected']} | " + " | ".join(cells) + " |")
    lines += ["", "Largest differences, absolute (and relative to the largest value).", "", "## Time", "", "| Zipformer-S with CTC, 4 × 10 s | memory kept | memory by default |", "| --- | --- | --- |"]
    times = record.get("time", {})
    cell = lambda row: "–" if row is None else f"{row['ratio']:.2f} ({row['seconds']['ours']} s / {row['seconds']['official']} s)"
    lines += [f"| {name} | " + " | ".join(cell(times.get(setting, {}).get(name)) for setting in ("kept", "default")) + " |" for name in times.get("kept", {})]
    compiled = record.get("compiled", {})
    lines += ["", "Ours under `torch.compile`, against theirs as it is, 1 thread: " + "; ".join(f"{kind} {value['ratio']}" if isinstance(value, dict) and value.get("ratio") else f"{kind} {value.get('not compiled because', value) if isinstance(value, dict) else value}" for kind, value in compiled.items()) + "."] if compiled else []
    lines += ["", "## Memory of a training step", "", "| draws | kept for the backward | highest |", "| --- | --- | --- |"]
    for name, row in record.get("memory", {}).items():
        b = row["bytes"]
        lines.append(f"| {name} | " + " | ".join(f"{row[kind]:.2f} ({b['ours'][kind] / 1e6:.0f} MB / {b['official'][kind] / 1e6:.0f} MB)" for kind in ("kept", "peak")) + " |")
    lines += ["", "## Loss and gradients", "", "| draws | loss | all gradients | worst tensor | ours from 64 bits | theirs from 64 bits |", "| --- | --- | --- | --- | --- | --- |"]
    for name, row in record.get("values", {}).items():
        lines.append(f"| {name} | {row['loss, relative']:.0e} | {row['gradients']['all']:.0e} | {row['gradients']['worst tensor']:.0e} | {row['ours from 64 bits']['all']:.0e} | {row['theirs from 64 bits']['all']:.0e} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    everything = ["weights", "values", "memory", "time", "compiled"]
    parser.add_argument("--only", nargs="+", choices=everything, default=everything, help="the others stay as they were stored")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="of the times, whole names; the others stay as they were stored")
    parser.add_argument("--child", choices=["kept", "default", "compiled"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    parts.need_official()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if args.child:
        print(json.dumps(compiled(args.rounds) if args.child == "compiled" else speed(args.rounds, more=args.child == "kept", wanted=args.rows)))
        return
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def write(name, value):
        record[name] = value
        record["sizes"] = dict(batch=BATCH, frames=FRAMES, batch_count=COUNT, vocab=VOCAB, chunk=CHUNK, left=LEFT, chunks=CHUNKS)
        record["versions"] = {
            "python": platform.python_version(), "torch": torch.__version__, "speechlearn": speechlearn.__version__, "zipformer": importlib.metadata.version("zipformer"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }
        RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        RESULTS.with_suffix(".md").write_text(table(record))

    def child(name, setting, *more):
        bare = {key: value for key, value in os.environ.items() if key not in KEPT}
        done = subprocess.run([sys.executable, __file__, "--rounds", str(args.rounds), "--child", name, *more], env=bare | setting, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.strip().splitlines()[-1])

    if "weights" in args.only:
        rows = {}
        for size in "SML":
            for causal in (False, True):
                rows[f"{size}, causal" if causal else size] = row = loaded(size, causal)
                print(size, causal, json.dumps(row["differences"]), flush=True)
        write("weights", rows)
    if "values" in args.only:
        write("values", in_training())
    if "memory" in args.only:
        write("memory", memory(*speakers()))
    if "time" in args.only:
        for name, setting in (("kept", KEPT), ("default", {})):
            stored = record.get("time", {})
            rows = child(name, setting, *(["--rows", *args.rows] if args.rows else []))
            write("time", stored | {name: (stored.get(name, {}) if args.rows else {}) | rows})
    if "compiled" in args.only:
        write("compiled", child("compiled", KEPT))


if __name__ == "__main__":
    main()
