"""Maps that were computed once, for a second run of the same operation on the same streams.

Recomputation runs `coefficients_pre` and `post_res_pre` again for their streams and y, n + 1 numbers a token and channel. The maps,
and what the backward needs of them, are 2 n (n + 2) + n + 2 numbers a token, for all channels together: they are kept, and the
second run is one launch (rebuild.py) that reads the streams once and projects nothing.

    maps = KeptMaps()
    with maps, torch.no_grad():
        post_res_pre(...)
    with maps:
        post_res_pre(...)  # the same results, to the bit, now with a graph
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable
from typing import Any

from torch import Tensor


class KeptMaps:
    """Entered for the first time it keeps the maps of the mapping kernels that run inside; entered again it hands them to the same
    operations, in the same order, once. Operations that do not run in Triton keep nothing, and compute everything again."""

    def __init__(self) -> None:
        self._kept: deque[tuple[Hashable, dict[str, Tensor]]] = deque()
        self._full = False

    def __enter__(self) -> KeptMaps:
        assert current() is None, "maps are kept for one operation, not for one inside of another"
        _open.maps = self
        return self

    def __exit__(self, *_: Any) -> None:
        _open.maps = None
        self._full = True

    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        return [tensor for _, maps in self._kept for tensor in maps.values()]

    def keep(self, of: Hashable, maps: dict[str, Tensor]) -> None:
        """`of` says which operation it is."""
        if not self._full:
            self._kept.append((of, maps))

    def take(self, of: Hashable) -> dict[str, Tensor] | None:
        """The next maps, without history; None if there are none."""
        if not self._full or not self._kept:
            return None
        kept_of, maps = self._kept.popleft()
        assert kept_of == of, f"maps of {kept_of} are not those of {of}"
        return {name: tensor.detach() for name, tensor in maps.items()}


_open = threading.local()


def current() -> KeptMaps | None:
    """The one that is entered on this thread."""
    return getattr(_open, "maps", None)
