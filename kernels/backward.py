# mypy: disable-error-code="assignment,misc"
"""The backward kernel behind `coefficients`, `coefficients_pre` and `post_res_pre`.

It yields the whole gradient of the streams x that the coefficients were computed from. One program takes a group of tokens, block
by block, through two sweeps: sums over channels first (channel_sums.py), then, after the maps' own backward, the gradient of x
(stream_gradient.py). A third sweep over the group adds up its share of the gradient of phi (parameter_gradients.py).

With a deferred sub-layer end (see link.py) the same launch does the backward of that `post_res`, whose inputs it reads anyway.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from pipehc.kernels.channel_sums import store_channel_sums
from pipehc.kernels.forward import BLOCK_TOKENS, map_constants, scalar_of
from pipehc.kernels.language import INTERPRETED, launch, launches, tl, triton
from pipehc.kernels.manifolds.base import Manifold
from pipehc.kernels.map_gradients import store_map_gradients
from pipehc.kernels.parameter_gradients import parameter_sum_kernel, store_phi_share, store_small_share
from pipehc.kernels.projection import padded_columns, product_precision
from pipehc.kernels.stream_gradient import store_stream_gradient
from pipehc.kernels.tiles import MAX_REGISTERS, block_channels

MAX_GROUPS = 64
"""Programs of one launch, at most: each writes a partial gradient of phi's size. Fixed, so that no device decides on the bits."""


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
    shrinks,
    phi_shares,
    small_shares,
    T,
    C,
    BLOCKS,
    n: tl.constexpr,
    PADDED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PER_STREAM: tl.constexpr,
    MAP_BACKWARD: tl.constexpr,
    SETTINGS: tl.constexpr,
    FIXED: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    FENCE: tl.constexpr,
):
    """Optional inputs are None when absent: d_y (with h_pre), d_x_next with f (a deferred post_res), d_x_direct, d_pre, d_post and
    d_res (gradients that reached x, H_pre, H_post, H_res by themselves). h_post_before asks for d_f_before, the gradient of the f
    that went into x. Scratch per token: d_maps, d_logits and d_product [T, K], d_scalar [T], shrinks [T, 1 or n]."""
    group = tl.program_id(0)
    K: tl.constexpr = n * n + 2 * n
    number = None
    if scalar is not None:
        number = tl.load(scalar)
    # What does not change between blocks is computed anew: held over all that is in here, it would not fit into registers.
    for block in tl.range(BLOCKS, disable_licm=True):
        token = (group * BLOCKS + block) * BT
        if (f is not None) or (d_y is not None):
            store_channel_sums(x, d_y, d_x_next, f, d_maps, token, T, C, n, BT, BC)
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
        store_stream_gradient(
            x,
            d_y,
            d_x_next,
            d_x_direct,
            h_pre,
            h_res,
            h_post_before,
            phi,
            d_product,
            shrinks,
            d_x,
            d_f_before,
            token,
            T,
            C,
            n,
            PADDED,
            BT,
            BC,
            PER_STREAM,
            PRECISION,
            FENCE,
        )

    token = group * BLOCKS * BT
    share = phi_shares + group.to(tl.int64) * ((C if PER_STREAM else n * C) * (n + 2 if PER_STREAM else K))
    store_phi_share(x, d_product, share, token, T, C, BLOCKS, n, PADDED, BT, BC, PER_STREAM, PRECISION)
    share = small_shares + group * (2 * K + 1)
    store_small_share(product, d_logits, d_scalar, share, token, T, BLOCKS, n, BT, PER_STREAM)


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


@launches
def launch_mapping_backward(
    x: Tensor,
    saved: dict[str, Tensor],
    parameters: tuple[Tensor, Tensor, Tensor],
    incoming: Incoming,
    before: tuple[Tensor, torch.dtype] | None,
    manifold: Manifold,
    fixed: Collection[str],
) -> Gradients:
    """Two launches. `saved` holds h_pre, h_post, h_res, product and inverse_rms of `launch_mapping`; `before` is H_post of the
    linked sub-layer end before, and the dtype of its f."""
    tokens, n, channels = x.shape
    phi, alpha, bias = parameters
    columns = n * n + 2 * n
    d_x = torch.empty_like(x)
    h_post_before, dtype_before = before if before is not None else (None, None)
    d_f = None if h_post_before is None else x.new_empty(tokens, channels, dtype=dtype_before)
    if not tokens:
        none = x.new_zeros((), dtype=torch.float32)
        return Gradients(d_x, torch.zeros_like(phi), torch.zeros_like(alpha), torch.zeros_like(bias), none, d_f)
    blocks = blocks_per_group(tokens)
    groups = triton.cdiv(tokens, BLOCK_TOKENS * blocks)
    number = scalar_of(manifold)
    phi_shares = x.new_empty(groups, *phi.shape, dtype=torch.float32)
    small_shares = x.new_empty(groups, 2 * columns + 1, dtype=torch.float32)
    d_maps, d_logits, d_product = (x.new_empty(tokens, columns, dtype=torch.float32) for _ in range(3))
    d_x_next, f = incoming.deferred if incoming.deferred is not None else (None, None)
    launch(
        mapping_backward_kernel,
        (groups,),
        x,
        incoming.y,
        d_x_next,
        incoming.x,
        f,
        incoming.h_pre,
        incoming.h_post,
        incoming.h_res,
        saved["h_pre"],
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
        d_maps,
        d_logits,
        d_product,
        None if number is None else x.new_empty(tokens, dtype=torch.float32),
        torch.empty_like(saved["inverse_rms"]),
        phi_shares,
        small_shares,
        tokens,
        channels,
        blocks,
        n=n,
        PADDED=padded_columns(n, manifold.per_stream),
        BT=BLOCK_TOKENS,
        BC=block_channels(n),
        **map_constants(manifold, fixed),
        MAP_BACKWARD=manifold.device_functions[1],
        PRECISION=product_precision(x.dtype),
        FENCE=not INTERPRETED,
        num_warps=4,
        maxnreg=MAX_REGISTERS,
        num_stages=2,
    )
    d_phi = torch.empty_like(phi) if groups > 1 else phi_shares[0]
    d_alpha, d_bias, d_number = torch.empty_like(alpha), torch.empty_like(bias), x.new_empty((), dtype=torch.float32)
    block = 1024
    grid, results = (1 + (triton.cdiv(phi.numel(), block) if groups > 1 else 0),), (d_phi, d_alpha, d_bias, d_number)
    launch(parameter_sum_kernel, grid, phi_shares, small_shares, *results, groups, phi.numel(), n=n, BLOCK=block)
    return Gradients(d_x, d_phi, d_alpha, d_bias, d_number, d_f)
