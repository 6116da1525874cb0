"""The embedding's weight, of which the last stage has a copy where multi-token prediction embeds tokens there, too.

Both copies start equal, by their name, and get the sum of their gradients, so that they stay equal to the bit. The first stage's
is the one that the gradient's norm and checkpoints know. Megatron's marks give each a bucket of its own: the distributed optimizer
then cuts both alike, and a rank owns the same part of either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import nn

from pipehc.megatron.trainer.groups import Groups

Owned = Callable[[nn.Parameter], Sequence[torch.Tensor]]
"""What this rank's optimizer has of a weight: nothing, or its fp32 master and moments."""


def mark_copy(weight: nn.Parameter, counts: bool) -> None:
    """weight: one of the two copies. counts: whether it is the one that norm and checkpoints know."""
    weight.shared_embedding = True  # type: ignore[attr-defined]
    weight.shared = not counts  # type: ignore[attr-defined]


def is_copy(weight: nn.Parameter) -> bool:
    """Whether it repeats a weight of the first stage."""
    return bool(getattr(weight, "shared", False))


class Tied:
    """The copies on this rank: both, one, or none. Its methods are collective over the pipeline.

    chunks: of this rank's stages. Two replicas, and a V, have first and last stage on one rank; else those are the ends of
    Megatron's group for embeddings.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], groups: Groups) -> None:
        held = [(p, chunk) for chunk in chunks for p in chunk.parameters() if getattr(p, "shared_embedding", False)]
        held.sort(key=lambda pair: is_copy(pair[0]))  # the first stage's first
        self.weights: list[nn.Parameter] = [p for p, _ in held]
        self._gradients = [_owned_gradient(chunk, p) for p, chunk in held]
        self._group: dist.ProcessGroup | None = groups.collection.embd if len(held) == 1 else None
        assert len(held) <= 2 and (self._group is None or self._group.size() == 2)

    def sum_gradients(self) -> None:
        """Gives both copies the sum of their gradients, of which each is that of all replicas already."""
        if self._group is not None:
            dist.all_reduce(self._gradients[0], group=self._group)
        elif self._gradients:
            first, last = self._gradients
            last.copy_(first.add_(last))

    def follow(self, owned: Owned) -> None:
        """Gives the last stage's copy what the first's has."""
        parts = [owned(weight) for weight in self.weights]
        if self._group is not None:
            for tensor in parts[0]:
                dist.broadcast(tensor, group=self._group, group_src=0)
        elif parts:
            for first, last in zip(*parts, strict=True):
                last.copy_(first)


def _owned_gradient(chunk: DistributedDataParallel, weight: nn.Parameter) -> torch.Tensor:
    """What this rank owns of the gradients of the weight's bucket."""
    buffer: Any = next(buffer for buffer in chunk.buffers if weight in buffer.param_index_map)
    bucket = buffer.buckets[buffer.param_index_map[weight][2]]
    assert len(bucket.params_list) == 1, "a shared weight has a bucket of its own"
    group = buffer.data_parallel_group
    own: torch.Tensor = bucket.grad_data.chunk(group.size())[group.rank()]
    return own
