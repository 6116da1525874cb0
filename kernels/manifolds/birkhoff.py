# mypy: disable-error-code="assignment,misc"
"""mHC: Sinkhorn-Knopp onto the doubly stochastic matrices (paper eq. 9 and 19)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipehc.kernels.language import tl, triton
from pipehc.kernels.manifolds.base import Manifold, Settings
from pipehc.kernels.matrices import diagonal, inside


@dataclass(frozen=True, eq=False)
class Birkhoff(Manifold):
    """H_res = Sinkhorn-Knopp of exp(logits): `iterations` times columns, then rows. Rows sum to 1 to rounding."""

    iterations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.iterations) is not int or self.iterations < 1:
            raise ValueError(f"iterations={self.iterations!r}: must be a whole number, at least 1")

    @classmethod
    def of(cls, settings: Settings, scalar: Tensor | None) -> Birkhoff:
        return cls(settings.iterations, norm_eps=settings.norm_eps)

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
    """Saves the logits alone, from which backward computes all it needs, so that it can be differentiated again. Works on
    [rows, columns, matrices], where sums over rows or columns run along whole vectors."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.iterations = iterations
        m, _, _ = _iterate(_matrices_last(logits), iterations, keep_sums=False)
        return m.permute(2, 0, 1).contiguous().view(logits.shape)

    @staticmethod
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
# state is then r alone. Backward needs every (r, c) once, last to first: it holds a segment of them and recomputes those before.
# Beyond n a matrix is continued by the identity, which every step leaves as it is: no sum is zero.


@triton.jit
def sinkhorn(z, scalar, n: tl.constexpr, SETTINGS: tl.constexpr):
    k, _ = _first_iteration(z, n)
    r, c = _iterations(k, SETTINGS[0] - 1)
    return r * k * c


@triton.jit
def sinkhorn_backward(z, grad, scalar, n: tl.constexpr, SETTINGS: tl.constexpr):
    k, row_sums = _first_iteration(z, n)
    r, c = _iterations(k, SETTINGS[0] - 1)
    p = grad * (r * k * c)
    segment: tl.constexpr = 4
    full: tl.constexpr = (SETTINGS[0] - 1) // segment
    rest: tl.constexpr = (SETTINGS[0] - 1) % segment
    if rest > 0:
        p = _reverse(k, p, full * segment, rest)
    for s in range(full):
        p = _reverse(k, p, (full - 1 - s) * segment, segment)
    p = _through_rows(p, k)
    return _through_columns(p, k * row_sums), tl.zeros([z.shape[0]], tl.float32)


@triton.jit
def _first_iteration(z, n: tl.constexpr):
    """The result, and the row sums it divided by; on logarithms, see `_iterate`."""
    N: tl.constexpr = z.shape[1]
    if n < N:
        z = tl.where(inside(n, N), z, tl.where(diagonal(N), 0.0, float("-inf")))
    top = tl.max(z, 1, keep_dims=True)
    z -= top + tl.log(tl.sum(tl.exp(z - top), 1, keep_dims=True))
    top = tl.max(z, 2, keep_dims=True)
    k = tl.exp(z - top)
    sums = tl.sum(k, 2, keep_dims=True)
    return k / sums, tl.exp(top) * sums


@triton.jit
def _column_scales(k, r):
    return 1.0 / tl.sum(r * k, 1, keep_dims=True)


@triton.jit
def _row_scales(k, c):
    return 1.0 / tl.sum(k * c, 2, keep_dims=True)


@triton.jit
def _iterations(k, count):
    """Row and column scales after `count` iterations from K on."""
    r = tl.zeros([k.shape[0], k.shape[1], 1], tl.float32) + 1.0
    c = tl.zeros([k.shape[0], 1, k.shape[1]], tl.float32) + 1.0
    for _ in range(count):
        c = _column_scales(k, r)
        r = _row_scales(k, c)
    return r, c


@triton.jit
def _reverse(k, p, start, count: tl.constexpr):
    """p = dL/dlog M from after iteration start + count back to after iteration start, both counted from K on."""
    r, _ = _iterations(k, start)
    rows, columns = (r,), ()
    for s in tl.static_range(count):
        c = _column_scales(k, rows[s])
        columns += (c,)
        rows += (_row_scales(k, c),)
    for s in tl.static_range(count):
        c = columns[count - 1 - s]
        p = _through_rows(p, rows[count - s] * k * c)
        p = _through_columns(p, rows[count - 1 - s] * k * c)
    return p


@triton.jit
def _through_rows(p, m):
    """dL/dlog before a row step from dL/dlog after it, with m its result."""
    return p - m * tl.sum(p, 2, keep_dims=True)


@triton.jit
def _through_columns(p, m):
    return p - m * tl.sum(p, 1, keep_dims=True)
