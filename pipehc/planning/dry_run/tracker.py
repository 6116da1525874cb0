"""Watches every operation on one device: which memory is alive, made by what, and which operations each piece of work launches."""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

from pipehc.planning.dry_run.operations import Operation, is_view, kernel, operation

aten = torch.ops.aten


class Where(NamedTuple):
    """A piece of work. kind: F, B (the gradient of the input), R or W; or a phase: setup, step (what is outside of actions),
    optimizer. node: BLOCK.KIND, empty outside of nodes. queue: of the node."""

    kind: str
    stage: int = -1
    microbatch: int = -1
    node: str = ""
    queue: str = "compute"


class Block:
    """A storage: when and where it came and went. Times count comings and goings."""

    __slots__ = ("born", "category", "died", "died_in", "name", "nbytes", "where")

    def __init__(self, nbytes: int, born: int, where: Where, name: str) -> None:
        self.nbytes, self.born, self.where, self.name = nbytes, born, where, name
        self.category: str | None = None
        self.died: int | None = None
        self.died_in: Where | None = None


class Moment(NamedTuple):
    """Live bytes at a time."""

    live: int
    clock: int


class Tracker(TorchDispatchMode):
    """A context. `entered` says where the work belongs that runs in it.

    device: meta, whose tensors have no data; or cpu, for the same program on real ones. What the host reads from the device is 1,
    or 0 or false, so that both take the same way. host: whether tensors of the host count, too, as they must where the device is
    cpu. Storages that only a reference cycle holds count as alive.
    """

    def __init__(self, device: torch.device, host: bool = False) -> None:
        super().__init__()
        self.device = device
        self._counted = {device.type, "cpu"} if host else {device.type}
        self.history: list[Block] = []
        self.launches: dict[Where, Counter[Operation]] = defaultdict(Counter)
        self.peak = Moment(0, 0)
        self._where = [Where("setup")]
        self._clock, self._live = 0, 0
        self._blocks: dict[int, Block] = {}  # those alive, by their storage
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._known: dict[Any, _Known] = {}
        self.groups: set[str] = set()  # of processes that communicated
        self.tensor_parallel: str | None = None  # the group of the ranks that share layers, to be told apart
        self._meta = device.type == "meta"

    @contextmanager
    def entered(self, where: Where) -> Iterator[None]:
        self.enter(where)
        try:
            yield
        finally:
            self.leave()

    def enter(self, where: Where) -> None:
        self._where.append(where)

    def leave(self) -> None:
        self._where.pop()

    def turn(self, where: Where) -> Moment:
        """What is not inside of anything belongs to `where` from now on. Returns the peak since the last turn; it starts anew."""
        peak, self.peak = self.peak, Moment(self._live, self._clock)
        self._where[0] = where
        return peak

    def mark(self, tensors: Any, category: str) -> None:
        """Gives storages a category, whatever they were before."""
        for tensor in tree_iter(tensors):
            if isinstance(tensor, torch.Tensor) and tensor.device.type in self._counted:
                self._see(tensor, category)
                self._blocks[tensor.untyped_storage()._cdata].category = category

    def mark_rest(self, category: str) -> None:
        """Gives a category to what is alive and has none."""
        for block in self._blocks.values():
            block.category = block.category or category

    def off(self) -> AbstractContextManager[object]:
        """Inside, nothing is counted."""
        return _disable_current_modes()

    def note_kernel(self, name: str, args: Mapping[str, Any]) -> AbstractContextManager[object]:
        """For `pipehc.kernels.language.noting`: a kernel that runs on real tensors is one launch, whatever it does inside."""
        self.launches[self._where[-1]][kernel(name, args)] += 1
        return self.off()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._read(func, args[0])
        if is_view(func):
            out = func(*args, **kwargs)
            if func is aten.lift_fresh.default:  # what `torch.tensor` made
                self._see(out, "tensor")
            return out
        if func is aten.scalar_tensor.default:  # a number that CUDA makes on the host, for an assignment to elements
            return func(*args, **kwargs)
        if self._meta and func is aten._to_copy.default and args[0].is_meta and _leaves_meta(kwargs):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        key = _signature(func, args, kwargs)
        known = self._known.get(key)
        if known is None:
            out = func(*args, **kwargs)
            known = self._known[key] = self._learn(func, args, kwargs, out)
        elif not self._meta or known.results is None:
            out = func(*args, **kwargs)
        else:
            out = known.make(args)
        if known.here:
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self._see(tensor, known.name)
            if known.operation is not None:
                self.launches[self._where[-1]][known.operation] += 1
        return out

    def _read(self, func: Any, tensor: torch.Tensor) -> Any:
        if self._meta and not tensor.is_meta:
            return func(tensor)
        if tensor.is_floating_point():
            return 1.0
        if self._meta:
            return False if tensor.dtype == torch.bool else 0
        return func(tensor)

    def _communicate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        found = operation(func, args, kwargs, out)
        assert found is not None
        tensors = [t for t in tree_iter(args) if isinstance(t, torch.Tensor)]
        if not any(t.device.type in self._counted for t in tensors):
            return out
        groups = [dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a)]
        if self.tensor_parallel is not None:  # then not all that share a stage hold the same of it
            (group,) = groups
            found = found._replace(processes=group.size())
            found = found._replace(sort="tensor parallel") if group.group_name == self.tensor_parallel else found
        self.launches[self._where[-1]][found] += 1
        self.groups |= {group.group_name for group in groups}
        if func._overloadpacket.__name__ in ("send", "recv_"):
            self.mark(tensors, "messages")
        return out

    def _learn(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> _Known:
        tensors = [t for t in tree_iter(out) if isinstance(t, torch.Tensor)]
        here = any(t.device.type in self._counted for t in tensors) or not tensors
        results: Any = None
        inputs = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        if self._meta and tensors and all(t.is_meta for t in tensors) and isinstance(out, torch.Tensor | tuple):
            if args and out is args[0]:
                results = "self"
            elif len(tensors) == (1 if isinstance(out, torch.Tensor) else len(out)) and all(
                t.untyped_storage()._cdata not in inputs and t.untyped_storage().nbytes() == _extent(t) for t in tensors
            ):
                results = tuple((t.shape, t.stride(), t.dtype) for t in tensors)
        return _Known(str(func._overloadpacket), here, operation(func, args, kwargs, out), results, isinstance(out, tuple))

    def _see(self, tensor: torch.Tensor, name: str) -> None:
        if tensor.device.type not in self._counted:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks:
            return
        self._clock += 1
        nbytes = storage.nbytes()
        block = Block(nbytes, self._clock, self._where[-1], name)
        self._blocks[key] = block
        self.history.append(block)
        self._live += nbytes
        if self._live > self.peak.live:
            self.peak = Moment(self._live, self._clock)
        self._references[key] = weakref.ref(storage, lambda _: self._gone(key))

    def _gone(self, key: int) -> None:
        block = self._blocks.pop(key)
        del self._references[key]
        self._clock += 1
        block.died, block.died_in = self._clock, self._where[-1]
        self._live -= block.nbytes


class _Known:
    """What was learned of an operation on tensors of given shapes.

    here: whether it concerns the device. results: how to make its results on meta, much quicker than by asking torch each time:
    shapes, strides and dtypes of fresh tensors; 'self' where it returns its first argument; None: ask.
    """

    __slots__ = ("here", "name", "operation", "results", "several")

    def __init__(self, name: str, here: bool, operation: Operation | None, results: Any, several: bool) -> None:
        self.name, self.here, self.operation, self.results, self.several = name, here, operation, results, several

    def make(self, args: tuple[Any, ...]) -> Any:
        if self.results == "self":
            return args[0]
        made = [torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in self.results]
        return tuple(made) if self.several else made[0]


def _signature(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the results and costs of an operation depend on."""
    parts: list[Any] = [func]
    for value in args:
        parts += _described(value)
    for name, value in kwargs.items():
        parts.append(name)
        parts += _described(value)
    return tuple(parts)


def _described(value: Any) -> tuple[Any, ...]:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.stride(), value.is_meta
    if isinstance(value, list | tuple):
        return tuple(_described(item) for item in value)
    return type(value), value


def _is_group(argument: torch.ScriptObject) -> bool:
    return str(argument._type()).endswith("ProcessGroup")


def _leaves_meta(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "cpu"


def _extent(tensor: torch.Tensor) -> int:
    """Bytes that a tensor of its own with these strides takes."""
    if not tensor.numel():
        return 0
    return tensor.element_size() * (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride())))
