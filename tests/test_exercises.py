"""The exercises: the mechanism, and every stub of the book against its check."""
import ast
import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from speechlearn.exercises import KINDS, check_call, exercises_of, quick, rejects, stub_fails_loudly, without_solutions, write_reader_notebooks

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


def run_with_stubs(path: Path) -> str:
    """Execute a notebook in which each check meets its stub first; the error, or nothing."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook = with_stubs_checked(json.loads(path.read_text(encoding="utf-8")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the machinery that runs kernels
        client = NotebookClient(
            nbformat.reads(json.dumps(notebook), as_version=4), timeout=240, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
            extra_arguments=["--IPKernelApp.log_level=40"],
        )
        try:
            client.execute(env={**os.environ, "SPEECHLEARN_QUICK": "1", "OMP_NUM_THREADS": "1"})
        except CellExecutionError as error:
            return str(error)
    return ""


STUBS = "test_every_stub_fails_loudly_where_the_reader_meets_it"


@pytest.fixture(scope="session")
def stub_runs(request):
    """What `run_with_stubs` says of each notebook that this session tests, several notebooks at a time: one after the other they would take half of all tests' time."""
    paths = [item.callspec.params["path"] for item in request.session.items if getattr(item, "originalname", "") == STUBS]
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        yield {path: pool.submit(run_with_stubs, path) for path in paths}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("path", WITH_EXERCISES, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_every_stub_fails_loudly_where_the_reader_meets_it(path, stub_runs):
    error = stub_runs[path].result()
    assert not error, error


def test_sources_may_be_lists_of_lines_as_in_a_file():
    notebook = example()
    for c in notebook["cells"]:
        c["source"] = c["source"].splitlines(keepends=True)
    assert exercises_of(notebook) == exercises_of(example())
    assert "return 2 * x" not in json.dumps(without_solutions(notebook))


def test_each_exercise_of_several_gets_its_own_cells_and_call():
    second = json.loads(json.dumps(example()["cells"][:-1]).replace("9.1", "9.2").replace("double", "twice"))
    notebook = {"metadata": {}, "cells": [*example()["cells"][:-1], *second]}
    assert [(e.number, check_call(e)) for e in exercises_of(notebook)] == [("9.1", "check_double(double)"), ("9.2", "check_twice(twice)")]
    sources = ["".join(c["source"]) for c in without_solutions(notebook)["cells"]]
    assert sources.index("check_double(double)") < sources.index(second[0]["source"]) < sources.index("check_twice(twice)")


def test_a_stub_that_names_another_exercise_is_found_and_names_are_left_alone():
    (exercise,) = exercises_of(example())
    wrong = dataclasses.replace(exercise, stub=exercise.stub.replace("9.1", "3.2"))
    with pytest.raises(AssertionError, match="stub of exercise 9.1 does not name its exercise"):
        stub_fails_loudly(wrong, {})
    names = {"double": "the notebook's own"}
    stub_fails_loudly(exercise, names)
    assert names == {"double": "the notebook's own"}


def test_rejects_is_silent_and_lets_an_empty_stub_through(capsys):
    def check(f):
        print("first the easy case")
        f()
        raise AssertionError("always wrong")

    rejects(check, lambda: 1, says="always")
    assert capsys.readouterr().out == ""

    def stub():
        raise NotImplementedError("Exercise 9.1: write me")

    with pytest.raises(NotImplementedError, match="Exercise 9.1"):
        rejects(check, stub, says="always")


def test_a_bare_assert_teaches_nothing_and_is_refused():
    def check(x):
        assert x == 2

    with pytest.raises(AssertionError, match="instead of something with 'even'"):
        rejects(check, 3, says="even")


# What `exercises_of` does not look at (order of the cells, the exact number in the stub, exercises that no heading
# announces) is asked here of every notebook of the book.
PARTS = ("check", "exercise", "solution", "wrong-answers")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def part_of(c):
    found = [tag for tag in PARTS if tag in c["metadata"].get("tags", [])]
    assert len(found) <= 1, f"one cell has the tags {found}"
    return found[0] if found else "hint" if "{dropdown} Hint" in "".join(c["source"]) else None


def defined_in(source):
    return {node.name for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


@pytest.mark.parametrize("path", WITH_EXERCISES, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_every_exercise_is_announced_and_stands_in_order(path):
    notebook = read(path)
    parts = [part for c in notebook["cells"] if (part := part_of(c))]
    expected = ["check", "exercise", "hint", "solution", "wrong-answers"] * len(exercises_of(notebook))
    assert parts == expected, "a cell is missing, doubled or in the wrong place, or a heading is not like '### Exercise 1.2: title'"


@pytest.mark.parametrize("path", WITH_EXERCISES, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_every_exercise_asks_for_what_its_solution_gives(path):
    for exercise in exercises_of(read(path)):
        assert f'NotImplementedError("Exercise {exercise.number}: ' in exercise.stub, f"exercise {exercise.number}: the stub names another one"
        stub, solution = defined_in(exercise.stub), defined_in(exercise.solution)
        assert stub and stub <= solution, f"exercise {exercise.number} asks for {stub - solution}, which the solution does not define"
        statements = [ast.unparse(statement) for statement in ast.parse(exercise.solution).body]
        call = ast.unparse(ast.parse(check_call(exercise)))  # a call over several lines would be cut, and not parse
        assert call in statements, f"exercise {exercise.number}: the check is not called by a line of its own"
        assert check_call(exercise) in exercise.stub, f"exercise {exercise.number}: the stub does not say how to run the check"
        assert check_call(exercise).split("(")[0] in defined_in(exercise.check)
        tried = [n for n in ast.walk(ast.parse(exercise.wrong_answers)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "rejects"]
        sentences = {key.value.value for call in tried for key in call.keywords if key.arg == "says" and isinstance(key.value, ast.Constant)}
        assert len(tried) >= 2 and len(sentences) >= 2, f"exercise {exercise.number}: two wrong answers need two explanations"
        assert all(sentence.strip() for sentence in sentences), f"exercise {exercise.number}: an empty `says` accepts every explanation"


def test_every_exercise_has_a_number_of_its_own():
    numbers = [exercise.number for path in WITH_EXERCISES for exercise in exercises_of(read(path))]
    assert len(numbers) == len(set(numbers)) > 0
    assert {exercise.kind for path in WITH_EXERCISES for exercise in exercises_of(read(path))} <= set(KINDS)


@pytest.fixture(scope="module")
def reader_notebooks(tmp_path_factory):
    """The notebooks as `make exercises` writes them."""
    target = tmp_path_factory.mktemp("reader") / "exercises"
    done = subprocess.run(
        [sys.executable, "-m", "speechlearn.exercises", "nbs", str(target)], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"wrote {len(NOTEBOOKS)} notebooks to {target}"
    return target


def test_the_command_keeps_answers(reader_notebooks, tmp_path):
    """A second run keeps what exists and writes what was deleted."""
    answers = next(reader_notebooks.rglob("03_text.ipynb"))
    before = answers.read_text(encoding="utf-8")
    (reader_notebooks / "index.ipynb").unlink()
    answers.write_text(before + " ", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "speechlearn.exercises", "nbs", str(reader_notebooks)], cwd=ROOT, capture_output=True, text=True, timeout=120,
    )
    assert answers.read_text(encoding="utf-8") == before + " " and (reader_notebooks / "index.ipynb").exists()
    assert f"kept {answers} (it may hold your answers" in done.stdout and "wrote 1 notebooks" in done.stdout
    answers.write_text(before, encoding="utf-8")


def test_reader_notebooks_are_whole_notebooks_that_hold_no_answer(reader_notebooks):
    import nbformat

    for path in NOTEBOOKS:
        written = reader_notebooks / path.relative_to(ROOT / "nbs")
        nbformat.validate(nbformat.read(written, as_version=4))
        notebook, original = read(written), read(path)
        assert notebook["metadata"] == original["metadata"]
        text = "\n".join("".join(c["source"]) for c in notebook["cells"])
        for exercise in exercises_of(original):
            body = exercise.solution[: exercise.solution.rindex(check_call(exercise))].strip()
            assert body not in text, f"{written.name} shows the solution of exercise {exercise.number}"
            assert exercise.wrong_answers.strip() not in text
            assert text.index(exercise.check.strip()) < text.index(exercise.stub.strip()) < text.rindex(check_call(exercise))
        others = [c["source"] for c in original["cells"] if part_of(c) not in ("solution", "wrong-answers")]
        kept = iter("".join(c["source"]) for c in notebook["cells"])
        assert all("".join(source) in kept for source in others), f"{written.name} lost a cell, or their order"


def test_links_between_reader_notebooks_lead_somewhere(reader_notebooks):
    found = 0
    for path in reader_notebooks.rglob("*.ipynb"):
        for c in read(path)["cells"]:
            for link in re.findall(r"\]\(([^)#:\s]+\.ipynb)(?:#[^)]*)?\)", "".join(c["source"]) if c["cell_type"] == "markdown" else ""):
                assert (path.parent / link).is_file(), f"{path.name} links to {link}, which is not there"
                found += 1
    assert found > 0
