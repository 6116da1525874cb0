# mypy: disable-error-code="assignment,misc"
"""mHC: Sinkhorn-Knopp onto the doubly stochastic matrices (paper eq. 9 and 19)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipehc.kernels.language import tl, triton
from pipehc.kernels.manifolds.base import Manifold


@dataclass(frozen=True, eq=False)
class Birkhoff(Manifold):
    """H_res = Sinkhorn-Knopp of exp(logits): `iterations` times columns, then rows. Rows sum to 1 to rounding."""

    iterations: int = 20

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations}: must be at least 1")

    @property
    def device_functions(self) -> tuple[Any, Any]:
        return sinkhorn, sinkhorn_backward

    @property
    def settings(self) -> tuple[float, ...]:
        return (self.iterations,)

    def map(self, logits: Tensor) -> Tensor:
        result: Tensor = _Sinkhorn.apply(logits, self.iterations)
        return result

    def initial_res(self, n: int) -> Tensor:
        """4 I: diagonal 0.95 at n = 4. Streams stay apart, yet every entry still has a useful gradient."""
        return 4.0 * torch.eye(n)


class _Sinkhorn(torch.autograd.Function):
    """Saves the logits alone. Works on [rows, columns, matrices], where sums over rows or columns run along whole vectors."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.iterations = iterations
        m, _, _ = _iterate(_matrices_last(logits), iterations, keep_sums=False)
        return m.permute(2, 0, 1).contiguous().view(logits.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        m, after_columns, sums = _iterate(_matrices_last(logits), ctx.iterations, keep_sums=True)
        # p = dL/dM * M is the gradient by log M. Normalising M over a dimension takes p to p - M sum(p) over that dimension,
        # with M the result of that step; multiplying by the sums steps M back to the iterate before.
        p = _matrices_last(grad) * m
        for by_column, by_row in reversed(sums):
            p = torch.addcmul(p, m, p.sum(1, keepdim=True), value=-1)
            m = m * by_row
            p = torch.addcmul(p, m, p.sum(0, keepdim=True), value=-1)
            m = m * by_column
        p = torch.addcmul(p, m, p.sum(1, keepdim=True), value=-1)
        p = torch.addcmul(p, after_columns, p.sum(0, keepdim=True), value=-1)
        return p.permute(2, 0, 1).contiguous().view(logits.shape), None


def _matrices_last(batch: Tensor) -> Tensor:
    n = batch.shape[-1]
    return batch.reshape(-1, n, n).permute(1, 2, 0).contiguous()


def _iterate(logits: Tensor, iterations: int, keep_sums: bool) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """The last iterate, the first one after its column step, and the sums (column, row) of iterations 2, 3, ...

    The first iteration runs on logarithms, so that no row or column underflows however far apart the logits are: subtracting
    the maximum of each column, as of the whole matrix, cancels in the column step. From then on every sum is at least 1/n^2.
    """
    log_columns = torch.log_softmax(logits, dim=0)
    m = torch.softmax(log_columns, dim=1)
    sums = []
    for _ in range(iterations - 1):
        by_column = m.sum(0, keepdim=True)
        m = m / by_column
        by_row = m.sum(1, keepdim=True)
        m = m / by_row
        if keep_sums:
            sums.append((by_column, by_row))
    return m, log_columns.exp(), sums


# The kernels write iteration t >= 2 as M = diag(r) K diag(c) with K the result of the first: c = 1 / K^T r, then r = 1 / K c. The
# state is then r alone. Backward needs every (r, c) once, last to first: it holds two of them and recomputes the ones before.


@triton.jit
def sinkhorn(z, scalar, n: tl.constexpr, SETTINGS: tl.constexpr):
    k, _ = _first_iteration(z, n)
    r = _ones(z, n)
    c = _ones(z, n)
    for _ in range(SETTINGS[0] - 1):
        c = _column_scales(k, r, n)
        r = _row_scales(k, c, n)
    return _scaled(k, r, c, n)


@triton.jit
def sinkhorn_backward(z, grad, scalar, n: tl.constexpr, SETTINGS: tl.constexpr):
    k, row_sums = _first_iteration(z, n)
    m = sinkhorn(z, scalar, n, SETTINGS)
    p = ()
    for e in tl.static_range(n * n):
        p += (grad[e] * m[e],)
    segment: tl.constexpr = 2
    full: tl.constexpr = (SETTINGS[0] - 1) // segment
    rest: tl.constexpr = (SETTINGS[0] - 1) % segment
    if rest > 0:
        p = _reverse(k, p, full * segment, rest, n)
    for s in range(full):
        p = _reverse(k, p, (full - 1 - s) * segment, segment, n)
    p = _through_rows(p, k, n)
    return _through_columns(p, _scaled(k, row_sums, _ones(z, n), n), n), tl.zeros_like(z[0])


@triton.jit
def _reverse(k, p, start, count: tl.constexpr, n: tl.constexpr):
    """p = dL/dlog M from after iteration start + count back to after iteration start."""
    r = _ones(k, n)
    for _ in range(start):
        r = _row_scales(k, _column_scales(k, r, n), n)
    rows, columns = (r,), ()
    for s in tl.static_range(count):
        c = _column_scales(k, rows[s], n)
        columns += (c,)
        rows += (_row_scales(k, c, n),)
    for s in tl.static_range(count):
        c = columns[count - 1 - s]
        p = _through_rows(p, _scaled(k, rows[count - s], c, n), n)
        p = _through_columns(p, _scaled(k, rows[count - 1 - s], c, n), n)
    return p


@triton.jit
def _first_iteration(z, n: tl.constexpr):
    """The result, and the row sums it divided by; on logarithms, see `_iterate`."""
    logs = ()
    for j in tl.static_range(n):
        top = z[j]
        for i in tl.static_range(1, n):
            top = tl.maximum(top, z[i * n + j])
        total = tl.zeros_like(top)
        for i in tl.static_range(n):
            total += tl.exp(z[i * n + j] - top)
        logs += (top + tl.log(total),)
    after_rows, row_sums = (), ()
    for i in tl.static_range(n):
        top = z[i * n] - logs[0]
        for j in tl.static_range(1, n):
            top = tl.maximum(top, z[i * n + j] - logs[j])
        total = tl.zeros_like(top)
        for j in tl.static_range(n):
            total += tl.exp(z[i * n + j] - logs[j] - top)
        for j in tl.static_range(n):
            after_rows += (tl.exp(z[i * n + j] - logs[j] - top) / total,)
        row_sums += (tl.exp(top) * total,)
    return after_rows, row_sums


@triton.jit
def _ones(like, n: tl.constexpr):
    out = ()
    for _ in tl.static_range(n):
        out += (tl.zeros_like(like[0]) + 1.0,)
    return out


@triton.jit
def _column_scales(k, r, n: tl.constexpr):
    out = ()
    for j in tl.static_range(n):
        total = r[0] * k[j]
        for i in tl.static_range(1, n):
            total += r[i] * k[i * n + j]
        out += (1.0 / total,)
    return out


@triton.jit
def _row_scales(k, c, n: tl.constexpr):
    out = ()
    for i in tl.static_range(n):
        total = k[i * n] * c[0]
        for j in tl.static_range(1, n):
            total += k[i * n + j] * c[j]
        out += (1.0 / total,)
    return out


@triton.jit
def _scaled(k, r, c, n: tl.constexpr):
    out = ()
    for i in tl.static_range(n):
        for j in tl.static_range(n):
            out += (r[i] * k[i * n + j] * c[j],)
    return out


@triton.jit
def _through_rows(p, m, n: tl.constexpr):
    """dL/dlog before a row step from dL/dlog after it, with m its result."""
    out = ()
    for i in tl.static_range(n):
        total = p[i * n]
        for j in tl.static_range(1, n):
            total += p[i * n + j]
        for j in tl.static_range(n):
            out += (p[i * n + j] - m[i * n + j] * total,)
    return out


@triton.jit
def _through_columns(p, m, n: tl.constexpr):
    totals = ()
    for j in tl.static_range(n):
        total = p[j]
        for i in tl.static_range(1, n):
            total += p[i * n + j]
        totals += (total,)
    out = ()
    for i in tl.static_range(n):
        for j in tl.static_range(n):
            out += (p[i * n + j] - m[i * n + j] * totals[j],)
    return out
