# mypy: disable-error-code="assignment,misc"
"""The product of the streams with phi, as the forward and the backward kernels tile it."""

import torch

from pipehc.kernels.language import tl, triton


@triton.jit
def load_weights(phi, c, j, C, n: tl.constexpr, PADDED: tl.constexpr, PER_STREAM: tl.constexpr):
    """[BC, PADDED]: what channels c of stream j count for in each of the K numbers of a token, zeros beyond.

    Where every stream is projected alone, phi [C, n + 2] holds one weight per row of the maps, and stream j counts only for the
    entries (row, j)."""
    k = tl.arange(0, PADDED)[None, :]
    mine = (c < C)[:, None] & (k < n * n + 2 * n)
    if PER_STREAM:
        return tl.load(phi + c[:, None] * (n + 2) + k // n, mask=mine & (k % n == j), other=0.0)
    return tl.load(phi + (j * C + c)[:, None] * (n * n + 2 * n) + k, mask=mine, other=0.0)


@triton.jit
def in_own_layout(tile, FENCE: tl.constexpr):
    """The [BT, BC] result of a product, taken out of the matrix units' layout.

    Otherwise the compiler would keep all that meets it in that layout, where a thread has two rows, and twice the numbers per
    token. The sum over one element is nothing but a barrier to layouts: it does not run in the interpreter."""
    if FENCE:
        tile = tl.reshape(tl.cumsum(tile[:, :, None], 2), [tile.shape[0], tile.shape[1]])
    return tile


@triton.jit
def separate(tile, FENCE: tl.constexpr):
    """The tile, made opaque to the compiler, which would otherwise redo all that led to it in the operand layout of the product."""
    if FENCE:
        tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], dtype=tl.float32, is_pure=False, pack=1)
    return tile


def padded_columns(n: int) -> int:
    """Columns of phi in a tile of the product: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(n * n + 2 * n))


def product_precision(dtype: torch.dtype) -> str:
    """tf32 holds bf16 and fp16 streams exactly and rounds phi (paper, eq. 10); three products give fp32 streams fp32's accuracy."""
    return "tf32x3" if dtype == torch.float32 else "tf32"
