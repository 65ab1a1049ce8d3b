"""Every stored output of the public reference, one test for each file.

    pytest tests/test_golden.py [--golden-dir FOLDER ...]

A folder holds safetensors files that describe themselves (tests/golden/README.md). Outputs and gradients of inputs must lie within 1e-5 of the tensor's
largest absolute value, gradients of parameters within 1e-4. A file whose module is unknown fails. Files of modules that the book has not built yet are named
below with their chapter; such a test turns red as soon as the module exists, so that its name must be deleted.
"""
import contextlib
import importlib
import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from speechlearn.zipformer import activations
from speechlearn.zipformer.scaling import ScheduledFloat, set_batch_count

OUTPUT, PARAMETER = 1e-5, 1e-4

# Where each class of the reference is: (version, name) -> module:attribute. Version 1 is the Zipformer of 2022.
CLASSES = {
    (2, "ActivationDropoutAndLinear"): "zipformer.activations:ActivationDropoutAndLinear",
    (2, "Balancer"): "zipformer.balancer:Balancer",
    (2, "BiasNorm"): "zipformer.normalisation:BiasNorm",
    (2, "BypassModule"): "zipformer.resampling:BypassModule",
    (2, "ChunkCausalDepthwiseConv1d"): "zipformer.scaling:ChunkCausalDepthwiseConv1d",
    (2, "CompactRelPositionalEncoding"): "zipformer.attention:CompactRelPositionalEncoding",
    (2, "Conv2dSubsampling"): "zipformer.convolution:Conv2dSubsampling",
    (2, "ConvNeXt"): "zipformer.convolution:ConvNeXt",
    (2, "ConvolutionModule"): "zipformer.convolution:ConvolutionModule",
    (2, "FeedforwardModule"): "zipformer.convolution:FeedforwardModule",
    (2, "Joiner"): "alignment.transducer:Joiner",
    (2, "NonlinAttention"): "zipformer.attention:NonlinAttention",
    (2, "RelPositionMultiheadAttentionWeights"): "zipformer.attention:RelPositionMultiheadAttentionWeights",
    (2, "SelfAttention"): "zipformer.attention:SelfAttention",
    (2, "SimpleDownsample"): "zipformer.resampling:SimpleDownsample",
    (2, "SimpleUpsample"): "zipformer.resampling:SimpleUpsample",
    (2, "Whiten"): "zipformer.whitening:Whiten",
    (2, "Zipformer2"): "zipformer.encoder:Zipformer2",
    (2, "Zipformer2EncoderLayer"): "zipformer.layer:Zipformer2EncoderLayer",
    (2, "Decoder"): "models:BalancedDecoder",
    (1, "ActivationBalancer"): "zipformer.balancer:ActivationBalancer",
    (1, "AttentionCombine"): "zipformer.resampling:AttentionCombine",
    (1, "AttentionDownsample"): "zipformer.resampling:AttentionDownsample",
    (1, "BasicNorm"): "zipformer.normalisation:BasicNorm",
    (1, "Conv2dSubsampling"): "zipformer.convolution:FirstConv2dSubsampling",
    (1, "DoubleSwish"): "zipformer.activations:DoubleSwish",
    (1, "Joiner"): "alignment.transducer:Joiner",
    (1, "PoolingModule"): "zipformer.convolution:PoolingModule",
    (1, "SimpleCombiner"): "zipformer.resampling:SimpleCombiner",
    (1, "SimpleUpsample"): "zipformer.resampling:FirstSimpleUpsample",
    (1, "Whiten"): "zipformer.whitening:FirstWhiten",
    (1, "Decoder"): "alignment.transducer:Decoder",
    (1, "RelPositionMultiheadAttention"): "zipformer.v1:RelPositionMultiheadAttention",
    (1, "ConvolutionModule"): "zipformer.v1:ConvolutionModule",
    (1, "FeedforwardModule"): "zipformer.v1:FeedforwardModule",
    (1, "ZipformerEncoderLayer"): "zipformer.v1:ZipformerEncoderLayer",
    (1, "Zipformer"): "zipformer.v1:Zipformer",
    (1, "fn:penalize_abs_values_gt"): "zipformer.scaling:penalize_abs_values_gt",
    (1, "fn:softmax"): "zipformer.scaling:softmax",
    (1, "fn:_whitening_metric"): "zipformer.whitening:whitening_metric",
}

# Modules of later chapters, by the name in the files (for tables of the first version: by the name of the file).
NOT_BUILT_YET = {
}


class Worst:
    """The worst relative errors of each component, for the table at the end."""

    rows: dict = {}

    @classmethod
    def note(cls, component, kind, value):
        row = cls.rows.setdefault(component, {"output": None, "grad input": None, "grad params": None})  # None: nothing to compare
        row[kind] = max(row[kind] or 0.0, value)


class Case:
    """A golden file."""

    def __init__(self, path):
        self.path, self.tensors = Path(path), load_file(path)
        with safe_open(path, "pt") as file:
            self.meta = json.loads(file.metadata()["meta"])
        if "params_from" in self.meta:
            other = load_file(self.path.with_stem(self.meta["params_from"]))
            self.tensors = self.tensors | {key: value for key, value in other.items() if key.startswith("params.")}
        self.version = 1 if "derivative" in self.meta or "kind" in self.meta else 2
        self.module = self.meta.get("module") or self.path.stem
        self.name, _, self.method = (self.module, "", self.meta.get("method")) if self.version == 1 else self.module.partition(".")
        if self.version == 2 and self.module.startswith("AsrModel"):
            self.name, self.method = self.module, ""

    def chapter(self):
        """The later chapter that builds this, or None."""
        key = (self.version, self.name)
        return next((chapter for chapter, names in NOT_BUILT_YET.items() if key in names or (self.version, self.module) in names), None)

    def group(self, prefix):
        return {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}

    def compare(self, what, ours, stored, bound, kind):
        assert ours is not None, f"{what}: the reference has a value, ours is missing"
        assert tuple(ours.shape) == tuple(stored.shape), f"{what} has shape {tuple(ours.shape)}, the reference {tuple(stored.shape)}"
        if not stored.is_floating_point():
            assert torch.equal(ours.to(stored.dtype), stored), f"{what} differs from the reference"
            return
        if stored.numel() == 0:
            return
        error = float((ours.detach().double() - stored.double()).abs().max() / stored.double().abs().max().clamp(min=1e-30))
        if stored.abs().max() == 0:
            error = float(ours.detach().abs().max())
        Worst.note(f"{self.name}{' (2022)' if self.version == 1 else ''}", kind, error)
        assert error <= bound, f"{what}: the worst relative difference is {error:.2e}, allowed are {bound:.0e}"


@contextlib.contextmanager
def pinned(case, exact=True):
    """Chance as the file says; exact slopes in the backward of the activations."""
    meta, replaced = case.meta, []

    def replace(owner, name, value):
        replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def results(prefix):
        keys = sorted((k for k in case.tensors if k.startswith(prefix)), key=lambda k: int(k.rsplit(".", 1)[1]))
        values = iter([case.tensors[k] for k in keys])

        def draw(*args, **kwargs):
            value = next(values, None)
            assert value is not None, f"more random tensors are drawn than the file has of {prefix}*"
            return value.clone()

        return draw

    replace(random, "random", lambda: meta.get("branch_draw", 0.999999))
    if "randint" in meta:
        replace(random, "randint", lambda low, high: meta["randint"])
    if any(k.startswith("draw.") for k in case.tensors):
        draw = results("draw.")
        replace(torch, "rand", draw)
        replace(torch, "randint", draw)
    if any(k.startswith("noise.") for k in case.tensors):
        replace(torch, "rand_like", results("noise."))
    if exact and meta.get("derivative") != "uint8":
        for kind, function in ((activations.SwooshL, activations.swoosh_l), (activations.SwooshR, activations.swoosh_r), (activations.DoubleSwish, activations.double_swish)):
            replace(kind, "forward", lambda self, x, function=function: function(x))
    try:
        yield
    finally:
        for owner, name, value in reversed(replaced):
            setattr(owner, name, value)


RATES = ("dropout_p", "p", "attention_skip_rate", "conv_skip_rate", "const_attention_rate", "ff2_skip_rate", "ff3_skip_rate", "skip_rate", "straight_through_rate",
         "pos_emb_skip_rate", "layerdrop_rate")


def set_number(module, name, value):
    if isinstance(getattr(module, name, None), torch.nn.Module):
        delattr(module, name)  # torch lets no number take the place of a module
    setattr(module, name, value)


def attribute_of(target):
    where, _, name = target.partition(":")
    return getattr(importlib.import_module(f"speechlearn.{where}"), name)


def build(case):
    """The module of a file, with its parameters, mode and pins."""
    if (case.version, case.name) in BUILDERS:
        return prepared(case, BUILDERS[case.version, case.name](case))
    kind = attribute_of(CLASSES[case.version, case.name])
    kwargs = {key: tuple(value) if isinstance(value, list) else value for key, value in case.meta.get("kwargs", {}).items() if key != "left_context_len" or case.method != "streaming_forward"}
    return prepared(case, kind(**kwargs))


def prepared(case, module):
    """Mode, parameters and pins of a file."""
    module.train(case.meta["mode"] != "eval")
    if case.version == 1 and case.meta["mode"] == "eval":
        for part in module.modules():  # the first version's balancers and whiteners act in evaluation, too
            if hasattr(part, "acts_in_evaluation"):
                part.acts_in_evaluation = True
    parameters = case.group("params.")
    if case.version == 1 and case.name == "Decoder" or case.name == "Joiner" or parameters or list(module.state_dict()):
        module.load_state_dict(parameters, strict=True)
    if case.meta.get("rates_zeroed"):
        for part in module.modules():
            for name in RATES:
                if hasattr(part, name) and isinstance(getattr(part, name), (int, float, ScheduledFloat)) and not isinstance(getattr(part, name), bool):
                    set_number(part, name, 0.0)
    if case.meta.get("batch_count") is not None:
        set_batch_count(module, case.meta["batch_count"])
    for where, value in (case.meta.get("overrides") or {}).items():
        *parents, name = where.split(".")
        set_number(module.get_submodule(".".join(parents)), name, value)
    return module


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


def run_module(case):
    """Call, backward, and compare everything that is stored."""
    function = attribute_of(CLASSES[case.version, case.name]) if case.name.startswith("fn:") else None
    module = None if function else build(case)
    inputs, lists = {}, {}
    skip = set(case.meta.get("no_grad", ()))
    for key, value in {**case.group("input."), **{f"inputs.{k}": v for k, v in case.group("inputs.").items()}}.items():
        if value.is_floating_point() and key not in skip and f"grad_input.{key}" in case.tensors:
            value = value.clone().requires_grad_()
        name, _, place = key.partition(".")
        (lists.setdefault(name, {}).__setitem__(int(place), value) if place else inputs.__setitem__(key, value))
    flat = dict(inputs) | {f"{name}.{i}": value for name, values in lists.items() for i, value in values.items()}
    inputs |= {name: [values[i] for i in sorted(values)] for name, values in lists.items()}
    call = dict(case.meta.get("call") or {})
    if case.method == "streaming_forward" and "left_context_len" in case.meta.get("kwargs", {}):
        call["left_context_len"] = case.meta["kwargs"]["left_context_len"]
    with pinned(case):
        outputs = (function or getattr(module, case.method or "forward"))(**inputs, **call)
        compare_outputs(case, outputs)
        if "grad_output" in case.tensors:
            second = case.tensors.get("grad_output.attn_weights")
            torch.autograd.backward([first(outputs)] + ([] if second is None else [outputs[1]]), [case.tensors["grad_output"]] + ([] if second is None else [second]))
    if "grad_output" not in case.tensors:
        return
    for key, stored in case.group("grad_input.").items():
        case.compare(f"the gradient of {key}", flat[key].grad, stored, OUTPUT, "grad input")
    if module is None:
        return
    gradients, names = case.group("grads."), dict(module.named_parameters())
    assert set(gradients) <= set(names), f"the reference has gradients of {sorted(set(gradients) - set(names))}"
    for key, stored in gradients.items():
        case.compare(f"the gradient of {key}", names[key].grad, stored, PARAMETER, "grad params")
    for key, stored in case.group("whiten_prob_after.").items():
        part = module if key == "self" else module.get_submodule(key)
        assert part.prob == pytest.approx(float(stored)), f"prob of {key} after the backward"
    for key, stored in case.group("balancer_count_after.").items():
        part = module if key == "self" else module.get_submodule(key)
        assert int(part.count) == int(stored), f"count of {key} after the backward"


def compare_outputs(case, outputs):
    if "output" in case.tensors:
        case.compare("the output", first(outputs), case.tensors["output"], OUTPUT, "output")
    later = list(outputs[1:]) if isinstance(outputs, tuple) else []
    for key in case.meta.get("outputs", ["output"])[1:]:
        case.compare(key, later.pop(0), case.tensors[f"output.{key}"], OUTPUT, "output")
    for key in ("output_lens", "new_cache", "new_cached_key", "new_cached_val", "new_cached_left_pad", "new_cached_x", "new_cached_nonlin_attn", "new_cached_val1", "new_cached_val2", "new_cached_conv1", "new_cached_conv2"):
        if key in case.tensors:
            case.compare(key, later.pop(0), case.tensors[key], OUTPUT, "output")
    if "metric" in case.tensors and case.name == "Whiten":
        from speechlearn.zipformer.whitening import whitening_metric

        case.compare("the metric", whitening_metric(case.tensors["input.x"], case.meta["kwargs"]["num_groups"]).reshape(case.tensors["metric"].shape), case.tensors["metric"], OUTPUT, "output")


# ---- files that are not one call of one module ---------------------------------------------------------------------


def run_decoder(case):
    """The stateless predictor; the current one has balancers behind it, and the first one a ReLU also without context."""
    module, call = build(case), case.meta.get("call") or {}
    with pinned(case):
        out = module(**case.group("input."), **call)
        case.compare("the output", out, case.tensors["output"], OUTPUT, "output")
        if "grad_output" not in case.tensors:
            return
        out.backward(case.tensors["grad_output"])
    for key, parameter in module.named_parameters():
        if f"grads.{key}" in case.tensors:
            case.compare(f"the gradient of {key}", parameter.grad, case.tensors[f"grads.{key}"], PARAMETER, "grad params")


def run_activations(case):
    g = case.tensors
    for name, value, slope, encode, decode in (
        ("swoosh_l", activations.swoosh_l, activations.swoosh_l_slope, (-0.08, 0.925), (-0.08, 0.925)),
        ("swoosh_r", activations.swoosh_r, activations.swoosh_r_slope, (-0.08, 0.925), (-0.08, 0.925)),
        ("double_swish", activations.double_swish, activations.double_swish_slope, (-0.044, 1.2), (-0.043637, 1.2)),
    ):
        x = g.get(f"{name}.x", g["x"]).clone().requires_grad_()
        y = value(x)
        case.compare(f"{name}", y, g[f"{name}.output"], OUTPUT, "output")
        y.backward(g["grad_output"])
        case.compare(f"the gradient of {name}", x.grad, g[f"{name}.grad_input_exact"], OUTPUT, "grad input")
        codes = activations.quantised(slope(x.detach(), y.detach()), *encode, g[f"{name}.noise"])
        off = (codes.int() - g[f"{name}.code_uint8"].int()).abs()
        assert off.max() <= 1 and off.float().mean() <= 0.001 + 1 / off.numel(), f"{name}: the codes differ"
        same = off == 0
        case.compare(f"the rounded gradient of {name}", (g["grad_output"] * activations.restored(codes, *decode))[same], g[f"{name}.grad_input_quantised"][same], OUTPUT, "grad input")


def run_double_swish_uint8(case):
    module, x = build(case).train(), case.tensors["input.x"].clone().requires_grad_()  # the reference rounds in evaluation, too
    with pinned(case):
        y = module(x)
        y.backward(case.tensors["grad_output"])
    case.compare("the output", y, case.tensors["output"], OUTPUT, "output")
    stored = case.tensors["grad_input.x"]
    step = 0.0048770 * case.tensors["grad_output"].abs()
    off = (x.grad - stored).abs()
    near = off <= 1e-5 * stored.abs().max()
    assert (near | (off <= 1.01 * step)).all() and (~near).float().mean() <= 0.001, "more than one element in a thousand falls to another level"


def run_double_swish_expectation(case):
    g = case.tensors
    x = g["x"]
    exact = activations.double_swish_slope(x.double(), activations.double_swish(x.double()))
    case.compare("the exact slope", exact, g["exact_derivative_f64"], OUTPUT, "grad input")
    step, draws = float(g["step"]), int(g["n_draws"])
    noise = torch.rand(draws, len(x), generator=torch.Generator().manual_seed(0))
    rounded = activations.restored(activations.quantised(exact.float().expand(draws, -1), -0.043637, 1.2, noise), -0.043637, 1.2)
    assert ((rounded.double().mean(dim=0) - exact).abs() <= 5 * step / (2 * draws**0.5) + 1e-6).all(), "the rounding is biased"
    assert (rounded - exact).abs().max() <= step


def run_schedules(case):
    from speechlearn.zipformer.scaling import PiecewiseLinear

    pairs = case.meta["kwargs"]
    for key, points in pairs.items():
        function = PiecewiseLinear(*map(tuple, points))
        case.compare(key, torch.tensor([function(float(x)) for x in case.tensors["x"]]), case.tensors[key], OUTPUT, "output")
    a, b = PiecewiseLinear(*map(tuple, pairs["y.1"])), PiecewiseLinear(*map(tuple, pairs["y.2"]))
    combined = {"op.add": a + b, "op.add_const": a + 0.25, "op.mul": a * 3.0, "op.max": a.max(b), "op.min": a.min(b), "op.max_const": a.max(0.06), "op.min_const": a.min(0.06)}
    for key, function in combined.items():
        assert all(ours == pytest.approx(stored) for ours, stored in zip(function.pairs, map(tuple, pairs[key]), strict=True)), key
    s, t = ScheduledFloat(*map(tuple, pairs["y.1"]), default=0.7), ScheduledFloat(*map(tuple, pairs["y.2"]), default=0.1)
    values = [float(s)]
    s.batch_count = 1000
    values.append(float(s))
    values.append(float(s.eval()))
    s.train()
    total, larger = s + t, s.max(0.8)
    total.batch_count = 1000
    values.append(float(total))
    total.batch_count = None
    values += [float(total), float(larger)]
    larger.batch_count = 3000
    values.append(float(larger))
    case.compare("ScheduledFloat", torch.tensor(values), case.tensors["scheduled_float"], OUTPUT, "output")


def run_helpers(case):
    from speechlearn.zipformer import normalisation, scaling

    g = case.tensors

    def gradient(function, name):
        x = g[f"{name}.x"].clone().requires_grad_()
        y = function(x)
        y.backward(g[f"{name}.grad_output"])
        case.compare(name, x.grad, g[f"{name}.grad_input"], OUTPUT, "grad input")
        if f"{name}.output" in g:
            case.compare(name, y, g[f"{name}.output"], OUTPUT, "output")

    low, high = g["limit.min_max"].tolist()
    limit, penalty = g["penalize.limit_penalty"].tolist()
    gradient(lambda x: normalisation.limit_param_value(x, low, high, prob=1.0), "limit")
    gradient(lambda x: scaling.penalize_abs_values_gt(x, limit, penalty), "penalize")
    gradient(scaling.ScaleGrad(g["scale_grad.alpha"].item()), "scale_grad")
    gradient(lambda x: scaling.softmax(x, -1), "softmax")
    original, torch.rand = torch.rand, lambda *args, **kwargs: g["dropout3.draw"]
    try:
        gradient(scaling.Dropout3(g["dropout3.p"].item(), shared_dim=0), "dropout3")
    finally:
        torch.rand = original
    for n in (4, 9):
        case.compare("convert", scaling.convert_num_channels(g["convert.x"], n), g[f"convert.to{n}"], OUTPUT, "output")
    estimator, answers, cutoffs = scaling.CutoffEstimator(g["cutoff.p"].item()), [], []
    for x in g["cutoff.x"].tolist():
        answers.append(float(estimator(x)))
        cutoffs.append(estimator.cutoff)
    case.compare("CutoffEstimator", torch.tensor(answers), g["cutoff.answer"], OUTPUT, "output")
    case.compare("its threshold", torch.tensor(cutoffs), g["cutoff.cutoff_after"], OUTPUT, "output")


def run_scaled_init(case):
    from speechlearn.zipformer.scaling import ScaledConv1d, ScaledLinear

    for key, kind in (("linear", ScaledLinear), ("conv1d", ScaledConv1d)):
        torch.manual_seed(case.meta["seed"])
        layer = kind(**case.meta[key])
        for name in ("weight", "bias"):
            case.compare(f"{key}.{name}", getattr(layer, name), case.tensors[f"{key}.{name}"], OUTPUT, "output")


def run_conv2d_schedules(case):
    from speechlearn.zipformer.convolution import Conv2dSubsampling

    module = Conv2dSubsampling(case.meta["kwargs"]["in_channels"], case.meta["kwargs"]["out_channels"], dropout=ScheduledFloat((0, 0.3), (20000, 0.1))).train()
    rows = []
    for name in case.meta["names"]:
        part = module.get_submodule(name)
        row = []
        for count in case.meta["counts"]:
            part.batch_count = count
            row.append(float(part))
        rows.append(row)
    case.compare("schedules", torch.tensor(rows), case.tensors["values"], OUTPUT, "output")


def run_schedules_of_encoder(case):
    module = fresh(case)
    rows = [[value_at(module.get_submodule(name), count) for count in case.meta["counts"]] for name in case.meta["names"]]
    case.compare("schedules", torch.tensor(rows), case.tensors["values"], OUTPUT, "output")


def fresh(case):
    """An encoder whose parameters play no role."""
    from speechlearn.zipformer.encoder import Zipformer2

    return Zipformer2(**case.meta["kwargs"]).train()


def value_at(schedule, count):
    schedule.batch_count = count
    return float(schedule)


def encoder_of(case):
    """A stack, from the arguments of its layer; with a factor: at a lower rate."""
    from speechlearn.zipformer.encoder import DownsampledZipformer2Encoder, Zipformer2Encoder
    from speechlearn.zipformer.layer import Zipformer2EncoderLayer

    kwargs = dict(case.meta["kwargs"])
    layer = Zipformer2EncoderLayer(**kwargs.pop("layer"))
    factor = kwargs.pop("downsample", 1)
    stack = Zipformer2Encoder(layer, **{"pos_dim": 12, "dropout": 0.0, "warmup_begin": 0.0, "warmup_end": 1.0} | kwargs)
    return stack if factor == 1 else DownsampledZipformer2Encoder(stack, layer.embed_dim, factor, 0.0, layer.conv_module1.causal)


def first_encoder_of(case):
    from speechlearn.zipformer import v1

    def stack(kwargs):
        kwargs = dict(kwargs)
        return v1.ZipformerEncoder(v1.ZipformerEncoderLayer(**kwargs.pop("encoder_layer")), **kwargs)

    kwargs = dict(case.meta["kwargs"])
    return v1.DownsampledZipformerEncoder(stack(kwargs.pop("encoder")), **kwargs) if "encoder" in kwargs else stack(kwargs)


def first_model(case):
    from speechlearn.zipformer.v1 import Zipformer

    return Zipformer(**case.meta["kwargs"]).train()


def run_first_positions(case):
    from speechlearn.zipformer.v1 import RelPositionalEncoding

    module = RelPositionalEncoding(**case.meta["kwargs"]).eval()
    for name in sorted(case.tensors, key=lambda name: name.endswith("afterwards")):
        case.compare(name, module(torch.zeros(int(re.search(r"T(\d+)", name)[1]), 1, 1)), case.tensors[name], OUTPUT, "output")


def run_first_feature_masks(case):
    model = first_model(case)
    with pinned(case):
        masks = model.get_feature_masks(torch.zeros(case.meta["num_frames"], case.meta["batch_size"], 1))
    for i, mask in enumerate(masks):
        case.compare(f"mask {i}", mask, case.tensors[f"mask.{i}"], OUTPUT, "output")


def run_layer_drop(case):
    from speechlearn.zipformer.v1 import layers_to_drop

    g = {name: values.tolist() for name, values in case.tensors.items()}
    for i, n_layers in enumerate(g["num_layers"]):
        begin, part, warmups = g["warmup_begin"][i], (1.0 / n_layers) * (g["warmup_end"][i] - g["warmup_begin"][i]), []
        for _ in range(n_layers):
            warmups.append((begin, begin + part))
            begin += part
        ours = layers_to_drop(g["batch_count"][i], g["module_seed"][i], g["rnd_seed"][i], warmups)
        assert ours == {layer for layer, gone in enumerate(g["dropped"][i]) if gone}, f"row {i}"
    Worst.note("layer_drop (2022)", "output", 0.0)


def run_first_lengths(case):
    from speechlearn.zipformer.convolution import encoder_lengths, subsampled_lengths

    case.compare("after the front end", subsampled_lengths(case.tensors["x_lens"]), case.tensors["after_front_end"], OUTPUT, "output")
    assert encoder_lengths(case.tensors["x_lens"]).tolist() == case.tensors["output"].tolist()
    Worst.note("lengths (2022)", "output", 0.0)


def run_first_masks(case):
    from speechlearn.data.batches import is_padding

    mask = is_padding(case.tensors["lengths"], case.tensors["mask"].shape[1])
    for name, stored in case.tensors.items():
        if name.startswith("mask"):
            assert torch.equal(mask[:, :: int(name.removeprefix("mask").removeprefix("_ds") or 1)], stored.bool()), name
    Worst.note("masks (2022)", "output", 0.0)


def run_first_schedules(case):
    from speechlearn.zipformer.v1 import Zipformer, bypass_minimum, dynamic_dropout

    model = Zipformer(16, encoder_dims=(8, 8), attention_dim=(8, 8), encoder_unmasked_dims=(8, 8), nhead=(2, 2), feedforward_dim=(8, 8), num_encoder_layers=(1, 1), cnn_module_kernels=(3, 3))
    rows = {"bypass_minimum": bypass_minimum, "dynamic_dropout": dynamic_dropout, "layer_skip_dropout": lambda count: (setattr(model, "batch_count", count), model.skip_dropout())[1]}
    for name, function in rows.items():
        case.compare(name, torch.tensor([function(float(count)) for count in case.tensors["batch_count"]], dtype=torch.float64), case.tensors[name], OUTPUT, "output")


def run_skip_wiring(case):
    from speechlearn.zipformer.v1 import skip_layers

    for name, stored in case.tensors.items():
        ours = skip_layers([int(factor) for factor in name.split("_")])
        assert [-1 if j is None else j for j in ours] == stored.tolist(), name
    Worst.note("skip_wiring (2022)", "output", 0.0)


def run_first_init(case):
    torch.manual_seed(case.meta["seed"])
    model = first_model(case)
    stacks = [getattr(stack, "encoder", stack) for stack in model.encoders]
    assert [stack.module_seed for stack in stacks] == [int(case.tensors[f"module_seed.{i}"]) for i in range(len(stacks))]
    parameters = {name: parameter.detach().double().flatten() for name, parameter in model.named_parameters()}
    assert set(parameters) == set(case.group("stats."))
    for name, p in parameters.items():
        case.compare(name, torch.stack([torch.tensor(float(len(p)), dtype=p.dtype), p.sum(), p.square().sum(), p[0], p[-1]]), case.tensors[f"stats.{name}"], OUTPUT, "output")


def run_feature_masks(case):
    module = fresh(case)
    n_utterances = case.tensors["draw.0"].shape[1]
    with pinned(case):
        masks = module.get_feature_masks(torch.zeros(3, n_utterances, 16))
    for i, mask in enumerate(masks):
        case.compare(f"mask {i}", mask, case.tensors[f"mask.{i}"], OUTPUT, "output")
    assert len(masks) == len(case.group("mask."))


def run_chunk_masks(case):
    from speechlearn.zipformer.encoder import chunk_attention_mask

    for name, stored in case.group("mask.").items():
        chunk, left = (int(n) for n in re.fullmatch(r"chunk(\d+)\.left(-?\d+)", name).groups())
        assert torch.equal(chunk_attention_mask(len(stored), chunk, left), stored.bool()), name
    Worst.note(case.name, "output", 0.0)


def run_encoder_stream(case):
    g, module = case.tensors, build(case)
    chunk = case.meta["kwargs"]["chunk_size"][0]
    with torch.no_grad():
        n_utterances = g["x"].shape[1]
        states = module.get_init_states(n_utterances)
        for j in range(len(g["x"]) // chunk):
            piece = g["x"][chunk * j : chunk * (j + 1)]
            out, lens, states = module.streaming_forward(piece, torch.full((n_utterances,), chunk), states, g[f"chunk.{j}.mask"].bool())
            case.compare(f"chunk {j}", out, g[f"chunk.{j}.output"], OUTPUT, "output")
            assert lens.tolist() == g[f"chunk.{j}.lens"].tolist()
            for q, state in enumerate(states):
                if f"chunk.{j}.state.{q}" in g:
                    case.compare(f"state {q} after chunk {j}", state, g[f"chunk.{j}.state.{q}"], OUTPUT, "output")
        full, lens = module(g["x"], torch.full((n_utterances,), len(g["x"])))
    case.compare("the whole with a mask", full, g["simulated.output"], OUTPUT, "output")
    assert lens.tolist() == g["simulated.lens"].tolist()


def run_streaming_model(case):
    from speechlearn.zipformer.convolution import Conv2dSubsampling
    from speechlearn.zipformer.encoder import Zipformer2
    from speechlearn.zipformer.streaming import StreamingEncoder

    g, kwargs = case.tensors, case.meta["kwargs"]
    front_end, encoder = Conv2dSubsampling(**kwargs["encoder_embed"]), Zipformer2(**kwargs["encoder"])
    front_end.load_state_dict(case.group("params.encoder_embed."), strict=True)
    encoder.load_state_dict(case.group("params.encoder."), strict=True)
    stream = StreamingEncoder(front_end, encoder)
    state, j = stream.start(bins=kwargs["encoder_embed"]["in_channels"]), 0
    cache = front_end.get_init_states(1)
    for first in range(0, g["features"].shape[1] - stream.window + 1, stream.hop):
        piece = g["features"][:, first : first + stream.window]
        embed, _, cache = front_end.streaming_forward(piece, torch.tensor([piece.shape[1]]), cache)
        case.compare(f"embedding {j}", embed, g[f"chunk.{j}.embed"], OUTPUT, "output")
        out, state = stream.accept(state, piece if first == 0 else piece[:, stream.window - stream.hop :])
        case.compare(f"chunk {j}", out, g[f"chunk.{j}.output"], OUTPUT, "output")
        assert state.processed.tolist() == g[f"chunk.{j}.processed_lens"].tolist()
        j += 1
    assert f"chunk.{j}.output" not in g
    with torch.no_grad():
        embed, lens = front_end(g["features"], torch.tensor([g["features"].shape[1]]))
        case.compare("the embedding at once", embed, g["simulated.embed"], OUTPUT, "output")
        full, _ = encoder(embed.transpose(0, 1), lens)
    case.compare("the output at once", full.transpose(0, 1), g["simulated.output"], OUTPUT, "output")


def run_balancer_probability(case):
    from speechlearn.zipformer.balancer import acting_probability

    for key in ("min_prob_0.1", "min_prob_0.25"):
        ours = torch.tensor([acting_probability(int(calls), float(key.rpartition("_")[2])) for calls in case.tensors["count"]])
        case.compare(f"the probability of acting with {key}", ours, case.tensors[key], OUTPUT, "output")


def run_conv2d_streaming(case):
    g, module, state = case.tensors, build(case), None
    state = module.get_init_states(1)
    with torch.no_grad():
        full, lens = module(g["x"], torch.tensor([g["x"].shape[1]]))
        case.compare("the full output", full, g["full.output"], OUTPUT, "output")
        for j in range(3):
            chunk = g["x"][:, 8 * j : 8 * j + 21]
            out, lens, state = module.streaming_forward(chunk, torch.tensor([chunk.shape[1]]), state)
            case.compare(f"chunk {j}", out, g[f"chunk.{j}.output"], OUTPUT, "output")
            case.compare(f"state {j}", state, g[f"chunk.{j}.state"], OUTPUT, "output")
            assert lens.tolist() == g[f"chunk.{j}.lens"].tolist()


def run_compact_positions(case):
    """The table, and what some frames need of it; how many these are stands in the notes."""
    n_frames, left = (int(re.search(pattern, case.meta["notes"])[1]) for pattern in (r"input has (\d+) frames", r"left_context_len=(\d+)"))
    module = build(case)
    case.compare("the table", module.pe, case.tensors["full_table"], OUTPUT, "output")
    case.compare("the rows", module(torch.zeros(n_frames, 1, 1), left_context_len=left), case.tensors["output"], OUTPUT, "output")


def asr_model_of(case):
    from speechlearn.models import AsrModel
    from speechlearn.zipformer.convolution import Conv2dSubsampling
    from speechlearn.zipformer.encoder import Zipformer2

    k = case.meta["kwargs"]
    return AsrModel(Conv2dSubsampling(**k["encoder_embed"]), Zipformer2(**k["encoder"]), max(k["encoder"]["encoder_dim"]), k["vocab_size"], use_transducer=False, use_ctc=True)


def padded_targets(g):
    return torch.nn.utils.rnn.pad_sequence(g["targets"].split(g["target_lengths"].tolist()), batch_first=True)


def run_ctc_model(case):
    """Features to loss, and back."""
    g, model = case.tensors, prepared(case, asr_model_of(case))
    model.ctc_output[0].p = 0.0
    x = g["x"].clone().requires_grad_()
    with pinned(case), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape[0] if isinstance(shape[0], tuple) else shape, 0.75))  # nothing is masked
        out, lens = model.forward_encoder(x, g["x_lens"])
        loss = model.forward_ctc(out, lens, padded_targets(g), g["target_lengths"])
        # The stored gradients rest on torch's CTC in 32 bits, which is further from 64 bits than ours (chapter 13). So that the model is compared and not these
        # roundings, the gradient comes from torch's here; tests/test_ctc.py compares the two losses and their gradients in 64 bits.
        (ours,) = torch.autograd.grad(loss, x, retain_graph=True)
        theirs = torch.nn.functional.ctc_loss(model.ctc_output(out).transpose(0, 1), g["targets"], lens, g["target_lengths"], blank=0, reduction="sum")
        theirs.backward()
    case.compare("the encoder's output", out, g["encoder_out"], OUTPUT, "output")
    case.compare("the lengths", lens, g["encoder_out_lens"], OUTPUT, "output")
    case.compare("the log-probabilities", model.ctc_output(out), g["log_probs"], OUTPUT, "output")
    case.compare("the loss", loss[None], g["ctc_loss"], OUTPUT, "output")
    if "grad_input" in g:
        case.compare("the gradient of the features", x.grad, g["grad_input"], OUTPUT, "grad input")
        assert (ours - x.grad).abs().max() < PARAMETER * x.grad.abs().max(), "the gradient of our own CTC loss"
    parameters = dict(model.named_parameters())
    for name, stored in case.group("grads.").items():
        case.compare(f"the gradient of {name}", parameters[name].grad, stored, PARAMETER, "grad params")


def run_cr_ctc(case):
    from speechlearn.models import AsrModel

    g = case.tensors
    model = AsrModel(torch.nn.Identity(), torch.nn.Identity(), g["encoder_out"].shape[2], case.meta["kwargs"]["vocab_size"], use_transducer=False, use_ctc=True).train()
    model.load_state_dict(case.group("params."), strict=True)
    model.ctc_output[0].p = 0.0
    x, targets = g["encoder_out"].clone().requires_grad_(), padded_targets(g)
    twice = len(x) // len(targets)
    ctc, consistency = model.forward_cr_ctc(x, g["encoder_out_lens"], targets.repeat(twice, 1), g["target_lengths"].repeat(twice))
    factor = float(g["ctc_loss"] / ctc.detach())
    assert factor == pytest.approx(1.0, rel=1e-4) or factor == pytest.approx(2.0, rel=1e-4), factor  # the reference halves later, with all losses
    factor = round(factor)
    case.compare("the CTC loss", factor * ctc[None], g["ctc_loss"], OUTPUT, "output")
    case.compare("the consistency loss", factor * consistency[None], g["cr_loss"], OUTPUT, "output")
    (factor * (ctc + 0.2 * consistency)).backward()
    case.compare("the gradient of the encoder's output", x.grad, g["grad_input"], OUTPUT, "grad input")
    parameters = dict(model.named_parameters())
    for name, stored in case.group("grads.").items():
        case.compare(f"the gradient of {name}", parameters[name].grad, stored, PARAMETER, "grad params")


def run_attention_decoder(case):
    from speechlearn.models import AttentionDecoderModel

    g, model = case.tensors, prepared(case, AttentionDecoderModel(**case.meta["kwargs"]))
    real = g["ys_out"] != case.meta["kwargs"]["ignore_id"]
    target_lengths = real.sum(dim=1) - 1
    targets = g["ys_out"][:, : int(target_lengths.max())]
    ys_in, ys_out, lens = model.with_ends(targets, target_lengths)
    assert torch.equal(ys_in, g["ys_in"]) and torch.equal(ys_out, g["ys_out"]) and torch.equal(lens, g["ys_in_lens"])
    memory = g["memory"].clone().requires_grad_()
    logits = model.decoder(ys_in, lens, memory, g["memory_lens"])
    case.compare("the logits", logits[real], g["logits"][real], OUTPUT, "output")
    case.compare("the log-probabilities of the symbols", model.nll(memory, g["memory_lens"], targets, target_lengths), g["nll"], OUTPUT, "output")
    loss = model(memory, g["memory_lens"], targets, target_lengths)
    case.compare("the loss", loss[None], g["loss"], OUTPUT, "output")
    loss.backward()
    case.compare("the gradient of the memory", memory.grad, g["grad_input"], OUTPUT, "grad input")
    parameters = dict(model.named_parameters())
    for name, stored in case.group("grads.").items():
        if name.endswith("linear_k.bias"):  # shifts all keys, which a softmax does not notice: the true gradient is 0, and both hold rounding errors
            size = g[f"grads.{name.replace('bias', 'weight')}"].abs().max()
            assert parameters[name].grad.abs().max() < 1e-5 * size and stored.abs().max() < 1e-5 * size, name
            continue
        case.compare(f"the gradient of {name}", parameters[name].grad, stored, PARAMETER, "grad params")


def run_pruned_transducer(case):
    from torch import nn

    from speechlearn.alignment.pruned import pruned_transducer_losses
    from speechlearn.alignment.transducer import Decoder, Joiner

    g, k = case.tensors, case.meta["kwargs"]
    parts = nn.ModuleDict({
        "decoder": Decoder(k["vocab_size"], k["decoder_dim"], 0, k["context_size"]), "joiner": Joiner(k["encoder_dim"], k["decoder_dim"], k["joiner_dim"], k["vocab_size"]),
        "simple_am_proj": nn.Linear(k["encoder_dim"], k["vocab_size"]), "simple_lm_proj": nn.Linear(k["decoder_dim"], k["vocab_size"]),
    })
    parts.load_state_dict(case.group("params."), strict=True)
    targets = nn.utils.rnn.pad_sequence(g["targets"].split(g["target_lengths"].tolist()), batch_first=True)
    x = g["encoder_out"].clone().requires_grad_()
    simple, pruned = pruned_transducer_losses(x, targets, g["encoder_out_lens"], g["target_lengths"], **parts, blank=0, n_rows=k["prune_range"], lm_scale=k["lm_scale"], am_scale=k["am_scale"])
    case.compare("the simple loss", simple.sum()[None], g["simple_loss"], OUTPUT, "output")
    case.compare("the pruned loss", pruned.sum()[None], g["pruned_loss"], OUTPUT, "output")
    (0.5 * simple.sum() + pruned.sum()).backward()
    case.compare("the gradient of the encoder's output", x.grad, g["grad_input"], OUTPUT, "grad input")
    for name, parameter in parts.named_parameters():
        case.compare(f"the gradient of {name}", parameter.grad, g[f"grads.{name}"], PARAMETER, "grad params")


def follow(case, optimiser, parameters, gradients, states, before_step=lambda t: None):
    """A stored optimisation: the gradients go in, the parameters after each step are compared."""
    for t, (gradient, state) in enumerate(zip(gradients, states, strict=True)):
        for name, parameter in parameters.items():
            parameter.grad = gradient.get(name)
        before_step(t)
        optimiser.step()
        for name, parameter in parameters.items():
            case.compare(f"{name} after step {t}", parameter, state[name], OUTPUT, "output")


def run_scaled_adam(case):
    from speechlearn.optim import Eden, ScaledAdam

    states = [case.group(f"params.{t}.") for t in range(1 + max(int(key.split(".")[1]) for key in case.tensors if key.startswith("params.")))]
    gradients = [case.group(f"grad.{t}.") for t in range(len(states) - 1)]
    parameters, settings = {name: torch.nn.Parameter(value.clone()) for name, value in states[0].items()}, case.meta["kwargs"]
    if case.module == "ScaledAdam":
        optimiser = ScaledAdam(list(parameters.items()), **settings)
        follow(case, optimiser, parameters, gradients, states[1:])
        if "model_norms_after" in case.tensors:
            (memory,) = [state for state in optimiser.state.values() if "model_norms" in state]
            case.compare("the lengths of the last gradients", torch.tensor(memory["model_norms"]), case.tensors["model_norms_after"], OUTPUT, "output")
            case.compare("the threshold", torch.tensor(memory["model_norm_threshold"]), case.tensors["model_norm_threshold_after"].reshape(()), OUTPUT, "output")
        return
    settings = dict(settings["optimizer"])
    optimiser = ScaledAdam([{"named_params": [(group["name"], parameters[group["name"]])], "lr": group["lr"]} for group in settings.pop("groups")], **settings)
    scheduler = Eden(optimiser, **case.meta["kwargs"]["eden"])
    scheduler.step_epoch(1)

    def before_step(t):
        scheduler.step_batch(t + 1)
        case.compare(f"the rates of step {t}", torch.tensor(scheduler.get_last_lr()), case.tensors[f"lr.{t}"].float(), OUTPUT, "output")

    follow(case, optimiser, parameters, gradients, states[1:], before_step)


def run_first_scaled_adam(case):
    from speechlearn.optim import FirstScaledAdam

    values, gradients = case.group("param."), case.group("grad.")
    n_steps = len(case.tensors["lr"])
    parameters = {name: torch.nn.Parameter(value[0].clone()) for name, value in values.items()}
    optimiser = FirstScaledAdam(list(parameters.items()), **{key: tuple(value) if isinstance(value, list) else value for key, value in case.meta["kwargs"].items()})
    rows = lambda table, steps: [{name: value[t] for name, value in table.items()} for t in steps]
    last = n_steps if all(len(value) > n_steps for value in values.values()) else n_steps - 1
    follow(case, optimiser, parameters, rows(gradients, range(last)), rows(values, range(1, last + 1)), lambda t: optimiser.param_groups[0].update(lr=case.tensors["lr"][t].item()))


def run_eden(case):
    from speechlearn.optim import Eden, Eden2

    def rates(kind, batches, epochs, base_lr, **settings):
        scheduler, out = kind(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base_lr), **settings), []
        for batch, epoch in zip(batches, epochs, strict=True):
            scheduler.step_epoch(epoch)
            scheduler.step_batch(batch)
            out += scheduler.get_last_lr()
        return torch.tensor(out, dtype=torch.float64)

    g = case.tensors
    if case.version == 1:
        return case.compare("the rates", rates(Eden, g["batch"].tolist(), g["epoch"].tolist(), **case.meta["kwargs"]), g["lr"], OUTPUT, "output")
    for name, settings in case.meta["kwargs"].items():
        for epoch, row in zip(g["epochs"].tolist(), g[f"{name}.lr"], strict=True):
            case.compare(f"{name}, epoch {epoch}", rates(Eden, g["batches"].tolist(), [epoch] * len(row), **settings), row, OUTPUT, "output")
        without = {key: value for key, value in settings.items() if key != "lr_epochs"}
        case.compare(f"{name} of Eden2", rates(Eden2, g["batches"].tolist(), [0] * len(g["batches"]), **without), g[name.replace("eden", "eden2") + ".lr"].flatten(), OUTPUT, "output")


# Modules whose files hold the arguments of their parts.
BUILDERS = {
    (2, "Zipformer2Encoder"): encoder_of,
    (2, "DownsampledZipformer2Encoder"): encoder_of,
    (1, "ZipformerEncoder"): first_encoder_of,
    (1, "DownsampledZipformerEncoder"): first_encoder_of,
}

SPECIAL = {
    (2, "SwooshL, SwooshR, DoubleSwish (functions)"): run_activations,
    (2, "PiecewiseLinear, ScheduledFloat"): run_schedules,
    (2, "LimitParamValue, penalize_abs_values_gt, ScaleGrad, softmax, convert_num_channels, Dropout3 (shared_dim=0), CutoffEstimator"): run_helpers,
    (2, "Conv2dSubsampling (all ScheduledFloat attributes)"): run_conv2d_schedules,
    (2, "Conv2dSubsampling.streaming_forward"): run_conv2d_streaming,
    (2, "AsrModel with CTC head"): run_ctc_model,
    (2, "AsrModel.forward_cr_ctc"): run_cr_ctc,
    (2, "AsrModel.forward_transducer"): run_pruned_transducer,
    (2, "AttentionDecoderModel"): run_attention_decoder,
    (2, "CompactRelPositionalEncoding"): run_compact_positions,
    (2, "Zipformer2.get_feature_masks"): run_feature_masks,
    (2, "Zipformer2 chunk attention mask"): run_chunk_masks,
    (2, "Zipformer2 (all ScheduledFloat attributes)"): run_schedules_of_encoder,
    (2, "Zipformer2.streaming_forward"): run_encoder_stream,
    (2, "Conv2dSubsampling + Zipformer2, streaming"): run_streaming_model,
    (2, "ScaledAdam"): run_scaled_adam,
    (2, "ScaledAdam + Eden"): run_scaled_adam,
    (2, "Eden, Eden2"): run_eden,
    (1, "scaled_adam_clipped"): run_first_scaled_adam,
    (1, "scaled_adam_other_settings"): run_first_scaled_adam,
    (1, "scaled_adam_unclipped"): run_first_scaled_adam,
    (1, "eden"): run_eden,
    (1, "rel_positional_encoding_0"): run_first_positions,
    (1, "rel_positional_encoding_1"): run_first_positions,
    (1, "rel_positional_encoding_extend"): run_first_positions,
    (1, "feature_masks"): run_first_feature_masks,
    (1, "layer_drop"): run_layer_drop,
    (1, "lengths"): run_first_lengths,
    (1, "masks"): run_first_masks,
    (1, "schedules"): run_first_schedules,
    (1, "skip_wiring"): run_skip_wiring,
    (1, "zipformer_init"): run_first_init,
    (2, "Decoder"): run_decoder,
    (1, "Decoder"): run_decoder,
    (1, "double_swish_expectation"): run_double_swish_expectation,
    (1, "scaled_init"): run_scaled_init,
    (1, "activation_balancer_probability"): run_balancer_probability,
}


def run(path):
    """Compare one file. Raises: AssertionError: the worst difference, or an unknown module."""
    case = Case(path)
    if case.meta.get("derivative") == "uint8" and case.name == "DoubleSwish":
        return run_double_swish_uint8(case)
    special = SPECIAL.get((case.version, case.module))
    if special is not None:
        return special(case)
    if (case.version, case.name) not in CLASSES and (case.version, case.name) not in BUILDERS:
        raise AssertionError(f"{case.path.name} holds {case.module!r} of version {case.version}, which this runner does not know")
    return run_module(case)


def pytest_generate_tests(metafunc):
    if "golden_path" not in metafunc.fixturenames:
        return
    folders = metafunc.config.getoption("--golden-dir") or [str(Path(__file__).parent / "golden" / name) for name in ("zipformer", "zipformer_v1")]
    paths = [path for folder in folders for path in sorted(Path(folder).glob("*.safetensors"))]
    marked = []
    for path in paths:
        chapter = Case(path).chapter()
        marks = [pytest.mark.xfail(reason=f"chapter {chapter} builds it", strict=True)] if chapter else []
        marked.append(pytest.param(path, id=f"{path.parent.name}/{path.stem}", marks=marks))
    metafunc.parametrize("golden_path", marked)


def test_golden(golden_path):
    run(golden_path)


# ---- the runner itself ----------------------------------------------------------------------------------------------


@pytest.fixture
def own_rows(monkeypatch):
    """Wrong files made here do not enter the table."""
    monkeypatch.setattr(Worst, "rows", {})


def copy_of(tmp_path, name, change):
    source = Path(__file__).parent / "golden" / "zipformer" / f"{name}.safetensors"
    tensors = load_file(source)
    with safe_open(source, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
    change(tensors, meta)
    save_file(tensors, tmp_path / f"{name}.safetensors", metadata={"meta": json.dumps(meta)})
    return tmp_path / f"{name}.safetensors"


@pytest.mark.parametrize("key", ["output", "grad_input.x", "grads.bias", "params.bias"])
def test_runner_notices_one_changed_number(tmp_path, own_rows, key):
    def change(tensors, meta):
        tensors[key].flatten()[0] += 0.01 * tensors[key].abs().max()

    with pytest.raises(AssertionError, match="the worst relative difference"):
        run(copy_of(tmp_path, "bias_norm_0_train_quiet_pos", change))


def test_runner_notices_unknown_modules_wrong_keys_and_shapes(tmp_path, own_rows):
    with pytest.raises(AssertionError, match="does not know"):
        run(copy_of(tmp_path, "bias_norm_0_train_quiet_pos", lambda tensors, meta: meta.update(module="BiasNorm3")))
    with pytest.raises(RuntimeError, match="Missing key|size mismatch|Unexpected"):
        run(copy_of(tmp_path, "bias_norm_0_train_quiet_pos", lambda tensors, meta: tensors.pop("params.bias")))
    with pytest.raises(AssertionError, match="has shape"):
        run(copy_of(tmp_path, "bias_norm_0_train_quiet_pos", lambda tensors, meta: tensors.update(output=tensors["output"][:1].clone())))


def test_the_table_of_the_book_is_of_these_files():
    """The stored table names what is built, and nothing in it is above its bound."""
    folder = Path(__file__).parent
    stored = json.loads((folder.parent / "benchmarks" / "results" / "golden.json").read_text(encoding="utf-8"))["rows"]
    cases = [Case(path) for name in ("zipformer", "zipformer_v1") for path in (folder / "golden" / name).glob("*.safetensors")]
    assert set(stored) == {f"{case.name}{' (2022)' if case.version == 1 else ''}" for case in cases if not case.chapter()}
    for name, row in stored.items():
        for kind, value in row.items():
            assert value is None or value <= (PARAMETER if kind == "grad params" else OUTPUT), f"{name}, {kind}"
