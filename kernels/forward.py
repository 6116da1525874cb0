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

from pipehc.kernels.language import INTERPRETED, launch, launches, tl, triton
from pipehc.kernels.manifolds.base import Manifold
from pipehc.kernels.maps import map_of
from pipehc.kernels.matrices import store_matrix, store_vector
from pipehc.kernels.projection import columns_of, load_weights, padded_columns, product_precision
from pipehc.kernels.shapes import NORM_EPS
from pipehc.kernels.tiles import (
    MAX_REGISTERS,
    at_token,
    block_channels,
    fold,
    load_columns,
    load_tiles,
    opaque,
    store_rounded,
    widened,
    zeros,
)

BLOCK_TOKENS = 16
"""Tokens of one program: the least rows of a matrix instruction, so that as many rows as possible stay in L2 between the sweeps."""


@triton.jit
def project(
    stream,
    sums,
    squares,
    phi,
    c,
    i,
    C,
    n: tl.constexpr,
    PADDED: tl.constexpr,
    PER_STREAM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds channels c of stream i to the product with phi [BT, PADDED] and the sum of squares: those of stream i, or of all."""
    weights = load_weights(phi, c, i, C, n, PADDED, PER_STREAM)
    square = fold(stream * stream)
    new_sums, new_squares = (), ()
    if PER_STREAM:
        one = tl.dot(stream, weights, input_precision=PRECISION)
        for g in tl.static_range(n):
            new_sums += (sums[g] + tl.where(i == g, one, 0.0),)
            new_squares += (squares[g] + tl.where(i == g, square, 0.0),)
    else:
        new_sums += (tl.dot(stream, weights, sums[0], input_precision=PRECISION),)
        new_squares += (squares[0] + square,)
    return new_sums, new_squares


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
    K: tl.constexpr = n * n + 2 * n
    N: tl.constexpr = triton.next_power_of_2(n)
    GROUPS: tl.constexpr = n if PER_STREAM else 1
    token = tl.program_id(0) * BT
    x = at_token(x, token, n * C)
    if x_next is not None:
        x_next, f = at_token(x_next, token, n * C), at_token(f, token, C)
        h_post, h_res = at_token(h_post, token, n), at_token(h_res, token, n * n)
    if y is not None:
        y = at_token(y, token, C)
    pre_out, post_out, res_out = at_token(pre_out, token, n), at_token(post_out, token, n), at_token(res_out, token, n * n)
    product, inverse_rms = at_token(product, token, K), at_token(inverse_rms, token, GROUPS)
    rows = tl.arange(0, BT)
    here = rows < T - token
    t = rows[:, None]
    tokens = here[:, None]

    # Sweep 1: product with phi and sums of squares.
    sums = zeros(GROUPS, BT, PADDED)
    squares = zeros(GROUPS, BT, BC // 8)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        inside = tokens & (c < C)[None, :]
        streams = load_tiles(x, t, c[None, :], C, inside, n)
        if x_next is not None:
            branch = tl.load(f + t * C + c[None, :], mask=inside, other=0.0)
        if x_next is None:
            for i in tl.static_range(n):
                sums, squares = project(streams[i].to(tl.float32), sums, squares, phi, c, i, C, n, PADDED, PER_STREAM, PRECISION)
        else:
            # A loop at run time: unrolled, the streams made would be in flight all at once, in more registers than there are.
            for i in tl.range(n, num_stages=1):
                stream = tl.load(h_post + t * n + i, mask=tokens, other=0.0) * widened(branch, FENCE)
                for j in tl.static_range(n):
                    stream += tl.load(h_res + t * (n * n) + i * n + j, mask=tokens, other=0.0) * widened(streams[j], FENCE)
                stream = stream.to(x_next.dtype.element_ty)
                tl.store(x_next + t * (n * C) + i * C + c[None, :], stream, mask=inside)
                # Opaque, or all of the above would be done again in the layout of the product's operand.
                stream = opaque(stream.to(tl.float32), FENCE)
                sums, squares = project(stream, sums, squares, phi, c, i, C, n, PADDED, PER_STREAM, PRECISION)

    # Between the layout of the product and that of the maps lies the store that backward needs anyway.
    for g in tl.static_range(GROUPS):
        inverse = tl.rsqrt(tl.sum(squares[g], 1) / (C if PER_STREAM else n * C) + EPS)
        tl.store(inverse_rms + rows * GROUPS + g, inverse, mask=here)
        entry, valid = columns_of(g, n, PADDED, PER_STREAM)
        tl.store(product + t * K + entry, sums[g] * inverse[:, None], mask=tokens & valid)
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
            out = weights[0] * streams[0].to(tl.float32)
            for j in tl.static_range(1, n):
                out += weights[j] * streams[j].to(tl.float32)
            if x_next is not None:
                out += weight_of_f * tl.load(f + t * C + c, mask=inside, other=0.0).to(tl.float32)
            store_rounded(y + t * C + c, out, inside)


@launches
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
        launch(
            mapping_kernel,
            (triton.cdiv(tokens, BLOCK_TOKENS),),
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
            BC=block_channels(n),
            **map_constants(manifold, fixed),
            MAP=manifold.device_functions[0],
            PRECISION=product_precision(x.dtype),
            FENCE=not INTERPRETED,
            num_warps=4,
            maxnreg=MAX_REGISTERS,
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
