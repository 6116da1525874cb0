"""The norm of gradients, of which nothing leaves the device before all of them are in it.

Without TransformerEngine or apex, Megatron takes a number from the device for every parameter, and each waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def gradient_norm(gradients: Sequence[torch.Tensor], device: torch.device) -> float:
    """The L2 norm over all ranks of the world, each of which has gradients of its own. Collective; the host waits once."""
    total = _norms(gradients).square().sum() if gradients else torch.zeros((), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return math.sqrt(float(total))


def local_l2_norm(chunk_size: int, noop_flag: Any, tensor_lists: Sequence[Sequence[torch.Tensor]], *_: Any) -> tuple[Any, None]:
    """In the place of Megatron's `local_multi_tensor_l2_norm`: the norm of all tensors together, fp32 [1] on their device."""
    gradients = [tensor for tensors in tensor_lists for tensor in tensors]
    return torch.linalg.vector_norm(_norms(gradients)).float().reshape(1), None


def _norms(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of each, fp64 [number of gradients]. Sums of squares in fp32, as Megatron's."""
    return torch.stack(torch._foreach_norm(list(gradients), 2, torch.float32)).double()  # type: ignore[call-arg]
