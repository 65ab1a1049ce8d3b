"""Build the book: execute what changed, in parallel, then render with warnings as errors.

    python book/build.py            # build
    python book/build.py --execute  # only execute the notebooks
"""
import argparse
import asyncio
import copy
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import speechlearn_book as book  # noqa: E402

CELL_TIMEOUT_S = 600
ANSI = r"\x1b\[[0-9;]*m"  # colours of tracebacks, unreadable in a log
OVERRUN = 1.5  # a chapter may take half as long again as its front matter states, on a machine as fast as the one that was measured
YARDSTICK_S = 6.5  # what `yardstick` takes there


def n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def execute(path: Path):
    """Run one notebook in a kernel of its own. Returns (executed notebook, seconds)."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    metadata = copy.deepcopy(notebook.metadata)
    client = NotebookClient(
        notebook, timeout=CELL_TIMEOUT_S, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,  # written into the cells, it would hide them from the cache
        extra_arguments=["--IPKernelApp.log_level=40"],  # each kernel would warn that it speaks TCP on this machine
    )
    start = time.perf_counter()
    client.execute()
    seconds = time.perf_counter() - start
    notebook.metadata = metadata  # the kernel adds to it; the cache compares it with the file's
    return notebook, seconds


def execute_changed() -> dict[str, float]:
    """Fill the cache with every notebook of `_toc.yml` that is not in it. Returns seconds by document name."""
    from jupyter_cache import get_cache
    from jupyter_cache.base import CacheBundleIn
    from nbformat import read

    # One thread for each kernel: kernels share the cores, and threads that fight are slower than one.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"

    cache = get_cache(str(book.CACHE))
    cache.change_cache_limit(1000)
    todo, seconds = [], {}
    for name, chapter in book.chapters_in_toc():
        path = book.ROOT / f"{name}.ipynb"
        try:
            record = cache.match_cache_notebook(read(path, as_version=4))
            seconds[name] = record.data["execution_seconds"]
        except KeyError:
            todo.append((name, chapter, path))
    todo.sort(key=lambda item: -item[1]["seconds"])  # the longest first, so that no core waits at the end
    failed = []

    def run(item):
        name, chapter, path = item
        asyncio.set_event_loop(asyncio.new_event_loop())
        try:
            return item, *execute(path), None
        except Exception as error:
            return item, None, None, error

    start = time.perf_counter()
    with ThreadPoolExecutor(n_cores()) as pool:
        for done, future in enumerate(as_completed([pool.submit(run, item) for item in todo]), 1):
            (name, chapter, path), notebook, took, error = future.result()
            if error is not None:
                failed.append((name, error))
                print(f"[{done}/{len(todo)}] {name}: FAILED", flush=True)
                continue
            cache.cache_notebook_bundle(
                CacheBundleIn(notebook, str(path), data={"execution_seconds": took}), check_validity=False, overwrite=True
            )
            seconds[name] = took
            print(f"[{done}/{len(todo)}] {name}: {took:.1f} s", flush=True)
    if todo:
        print(f"executed {len(todo)} notebooks in {time.perf_counter() - start:.0f} s")
    for name, error in failed:
        print(f"\n{name} failed:\n{re.sub(ANSI, '', str(error))}", file=sys.stderr)
    if failed:
        raise SystemExit(f"{len(failed)} notebooks failed: {', '.join(name for name, _ in failed)}")
    return seconds


def yardstick() -> float:
    """Seconds that a fixed piece of training takes: how fast this machine is at this moment at what the long chapters do."""
    code = (
        "import time, torch; torch.manual_seed(0)\n"
        "model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(64, 4, 256, batch_first=True), 4)\n"
        "optimiser, x = torch.optim.AdamW(model.parameters()), torch.randn(32, 16, 64)\n"
        "def step(): model(x).square().mean().backward(); optimiser.step(); optimiser.zero_grad()\n"
        "step(); start = time.perf_counter()\n"
        "for _ in range(200): step()\n"
        "print(time.perf_counter() - start)"
    )
    return float(subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, text=True).stdout)


def refuse_slow_chapters(seconds: dict[str, float]) -> None:
    """Stop when a chapter needs more than its front matter states by half.

    Such a chapter gets a second try, alone. There a slow or busy machine is not its fault: the limit grows with the time
    that the yardstick takes before and after it.
    """
    stated = {name: chapter["seconds"] for name, chapter in book.chapters_in_toc()}
    over = {name: took for name, took in seconds.items() if took > OVERRUN * stated[name]}
    before = yardstick() if over else 0.0
    for name in list(over):
        again = min(over[name], execute(book.ROOT / f"{name}.ipynb")[1])
        after = yardstick()
        slowness = max(1.0, before / YARDSTICK_S, after / YARDSTICK_S)
        before = after
        print(f"{name}: {over[name]:.1f} s, run again alone: {again:.1f} s (states {stated[name]} s; this machine takes {slowness:.2f} times as long as the measured one)", flush=True)
        over[name] = seconds[name] = again
        if again <= OVERRUN * slowness * stated[name]:
            del over[name]
    if over:
        lines = "\n".join(f"  {name}: {took:.1f} s, states {stated[name]} s" for name, took in over.items())
        raise SystemExit(f"these chapters take more than {OVERRUN} times what their front matter states:\n{lines}\nMake them faster, or state the truth.")


def render() -> None:
    command = [str(Path(sys.executable).parent / "jupyter-book"), "build", str(book.ROOT), "-W", "--keep-going"]
    result = subprocess.run(command, cwd=book.ROOT)
    if result.returncode:
        raise SystemExit(result.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--execute", action="store_true", help="execute the notebooks, render nothing")
    args = parser.parse_args()
    start = time.perf_counter()
    if book.forget_stale_outputs():
        print("package, pins or data changed (or first build): all notebooks run anew")
    seconds = execute_changed()
    refuse_slow_chapters(seconds)
    book.TIMES_FILE.write_text(json.dumps(seconds, indent=1, sort_keys=True))
    if args.execute:
        return
    render()
    print(f"\nThe book is ready after {time.perf_counter() - start:.0f} s.")
    print("  look:  open _build/html/index.html in a browser")
    print("  serve: python -m http.server --directory _build/html 8000   then visit http://localhost:8000")


if __name__ == "__main__":
    main()
