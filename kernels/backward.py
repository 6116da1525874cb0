# mypy: disable-error-code="assignment,misc"
"""The four backward launches behind `coefficients`, `coefficients_pre` and `post_res_pre`.

They yield the whole gradient of the streams x that the coefficients were computed from. `map_backward_kernel` sums over its tokens'
channels (channel_sums.py) and takes the sums through the maps' own backward (map_gradients.py). `stream_gradient_kernel` makes the
gradient of x; `phi_gradient_kernel` shares of that of phi, and the last launch adds shares up (parameter_gradients.py).

With a deferred sub-layer end (see link.py) the same launches do the backward of that `post_res`, whose inputs they read anyway.

All in one launch, 64 groups of tokens at a time, took 1470 us on an H100 at T = 4096, n = 4, C = 2560 in bf16, of which memory
explains 170: too few programs, each waiting most of the time. These take about 290, with the norm 330 (tools/bench_kernels.py).
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from pipehc.kernels.channel_sums import store_channel_sums
from pipehc.kernels.forward import PROGRAMS, map_constants, scalar_of
from pipehc.kernels.language import INTERPRETED, launch, launches, tl, triton
from pipehc.kernels.manifolds.base import Manifold
from pipehc.kernels.map_gradients import store_map_gradients
from pipehc.kernels.parameter_gradients import parameter_sum_kernel, phi_gradient_kernel, store_small_share
from pipehc.kernels.projection import capability, factors_in_registers, padded_columns, product_precision
from pipehc.kernels.stream_gradient import stream_gradient_kernel
from pipehc.kernels.tiles import block_channels, max_registers, row_channels

MAP_TOKENS = 8
"""Tokens of a program of `map_backward_kernel`."""
PHI_TOKENS, PHI_CHANNELS = 64, 64
"""Of a step of `phi_gradient_kernel`."""


@triton.jit(do_not_specialize=["T"])
def map_backward_kernel(
    x,
    d_y,
    d_x_next,
    f,
    d_pre,
    d_post,
    d_res,
    h_pre,
    alpha,
    bias,
    scalar,
    product,
    inverse_rms,
    norm_weight,
    norms,
    d_maps,
    d_logits,
    d_product,
    d_scalar,
    shrinks,
    pulls,
    small_shares,
    T,
    C,
    n: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PER_STREAM: tl.constexpr,
    MAP_BACKWARD: tl.constexpr,
    SETTINGS: tl.constexpr,
    FIXED: tl.constexpr,
    EPS: tl.constexpr,
):
    """Optional inputs are None when absent: d_y (with h_pre), d_x_next with f (a deferred post_res), d_pre, d_post and d_res
    (gradients that reached H_pre, H_post, H_res by themselves). norm_weight, with norms: d_y is the gradient of the normed y.
    Written per token: d_maps, d_logits and d_product [T, K], d_scalar and pulls [T], shrinks [T, 1 or n]."""
    K: tl.constexpr = n * n + 2 * n
    program = tl.program_id(0)
    token = program * BT
    number = None
    if scalar is not None:
        number = tl.load(scalar)
    if (f is not None) or (d_y is not None):
        store_channel_sums(x, d_y, d_x_next, f, norm_weight, norms, h_pre, d_maps, pulls, token, T, C, n, BT, BC)
        tl.debug_barrier()
    store_map_gradients(
        d_maps if d_y is not None else None,
        d_maps if f is not None else None,
        d_pre,
        d_post,
        d_res,
        product,
        inverse_rms,
        alpha,
        bias,
        number,
        d_logits,
        d_product,
        d_scalar,
        shrinks,
        token,
        T,
        C,
        n,
        BT,
        PER_STREAM,
        MAP_BACKWARD,
        SETTINGS,
        FIXED,
    )
    tl.debug_barrier()
    share = small_shares + program * (2 * K + 1)
    store_small_share(product, d_logits, d_scalar, share, token, T, n, BT, PER_STREAM)


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
    """What one launch yields: by the streams, the parameters, the manifold's scalar, the f before and the norm's weight."""

    x: Tensor
    phi: Tensor
    alpha: Tensor
    bias: Tensor
    scalar: Tensor
    f_before: Tensor | None
    norm_weight: Tensor | None


@launches
def launch_mapping_backward(
    x: Tensor,
    saved: dict[str, Tensor],
    parameters: tuple[Tensor, Tensor, Tensor],
    incoming: Incoming,
    before: tuple[Tensor, torch.dtype] | None,
    manifold: Manifold,
    fixed: Collection[str],
    norm_weight: Tensor | None = None,
) -> Gradients:
    """Four launches. `saved` holds h_pre, h_post, h_res, product, inverse_rms and, with the norm, norms of `launch_mapping`;
    `before` is H_post of the linked sub-layer end before, and the dtype of its f."""
    tokens, n, channels = x.shape
    phi, alpha, bias = parameters
    columns = n * n + 2 * n
    d_x = torch.empty_like(x)
    h_post_before, dtype_before = before if before is not None else (None, None)
    d_f = None if h_post_before is None else x.new_empty(tokens, channels, dtype=dtype_before)
    if incoming.y is None:
        norm_weight = None  # nothing comes through the norm
    if not tokens:
        none = x.new_zeros((), dtype=torch.float32)
        d_weight = None if norm_weight is None else torch.zeros_like(norm_weight)
        return Gradients(d_x, torch.zeros_like(phi), torch.zeros_like(alpha), torch.zeros_like(bias), none, d_f, d_weight)
    number = scalar_of(manifold)
    rows, groups = triton.cdiv(tokens, MAP_TOKENS), saved["inverse_rms"].shape[1]
    d_maps, d_logits, d_product = (x.new_empty(tokens, columns, dtype=torch.float32) for _ in range(3))
    shrinks = x.new_empty(tokens, groups, dtype=torch.float32)
    pulls = None if norm_weight is None else x.new_empty(tokens, dtype=torch.float32)
    norms = None if norm_weight is None else saved["norms"]
    small_shares = x.new_empty(rows, 2 * columns + 1, dtype=torch.float32)
    d_x_next, f = incoming.deferred if incoming.deferred is not None else (None, None)
    launch(
        map_backward_kernel,
        (rows,),
        x,
        incoming.y,
        d_x_next,
        f,
        incoming.h_pre,
        incoming.h_post,
        incoming.h_res,
        saved["h_pre"],
        alpha,
        bias,
        number,
        saved["product"],
        saved["inverse_rms"],
        norm_weight,
        norms,
        d_maps,
        d_logits,
        d_product,
        None if number is None else x.new_empty(tokens, dtype=torch.float32),
        shrinks,
        pulls,
        small_shares,
        tokens,
        channels,
        n=n,
        BT=MAP_TOKENS,
        BC=row_channels(n, MAP_TOKENS),
        **map_constants(manifold, fixed),
        MAP_BACKWARD=manifold.device_functions[1],
        num_warps=4,
        maxnreg=max_registers(n),
    )
    block = block_channels(n) // 2
    factors = factors_in_registers(capability(x.device))
    each, warps = gradient_tile(factors)
    pairs, blocks = triton.cdiv(channels, 2 * block), triton.cdiv(tokens, each)
    weight_shares = None if norm_weight is None else x.new_empty(blocks, channels, dtype=torch.float32)
    product = {"n": n, "PADDED": padded_columns(n, manifold.per_stream), "PER_STREAM": manifold.per_stream}
    product["PRECISION"] = product_precision(x.dtype)
    launch(
        stream_gradient_kernel,
        (2 * pairs * blocks,),
        x,
        incoming.y,
        d_x_next,
        incoming.x,
        saved["h_pre"],
        saved["h_res"],
        h_post_before,
        phi,
        d_product,
        shrinks,
        norm_weight,
        norms,
        pulls,
        d_x,
        d_f,
        weight_shares,
        tokens,
        channels,
        **product,
        BT=each,
        BC=block,
        FENCE=not INTERPRETED,
        num_warps=warps,
        maxnreg=max_registers(n, factors),
    )
    streams, blocks = 1 if manifold.per_stream else n, triton.cdiv(tokens, PHI_TOKENS)
    slabs = triton.cdiv(channels, PHI_CHANNELS)
    steps = triton.cdiv(blocks, triton.cdiv(2 * PROGRAMS, slabs * streams))
    spans = triton.cdiv(blocks, steps)
    phi_shares = x.new_empty(spans, *phi.shape, dtype=torch.float32)
    launch(
        phi_gradient_kernel,
        (spans, streams, slabs),
        x,
        d_product,
        phi_shares,
        tokens,
        channels,
        steps,
        **product,
        BT=PHI_TOKENS,
        BC=PHI_CHANNELS,
        num_warps=4,
        num_stages=1,
    )
    d_phi = torch.empty_like(phi) if spans > 1 else phi_shares[0]
    d_alpha, d_bias, d_number = torch.empty_like(alpha), torch.empty_like(bias), x.new_empty((), dtype=torch.float32)
    d_weight = None if norm_weight is None else torch.empty_like(norm_weight)
    block = 128
    of_weight = 0 if norm_weight is None else triton.cdiv(channels, block)
    of_phi = triton.cdiv(phi.numel(), 8 * block) if spans > 1 else 0
    tensors = (phi_shares, small_shares, weight_shares, d_phi, d_alpha, d_bias, d_number, d_weight)
    counts = (spans, rows, 0 if weight_shares is None else len(weight_shares))
    launch(parameter_sum_kernel, (1 + of_weight + of_phi,), *tensors, *counts, phi.numel(), channels, n=n, BLOCK=block)
    return Gradients(d_x, d_phi, d_alpha, d_bias, d_number, d_f, d_weight)


def gradient_tile(factors: bool) -> tuple[int, int]:
    """Tokens and warps of a program of `stream_gradient_kernel`: with fewer tokens, phi is read more often than the streams. Half
    of both where registers hold the factors of products: eight warps of so many registers would be alone on a multiprocessor."""
    return (32, 4) if factors else (64, 8)
