"""What all operations agree on: shapes and dtypes, checked with messages that name the argument, and the epsilon of the norm."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

NORM_EPS = 1e-20
"""Added to the mean square of x: a row of zeros gives finite coefficients and gradients."""


def check_streams(x: Tensor, name: str = "x") -> tuple[int, int, int]:
    """(T, n, C) of streams [T, n, C] in a floating dtype; ValueError otherwise."""
    if x.dim() != 3 or x.shape[1] < 1 or x.shape[2] < 1:
        raise ValueError(f"{name} has shape {list(x.shape)}: must be [T, n, C] with n >= 1 and C >= 1")
    if x.dtype not in _FLOATS:
        raise ValueError(f"{name} has dtype {x.dtype}: must be fp64, fp32, bf16 or fp16")
    return x.shape[0], x.shape[1], x.shape[2]


def check_shape(value: Tensor, shape: tuple[int, ...], name: str) -> None:
    """ValueError unless `value` has exactly this shape."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has shape {list(value.shape)}: must be {list(shape)}")


def coefficient_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 when every tensor is fp64, else fp32: the dtype of coefficients and of all sums over channels."""
    return torch.float64 if all(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_devices(x: Tensor, **others: Tensor | None) -> None:
    """ValueError unless the others, where they are not None, are on the device of x."""
    for name, value in others.items():
        if value is not None and value.device != x.device:
            raise ValueError(f"{name} is on {value.device}: must be on {x.device}, like x")
