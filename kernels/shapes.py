"""What all operations agree on: shapes and dtypes, checked with messages that name the argument, and the epsilon of the norm."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

NORM_EPS = 1e-20
"""Added to the mean square of x: a row of zeros gives finite coefficients and gradients."""


def check_streams(x: Tensor, name: str = "x") -> tuple[int, int, int]:
    """(T, n, C) of streams [T, n, C] in a floating dtype; ValueError otherwise."""
    _check_tensor(x, name)
    if x.dim() != 3 or x.shape[1] < 1 or x.shape[2] < 1:
        raise ValueError(f"{name} has shape {list(x.shape)}: must be [T, n, C] with n >= 1 and C >= 1")
    return x.shape[0], x.shape[1], x.shape[2]


def check_shape(value: Tensor, shape: tuple[int, ...], name: str) -> None:
    """ValueError unless `value` is a tensor of exactly this shape, in a floating dtype."""
    _check_tensor(value, name)
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}: must be {list(shape)}")


def _check_tensor(value: Tensor, name: str) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is of type {type(value).__name__}: must be a tensor")
    if value.dtype not in _FLOATS:
        raise ValueError(f"{name} has dtype {value.dtype}: must be fp64, fp32, bf16 or fp16")


def coefficient_dtype(x: Tensor) -> torch.dtype:
    """fp64 for streams in fp64, else fp32: the dtype of coefficients and of all sums over channels."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_others(x: Tensor, scalar: Tensor | None = None, **others: Tensor) -> None:
    """ValueError unless the others and the manifold's scalar are on the device of x, and the others in fp64 just if x is: with x in
    fp32 fp64 would be rounded, and with x in fp64 coefficients would promise digits that they do not have."""
    for name, value in others.items():
        if (value.dtype == torch.float64) != (x.dtype == torch.float64):
            raise ValueError(f"{name} has dtype {value.dtype} and x {x.dtype}: all must be fp64, or none")
    if scalar is not None:
        others["scalar"] = scalar
    for name, value in others.items():
        if value.device != x.device:
            raise ValueError(f"{name} is on {value.device}: must be on {x.device}, like x")
