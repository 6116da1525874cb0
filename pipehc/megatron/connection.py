"""What joins the sub-layers of a Megatron layer to its residual: a hyper-connection, or the plain sum."""

from typing import Any

import torch
from torch import nn

from pipehc.model.hyper_connection import HyperConnection
from pipehc.model.sublayers import Coefficients, Connection


class PlainConnection(nn.Module):
    """The baseline: one stream, x + F(x)."""

    track = False

    def forward(self, x: torch.Tensor, previous: Any = None) -> tuple[Any, ...]:
        """As HyperConnection's."""
        if previous is None:
            return self.coefficients_pre(x)
        before, f, h_post, h_res = previous
        return before.post_res_pre(x, f, h_post, h_res, self)

    def coefficients_pre(self, x: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return x, None, None

    def post_res(self, x: torch.Tensor, f: torch.Tensor, h_post: Coefficients, h_res: Coefficients) -> torch.Tensor:
        return x + f

    def post_res_pre(
        self, x: torch.Tensor, f: torch.Tensor, h_post: Coefficients, h_res: Coefficients, following: Any
    ) -> tuple[torch.Tensor, torch.Tensor, Coefficients, Coefficients]:
        x = self.post_res(x, f, h_post, h_res)
        return x, *following.coefficients_pre(x)


def build_connection(hidden_size: int, residual: Any) -> Connection:
    """The connection that the section `residual` of the configuration asks for."""
    if residual.kind == "none":
        return PlainConnection()
    return HyperConnection(
        hidden_size,
        residual.streams,
        residual.kind,
        alpha=residual.alpha,
        iterations=residual.sinkhorn_iterations,
        condition=residual.condition,
        static=residual.static,
        fixed=residual.fixed,
    )
