"""The guitar codec of chapter 29, trained for longer: bit rate against spectral distance, and the use of its codebooks.

    python benchmarks/codec.py [--runs FOLDER] [--steps N] [--sounds N]

Trains on synthetic guitar notes, half of them through one of five pedals with random settings, and measures on 96 sounds that were not trained on, dry ones and
wet ones apart. A run in FOLDER that was begun is continued. The checkpoint is written to FOLDER/codec-checkpoint (16-bit) and can be read with
speechlearn.checkpoint.load_checkpoint.
"""
import argparse
import json
import platform
import resource
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import speechlearn
from speechlearn.checkpoint import load_checkpoint, save_checkpoint
from speechlearn.codec import CodecConfig, ConvCodec, SoundPieces, measure_codec
from speechlearn.guitar import random_sound
from speechlearn.training import TrainConfig, train

RESULTS = Path(__file__).parent / "results" / "codec.json"
TRAIN_SEED, TEST_SEED = 0, 1


def sounds(n, seed, wet):
    return [random_sound(seed, i, wet=wet) for i in range(n)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs", help="folder for the run and its checkpoint")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--sounds", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(args.runs) / "codec"
    began = time.process_time()
    trained_on = [waveform for waveform, _ in sounds(args.sounds, TRAIN_SEED, wet=0.5)]
    dry = torch.stack([waveform for waveform, _ in sounds(48, TEST_SEED, wet=0.0)])
    wet = sounds(96, TEST_SEED + 1, wet=1.0)
    synthesis = time.process_time() - began

    torch.manual_seed(0)
    codec = ConvCodec(CodecConfig())
    loader = DataLoader(SoundPieces(trained_on, 8192), batch_size=8, shuffle=True, drop_last=True)
    config = TrainConfig(n_steps=args.steps, learning_rate=3e-3, warmup_steps=50, validate_every=max(1, args.steps // 10), log_every=25, accelerator="cpu")
    began = time.process_time()
    result = train(codec, loader, [dry], config=config, directory=folder, resume="auto", show="none")
    training = time.process_time() - began
    saved = save_checkpoint(Path(args.runs) / "codec-checkpoint", codec, vocabulary=None, metadata={"data": "synthetic plucked strings, five pedals", "steps": result.step}, dtype="float16")
    codec = load_checkpoint(saved).model  # what is measured is what was saved

    names = sorted({name for _, name in wet})
    record = {
        "dry": measure_codec(codec, dry),
        "wet": measure_codec(codec, torch.stack([waveform for waveform, _ in wet])),
        "pedals": {name: measure_codec(codec, torch.stack([waveform for waveform, pedal in wet if pedal == name]))[-1]["distance_db"] for name in names},
        "curve": [[line["step"], round(line["valid_spectral"], 4)] for line in result.history if "valid_spectral" in line],
        "parameters": sum(p.numel() for p in codec.parameters()),
        "steps": result.step,
        "training_minutes": round(result.seconds / 60, 2),
        "cpu_minutes": round((synthesis + training) / 60, 2),  # 0 for a finished run that was only measured
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "command": f"python benchmarks/codec.py --steps {args.steps} --sounds {args.sounds}",
        "versions": {"speechlearn": speechlearn.__version__, "torch": torch.__version__, "python": platform.python_version(), "machine": f"{platform.machine()}, 1 thread"},
    }
    RESULTS.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    print(json.dumps(record["dry"], indent=1), record["cpu_minutes"], flush=True)


if __name__ == "__main__":
    main()
