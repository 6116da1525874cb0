# mypy: disable-error-code="assignment,misc"
"""The forward kernel behind `coefficients`, `coefficients_pre` and `post_res_pre`: one program takes a block of tokens through two
sweeps over their channels, with the maps in between.

Sweep 1 makes the streams (mixing the previous sub-layer's, for post_res_pre), their product with phi on the matrix units and their
norm. Then each token's n*n + 2n numbers become H_pre, H_post and H_res in registers. Sweep 2 reads the same rows again, from L2,
for y; for post_res_pre it folds H_pre into the previous maps and reads x and f rather than the streams it has just written.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from pipehc.kernels.language import INTERPRETED, check_launchable, tl, triton
from pipehc.kernels.manifolds.base import Manifold
from pipehc.kernels.shapes import NORM_EPS
from pipehc.kernels.tiles import block_channels, fold, load_columns, load_tiles, store_rounded, zeros

BLOCK_TOKENS = 16
"""Tokens of one program: the least rows of a matrix instruction, so that as many rows as possible stay in L2 between the sweeps."""


@triton.jit
def tanh(v):
    """Also exact to rounding for small v, where 1 - exp(-2v) cancels."""
    square = v * v
    series = v * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0 - square * (62.0 / 2835.0)))))
    e = tl.exp(-2.0 * tl.abs(v))
    rational = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(v) < 0.3, series, tl.where(v < 0, -rational, rational))


@triton.jit
def logits_of(product, alpha, bias, n: tl.constexpr, PER_STREAM: tl.constexpr):
    """Logits of every map from normalised products, as columns."""
    logits = ()
    for k in tl.static_range(n * n + 2 * n):
        u = tanh(product[k]) if PER_STREAM else product[k]
        logits += (tl.load(alpha + tl.minimum(k // n, 2)) * u + tl.load(bias + k),)
    return logits


@triton.jit
def part(columns, start: tl.constexpr, count: tl.constexpr):
    """A slice of a tuple of columns."""
    out = ()
    for k in tl.static_range(count):
        out += (columns[start + k],)
    return out


@triton.jit
def store_columns(pointer, columns, t, tokens, count: tl.constexpr):
    """Columns to a contiguous [T, count] fp32 tensor."""
    for k in tl.static_range(count):
        tl.store(pointer + t * count + k, columns[k], mask=tokens)


@triton.jit
def separate(tile, FENCE: tl.constexpr):
    """The tile, made opaque to the compiler, which would otherwise redo all that led to it in the operand layout of the product."""
    if FENCE:
        tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [tile], dtype=tl.float32, is_pure=False, pack=1)
    return tile


@triton.jit(do_not_specialize=["T"])
def mapping_kernel(
    x,
    f,
    h_post,
    h_res,
    phi,
    alpha,
    bias,
    scalar,
    x_next,
    y,
    product,
    inverse_rms,
    pre_out,
    post_out,
    res_out,
    T,
    C,
    n: tl.constexpr,
    PADDED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BC_PRE: tl.constexpr,
    PER_STREAM: tl.constexpr,
    MAP: tl.constexpr,
    SETTINGS: tl.constexpr,
    FIXED: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    FENCE: tl.constexpr,
):
    """x_next is None for coefficients of x itself; y is None for coefficients alone. FIXED is a tuple of three flags."""
    rows = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    here = rows < T
    t = rows[:, None]
    tokens = t < T
    k = tl.arange(0, PADDED)
    K: tl.constexpr = n * n + 2 * n
    WIDTH: tl.constexpr = n + 2 if PER_STREAM else K
    GROUPS: tl.constexpr = n if PER_STREAM else 1
    if x_next is not None:
        post = load_columns(h_post, t, tokens, n)
        res = load_columns(h_res, t, tokens, n * n)

    # Sweep 1: product with phi and sum of squares.
    sums = zeros(GROUPS, BT, PADDED)
    squares = zeros(GROUPS, BT, BC // 8)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        inside = tokens & (c < C)[None, :]
        streams = load_tiles(x, t, c[None, :], C, inside, n)
        if x_next is not None:
            branch = tl.load(f + t * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        new_sums, new_squares = (), ()
        total = sums[0]
        square = squares[0]
        for i in tl.static_range(n):
            stream = streams[i]
            if x_next is not None:
                stream = post[i] * branch
                for j in tl.static_range(n):
                    stream += res[i * n + j] * streams[j]
                stream = stream.to(x_next.dtype.element_ty)
                tl.store(x_next + t * (n * C) + i * C + c[None, :], stream, mask=inside)
                stream = separate(stream.to(tl.float32), FENCE)
            row = c if PER_STREAM else i * C + c
            weights = tl.load(phi + row[:, None] * WIDTH + k[None, :], mask=(c < C)[:, None] & (k < WIDTH)[None, :], other=0.0)
            if PER_STREAM:
                new_sums += (tl.dot(stream, weights, sums[i], input_precision=PRECISION),)
                new_squares += (squares[i] + fold(stream * stream),)
            else:
                total = tl.dot(stream, weights, total, input_precision=PRECISION)
                square += fold(stream * stream)
        sums = new_sums if PER_STREAM else (total,)
        squares = new_squares if PER_STREAM else (square,)

    # Between the layout of the product and one number per thread lies the store that backward needs anyway.
    for g in tl.static_range(GROUPS):
        inverse = tl.rsqrt(tl.sum(squares[g], 1) / (C if PER_STREAM else n * C) + EPS)
        tl.store(inverse_rms + rows * GROUPS + g, inverse, mask=here)
        column = k * n + g if PER_STREAM else k
        tl.store(product + t * K + column[None, :], sums[g] * inverse[:, None], mask=tokens & (k < WIDTH)[None, :])
    tl.debug_barrier()
    logits = logits_of(load_columns(product, t, tokens, K), alpha, bias, n, PER_STREAM)
    number = None
    if scalar is not None:
        number = tl.load(scalar)
    pre_new, post_new, res_new = (), (), ()
    for j in tl.static_range(n):
        pre_j = logits[j] if PER_STREAM else tl.sigmoid(logits[j])
        post_j = logits[n + j] if PER_STREAM else 2.0 * tl.sigmoid(logits[n + j])
        pre_new += (tl.zeros_like(pre_j) + 1.0 / n if FIXED[0] else pre_j,)
        post_new += (tl.zeros_like(post_j) + 1.0 if FIXED[1] else post_j,)
        for i in tl.static_range(n):
            res_new += (tl.zeros_like(pre_j) + (1.0 if i == j else 0.0),)
    if not FIXED[2]:
        res_new = MAP(part(logits, 2 * n, n * n), number, n, SETTINGS)
    store_columns(pre_out, pre_new, t, tokens, n)
    store_columns(post_out, post_new, t, tokens, n)
    store_columns(res_out, res_new, t, tokens, n * n)

    # Sweep 2: y = H_pre x.
    if y is not None:
        weights_of = pre_new
        weight_of_f = tl.zeros_like(pre_new[0])
        if x_next is not None:
            post = load_columns(h_post, t, tokens, n)
            res = load_columns(h_res, t, tokens, n * n)
            weights_of = ()
            for j in tl.static_range(n):
                weight = tl.zeros_like(weight_of_f)
                for i in tl.static_range(n):
                    weight += pre_new[i] * res[i * n + j]
                weights_of += (weight,)
                weight_of_f += pre_new[j] * post[j]
        for first in range(0, C, BC_PRE):
            c = first + tl.arange(0, BC_PRE)[None, :]
            inside = tokens & (c < C)
            streams = load_tiles(x, t, c, C, inside, n)
            out = weights_of[0] * streams[0]
            for j in tl.static_range(1, n):
                out += weights_of[j] * streams[j]
            if x_next is not None:
                out += weight_of_f * tl.load(f + t * C + c, mask=inside, other=0.0).to(tl.float32)
            store_rounded(y + t * C + c, out, inside)


def padded_columns(n: int, per_stream: bool) -> int:
    """Columns of phi in a tile of the product: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(n + 2 if per_stream else n * n + 2 * n))


def product_precision(dtype: torch.dtype) -> str:
    """tf32 holds bf16 and fp16 streams exactly and rounds phi (paper, eq. 10); three products give fp32 streams fp32's accuracy."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def launch_mapping(
    x: Tensor,
    previous: tuple[Tensor, Tensor, Tensor] | None,
    parameters: tuple[Tensor, Tensor, Tensor],
    manifold: Manifold,
    fixed: Collection[str],
    with_y: bool,
) -> dict[str, Tensor]:
    """One launch. `previous` is (f, h_post, h_res) for post_res_pre, `parameters` (phi, alpha, bias) in fp32; all contiguous.

    Returns h_pre, h_post, h_res, and as asked for y and x_next; and for backward product [T, n*n + 2n] and inverse_rms [T, 1 or n].
    """
    check_launchable(x.device)
    tokens, n, channels = x.shape
    phi, alpha, bias = parameters
    f, h_post, h_res = previous if previous is not None else (None, None, None)
    out = {
        "h_pre": x.new_empty(tokens, n, dtype=torch.float32),
        "h_post": x.new_empty(tokens, n, dtype=torch.float32),
        "h_res": x.new_empty(tokens, n, n, dtype=torch.float32),
        "product": x.new_empty(tokens, n * n + 2 * n, dtype=torch.float32),
        "inverse_rms": x.new_empty(tokens, n if manifold.per_stream else 1, dtype=torch.float32),
    }
    if with_y:
        out["y"] = x.new_empty(tokens, channels)
    if previous is not None:
        out["x_next"] = torch.empty_like(x)
    if tokens:
        block = block_channels(n)
        mapping_kernel[(triton.cdiv(tokens, BLOCK_TOKENS),)](
            x,
            f,
            h_post,
            h_res,
            phi,
            alpha,
            bias,
            scalar_of(manifold),
            out.get("x_next"),
            out.get("y"),
            out["product"],
            out["inverse_rms"],
            out["h_pre"],
            out["h_post"],
            out["h_res"],
            tokens,
            channels,
            n=n,
            PADDED=padded_columns(n, manifold.per_stream),
            BT=BLOCK_TOKENS,
            BC=block,
            BC_PRE=block,
            **map_constants(manifold, fixed),
            MAP=manifold.device_functions[0],
            PRECISION=product_precision(x.dtype),
            FENCE=not INTERPRETED,
            num_warps=4,
            num_stages=2,
        )
    return out


def scalar_of(manifold: Manifold) -> Tensor | None:
    """The manifold's scalar as the kernels read it: fp32, without gradient."""
    return None if manifold.scalar is None else manifold.scalar.detach().float()


def map_constants(manifold: Manifold, fixed: Collection[str]) -> dict[str, Any]:
    """Compile-time arguments that describe the maps."""
    return {
        "PER_STREAM": manifold.per_stream,
        "SETTINGS": manifold.settings,
        "FIXED": ("pre" in fixed, "post" in fixed, "res" in fixed),
        "EPS": NORM_EPS,
    }
