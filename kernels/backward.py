# mypy: disable-error-code="assignment,misc"
"""The backward kernel behind `coefficients`, `coefficients_pre` and `post_res_pre`, and the second stage of parameter gradients.

It yields the whole gradient of the streams x that the coefficients were computed from. One program takes a group of tokens, block
by block, through two sweeps: row sums over channels first (gradients of H_pre, H_post, H_res), then, after the maps' own backward,
the gradient of x. A third sweep over the group adds up its share of the gradient of phi in registers: no atomics, so equal bits
on every run.

With a deferred sub-layer end (see link.py) the same launch does the backward of that `post_res`, whose inputs it reads anyway.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from pipehc.kernels.forward import (
    BLOCK_TOKENS,
    map_constants,
    padded_columns,
    product_precision,
    scalar_of,
    tanh,
)
from pipehc.kernels.language import check_launchable, tl, triton
from pipehc.kernels.manifolds.base import Manifold
from pipehc.kernels.tiles import block_channels, fold, load_columns, load_tiles, row_sums, store_rounded, zeros

MAX_GROUPS = 64
"""Programs of one launch, at most: each writes a partial gradient of phi's size. Fixed, so that no device decides on the bits."""


@triton.jit
def columns_of_zeros(count: tl.constexpr, BT: tl.constexpr):
    out = ()
    for _ in tl.static_range(count):
        out += (tl.zeros([BT, 1], tl.float32),)
    return out


@triton.jit
def gradient_of(
    sums, direct, t, tokens, e: tl.constexpr, index: tl.constexpr, width: tl.constexpr, K: tl.constexpr, BT: tl.constexpr
):
    """Gradient of one coefficient: entry e of the sums over channels, and what reached it by itself, either of them None."""
    total = tl.zeros([BT, 1], tl.float32)
    if sums is not None:
        total += tl.load(sums + t * K + e, mask=tokens, other=0.0)
    if direct is not None:
        total += tl.load(direct + t * width + index, mask=tokens, other=0.0)
    return total


@triton.jit
def store_logit_gradient(
    grad,
    u,
    inverses,
    pulls,
    alpha,
    d_logits,
    d_product,
    t,
    tokens,
    e: tl.constexpr,
    n: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_STREAM: tl.constexpr,
):
    """Stores the gradient of logit e, and of the product before division by the norm; adds its pull on the norm of its group."""
    tl.store(d_logits + t * K + e, grad, mask=tokens)
    grad = grad * tl.load(alpha + tl.minimum(e // n, 2))
    if PER_STREAM:
        bent = tanh(u)
        grad = grad * (1.0 - bent * bent)
    tl.store(d_product + t * K + e, grad * inverses[e % GROUPS], mask=tokens)
    out = ()
    for g in tl.static_range(GROUPS):
        out += (pulls[g] + grad * u if e % GROUPS == g else pulls[g],)
    return out


@triton.jit(do_not_specialize=["T", "BLOCKS"])
def mapping_backward_kernel(
    x,
    d_y,
    d_x_next,
    d_x_direct,
    f,
    d_pre,
    d_post,
    d_res,
    h_pre,
    h_post,
    h_res,
    phi,
    alpha,
    bias,
    scalar,
    product,
    inverse_rms,
    h_post_before,
    d_x,
    d_f_before,
    d_maps,
    d_logits,
    d_product,
    d_scalar,
    d_phi_partial,
    d_small_partial,
    T,
    C,
    BLOCKS,
    n: tl.constexpr,
    PADDED: tl.constexpr,
    ALL: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PER_STREAM: tl.constexpr,
    MAP_BACKWARD: tl.constexpr,
    SETTINGS: tl.constexpr,
    FIXED: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Optional inputs are None when absent: d_y (with h_pre), d_x_next with f (a deferred post_res), d_x_direct, d_pre, d_post and
    d_res (gradients that reached x, H_pre, H_post, H_res by themselves). h_post_before asks for d_f_before, the gradient of the f
    that went into x. d_maps, d_logits, d_product and d_scalar are scratch per token, [T, n*n + 2n] and [T]."""
    group = tl.program_id(0)
    K: tl.constexpr = n * n + 2 * n
    WIDTH: tl.constexpr = n + 2 if PER_STREAM else K
    GROUPS: tl.constexpr = n if PER_STREAM else 1
    k = tl.arange(0, PADDED)
    number = None
    if scalar is not None:
        number = tl.load(scalar)

    for block in range(BLOCKS):
        t = (group.to(tl.int64) * BLOCKS + block) * BT + tl.arange(0, BT)[:, None]
        tokens = t < T

        # Sweep 1: sums over channels.
        res_sums = zeros(n * n if f is not None else 0, BT, BC // 8)
        post_sums = zeros(n if f is not None else 0, BT, BC // 8)
        pre_sums = zeros(n if d_y is not None else 0, BT, BC // 8)
        if (f is not None) or (d_y is not None):
            for first in range(0, C, BC):
                c = first + tl.arange(0, BC)[None, :]
                inside = tokens & (c < C)
                streams = load_tiles(x, t, c, C, inside, n)
                if f is not None:
                    branch = tl.load(f + t * C + c, mask=inside, other=0.0).to(tl.float32)
                    new_res, new_post = (), ()
                    for i in tl.static_range(n):
                        grad = tl.load(d_x_next + t * (n * C) + i * C + c, mask=inside, other=0.0).to(tl.float32)
                        new_post += (post_sums[i] + fold(grad * branch),)
                        for j in tl.static_range(n):
                            new_res += (res_sums[i * n + j] + fold(grad * streams[j]),)
                    res_sums = new_res
                    post_sums = new_post
                if d_y is not None:
                    grad_y = tl.load(d_y + t * C + c, mask=inside, other=0.0).to(tl.float32)
                    new_pre = ()
                    for j in tl.static_range(n):
                        new_pre += (pre_sums[j] + fold(grad_y * streams[j]),)
                    pre_sums = new_pre

        # Through scratch to one number per thread, in the layout that everything per token is in.
        if (f is not None) or (d_y is not None):
            e = tl.arange(0, ALL)[None, :]
            sums = pre_sums if d_y is not None else zeros(n, BT, BC // 8)
            if f is not None:
                sums += post_sums + res_sums
            tl.store(d_maps + t * K + e, row_sums(sums, K if f is not None else n, ALL), mask=tokens & (e < K))
            tl.debug_barrier()
        for_pre = d_maps if d_y is not None else None
        for_others = d_maps if f is not None else None

        # The maps: gradients of H to gradients of the logits, and on through alpha, tanh and the norm: x' = x phi / rms takes g to
        # (g phi^T - x (g . x') / (C rms)) / rms.
        inverses = load_columns(inverse_rms, t, tokens, GROUPS)
        pulls = columns_of_zeros(GROUPS, BT)
        for e in tl.static_range(2 * n):
            grad = gradient_of(for_pre if e < n else for_others, d_pre if e < n else d_post, t, tokens, e, e % n, n, K, BT)
            if FIXED[e // n]:
                grad *= 0.0
            u = tl.load(product + t * K + e, mask=tokens, other=0.0)
            if not PER_STREAM:
                gate = tl.sigmoid(tl.load(alpha + e // n) * u + tl.load(bias + e))
                grad *= (1 + e // n) * gate * (1.0 - gate)
            pulls = store_logit_gradient(
                grad, u, inverses, pulls, alpha, d_logits, d_product, t, tokens, e, n, K, GROUPS, PER_STREAM
            )
        logits, grad_res = (), ()
        for e in tl.static_range(n * n):
            u = tl.load(product + t * K + 2 * n + e, mask=tokens, other=0.0)
            logits += (tl.load(alpha + 2) * (tanh(u) if PER_STREAM else u) + tl.load(bias + 2 * n + e),)
            grad_res += (gradient_of(for_others, d_res, t, tokens, 2 * n + e, e, n * n, K, BT),)
        if FIXED[2]:
            grad_logits = columns_of_zeros(n * n, BT)
            grad_scalar = tl.zeros([BT, 1], tl.float32)
        else:
            grad_logits, grad_scalar = MAP_BACKWARD(logits, grad_res, number, n, SETTINGS)
        for e in tl.static_range(n * n):
            u = tl.load(product + t * K + 2 * n + e, mask=tokens, other=0.0)
            pulls = store_logit_gradient(
                grad_logits[e], u, inverses, pulls, alpha, d_logits, d_product, t, tokens, 2 * n + e, n, K, GROUPS, PER_STREAM
            )
        if d_scalar is not None:
            tl.store(d_scalar + t, grad_scalar, mask=tokens)
        shrinks = ()
        for g in tl.static_range(GROUPS):
            shrinks += (pulls[g] * inverses[g] * inverses[g] / (C if PER_STREAM else n * C),)
        tl.debug_barrier()

        # Sweep 2: the gradient of x.
        whole = ()
        for g in tl.static_range(GROUPS):
            column = k * n + g if PER_STREAM else k
            whole += (tl.load(d_product + t * K + column[None, :], mask=tokens & (k < WIDTH)[None, :], other=0.0),)
        # H is loaded where it is used, from L1: held over the loop it would take 2 (n + 1)^2 registers in the product's layout.
        for first in range(0, C, BC):
            c = first + tl.arange(0, BC)
            at = c[None, :]
            inside = tokens & (at < C)
            if f is not None:
                grads = load_tiles(d_x_next, t, at, C, inside, n)
            if d_y is not None:
                grad_y = tl.load(d_y + t * C + at, mask=inside, other=0.0).to(tl.float32)
            grad_f = tl.zeros([BT, BC], tl.float32)
            for j in tl.static_range(n):
                row = c if PER_STREAM else j * C + c
                columns = tl.load(phi + row[:, None] * WIDTH + k[None, :], mask=(c < C)[:, None] & (k < WIDTH)[None, :], other=0.0)
                out = tl.dot(whole[j % GROUPS], tl.trans(columns), input_precision=PRECISION)
                out -= shrinks[j % GROUPS] * tl.load(x + t * (n * C) + j * C + at, mask=inside, other=0.0).to(tl.float32)
                if d_y is not None:
                    out += tl.load(h_pre + t * n + j, mask=tokens, other=0.0) * grad_y
                if f is not None:
                    for i in tl.static_range(n):
                        out += tl.load(h_res + t * (n * n) + i * n + j, mask=tokens, other=0.0) * grads[i]
                if d_x_direct is not None:
                    out += tl.load(d_x_direct + t * (n * C) + j * C + at, mask=inside, other=0.0).to(tl.float32)
                store_rounded(d_x + t * (n * C) + j * C + at, out, inside)
                if h_post_before is not None:
                    grad_f += tl.load(h_post_before + t * n + j, mask=tokens, other=0.0) * out
            if h_post_before is not None:
                store_rounded(d_f_before + t * C + at, grad_f, inside)

    # Sweep 3: this group's share of the parameter gradients.
    first_row = group.to(tl.int64) * BLOCKS * BT
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        shared = tl.zeros([BC, PADDED], tl.float32)
        for j in tl.static_range(n):
            total = shared if PER_STREAM else tl.zeros([BC, PADDED], tl.float32)
            column = k * n + j if PER_STREAM else k
            for block in range(BLOCKS):
                t = first_row + block * BT + tl.arange(0, BT)[:, None]
                tokens = t < T
                stream = tl.load(x + t * (n * C) + j * C + c[None, :], mask=tokens & (c < C)[None, :], other=0.0)
                grad = tl.load(d_product + t * K + column[None, :], mask=tokens & (k < WIDTH)[None, :], other=0.0)
                total = tl.dot(tl.trans(stream.to(tl.float32)), grad, total, input_precision=PRECISION)
            if PER_STREAM:
                shared = total
            else:
                at = (group.to(tl.int64) * (n * C) + j * C + c)[:, None] * WIDTH + k[None, :]
                tl.store(d_phi_partial + at, total, mask=(c < C)[:, None] & (k < WIDTH)[None, :])
        if PER_STREAM:
            at = (group.to(tl.int64) * C + c)[:, None] * WIDTH + k[None, :]
            tl.store(d_phi_partial + at, shared, mask=(c < C)[:, None] & (k < WIDTH)[None, :])
    e = tl.arange(0, ALL)
    small = d_small_partial + group * (2 * K + 1)
    grad_bias = tl.zeros([BT, ALL], tl.float32)
    grad_alpha = tl.zeros([BT, ALL], tl.float32)
    grad_number = tl.zeros([BT, 1], tl.float32)
    for block in range(BLOCKS):
        t = first_row + block * BT + tl.arange(0, BT)[:, None]
        there = (t < T) & (e < K)[None, :]
        grad = tl.load(d_logits + t * K + e[None, :], mask=there, other=0.0)
        u = tl.load(product + t * K + e[None, :], mask=there, other=0.0)
        grad_bias += grad
        grad_alpha += grad * (tanh(u) if PER_STREAM else u)
        if d_scalar is not None:
            grad_number += tl.load(d_scalar + t, mask=t < T, other=0.0)
    tl.store(small + e, tl.sum(grad_bias, 0), mask=e < K)
    tl.store(small + K + e, tl.sum(grad_alpha, 0), mask=e < K)
    tl.store(small + 2 * K, tl.sum(tl.sum(grad_number, 1), 0))


@triton.jit(do_not_specialize=["PARTS"])
def parameter_sum_kernel(
    d_phi_partial,
    d_small_partial,
    d_phi,
    d_alpha,
    d_bias,
    d_number,
    PARTS,
    SIZE,
    n: tl.constexpr,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Second stage: sums over the groups, in order. The last program has the small parameters, the others a block of phi each."""
    K: tl.constexpr = n * n + 2 * n
    program = tl.program_id(0)
    if program < tl.num_programs(0) - 1:
        at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        pointer = d_phi_partial + at
        for _ in range(PARTS):
            total += tl.load(pointer, mask=at < SIZE, other=0.0)
            pointer += SIZE
        tl.store(d_phi + at, total, mask=at < SIZE)
    else:
        e = tl.arange(0, ALL)
        grad_bias = tl.zeros([ALL], tl.float32)
        grad_alpha = tl.zeros([ALL], tl.float32)
        grad_number = tl.zeros([ALL], tl.float32)
        for one in range(PARTS):
            small = d_small_partial + one * (2 * K + 1)
            grad_bias += tl.load(small + e, mask=e < K, other=0.0)
            grad_alpha += tl.load(small + K + e, mask=e < K, other=0.0)
            grad_number += tl.load(small + 2 * K + e, mask=e < 1, other=0.0)
        tl.store(d_bias + e, grad_bias, mask=e < K)
        for g in tl.static_range(3):
            tl.store(d_alpha + g, tl.sum(tl.where(tl.minimum(e // n, 2) == g, grad_alpha, 0.0), 0))
        tl.store(d_number, tl.sum(grad_number, 0))


class Incoming(NamedTuple):
    """Gradients that arrive at the operation; None for those that do not. All contiguous, per-coefficient ones in fp32."""

    y: Tensor | None
    x: Tensor | None
    h_pre: Tensor | None
    h_post: Tensor | None
    h_res: Tensor | None
    deferred: tuple[Tensor, Tensor] | None
    """(gradient of x', f) of the sub-layer's own post_res, whose backward is left to this launch."""


class Gradients(NamedTuple):
    """What one launch yields: by the streams, the parameters, the manifold's scalar and the f before."""

    x: Tensor
    phi: Tensor
    alpha: Tensor
    bias: Tensor
    scalar: Tensor
    f_before: Tensor | None


def blocks_per_group(tokens: int) -> int:
    """Token blocks that one program takes in turn."""
    return max(1, triton.cdiv(triton.cdiv(tokens, BLOCK_TOKENS), MAX_GROUPS))


def launch_mapping_backward(
    x: Tensor,
    saved: dict[str, Tensor],
    parameters: tuple[Tensor, Tensor, Tensor],
    incoming: Incoming,
    h_post_before: Tensor | None,
    manifold: Manifold,
    fixed: Collection[str],
) -> Gradients:
    """Two launches. `saved` holds h_pre, h_post, h_res, product and inverse_rms of `launch_mapping`."""
    check_launchable(x.device)
    tokens, n, channels = x.shape
    phi, alpha, bias = parameters
    columns = n * n + 2 * n
    d_x = torch.empty_like(x)
    d_f = None if h_post_before is None else x.new_empty(tokens, channels)
    if not tokens:
        none = x.new_zeros((), dtype=torch.float32)
        return Gradients(d_x, torch.zeros_like(phi), torch.zeros_like(alpha), torch.zeros_like(bias), none, d_f)
    blocks = blocks_per_group(tokens)
    groups = triton.cdiv(tokens, BLOCK_TOKENS * blocks)
    number = scalar_of(manifold)
    d_phi_partial = x.new_empty(groups, *phi.shape, dtype=torch.float32)
    d_small_partial = x.new_empty(groups, 2 * columns + 1, dtype=torch.float32)
    d_product = x.new_empty(tokens, columns, dtype=torch.float32)
    every = triton.next_power_of_2(columns)
    d_x_next, f = incoming.deferred if incoming.deferred is not None else (None, None)
    mapping_backward_kernel[(groups,)](
        x,
        incoming.y,
        d_x_next,
        incoming.x,
        f,
        incoming.h_pre,
        incoming.h_post,
        incoming.h_res,
        saved["h_pre"],
        saved["h_post"],
        saved["h_res"],
        phi,
        alpha,
        bias,
        number,
        saved["product"],
        saved["inverse_rms"],
        h_post_before,
        d_x,
        d_f,
        x.new_empty(tokens, columns, dtype=torch.float32),
        x.new_empty(tokens, columns, dtype=torch.float32),
        d_product,
        None if number is None else x.new_empty(tokens, dtype=torch.float32),
        d_phi_partial,
        d_small_partial,
        tokens,
        channels,
        blocks,
        n=n,
        PADDED=padded_columns(n, manifold.per_stream),
        ALL=every,
        BT=BLOCK_TOKENS,
        BC=block_channels(n),
        **map_constants(manifold, fixed),
        MAP_BACKWARD=manifold.device_functions[1],
        PRECISION=product_precision(x.dtype),
        num_warps=4,
        num_stages=2,
    )
    d_phi = torch.empty_like(phi) if groups > 1 else d_phi_partial[0]
    d_alpha, d_bias, d_number = torch.empty_like(alpha), torch.empty_like(bias), x.new_empty((), dtype=torch.float32)
    block = 1024
    parameter_sum_kernel[(1 + (triton.cdiv(phi.numel(), block) if groups > 1 else 0),)](
        d_phi_partial, d_small_partial, d_phi, d_alpha, d_bias, d_number, groups, phi.numel(), n=n, ALL=every, BLOCK=block
    )
    return Gradients(d_x, d_phi, d_alpha, d_bias, d_number, d_f)
