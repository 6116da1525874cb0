# mypy: disable-error-code="assignment,misc"
"""The product of the streams with phi, as the forward and the backward kernels tile it."""

from functools import lru_cache

import torch

from pipehc.kernels.language import tl, triton


@triton.jit
def load_weights(phi, c, j, C, n: tl.constexpr, PADDED: tl.constexpr, PER_STREAM: tl.constexpr):
    """Rows of phi for channels c of stream j, [BC, PADDED], zeros beyond its columns. Streams that are projected each alone share
    the rows."""
    WIDTH: tl.constexpr = n + 2 if PER_STREAM else n * n + 2 * n
    k = tl.arange(0, PADDED)[None, :]
    row = c if PER_STREAM else j * C + c
    return tl.load(phi + row[:, None] * WIDTH + k, mask=(c < C)[:, None] & (k < WIDTH), other=0.0)


@triton.jit
def columns_of(j, n: tl.constexpr, PADDED: tl.constexpr, PER_STREAM: tl.constexpr):
    """Which of a token's K numbers the columns of the product with stream j are, and whether they are any, both [1, PADDED]."""
    k = tl.arange(0, PADDED)[None, :]
    entry = k * n + j if PER_STREAM else k
    return entry, k < (n + 2 if PER_STREAM else n * n + 2 * n)


@triton.jit
def in_own_layout(tile, FENCE: tl.constexpr):
    """The [BT, BC] result of a product, taken out of the matrix units' layout.

    Otherwise the compiler would keep all that meets it in that layout, where a thread has two rows, and twice the numbers per
    token. The sum over one element is nothing but a barrier to layouts: it does not run in the interpreter."""
    if FENCE:
        tile = tl.reshape(tl.cumsum(tile[:, :, None], 2), [tile.shape[0], tile.shape[1]])
    return tile


def padded_columns(n: int, per_stream: bool) -> int:
    """Columns of phi in a tile of the product: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(n + 2 if per_stream else n * n + 2 * n))


@lru_cache
def capability(device: torch.device) -> int:
    """The first number of the compute capability; elsewhere than on a GPU that of an H100."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def factors_in_registers(capability: int) -> bool:
    """Whether the matrix units take both factors of a product from registers."""
    return capability not in (9, 10)


def product_precision(dtype: torch.dtype) -> str:
    """tf32 holds bf16 and fp16 streams exactly and rounds phi (paper, eq. 10); three products give fp32 streams fp32's accuracy."""
    return "tf32x3" if dtype == torch.float32 else "tf32"
