"""CTC: time of the loss against torch's, error rates and time of the searches, errors of word times.

    python benchmarks/ctc.py speed|search|alignment [...] [--rounds N]

`speed`      our CTC loss and torch's, forward and backward through log_softmax, in turns in one process. A ratio below 1 means that ours needs less time.
`search`     the CTC output of the shipped recogniser `commands` on unseen voices and sentences: greedy, prefix search, and prefix search with a trigram of the
             5,000 training sentences. Weight and word bonus of the language model are chosen on the development set.
`alignment`  forced alignment of the known texts against the word times that the synthesiser noted; the shifts are measured on the development set.

Parts that are not named keep their stored results.
"""
import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F

import speechlearn
from speechlearn.alignment.ctc import ctc_greedy, ctc_loss
from speechlearn.alignment.forced import forced_alignment, measured_shifts, word_times
from speechlearn.alignment.language_model import train_ngram
from speechlearn.alignment.search import WordFusion, prefix_beam_search
from speechlearn.data.synthetic import make_corpus
from speechlearn.recogniser import FLOOR_DB, load_recogniser
from speechlearn.sound.features import normalise_utterance
from speechlearn.text import word_error_rate

RESULTS = Path(__file__).parent / "results" / "ctc.json"
BATCH, STEPS, TOKENS, VOCAB = 16, 400, 60, 500


def speed(rounds):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, STEPS, VOCAB, generator=g, requires_grad=True)
    targets = torch.randint(1, VOCAB, (BATCH, TOKENS), generator=g)
    lengths = torch.randint(STEPS // 2, STEPS + 1, (BATCH,), generator=g)
    target_lengths = torch.randint(TOKENS // 2, TOKENS + 1, (BATCH,), generator=g)
    lengths[0], target_lengths[0] = STEPS, TOKENS
    losses = {
        "ours": lambda lp: ctc_loss(lp, targets, lengths, target_lengths, blank=0),
        "torch": lambda lp: F.ctc_loss(lp.transpose(0, 1), targets, lengths, target_lengths, reduction="none"),
    }
    seconds, values = {name: [] for name in losses}, {}
    for i in range(rounds + 1):
        for name in sorted(losses, reverse=i % 2 == 1):  # in turns, so that both meet the same disturbances
            start = time.perf_counter()
            loss = losses[name](logits.log_softmax(dim=-1))
            gradient = torch.autograd.grad(loss.sum(), logits)[0]
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
            values[name] = loss.detach(), gradient
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "time ratio": round(medians["ours"] / medians["torch"], 3),
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "largest relative difference of the losses": float(((values["ours"][0] - values["torch"][0]) / values["torch"][0]).abs().max()),
        "sizes": dict(batch=BATCH, steps=STEPS, tokens=TOKENS, vocab=VOCAB),
    }


class Outputs:
    """The CTC output of the shipped recogniser for a split."""

    def __init__(self, split):
        self.recogniser = load_recogniser("commands")
        self.vocabulary, self.frame_seconds = self.recogniser.vocabulary, self.recogniser.model.frame_seconds
        self.never = tuple(range(1, len(self.vocabulary) - len(self.vocabulary.symbols)))
        self.utterances = list(make_corpus("commands", split))
        self.seconds = sum(u.seconds for u in self.utterances)
        start = time.perf_counter()
        self.outputs = [self._output(u) for u in self.utterances]
        self.model_seconds = time.perf_counter() - start

    @torch.no_grad()
    def _output(self, utterance):
        waveform = utterance.waveform(16_000)
        waveform = waveform + 10 ** (FLOOR_DB / 20) * torch.randn(len(waveform), generator=torch.Generator().manual_seed(0))  # as Recogniser.transcribe does
        mel, lengths = self.recogniser.features(waveform[None], torch.tensor([len(waveform)]))
        memory, steps = self.recogniser.model.encoder(normalise_utterance(mel, lengths), lengths)
        return self.recogniser.model.ctc_head(memory).log_softmax(dim=-1), steps

    def row(self, name, decode):
        start = time.perf_counter()
        texts = [self.vocabulary.decode(decode(x, n)) for x, n in self.outputs]
        seconds = time.perf_counter() - start
        return {"name": name, "wer": word_error_rate([u.text for u in self.utterances], texts), "real_time_factor": round(seconds / self.seconds, 5)}

    def search(self, beam, model=None):
        def decode(x, n):
            found = prefix_beam_search(x, n, blank=0, beam=beam, model=model, never=self.never, threshold=-10.0)[0]
            return found[0].tokens if found else ()

        return decode


def search(rounds):
    ngram = train_ngram([u.text for u in make_corpus("commands", "train")], order=3)
    development = Outputs("dev")
    grid = []
    for weight in (0.0, 0.1, 0.2, 0.4, 0.8, 1.6):
        for bonus in (0.0, 1.0):
            row = development.row("", development.search(8, WordFusion(ngram, development.vocabulary, weight=weight, word_bonus=bonus, closed=True)))
            grid.append({"weight": weight, "word_bonus": bonus, "wer": row["wer"]})
            print(grid[-1], flush=True)
    best = min(grid, key=lambda cell: cell["wer"])
    test = Outputs("test")
    fusion = {closed: WordFusion(ngram, test.vocabulary, weight=best["weight"], word_bonus=best["word_bonus"], closed=closed) for closed in (False, True)}
    rows = [
        test.row("greedy", lambda x, n: ctc_greedy(x, n, blank=0)[0].tokens),
        test.row("prefix search, beam 8", test.search(8)),
        test.row("prefix search, beam 8, trigram", test.search(8, fusion[False])),
        test.row("prefix search, beam 8, trigram, closed", test.search(8, fusion[True])),
        test.row("prefix search, beam 32, trigram, closed", test.search(32, fusion[True])),
    ]
    for row in rows:
        print(row, flush=True)
    return {"rows": rows, "development": grid, "chosen": best, "utterances": len(test.utterances), "perplexity": ngram.perplexity(u.text for u in test.utterances)}


def alignment(rounds):
    def errors(split, shifts=(0.0, 0.0)):
        outputs, starts, ends = Outputs(split), [], []
        for u, (x, n) in zip(outputs.utterances, outputs.outputs):
            tokens = outputs.vocabulary.encode(u.text)
            found = forced_alignment(x, torch.tensor([tokens]), n, torch.tensor([len(tokens)]), blank=0)[0]
            words = word_times(found, outputs.vocabulary, frame_seconds=outputs.frame_seconds, start_shift=shifts[0], end_shift=shifts[1], seconds=u.seconds)
            starts += [ours.start - true.start for ours, true in zip(words, u.words, strict=True)]
            ends += [ours.end - true.end for ours, true in zip(words, u.words, strict=True)]
        return starts, ends, len(outputs.utterances)

    starts, ends, _ = errors("dev")
    shifts = measured_shifts(starts, ends)
    record = {"shifts_ms": [round(1000 * shift, 1) for shift in shifts]}
    for name, used in (("raw_", (0.0, 0.0)), ("", shifts)):
        starts, ends, n = errors("test", used)
        sizes = sorted(abs(e) for e in starts + ends)
        record |= {
            f"{name}median_ms": 1000 * statistics.median(sizes), f"{name}percentile_90_ms": 1000 * sizes[int(0.9 * len(sizes))],
            f"{name}median_starts_ms": 1000 * statistics.median(map(abs, starts)), f"{name}median_ends_ms": 1000 * statistics.median(map(abs, ends)), "borders": len(sizes), "utterances": n,
        }
    print(record)
    return record


PARTS = {"speed": speed, "search": search, "alignment": alignment}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=sorted(PARTS))
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.parts:
        record = PARTS[name](args.rounds)
        record["command"] = f"python benchmarks/ctc.py {name}"
        record["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "speechlearn": speechlearn.__version__, "machine": f"{platform.machine()}, 1 thread of {os.cpu_count()} cores"}
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(results | {name: record}, indent=1, sort_keys=True) + "\n")
        print(name, "stored", flush=True)


if __name__ == "__main__":
    main()
