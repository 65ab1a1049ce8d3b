"""Fixtures that several test files share."""
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--no-first-run",
    "--disable-component-update", "--disable-sync",
]


def pytest_addoption(parser):
    parser.addoption("--golden-dir", action="append", default=[], help="folder of golden files for tests/test_golden.py; may be given several times")
    parser.addoption("--golden-json", help="write the worst differences of each component into this file")


def pytest_terminal_summary(terminalreporter, config):
    """Worst errors against the reference, when its files were compared."""
    import sys

    runner = sys.modules.get("test_golden") or sys.modules.get("tests.test_golden")
    if runner is None or not runner.Worst.rows:
        return
    terminalreporter.section("worst relative difference from the reference")
    terminalreporter.write_line(f"{'component':60} {'output':>9} {'grad input':>11} {'grad params':>12}")
    for name, row in sorted(runner.Worst.rows.items()):
        figures = ["-" if row[kind] is None else f"{row[kind]:.1e}" for kind in ("output", "grad input", "grad params")]
        terminalreporter.write_line("{:60} {:>9} {:>11} {:>12}".format(name[:60], *figures))


    if config.getoption("--golden-json"):
        write_golden_table(Path(config.getoption("--golden-json")), runner.Worst.rows)


def write_golden_table(path, rows):
    import json
    import platform

    import torch

    table = {
        "command": f"pytest tests/test_golden.py --golden-json {path.as_posix()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s)"},
        "rows": rows,
    }
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium; the test is skipped where none is installed."""
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser found ({', '.join(BROWSERS)}); pages were not opened")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def root() -> Path:
    return ROOT
