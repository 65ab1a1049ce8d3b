"""Copy a trained recogniser into the package, with half-precision weights and its measured error rates.

    python benchmarks/ship_checkpoint.py RUN NAME [--runs FOLDER]

RUN is a run of benchmarks/first_recogniser.py, such as mixed-2400; NAME is what `--checkpoint` will call it, such as digits.
"""
import argparse
import json
from pathlib import Path

from speechlearn.checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("name")
    parser.add_argument("--runs", default="runs")
    args = parser.parse_args()
    measured = json.loads((ROOT / "benchmarks" / "results" / "first_recogniser.json").read_text())[args.run]
    loaded = load_checkpoint(Path(args.runs) / args.run / "recogniser")
    corpora = measured["recipe"]["corpus"]
    metadata = {
        "trained_on": corpora,
        "licence": "CC BY-SA 4.0 as far as derived from the Free Spoken Digit Dataset; see NOTICE" if "fsdd" in corpora else "Apache-2.0",
        "attribution": "Free Spoken Digit Dataset, Zohar Jackson and contributors, github.com/Jakobovski/free-spoken-digit-dataset" if "fsdd" in corpora else "",
        "command": measured["command"],
        "word_error_rates": {test: round(numbers["wer"], 5) for test, numbers in measured["tests"].items()},
    }
    folder = save_checkpoint(
        ROOT / "speechlearn" / "checkpoints" / args.name, loaded.model, vocabulary=loaded.vocabulary, features=loaded.features, metadata=metadata, dtype="float16"
    )
    print(folder, sum(p.stat().st_size for p in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main()
