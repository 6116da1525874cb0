"""Expert all-to-alls in two halves: started on the communication queue, ended when somebody needs their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist


class Splits(NamedTuple):
    """Rows of one all-to-all by rank of the group."""

    sent: list[int]  # to each rank
    received: list[int]  # from each rank

    def back(self) -> Splits:
        """Of the all-to-all that returns every row to where it came from."""
        return Splits(self.received, self.sent)


def start_all_to_all(
    tensors: Sequence[torch.Tensor], splits: Splits, group: dist.ProcessGroup
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Starts sending rows of [sum(splits.sent), ...] tensors; returns a function that ends it: [sum(splits.received), ...] tensors.

    On CUDA to end it means that the current stream waits, not the host.
    """
    started = []
    for tensor in tensors:
        sent = tensor.contiguous()
        received = sent.new_empty((sum(splits.received), *sent.shape[1:]))
        work = dist.all_to_all_single(received, sent, splits.received, splits.sent, group=group, async_op=True)
        assert work is not None
        started.append((work, sent, received))  # `sent` is held until then

    def end() -> tuple[torch.Tensor, ...]:
        for work, _, _ in started:
            work.wait()
        return tuple(received for _, _, received in started)

    return end
