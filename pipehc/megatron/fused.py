"""Functions of tensors that are one kernel on a GPU, for the forwards and backwards of autograd functions of our own.

    @fused()
    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        return (silu(gate.float()) * up.float()).to(gate.dtype)

Each is an operation of torch, `torch.ops.pipehc.swiglu`: who watches operations sees one, whatever it is made of. So a dry run
counts one launch that reads its inputs and writes its results, on tensors without data as on real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, cast

import torch
from torch import Tensor

_library = torch.library.Library("pipehc", "FRAGMENT")


def fused[**P, R](
    mutates: Sequence[str] = (), dynamic: bool = False, cuda: Callable[..., Any] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a function of single elements, or with sums over the last dimension, so that torch makes one kernel of it.

    It is compiled on a GPU when it is first called there, and runs as it stands on a CPU and on meta. Its parameters and results
    have the types that operations of torch have: Tensor, int, float, bool, and tuples of Tensor as result. It makes new tensors,
    never views of what it is given.

    Args:
        mutates: names of parameters that it changes in place; it then returns nothing.
        dynamic: whether the sizes of its tensors change from call to call: it is compiled once for all of them but 0 and 1.
        cuda: a library's kernel for a GPU, with the same arguments; returns NotImplemented for those that it has not been made for.

    Raises (when called):
        RuntimeError: if autograd should record it: it has no derivative. Call it with gradients off, as the forward of a
            torch.autograd.Function is, and the backward under `once_differentiable`.
    """

    def decorate(plain: Callable[P, R]) -> Callable[P, R]:
        name = plain.__name__
        _library.define(name + torch.library.infer_schema(plain, mutates_args=mutates))
        for key in ("CPU", "Meta"):
            _library.impl(name, plain, key)

        @cache  # compilers are imported where they are needed
        def compiled() -> Callable[..., R]:
            # Without measurements that choose how to sum: the same numbers in every process.
            return torch.compile(plain, fullgraph=True, dynamic=dynamic, options={"deterministic": True})

        def on_gpu(*args: Any) -> Any:
            result = NotImplemented if cuda is None else cuda(*args)
            return compiled()(*args) if result is NotImplemented else result

        _library.impl(name, on_gpu, "CUDA")
        operation = getattr(torch.ops.pipehc, name).default
        positions = {argument.name: i for i, argument in enumerate(operation._schema.arguments) if argument.name in mutates}

        @wraps(plain)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (*args, *kwargs.values())):
                raise RuntimeError(f"{name} has no derivative: call it inside of a torch.autograd.Function")
            result: R = operation(*args, **kwargs)
            for changed, i in positions.items():
                torch.autograd.graph.increment_version(cast(Tensor, kwargs[changed] if changed in kwargs else args[i]))
            return result

        return call

    return decorate
