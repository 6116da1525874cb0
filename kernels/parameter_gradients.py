# mypy: disable-error-code="assignment,misc"
"""Gradients of phi, alpha, bias and the manifold's scalar in two stages: every group of tokens writes its share, then a second
launch adds the shares up in order. No atomics, so equal bits on every run."""

from pipehc.kernels.language import tl, triton
from pipehc.kernels.maps import tanh
from pipehc.kernels.projection import columns_of
from pipehc.kernels.tiles import at_token


@triton.jit
def store_phi_share(
    x,
    d_product,
    share,
    token,
    T,
    C,
    BLOCKS,
    n: tl.constexpr,
    PADDED: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PER_STREAM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Third sweep of the backward: x^T d_product over BLOCKS blocks of tokens, in the shape of phi."""
    K: tl.constexpr = n * n + 2 * n
    WIDTH: tl.constexpr = n + 2 if PER_STREAM else K
    k = tl.arange(0, PADDED)[None, :]
    x, d_product = at_token(x, token, n * C), at_token(d_product, token, K)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        total = tl.zeros([BC, PADDED], tl.float32)
        for j in range(n):
            entry, valid = columns_of(j, n, PADDED, PER_STREAM)
            for block in range(BLOCKS):
                t = block * BT + tl.arange(0, BT)[:, None]
                tokens = t < T - token
                stream = tl.load(x + t * (n * C) + j * C + c[None, :], mask=tokens & (c < C)[None, :], other=0.0)
                grad = tl.load(d_product + t * K + entry, mask=tokens & valid, other=0.0)
                total = tl.dot(tl.trans(stream.to(tl.float32)), grad, total, input_precision=PRECISION)
            if not PER_STREAM:
                tl.store(share + (j * C + c)[:, None] * WIDTH + k, total, mask=(c < C)[:, None] & (k < WIDTH))
                total = tl.zeros([BC, PADDED], tl.float32)
        if PER_STREAM:
            tl.store(share + c[:, None] * WIDTH + k, total, mask=(c < C)[:, None] & (k < WIDTH))


@triton.jit
def store_small_share(
    product,
    d_logits,
    d_scalar,
    share,
    token,
    T,
    BLOCKS,
    n: tl.constexpr,
    BT: tl.constexpr,
    PER_STREAM: tl.constexpr,
):
    """To `share` [2 K + 1]: the gradients of bias, those of alpha by entry, that of the scalar (0 if d_scalar is None)."""
    K: tl.constexpr = n * n + 2 * n
    ALL: tl.constexpr = triton.next_power_of_2(K)
    product, d_logits = at_token(product, token, K), at_token(d_logits, token, K)
    k = tl.arange(0, ALL)
    grad_bias = tl.zeros([BT, ALL], tl.float32)
    grad_alpha = tl.zeros([BT, ALL], tl.float32)
    grad_number = tl.zeros([BT, 1], tl.float32)
    for block in range(BLOCKS):
        t = block * BT + tl.arange(0, BT)[:, None]
        there = (t < T - token) & (k < K)[None, :]
        grad = tl.load(d_logits + t * K + k[None, :], mask=there, other=0.0)
        u = tl.load(product + t * K + k[None, :], mask=there, other=0.0)
        grad_bias += grad
        grad_alpha += grad * (tanh(u) if PER_STREAM else u)
        if d_scalar is not None:
            grad_number += tl.load(at_token(d_scalar, token, 1) + t, mask=t < T - token, other=0.0)
    tl.store(share + k, tl.sum(grad_bias, 0), mask=k < K)
    tl.store(share + K + k, tl.sum(grad_alpha, 0), mask=k < K)
    tl.store(share + 2 * K, tl.sum(tl.sum(grad_number, 1), 0))


@triton.jit(do_not_specialize=["PARTS"])
def parameter_sum_kernel(
    phi_shares,
    small_shares,
    d_phi,
    d_alpha,
    d_bias,
    d_number,
    PARTS,
    SIZE,
    n: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over the groups, in order. The last program has the small parameters, the others a block of phi each."""
    K: tl.constexpr = n * n + 2 * n
    ALL: tl.constexpr = triton.next_power_of_2(K)
    program = tl.program_id(0)
    if program < tl.num_programs(0) - 1:
        at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        pointer = phi_shares + at
        for _ in range(PARTS):
            total += tl.load(pointer, mask=at < SIZE, other=0.0)
            pointer += SIZE
        tl.store(d_phi + at, total, mask=at < SIZE)
    else:
        k = tl.arange(0, ALL)
        grad_bias = tl.zeros([ALL], tl.float32)
        grad_alpha = tl.zeros([ALL], tl.float32)
        grad_number = tl.zeros([ALL], tl.float32)
        for part in range(PARTS):
            share = small_shares + part * (2 * K + 1)
            grad_bias += tl.load(share + k, mask=k < K, other=0.0)
            grad_alpha += tl.load(share + K + k, mask=k < K, other=0.0)
            grad_number += tl.load(share + 2 * K + k, mask=k < 1, other=0.0)
        tl.store(d_bias + k, grad_bias, mask=k < K)
        for part in tl.static_range(3):
            tl.store(d_alpha + part, tl.sum(tl.where(tl.minimum(k // n, 2) == part, grad_alpha, 0.0), 0))
        tl.store(d_number, tl.sum(grad_number, 0))
