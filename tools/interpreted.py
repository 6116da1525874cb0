"""Triton's interpreter watched: what every load and store of a kernel asks for, and every launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from triton.runtime import interpreter

Ask = Callable[[bool, NDArray[np.int64], Any, Sequence[Any]], None]
"""Told whether it writes, the addresses that the mask lets through, once each and in order, the pointers, and the rest."""
Run = Callable[[Any, Mapping[str, Any], Callable[[], None]], None]
"""Given the executor of a launch, its arguments by name, and what launches it, which it may call any number of times."""


@contextmanager
def watched(ask: Ask, run: Run) -> Iterator[None]:
    """In this block `ask` and `run` stand between kernels and the interpreter, the innermost of several."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    shipped = load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__

    def tell(writes: bool, pointers: Any, mask: Any, rest: Sequence[Any]) -> None:
        addresses = np.asarray(pointers.data)
        if mask is not None:
            addresses = addresses[np.broadcast_to(np.asarray(mask.data).astype(bool), addresses.shape)]
        ask(writes, np.unique(addresses).astype(np.int64), pointers, rest)

    def watched_load(b: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        tell(False, pointers, mask, rest)
        return load(b, pointers, mask, *rest)

    def watched_store(b: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        tell(True, pointers, mask, rest)
        return store(b, pointers, value, mask, *rest)

    def watched_call(self: Any, *positional: Any, **named: Any) -> None:
        run(self, dict(zip(self.arg_names, positional)) | named, lambda: call(self, *positional, **named))

    builder.create_masked_load, builder.create_masked_store, executor.__call__ = watched_load, watched_store, watched_call
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = shipped
