"""RMSNorm in one launch, and its backward in two; and the module that holds its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pipehc.kernels.rms_norm import gradients, normalised
from pipehc.megatron.fused import fused


class TorchRMSNorm:
    """Makes torch's norm, as Megatron's WrappedTorchNorm does, which refuses sequence parallelism: the trainer's optimizer sums the
    gradients of norms over the ranks that see parts of the tokens."""

    def __new__(cls, config: Any, hidden_size: int, eps: float, **_: Any) -> nn.RMSNorm:  # type: ignore[misc]
        return nn.RMSNorm(hidden_size, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`pipehc.kernels.rms_norm.rms_norm`, differentiable once."""
    result: Tensor = _RMSNorm.apply(x, weight, eps)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        given = dy, *ctx.saved_tensors
        return rms_norm_input_gradient(*given), rms_norm_weight_gradient(*given), None


@fused()
def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return normalised(x, weight, eps)


# Two, as one sums over channels and the other over tokens.


@fused()
def rms_norm_input_gradient(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return gradients(dy, x, weight, scale)[0]


@fused()
def rms_norm_weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return gradients(dy, x, weight, scale)[1]
