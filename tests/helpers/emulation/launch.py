"""Operations as launches: torch dispatches one, the host gets its result without contents, the current stream fills it later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from emulation.device import Device, Event, Stream
from emulation.memory import Memory

aten = torch.ops.aten


def tree_flatten(given: Any) -> tuple[list[Any], Any]:
    """As pytree's, which is slow for what nearly every operation has: arguments without lists."""
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], dict) and isinstance(given[0], tuple):
        args, kwargs = given
        if not any(isinstance(x, (list, tuple, dict)) for x in args):
            return [*args, *kwargs.values()], (len(args), tuple(kwargs))
    if isinstance(given, torch.Tensor):
        return [given], None
    return pytree.tree_flatten(given)


def tree_unflatten(leaves: list[Any], tree: Any) -> Any:
    if tree is None:
        return leaves[0]
    if isinstance(tree, tuple):
        count, names = tree
        return tuple(leaves[:count]), dict(zip(names, leaves[count:]))
    return pytree.tree_unflatten(leaves, tree)


_NO_CONTENTS = {aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
                aten.new_empty_strided.default}  # fmt: skip
_AT_ONCE = ("aten::set_", "aten::resize_", "aten::lift_fresh")
_ACCUMULATE = "torch::autograd::AccumulateGrad"


class Launches(TorchDispatchMode):
    """Entered, torch's operations run on `device`. What is made outside is there from the start, and stays."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device, self.memory = device, Memory(device)
        self._shapes: dict[Any, Any] = {}
        # Autograd runs a node on the stream of its forward, and adds to a leaf's gradient on the stream that first used the leaf.
        self._streams: dict[int, Stream] = {}  # by sequence number
        self._leaves: dict[int, Stream] = {}  # by address, parameters aside: DDP uses them when it is made
        self._seen = torch.autograd._get_sequence_nr()
        self._backward: _Backward | None = None
        self._written: set[int] = set()  # addresses of memory made outside

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Inside, the device is in use; it is idle at the end."""
        device = self.device
        with self, _patched(self):
            device.active = True
            try:
                yield
                device.idle("the end")
                if device.faults:
                    raise RuntimeError(device.faults[0])
            finally:
                device.active = False

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        self._number()
        with self.device.on(stream):
            yield
            self._number()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._number()
        kind = _kinds.get(func) or _kind(func)
        if kind.reads and _is_read(func, args, kwargs):
            self.read([t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)], func.__name__)
            return func(*args, **kwargs)
        if kind.at_once:
            return func(*args, **kwargs)
        stream = self.device.current
        if (backward := self._backward) is not None:
            stream = backward.stream(self._streams, self._leaves)
            if stream is not self.device.current:
                with self.device.on(stream):
                    return self._launch(func, args, kwargs, stream)
        return self._launch(func, args, kwargs, stream)

    def read(self, tensors: list[torch.Tensor], what: str) -> None:
        """The host wants to know what is in them: it waits for the current stream, unless no operation ever wrote to them."""
        if self.device.active and any(self.memory.block(t) is not None or _address(t) in self._written for t in tensors):
            event = self.device.current.event()
            if not event.done:
                self.device.until(lambda: event.done, f"{what} on {self.device.current.name}")

    def _launch(self, func: Any, args: Any, kwargs: Any, stream: Stream) -> Any:
        memory, leaves, tree = self.memory, *tree_flatten((args, kwargs))
        shapes, shape_tree, returned = self._shape(func, args, kwargs, leaves, tree)
        outputs = [given if given is not None or shape is None else memory.empty(*shape) for shape, given in zip(shapes, returned)]
        if func in _NO_CONTENTS:
            return tree_unflatten(outputs, shape_tree)
        tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
        if self._backward is None and torch.is_grad_enabled():
            for tensor in tensors:
                if tensor.requires_grad and tensor.is_leaf and not isinstance(tensor, torch.nn.Parameter):
                    self._leaves.setdefault(tensor.data_ptr(), stream)
        if self._backward is not None:
            self._backward.order(self.device, memory, stream, tensors)
        later = tree_unflatten([memory.alias(t) if isinstance(t, torch.Tensor) else t for t in leaves], tree)
        fresh = [given is None and isinstance(t, torch.Tensor) for t, given in zip(outputs, returned)]
        results = [memory.alias(t) if new else None for t, new in zip(outputs, fresh)]

        def work() -> bool:
            try:
                found = tree_flatten(func(*later[0], **later[1]))[0]
            except (RuntimeError, IndexError) as error:  # of what it read; the device goes on, as others wait for it
                self.device.faults.append(f"{func.__name__}: {error}")
                return True
            for target, value in zip(results, found):
                if target is not None:
                    target.copy_(value)
            return True

        self.device.issue(stream, func.__name__, work)
        # What an operation without results wrote to is among its arguments.
        written = tensors if shapes == [None] else [t for t in returned if isinstance(t, torch.Tensor)]
        self._written.update(_address(t) for t in written if memory.block(t) is None)
        if self._backward is not None:
            self._backward.made(memory, stream, [*outputs, *tensors] if _kinds[func].writes else outputs)
        return tree_unflatten(outputs, shape_tree)

    def kernel(self, execute: Callable[..., Any], executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A kernel of Triton's, which its interpreter executes; its arguments are tensors and numbers."""
        backward, stream = self._backward, self.device.current
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        if backward is not None:
            stream = backward.stream(self._streams, self._leaves)
            backward.order(self.device, self.memory, stream, tensors)
        alias = partial(pytree.tree_map_only, torch.Tensor, self.memory.alias)
        later, named = alias(args), alias(kwargs)

        def work() -> bool:
            execute(executor, *later, **named)
            return True

        self.device.issue(stream, executor.fn.__name__, work)
        if backward is not None:
            backward.made(self.memory, stream, tensors)

    def _shape(self, func: Any, args: Any, kwargs: Any, leaves: list[Any], tree: Any) -> Any:
        """(size, stride, dtype) of every output, their tree, and those that are arguments written in place (else None)."""
        key = (func, tree, tuple((x.size(), x.stride(), x.dtype) if isinstance(x, torch.Tensor) else _hashable(x) for x in leaves))
        if key not in self._shapes:
            metas = {}

            def meta(x: Any) -> Any:
                if isinstance(x, torch.Tensor):
                    metas[id(x)] = made = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
                    return made
                return torch.device("meta") if isinstance(x, torch.device) else x

            given = tree_unflatten([meta(x) for x in leaves], tree)
            if "device" in given[1] or any(a.name == "device" for a in func._schema.arguments):
                given[1]["device"] = torch.device("meta")
            flat, out_tree = tree_flatten(func(*given[0], **given[1]))
            position = {id(m): i for i, x in enumerate(leaves) if (m := metas.get(id(x))) is not None}
            self._shapes[key] = (
                [(tuple(t.size()), t.stride(), t.dtype) if isinstance(t, torch.Tensor) else None for t in flat],
                out_tree,
                [position.get(id(t)) for t in flat],
            )
        shapes, out_tree, positions = self._shapes[key]
        return shapes, out_tree, [None if at is None else leaves[at] for at in positions]

    def _number(self) -> None:
        """Autograd nodes made since the last time belong to the current stream."""
        now = torch.autograd._get_sequence_nr()
        if self._backward is None:
            for number in range(self._seen, now):
                self._streams[number] = self.device.current
        self._seen = now

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Around a call of autograd's engine."""
        self._number()
        before, self._backward = self._backward, _Backward(self.device)
        try:
            yield
            self._backward.end(self.device)
        finally:
            self._seen = torch.autograd._get_sequence_nr()
            self._backward = before


class _Backward:
    """What autograd's engine does about streams in one call: gradients that pass from a node of one stream to a node of another are
    waited for; and at the end its caller's stream waits for those that gave gradients to leaves."""

    def __init__(self, device: Device) -> None:
        self._default, self._caller = device.default, device.current
        self._made: dict[int, Event] = {}  # by address of memory
        self._leaves: set[Stream] = set()

    def stream(self, streams: dict[int, Stream], leaves: dict[int, Stream]) -> Stream:
        """Of the node that runs."""
        node = torch._C._current_autograd_node()
        if node is not None and node.name() != _ACCUMULATE:
            return streams.get(node._sequence_nr(), self._caller)
        leaf = self._default  # of a hook of the node that adds, which are those of DDP's parameters
        if node is not None:
            leaf = leaves.get(node.variable.data_ptr(), self._default)
        self._leaves.add(leaf)
        return leaf

    def order(self, device: Device, memory: Memory, stream: Stream, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            event = self._made.get(_address(tensor))
            if event is not None and event.stream is not stream:
                device.wait(stream, event)
                memory.hold(tensor, stream)

    def made(self, memory: Memory, stream: Stream, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                self._made[_address(tensor)] = stream.event()

    def end(self, device: Device) -> None:
        for stream in self._leaves:
            device.wait(self._caller, stream.event())


class _Kind(NamedTuple):
    """Of an operation. at_once: it launches nothing. writes: some of its arguments. reads: the host may
    need to know their contents."""

    at_once: bool
    writes: bool
    reads: bool


_kinds: dict[Any, _Kind] = {}


def _kind(func: Any) -> _Kind:
    schema = func._schema
    infos = [a.alias_info for a in schema.arguments if a.alias_info is not None]
    writes = any(info.is_write for info in infos)
    data = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
    makes = any("Tensor" in str(value.type) for value in schema.returns)
    at_once = schema.name in _AT_ONCE or (bool(infos) and not writes) or not (makes or writes)
    _kinds[func] = _Kind(at_once, writes, data or func in (aten.index.Tensor, aten.equal.default))
    return _kinds[func]


def _is_read(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the host must know what is in the arguments: it returns a number, or the size of its result depends on it."""
    if func is aten.index.Tensor:
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return kwargs.get("output_size") is None


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _hashable(x: Any) -> Any:
    return (type(x), x) if isinstance(x, (int, float, bool, str, type(None), torch.dtype, torch.device)) else (type(x), str(x))


@contextmanager
def _patched(launches: Launches) -> Iterator[None]:
    """Reads that torch does not dispatch, kernels of Triton's, and the engine's calls."""
    tensor = torch.Tensor
    saved = {(tensor, name): getattr(tensor, name) for name in ("tolist", "numpy")}
    saved |= {(torch.autograd, name): getattr(torch.autograd, name) for name in ("backward", "grad")}

    def reading(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            launches.read([self], name)
            return original(self, *args, **kwargs)

        return read

    def engine(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with launches.in_backward():
                return original(*args, **kwargs)

        return run

    execute = GridExecutor.__call__
    try:
        for (owner, name), original in saved.items():
            setattr(owner, name, reading(original, name) if owner is tensor else engine(original))
        GridExecutor.__call__ = lambda executor, *args, **kwargs: launches.kernel(execute, executor, args, kwargs)
        yield
    finally:
        GridExecutor.__call__ = execute
        for (owner, name), original in saved.items():
            setattr(owner, name, original)
