"""Tensors that a backward makes again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Note(NamedTuple):
    """In the place of a saved tensor: which one it was a view of, and which view."""

    which: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def rebuilt(tensors: Sequence[Tensor], rebuild: Callable[[], Sequence[Tensor]]) -> Iterator[None]:
    """Inside, autograd keeps none of `tensors`: `rebuild`, called in the backward, makes equal ones for all that was saved of them.

    Whatever else is saved goes through the hooks around, if there are any.
    """
    own = {tensor.untyped_storage()._cdata: which for which, tensor in enumerate(tensors)}
    around = torch._C._autograd._top_saved_tensors_default_hooks(False)
    saved, waiting, made = 0, 0, list[Tensor]()

    def pack(tensor: Tensor) -> Any:
        nonlocal saved
        which = own.get(tensor.untyped_storage()._cdata)
        if which is None:
            return tensor.detach() if around is None else around[0](tensor)
        saved += 1
        return _Note(which, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(note: Any) -> Tensor:
        nonlocal waiting
        if not isinstance(note, _Note):
            found: Tensor = note if around is None else around[1](note)
            return found
        if not made:
            made.extend(rebuild())
            waiting = saved
        view = made[note.which].as_strided(note.size, note.stride, note.offset)
        waiting -= 1
        if not waiting:
            made.clear()
        return view

    with saved_tensors_hooks(pack, unpack):
        yield
