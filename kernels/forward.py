# mypy: disable-error-code="assignment,misc"
"""The two forward launches behind `coefficients`, `coefficients_pre` and `post_res_pre`.

`project_kernel` makes the streams (mixing the previous sub-layer's, for post_res_pre), their product with phi on the matrix units
and the sums of their squares; programs share out tokens and channels. `map_kernel` adds the shares up, turns each token's n*n + 2n
numbers into H_pre, H_post and H_res on chip and sweeps over the token's channels for y, twice where y is normed, then from L2.

One launch of both cannot fill a GPU: it needs 16 tokens a program for the matrix units, which are 256 programs of four warps at
T = 4096, all of them waiting for the maps at the same time. On an H100 at C = 2560 in bf16 it took 267 us; these take 160, and 180
with the norm (tools/bench_kernels.py).
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from pipehc.kernels.language import INTERPRETED, launch, launches, tl, triton
from pipehc.kernels.manifolds.base import Manifold
from pipehc.kernels.maps import map_of
from pipehc.kernels.matrices import store_matrix, store_vector
from pipehc.kernels.projection import capability, columns_of, factors_in_registers, load_weights, padded_columns, product_precision
from pipehc.kernels.rms_norm import Norm
from pipehc.kernels.tiles import (
    aggregate,
    at_token,
    block_channels,
    fold,
    load_columns,
    load_tiles,
    max_registers,
    opaque,
    row_channels,
    row_sums,
    store_rounded,
    widened,
    zeros,
)

PROJECT_TOKENS = 32
"""Tokens of a program of `project_kernel`: with fewer, phi is read more often than the streams."""
MAP_TOKENS = 2
"""Tokens of a program of `map_kernel`: few, so that many programs are at different places of their work."""
PROGRAMS = 512
"""At least so many programs, if tokens and channels allow: an H100 holds four of four warps on each of 132 multiprocessors. Fixed,
so that no device decides on the bits."""


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


@triton.jit(do_not_specialize=["T", "TILES", "STREAMS"])
def project_kernel(
    x,
    f,
    h_post,
    h_res,
    phi,
    x_next,
    products,
    squares_out,
    T,
    C,
    TILES,
    STREAMS,
    n: tl.constexpr,
    PADDED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PER_STREAM: tl.constexpr,
    PRECISION: tl.constexpr,
    FENCE: tl.constexpr,
):
    """Of BT tokens and TILES times BC channels: x' unless x_next is None, where x is projected itself; shares of the product with
    phi and of the sums of squares, to `products` [splits, T, K] and `squares_out` [splits, T, 1 or n]."""
    K: tl.constexpr = n * n + 2 * n
    GROUPS: tl.constexpr = n if PER_STREAM else 1
    token = tl.program_id(0) * BT
    split = tl.program_id(1)
    x = at_token(x, token, n * C)
    if x_next is not None:
        x_next, f = at_token(x_next, token, n * C), at_token(f, token, C)
        h_post, h_res = at_token(h_post, token, n), at_token(h_res, token, n * n)
    rows = tl.arange(0, BT)
    here = rows < T - token
    t = rows[:, None]
    tokens = here[:, None]
    sums = zeros(GROUPS, BT, PADDED)
    squares = zeros(GROUPS, BT, BC // 8)
    # Counted in tiles, so that the compiler sees the alignment.
    for tile in range(split * TILES, tl.minimum((split + 1) * TILES, tl.cdiv(C, BC))):
        c = tile * BC + tl.arange(0, BC)
        inside = tokens & (c < C)[None, :]
        # Unrolled, all streams would be in flight at once, in more registers than there are: their number is one of run time.
        if x_next is None:
            for i in tl.range(STREAMS, num_stages=1):
                stream = tl.load(x + t * (n * C) + i * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
                sums, squares = project(stream, sums, squares, phi, c, i, C, n, PADDED, PER_STREAM, PRECISION)
        else:
            streams = load_tiles(x, t, c[None, :], C, inside, n, DEAD=True)
            branch = tl.load(f + t * C + c[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
            for i in tl.range(STREAMS, num_stages=1):
                stream = tl.load(h_post + t * n + i, mask=tokens, other=0.0) * widened(branch, FENCE)
                for j in tl.static_range(n):
                    stream += tl.load(h_res + t * (n * n) + i * n + j, mask=tokens, other=0.0) * widened(streams[j], FENCE)
                stream = stream.to(x_next.dtype.element_ty)
                tl.store(x_next + t * (n * C) + i * C + c[None, :], stream, mask=inside)
                # Opaque, or all of the above would be done again in the layout of the product's operand.
                stream = opaque(stream.to(tl.float32), FENCE)
                sums, squares = project(stream, sums, squares, phi, c, i, C, n, PADDED, PER_STREAM, PRECISION)
    products += (split.to(tl.int64) * T + token) * K
    squares_out += (split.to(tl.int64) * T + token) * GROUPS
    for g in tl.static_range(GROUPS):
        entry, valid = columns_of(g, n, PADDED, PER_STREAM)
        tl.store(products + t * K + entry, sums[g], mask=tokens & valid)
        tl.store(squares_out + rows * GROUPS + g, tl.sum(squares[g], 1), mask=here)


@triton.jit(do_not_specialize=["T", "SPLITS"])
def map_kernel(
    x,
    products,
    squares,
    alpha,
    bias,
    scalar,
    norm_weight,
    y,
    product,
    inverse_rms,
    pre_out,
    post_out,
    res_out,
    norms,
    T,
    C,
    SPLITS,
    n: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PER_STREAM: tl.constexpr,
    MAP: tl.constexpr,
    SETTINGS: tl.constexpr,
    FIXED: tl.constexpr,
    EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
):
    """The maps of BT tokens, and y = H_pre x unless y is None. FIXED is a tuple of three flags. norm_weight asks for the RMSNorm of
    y, with NORM_EPS: its scale, and that times y . x_j for every stream, go to `norms` [T, 1 + n] for the backward.

    The last tokens first: they are what `project_kernel` left in L2."""
    K: tl.constexpr = n * n + 2 * n
    ALL: tl.constexpr = triton.next_power_of_2(K)
    N: tl.constexpr = triton.next_power_of_2(n)
    GROUPS: tl.constexpr = n if PER_STREAM else 1
    token = (tl.num_programs(0) - 1 - tl.program_id(0)) * BT
    rows = tl.arange(0, BT)
    here = rows < T - token
    t = rows[:, None]
    tokens = here[:, None]
    k = tl.arange(0, ALL)[None, :]
    g = tl.arange(0, triton.next_power_of_2(GROUPS))[None, :]
    total = tl.zeros([BT, ALL], tl.float32)
    square_of_entry = tl.zeros([BT, ALL], tl.float32)
    square = tl.zeros([BT, triton.next_power_of_2(GROUPS)], tl.float32)
    products, squares = at_token(products, token, K), at_token(squares, token, GROUPS)
    for _ in range(SPLITS):
        total += tl.load(products + t * K + k, mask=tokens & (k < K), other=0.0)
        square_of_entry += tl.load(squares + t * GROUPS + k % GROUPS, mask=tokens, other=0.0)
        square += tl.load(squares + t * GROUPS + g, mask=tokens & (g < GROUPS), other=0.0)
        products, squares = at_token(products, T, K), at_token(squares, T, GROUPS)
    pre_out, post_out, res_out = at_token(pre_out, token, n), at_token(post_out, token, n), at_token(res_out, token, n * n)
    product, inverse_rms = at_token(product, token, K), at_token(inverse_rms, token, GROUPS)
    count = C if PER_STREAM else n * C
    tl.store(inverse_rms + t * GROUPS + g, tl.rsqrt(square / count + EPS), mask=tokens & (g < GROUPS))
    tl.store(product + t * K + k, total * tl.rsqrt(square_of_entry / count + EPS), mask=tokens & (k < K))
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

    if y is not None:
        tl.debug_barrier()
        x, y = at_token(x, token, n * C), at_token(y, token, C)
        weights = load_columns(pre_out, t, tokens, n)
        if norm_weight is not None:
            norms = at_token(norms, token, n + 1)
            sums = zeros(n + 1, BT, BC // 8)
            for first in range(0, C, BC):
                c = first + tl.arange(0, BC)[None, :]
                streams = load_tiles(x, t, c, C, tokens & (c < C), n)
                out = aggregate(streams, weights, n)
                new_sums = (sums[0] + fold(out * out),)
                for j in tl.static_range(n):
                    new_sums += (sums[1 + j] + fold(out * streams[j].to(tl.float32)),)
                sums = new_sums
            found = row_sums(sums, n + 1, triton.next_power_of_2(n + 1))
            at = tl.arange(0, triton.next_power_of_2(n + 1))[None, :]
            scale = tl.rsqrt(tl.sum(tl.where(at == 0, found, 0.0), 1, keep_dims=True) / C + NORM_EPS)
            tl.store(norms + t * (n + 1) + at, tl.where(at == 0, scale, scale * found), mask=tokens & (at < n + 1))
        for first in range(0, C, BC):
            c = first + tl.arange(0, BC)[None, :]
            inside = tokens & (c < C)
            out = aggregate(load_tiles(x, t, c, C, inside, n, DEAD=True), weights, n)
            if norm_weight is not None:
                out *= scale * tl.load(norm_weight + c, mask=c < C, other=0.0).to(tl.float32)
            store_rounded(y + t * C + c, out, inside)


@launches
def launch_mapping(
    x: Tensor,
    previous: tuple[Tensor, Tensor, Tensor] | None,
    parameters: tuple[Tensor, Tensor, Tensor],
    manifold: Manifold,
    fixed: Collection[str],
    with_y: bool,
    norm: Norm | None = None,
) -> dict[str, Tensor]:
    """Two launches. `previous` is (f, h_post, h_res) for post_res_pre, `parameters` (phi, alpha, bias) in fp32, norm the weight [C]
    and epsilon of y's RMSNorm; all contiguous.

    Returns h_pre, h_post, h_res, and as asked for y and x_next; and for backward product [T, n*n + 2n], inverse_rms [T, 1 or n],
    and with the norm norms [T, 1 + n].
    """
    tokens, n, channels = x.shape
    phi, alpha, bias = parameters
    f, h_post, h_res = previous if previous is not None else (None, None, None)
    groups, columns = n if manifold.per_stream else 1, n * n + 2 * n
    out = {
        "h_pre": x.new_empty(tokens, n, dtype=torch.float32),
        "h_post": x.new_empty(tokens, n, dtype=torch.float32),
        "h_res": x.new_empty(tokens, n, n, dtype=torch.float32),
        "product": x.new_empty(tokens, columns, dtype=torch.float32),
        "inverse_rms": x.new_empty(tokens, groups, dtype=torch.float32),
    }
    if with_y:
        out["y"] = x.new_empty(tokens, channels)
    if previous is not None:
        out["x_next"] = torch.empty_like(x)
    weight, eps = norm if norm is not None else (None, 0.0)
    if norm is not None:
        out["norms"] = x.new_empty(tokens, 1 + n, dtype=torch.float32)
    if not tokens:
        return out
    block = block_channels(n)
    tiles = triton.cdiv(channels, block)
    rows = project_tokens(manifold.per_stream)
    each = triton.cdiv(tiles, triton.cdiv(PROGRAMS, triton.cdiv(tokens, rows)))
    splits = triton.cdiv(tiles, each)
    products, squares = (x.new_empty(splits, tokens, width, dtype=torch.float32) for width in (columns, groups))
    launch(
        project_kernel,
        (triton.cdiv(tokens, rows), splits),
        x,
        f,
        h_post,
        h_res,
        phi,
        out.get("x_next"),
        products,
        squares,
        tokens,
        channels,
        each,
        n,
        n=n,
        PADDED=padded_columns(n, manifold.per_stream),
        BT=rows,
        BC=block,
        PER_STREAM=manifold.per_stream,
        PRECISION=product_precision(x.dtype),
        FENCE=not INTERPRETED,
        num_warps=4,
        maxnreg=max_registers(n, factors_in_registers(capability(x.device))),
        num_stages=1,
    )
    launch(
        map_kernel,
        (triton.cdiv(tokens, MAP_TOKENS),),
        out.get("x_next", x),
        products,
        squares,
        alpha,
        bias,
        scalar_of(manifold),
        weight,
        out.get("y"),
        out["product"],
        out["inverse_rms"],
        out["h_pre"],
        out["h_post"],
        out["h_res"],
        out.get("norms"),
        tokens,
        channels,
        splits,
        n=n,
        BT=MAP_TOKENS,
        BC=row_channels(n, MAP_TOKENS),
        **map_constants(manifold, fixed),
        NORM_EPS=eps,
        MAP=manifold.device_functions[0],
        num_warps=4,
        maxnreg=max_registers(n),
    )
    return out


def project_tokens(per_stream: bool) -> int:
    """PROJECT_TOKENS, or half of them where every stream has sums of its own, which take registers."""
    return PROJECT_TOKENS // 2 if per_stream else PROJECT_TOKENS


def scalar_of(manifold: Manifold) -> Tensor | None:
    """The manifold's scalar as the kernels read it: fp32, without gradient."""
    return None if manifold.scalar is None else manifold.scalar.detach().float()


def map_constants(manifold: Manifold, fixed: Collection[str]) -> dict[str, Any]:
    """Compile-time arguments that describe the maps."""
    return {
        "PER_STREAM": manifold.per_stream,
        "SETTINGS": manifold.settings,
        "FIXED": ("pre" in fixed, "post" in fixed, "res" in fixed),
        "EPS": manifold.norm_eps,
    }
