"""The house itself: exports agree with notebooks, versions agree with each other, the package stays light."""
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)

sys.path.insert(0, str(ROOT / "book"))
import speechlearn_book as book  # noqa: E402

from speechlearn.exercises import exercises_of  # noqa: E402

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib


def name_of(path):
    return str(path.relative_to(ROOT / "nbs"))


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the parts that nbdev reads and writes."""
    copy = tmp_path_factory.mktemp("export") / "copy"
    copy.mkdir()
    for name in ("nbs", "speechlearn"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def texts_below(folder):
    return {
        str(p.relative_to(folder)): p.read_text(encoding="utf-8")
        for p in sorted(folder.rglob("*"))
        if p.suffix in (".py", ".ipynb") and "__pycache__" not in p.parts and ".ipynb_checkpoints" not in p.parts
    }


def run_in(folder, command):
    environment = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    result = subprocess.run([str(BIN / command)], cwd=folder, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr


def test_export_leaves_no_diff(copied):
    run_in(copied, "nbdev_export")
    made, here = texts_below(copied / "speechlearn"), texts_below(ROOT / "speechlearn")
    different = sorted(name for name in made.keys() | here.keys() if made.get(name) != here.get(name))
    assert not different, f"run nbdev_export and commit: {different}"


def test_clean_leaves_no_diff(copied):
    run_in(copied, "nbdev_clean")
    made, here = texts_below(copied / "nbs"), texts_below(ROOT / "nbs")
    different = sorted(name for name in made.keys() | here.keys() if made.get(name) != here.get(name))
    assert not different, f"run nbdev_clean and commit: {different}"


def test_version_and_requirements_agree():
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini")
    settings = settings["DEFAULT"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == settings["version"]
    assert sorted(project["dependencies"]) == sorted(settings["requirements"].split())
    assert project["requires-python"] == f">={settings['min_python']}"
    script = settings["console_scripts"].split("=", 1)
    assert project["scripts"] == {script[0]: script[1]}
    assert (ROOT / "speechlearn" / "__init__.py").read_text().count(f'__version__ = "{settings["version"]}"') == 1
    assert f"version: {settings['version']}" in (ROOT / "CITATION.cff").read_text()


def test_constraints_satisfy_the_ranges():
    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        line = line.split("#")[0].strip()
        if line:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                pins[requirement.name.lower().replace("_", "-")] = next(iter(requirement.specifier)).version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"]] + [r for extra in project["optional-dependencies"].values() for r in extra]
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        name = requirement.name.lower().replace("_", "-")
        assert name in pins, f"{name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{name}: pinned {pins[name]}, wanted {requirement.specifier}"


def test_import_is_light():
    code = (
        "import torch, time; start = time.perf_counter(); import speechlearn; took = time.perf_counter() - start;"
        "import sys; heavy = [m for m in ('torchaudio', 'matplotlib', 'lightning_fabric', 'sentencepiece', 'IPython') if m in sys.modules];"
        "print(took, heavy)"
    )
    took, heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split(" ", 1)
    assert float(took) < 0.3
    assert heavy.strip() == "[]"


def test_torchaudio_imports_beside_cpu_torch():
    code = "import speechlearn, torchaudio, torch; print(torchaudio.transforms.MelSpectrogram(n_mels=23)(torch.zeros(400)).shape[0])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "23"


def test_each_module_has_its_chapter_and_each_chapter_its_module():
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        chapter = notebook["metadata"].get("chapter")
        assert chapter, f"{name_of(path)} has no front matter"
        exported = re.search(r"^#\| default_exp ([\w.]+)", "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"), re.M)
        assert chapter["module"] == (exported and exported.group(1)), f"{name_of(path)}: front matter and default_exp disagree"
    modules = {p for p in (ROOT / "speechlearn").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py", "__main__.py")}
    taught = {ROOT / "speechlearn" / (c["module"].replace(".", "/") + ".py") for _, c in book.chapters_in_toc() if c["module"]}
    assert modules == taught


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_front_matter_and_cells(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    chapter = notebook["metadata"]["chapter"]
    assert set(chapter) <= {"number", "title", "part", "module", "build", "minutes", "seconds", "needs", "card"}
    assert chapter["part"] in book.PARTS
    assert chapter["minutes"] > 0 and chapter["seconds"] > 0
    assert f"nbs/{name_of(path)}"[: -len(".ipynb")] in [name for name, _ in book.chapters_in_toc()], "not in _toc.yml"
    first = "".join(notebook["cells"][0]["source"])
    assert first.startswith("# "), "a page begins with its title"
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, "notebooks are committed without outputs"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_exercises_are_whole(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    exercises = exercises_of(notebook)
    chapter = notebook["metadata"]["chapter"]
    if re.fullmatch(r"\d+\w?", chapter["number"]) and chapter.get("card", True) and chapter["module"] != "whole_game":
        assert 3 <= len(exercises) <= 6, f"a chapter has three to six exercises; this one has {len(exercises)}"
    assert len({e.number for e in exercises}) == len(exercises)


def test_no_machine_paths_and_no_unfinished_marks():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, listed):
        path = ROOT / name
        if path.suffix in (".py", ".ipynb", ".md", ".yml", ".toml", ".ini", ".json") and path.exists():
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w.])/(work|home|root)/\w", text), f"{name} holds a path of a machine"
            assert not re.search(r"\b(TODO|FIXME|@@[A-Z_]+@@)", text) or name == "tests/test_project.py", f"{name} has an unfinished mark"
