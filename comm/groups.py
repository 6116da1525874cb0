"""Process groups for stage messages: one per directed neighbour edge, used by nothing else, so that nothing else delays them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist

from pipehc.comm.budgets import MESSAGE_BLOCKS, blocks

Edge = tuple[int, int]  # (source, target)


NCCL_LIMIT_S = 1800.0
"""The least limit of groups of CUDA: it runs from the call, to which the device may get as much as a step later, so it must exceed
any step. A watchdog ends what hangs before."""


def edge_groups(
    pipelines: Iterable[list[int]],
    edges: list[Edge],
    timeout_s: float | None = None,
    device: torch.device | str = "cpu",
    message_blocks: int | None = None,
) -> dict[Edge, dist.ProcessGroup]:
    """Makes the groups of every pipeline and returns those of this process, by the pipeline positions (source, target).

    pipelines: for every pipeline (one a data-parallel rank) the global ranks by pipeline position. edges: directed position pairs
    that carry messages. Collective: every process of the world calls it with the same arguments. Two edges between the same two
    ranks get two groups: at two ranks 'next' and 'previous' are the same peer, and on one group an activation could be taken for
    a gradient. timeout_s: the groups' own limit, on CUDA at least NCCL_LIMIT_S; None: torch's. device: that they lie on when
    they are sent; groups of CUDA also carry those of host memory. message_blocks: thread blocks of a message on CUDA; None: as
    `budgets` says.
    """
    on_gpu = torch.device(device).type == "cuda"
    timeout = None if timeout_s is None else timedelta(seconds=max(timeout_s, NCCL_LIMIT_S) if on_gpu else timeout_s)
    own = dist.get_rank()
    groups: dict[Edge, dist.ProcessGroup] = {}
    for ranks in pipelines:
        for source, target in edges:
            options = _nccl_options(timeout, blocks(MESSAGE_BLOCKS, message_blocks)) if on_gpu else None
            backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"  # not the world's, which may be NCCL
            group = dist.new_group([ranks[source], ranks[target]], timeout=timeout, backend=backend, pg_options=options)
            if own in (ranks[source], ranks[target]):
                assert isinstance(group, dist.ProcessGroup)
                groups[source, target] = group
    return groups


def neighbours_of(rank: int, pipelines: Iterable[list[int]], edges: Iterable[Edge]) -> list[int]:
    """The ranks of the world that `rank` exchanges messages with. Arguments as of `edge_groups`."""
    edges = list(edges)
    pairs = [(ranks[source], ranks[target]) for ranks in pipelines for source, target in edges]
    return sorted({a if b == rank else b for a, b in pairs if rank in (a, b)})


def _nccl_options(timeout: timedelta | None, most_blocks: int) -> dist.ProcessGroupNCCL.Options:
    """A message starts when it is sent, not when the kernels in front of it end. New ones for each group, which fills them in."""
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    options.config.max_ctas = most_blocks
    if timeout is not None:
        options._timeout = timeout
    return options
