"""Tensors to save, and ways to slice them over ranks."""

import math
import random
from pathlib import Path

import torch
from processes import run_ranks

from pipehc.checkpoint.flat_slices import Held
from pipehc.checkpoint.store import Checkpoints, FlatSlice

SHAPES = {
    "master": ((7, 5), torch.float32),
    "weight": ((6, 11), torch.bfloat16),
    "counts": ((13,), torch.int64),
    "scalar": ((), torch.float32),
    "none": ((0, 4), torch.float32),
    "cube": ((3, 4, 5), torch.float64),
}


def reference(name: str, seed: int = 0) -> torch.Tensor:
    shape, dtype = SHAPES[name]
    generator = torch.Generator().manual_seed(seed * 100 + list(SHAPES).index(name))
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(-(2**62), 2**62, shape, generator=generator, dtype=dtype)


def cut(tensor: torch.Tensor, bounds: list[int], rank: int) -> FlatSlice:
    start, stop = bounds[rank], bounds[rank + 1]
    return FlatSlice(tuple(tensor.shape), start, tensor.reshape(-1)[start:stop].clone())


def interleaved(tensor: torch.Tensor, world: int, rank: int) -> list[FlatSlice]:
    """Every world-th element that is not one of the last two, which one rank has."""
    total = tensor.numel()
    starts = [*range(rank, total - 2, world)]
    found = [FlatSlice(tuple(tensor.shape), start, tensor.reshape(-1)[start : start + 1].clone()) for start in starts]
    end = max(0, total - 2)
    return [*found, FlatSlice(tuple(tensor.shape), end, tensor.reshape(-1)[end:].clone())] if rank == world - 1 else found


def bounds(name: str, world: int, seed: int) -> list[int]:
    """Uneven cuts, some of them empty."""
    total = math.prod(SHAPES[name][0])
    inner = sorted(random.Random(f"{name}{world}{seed}").choices(range(total + 1), k=world - 1))
    return [0, *inner, total]


def held(rank: int, world: int, seed: int) -> dict[str, Held]:
    """A layout: some tensors sliced over all ranks, some in many ranges, some whole everywhere, some whole on one rank only."""
    result: dict[str, Held] = {}
    for i, name in enumerate(SHAPES):
        kind = (i + seed) % 4
        if kind == 0:
            result[name] = cut(reference(name), bounds(name, world, seed), rank)
        elif kind == 3:
            result[name] = interleaved(reference(name), world, rank)
        elif kind == 1 or rank == i % world:
            result[name] = reference(name)
    return result


def zeroed(tensors):
    def zero(t):
        if isinstance(t, list):
            return [zero(part) for part in t]
        return FlatSlice(t.shape, t.start, torch.zeros_like(t.tensor)) if isinstance(t, FlatSlice) else torch.zeros_like(t)

    return {name: zero(tensor) for name, tensor in tensors.items()}


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        for a, b in zip(*(t if isinstance(t, list) else [t] for t in (got[name], want[name])), strict=True):
            if isinstance(b, FlatSlice):
                a, b = a.tensor, b.tensor
            assert a.dtype == b.dtype and torch.equal(a, b), name


def newest_name(checkpoints):
    newest = checkpoints.newest()
    return newest and newest.name


def save_all(folder, seed=0, step=10, keep=2, layout="", world=None):
    """Save the reference tensors from `world` ranks."""

    def fn(rank):
        checkpoints = Checkpoints(folder, keep, layout)
        return str(checkpoints.save(step, held(rank, world, seed), {"step": step}, {"rng": torch.tensor([rank, 7])}))

    if world is None:
        world = 1
        return Path(fn(0))
    return Path(run_ranks(fn, world)[0])


def damage_delete(path):
    next(path.glob("__0_*")).unlink()
