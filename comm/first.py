"""What the first process finds, for all of them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pipehc.comm.groups import NCCL_LIMIT_S


def from_first[T](work: Callable[[], T], limit_s: float = NCCL_LIMIT_S) -> T:
    """What `work` returns on rank 0, which alone does it, on every rank. Collective.

    It must pickle. limit_s: for how long the others wait for it, whatever the limit of their own groups. Raises ValueError on every
    rank, with the message, if `work` raises anything.
    """
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=limit_s))
    assert isinstance(group, dist.ProcessGroup), "every rank is a member"
    found: list[Any] = [None, None]  # a result, or else what went wrong
    if dist.get_rank() == 0:
        try:
            found[0] = work()
        except Exception as error:  # whatever it is: the others wait for an answer
            found[1] = str(error) if isinstance(error, ValueError) else repr(error)
    dist.broadcast_object_list(found, src=0, group=group)
    dist.destroy_process_group(group)
    if found[1] is not None:
        raise ValueError(found[1])
    result: T = found[0]
    return result
