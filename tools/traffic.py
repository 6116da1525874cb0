"""Counts the bytes that Triton launches and torch operations move, without a GPU.

Triton's interpreter shows every address a kernel touches. A launch is charged the *unique* bytes per tensor and direction: what
DRAM must move if L2 catches every repeated access of that launch. Torch operations in between are charged all they read and write.
Needs TRITON_INTERPRET=1 before the first import of triton.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from interpreted import watched
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
        self._touched: dict[str, list[NDArray[np.int64]]] | None = None

    def __enter__(self) -> Traffic:
        self._watched = watched(self._touch, self._run)
        self._watched.__enter__()
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        self._watched.__exit__(kind, error, trace)

    def _touch(self, writes: bool, addresses: NDArray[np.int64], *_: Any) -> None:
        assert self._touched is not None
        self._touched["written" if writes else "read"].append(addresses)

    def _run(self, executor: Any, arguments: Mapping[str, Any], call: Callable[[], None]) -> None:
        self._touched = {"read": [], "written": []}
        try:
            call()
        finally:
            self._close(executor.fn.__name__, {k: v for k, v in arguments.items() if isinstance(v, Tensor)})

    def _close(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        assert self._touched is not None
        launch = Launch(name, shapes={k: tuple(v.shape) for k, v in tensors.items()})
        for direction, found in self._touched.items():
            if found:
                addresses = np.unique(np.concatenate(found))
                for argument, tensor in tensors.items():
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
