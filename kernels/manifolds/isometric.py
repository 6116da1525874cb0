"""IsoHC: the nearest map that keeps the mean over streams and the energy of every channel (polar retraction)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipehc.kernels.manifolds.base import Manifold

NORM_EPS = 1e-20


@dataclass(frozen=True, eq=False)
class Isometric(Manifold):
    """H_res with H^T H = I and H 1 = 1: the polar factor of the logits on the complement of 1.

    Iso-NS with cubic steps a X - b X X^T X whose (a, b) are the best for singular values that started in [1/condition, 1], in place
    of the fixed (1.5, 0.5): about half as many steps, and the isometry holds to rounding for condition numbers up to `condition`.
    """

    condition: float = 1e4

    def __post_init__(self) -> None:
        if not 1.0 <= self.condition <= 1e8:
            raise ValueError(f"condition={self.condition}: must lie in [1, 1e8]")

    @cached_property
    def steps(self) -> tuple[tuple[float, float], ...]:
        """(a, b) of every step."""
        return cubic_steps(self.condition)

    def map(self, logits: Tensor) -> Tensor:
        result: Tensor = _Retract.apply(logits, self.steps)
        return result

    def initial_res(self, n: int) -> Tensor:
        """I: the retraction of the identity is the identity, and its gradient is well conditioned there."""
        return torch.eye(n)


def cubic_steps(condition: float) -> tuple[tuple[float, float], ...]:
    """Coefficients (a, b) of steps a x - b x^3 that take [l, 1] to 1, with l = 1 / (condition * sqrt(7)): up to n - 1 = 7 equal
    singular values make the Frobenius norm sqrt(7) times the largest one.

    Each is the polynomial closest to 1 on the current interval [l, u]: the error alternates at l, at the inner maximum and at u, so
    a = b (l^2 + l u + u^2) and 2 = b (2 ((l^2 + l u + u^2) / 3)^1.5 + l u (l + u)). Near 1 they become Newton-Schulz's (1.5, 0.5).
    """
    low, high = 1.0 / (condition * math.sqrt(7.0)), 1.0
    steps: list[tuple[float, float]] = []
    while True:
        s = low * low + low * high + high * high
        b = 2.0 / (2.0 * (s / 3.0) ** 1.5 + low * high * (low + high))
        a = b * s
        steps.append((a, b))
        error = 1.0 - b * low * high * (low + high)
        if error < 1e-12:
            return tuple(steps)
        low, high = 1.0 - error, 1.0 + error


class _Retract(torch.autograd.Function):
    """Backward through the steps, whose iterates are recomputed. The direction of 1 is kept in X with singular value 1, so that
    rounding in that direction is corrected like everywhere else instead of growing with the steps."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, steps: tuple[tuple[float, float], ...]) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.steps = steps
        x = _start(_centred(logits))
        for a, b in steps:
            x = a * x - b * (x @ (x.mT @ x))
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        centred = _centred(logits)
        iterates = [_start(centred)]
        for a, b in ctx.steps[:-1]:
            x = iterates[-1]
            iterates.append(a * x - b * (x @ (x.mT @ x)))
        for (a, b), x in zip(reversed(ctx.steps), reversed(iterates)):
            w = x.mT @ grad
            grad = a * grad - b * (grad @ (x.mT @ x) + x @ (w + w.mT))
        # X_0 = A / |A| + const, with A the centred logits.
        norm = _norm(centred)
        grad = _centred(grad)
        radial = (grad * centred).sum((-2, -1), keepdim=True) / norm**2
        return (grad - centred * radial) / norm, None


def _centred(logits: Tensor) -> Tensor:
    """U U^T logits U U^T: rows and columns with their means taken out."""
    rows = logits - logits.mean(-1, keepdim=True)
    return rows - rows.mean(-2, keepdim=True)


def _norm(centred: Tensor) -> Tensor:
    return (centred.square().sum((-2, -1), keepdim=True) + NORM_EPS).sqrt()


def _start(centred: Tensor) -> Tensor:
    return centred / _norm(centred) + 1.0 / centred.shape[-1]
