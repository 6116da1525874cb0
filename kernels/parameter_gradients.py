# mypy: disable-error-code="assignment,misc"
"""Gradients of phi, alpha, bias, the manifold's scalar and the norm's weight in two stages: programs write shares, then one launch
adds them up in order. No atomics, so equal bits on every run."""

from pipehc.kernels.language import tl, triton
from pipehc.kernels.maps import tanh
from pipehc.kernels.projection import columns_of
from pipehc.kernels.tiles import at_token


@triton.jit(do_not_specialize=["T", "STEPS"])
def phi_gradient_kernel(
    x,
    d_product,
    shares,
    T,
    C,
    STEPS,
    n: tl.constexpr,
    PADDED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PER_STREAM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x^T d_product of BC channels of a stream, all of them where they share phi, over STEPS times BT tokens: to `shares`
    [spans of tokens, *phi]. The first channels first, which the launch before has left in L2."""
    K: tl.constexpr = n * n + 2 * n
    WIDTH: tl.constexpr = n + 2 if PER_STREAM else K
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    j = tl.program_id(1)
    span = tl.program_id(0)
    k = tl.arange(0, PADDED)[None, :]
    t = tl.arange(0, BT)[:, None]
    total = tl.zeros([BC, PADDED], tl.float32)
    for step in range(STEPS):
        token = (span * STEPS + step) * BT
        tokens = t < T - token
        rows = at_token(x, token, n * C) + t * (n * C) + c[None, :]
        for i in tl.static_range(n if PER_STREAM else 1):
            entry, valid = columns_of(i, n, PADDED, PER_STREAM)
            stream = tl.load(rows + (j + i) * C, mask=tokens & (c < C)[None, :], other=0.0, eviction_policy="evict_first")
            grad = tl.load(at_token(d_product, token, K) + t * K + entry, mask=tokens & valid, other=0.0)
            total = tl.dot(tl.trans(stream.to(tl.float32)), grad, total, input_precision=PRECISION)
    shares += span.to(tl.int64) * ((C if PER_STREAM else n * C) * WIDTH)
    tl.store(shares + (j * C + c)[:, None] * WIDTH + k, total, mask=(c < C)[:, None] & (k < WIDTH))


@triton.jit
def store_small_share(
    product,
    d_logits,
    d_scalar,
    share,
    token,
    T,
    n: tl.constexpr,
    BT: tl.constexpr,
    PER_STREAM: tl.constexpr,
):
    """To `share` [2 K + 1]: the gradients of bias, those of alpha by entry, that of the scalar (0 if d_scalar is None)."""
    K: tl.constexpr = n * n + 2 * n
    ALL: tl.constexpr = triton.next_power_of_2(K)
    product, d_logits = at_token(product, token, K), at_token(d_logits, token, K)
    k = tl.arange(0, ALL)
    t = tl.arange(0, BT)[:, None]
    there = (t < T - token) & (k < K)[None, :]
    grad = tl.load(d_logits + t * K + k[None, :], mask=there, other=0.0)
    u = tl.load(product + t * K + k[None, :], mask=there, other=0.0)
    tl.store(share + k, tl.sum(grad, 0), mask=k < K)
    tl.store(share + K + k, tl.sum(grad * (tanh(u) if PER_STREAM else u), 0), mask=k < K)
    number = tl.zeros([BT, 1], tl.float32)
    if d_scalar is not None:
        number += tl.load(at_token(d_scalar, token, 1) + t, mask=t < T - token, other=0.0)
    tl.store(share + 2 * K, tl.sum(tl.sum(number, 1), 0))


@triton.jit
def sum_shares(shares, k, PARTS, WIDTH, ROWS: tl.constexpr):
    """Columns k of the sum of `shares` [PARTS, WIDTH], ROWS of them at a time: one after the other each would wait for memory."""
    total = tl.zeros([ROWS, k.shape[0]], tl.float32)
    row = tl.arange(0, ROWS)[:, None]
    for first in range(0, PARTS, ROWS):
        part = first + row
        total += tl.load(shares + part.to(tl.int64) * WIDTH + k[None, :], mask=(part < PARTS) & (k < WIDTH)[None, :], other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["PHI_PARTS", "SMALL_PARTS", "WEIGHT_PARTS"])
def parameter_sum_kernel(
    phi_shares,
    small_shares,
    weight_shares,
    d_phi,
    d_alpha,
    d_bias,
    d_number,
    d_weight,
    PHI_PARTS,
    SMALL_PARTS,
    WEIGHT_PARTS,
    SIZE,
    C,
    n: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over the shares, always in the same order. The first program has the small parameters; the next ones BLOCK entries of
    the norm's weight each, unless that is None, and the rest 8 BLOCK entries of phi each."""
    program = tl.program_id(0)
    before_phi = 1
    if weight_shares is not None:
        before_phi += tl.cdiv(C, BLOCK)
    if program >= before_phi:
        of_phi = (program - before_phi) * (8 * BLOCK) + tl.arange(0, 8 * BLOCK)
        tl.store(d_phi + of_phi, sum_shares(phi_shares, of_phi, PHI_PARTS, SIZE, 4), mask=of_phi < SIZE)
    elif program > 0:
        if weight_shares is not None:
            c = (program - 1) * BLOCK + tl.arange(0, BLOCK)
            of_weight = sum_shares(weight_shares, c, WEIGHT_PARTS, C, 32)
            tl.store(d_weight + c, of_weight.to(d_weight.dtype.element_ty), mask=c < C)
    else:
        K: tl.constexpr = n * n + 2 * n
        ALL: tl.constexpr = triton.next_power_of_2(2 * K + 1)
        k = tl.arange(0, ALL)
        total = sum_shares(small_shares, k, SMALL_PARTS, 2 * K + 1, 4096 // ALL)
        tl.store(d_bias + k, total, mask=k < K)
        part = tl.minimum(tl.maximum(k - K, 0) // n, 2)
        for one in tl.static_range(3):
            tl.store(d_alpha + one, tl.sum(tl.where((k >= K) & (k < 2 * K) & (part == one), total, 0.0), 0))
        tl.store(d_number, tl.sum(tl.where(k == 2 * K, total, 0.0), 0))
