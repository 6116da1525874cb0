"""Deferred weight gradients (pipehc.wgrad) for Megatron's local linear layers, which have none of their own."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn

from pipehc import wgrad


def install_deferral(model: nn.Module) -> int:
    """Route the weight gradients of every column- and row-parallel linear of `model` through `pipehc.wgrad`.

    That is all projections of attention, dense FFN, routed and shared experts, and the output layer. Embedding, norms, router and
    hyper-connections keep autograd's own. Without a store the gradients come at once, by the same arithmetic.

    Args:
        model: a stage, or Megatron's DDP around one: then gradients go into `main_grad` through DDP's own hook, which also starts
            the overlapped reduction of a bucket whose gradients are complete.

    Returns:
        How many layers were changed.

    Raises:
        ValueError: if a layer is split over several tensor-parallel ranks, which is not supported yet.
    """
    layers = [m for m in model.modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)]
    for layer in layers:
        if layer.tp_group.size() != 1:
            raise ValueError(f"parallel.tp: {layer.tp_group.size()} is not supported yet; allowed: 1")
        layer._forward_impl = _forward_impl(layer, _accumulator(model, layer.weight))
    return len(layers)


def _forward_impl(layer: nn.Module, accumulate: Callable[[torch.Tensor], None]) -> Callable[..., torch.Tensor]:
    upstream = type(layer)._forward_impl  # type: ignore[attr-defined]

    def forward(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        # Without an input that requires grad no backward of ours would run: a frozen layer, or no backward at all.
        if not (torch.is_grad_enabled() and input.requires_grad and weight.requires_grad):
            return upstream(layer, input=input, weight=weight, bias=bias, **kwargs)
        y = wgrad.linear(input, weight, accumulate)
        return y if bias is None else y + bias

    return forward


def _accumulator(model: nn.Module, parameter: nn.Parameter) -> Callable[[torch.Tensor], None]:
    """What autograd would do with the gradient of `parameter`: add it to `.grad`, then run DDP's hook if there is one."""
    hook = model._make_backward_post_hook(parameter) if isinstance(model, DistributedDataParallel) else None

    def accumulate(gradient: torch.Tensor) -> None:
        with torch.no_grad():
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
            if hook is not None:
                hook()

    return accumulate
