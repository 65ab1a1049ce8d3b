"""Error rates of this package against jiwer's, on random pairs of texts.

    python benchmarks/text_equality.py            # writes benchmarks/results/text_equality.json
    python benchmarks/text_equality.py --check    # compares only, writes nothing

For each unit and each size of alphabet: the largest gap between the rates (of single pairs, and of all pairs as one corpus), the edits of both, and
in how many pairs substitutions, deletions and insertions are split otherwise. Such ties are allowed; a gap is not. The exit status is 1 for a gap.
"""
import argparse
import json
import os
import platform
import random
import sys
from importlib.metadata import version
from pathlib import Path

import jiwer

from speechlearn.text import error_rate

RESULT = Path(__file__).resolve().parent / "results" / "text_equality.json"
COMMAND = "python benchmarks/text_equality.py"
LIMIT = 1e-12
N_PAIRS = 2000
SEED = 0
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def random_pairs(n_words: int) -> list[tuple[str, str]]:
    """Pairs over `n_words` words of one to four letters. Few words make many ties. Hypotheses may be empty."""
    draw = random.Random(SEED + n_words)
    words = ["".join(draw.choices(LETTERS, k=draw.randint(1, 4))) for _ in range(n_words)]
    return [(" ".join(draw.choices(words, k=draw.randint(1, 10))), " ".join(draw.choices(words, k=draw.randint(0, 12)))) for _ in range(N_PAIRS)]


def compare(unit: str, n_words: int) -> dict:
    process = jiwer.process_words if unit == "word" else jiwer.process_characters
    rate = (lambda out: out.wer) if unit == "word" else (lambda out: out.cer)
    pairs, gap, ties = random_pairs(n_words), 0.0, 0
    for reference, hypothesis in pairs:
        ours, theirs = error_rate([reference], [hypothesis], unit=unit), process(reference, hypothesis)
        gap = max(gap, abs(ours.rate - rate(theirs)))
        ties += (ours.substitutions, ours.deletions, ours.insertions) != (theirs.substitutions, theirs.deletions, theirs.insertions)
    references, hypotheses = map(list, zip(*pairs))
    ours, theirs = error_rate(references, hypotheses, unit=unit), process(references, hypotheses)
    return {
        "unit": unit, "n_words": n_words, "n_pairs": len(pairs), "largest_gap_pair": gap, "gap_corpus": abs(ours.rate - rate(theirs)),
        "rate_corpus": ours.rate, "edits_ours": ours.substitutions + ours.deletions + ours.insertions,
        "edits_jiwer": theirs.substitutions + theirs.deletions + theirs.insertions, "pairs_with_rate_above_1": sum(
            error_rate([r], [h], unit=unit).rate > 1 for r, h in pairs), "pairs_split_otherwise": ties,
    }


def empty_references() -> list[dict]:
    rows = []
    for references, hypotheses in (([""], [""]), ([""], ["a"]), (["a", ""], ["a", "x y"])):
        try:
            ours = error_rate(references, hypotheses).rate
        except ValueError as error:
            ours = f"ValueError: {error}"
        rows.append({"references": references, "hypotheses": hypotheses, "ours": ours, "jiwer": jiwer.wer(references, hypotheses)})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    arguments = parser.parse_args()
    rows = [compare(unit, n_words) for unit in ("word", "character") for n_words in (2, 5, 200)]
    for row in rows:
        print(f"{row['unit']:9s} {row['n_words']:4d} words: largest gap {max(row['largest_gap_pair'], row['gap_corpus']):.1e}, split otherwise in {row['pairs_split_otherwise']} of {row['n_pairs']} pairs")
    result = {
        "command": COMMAND, "seed": SEED, "limit": LIMIT,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("jiwer", "rapidfuzz")}},
        "random_pairs": rows, "empty_references": empty_references(),
    }
    if not arguments.check:
        beside = RESULT.with_suffix(".tmp")
        beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, RESULT)
    bad = [row for row in rows if max(row["largest_gap_pair"], row["gap_corpus"]) > LIMIT or row["edits_ours"] != row["edits_jiwer"]]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
