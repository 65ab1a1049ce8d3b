"""Checkpoints: what is saved comes back; what is damaged, foreign or dangerous does not."""

import dataclasses
import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from speechlearn import checkpoint
from speechlearn.checkpoint import (
    RECOGNISERS,
    CheckpointError,
    config_from_dict,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    read_tensors,
    recogniser_name,
    rounded,
    save_checkpoint,
    write_file,
    write_json,
    write_tensors,
)
from speechlearn.text import CharacterVocabulary


@dataclass(frozen=True)
class Front:
    strides: tuple[int, ...] = (2, 2)


@dataclass(frozen=True)
class Config:
    bins: int = 4
    vocab: int = 31
    dropout: float | None = None
    front: Front = field(default_factory=Front)

    def __post_init__(self):
        if self.bins < 1:
            raise ValueError(f"bins must be at least 1, got {self.bins}")


class Tiny(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.scores = nn.Linear(config.bins, config.vocab)
        self.norm = nn.BatchNorm1d(config.vocab)
        self.tied = self.scores.weight

    @classmethod
    def from_config(cls, config):
        return cls(config_from_dict(Config, config))

    def forward(self, x):
        return self.norm(self.scores(x))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(RECOGNISERS, "tiny", Tiny)


def tiny(seed=0, **settings):
    torch.manual_seed(seed)
    model = Tiny(Config(**settings))
    model(torch.randn(8, model.config.bins))  # moves the running statistics, an integer counter among them
    return model


@pytest.fixture
def saved(tmp_path):
    return save_checkpoint(tmp_path / "tiny", tiny(), vocabulary=CharacterVocabulary(), metadata={"steps": 7})


def edit(directory, **changes):
    path = directory / "checkpoint.json"
    content = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            del content[name]
        else:
            content[name] = value
    path.write_text(json.dumps(content))


def weights_of(directory):
    [path] = directory.glob("*.safetensors")
    return path


# ------------------------------------------------------------------------------------------------ there and back


def test_what_is_saved_comes_back(tmp_path):
    model = tiny(bins=3, front=Front((3, 1)), dropout=0.1)
    vocabulary = CharacterVocabulary()
    features = {"n_bins": 80, "hop_ms": 10.0}
    folder = save_checkpoint(tmp_path / "a" / "b", model, vocabulary=vocabulary, features=features, metadata={"wer": 0.02})
    loaded = load_checkpoint(folder)
    assert loaded.model.config == model.config and loaded.metadata == {"wer": 0.02} and loaded.features == features
    assert loaded.vocabulary.to_dict() == vocabulary.to_dict() and loaded.vocabulary.encode("hi") == vocabulary.encode("hi")
    assert loaded.name == "tiny" and loaded.directory == folder and not loaded.model.training
    ours = model.state_dict()
    assert all(torch.equal(t, ours[name]) and t.dtype == ours[name].dtype for name, t in loaded.model.state_dict().items())
    x = torch.randn(5, 3)
    assert torch.equal(loaded.model(x), model.eval()(x))
    assert load_checkpoint(str(folder / "checkpoint.json")).name == "tiny"


def test_float16_is_half_the_size_and_near(tmp_path):
    model = tiny(bins=200)
    full = save_checkpoint(tmp_path / "full", model, vocabulary=None)
    half = save_checkpoint(tmp_path / "half", model, vocabulary=None, dtype="float16")
    sizes = [weights_of(folder).stat().st_size for folder in (full, half)]
    assert 0.48 < sizes[1] / sizes[0] < 0.55
    back = load_checkpoint(half)
    assert back.vocabulary is None and back.model.scores.weight.dtype == torch.float32
    assert back.model.norm.num_batches_tracked.item() == 1 and back.model.norm.num_batches_tracked.dtype == torch.int64
    change = (back.model.scores.weight - model.scores.weight).abs()
    assert 0 < change.max() and (change <= model.scores.weight.abs() * 2**-11 + 2**-25).all()


def test_saving_and_loading_draw_no_random_numbers(tmp_path):
    model = tiny()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    load_checkpoint(save_checkpoint(tmp_path / "a", model, vocabulary=None))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_model_gives_the_same_bytes(tmp_path):
    a = save_checkpoint(tmp_path / "a", tiny(), vocabulary=CharacterVocabulary())
    b = save_checkpoint(tmp_path / "b", tiny(), vocabulary=CharacterVocabulary())
    assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}


def test_replacing_leaves_one_checkpoint(saved):
    save_checkpoint(saved, tiny(seed=1), vocabulary=None)
    assert len(list(saved.iterdir())) == 2
    assert torch.equal(load_checkpoint(saved).model.scores.weight, tiny(seed=1).scores.weight)


def test_metadata_must_be_json(tmp_path):
    for wrong in ({"model": tiny()}, {"wer": float("nan")}):
        with pytest.raises(CheckpointError, match="cannot be written as JSON"):
            save_checkpoint(tmp_path / "a", tiny(), vocabulary=None, metadata=wrong)


def test_a_class_of_a_running_notebook_is_known_by_its_name(monkeypatch):
    monkeypatch.setitem(RECOGNISERS, "tiny", "speechlearn.whole_game:Tiny")
    with pytest.raises(CheckpointError, match=r'RECOGNISERS\["my-model"\] = Tiny'):
        recogniser_name(tiny())
    monkeypatch.setattr(Tiny, "__module__", "__main__")
    assert recogniser_name(tiny()) == "tiny"


@settings(max_examples=50, deadline=None)
@given(bins=st.integers(1, 9), dropout=st.none() | st.floats(0, 1), strides=st.lists(st.integers(1, 3), max_size=4))
def test_settings_survive_json(bins, dropout, strides):
    config = Config(bins=bins, dropout=dropout, front=Front(tuple(strides)))
    assert config_from_dict(Config, json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_optional_nested_settings():
    @dataclass(frozen=True)
    class Outer:
        front: Front | None = None
        pairs: tuple[tuple[int, int], ...] = ()
        names: list[str] = field(default_factory=list)

    for made in (Outer(), Outer(Front((1,)), ((1, 2), (3, 4)), ["a"])):
        assert config_from_dict(Outer, json.loads(json.dumps(dataclasses.asdict(made)))) == made


# ------------------------------------------------------------------------------------------------ what save refuses


def test_a_model_that_could_not_be_read_back_is_not_saved(tmp_path):
    class Unregistered(Tiny):
        pass

    with pytest.raises(CheckpointError, match="Unregistered is not in .*RECOGNISERS"):
        save_checkpoint(tmp_path / "a", Unregistered(Config()), vocabulary=None)
    changed = tiny()
    changed.extra = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="extra.weight is not in the model"):
        save_checkpoint(tmp_path / "a", changed, vocabulary=None)
    bare = tiny()
    del bare.config
    with pytest.raises(CheckpointError, match="no dataclass in its attribute `config`"):
        save_checkpoint(tmp_path / "a", bare, vocabulary=None)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("value, dtype, text", [(float("nan"), "float32", "NaN or infinity"), (1e5, "float16", "beyond the largest float16")])
def test_values_that_are_no_numbers_are_not_saved(tmp_path, value, dtype, text):
    model = tiny()
    with torch.no_grad():
        model.scores.bias[3] = value
    with pytest.raises(CheckpointError, match=f"scores.bias .*{text}"):
        save_checkpoint(tmp_path / "a", model, vocabulary=None, dtype=dtype)


def test_unknown_number_types_are_refused():
    with pytest.raises(CheckpointError, match="'float32' or 'float16', got 'int8'"):
        rounded({}, "int8")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot make the folder"):
        save_checkpoint(tmp_path / "file" / "a", tiny(), vocabulary=None)


# ------------------------------------------------------------------------------------------------ the disk


@pytest.mark.parametrize("call", [1, 3])  # calls 2 and 4 are for the folder
def test_a_full_disk_leaves_the_checkpoint_before(saved, monkeypatch, call):
    calls, real = [0], os.fsync

    def full(handle):
        calls[0] += 1
        if calls[0] == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(saved, tiny(seed=1), vocabulary=None)
    monkeypatch.undo()
    RECOGNISERS["tiny"] = Tiny
    try:
        assert torch.equal(load_checkpoint(saved).model.scores.weight, tiny(seed=0).scores.weight)
    finally:
        del RECOGNISERS["tiny"]
    assert not list(saved.glob(".*"))


LIMITED = """
import resource, signal, sys
from pathlib import Path
from speechlearn.checkpoint import CheckpointError, write_file
path = Path(sys.argv[1])
write_file(path, b"old")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    write_file(path, b"x" * 20_000)
except CheckpointError as error:
    print(error)
print(path.read_bytes(), [p.name for p in path.parent.iterdir()])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file size limits for processes")
def test_a_real_limit_of_the_system(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path / "file"], capture_output=True, text=True, check=True)
    error, left = done.stdout.splitlines()
    assert "cannot write" in error and "(20,000 bytes)" in error and "intact" in error
    assert left == "b'old' ['file']"


def test_a_write_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    write_file(tmp_path / "a", b"old")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_tensors_that_share_memory_or_are_views(tmp_path):
    base = torch.arange(6.0)
    written = {"a": base, "b": base, "c": base.view(2, 3).T}
    back = read_tensors(tmp_path / "x", write_tensors(tmp_path / "x", written))
    assert list(back) == ["a", "b", "c"] and all(torch.equal(back[name], t) for name, t in written.items())


# ------------------------------------------------------------------------------------------------ what load refuses


def refused(directory, text):
    with pytest.raises(CheckpointError, match=text) as caught:
        load_checkpoint(directory)
    return str(caught.value)


def test_a_changed_bit_a_cut_and_a_missing_file(saved):
    path = weights_of(saved)
    content = bytearray(path.read_bytes())
    content[-2] ^= 4
    path.write_bytes(content)
    refused(saved, "is damaged or was replaced: its SHA-256 is")
    path.write_bytes(content[:-100])
    assert f"{len(content) - 100:,} bytes read" in refused(saved, "is damaged")
    path.unlink()
    refused(saved, "cannot read .*Was the folder copied completely")


def test_a_cut_file_is_noticed_without_a_fingerprint_too(saved):
    path = weights_of(saved)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        read_tensors(path)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"format": "other"}, "was not written by speechlearn: its format is 'other'"),
        ({"version": 2}, "format version 2; this speechlearn reads up to 1. Update speechlearn"),
        ({"version": "new"}, "format version 'new'"),
        ({"model": "tinny"}, "unknown model 'tinny'; known: .* Did you mean 'tiny'"),
        ({"model": ["tiny"]}, "unknown model"),
        ({"model": "os:system"}, "unknown model 'os:system'"),
        ({"config": None, "weights": None}, "is incomplete: it has no 'config', 'weights'"),
        ({"config": {"bins": 4, "colour": 1}}, "Config has no setting 'colour'; it has bins, vocab"),
        ({"config": {"bins": 0}}, "Config refuses its settings: bins must be at least 1, got 0"),
        ({"config": [1]}, "must be a dict, got list"),
        ({"config": {"bins": 5}}, r"scores.weight has shape \(31, 4\), the model needs \(31, 5\)"),
        ({"vocabulary": {"kind": "nonsense"}}, "the vocabulary cannot be read"),
        ({"weights": {"file": "../../etc/passwd", "sha256": "0"}}, "must name a .safetensors file of the same folder"),
        ({"weights": "weights.pt"}, "must name a .safetensors file of the same folder"),
        ({"weights": {"file": "w.safetensors"}}, "and its sha256"),
    ],
)
def test_a_json_that_does_not_fit(saved, changes, text):
    edit(saved, **changes)
    refused(saved, text)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocabulary": {**CharacterVocabulary().to_dict(), "characters": CharacterVocabulary().characters[::-1]}},  # reads every letter as another
        {"features": {"n_bins": 80, "hop_ms": 20.0}},
        {"config": {"bins": 4, "vocab": 31, "dropout": 0.5}},
        {"features": None},
    ],
    ids=["letters", "hop", "dropout", "no features"],
)
def test_settings_that_fit_and_are_others(tmp_path, changes):
    folder = save_checkpoint(tmp_path / "tiny", tiny(), vocabulary=CharacterVocabulary(), features={"n_bins": 80, "hop_ms": 10.0})
    edit(folder, **changes)
    refused(folder, "is damaged or was edited: its settings are not those .* take out the entry 'settings_sha256'")
    edit(folder, settings_sha256=None)
    load_checkpoint(folder)  # on purpose


def test_notes_may_be_edited_and_order_and_spaces_do_not_matter(saved):
    edit(saved, metadata={"wer": 0.5}, saved_with={})
    path = saved / "checkpoint.json"
    path.write_text(json.dumps(dict(reversed(json.loads(path.read_text()).items())), indent=4))
    assert load_checkpoint(saved).metadata == {"wer": 0.5}


@pytest.mark.parametrize("name", list_checkpoints())
def test_shipped_checkpoints_carry_the_fingerprint_of_their_settings(name, tmp_path):
    folder = tmp_path / name
    shutil.copytree(find_checkpoint(name), folder)
    content = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
    edit(folder, features={**content["features"], "f_min": 21.0})
    refused(folder, "its settings are not those")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1, 2]"])
def test_a_json_that_is_none(saved, content):
    (saved / "checkpoint.json").write_bytes(content)
    refused(saved, "was not written by speechlearn" if content == b"[1, 2]" else "is not JSON")


def test_settings_that_break_the_class_itself(saved, monkeypatch):
    monkeypatch.setattr(Tiny, "from_config", classmethod(lambda cls, config: cls(Config(**config))))
    edit(saved, config={"colour": "red"})
    refused(saved, "Tiny cannot be built from the settings .*unexpected keyword argument 'colour'")


def test_from_config_may_ask_for_the_dataclass(saved, monkeypatch):
    def build(cls, config: Config):
        assert isinstance(config, Config)
        return cls(config)

    monkeypatch.setattr(Tiny, "from_config", classmethod(build))
    assert load_checkpoint(saved).model.config == Config()
    edit(saved, config={"colour": "red"})
    refused(saved, "Config has no setting 'colour'")


def test_wrong_names_are_listed_a_few_at_a_time():
    model = nn.Sequential(*[nn.Linear(1, 1) for _ in range(5)])
    before = [p.clone() for p in model.parameters()]
    tensors = {name: t + 1 for name, t in model.state_dict().items() if not name.startswith(("0.", "1."))} | {"x": torch.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, tensors, source="old.safetensors")
    assert "of old.safetensors do not fit Sequential: 0.weight is missing; 0.bias is missing; 1.weight is missing; and 2 more." in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))  # all or nothing


@pytest.mark.parametrize("suffix", ["pt", "pth", "ckpt", "bin", "pkl", "PT"])
def test_a_pickle_is_refused_without_being_opened(tmp_path, suffix):
    class Bomb:
        def __reduce__(self):
            return Path.write_text, (tmp_path / "exploded", "")

    path = tmp_path / f"model.{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    for read in (load_checkpoint, read_tensors):
        with pytest.raises(CheckpointError, match="opening a pickle runs whatever program.*weights_only=True"):
            read(path)
    assert not (tmp_path / "exploded").exists()
    # and under a false name it is no safetensors file
    path = path.rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        read_tensors(path)
    assert not (tmp_path / "exploded").exists()


def test_things_that_are_no_checkpoints(tmp_path):
    refused(tmp_path / "nowhere", "neither a folder nor a name")
    refused(tmp_path, "has no checkpoint.json")
    (tmp_path / "song.wav").write_bytes(b"")
    refused(tmp_path / "song.wav", "is a file; a checkpoint is a folder")
    (tmp_path / "last.json").write_text("{}")
    refused(tmp_path, "is the folder of a training run")


def test_a_class_whose_module_is_gone(saved, monkeypatch):
    monkeypatch.setitem(RECOGNISERS, "tiny", "speechlearn.no_such_chapter:Tiny")
    refused(saved, "should be speechlearn.no_such_chapter:Tiny, which cannot be imported")


# ------------------------------------------------------------------------------------------------ checkpoints of the package


def test_shipped_checkpoints_are_found_by_name(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "checkpoints" / "small-one", tiny(), vocabulary=None)
    monkeypatch.setattr(checkpoint, "_shipped", lambda: tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    assert list_checkpoints() == ["small-one"]
    assert load_checkpoint("small-one").name == "tiny" and find_checkpoint("small-one") == tmp_path / "checkpoints" / "small-one"
    with pytest.raises(CheckpointError, match="Checkpoints of the package: small-one. Did you mean 'small-one'"):
        load_checkpoint("smal-one")


def test_every_shipped_checkpoint_loads():
    for name in list_checkpoints():
        assert load_checkpoint(name).directory.name == name


def test_json_files_are_readable_text(tmp_path):
    write_json(tmp_path / "a.json", {"name": "é", "n": [1]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n "name": "é",\n "n": [\n  1\n ]\n}\n'
