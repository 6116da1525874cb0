"""What joins the sub-layers of a Megatron layer to its residual: a hyper-connection, or the plain sum."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pipehc.kernels.differentiation import watch_gradient
from pipehc.megatron.norm import rms_norm
from pipehc.model.hyper_connection import HyperConnection
from pipehc.model.norm import Norm, RMSNorm
from pipehc.model.sublayers import Coefficients, Connection


class PlainConnection(nn.Module):
    """The baseline: one stream, x + F(x). fused: an RMSNorm before F is one launch, as a hyper-connection's is none."""

    track = False

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self._fused = fused

    def forward(self, x: torch.Tensor, previous: Any = None, norm: Norm | None = None) -> tuple[Any, ...]:
        """As HyperConnection's."""
        if previous is None:
            return self.coefficients_pre(x, norm)
        before, f, h_post, h_res = previous
        return before.post_res_pre(x, f, h_post, h_res, self, norm)

    def coefficients_pre(self, x: torch.Tensor, norm: Norm | None = None) -> tuple[torch.Tensor, None, None]:
        if self._fused and isinstance(norm, RMSNorm):
            return rms_norm(x, norm.weight(), norm.eps), None, None
        return (x if norm is None else norm(x)), None, None

    def post_res(
        self, x: torch.Tensor, f: torch.Tensor, h_post: Coefficients, h_res: Coefficients, *, result: bool = True
    ) -> torch.Tensor:
        return x + f

    def post_res_pre(
        self,
        x: torch.Tensor,
        f: torch.Tensor,
        h_post: Coefficients,
        h_res: Coefficients,
        following: Any,
        norm: Norm | None = None,
        on_gradient: Callable[[torch.Tensor], None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, Coefficients, Coefficients]:
        x = self.post_res(x, f, h_post, h_res)
        watch_gradient(x, on_gradient)
        return x, *following.coefficients_pre(x, norm)


def build_connection(hidden_size: int, residual: Any, sublayer: int, fused: bool) -> Connection:
    """The connection that the section `residual` of the configuration asks for. sublayer: its number in the whole model. fused: see
    PlainConnection."""
    if residual.kind == "none":
        return PlainConnection(fused)
    return HyperConnection(
        hidden_size,
        residual.streams,
        residual.kind,
        alpha=residual.alpha,
        iterations=residual.sinkhorn_iterations,
        condition=residual.condition,
        static=residual.static,
        fixed=residual.fixed,
        norm_eps=residual.norm_eps,
        init=residual.init,
        sublayer=sublayer,
    )
