"""What a manifold is to the operations: a map from n x n logits to H_res, and how its logits come about."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from pipehc.kernels.shapes import NORM_EPS


class Settings(NamedTuple):
    """What a configuration says about maps: each manifold takes what it has a use for."""

    iterations: int = 20
    condition: float = 1e4
    static: bool = False
    norm_eps: float = NORM_EPS


@dataclass(frozen=True, eq=False)
class Manifold(ABC):
    """A member of the hyper-connection family (spec section 2). Instances are immutable and hold the map's own settings.

    norm_eps: epsilon of rms(x) below. A token whose streams are all zero has gradients of its inverse root: 1e10 with the paper's.
    """

    norm_eps: float = field(default=NORM_EPS, kw_only=True)

    per_stream: ClassVar[bool] = False
    """False: logits = alpha * (x phi) / rms(x) + bias over the flat token, then sigmoids (mHC, eq. 7 and 8). True: every stream is
    normalised on its own, logits = alpha * tanh(x phi / rms(x)) + bias, used as they are (HC, eq. 5)."""

    scalar_is: ClassVar[Literal["learned", "controlled"] | None] = None
    """Whether the map's one scalar besides the logits is learned, as the sigmoid of a parameter, or set by feedback of the gain."""

    static_form: ClassVar[bool] = False
    """Whether there is a form whose coefficients do not depend on x."""

    def __post_init__(self) -> None:
        eps = self.norm_eps
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < math.inf:
            raise ValueError(f"norm_eps={eps!r}: must be a finite number, above 0")

    @classmethod
    def of(cls, settings: Settings, scalar: Tensor | None) -> Manifold:
        """The instance for a configuration and the present value of the scalar."""
        return cls(norm_eps=settings.norm_eps)

    @property
    def scalar(self) -> Tensor | None:
        """The one scalar the map depends on besides the logits (hybrid's lambda, harmonized's s), shape [], or None."""
        return None

    @property
    def static(self) -> bool:
        """True when the coefficients do not depend on x at all: phi is then ignored."""
        return False

    @property
    @abstractmethod
    def device_functions(self) -> tuple[Any, Any]:
        """Triton functions of the same map and its gradient. z, grad: [BT, N, N] fp32, N the power of two from n on, zero beyond
        n, where what they return counts for nothing but must be finite (matrices.py); scalar: fp32 or None.

        map(z, scalar, n, SETTINGS) -> H_res [BT, N, N]
        backward(z, grad, scalar, n, SETTINGS) -> (gradient by z [BT, N, N], gradient by the scalar [BT])
        """

    @property
    def settings(self) -> tuple[Any, ...]:
        """Compile-time numbers, or tuples of them, that the Triton functions get as SETTINGS."""
        return (0,)

    @abstractmethod
    def map(self, logits: Tensor) -> Tensor:
        """H_res [..., n, n] of logits [..., n, n], in the dtype of the logits (fp32 or fp64). Differentiable."""

    @abstractmethod
    def initial_res(self, n: int) -> Tensor:
        """Initial bias of the residual logits, [n, n] fp32: H_res is then the identity or close to it."""

    def phi_shape(self, n: int, channels: int) -> tuple[int, int]:
        """Shape of phi: [n*C, n*n + 2n], or [C, n + 2] where each stream is projected alone (columns pre, post, rows of res)."""
        return (channels, n + 2) if self.per_stream else (n * channels, n * n + 2 * n)

    def initial_bias(self, read: Tensor, read_logits: Tensor, write_logits: Tensor) -> Tensor:
        """Initial bias [n*n + 2n], fp32: with alpha = 0, H_pre is `read` [n] and H_post 2 sigmoid of `write_logits` [n].

        read_logits: those of which the sigmoid is `read`.
        """
        first = (read, 2 * torch.sigmoid(write_logits)) if self.per_stream else (read_logits, write_logits)
        return torch.cat([*(part.float() for part in first), self.initial_res(len(read)).flatten()])
