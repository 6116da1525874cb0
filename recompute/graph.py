"""The autograd graph of one piece: apart from those of all others, and without what can be rebuilt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks


class Graph(NamedTuple):
    """What a piece needs for its backward. Edges and not tensors: the graph may outlive the data of its results."""

    edges: tuple[GradientEdge | None, ...]  # of the outputs
    gradients: list[torch.Tensor | None]  # of the inputs, while the backward runs; None where not differentiable
    constants: tuple[Any, ...] = ()  # of an Exchange: the inputs that are not tensors

    def backward(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The gradients of the inputs, once. gradients: of the outputs."""
        pairs = [(edge, g) for edge, g in zip(self.edges, gradients) if edge is not None and g is not None]
        if pairs:
            edges, seeds = zip(*pairs)
            run_backward(edges, seeds)
        found = self.gradients.copy()
        self.gradients.clear()  # a layer whose W waits may hold the graph until then (TransformerEngine's do)
        return found


def run_backward(results: Any, gradients: Any = None) -> None:
    """`torch.autograd.backward` on the calling thread.

    Else a thread of autograd's launches the kernels of a device: ranges that profilers see here would not hold them, and the two
    threads would hand over to each other at the start and the end of every piece.
    """
    with torch.autograd.set_multithreading_enabled(False):
        torch.autograd.backward(results, gradients)


def record(
    run: Callable[..., tuple[Any, ...]], inputs: list[Any], saving: AbstractContextManager[Any], scope: AbstractContextManager[Any]
) -> tuple[tuple[Any, ...], Graph]:
    """Runs a piece with autograd, inside of both contexts; returns its outputs and its graph."""
    entered, gradients = _enter(inputs)
    with torch.enable_grad(), saving, scope:
        outputs = run(*entered)
    edges = (get_gradient_edge(v) if isinstance(v, torch.Tensor) and v.requires_grad else None for v in outputs)
    return outputs, Graph(tuple(edges), gradients)


class _Dropped(NamedTuple):
    """In the place of a saved tensor: which value it was a view of, and which view."""

    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def without(
    dropped: Mapping[int, str], find: Callable[[str], torch.Tensor], count: Callable[[torch.Tensor], None] | None
) -> AbstractContextManager[Any]:
    """Inside, autograd saves a note in the place of a dropped value, which is looked up when the backward asks for it.

    dropped: storages, and the names of their values. Storages and not addresses of data: in a dry run there is none, at address 0.
    find: a value by name. count: told about what is saved.
    """
    if not dropped and count is None:
        return nullcontext()

    def pack(tensor: torch.Tensor) -> torch.Tensor | _Dropped:
        name = dropped.get(tensor.untyped_storage()._cdata)
        if name is not None:
            return _Dropped(name, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        if count is not None:
            count(tensor)
        return tensor.detach()  # without its history: a result that saves itself would never be freed

    def unpack(saved: torch.Tensor | _Dropped) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        return find(saved.name).as_strided(saved.size, saved.stride, saved.offset)

    return saved_tensors_hooks(pack, unpack)


class _Enter(torch.autograd.Function):
    """The way into a graph that keeps no data: a leaf would hold its storage for as long as the graph lives."""

    @staticmethod
    def forward(ctx: Any, root: torch.Tensor, positions: list[int], gradients: list, *tensors: torch.Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.positions, ctx.gradients = positions, gradients
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[None, ...]:
        for position, grad in zip(ctx.positions, grads):
            ctx.gradients[position] = grad
        return (None,) * (3 + len(grads))


def _enter(inputs: list[Any]) -> tuple[list[Any], list[torch.Tensor | None]]:
    """The inputs as the start of a graph, and a list that will hold their gradients after its backward."""
    gradients: list[torch.Tensor | None] = [None] * len(inputs)
    positions = [i for i, value in enumerate(inputs) if isinstance(value, torch.Tensor) and value.is_floating_point()]
    if not positions:
        return inputs, gradients
    root = torch.empty(0, requires_grad=True)
    entered = list(inputs)
    for i, tensor in zip(positions, _Enter.apply(root, positions, gradients, *(inputs[i] for i in positions))):
        entered[i] = tensor
    return entered, gradients
