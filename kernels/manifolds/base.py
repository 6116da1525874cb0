"""What a manifold is to the operations: a map from n x n logits to H_res, and how its logits come about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor


class Settings(NamedTuple):
    """What a configuration says about maps: each manifold takes what it has a use for."""

    iterations: int = 20
    condition: float = 1e4
    static: bool = False


@dataclass(frozen=True, eq=False)
class Manifold(ABC):
    """A member of the hyper-connection family (spec section 2). Instances are immutable and hold the map's own settings."""

    per_stream: ClassVar[bool] = False
    """False: logits = alpha * (x phi) / rms(x) + bias over the flat token, then sigmoids (mHC, eq. 7 and 8). True: every stream is
    normalised on its own, logits = alpha * tanh(x phi / rms(x)) + bias, used as they are (HC, eq. 5)."""

    scalar_is: ClassVar[Literal["learned", "controlled"] | None] = None
    """Whether the map's one scalar besides the logits is learned, as the sigmoid of a parameter, or set by feedback of the gain."""

    static_form: ClassVar[bool] = False
    """Whether there is a form whose coefficients do not depend on x."""

    @classmethod
    def of(cls, settings: Settings, scalar: Tensor | None) -> Manifold:
        """The instance for a configuration and the present value of the scalar."""
        return cls()

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

    def initial_bias(self, n: int) -> Tensor:
        """Initial bias [n*n + 2n], fp32: with alpha = 0, H_pre = 1/n and H_post = 1 (spec section 2, initialisation)."""
        if self.per_stream:
            pre, post = torch.full((n,), 1.0 / n), torch.ones(n)
        else:
            share = torch.tensor(1.0 / n, dtype=torch.float64)
            pre, post = torch.logit(share, eps=1e-9).float().expand(n), torch.zeros(n)
        return torch.cat([pre, post, self.initial_res(n).flatten()])
