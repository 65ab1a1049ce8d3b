"""What several tests of the Zipformer's parts share."""
import random

import torch


def randn(*shape, seed=0, dtype=torch.float64, scale=1.0):
    """Numbers of a seed of their own."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def frames(n_frames, batch=1, seed=1, dim=12):
    """Inputs of a layer, time first."""
    return randn(n_frames, batch, dim, seed=seed)


def draws(monkeypatch, *values):
    """Decisions draw these in turn, then the last one again; the list that comes back holds what was drawn."""
    drawn = []

    def draw():
        drawn.append(values[min(len(drawn), len(values) - 1)])
        return drawn[-1]

    monkeypatch.setattr(random, "random", draw)
    return drawn


def gradient(module, x, g):
    """What a module that must not change values makes of a gradient."""
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    assert torch.equal(y, x), f"{type(module).__name__} never changes values"
    return torch.autograd.grad(y, leaf, g)[0]


def shaken(module, seed=0, scale=0.15):
    """A module whose projections are no longer small, in 64 bits."""
    module, generator = module.double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module
