# mypy: disable-error-code="assignment,misc"
"""IsoHC: the nearest map that keeps the mean over streams and the energy of every channel (polar retraction)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pipehc.kernels.differentiation import matmul
from pipehc.kernels.language import tl, triton
from pipehc.kernels.manifolds.base import Manifold, Settings
from pipehc.kernels.matrices import inside, product, total, transposed

NORM_EPS = 1e-20

HIGHEST = 1.1
"""Upper end of the first interval of singular values: X_0 is scaled to at most this, and early steps overshoot 1 to this."""

EARLY_LOW = 0.5192462269726688
"""The l at which the best step on [l, HIGHEST] has exactly the error HIGHEST - 1."""


@dataclass(frozen=True, eq=False)
class Isometric(Manifold):
    """H_res with H^T H = I and H 1 = 1: the polar factor of the logits on the complement of 1.

    Iso-NS with cubic steps a X - b X X^T X whose (a, b) follow the interval that holds the singular values, in place of a fixed
    (1.5, 0.5): 19 steps keep the isometry to rounding up to condition number 1e4, where the fixed ones need 30.
    """

    condition: float = 1e4

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.condition, bool) or not isinstance(self.condition, int | float) or not 1.0 <= self.condition <= 1e8:
            raise ValueError(f"condition={self.condition!r}: must lie in [1, 1e8]")

    @classmethod
    def of(cls, settings: Settings, scalar: Tensor | None) -> Isometric:
        return cls(settings.condition, norm_eps=settings.norm_eps)

    @property
    def steps(self) -> tuple[tuple[float, float], ...]:
        """(a, b) of every step."""
        return cubic_steps(self.condition)

    @property
    def device_functions(self) -> tuple[Any, Any]:
        return retract, retract_backward

    @property
    def settings(self) -> tuple[float, ...]:
        """Number of steps, and what the kernel needs to derive (a, b) as it goes."""
        return (len(self.steps), lowest(self.condition), EARLY_LOW, HIGHEST)

    def map(self, logits: Tensor) -> Tensor:
        result: Tensor = _Retract.apply(logits, self.steps)
        return result

    def initial_res(self, n: int) -> Tensor:
        """I: the retraction of the identity is the identity, and its gradient is well conditioned there."""
        return torch.eye(n)


def lowest(condition: float) -> float:
    """Least singular value at the start: the Frobenius norm that X_0 is divided by is at most 4 times the largest for n <= 17."""
    return HIGHEST / (condition * 4.0)


@cache
def cubic_steps(condition: float) -> tuple[tuple[float, float], ...]:
    """Coefficients (a, b) of steps a x - b x^3 that take [lowest(condition), HIGHEST] to 1.

    Each is the polynomial closest to 1 on the present interval [l, h]: the error alternates at l, at the inner maximum and at h, so
    a = b (l^2 + l h + h^2) and 2 = b (2 ((l^2 + l h + h^2) / 3)^1.5 + l h (l + h)). While l is small it is taken as EARLY_LOW: the
    steps then overshoot 1 by no more than HIGHEST - 1, whereas the greedy choice folds the interval over itself and loses three
    digits of H in fp32. Near 1 the steps become Newton-Schulz's (1.5, 0.5).
    """
    low, high = lowest(condition), HIGHEST
    steps: list[tuple[float, float]] = []
    while 1.0 - low > 1e-12:
        l = max(low, EARLY_LOW)
        s, ends = l * l + l * high + high * high, l * high * (l + high)
        b = 2.0 / (2.0 * (s / 3.0) ** 1.5 + ends)
        a, error = b * s, 1.0 - b * ends
        steps.append((a, b))
        low, high = min(1.0 - error, a * low - b * low**3), 1.0 + error
    return tuple(steps)


class _Retract(torch.autograd.Function):
    """Backward through the steps, whose iterates are recomputed from the logits, so that it can be differentiated again. The
    direction of 1 is kept in X with singular value 1, so that rounding in that direction is corrected like everywhere else instead
    of growing with the steps."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, steps: tuple[tuple[float, float], ...]) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.steps = steps
        x = _start(_centred(logits))
        for a, b in steps:
            x = a * x - b * matmul(x, matmul(x.mT, x))
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        centred = _centred(logits)
        iterates = [_start(centred)]
        for a, b in ctx.steps[:-1]:
            x = iterates[-1]
            iterates.append(a * x - b * matmul(x, matmul(x.mT, x)))
        for (a, b), x in zip(reversed(ctx.steps), reversed(iterates)):
            w = matmul(x.mT, grad)
            grad = a * grad - b * (matmul(grad, matmul(x.mT, x)) + matmul(x, w + w.mT))
        # X_0 = HIGHEST A / |A| + const, with A the centred logits.
        norm = _norm(centred)
        grad = _centred(grad)
        radial = (grad * centred).sum((-2, -1), keepdim=True) / norm**2
        return HIGHEST * (grad - centred * radial) / norm, None


def _centred(logits: Tensor) -> Tensor:
    """U U^T logits U U^T: rows and columns with their means taken out, twice, so that large means leave no rounding behind."""
    for _ in range(2):
        logits = logits - logits.mean(-1, keepdim=True)
        logits = logits - logits.mean(-2, keepdim=True)
    return logits


def _norm(centred: Tensor) -> Tensor:
    return (centred.square().sum((-2, -1), keepdim=True) + NORM_EPS).sqrt()


def _start(centred: Tensor) -> Tensor:
    return HIGHEST * centred / _norm(centred) + 1.0 / centred.shape[-1]


# Backward holds two iterates at a time and recomputes the ones before.


@triton.jit
def retract(z, scalar, n: tl.constexpr, SETTINGS: tl.constexpr):
    centred = _centre(z, n)
    x, _, _ = _advance(_begin(centred, _frobenius(centred), n, SETTINGS), SETTINGS[0], n, SETTINGS)
    return x


@triton.jit
def retract_backward(z, grad, scalar, n: tl.constexpr, SETTINGS: tl.constexpr):
    centred = _centre(z, n)
    norm = _frobenius(centred)
    start = _begin(centred, norm, n, SETTINGS)
    segment: tl.constexpr = 2
    full: tl.constexpr = SETTINGS[0] // segment
    rest: tl.constexpr = SETTINGS[0] % segment
    if rest > 0:
        grad = _back_through(start, grad, full * segment, rest, n, SETTINGS)
    for s in range(full):
        grad = _back_through(start, grad, (full - 1 - s) * segment, segment, n, SETTINGS)
    grad = _centre(grad, n)
    # Divided one after the other: the square of a tiny norm would underflow.
    radial = total(grad * centred)[:, None, None] / norm / norm
    return SETTINGS[3] * (grad - centred * radial) / norm, tl.zeros([z.shape[0]], tl.float32)


@triton.jit
def _back_through(start, grad, first, count: tl.constexpr, n: tl.constexpr, SETTINGS: tl.constexpr):
    """Gradient by the iterate after `first` steps from the one by the iterate `count` steps later."""
    x, low, high = _advance(start, first, n, SETTINGS)
    iterates, factors = (), ()
    for _ in tl.static_range(count):
        a, b, low, high = _factors(low, high, SETTINGS)
        iterates += (x,)
        factors += ((a, b),)
        x = a * x - b * product(x, product(transposed(x), x, n), n)
    for s in tl.static_range(count):
        x = iterates[count - 1 - s]
        a = factors[count - 1 - s][0]
        b = factors[count - 1 - s][1]
        w = product(transposed(x), grad, n)
        grad = a * grad - b * (product(grad, product(transposed(x), x, n), n) + product(x, w + transposed(w), n))
    return grad


@triton.jit
def _advance(x, steps, n: tl.constexpr, SETTINGS: tl.constexpr):
    low = tl.full([], SETTINGS[1], tl.float32)
    high = tl.full([], SETTINGS[3], tl.float32)
    for _ in range(steps):
        a, b, low, high = _factors(low, high, SETTINGS)
        x = a * x - b * product(x, product(transposed(x), x, n), n)
    return x, low, high


@triton.jit
def _factors(low, high, SETTINGS: tl.constexpr):
    """(a, b) of the step on the interval [low, high], and the interval after it: `cubic_steps`."""
    l = tl.maximum(low, SETTINGS[2])
    inner = (l * l + l * high + high * high) / 3.0
    ends = l * high * (l + high)
    b = 2.0 / (2.0 * inner * tl.sqrt(inner) + ends)
    a = 3.0 * b * inner
    error = 1.0 - b * ends
    return a, b, tl.minimum(1.0 - error, a * low - b * low * low * low), 1.0 + error


@triton.jit
def _centre(z, n: tl.constexpr):
    own = inside(n, z.shape[1])
    for _ in tl.static_range(2):
        rows = tl.sum(z, 2, keep_dims=True) / n
        columns = tl.sum(z, 1, keep_dims=True) / n
        z = tl.where(own, z - rows - columns + tl.sum(columns, 2, keep_dims=True) / n, 0.0)
    return z


@triton.jit
def _frobenius(centred):
    return tl.sqrt(total(centred * centred) + 1e-20)[:, None, None]


@triton.jit
def _begin(centred, norm, n: tl.constexpr, SETTINGS: tl.constexpr):
    return tl.where(inside(n, centred.shape[1]), SETTINGS[3] * centred / norm + 1.0 / n, 0.0)
