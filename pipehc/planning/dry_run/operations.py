"""What one operation costs, from the shapes of its tensors: FLOPs, and the bytes that it must read and write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, register_flop_formula

from pipehc.planning.dry_run.kernels import FLOPS_PER_CHANNEL, NORM_FLOPS_PER_CHANNEL, SUMS

aten = torch.ops.aten

Class = Literal["matmul", "attention", "other", "communication", "tensor parallel"]


class Operation(NamedTuple):
    """One launch. sort: what its speed depends on; 'tensor parallel': a communication of the ranks that share layers. half: whether
    it computes in 16 bits. bytes: read and written, every tensor once; of a communication, what this rank gives to it; of a gather
    what it gets. processes: that communicate, where it matters; 0: all that share a stage."""

    name: str
    sort: Class
    half: bool
    flops: float
    bytes: int
    processes: int = 0


# They launch nothing, though their schemas do not say that they only make a view, or memory without contents.
_FREE = {
    aten._unsafe_view.default,
    aten.lift_fresh.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.new_empty_strided.default,
    aten._reshape_alias.default,
    aten.promote_types.default,
}
# They read the rows that they are asked for, not all.
_GATHERS = {aten.index_select.default, aten.gather.default, aten.embedding.default, aten.index.Tensor}
# They write the rows that they are given, and read them before where they add.
_SCATTERS = {aten.index_put_.default, aten._index_put_impl_.default}

def _grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """Of a product of rows `a`, each with one of the matrices `b`."""
    return 2 * int(a[0]) * int(b[-2]) * int(b[-1])


if (grouped := getattr(aten, "_grouped_mm", None)) is not None and grouped not in flop_registry:
    register_flop_formula(grouped)(_grouped)


_views: dict[Any, bool] = {}


def is_view(func: Any) -> bool:
    """Whether an operation returns a view of an argument that it does not write."""
    if func not in _views:
        _views[func] = any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments)
    return _views[func]


def operation(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Operation | None:
    """The cost of an operation that returned `out`; None if it launches nothing."""
    if func in _FREE or is_view(func):
        return None
    if func.namespace == "c10d":
        return Operation(str(func._overloadpacket), "communication", False, 0.0, _moved(func, args))
    name = func._schema.name
    inputs = [t for t in tree_iter((args, {k: v for k, v in kwargs.items() if k != "out"})) if isinstance(t, torch.Tensor)]
    written = sum(size(t) for t in tree_iter(out if out is not None else _changed(func, args)) if isinstance(t, torch.Tensor))
    if func in _GATHERS:
        read = written + sum(size(t) for t in inputs[1:])
    elif func in _SCATTERS:
        written = sum(size(t) for t in inputs[1:])
        read = written
    elif func is aten.copy_.default:
        read = size(args[1])
    elif name.startswith(("aten::zero", "aten::fill")):
        read = 0
    else:
        read = sum(size(t) for t in inputs)
    flops, sort = 0.0, "other"
    if (count := flop_registry.get(func._overloadpacket)) is not None:
        flops, sort = float(count(*args, **kwargs, out_val=out)), "matmul"
        if "scaled_dot_product" in name:
            flops, sort = flops / 2, "attention"  # the count is of the whole square; kernels skip what causality masks
    half = any(t.element_size() == 2 for t in inputs)
    return Operation(str(func._overloadpacket), sort, half, flops, read + written)  # type: ignore[arg-type]


def _changed(func: Any, args: tuple[Any, ...]) -> list[Any]:
    """What an operation works on in place, which may return nothing."""
    return [a for a, s in zip(args, func._schema.arguments) if s.alias_info is not None and s.alias_info.is_write]


def _moved(func: Any, args: tuple[Any, ...]) -> int:
    """What a rank gives to a collective, of a gather what it gets; that is their first argument, or what they work on in place."""
    input_second = {"alltoall_base_", "_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor_coalesced_"}
    moved = args[1] if func._overloadpacket.__name__ in input_second else args[0]
    return sum(size(t) for t in tree_iter(moved) if isinstance(t, torch.Tensor))


def kernel(name: str, args: Mapping[str, Any]) -> Operation:
    """The cost of one of our Triton kernels: every tensor once, which is what they are written for."""
    x = next(iter(args.values()))
    nbytes = sum(t.numel() * t.element_size() for t in args.values() if isinstance(t, torch.Tensor))
    if name in SUMS:
        return Operation(f"pipehc.{name}", "other", False, float(x.numel()), nbytes)
    n = x.shape[1]
    flops = FLOPS_PER_CHANNEL[name](n)
    if args.get("norm_weight") is not None:
        flops += NORM_FLOPS_PER_CHANNEL[name](n)
    return Operation(f"pipehc.{name}", "other", False, float(x.numel() // n * flops), nbytes)


def size(tensor: torch.Tensor) -> int:
    """Bytes of memory behind a tensor: expanded ones have less than numbers."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
