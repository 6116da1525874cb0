# mypy: disable-error-code="assignment,misc"
"""The forward kernel behind `coefficients`, `coefficients_pre` and `post_res_pre`: one program takes a block of tokens through two
sweeps over their channels, with the maps in between.

Sweep 1 makes the streams (mixing the previous sub-layer's, for post_res_pre), their product with phi on the matrix units and their
norm. Then each token's n*n + 2n numbers become H_pre, H_post and H_res on chip. Sweep 2 reads the same rows again, from L2,
for y; for post_res_pre it folds H_pre into the previous maps and reads x and f rather than the streams it has just written.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from pipehc.kernels.language import INTERPRETED, check_launchable, tl, triton
from pipehc.kernels.manifolds.base import Manifold
from pipehc.kernels.maps import map_of
from pipehc.kernels.matrices import store_matrix, store_vector
from pipehc.kernels.projection import load_weights, padded_columns, product_precision, separate
from pipehc.kernels.shapes import NORM_EPS
from pipehc.kernels.tiles import block_channels, fold, load_columns, load_tiles, store_rounded, zeros

BLOCK_TOKENS = 16
"""Tokens of one program: the least rows of a matrix instruction, so that as many rows as possible stay in L2 between the sweeps."""


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
    K: tl.constexpr = n * n + 2 * n
    N: tl.constexpr = triton.next_power_of_2(n)
    GROUPS: tl.constexpr = n if PER_STREAM else 1

    # Sweep 1: product with phi and sums of squares.
    total = tl.zeros([BT, PADDED], tl.float32)
    squares = zeros(GROUPS, BT, BC // 8)
    if x_next is not None:
        post = load_columns(h_post, t, tokens, n)
        res = load_columns(h_res, t, tokens, n * n)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        inside = tokens & (c < C)[None, :]
        streams = load_tiles(x, t, c[None, :], C, inside, n)
        if x_next is not None:
            branch = tl.load(f + t * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        for i in tl.static_range(n):
            stream = streams[i]
            if x_next is not None:
                stream = post[i] * branch
                for j in tl.static_range(n):
                    stream += res[i * n + j] * streams[j]
                stream = stream.to(x_next.dtype.element_ty)
                tl.store(x_next + t * (n * C) + i * C + c[None, :], stream, mask=inside)
                stream = separate(stream.to(tl.float32), FENCE)
            weights = load_weights(phi, c, i, C, n, PADDED, PER_STREAM)
            total = tl.dot(stream, weights, total, input_precision=PRECISION)
            new_squares = ()
            for g in tl.static_range(GROUPS):
                new_squares += (squares[g] + fold(stream * stream) if g == i % GROUPS else squares[g],)
            squares = new_squares

    # Between the layout of the product and that of the maps lies the store that backward needs anyway.
    k = tl.arange(0, PADDED)[None, :]
    scale = tl.zeros([BT, PADDED], tl.float32)
    for g in tl.static_range(GROUPS):
        inverse = tl.rsqrt(tl.sum(squares[g], 1) / (C if PER_STREAM else n * C) + EPS)
        tl.store(inverse_rms + rows * GROUPS + g, inverse, mask=here)
        scale = tl.where(k % GROUPS == g, inverse[:, None], scale)
    tl.store(product + t * K + k, total * scale, mask=tokens & (k < K))
    tl.debug_barrier()
    number = None
    if scalar is not None:
        number = tl.load(scalar)
    pre = map_of(product, alpha, bias, number, rows, here, 0, n, N, PER_STREAM, MAP, SETTINGS, FIXED)
    store_vector(pre_out, pre, rows, here, n, n, N)
    post = map_of(product, alpha, bias, number, rows, here, 1, n, N, PER_STREAM, MAP, SETTINGS, FIXED)
    store_vector(post_out, post, rows, here, n, n, N)
    res = map_of(product, alpha, bias, number, rows, here, 2, n, N, PER_STREAM, MAP, SETTINGS, FIXED)
    store_matrix(res_out, res, rows, here, n * n, n, N)
    tl.debug_barrier()

    # Sweep 2: y = H_pre x.
    if y is not None:
        weights = load_columns(pre_out, t, tokens, n)
        weight_of_f = tl.zeros([BT, 1], tl.float32)
        if x_next is not None:
            new_weights = ()
            for j in tl.static_range(n):
                weight = tl.zeros([BT, 1], tl.float32)
                for i in tl.static_range(n):
                    weight += weights[i] * tl.load(h_res + t * (n * n) + i * n + j, mask=tokens, other=0.0)
                new_weights += (weight,)
                weight_of_f += weights[j] * tl.load(h_post + t * n + j, mask=tokens, other=0.0)
            weights = new_weights
        for first in range(0, C, BC):
            c = first + tl.arange(0, BC)[None, :]
            inside = tokens & (c < C)
            streams = load_tiles(x, t, c, C, inside, n)
            out = weights[0] * streams[0]
            for j in tl.static_range(1, n):
                out += weights[j] * streams[j]
            if x_next is not None:
                out += weight_of_f * tl.load(f + t * C + c, mask=inside, other=0.0).to(tl.float32)
            store_rounded(y + t * C + c, out, inside)


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
            PADDED=padded_columns(n),
            BT=BLOCK_TOKENS,
            BC=block_channels(n),
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
