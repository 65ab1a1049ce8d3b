"""The parts of our Zipformer against those of the official package `zipformer` 0.1.3: values, gradients, time and memory.

    python benchmarks/zipformer_parts.py [--rounds N] [--only WORD ...] [--no-compile | --compile-only]

The official package wants an older torch, so it lives in an environment of its own, beside the one of this project (run in the project's folder):

    python -m venv --system-site-packages bench-venv
    bench-venv/bin/pip install -c constraints.txt -e .          # as always: with the index of CPU builds of torch, where wanted
    bench-venv/bin/pip install --no-deps zipformer==0.1.3 atdataset
    bench-venv/bin/pip install -c constraints.txt tensorboard tqdm huggingface_hub kaldialign simple-sentencepiece kaldifst onnx onnxruntime webdataset soundfile packaging
    bench-venv/bin/python benchmarks/zipformer_parts.py

Each part of theirs gets random parameters, which are loaded strictly into ours. Then, in one process:

- values: outputs and gradients for the same input, seed and pinned draws of `random.random()`; the worst difference, relative to the largest value of the tensor. A row of the
  table says which draw is pinned: 0.01 lets balancers, whiteners and limits act in every step, 0.999 lets none act. The package computes the slopes of its activations exactly
  (it has no kernel for the byte); so ours are exact for this comparison, too. Gradients are those of the training mode.
- time: forward and backward in training mode, and forward in evaluation without gradients. With one thread it is processor time, which others on the machine disturb little, with
  two it is time on the clock. Both sides take turns; a ratio is the median over the rounds of ours / theirs, and with two threads, where a neighbour can slow down any round, the
  ratio of the shortest times. Theirs is the package as it is: its activations are compiled by
  torch.compile when they are first used. A further column compares with the same code uncompiled, where that is a difference.
- memory of one training step: bytes that autograd keeps between forward and backward (without parameters), and the highest sum of living tensors above the start.
- compiled: ours under `torch.compile` against theirs as it is, one thread.

Ratios below 1 mean that ours needs less.
"""
import argparse
import contextlib
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import random
import shutil
import statistics
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: a thread that waits for a busy core does not keep another one busy

import torch
from torch import nn

import speechlearn

RESULTS = Path(__file__).parent / "results" / "zipformer_parts.json"
FRAMES, BATCH, HEADS, QUERY, POSITION, VALUE, POS_DIM = 500, 4, 4, 32, 4, 12, 48
ACTS, RESTS = 0.01, 0.999  # not 0: the package writes log lines at very small draws
COMPILED_THERE = ("SwooshL", "SwooshR", "ActivationDropoutAndLinear")
BATCH_COUNT = 1000.0  # where the schedules are
OPTIMISER = "ScaledAdam, one step"
BLOCK = 0.02  # seconds that one measurement lasts at least
SLOW = 0.3  # steps that last longer are measured in fewer rounds


class NotBuilt(Exception):
    """A module or class that does not exist (yet)."""


@dataclass
class Part:
    """One row: a class of each side, its arguments and its input."""

    name: str
    ours: str  # module:class, below speechlearn
    official: str  # module:class, below zipformer.modules
    arguments: dict
    inputs: object  # generator -> tensors
    call: dict = field(default_factory=dict)
    draw: float = RESTS


def attribute(root, where):
    module, _, name = where.partition(":")
    try:
        return getattr(importlib.import_module(f"{root}.{module}"), name)
    except ModuleNotFoundError as error:
        if not error.name or not f"{root}.{module}".startswith(error.name):
            raise
        raise NotBuilt(f"{root}.{module} does not exist") from None
    except AttributeError:
        raise NotBuilt(f"{root}.{module} has no {name}") from None


def need_official():
    try:
        importlib.import_module("zipformer.modules.zipformer")
    except ImportError as error:
        raise SystemExit(f"The official package cannot be imported here ({error}). It needs an environment of its own; its commands stand at the beginning of\nbenchmarks/zipformer_parts.py.")


# ---- inputs ------------------------------------------------------------------------------------


def normal(*shape, scale=1.0):
    return lambda g: (torch.randn(shape, generator=g) * scale,)


def with_sizes(*shape):
    """Channels of very different sizes and offsets, so that about half of them are outside a balancer's ranges."""

    def make(g):
        x = torch.randn(shape, generator=g)
        return (x * torch.logspace(-2, 2, shape[-1])[torch.randperm(shape[-1], generator=g)] + torch.randn(shape[-1], generator=g),)

    return make


def flat(*shape, directions=8):
    """A cloud that fills few directions: its whitening metric is far above the limits."""

    def make(g):
        return (torch.randn(*shape[:-1], directions, generator=g) @ torch.randn(directions, shape[-1], generator=g) + 0.1 * torch.randn(shape, generator=g),)

    return make


def values_and_weights(channels, heads):
    def make(g):
        return torch.randn(FRAMES, BATCH, channels, generator=g), (2 * torch.randn(heads, BATCH, FRAMES, FRAMES, generator=g)).softmax(dim=-1)

    return make


def frames_and_positions(channels):
    return lambda g: (torch.randn(FRAMES, BATCH, channels, generator=g), torch.randn(1, 2 * FRAMES - 1, POS_DIM, generator=g))


def padding():
    return torch.arange(FRAMES) >= torch.tensor([FRAMES, FRAMES - 20, FRAMES - 100, FRAMES - 150])[:, None]


def parts():
    """All rows."""
    rows = []

    def add(name, ours, official, arguments, inputs, call=None, draws=(RESTS,)):
        for draw in draws:
            rows.append(Part(name + (", constraints act" if len(draws) > 1 and draw == ACTS else ""), ours, official, arguments, inputs, call or {}, draw))

    middle = normal(FRAMES, BATCH, 768, scale=3.0)
    for kind in ("SwooshL", "SwooshR"):
        add(kind, f"zipformer.activations:{kind}", f"scaling:{kind}", {}, middle)
    for kind in ("SwooshL", "SwooshR"):
        arguments = dict(in_channels=768, out_channels=192, activation=kind, dropout_p=0.1 if kind == "SwooshL" else 0.0, dropout_shared_dim=0)
        add(f"ActivationDropoutAndLinear, {kind}", "zipformer.activations:ActivationDropoutAndLinear", "scaling:ActivationDropoutAndLinear", arguments, middle)
    for width in (192, 384):
        frames = normal(FRAMES, BATCH, width)
        add(f"BiasNorm {width}", "zipformer.normalisation:BiasNorm", "scaling:BiasNorm", dict(num_channels=width), frames, draws=(RESTS, ACTS))
        add(f"Balancer {width}, channels outside", "zipformer.balancer:Balancer", "scaling:Balancer", dict(num_channels=width, channel_dim=-1), with_sizes(FRAMES, BATCH, width), draws=(ACTS, RESTS)[:1])
        rows[-1].draw = ACTS
        for name, cloud in (("above its limit", flat(FRAMES, BATCH, width)), ("below its limit", frames)):
            add(f"Whiten {width}, {name}", "zipformer.whitening:Whiten", "scaling:Whiten", dict(num_groups=1, whitening_limit=5.0, prob=(0.025, 0.25), grad_scale=0.01), cloud)
            rows[-1].draw = ACTS
    add("Whiten 128 in 4 groups, above its limit", "zipformer.whitening:Whiten", "scaling:Whiten", dict(num_groups=4, whitening_limit=2.0, prob=(0.025, 0.25), grad_scale=0.025), flat(FRAMES, BATCH, 128))
    rows[-1].draw = ACTS
    add("Balancer 192, channels on axis 1", "zipformer.balancer:Balancer", "scaling:Balancer", dict(num_channels=192, channel_dim=1), normal(BATCH, 192, FRAMES))
    rows[-1].draw = ACTS
    for chunk in (-1, 16):
        add(
            f"ChunkCausalDepthwiseConv1d 192, {'one chunk' if chunk < 0 else f'chunks of {chunk}'}", "zipformer.scaling:ChunkCausalDepthwiseConv1d", "scaling:ChunkCausalDepthwiseConv1d",
            dict(channels=192, kernel_size=31), normal(BATCH, 192, FRAMES), dict(chunk_size=chunk),
        )
    both = (RESTS, ACTS)
    for width, middle_width in ((192, 512), (384, 1024)):
        frames = normal(FRAMES, BATCH, width)
        add(f"FeedforwardModule {width}", "zipformer.convolution:FeedforwardModule", "zipformer:FeedforwardModule", dict(embed_dim=width, feedforward_dim=middle_width, dropout=0.1), frames, draws=both)
        for causal in (False, True):
            add(
                f"ConvolutionModule {width}{', causal' if causal else ''}", "zipformer.convolution:ConvolutionModule", "zipformer:ConvolutionModule",
                dict(channels=width, kernel_size=31, causal=causal), frames, dict(src_key_padding_mask=padding()) | (dict(chunk_size=16) if causal else {}), draws=both,
            )
    add("ConvNeXt 128", "zipformer.convolution:ConvNeXt", "subsampling:ConvNeXt", dict(channels=128), normal(BATCH, 128, FRAMES, 19), draws=both)
    add(
        "Conv2dSubsampling 80 → 192", "zipformer.convolution:Conv2dSubsampling", "subsampling:Conv2dSubsampling", dict(in_channels=80, out_channels=192, dropout=0.1),
        normal(BATCH, 2 * FRAMES + 7, 80, scale=3.0), dict(x_lens=torch.tensor([2 * FRAMES + 7, 2 * FRAMES, 900, 800])), draws=both,
    )
    add(
        "CompactRelPositionalEncoding", "zipformer.attention:CompactRelPositionalEncoding", "zipformer:CompactRelPositionalEncoding", dict(embed_dim=POS_DIM, dropout_rate=0.15),
        normal(FRAMES, BATCH, 192),
    )
    for width in (192, 384):
        add(
            f"RelPositionMultiheadAttentionWeights {width}", "zipformer.attention:RelPositionMultiheadAttentionWeights", "zipformer:RelPositionMultiheadAttentionWeights",
            dict(embed_dim=width, pos_dim=POS_DIM, num_heads=HEADS, query_head_dim=QUERY, pos_head_dim=POSITION, dropout=0.0), frames_and_positions(width),
            dict(key_padding_mask=padding()), draws=both,
        )
        add(f"SelfAttention {width}", "zipformer.attention:SelfAttention", "zipformer:SelfAttention", dict(embed_dim=width, num_heads=HEADS, value_head_dim=VALUE), values_and_weights(width, HEADS), draws=both)
        add(
            f"NonlinAttention {width}", "zipformer.attention:NonlinAttention", "zipformer:NonlinAttention", dict(channels=width, hidden_channels=3 * width // 4), values_and_weights(width, 1),
            draws=both,
        )
        two = lambda g, width=width: (torch.randn(FRAMES, BATCH, width, generator=g), torch.randn(FRAMES, BATCH, width, generator=g))
        add(f"BypassModule {width}", "zipformer.resampling:BypassModule", "zipformer:BypassModule", dict(embed_dim=width, skip_rate=0.05), two)
        add(f"SimpleDownsample {width}", "zipformer.resampling:SimpleDownsample", "zipformer:SimpleDownsample", dict(channels=width, downsample=2, dropout=0.0, causal=False), normal(FRAMES, BATCH, width))
        add(f"SimpleUpsample {width}", "zipformer.resampling:SimpleUpsample", "zipformer:SimpleUpsample", dict(num_channels=width, upsample=2), normal(FRAMES // 2, BATCH, width))
    return rows


# ---- one side of a row ---------------------------------------------------------------------------


@contextlib.contextmanager
def exact_slopes():
    """Our activations without the byte."""
    activations = importlib.import_module("speechlearn.zipformer.activations")
    kinds = {activations.SwooshL: activations.swoosh_l, activations.SwooshR: activations.swoosh_r}
    real = {kind: kind.forward for kind in kinds}
    for kind, function in kinds.items():
        kind.forward = lambda self, x, function=function: function(x)
    try:
        yield
    finally:
        for kind, forward in real.items():
            kind.forward = forward


@contextlib.contextmanager
def pinned(draw):
    real = random.random
    random.random = lambda: draw
    try:
        yield
    finally:
        random.random = real


def pair(part):
    """Theirs with random parameters, and ours with the same ones."""
    ours_kind, official_kind = attribute("speechlearn", part.ours), attribute("zipformer.modules", part.official)
    torch.manual_seed(0)
    models = {"official": official_kind(**part.arguments), "ours": ours_kind(**part.arguments)}
    with torch.no_grad():
        for parameter in models["official"].parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    models["ours"].load_state_dict(models["official"].state_dict(), strict=True)
    for model in models.values():
        for module in model.modules():
            if hasattr(module, "batch_count"):
                module.batch_count = BATCH_COUNT
    return models


def first(output):
    return output[0] if isinstance(output, tuple) else output


def make_step(model, part):
    """Forward and backward, and its output and leaves."""
    inputs = tuple(x.requires_grad_() for x in part.inputs(torch.Generator().manual_seed(1)))
    leaves = {f"input {i}": x for i, x in enumerate(inputs)} | dict(model.named_parameters())
    with torch.no_grad(), pinned(part.draw):
        grad = torch.randn(first(model(*inputs, **part.call)).shape, generator=torch.Generator().manual_seed(2))

    def step():
        for leaf in leaves.values():
            leaf.grad = None
        y = first(model(*inputs, **part.call))
        if y.requires_grad:
            y.backward(grad)
        return y

    return step, inputs, leaves


def worst(a, b):
    if a is None and b is None:
        return 0.0
    if a is None or b is None:  # a gradient that one side does not have must be zero on the other
        return 0.0 if float((a if b is None else b).abs().max()) == 0 else float("inf")
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a.detach().double() - b.detach().double()).abs().max() / b.detach().double().abs().max().clamp(min=1e-30))


def compared(models, part):
    """Worst relative differences."""
    found = {}
    for mode in ("training", "evaluation"):
        outputs, gradients = {}, {}
        for side, model in models.items():
            model.train(mode == "training")
            step, inputs, leaves = make_step(model, part)
            torch.manual_seed(3)
            with pinned(part.draw), exact_slopes():
                if mode == "training":
                    outputs[side] = step().detach()
                    gradients[side] = {name: leaf.grad for name, leaf in leaves.items()}
                else:
                    with torch.no_grad():
                        outputs[side] = first(model(*inputs, **part.call))
        found[f"output, {mode}"] = worst(outputs["ours"], outputs["official"])
        if mode == "training":
            for kind, chosen in (("input", True), ("parameters", False)):
                names = [name for name in gradients["official"] if name.startswith("input ") == chosen]
                if names:
                    found[f"gradients of {kind}"] = max(worst(gradients["ours"][name], gradients["official"][name]) for name in names)
    return {key: float(f"{value:.2g}") for key, value in found.items()}


# ---- time ------------------------------------------------------------------------------------


def seconds_of(task, times):
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(times):
        task()
    return (clock() - start) / times


def in_turns(tasks, rounds):
    """Ours / theirs, and the seconds of each: medians over the rounds, or, on the clock, the shortest."""
    for task in tasks.values():
        task()
    one = {name: seconds_of(task, 2) for name, task in tasks.items()}
    times = {name: max(1, round(BLOCK / max(value, 1e-6))) for name, value in one.items()}
    rounds = rounds if max(one.values()) < SLOW and torch.get_num_threads() == 1 else max(3, rounds // 2)
    seconds = {name: [] for name in tasks}
    for i in range(rounds):
        for name in sorted(tasks, reverse=i % 2 == 1):
            seconds[name].append(seconds_of(tasks[name], times[name]))
    if torch.get_num_threads() > 1:
        shortest = {name: min(values) for name, values in seconds.items()}
        return shortest["ours"] / shortest["official"], shortest
    ratio = statistics.median(mine / theirs for mine, theirs in zip(seconds["ours"], seconds["official"]))
    return ratio, {name: statistics.median(values) for name, values in seconds.items()}


def evaluation(model, inputs, part):
    def task():
        with torch.no_grad():
            model(*inputs, **part.call)

    return task


def timed(models, part, rounds, threads, kind):
    torch.set_num_threads(threads)
    tasks = {}
    for side, model in models.items():
        model.train(kind == "training")
        step, inputs, _ = make_step(model, part)
        tasks[side] = step if kind == "training" else evaluation(model, inputs, part)
    with pinned(part.draw):
        found, medians = in_turns(tasks, rounds)
        without = None
        if threads == 1 and any(type(module).__name__ in COMPILED_THERE for module in models["official"].modules()):
            with torch.compiler.set_stance("force_eager"):
                without = in_turns(tasks, max(3, rounds // 2))[0]
    return found, without, medians


# ---- memory ----------------------------------------------------------------------------------


def kept_bytes(model, part):
    """Bytes of the storages that autograd keeps, apart from parameters."""
    step = make_step(model.train(), part)[0]
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with pinned(part.draw), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def peak_bytes(task):
    """The highest sum of tensors during a task, above what there was before, from the allocator's events."""
    task()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        task()
    total = highest = 0
    for event in sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


def memory(models, part):
    found = {}
    for side, model in models.items():
        step, _, leaves = make_step(model.train(), part)

        def task(step=step, leaves=leaves):
            step()
            for leaf in leaves.values():
                leaf.grad = None

        with pinned(part.draw):
            found[side] = (kept_bytes(model, part), peak_bytes(task))
    return found


# ---- torch.compile -----------------------------------------------------------------------------


def compiled(models, part, rounds):
    """Ratio of ours, compiled, to theirs; or why there is none."""
    fresh_compiler()
    torch.set_num_threads(1)
    tasks = {}
    for side, model in models.items():
        if side == "ours":
            model = torch.compile(model)
        tasks[side] = make_step(model.train(), part)[0]
    try:
        with pinned(part.draw), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):  # compiles, and compiles again where a number has changed
                tasks["ours"]()
            found, _ = in_turns(tasks, rounds)
    except Exception as error:  # a compiler may fail in many ways; the row then says how
        return None, f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    return round(found, 3), None


def fresh_compiler():
    """Forget the shapes of earlier rows: after some of them, torch.compile would compile no more, neither ours nor theirs."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64


def no_compiler():
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return "no C++ compiler"
    return None


# ---- the optimiser -----------------------------------------------------------------------------


def layer_shapes(d, f, kernel):
    """Parameters of one encoder layer of the S model."""
    q, h = HEADS * (2 * QUERY + POSITION), 3 * d // 4
    shapes = [(d,)] * 3 + [(), (d,)] + [(q, d), (q,), (HEADS * POSITION, POS_DIM)]
    shapes += [(HEADS * VALUE, d), (HEADS * VALUE,), (d, HEADS * VALUE), (d,)] * 2
    for width in (3 * f // 4, f, 5 * f // 4):
        shapes += [(width, d), (width,), (d, width), (d,)]
    shapes += [(3 * h, d), (3 * h,), (d, h), (d,)]
    return shapes + [(2 * d, d), (2 * d,), (d, 1, kernel), (d,), (d, d), (d,)] * 2


def optimisers(rounds):
    """ScaledAdam on the parameters of five layers: eight steps, so that sizes are learnt twice. The measured steps are tiny, so that no gradient is ever clipped."""
    logging.disable(logging.WARNING)  # the package describes each clipped gradient
    shapes = layer_shapes(192, 512, 31) * 2 + layer_shapes(256, 768, 31) * 2 + layer_shapes(256, 768, 15)
    kinds = {"ours": attribute("speechlearn", "optim:ScaledAdam"), "official": attribute("zipformer.modules", "optim:ScaledAdam")}

    def make(side):
        g = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(0.1 * torch.randn(shape, generator=g)) for shape in shapes]
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=g) * 0.01
        named = [(f"p{i}", parameter) for i, parameter in enumerate(parameters)]
        return parameters, kinds[side](named, lr=0.045, clipping_scale=2.0)

    row, steps = {"values": {}}, 8
    built = {side: make(side) for side in kinds}
    g = torch.Generator().manual_seed(1)
    for _ in range(25):
        for pairs in zip(*(built[side][0] for side in kinds)):
            noise = torch.randn(pairs[0].shape, generator=g) * 0.01
            for parameter in pairs:
                parameter.grad = noise.clone()
        for parameters, optimiser in built.values():
            optimiser.step()
    row["values"]["parameters after 25 steps"] = float(f"{max(worst(a, b) for a, b in zip(built['ours'][0], built['official'][0])):.2g}")

    def task(optimiser):
        def run():
            for _ in range(steps):
                optimiser.step()

        return run

    for _, optimiser in built.values():
        optimiser.param_groups[0]["lr"] = 1e-8
    tasks = {side: task(optimiser) for side, (_, optimiser) in built.items()}
    row["time"], row["seconds"] = {}, {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found, medians = in_turns(tasks, rounds)
        row["time"][f"step, {threads} thread{'s' * (threads > 1)}"] = round(found, 3)
        row["seconds"][f"step, {threads} thread{'s' * (threads > 1)}"] = {side: float(f"{value / steps:.3g}") for side, value in medians.items()}
    torch.set_num_threads(1)
    peaks = {side: peak_bytes(run) for side, run in tasks.items()}
    state = {
        side: sum(v.untyped_storage().nbytes() for s in optimiser.state.values() for v in s.values() if isinstance(v, torch.Tensor)) for side, (_, optimiser) in built.items()
    }
    row["memory"] = {"state": round(state["ours"] / state["official"], 3), "peak": round(peaks["ours"] / peaks["official"], 3)}
    row["bytes"] = {side: {"state": state[side], "peak": peaks[side]} for side in kinds}
    row["tensors"] = len(shapes)
    row["parameters"] = sum(p.numel() for p in built["ours"][0])
    return row


# ---- the table ---------------------------------------------------------------------------------


def ratio(a, b):
    return round(a / b, 3) if b else (1.0 if a == b else None)


def measure(part, rounds):
    fresh_compiler()
    models = pair(part)
    torch.set_num_threads(1)
    row = {"draw": part.draw, "values": compared(models, part), "time": {}, "seconds": {}}
    trains = bool(list(models["ours"].parameters())) or part.name.split()[0] != "CompactRelPositionalEncoding"
    for kind in ("training", "evaluation") if trains else ("evaluation",):
        for threads in (1, 2):
            found, without, medians = timed(models, part, rounds, threads, kind)
            key = f"{kind}, {threads} thread{'s' * (threads > 1)}"
            row["time"][key] = round(found, 3)
            if without:
                row["time"][f"{key}, theirs uncompiled"] = round(without, 3)
            row["seconds"][key] = {side: float(f"{value:.3g}") for side, value in medians.items()}
    torch.set_num_threads(1)
    found = memory(models, part)
    row["memory"] = {kind: ratio(found["ours"][i], found["official"][i]) for i, kind in enumerate(("kept", "peak"))}
    row["bytes"] = {side: dict(zip(("kept", "peak"), values)) for side, values in found.items()}
    return row


def table(record):
    lines = [
        "# Parts of the Zipformer: ours against the official package", "",
        "Ratios ours / official: below 1, ours needs less. Differences are relative to the largest value of a tensor. How it was measured: `benchmarks/zipformer_parts.py`.", "",
        "| part | output | gradients | training, 1 thread | 2 threads | evaluation, 1 thread | 2 threads | training, theirs uncompiled | evaluation, theirs uncompiled | kept bytes | peak bytes | ours compiled |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def number(value, form="{:.2f}"):
        return "–" if value is None else form.format(value)

    for name, row in record["parts"].items():
        values, times = row["values"], row["time"]
        output = max((v for k, v in values.items() if k.startswith(("output", "parameters after"))), default=None)
        gradients = max((v for k, v in values.items() if k.startswith("gradients")), default=None)
        if "tensors" in row:
            columns = [number(times["step, 1 thread"]), number(times["step, 2 threads"]), "–", "–", "–", "–", number(row["memory"]["state"]), number(row["memory"]["peak"]), "–"]
        else:
            columns = [number(times.get(f"{kind}, {n}")) for kind in ("training", "evaluation") for n in ("1 thread", "2 threads")]
            columns += [number(times.get(f"{kind}, 1 thread, theirs uncompiled")) for kind in ("training", "evaluation")]
            columns += [number(row["memory"]["kept"]), number(row["memory"]["peak"]), number(row.get("compiled, 1 thread"))]
        lines.append(f"| {name} | {number(output, '{:.0e}')} | {number(gradients, '{:.0e}')} | " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="rows whose name holds one of these; the others stay as they were stored")
    parser.add_argument("--no-compile", action="store_true", help="leave our compiled parts out")
    parser.add_argument("--compile-only", action="store_true", help="measure our compiled parts, and keep the other numbers as they were stored")
    args = parser.parse_args()
    need_official()
    rows, missing = {}, []
    if (args.only or args.compile_only) and RESULTS.exists():
        rows = json.loads(RESULTS.read_text())["parts"]
    chosen = [part for part in parts() if not args.only or any(word in part.name for word in args.only)]
    order = [part.name for part in parts()] + [OPTIMISER]

    def write():
        record = {
            "parts": {name: rows[name] for name in order if name in rows},
            "not built yet": missing,
            "sizes": dict(frames=FRAMES, batch=BATCH, heads=HEADS, query=QUERY, position=POSITION, value=VALUE, pos_dim=POS_DIM),
            "command": "python benchmarks/zipformer_parts.py --rounds (see each row)",
            "versions": {
                "python": platform.python_version(), "torch": torch.__version__, "speechlearn": speechlearn.__version__, "zipformer": importlib.metadata.version("zipformer"),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            },
        }
        RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        RESULTS.with_suffix(".md").write_text(table(record))

    def attempt(name, task):
        try:
            row = task() | {"rounds": args.rounds}
        except NotBuilt as error:
            missing.append(name)
            print(f"{name}: left out, {error}", flush=True)
            return
        kept = {key: rows[name][key] for key in ("compiled, 1 thread", "not compiled because") if name in rows and key in rows[name]}
        rows[name] = row | kept
        print(name, json.dumps({key: row[key] for key in ("values", "time", "memory")}), flush=True)
        write()

    if not args.compile_only:
        for part in chosen:
            attempt(part.name, lambda part=part: measure(part, args.rounds))
        if not args.only or any(word in OPTIMISER for word in args.only):
            attempt(OPTIMISER, lambda: optimisers(args.rounds))
    why = no_compiler()
    for part in () if args.no_compile else chosen:  # last, because it lasts longest
        if part.name in rows:
            found = (None, why) if why else compiled(pair(part), part, args.rounds)
            rows[part.name]["compiled, 1 thread"], rows[part.name]["not compiled because"] = found
            print(part.name, "compiled:", *found, flush=True)
            write()


if __name__ == "__main__":
    main()
