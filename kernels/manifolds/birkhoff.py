"""mHC: Sinkhorn-Knopp onto the doubly stochastic matrices (paper eq. 9 and 19)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipehc.kernels.manifolds.base import Manifold


@dataclass(frozen=True, eq=False)
class Birkhoff(Manifold):
    """H_res = Sinkhorn-Knopp of exp(logits): `iterations` times columns, then rows. Rows sum to 1 to rounding."""

    iterations: int = 20

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations}: must be at least 1")

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
