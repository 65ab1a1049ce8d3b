"""The exercises: the mechanism, and every stub of the book against its check."""
import ast
import copy
import json
import warnings
from pathlib import Path

import pytest

from speechlearn.exercises import check_call, exercises_of, quick, rejects, stub_fails_loudly, without_solutions, write_reader_notebooks

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
WITH_EXERCISES = [p for p in NOTEBOOKS if '"exercise"' in p.read_text(encoding="utf-8") and p.stem != "exercises"]


def cell(kind, source, *tags):
    return {"cell_type": kind, "source": source, "metadata": {"tags": list(tags)} if tags else {}, "outputs": [], "execution_count": None}


def example():
    return {
        "metadata": {},
        "cells": [
            cell("markdown", "## Exercises\n\n### Exercise 9.1: double\n*build · difficulty 1 of 3 · 2 minutes*\nDouble."),
            cell("code", "def check_double(f):\n    got = f(3)\n    assert got != 9, 'that is the square'\n    assert got == 6, 'add it to itself'\n    print('✓')", "check"),
            cell("code", 'def double(x):\n    raise NotImplementedError("Exercise 9.1: double x")\n\n\n# check_double(double)', "exercise"),
            cell("markdown", ":::{dropdown} Hint\nMultiply.\n:::"),
            cell("code", "def double(x):\n    return 2 * x\n\n\ncheck_double(double)", "solution"),
            cell("code", "rejects(check_double, lambda x: x * x, says='square')\nrejects(check_double, lambda x: x, says='itself')", "wrong-answers"),
            cell("markdown", "## Recap"),
        ],
    }


def test_an_exercise_is_read():
    (exercise,) = exercises_of(example())
    assert (exercise.number, exercise.title, exercise.kind, exercise.difficulty, exercise.minutes) == ("9.1", "double", "build", 1, 2)
    assert check_call(exercise) == "check_double(double)"
    stub_fails_loudly(exercise, {})


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda cells: cells.pop(1), "no cell with the tag 'check'"),
        (lambda cells: cells.pop(3), "has no hint"),
        (lambda cells: cells.pop(4), "no cell with the tag 'solution'"),
        (lambda cells: cells.pop(5), "no cell with the tag 'wrong-answers'"),
        (lambda cells: cells[5].update(source="rejects(check_double, abs, says='x')"), "tries 1 wrong answers"),
        (lambda cells: cells[2].update(source="def double(x):\n    pass"), "must raise NotImplementedError"),
        (lambda cells: cells[4].update(source="def double(x):\n    return 2 * x"), "must end by calling its check"),
        (lambda cells: cells[0].update(source="### Exercise 9.1: double\n*easy*"), "must read like"),
    ],
)
def test_an_exercise_that_lacks_something_is_refused(change, message):
    notebook = example()
    change(notebook["cells"])
    with pytest.raises(ValueError, match=message):
        exercises_of(notebook)


def test_a_stub_that_passes_or_is_swallowed_is_found():
    notebook = example()
    notebook["cells"][1]["source"] = "def check_double(f):\n    try:\n        f(3)\n    except Exception:\n        pass"
    with pytest.raises(AssertionError, match="accepts the empty stub"):
        stub_fails_loudly(exercises_of(notebook)[0], {})


def test_rejects_can_say_no():
    def check(x):
        assert x != 1, "one is wrong because of this"

    rejects(check, 1, says="because of this")
    with pytest.raises(AssertionError, match="accepts a wrong answer"):
        rejects(check, 2, says="because")
    with pytest.raises(AssertionError, match="instead of something with 'that'"):
        rejects(check, 1, says="that")

    def broken(x):
        raise KeyError("a bug in the check")

    with pytest.raises(KeyError):
        rejects(broken, 1, says="x")


def test_quick_follows_the_environment(monkeypatch):
    monkeypatch.setenv("SPEECHLEARN_QUICK", "1")
    assert quick()
    monkeypatch.delenv("SPEECHLEARN_QUICK")
    assert not quick()


def test_readers_get_no_solutions():
    notebook = example()
    before = copy.deepcopy(notebook)
    result = without_solutions(notebook)
    text = json.dumps(result)
    assert notebook == before and "return 2 * x" not in text and "rejects(" not in text
    assert ["".join(c["source"]) for c in result["cells"] if c["cell_type"] == "code"][-1] == "check_double(double)"
    assert result["cells"][1]["metadata"]["jupyter"] == {"source_hidden": True}


def test_all_notebooks_are_written_without_solutions_and_answers_are_kept(tmp_path):
    written = write_reader_notebooks(ROOT / "nbs", tmp_path / "exercises")
    assert len(written) == len(NOTEBOOKS)
    for path in written:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        tags = {tag for c in notebook["cells"] for tag in c["metadata"].get("tags", [])}
        assert not tags & {"solution", "wrong-answers"}
        original = json.loads((ROOT / "nbs" / path.relative_to(tmp_path / "exercises")).read_text(encoding="utf-8"))
        calls = [check_call(e) for e in exercises_of(original)]
        sources = ["".join(c["source"]) for c in notebook["cells"]]
        assert all(call in sources for call in calls)
        for c in notebook["cells"]:
            if c["cell_type"] == "code":
                ast.parse("".join(c["source"]))
    written[0].write_text("my answers")
    assert write_reader_notebooks(ROOT / "nbs", tmp_path / "exercises") == []
    assert written[0].read_text() == "my answers"
    with pytest.raises(ValueError, match="is not a folder"):
        write_reader_notebooks(tmp_path / "none", tmp_path / "x")


def with_stubs_checked(notebook: dict) -> dict:
    """The notebook with a cell before each solution in which the check must meet the stub's NotImplementedError."""
    waiting, cells = exercises_of(notebook), []
    for c in notebook["cells"]:
        if "solution" in c["metadata"].get("tags", []) and waiting and waiting[0].solution.startswith("".join(c["source"])):
            exercise = waiting.pop(0)
            source = (
                f"try:\n    {check_call(exercise)}\nexcept NotImplementedError as error:\n    assert 'Exercise {exercise.number}' in str(error)\n"
                f"else:\n    raise AssertionError('the check of exercise {exercise.number} accepts the empty stub')"
            )
            cells.append({"id": f"stub-{len(cells)}", "cell_type": "code", "metadata": {}, "source": source, "outputs": [], "execution_count": None})
        cells.append(c)
    assert not waiting
    return {**notebook, "cells": cells}


@pytest.mark.parametrize("path", WITH_EXERCISES, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_every_stub_fails_loudly_where_the_reader_meets_it(path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("SPEECHLEARN_QUICK", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = with_stubs_checked(json.loads(path.read_text(encoding="utf-8")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the machinery that runs kernels
        client = NotebookClient(
            nbformat.reads(json.dumps(notebook), as_version=4), timeout=240, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
            extra_arguments=["--IPKernelApp.log_level=40"],
        )
        client.execute()
