"""Counts the bytes that Triton launches and torch operations move, without a GPU.

Triton's interpreter shows every address a kernel touches. A launch is charged the *unique* bytes per tensor and direction: what
DRAM must move if L2 catches every repeated access of that launch. Torch operations in between are charged all they read and write.
Needs TRITON_INTERPRET=1 before the first import of triton.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

NO_TRAFFIC = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "_local_scalar_dense",
    "lift_fresh",
}


@dataclass
class Launch:
    """One kernel launch (or torch operation): bytes by tensor argument, and the shapes of the arguments."""

    name: str
    read: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    written: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


class Traffic(TorchDispatchMode):
    """Context manager that gathers `launches` (Triton) and `operations` (torch)."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.operations: list[Launch] = []
        self._touched: dict[str, list[Any]] | None = None
        self._arguments: dict[str, Tensor] = {}

    def __enter__(self) -> Traffic:
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        self._shipped = (
            builder.create_masked_load,
            builder.create_masked_store,
            executor.__call__,
            executor._init_args_hst,
        )
        load, store, call, arguments = self._shipped

        def counted_load(b: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self._touch("read", pointers, mask)
            return load(b, pointers, mask, *rest)

        def counted_store(b: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._touch("written", pointers, mask)
            return store(b, pointers, value, mask, *rest)

        def counted_arguments(run: Any, positional: Any, named: Any) -> Any:
            host, host_named = arguments(run, positional, named)
            given = dict(zip(run.arg_names, host)) | host_named
            self._arguments = {k: v for k, v in given.items() if isinstance(v, Tensor)}
            return host, host_named

        def counted_call(run: Any, *positional: Any, **named: Any) -> Any:
            self._touched = {"read": [], "written": []}
            try:
                return call(run, *positional, **named)
            finally:
                self._close(run.fn.__name__)

        builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
        executor.__call__, executor._init_args_hst = counted_call, counted_arguments
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        builder.create_masked_load, builder.create_masked_store, executor.__call__, executor._init_args_hst = self._shipped

    def _touch(self, direction: str, pointers: Any, mask: Any) -> None:
        assert self._touched is not None
        addresses = np.asarray(pointers.data)
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(mask.data).astype(bool), addresses.shape)]
        self._touched[direction].append(np.unique(addresses))

    def _close(self, name: str) -> None:
        assert self._touched is not None
        launch = Launch(name, shapes={k: tuple(v.shape) for k, v in self._arguments.items()})
        for direction, found in self._touched.items():
            if found:
                addresses = np.unique(np.concatenate(found)).astype(np.int64)
                for argument, tensor in self._arguments.items():
                    first = tensor.data_ptr()
                    inside = int(((addresses >= first) & (addresses < first + tensor.untyped_storage().nbytes())).sum())
                    if inside:
                        getattr(launch, direction)[argument] += inside * tensor.element_size()
        self._touched = None
        self.launches.append(launch)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if self._touched is None and name not in NO_TRAFFIC and not aliases:
            operation = Launch(name)
            for i, tensor in enumerate(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
                operation.read[str(i)] = tensor.numel() * tensor.element_size()
                operation.shapes[str(i)] = tuple(tensor.shape)
            for tensor in (t for t in tree_leaves(result) if isinstance(t, Tensor)):
                operation.written["result"] += tensor.numel() * tensor.element_size()
                operation.shapes["result"] = tuple(tensor.shape)
            self.operations.append(operation)
        return result


def units(launches: list[Launch], tokens: int, channels: int, phi_shaped: bool) -> tuple[float, float]:
    """(read, written) in units of tokens * channels bf16 elements. Only tensors with a token dimension, or only the others."""
    total = [0, 0]
    for launch in launches:
        for i, moved in enumerate((launch.read, launch.written)):
            for argument, count in moved.items():
                if (tokens not in launch.shapes.get(argument, ())) == phi_shaped:
                    total[i] += count
    unit = tokens * channels * 2
    return total[0] / unit, total[1] / unit
