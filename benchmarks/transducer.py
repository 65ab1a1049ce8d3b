"""Transducer losses: memory and time of one training step of joiner and loss.

    python benchmarks/transducer.py [--rounds N]

The joiner, the predictor and the projections get the same input. Time is measured in turns in one process, the peak memory of each in a process of its own
(highest resident size minus the size before; a miniature step has loaded all code by then). The first row computes the loss as one would first write it, from torch's log_softmax.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import speechlearn
from speechlearn.alignment.pruned import pruned_transducer_losses
from speechlearn.alignment.transducer import Decoder, Joiner, lattice_log_prob, transducer_loss

RESULTS = Path(__file__).parent / "results" / "transducer.json"
BATCH, STEPS, TOKENS, VOCAB, ENCODER, DECODER, JOINER, ROWS = 8, 200, 40, 500, 256, 512, 512, 5


def make_task(name, batch=BATCH, n_steps=STEPS, n_tokens=TOKENS):
    """A training step: forward and backward through joiner, predictor and loss."""
    torch.manual_seed(0)
    decoder, joiner = Decoder(VOCAB, DECODER, 0, 2), Joiner(ENCODER, DECODER, JOINER, VOCAB)
    simple_am_proj, simple_lm_proj = nn.Linear(ENCODER, VOCAB), nn.Linear(DECODER, VOCAB)
    sound = torch.randn(batch, n_steps, ENCODER, requires_grad=True)
    targets = torch.randint(1, VOCAB, (batch, n_tokens))
    lengths, target_lengths = torch.linspace(n_steps // 2, n_steps, batch).long(), torch.linspace(n_tokens // 2, n_tokens, batch).long()

    def logits():
        rows = decoder(F.pad(targets, (1, 0)))
        return joiner(joiner.encoder_proj(sound)[:, :, None], joiner.decoder_proj(rows)[:, None], project_input=False)

    def library():
        log_probs = logits().log_softmax(dim=-1)
        symbol = log_probs[:, :, :-1].gather(3, targets[:, None, :, None].expand(-1, n_steps, -1, -1))[..., 0]
        return -lattice_log_prob(symbol, log_probs[..., 0], lengths, target_lengths)

    def pruned():
        simple, exact = pruned_transducer_losses(
            sound, targets, lengths, target_lengths, decoder=decoder, joiner=joiner, simple_am_proj=simple_am_proj, simple_lm_proj=simple_lm_proj, blank=0, n_rows=ROWS
        )
        return 0.5 * simple + exact

    losses = {
        "full loss through log_softmax": library,
        "full loss": lambda: transducer_loss(logits(), targets, lengths, target_lengths, blank=0),
        "full loss, gradient written over the logits": lambda: transducer_loss(logits(), targets, lengths, target_lengths, blank=0, overwrite_logits=True),
        f"simple and pruned loss, {ROWS} rows": pruned,
    }

    def step():
        sound.grad = None
        losses[name]().sum().backward()

    return step


NAMES = ("full loss through log_softmax", "full loss", "full loss, gradient written over the logits", f"simple and pruned loss, {ROWS} rows")


def peak_mib(name):
    code = (
        f"import torch; torch.set_num_threads(1); import transducer; transducer.make_task({name!r}, 2, 10, 6)(); step = transducer.make_task({name!r})\n"
        "def status(key): return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith(key)) / 1024\n"
        "open('/proc/self/clear_refs', 'w').write('5'); before = status('VmRSS'); step(); step(); print(status('VmHWM') - before)"
    )
    # A fixed threshold makes the C library give every freed tensor back to the system at once; otherwise holes between tensors count as used.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    return float(subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parent, env=environment, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps = {name: make_task(name) for name in NAMES}
    seconds = {name: [] for name in steps}
    for i in range(args.rounds + 1):
        for name in sorted(steps, reverse=i % 2 == 1):  # in turns, so that all meet the same disturbances
            start = time.perf_counter()
            steps[name]()
            if i:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    rows = {name: {"seconds": round(statistics.median(seconds[name]), 4), "peak_mib": round(peak_mib(name), 1)} for name in NAMES}
    full, pruned = rows["full loss"], rows[NAMES[-1]]
    record = {
        "rows": rows,
        "pruned / full": {"memory ratio": round(pruned["peak_mib"] / full["peak_mib"], 3), "time ratio": round(pruned["seconds"] / full["seconds"], 3)},
        "sizes": dict(batch=BATCH, steps=STEPS, tokens=TOKENS, vocab=VOCAB, encoder=ENCODER, decoder=DECODER, joiner=JOINER, rows=ROWS),
        "command": f"python benchmarks/transducer.py --rounds {args.rounds}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "speechlearn": speechlearn.__version__, "machine": f"{platform.machine()}, 1 thread of {os.cpu_count()} cores"},
    }
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(results | {"loss": record}, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
