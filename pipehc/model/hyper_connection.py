"""The hyper-connection of one sub-layer: its parameters, and the operations on streams in Megatron's layout [s, b, n*C]."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipehc import kernels
from pipehc.kernels import manifolds
from pipehc.kernels.coefficients import check_fixed
from pipehc.kernels.manifolds import KINDS
from pipehc.kernels.shapes import NORM_EPS
from pipehc.model.norm import Norm, RMSNorm
from pipehc.model.start import read_logits, reads, write_logits
from pipehc.model.wgrad import StandIns

PHI_STD = 0.02
"""Standard deviation of phi at initialisation, as for the linear layers around it."""


class HyperConnection(nn.Module):
    """Maps H_pre, H_post and H_res of one sub-layer F:  x' = H_res x + H_post^T F(H_pre x).

    Parameters, fp32 whatever the model's dtype: phi [n*C, n*n + 2n] (hc and harmonized: [C, n + 2]), alpha [3],
    bias [n*n + 2n]; for hybrid also blend_logit [1], lambda before its sigmoid. Buffers of harmonized:
    s [] and gain_average [], to be set in place by a feedback controller.

    Streams are [s, b, n*C]; coefficients are [s*b, n] and [s*b, n, n]. With `track` set, the token mean of H_res is gathered for
    diagnostics and feedback (`take_mean_h_res`). init, sublayer: where the maps start, and the number of the sub-layer (start.py).
    """

    def __init__(
        self,
        hidden_size: int,
        streams: int = 4,
        kind: str = "mhc",
        *,
        alpha: float = 0.01,
        iterations: int = 20,
        condition: float = 1e4,
        static: bool = False,
        fixed: Collection[str] = (),
        norm_eps: float = NORM_EPS,
        init: str = "even",
        sublayer: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
        for name, size in (("hidden_size", hidden_size), ("streams", streams)):
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}={size!r}: must be a whole number, at least 1")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise ValueError(f"alpha={alpha!r}: must be a finite number")
        check_fixed(fixed)
        family = KINDS[kind]
        if static and not family.static_form:
            known = ", ".join(name for name, other in KINDS.items() if other.static_form)
            raise ValueError(f"static=True with kind={kind!r}: only {known} has a static form")
        self.hidden_size, self.streams, self.kind, self.fixed = hidden_size, streams, kind, tuple(fixed)
        self.initial_alpha: float = alpha
        self._start = init, sublayer
        reads(init, sublayer, streams)  # a wrong name is told now
        self.track = False
        self._stand_ins: StandIns | None = None
        self._h_res_sums: list[Tensor] = []  # of a micro-batch each: adding them up here would be a launch more
        self._tokens = 0
        self.static = static
        # Both are checked whatever the kind: a wrong number is a mistake where it does not count, too.
        manifolds.Birkhoff(iterations, norm_eps=norm_eps), manifolds.Isometric(condition)
        self._settings_of_maps = manifolds.Settings(iterations, condition, static, norm_eps)
        if family.scalar_is == "learned":
            self.blend_logit = nn.Parameter(torch.empty(1))  # one dimension: Megatron's weight decay spares no other scalars
        if family.scalar_is == "controlled":
            self.register_buffer("s", torch.ones(()))
            self.register_buffer("gain_average", torch.zeros(()))  # 0: no gain was seen yet
        manifold = self.manifold
        # Static coefficients have no projection; empty parameters would only trouble optimizers and checkpoints.
        self.phi = None if static else nn.Parameter(torch.empty(manifold.phi_shape(streams, hidden_size)))
        self.alpha = None if static else nn.Parameter(torch.empty(3))
        self.bias = nn.Parameter(torch.empty(streams * streams + 2 * streams))
        self.reset_parameters()

    def defer(self, stand_ins: StandIns) -> None:
        """From now on graphs take these in the place of the parameters."""
        self._stand_ins = stand_ins

    @property
    def manifold(self) -> manifolds.Manifold:
        """The map from logits to H_res, with the present value of its scalar."""
        family, scalar = KINDS[self.kind], None
        if family.scalar_is == "learned":
            (logit,) = self._entering(self.blend_logit)
            scalar = torch.sigmoid(logit).squeeze()
        if family.scalar_is == "controlled":
            scalar = self.get_buffer("s")
        return family.of(self._settings_of_maps, scalar)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """phi normal(0, 0.02), alpha 0.01; with alpha = 0 the bias gives H_pre and H_post of `init`, and H_res (nearly) I."""
        if self.phi is not None and self.alpha is not None:
            self.phi.normal_(0.0, PHI_STD, generator=generator)
            self.alpha.fill_(self.initial_alpha)
        (init, sublayer), n = self._start, self.streams
        logits = read_logits(init, sublayer, n), write_logits(init, n, generator)
        self.bias.copy_(self.manifold.initial_bias(reads(init, sublayer, n), *logits))
        if KINDS[self.kind].scalar_is == "learned":
            self.blend_logit.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HyperConnection:
        """Moves with the model but stays fp32 when the model is cast to bf16 or fp16 (paper, eq. 10 to 13)."""

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if moved.dtype in (torch.bfloat16, torch.float16) else moved

        applied: HyperConnection = super()._apply(keep_dtype, recurse)
        return applied

    # -- operations on [s, b, n*C]

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """H_pre [s*b, n], H_post [s*b, n], H_res [s*b, n, n] of streams x [s, b, n*C]."""
        h_pre, h_post, h_res = kernels.coefficients(self._split(x), *self._parameters_of_maps(), **self._settings())
        self._record(h_res)
        return h_pre, h_post, h_res

    def pre(self, x: Tensor, h_pre: Tensor) -> Tensor:
        """Input of the sub-layer, [s, b, C]."""
        return kernels.pre(self._split(x), h_pre).view(*x.shape[:2], self.hidden_size)

    def coefficients_pre(self, x: Tensor, norm: Norm | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Input of the sub-layer [s, b, C], H_post and H_res, in one launch: the start of a stage.

        norm: of that input. An `RMSNorm` is part of the launch, others come after it.
        """
        y, h_post, h_res = kernels.coefficients_pre(self._split(x), *self._parameters_of_maps(), **self._settings(norm))
        self._record(h_res)
        return _after(norm, y.view(*x.shape[:2], self.hidden_size)), h_post, h_res

    def post_res(self, x: Tensor, f: Tensor, h_post: Tensor, h_res: Tensor, *, result: bool = True) -> Tensor:
        """Streams after the sub-layer, [s, b, n*C], from its output f [s, b, C]; see `kernels.post_res`."""
        return kernels.post_res(self._split(x), self._tokens_of(f), h_post, h_res, result=result).view(x.shape)

    def post_res_pre(
        self,
        x: Tensor,
        f: Tensor,
        h_post: Tensor,
        h_res: Tensor,
        following: HyperConnection,
        norm: Norm | None = None,
        on_gradient: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`post_res` of this sub-layer and `coefficients_pre` of the `following` one in one launch: x', y', H_post', H_res'.

        on_gradient: called in the backward with the whole gradient of x', [s*b, n, C].
        """
        before = self._split(x), self._tokens_of(f), h_post, h_res
        x_next, y, h_post_next, h_res_next = kernels.post_res_pre(
            *before, *following._parameters_of_maps(), **following._settings(norm), on_gradient=on_gradient
        )
        following._record(h_res_next)
        return x_next.view(x.shape), _after(norm, y.view(f.shape)), h_post_next, h_res_next

    def forward(
        self,
        x: Tensor,
        previous: tuple[HyperConnection, Tensor, Tensor, Tensor] | None = None,
        norm: Norm | None = None,
    ) -> tuple[Tensor, ...]:
        """`coefficients_pre` of x; or, with what the sub-layer before left (its connection, f, H_post, H_res), its `post_res_pre`.

        Called as a module, so that hooks on the parameters' owner run.
        """
        if previous is None:
            return self.coefficients_pre(x, norm)
        before, f, h_post, h_res = previous
        return before.post_res_pre(x, f, h_post, h_res, self, norm)

    # -- diagnostics

    @torch.no_grad()
    def h_pre(self, x: Tensor) -> Tensor:
        """H_pre [s*b, n] alone, which no operation on whole sub-layers returns."""
        h_pre: Tensor = kernels.coefficients(self._split(x), *self._parameters_of_maps(), **self._settings())[0]
        return h_pre

    def take_mean_h_res(self) -> Tensor | None:
        """Mean of the applied H_res over all tokens since the last call, [n, n] fp32; None if nothing ran with `track` set."""
        if not self._h_res_sums:
            return None
        mean = torch.stack(self._h_res_sums).sum(0) / self._tokens
        self._h_res_sums, self._tokens = [], 0
        return mean

    def _record(self, h_res: Tensor) -> None:
        if self.track and h_res.shape[0]:
            self._h_res_sums.append(h_res.detach().sum(0))
            self._tokens += h_res.shape[0]

    # -- layout

    def _parameters_of_maps(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.phi is None or self.alpha is None:
            (bias,) = self._entering(self.bias)
            return self.bias.new_empty(0), self.bias.new_empty(0), bias
        phi, alpha, bias = self._entering(self.phi, self.alpha, self.bias)
        return phi, alpha, bias

    def _entering(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Parameters on their way into a graph."""
        return parameters if self._stand_ins is None else tuple(map(self._stand_ins, parameters))

    def _settings(self, norm: Norm | None = None) -> dict[str, Any]:
        settings: dict[str, Any] = {"manifold": self.manifold, "fixed": self.fixed}
        return settings | {"norm": norm.weight(), "eps": norm.eps} if isinstance(norm, RMSNorm) else settings

    def _split(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[2] != self.streams * self.hidden_size:
            raise ValueError(f"streams have shape {list(x.shape)}: must be [s, b, {self.streams}*{self.hidden_size}]")
        return x.reshape(-1, self.streams, self.hidden_size)

    def _tokens_of(self, f: Tensor) -> Tensor:
        return f.reshape(-1, self.hidden_size)


def _after(norm: Norm | None, y: Tensor) -> Tensor:
    """y, normed unless the kernels have done it."""
    return y if norm is None or isinstance(norm, RMSNorm) else norm(y)


def expand(x: Tensor, streams: int) -> Tensor:
    """Entry: the embedding [s, b, C] copied to n streams, [s, b, n*C]."""
    return x.repeat(1, 1, streams)


def contract(x: Tensor, streams: int, how: Literal["mean", "sum"] = "mean") -> Tensor:
    """Exit: streams [s, b, n*C] reduced to [s, b, C] before the final norm, summed in fp32 (fp64 stays)."""
    if how not in ("mean", "sum"):
        raise ValueError(f"how={how!r}: must be 'mean' or 'sum'")
    if x.dim() != 3 or x.shape[2] % streams:
        raise ValueError(f"streams have shape {list(x.shape)}: must be [s, b, {streams}*C]")
    split = x.unflatten(-1, (streams, -1))
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = split.sum(-2, dtype=dtype)
    return (total / streams if how == "mean" else total).to(x.dtype)


def composite(h_res: Iterable[Tensor], streams: int) -> Tensor:
    """Product H_L ... H_2 H_1 of applied maps [n, n] in order of depth, in fp64. The product of stages is the product of theirs."""
    product = torch.eye(streams, dtype=torch.float64)
    for h in h_res:
        product = h.to(dtype=torch.float64, device="cpu") @ product
    return product


def composite_gain(product: Tensor) -> float:
    """Amax gain of a product [n, n]: the larger of the largest absolute row sum (forward) and column sum (backward)."""
    magnitude = product.abs()
    return float(torch.maximum(magnitude.sum(-1).max(), magnitude.sum(-2).max()))
