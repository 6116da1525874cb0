"""Products that not every device has: of rows with one of several matrices, with a result wider than the factors, and such as add
themselves to what is there. PIPEHC_KERNELS=reference does without them, as a CPU does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch.utils._python_dispatch import _disable_current_modes

grouped_mm = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def stacked(weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The same memory as one tensor [experts, m, k]; None unless the weights lie in one storage, in order, equally far apart."""
    first, storages = weights[0], {w.untyped_storage()._cdata for w in weights}
    offsets = [int(w.storage_offset()) for w in weights]
    step = offsets[1] - offsets[0] if len(offsets) > 1 else first.numel()
    alike = all(w.shape == first.shape and w.is_contiguous() for w in weights)
    if not alike or len(storages) > 1 or step < first.numel() or any(b - a != step for a, b in pairwise(offsets)):
        return None
    return first.detach().as_strided((len(weights), *first.shape), (step, *first.stride()), offsets[0])


@lru_cache
def meta_widens() -> bool:
    """Whether a product of 16-bit tensors without data can have an fp32 result: torch up to 2.12 fails there."""
    with _disable_current_modes():  # a dry run would count it
        wide, half = torch.empty(1, 1, device="meta"), torch.empty(1, 1, dtype=torch.bfloat16, device="meta")
        try:
            torch.addmm(wide, half, half, out_dtype=torch.float32, out=wide)
        except TypeError:
            return False
    return True


def _plain() -> bool:
    return os.environ.get("PIPEHC_KERNELS") == "reference"


def widens(x: torch.Tensor) -> bool:
    """Whether products of tensors like this, in 16 bits, can have fp32 results. Meta stands for a GPU where torch can do them on
    meta; elsewhere dry runs count sums of their own."""
    half = x.dtype in (torch.bfloat16, torch.float16) and (x.is_cuda or (x.is_meta and meta_widens()))
    return half and hasattr(torch.ops.aten.addmm, "dtype_out") and not _plain()


def why_not_grouped(weight: torch.Tensor) -> str | None:
    """What keeps products with weights like this from being grouped; None: nothing. On meta, which stands for a GPU, as on one."""
    if grouped_mm is None:
        return "this torch has no grouped products"
    if _plain():
        return "PIPEHC_KERNELS=reference"
    if weight.device.type not in ("cuda", "meta"):
        return "on a CPU they are single products anyway"
    if weight.dtype != torch.bfloat16:
        return "grouped products are for bf16"
    if weight.is_cuda and torch.cuda.get_device_capability(weight.device)[0] not in (9, 10):
        return "torch groups them on compute capability 9 and 10 alone"
    if any(size % 8 for size in weight.shape):
        return "their rows must be multiples of 16 bytes"
    return None


def product_adds(weight: torch.Tensor, main_grad: torch.Tensor) -> bool:
    """Whether `add_product` can add gradients of this weight to `main_grad`."""
    if weight.dtype == main_grad.dtype:
        return True
    return main_grad.dtype == torch.float32 and widens(weight)


@torch.no_grad()
def add_product(main_grad: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> None:
    """Adds dy [tokens, m] transposed times x [tokens, k] to main_grad [m, k] in one product, summed in the dtype of main_grad."""
    if dy.dtype == main_grad.dtype:
        torch.addmm(main_grad, dy.t(), x, out=main_grad)
    else:
        torch.addmm(main_grad, dy.t(), x, out_dtype=main_grad.dtype, out=main_grad)
