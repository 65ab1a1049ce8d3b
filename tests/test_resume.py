"""Exact resume: nothing that the next step depends on may be missing from a saved run."""

import errno
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from speechlearn.checkpoint import CheckpointError
from speechlearn.resume import (
    Batches,
    derive_seed,
    generators,
    load_best,
    pack,
    random_state,
    random_state_kept,
    read_metrics,
    set_random_state,
    unpack,
)
from speechlearn.training import TrainConfig, train

# One process imports torch once, then forks a child for every run; a child that kills itself takes nothing else with it.
KILLS = """
import json, os, random, signal, sys
import numpy as np, torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
import lightning_fabric
from speechlearn.training import TrainConfig, train

torch.set_num_threads(1)
root = sys.argv[1]

class Numbers(Dataset):
    '''Draws from all three global generators, as careless data sets do.'''
    def __len__(self):
        return 42
    def __getitem__(self, i):
        return torch.full((4,), float(i)) / 42 + 0.1 * torch.rand(4) + 0.1 * random.random() + 0.1 * float(np.random.rand())

class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)
    def forward(self, x):
        return x + 0.05 * torch.randn(x.shape, generator=self.generator) if self.training else x

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(Noise(), nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1))
    def loss(self, x):
        return ((self.net(x)[:, 0] - x.sum(1)) ** 2).mean()

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def run(name, deadly_step=None, deadly_replace=None, deadly_fsync=None):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    def counted(function, deadly):
        calls = [0]
        def call(*args):
            calls[0] += 1
            if calls[0] == deadly:
                kill()
            return function(*args)
        return call
    os.replace = counted(os.replace, deadly_replace)
    os.fsync = counted(os.fsync, deadly_fsync)
    torch.manual_seed(0)
    config = TrainConfig(n_steps=30, learning_rate=0.02, warmup_steps=5, accumulate=2, average=0.9,
                         validate_every=6, checkpoint_every=4, log_every=3, accelerator="cpu")
    train(Net(), DataLoader(Numbers(), batch_size=5, shuffle=True), DataLoader(Numbers(), batch_size=8), config=config,
          directory=f"{root}/{name}", resume="auto", show="none",
          on_step=lambda model, step: kill() if step == deadly_step else None)
    os._exit(0)

codes = [run("whole")]
for step in (0, 1, 4, 5, 11, 17, 26, 29):
    codes += [run(f"step-{step}", deadly_step=step), run(f"step-{step}")]
for n in (1, 4, 7, 8, 9, 10):
    codes += [run(f"replace-{n}", deadly_replace=n), run(f"replace-{n}")]
for n in (7, 8, 13):
    codes += [run(f"fsync-{n}", deadly_fsync=n), run(f"fsync-{n}")]
codes += [run("often", deadly_step=s) for s in (3, 7, 8, 9, 20, 28)] + [run("often")]
print(json.dumps(codes))
"""


def lines_of(directory):
    lines = read_metrics(directory)
    for line in lines:
        line.pop("seconds", None)
    return [{name: value.hex() if isinstance(value, float) else value for name, value in line.items()} for line in lines]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this test forks; the system cannot")
def test_a_run_killed_anywhere_continues_bit_for_bit(tmp_path):
    (tmp_path / "kills.py").write_text(KILLS)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, tmp_path / "kills.py", tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    assert codes[0] == 0
    assert codes[1:35:2] == [9] * 17 and codes[2:35:2] == [0] * 17  # each was killed once, then came to its end
    assert codes[35:] == [9] * 6 + [0]
    whole = lines_of(tmp_path / "whole")
    assert len(whole) == 15 and len({line["loss"] for line in whole if "loss" in line}) == 10
    last = json.loads((tmp_path / "whole" / "last.json").read_text())
    best = json.loads((tmp_path / "whole" / "best.json").read_text())
    names = [path.name for path in sorted(tmp_path.iterdir()) if path.is_dir()]
    assert len(names) == 19
    for name in names:
        assert lines_of(tmp_path / name) == whole, name
        other = json.loads((tmp_path / name / "last.json").read_text())
        assert other["files"] == last["files"], f"{name}: final weights or state differ"
        assert json.loads((tmp_path / name / "best.json").read_text()) == best, name
        assert len(list((tmp_path / name).iterdir())) == 6, f"{name}: files were left behind"


class Adder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))

    def loss(self, numbers):
        return ((self.net(numbers)[:, 0] - numbers.sum(dim=1)) ** 2).mean()


def adder():
    torch.manual_seed(0)
    return Adder()


def numbers(n=24):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(1))


def config(**changes):
    return TrainConfig(**({"n_steps": 12, "schedule": "constant", "accelerator": "cpu", "checkpoint_every": 3} | changes))


def run(directory, *, resume=False, data=None, model=None, optimiser=None, **changes):
    loader = DataLoader(numbers() if data is None else data, batch_size=4, shuffle=True)
    return train(
        model or adder(), loader, config=config(**changes), directory=directory, resume=resume, optimiser=optimiser, show="none"
    )


# ------------------------------------------------------------------------------------------------ random numbers


def test_derived_seeds_differ_between_neighbours():
    seeds = {derive_seed(seed, what, epoch) for seed in range(20) for epoch in range(20) for what in ("order", "chance")}
    assert len(seeds) == 800 and all(0 <= seed < 2**32 for seed in seeds)
    assert derive_seed(0, "order", 1) == derive_seed(0, "order", 1)


def draws():
    return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal()


def test_random_state_restores_all_three_generators_even_half_used_gaussians():
    draws()  # gauss() of Python and numpy keep a second number for the next call
    state = random_state()
    first = draws()
    assert draws() != first
    set_random_state(unpack(json.loads(json.dumps(pack(state)[0])), pack(state)[1]))
    assert draws() == first


def test_random_state_kept_restores_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(KeyError), random_state_kept():
        torch.rand(5)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_generators_of_modules_are_found():
    class Mask(nn.Module):
        def __init__(self):
            super().__init__()
            self.dice = torch.Generator()

    model = nn.Sequential(nn.Linear(1, 1), Mask())
    assert generators(model) == {"1.dice": model[1].dice}


# ------------------------------------------------------------------------------------------------ the order of the batches


def taken(batches, n):
    return [next(batches).tolist() for _ in range(n)]


@settings(max_examples=30, deadline=None)
@given(items=st.integers(1, 20), size=st.integers(1, 5), position=st.integers(0, 30), seed=st.integers(0, 3))
def test_batches_continue_anywhere(items, size, position, seed):
    def fresh():
        return Batches(DataLoader(range(items), batch_size=size, shuffle=True), seed=seed)

    whole = taken(fresh(), position + 7)
    stopped = fresh()
    taken(stopped, position)
    if position == 0:
        stopped._open()
    continued = fresh()
    continued.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert taken(continued, 7) == whole[position:]


def test_every_item_comes_once_per_epoch_and_epochs_differ():
    batches = Batches(DataLoader(range(10), batch_size=3, shuffle=True), seed=0)
    epochs = [sum(taken(batches, 4), []) for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_depends_on_the_seed_only_and_not_on_the_callers_random_numbers():
    def order(seed, callers):
        torch.manual_seed(callers)
        return taken(Batches(DataLoader(range(10), batch_size=3, shuffle=True), seed=seed), 8)

    assert order(0, 1) == order(0, 2) != order(1, 1)
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(range(10), batch_size=3, shuffle=True, generator=generator)
    first = taken(Batches(loader, seed=0), 8)
    assert taken(Batches(loader, seed=0), 8) == first


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_processes_share_an_epoch_without_overlap_and_make_equally_many_steps(world):
    loader = DataLoader(range(10), batch_size=1, shuffle=True)
    shares = []
    for rank in range(world):
        batches = Batches(loader, seed=0, rank=rank, world=world)
        shares.append(sum(taken(batches, 10 // world), []))
        assert batches.epoch == 0
        next(batches)
        assert batches.epoch == 1
    together = sum(shares, [])
    assert len(together) == len(set(together)) == 10 // world * world


@pytest.mark.parametrize("world", [1, 2])
def test_a_list_of_batches_is_shared_and_continued_too(world):
    data = [torch.tensor([i]) for i in range(7)]
    whole = [taken(Batches(data, seed=0, rank=r, world=world), 9) for r in range(world)]
    for rank in range(world):
        stopped = Batches(data, seed=0, rank=rank, world=world)
        taken(stopped, 5)
        continued = Batches(data, seed=0, rank=rank, world=world)
        continued.load_state_dict(stopped.state_dict())
        assert taken(continued, 4) == whole[rank][5:]
    if world == 2:
        assert [b[0] for b in whole[0][:4]] == [0, 2, 4, 0] and [b[0] for b in whole[1][:4]] == [1, 3, 5, 1]


class Stream(IterableDataset):
    def __iter__(self):
        yield from torch.randperm(9)


def test_an_iterable_data_set_that_shuffles_at_its_start_continues():
    whole = taken(Batches(DataLoader(Stream(), batch_size=2), seed=0), 9)
    stopped = Batches(DataLoader(Stream(), batch_size=2), seed=0)
    taken(stopped, 3)
    torch.rand(7)  # the training has drawn something in between
    continued = Batches(DataLoader(Stream(), batch_size=2), seed=0)
    continued.load_state_dict(stopped.state_dict())
    assert taken(continued, 6) == whole[3:]


class Careless(Dataset):
    """Draws with the worker's own random numbers."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        return torch.rand(())


def test_worker_processes_arrive_at_the_same_random_numbers():
    def fresh():
        return Batches(DataLoader(Careless(), batch_size=2, num_workers=2), seed=0)

    whole = taken(fresh(), 6)
    stopped = fresh()
    taken(stopped, 3)
    continued = fresh()
    continued.load_state_dict(stopped.state_dict())
    assert taken(continued, 3) == whole[3:]


class Counting(Dataset):
    def __init__(self):
        self.epoch, self.loaded = None, []

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 6

    def __getitem__(self, i):
        self.loaded.append(i)
        return torch.tensor([i, self.epoch])


def test_set_epoch_reaches_the_data_set_and_done_batches_are_not_loaded_again():
    data = Counting()
    continued = Batches(DataLoader(data, batch_size=2), seed=0)
    state = {"epoch": 3, "position": 2}
    probe = Batches(DataLoader(Counting(), batch_size=2), seed=0)
    probe.epoch = 3
    probe._open()
    continued.load_state_dict(state | {"fingerprint": probe.state_dict()["fingerprint"]})
    assert next(continued).tolist() == [[4, 3], [5, 3]]
    assert data.loaded == [4, 5]
    assert next(continued).tolist() == [[0, 4], [1, 4]]


@pytest.mark.parametrize("empty", [[], iter([])])
def test_an_empty_loader_is_refused(empty):
    with pytest.raises(ValueError, match="gave no batch in epoch 0.*generator, which can be used only once"):
        next(Batches(empty, seed=0))


def test_a_generator_is_refused_in_its_second_epoch():
    batches = Batches((torch.tensor(i) for i in range(2)), seed=0)
    taken(batches, 2)
    with pytest.raises(ValueError, match="epoch 1"):
        next(batches)


def test_fewer_batches_than_processes_are_refused():
    with pytest.raises(ValueError, match="process 0 of 3"):
        next(Batches(DataLoader(range(2)), seed=0, rank=0, world=3))


# ------------------------------------------------------------------------------------------------ trees


leaves = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3)
    | st.tuples(inner, inner)
    | st.dictionaries(st.text(max_size=3) | st.integers(0, 5), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(trees)
def test_a_tree_survives_json(tree):
    packed, tensors = pack(tree)
    back = unpack(json.loads(json.dumps(packed, allow_nan=False)), tensors)
    assert repr(back) == repr(tree)  # repr tells 1 from 1.0 and from True, and -0.0 from 0.0


def test_tensors_are_taken_out_by_name():
    tree = {"state": {0: {"m": torch.arange(3)}, 1: (torch.ones(1), math_inf := float("inf"))}, "$odd": 1}
    packed, tensors = pack(tree)
    assert sorted(tensors) == ["state.0.m", "state.1.0"]
    back = unpack(json.loads(json.dumps(packed, allow_nan=False)), tensors)
    assert torch.equal(back["state"][0]["m"], torch.arange(3)) and back["state"][1][1] == math_inf and back["$odd"] == 1


def test_what_cannot_be_saved_is_named():
    with pytest.raises(TypeError, match=r"optimiser\.state\.1 is a set"):
        pack({"optimiser": {"state": [0, {1}]}})


# ------------------------------------------------------------------------------------------------ refusals


def test_a_finished_run_is_returned_as_it_was(tmp_path):
    first = run(tmp_path / "a")
    model = adder()
    again = run(tmp_path / "a", resume=True, model=model)
    assert again.losses == first.losses and again.step == 12 and again.seconds == first.seconds


def test_a_run_can_be_made_longer_and_is_then_the_long_run(tmp_path):
    long = run(tmp_path / "long")
    run(tmp_path / "a", n_steps=7)
    longer = run(tmp_path / "a", resume=True)
    assert longer.losses == long.losses and len(long.losses) == 12


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.Adagrad, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)])
def test_any_optimiser_continues(tmp_path, make):
    def go(directory, **more):
        model = adder()
        return run(directory, model=model, optimiser=make(model.parameters(), lr=0.01), **more)

    long = go(tmp_path / "long")
    go(tmp_path / "a", n_steps=5)
    assert go(tmp_path / "a", resume=True).losses == long.losses


def test_without_the_right_to_continue_a_run_is_not_touched(tmp_path):
    run(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with pytest.raises(ValueError, match="already holds a run. Continue it with resume=True"):
        run(tmp_path / "a")
    with pytest.raises(ValueError, match="learning_rate was 0.001 and is 0.1"):
        run(tmp_path / "a", resume=True, learning_rate=0.1)
    with pytest.raises(ValueError, match="n_steps was 12 and is 20"):
        run(tmp_path / "b", schedule="cosine")
        run(tmp_path / "b", resume=True, schedule="cosine", n_steps=20)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_other_data_are_noticed(tmp_path):
    run(tmp_path / "a", n_steps=7)
    with pytest.raises(ValueError, match="does not have the batches it had"):
        run(tmp_path / "a", resume=True, data=numbers(28))


def test_another_model_is_noticed(tmp_path):
    run(tmp_path / "a", n_steps=7)
    other = adder()
    other.net[0] = nn.Linear(4, 9)
    with pytest.raises(CheckpointError, match=r"net.0.weight has shape \(8, 4\), the model needs \(9, 4\)"):
        run(tmp_path / "a", resume=True, model=other)


def test_another_number_of_processes_is_noticed(tmp_path):
    run(tmp_path / "a", n_steps=7)
    last = tmp_path / "a" / "last.json"
    last.write_text(last.read_text().replace('"n_processes": 1', '"n_processes": 2'))
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        run(tmp_path / "a", resume=True)


def test_nothing_to_continue(tmp_path):
    with pytest.raises(CheckpointError, match="no run to continue"):
        run(tmp_path / "a", resume=True)
    with pytest.raises(ValueError, match="needs the directory"):
        run(None, resume=True)
    with pytest.raises(ValueError, match="resume must be"):
        run(tmp_path / "a", resume="yes")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", ["weights", "state"])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_damaged_state_is_refused(tmp_path, kind, damage):
    run(tmp_path / "a", n_steps=7)
    [file] = (tmp_path / "a").glob(f"{kind}-*")
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        content[-1] ^= 1
        file.write_bytes(content if damage == "bit" else content[:-5])
    with pytest.raises(CheckpointError, match="cannot read" if damage == "gone" else "is damaged"):
        run(tmp_path / "a", resume=True)


def test_last_json_cut_short_is_refused(tmp_path):
    run(tmp_path / "a", n_steps=7)
    last = tmp_path / "a" / "last.json"
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is not JSON"):
        run(tmp_path / "a", resume=True)


def test_metrics_a_torn_last_line_is_dropped_and_a_broken_one_is_not(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert [line["step"] for line in read_metrics(tmp_path, until=1)] == [1]
    path.write_text('{"step": 1\n{"step": 2, "loss": 0.5}\n')
    with pytest.raises(CheckpointError, match="line 1 is not JSON"):
        read_metrics(tmp_path)
    with pytest.raises(CheckpointError, match="cannot read"):
        read_metrics(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------ the disk


def test_a_full_disk_while_saving_leaves_the_state_before(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    calls, real = [0], os.fsync

    def full(handle):
        calls[0] += 1
        if calls[0] > 8:  # a save syncs 3 files and 3 times the folder: this is the second file of the second save
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*state-00000006.*No space left on device.*intact"):
        run(tmp_path / "a")
    monkeypatch.undo()
    assert json.loads((tmp_path / "a" / "last.json").read_text())["step"] == 3
    assert not list((tmp_path / "a").glob(".*"))
    assert run(tmp_path / "a", resume=True).losses == whole.losses
    assert len(list((tmp_path / "a").iterdir())) == 4  # the orphan of the failed save is gone


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_directory_that_cannot_be_made_is_found_before_training(tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    model = adder()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match="cannot write to .*Nothing was trained yet"):
        run(tmp_path / place, model=model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_write_permission_is_found_before_training(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="Permission denied. Nothing was trained yet"):
        run(tmp_path / "locked")


def test_no_permission_as_the_system_reports_it(tmp_path, monkeypatch):
    def refuse(self, data):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("pathlib.Path.write_bytes", refuse)
    with pytest.raises(CheckpointError, match="Permission denied. Nothing was trained yet"):
        run(tmp_path / "a")


def test_what_a_run_without_a_state_left_is_not_mixed_in(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 99, "loss": 1.0}\n')
    result = run(tmp_path / "a", resume="auto")
    assert [line["step"] for line in read_metrics(tmp_path / "a")] == list(range(1, 13)) == [line["step"] for line in result.history]


def test_load_best_takes_the_last_weights_if_there_was_no_validation(tmp_path):
    model = adder()
    run(tmp_path / "a", model=model)
    other = Adder()
    assert load_best(other, tmp_path / "a") == 12
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    with pytest.raises(CheckpointError, match="cannot read"):
        load_best(other, tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------ with speech


@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_recogniser_of_the_book_continues_and_becomes_a_checkpoint(tmp_path, n_workers):
    from speechlearn.checkpoint import load_checkpoint, save_checkpoint
    from speechlearn.data.augment import Augment
    from speechlearn.data.batches import SpeechDataset, make_loader
    from speechlearn.data.synthetic import sampler
    from speechlearn.sound.features import LogMel
    from speechlearn.text import CharacterVocabulary
    from speechlearn.whole_game import FirstRecogniser, FirstRecogniserConfig

    vocabulary = CharacterVocabulary()

    def go(directory, n_steps, **more):
        torch.manual_seed(0)
        model = FirstRecogniser(FirstRecogniserConfig(n_bins=20, vocab=len(vocabulary), d_model=16, n_heads=2, d_feedforward=16, n_layers=1))
        dataset = SpeechDataset(sampler(), LogMel(n_bins=20), vocabulary, augment=Augment(), seed=3)
        loader = make_loader(dataset, max_frames=1200, seed=3, n_workers=n_workers)
        return model, train(model, loader, config=config(n_steps=n_steps, checkpoint_every=4), directory=directory, show="none", **more)

    model, whole = go(tmp_path / "whole", 13)
    go(tmp_path / "a", 6)
    again, continued = go(tmp_path / "a", 13, resume=True)
    assert continued.losses == whole.losses and whole.history[-1]["epoch"] > 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))

    features = torch.randn(1, 50, 20)
    loaded = load_checkpoint(save_checkpoint(tmp_path / "c", again, vocabulary=vocabulary))
    with torch.no_grad():
        assert torch.equal(loaded.model(features, torch.tensor([50]))[0], again(features, torch.tensor([50]))[0])


def test_what_modules_remember_is_saved(tmp_path):
    """A number outside parameters and buffers, which a module names in `remembers`, is that of the uninterrupted run."""

    class Counting(torch.nn.Linear):
        remembers = ("seen", "mood")

        def __init__(self):
            super().__init__(2, 1)
            self.seen, self.mood = 0, "fresh"

        def forward(self, x):
            self.seen, self.mood = self.seen + len(x), "used"
            return super().forward(x).square().mean() * (1 + 0.1 * self.seen)

    from speechlearn.resume import memories

    batches = [torch.ones(3, 2), torch.zeros(2, 2) + 0.5]
    whole, part = Counting(), Counting()
    part.load_state_dict(whole.state_dict())
    first = train(whole, batches, config=TrainConfig(n_steps=6, schedule="constant", checkpoint_every=3, accelerator="cpu"), show="none")
    train(part, batches, config=TrainConfig(n_steps=3, schedule="constant", checkpoint_every=3, accelerator="cpu"), directory=tmp_path / "run", show="none")
    again = Counting()
    second = train(again, batches, config=TrainConfig(n_steps=6, schedule="constant", checkpoint_every=3, accelerator="cpu"), directory=tmp_path / "run", resume=True, show="none")
    assert memories(again) == memories(whole) == {"": {"seen": whole.seen, "mood": "used"}} and whole.seen > 12
    assert [line["loss"] for line in second.history] == [line["loss"] for line in first.history]
