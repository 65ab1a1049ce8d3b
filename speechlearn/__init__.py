"""Speech recognition with Transformers, built step by step and tested.

Each chapter of the book exports one module of this package; import what you need from there,
for instance `from speechlearn.sound.features import LogMel`.
"""
__version__ = "0.1.0"

from . import torchaudio_cpu

# torchaudio's Linux wheel wants CUDA libraries even when torch is a CPU build; see that module.
torchaudio_cpu.install()
