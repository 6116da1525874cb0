"""What the operations settle with autograd: products that autocast leaves alone, and one derivative from a kernel, never a wrong
second one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, of two matrices or two equal batches of them, in their own dtype under autocast too, and so are its gradients, whether
    the backward runs under autocast or not. Differentiable any number of times."""
    result: Tensor = _Matmul.apply(a, b)
    return result


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with _without_autocast(a.device.type):
            return a @ b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        return matmul(grad, b.mT) if need_a else None, matmul(a.mT, grad) if need_b else None


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else contextlib.nullcontext()


def once[**P, R](backward: Callable[P, R]) -> Callable[P, R]:
    """Decorator of the backward of a kernel: RuntimeError where its result is to be differentiated again.

    torch's `once_differentiable` sees that only where an incoming gradient asks for a derivative. The result depends on saved
    tensors as well, whose part of a second derivative would silently be missing.
    """

    @wraps(backward)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "backward with create_graph=True: the Triton kernels of pipehc can be differentiated once only; "
                "PIPEHC_KERNELS=reference runs the same in PyTorch, which can differentiate again"
            )
        return backward(*args, **kwargs)

    return checked


def watch_gradient(x: Tensor, on_gradient: Callable[[Tensor], None] | None) -> None:
    """Has `on_gradient` called in the backward with the whole gradient of x, if x has one."""
    if on_gradient is not None and x.requires_grad:
        x.register_hook(on_gradient)
