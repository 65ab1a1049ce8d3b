"""Our encoder-decoder against torch.nn.Transformer of equal sizes: one training step, and writing 100 tokens greedily.

    python benchmarks/transformer.py [--threads N] [--rounds N]

Both models get the same embedded inputs and masks, have the same number of parameters in their blocks, and are measured in turns in one process;
the peak memory of each is measured in a process of its own. Ratios below 1 mean that ours needs less.
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

import speechlearn
from speechlearn.transformer.attention import causal_mask, padding_mask
from speechlearn.transformer.blocks import BlockCache, TransformerStack

RESULTS = Path(__file__).parent / "results" / "transformer.json"
D_MODEL, N_HEADS, N_LAYERS, D_FEEDFORWARD, DROPOUT = 256, 4, 4, 1024, 0.1
BATCH, SOURCE, TARGET, VOCAB, WRITTEN = 16, 100, 40, 500, 100


class Ours(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = TransformerStack(N_LAYERS, D_MODEL, N_HEADS, D_FEEDFORWARD, dropout=DROPOUT)
        self.decoder = TransformerStack(N_LAYERS, D_MODEL, N_HEADS, D_FEEDFORWARD, dropout=DROPOUT, cross_attention=True)
        self.head = nn.Linear(D_MODEL, VOCAB)

    def forward(self, source, lengths, target):
        mask = padding_mask(lengths, source.shape[1])
        memory = self.encoder(source, mask=mask)
        return self.head(self.decoder(target, memory, mask=causal_mask(target.shape[1]), memory_mask=mask))

    def write(self, source, lengths, table, n):
        mask = padding_mask(lengths, source.shape[1])
        memory, caches = self.encoder(source, mask=mask), [BlockCache() for _ in self.decoder.blocks]
        tokens = torch.zeros(len(source), 1, dtype=torch.long)
        for _ in range(n):
            y = self.decoder(table[tokens[:, -1:]], memory, memory_mask=mask, caches=caches)
            tokens = torch.cat([tokens, self.head(y[:, -1]).argmax(dim=-1, keepdim=True)], dim=1)
        return tokens


class Torchs(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = nn.Transformer(D_MODEL, N_HEADS, N_LAYERS, N_LAYERS, D_FEEDFORWARD, DROPOUT, batch_first=True, norm_first=True)
        self.head = nn.Linear(D_MODEL, VOCAB)

    def forward(self, source, lengths, target):
        padding = torch.arange(source.shape[1]) >= lengths[:, None]
        causal = ~causal_mask(target.shape[1])
        return self.head(self.transformer(source, target, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding, tgt_is_causal=True))

    def write(self, source, lengths, table, n):
        padding = torch.arange(source.shape[1]) >= lengths[:, None]
        memory = self.transformer.encoder(source, src_key_padding_mask=padding)
        tokens = torch.zeros(len(source), 1, dtype=torch.long)
        for i in range(n):
            y = self.transformer.decoder(table[tokens], memory, tgt_mask=~causal_mask(i + 1), memory_key_padding_mask=padding, tgt_is_causal=True)
            tokens = torch.cat([tokens, self.head(y[:, -1]).argmax(dim=-1, keepdim=True)], dim=1)
        return tokens


MODELS = {"ours": Ours, "torch": Torchs}


def inputs():
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(BATCH, n, D_MODEL, generator=generator) for n in (SOURCE, TARGET))
    lengths = torch.randint(SOURCE // 2, SOURCE + 1, (BATCH,), generator=generator)
    answer = torch.randint(VOCAB, (BATCH, TARGET), generator=generator)
    return source, lengths, target, answer, torch.randn(VOCAB, D_MODEL, generator=generator)


def make_task(name: str, task: str):
    """A function that does the task once."""
    torch.manual_seed(0)
    model = MODELS[name]()
    source, lengths, target, answer, table = inputs()
    if task == "train":
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step():
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(source, lengths, target).flatten(0, 1), answer.flatten()).backward()
            optimiser.step()

        return step
    model.eval()

    def write():
        with torch.no_grad():
            model.write(source, lengths, table, WRITTEN)

    return write


def peak_mib(name: str, task: str, threads: int) -> float:
    """Growth of the resident memory of a fresh process (Linux) while it does the task three times."""
    code = (
        f"import re, torch; torch.set_num_threads({threads}); from transformer import make_task; run = make_task({name!r}, {task!r});"
        "status = lambda key: int(re.search(key + r':\\s+(\\d+) kB', open('/proc/self/status').read())[1]) / 1024;"
        "open('/proc/self/clear_refs', 'w').write('5'); before = status('VmRSS'); [run() for _ in range(3)]; print(status('VmHWM') - before)"
    )
    return float(subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parent, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    record = {"tasks": {}}
    for task in ("train", "write"):
        runs = {name: make_task(name, task) for name in MODELS}
        for run in runs.values():
            run()
        seconds = {name: [] for name in runs}
        for i in range(args.rounds if task == "train" else max(3, args.rounds // 2)):  # in turns, so that both meet the same disturbances
            for name in sorted(runs, reverse=i % 2 == 1):
                start = time.perf_counter()
                runs[name]()
                seconds[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        memory = {name: peak_mib(name, task, args.threads) for name in runs}
        record["tasks"][task] = {
            "time ratio": round(medians["ours"] / medians["torch"], 3),
            "memory ratio": round(memory["ours"] / memory["torch"], 3),
            "seconds": {name: round(value, 4) for name, value in medians.items()},
            "peak MiB above start": {name: round(value, 1) for name, value in memory.items()},
        }
        print(task, record["tasks"][task], flush=True)
    record["blocks' parameters"] = {name: sum(p.numel() for p in model().parameters()) for name, model in MODELS.items()}
    record["sizes"] = dict(d_model=D_MODEL, n_heads=N_HEADS, layers=[N_LAYERS, N_LAYERS], d_feedforward=D_FEEDFORWARD, batch=BATCH, source=SOURCE, target=TARGET, written=WRITTEN)
    record["command"] = f"python benchmarks/transformer.py --threads {args.threads} --rounds {args.rounds}"
    record["versions"] = {"python": platform.python_version(), "torch": torch.__version__, "speechlearn": speechlearn.__version__, "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    RESULTS.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
