"""The training loop: its arithmetic, its limits, what it refuses, and many processes."""

import io
import json
import math
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from speechlearn.resume import load_best, read_metrics
from speechlearn.training import (
    Average,
    DivergedError,
    Run,
    TrainConfig,
    Watcher,
    batch_ids,
    describe_history,
    learning_rate_factor,
    loss_parts,
    make_optimiser,
    plot_history,
    train,
)


class Weight(nn.Module):
    """One weight that should double its input."""

    def __init__(self, w=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, batch):
        x, y = batch
        return ((self.w * x - y) ** 2).mean()


ONE = [(torch.tensor([3.0]), torch.tensor([6.0]))]


class Adder(nn.Module):
    def __init__(self, dropout=0.2):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 1))

    def loss(self, numbers):
        return {"loss": ((self.net(numbers)[:, 0] - numbers.sum(dim=1)) ** 2).mean(), "n_items": len(numbers)}


def adder(**settings):
    torch.manual_seed(0)
    return Adder(**settings)


def numbers(n=24):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(1))


def loader(size=4, *, shuffle=True, n=24):
    return DataLoader(numbers(n), batch_size=size, shuffle=shuffle)


def config(**changes):
    return TrainConfig(**({"n_steps": 12, "schedule": "constant", "accelerator": "cpu"} | changes))


def go(model, data, valid=None, **settings):
    settings = {"config": config(), "show": "none"} | settings
    return train(model, data, valid, **settings)


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"n_steps": 0}, "n_steps must be a whole number of at least 1 or None, got 0"),
        ({"n_steps": True}, "n_steps must be a whole number"),
        ({"n_steps": None}, "never end"),
        ({"max_seconds": -1}, "max_seconds must be a positive number or None"),
        ({"learning_rate": 0}, "learning_rate must be a positive number, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be"),
        ({"schedule": "linear"}, "'cosine', 'constant', 'noam' or a function"),
        ({"schedule_over": "minutes"}, "'steps' or 'seconds'"),
        ({"schedule_over": "seconds"}, "needs max_seconds"),
        ({"schedule": "cosine", "n_steps": None, "max_seconds": 9}, "a cosine over steps needs n_steps"),
        ({"schedule": "noam"}, "needs warmup_steps of at least 1"),
        ({"schedule": "cosine", "warmup_steps": 12}, "fewer than n_steps"),
        ({"warmup_steps": -1}, "warmup_steps must be"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"clip_norm": 0}, "clip_norm must be a positive number or None"),
        ({"accumulate": 0}, "accumulate must be"),
        ({"average": 1.0}, "average must lie between"),
        ({"validate_every": 0}, "validate_every must be .* or None"),
        ({"seed": -1}, "seed must be"),
        ({"precision": "8"}, "precision must be"),
    ],
)
def test_settings_are_checked_when_made(wrong, text):
    with pytest.raises(ValueError, match=text):
        config(**wrong)


@pytest.mark.parametrize("wrong", [{"n_steps": 2.5}, {"learning_rate": "fast"}, {"betas": (0.9,)}, {"average": "yes"}])
def test_settings_of_a_wrong_type_are_refused(wrong):
    with pytest.raises((ValueError, TypeError)):  # the second where types are checked at run time
        config(**wrong)


def test_settings_are_frozen_and_become_json():
    made = config(schedule=learning_rate_factor)
    with pytest.raises(AttributeError):
        made.n_steps = 5
    assert json.loads(json.dumps(made.to_dict()))["schedule"] == "function learning_rate_factor"
    assert TrainConfig(**config().to_dict() | {"betas": (0.9, 0.98)}) == config()


# ------------------------------------------------------------------------------------------------ schedules


def test_cosine_by_hand():
    made = config(schedule="cosine", n_steps=12, warmup_steps=4)
    got = [learning_rate_factor(step, made) for step in (0, 1, 3, 4, 6, 8, 10, 12, 99)]
    half = math.sqrt(0.5)
    assert got == pytest.approx([0.25, 0.5, 1, 1, (1 + half) / 2, 0.5, (1 - half) / 2, 0, 0])


def test_cosine_agrees_with_torch():
    weights = [nn.Parameter(torch.zeros(1))]
    optimiser = torch.optim.SGD(weights, lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=20)
    for step in range(20):
        assert learning_rate_factor(step, config(schedule="cosine", n_steps=20)) == pytest.approx(optimiser.param_groups[0]["lr"])
        optimiser.step()
        theirs.step()


def test_noam_is_the_papers_with_the_peak_as_learning_rate():
    d_model, warmup = 256, 40
    made = config(schedule="noam", warmup_steps=warmup, learning_rate=(d_model * warmup) ** -0.5)
    for step in (0, 10, 38, 39, 40, 400):
        s = step + 1
        paper = d_model**-0.5 * min(s**-0.5, s * warmup**-1.5)
        assert made.learning_rate * learning_rate_factor(step, made) == pytest.approx(paper)
    assert learning_rate_factor(39, made) == pytest.approx(1.0)


def test_constant_after_warm_up():
    made = config(warmup_steps=2)
    assert [learning_rate_factor(step, made) for step in range(4)] == [0.5, 1, 1, 1]


def test_cosine_over_seconds():
    made = config(schedule="cosine", schedule_over="seconds", n_steps=None, max_seconds=10.0, warmup_steps=4)
    assert learning_rate_factor(1, made, seconds=0.0) == 0.5
    assert learning_rate_factor(50, made, seconds=5.0) == pytest.approx(0.5)
    assert learning_rate_factor(50, made, seconds=12.0) == 0


def test_own_schedule_gets_step_and_progress():
    made = config(schedule=lambda step, progress: step + progress, n_steps=10)
    assert learning_rate_factor(5, made) == 5.5
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="the schedule gave .* at step 3"):
            learning_rate_factor(3, config(schedule=lambda step, progress: wrong))


def test_the_schedule_reaches_the_optimiser_and_the_record():
    result = go(adder(), loader(), config=config(schedule="cosine", warmup_steps=3, learning_rate=0.1))
    expected = [0.1 * learning_rate_factor(step, config(schedule="cosine", warmup_steps=3)) for step in range(12)]
    assert [line["learning_rate"] for line in result.history] == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------------------------------------ arithmetic


def test_plain_descent_by_hand():
    model = Weight()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    result = go(model, ONE, optimiser=sgd, config=config(n_steps=2, clip_norm=None))
    # w = 1: loss 9, slope -18. w = 1.9: loss 0.09, slope -1.8. w = 1.99.
    assert result.losses == pytest.approx([9.0, 0.09], rel=1e-5)
    assert [line["grad_norm"] for line in result.history] == pytest.approx([18.0, 1.8], rel=1e-5)
    assert model.w.item() == pytest.approx(1.99, rel=1e-6)


def test_clipping_limits_the_step_not_the_record():
    model = Weight()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    result = go(model, ONE, optimiser=sgd, config=config(n_steps=1, clip_norm=2.0))
    assert model.w.item() == pytest.approx(1.1, rel=1e-5)  # 1 + 0.05 · 2
    assert result.history[0]["grad_norm"] == pytest.approx(18.0)


def test_the_loop_is_a_plain_loop_bit_for_bit():
    batches = [numbers()[i : i + 4] for i in range(0, 24, 4)]
    model = adder(dropout=0.0)
    made = config(learning_rate=0.01)
    optimiser = make_optimiser(model, made)
    losses = []
    for step in range(12):
        loss = model.loss(batches[step % 6])["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    ours = adder(dropout=0.0)
    assert go(ours, batches, config=made).losses == losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), ours.parameters()))


def test_accumulating_two_batches_is_one_of_twice_the_size():
    def losses(size, accumulate):
        batches = [numbers()[i : i + size] for i in range(0, 24, size)]
        result = go(adder(dropout=0.0), batches, config=config(accumulate=accumulate, learning_rate=0.01))
        return [line[name] for line in result.history for name in ("loss", "grad_norm")]

    assert losses(4, 2) == pytest.approx(losses(8, 1), rel=1e-5)
    assert losses(4, 1) != pytest.approx(losses(8, 1), rel=1e-2)


def test_weight_decay_pulls_matrices_only():
    groups = make_optimiser(adder(), config(weight_decay=0.3)).param_groups
    assert [(g["weight_decay"], [p.ndim for p in g["params"]]) for g in groups] == [(0.3, [2, 2]), (0.0, [1, 1])]
    with pytest.raises(ValueError, match="nothing to train"):
        make_optimiser(nn.ReLU(), config())


def test_average_by_hand():
    model = Weight(0.0)
    average = Average(model, 0.5)
    for value in (1.0, 3.0):
        with torch.no_grad():
            model.w.fill_(value)
        average.update(model)
    # decay at most (1 + n) / (10 + n): 2/11, then 3/12. mean: 9/11 · 1, then 9/11 · 1/4 + 3 · 3/4
    assert average.mean["w"].item() == pytest.approx(9 / 11 / 4 + 9 / 4)
    with pytest.raises(KeyError), average.applied(model):
        assert model.w.item() == average.mean["w"].item()
        raise KeyError
    assert model.w.item() == 3.0


def test_averaged_weights_are_validated_kept_and_returned(tmp_path):
    seen = []
    model = adder()
    made = config(average=0.5, validate_every=12)
    go(model, loader(), loader(shuffle=False), config=made, directory=tmp_path, on_validation=lambda m, step: seen.append(m.net[0].weight.clone()))
    plain = adder()
    go(plain, loader())
    assert torch.equal(model.net[0].weight, seen[0]) and not torch.equal(model.net[0].weight, plain.net[0].weight)
    best = Adder()
    assert load_best(best, tmp_path) == 12
    assert torch.equal(best.net[0].weight, seen[0])


def test_bfloat16_runs_and_stays_near():
    half = go(adder(dropout=0.0), loader(), config=config(precision="bf16-mixed")).losses
    assert half != go(adder(dropout=0.0), loader()).losses
    assert half == pytest.approx(go(adder(dropout=0.0), loader()).losses, rel=0.05)


# ------------------------------------------------------------------------------------------------ validation


def test_validation_weights_batches_by_their_items():
    data = numbers(10)
    model = adder()
    result = go(model, loader(), DataLoader(data, batch_size=4), config=config(n_steps=1))
    with torch.no_grad():
        expected = model.loss(data)["loss"].item()
    [line] = [line for line in result.history if "valid_loss" in line]
    assert line["valid_loss"] == pytest.approx(expected, rel=1e-6) == result.best and result.best_step == 1


def test_validation_disturbs_nothing():
    def losses(**settings):
        return go(adder(), loader(), loader(shuffle=True), **settings).losses

    def greedy(model, step):
        torch.rand(step)
        return {"wer": 1.0}

    assert losses(config=config()) == losses(config=config(validate_every=1), on_validation=greedy)


def test_validation_runs_in_evaluation_mode_without_gradients():
    modes = []

    def look(model, step):
        modes.append((model.training, torch.is_grad_enabled(), step))

    go(adder(), loader(), config=config(validate_every=5), on_validation=look)
    assert modes == [(False, False, 5), (False, False, 10), (False, False, 12)]


def test_best_by_another_metric(tmp_path):
    errors = iter([0.5, 0.2, float("nan"), 0.4])
    made = config(validate_every=3, best_by="wer")
    result = go(adder(), loader(), loader(), config=made, directory=tmp_path, on_validation=lambda m, s: {"wer": next(errors)})
    assert (result.best, result.best_step) == (0.2, 6)
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 6
    assert [line["valid_wer"] for line in result.history if "valid_wer" in line][:2] == [0.5, 0.2]


def test_a_missing_metric_is_named():
    with pytest.raises(ValueError, match="best_by is 'wer', but validation gave only loss"):
        go(adder(), loader(), loader(), config=config(best_by="wer"))


def test_an_empty_validation_set_is_refused():
    with pytest.raises(ValueError, match="validation loader gave no batch"):
        go(adder(), loader(), [])


# ------------------------------------------------------------------------------------------------ budget, records


def test_a_time_budget_ends_the_run():
    result = go(adder(), loader(), config=config(n_steps=None, max_seconds=0.2))
    assert 0.2 <= result.seconds < 2 and result.step > 1
    both = go(adder(), loader(), config=config(n_steps=3, max_seconds=60.0))
    assert both.step == 3


def test_metrics_are_json_lines_and_equal_the_history(tmp_path):
    result = go(adder(), loader(), loader(), config=config(log_every=5, validate_every=6), directory=tmp_path)
    assert read_metrics(tmp_path) == result.history
    assert [(line["step"], "loss" in line) for line in result.history] == [(5, True), (6, False), (10, True), (12, True), (12, False)]
    each = go(adder(), loader()).losses
    assert result.losses == pytest.approx([sum(each[:5]) / 5, sum(each[5:10]) / 5, sum(each[10:]) / 2], rel=1e-12)


def test_other_scalars_are_written_down():
    class Two(Adder):
        def loss(self, numbers):
            return super().loss(numbers) | {"ctc": torch.tensor([2.0]), "n_frames": 7}

    line = go(Two(), loader(), config=config(n_steps=1, accumulate=2)).history[0]
    assert (line["ctc"], line["n_frames"]) == (2.0, 7.0) and "n_items" not in line


def test_without_a_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert go(adder(), loader(), loader()).directory is None
    assert not list(tmp_path.iterdir())


def test_only_the_last_and_best_files_stay(tmp_path):
    go(adder(), loader(), loader(), config=config(validate_every=2, checkpoint_every=3), directory=tmp_path)
    kinds = sorted(re.sub(r"\d+", "N", path.name) for path in tmp_path.iterdir())
    assert kinds == ["best-N.safetensors", "best.json", "last.json", "metrics.jsonl", "state-N.safetensors", "weights-N.safetensors"]


def test_the_callers_random_numbers_and_the_seed():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = Adder()
    torch.set_rng_state(before)
    first = go(adder(), loader(), config=config(seed=1)).losses
    torch.set_rng_state(before)
    go(model, loader())
    assert torch.equal(torch.get_rng_state(), before)
    assert first != go(adder(), loader(), config=config(seed=2)).losses
    assert first == go(adder(), loader(), config=config(seed=1)).losses


def test_loss_function_of_the_caller_and_on_step():
    steps = []
    model = Weight()
    result = train(
        model, ONE, config=config(n_steps=2), loss=lambda m, batch: 2 * m(batch), on_step=lambda m, step: steps.append(step), show="none"
    )
    assert result.losses[0] == 18.0 and steps == [0, 1] and not model.training


# ------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_the_step(tmp_path, bad):
    class Sick(Adder):
        def loss(self, batch):
            return super().loss(batch["numbers"])["loss"]

    data = [{"numbers": numbers()[i : i + 4].clone(), "ids": [f"utt-{i + k}" for k in range(4)]} for i in range(0, 24, 4)]
    data[4]["numbers"][2, 1] = bad
    model = Sick()
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf) at step 5, epoch 0, batch 5 with utt-16, utt-17, utt-18, utt-19\.") as caught:
        go(model, data, config=config(checkpoint_every=2), directory=tmp_path)
    assert f"The last good state is in {tmp_path}" in str(caught.value)
    assert all(p.isfinite().all() for p in model.parameters())
    assert json.loads((tmp_path / "last.json").read_text())["step"] == 4


def test_a_gradient_that_is_no_number_stops_before_the_step():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.0))

        def forward(self, batch):
            return self.w.sqrt()  # value 0, slope infinite

    model = Root()
    with pytest.raises(DivergedError, match="the length of the gradient is inf at step 1.*No state was saved yet"):
        go(model, [torch.zeros(1)])
    assert model.w.item() == 0


@pytest.mark.parametrize(
    "result, text",
    [
        (3.0, "must return its loss.*got float"),
        (None, "got NoneType"),
        ({"ctc": torch.tensor(1.0)}, "a dict with 'loss'"),
        (torch.ones(2), r"'loss' must be one number, got a tensor of shape \(2,\)"),
        ({"loss": torch.tensor(1.0), "text": "hello"}, "'text' must be one number, got str"),
    ],
)
def test_losses_that_are_none(result, text):
    with pytest.raises(TypeError, match=text):
        loss_parts(result)


def test_batch_ids_from_dicts_objects_and_nothing():
    class Batch:
        ids = ["a", "b"]

    assert batch_ids(Batch()) == batch_ids({"ids": ("a", "b")}) == ["a", "b"]
    assert batch_ids({}) == batch_ids((1, 2)) == []


# ------------------------------------------------------------------------------------------------ watching


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_shows_step_loss_and_time_left(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    go(adder(), loader(), config=config(n_steps=40), show="bar", on_step=lambda m, s: torch.linalg.inv(torch.rand(200, 200)))
    shown = screen.getvalue()
    assert re.search(r"100%.*step 40, loss [\d.]+, 0:00 left", shown)


def test_the_bar_is_silent_in_a_log_file(capsys):
    go(adder(), loader(), show="auto")
    assert capsys.readouterr() == ("", "")


def test_the_plot_is_renewed_in_one_display_and_says_what_it_shows(monkeypatch):
    import IPython.display

    shown = []

    class Handle:
        def update(self, picture):
            shown.append(("update", picture))

    def display(picture, display_id):
        shown.append(("display", picture))
        return Handle()

    monkeypatch.setattr(IPython.display, "display", display)
    go(adder(), loader(), loader(), show="plot")
    assert [what for what, _ in shown] == ["display", "update"]
    assert re.fullmatch(r"Training loss goes from [\d.]+ at step 1 to [\d.]+ at step 12\. Validation loss is [\d.]+ at step 12\.", shown[-1][1].alt)


def test_time_left_is_proportional_and_unknown_ways_to_show_are_refused():
    with pytest.raises(ValueError, match="show must be"):
        go(adder(), loader(), show="loud")

    watcher = object.__new__(Watcher)
    watcher.began, watcher.began_at = time.monotonic() - 30.0, 0.2
    run = object.__new__(Run)
    run.config, run.step = config(n_steps=10), 2
    assert watcher.seconds_left(run) is None
    run.step = 5
    assert watcher.seconds_left(run) == pytest.approx(50.0, abs=1.0)  # 0.3 took 30 s, 0.5 is left


def test_plot_and_description_of_a_history():
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "valid_loss": 1.5}]
    ax = plot_history(history)
    assert [line.get_xydata().tolist() for line in ax.lines] == [[[1, 2], [2, 1]], [[2, 1.5]]]
    assert describe_history([]) == "No step has been taken yet."
    import matplotlib.pyplot as plt

    plt.close(ax.figure)
    assert plot_history([], ax=plt.figure().add_subplot()).lines[:] == []
    plt.close("all")


def test_light_imports():
    code = "import sys, speechlearn.checkpoint, speechlearn.training; print({'lightning_fabric', 'matplotlib', 'IPython'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ------------------------------------------------------------------------------------------------ many processes

SCRIPT = """
import os, sys
import torch
from torch import nn
from torch.utils.data import DataLoader
from speechlearn.training import TrainConfig, train

class Adder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    def loss(self, numbers):
        return {"loss": ((self.net(numbers)[:, 0] - numbers.sum(dim=1)) ** 2).mean(), "n_items": len(numbers)}

def stop(model, step):
    if step == int(sys.argv[3]):
        sys.stdout.flush()
        os._exit(1)

rank = int(os.environ.get("RANK", 0))
torch.manual_seed(rank)  # the first process decides the weights
model = Adder()
numbers = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
config = TrainConfig(n_steps=14, learning_rate=0.01, accumulate=int(sys.argv[2]), validate_every=4, average=0.9, accelerator="cpu", best_by="wer")
seen = []
result = train(model, DataLoader(numbers, batch_size=4, shuffle=True), DataLoader(numbers, batch_size=5), config=config, directory=sys.argv[1],
               resume="auto", on_step=stop, on_validation=lambda m, s: seen.append(s) or {"wer": 1 / s}, show="bar")
print(f"rank {rank}: {len(seen)} decoded, best {result.best}, sum {sum(float(p.double().sum()) for p in model.parameters()):.9f}", flush=True)
"""


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def start(launcher, name, accumulate, stop=-1):
        command = [*launcher, tmp_path / "script.py", tmp_path / name, str(accumulate), str(stop)]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=120)

    one, two = start([sys.executable], "one", 2), start(torchrun, "two", 1)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    lines_one, lines_two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert len(lines_one) == len(lines_two) == 14 + 4
    for a, b in zip(lines_one, lines_two):
        for name in set(a) - {"seconds", "epoch"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
    reports = sorted(re.findall(r"rank (\d): (\d) decoded, best ([\d.]+), sum ([-\d.]+)", two.stdout))
    assert [r[:3] for r in reports] == [("0", "4", str(1 / 14)), ("1", "0", str(1 / 14))]
    assert reports[0][3] == reports[1][3]  # both hold the same weights at the end

    assert start(torchrun, "stopped", 1, stop=9).returncode != 0
    assert start(torchrun, "stopped", 1).returncode == 0
    again = read_metrics(tmp_path / "stopped")
    assert [line.get("loss") for line in again] == [line.get("loss") for line in lines_two]
    alone = start([sys.executable], "stopped", 1)
    assert alone.returncode != 0 and "torchrun --nproc-per-node 2" in alone.stderr
