"""Data iterators that hand out each micro-batch by its number: schedules with two lanes do not take them in order."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any


class Batches:
    """The items of one step of a data iterator, which several model chunks of a rank may share.

    source: yields one item per micro-batch, in order. microbatches: of the step. takers: the micro-batches of every chunk that
    takes from it; an item is let go when all have it.
    """

    def __init__(self, source: Iterator[Any], microbatches: int) -> None:
        self._source, self._microbatches = source, microbatches
        self.takers: Counter[int] = Counter()
        self._items: dict[int, Any] = {}
        self._fetched = 0

    def take(self, microbatch: int) -> Any:
        """The item of a micro-batch."""
        while self._fetched <= microbatch:
            self._items[self._fetched] = next(self._source)
            self._fetched += 1
        self.takers[microbatch] -= 1
        return self._items[microbatch] if self.takers[microbatch] else self._items.pop(microbatch)

    def finish(self) -> None:
        """Skips what is left of the step, if any of it was taken: the next step starts where Megatron's own schedules would."""
        if self._fetched:
            for _ in range(self._fetched, self._microbatches):
                next(self._source)
        self._items.clear()


class OneItem:
    """What a forward step gets as its iterator: one item. A second one is refused, since it would belong to another micro-batch."""

    def __init__(self, batches: Batches, microbatch: int) -> None:
        self._batches, self._microbatch, self._taken = batches, microbatch, False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._taken:
            raise ValueError("forward_step_func takes a second item from data_iterator for one micro-batch; it must take one")
        self._taken = True
        return self._batches.take(self._microbatch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches._source, name)


def batches_of(data_iterator: Any, chunks: Sequence[range], microbatches: int) -> list[Batches | None]:
    """One entry per model chunk, shared where chunks share an iterator; None where a rank has no data.

    data_iterator: as Megatron's schedules take it: an iterator, None, or a list with one of these for every chunk. chunks: the
    micro-batches of each.
    """
    count = len(chunks)
    sources = data_iterator if isinstance(data_iterator, list) else [data_iterator] * count
    if len(sources) == 1:
        sources = sources * count
    if len(sources) != count:
        raise ValueError(f"data_iterator: a list of {len(sources)}; must have one iterator for each of the {count} model chunks")
    made: dict[int, Batches] = {}
    found = [None if s is None else made.setdefault(id(s), Batches(s, microbatches)) for s in sources]
    for batches, own in zip(found, chunks):
        if batches is not None:
            batches.takers.update(own)
    return found
