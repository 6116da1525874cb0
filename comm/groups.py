"""Process groups for stage messages: one per directed neighbour edge, used by nothing else, so that nothing else delays them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist

Edge = tuple[int, int]  # (source, target)


def edge_groups(
    pipelines: Iterable[list[int]], edges: list[Edge], timeout_s: float | None = None
) -> dict[Edge, dist.ProcessGroup]:
    """Makes the groups of every pipeline and returns those of this process, by the pipeline positions (source, target).

    pipelines: for every pipeline (one a data-parallel rank) the global ranks by pipeline position. edges: directed position pairs
    that carry messages. Collective: every process of the world calls it with the same arguments. Two edges between the same two
    ranks get two groups: at two ranks 'next' and 'previous' are the same peer, and on one group an activation could be taken for
    a gradient. timeout_s: the groups' own limit, the only one on CUDA, where the host does not wait; None: torch's.
    """
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    own = dist.get_rank()
    groups: dict[Edge, dist.ProcessGroup] = {}
    for ranks in pipelines:
        for source, target in edges:
            group = dist.new_group([ranks[source], ranks[target]], timeout=timeout)
            if own in (ranks[source], ranks[target]):
                assert isinstance(group, dist.ProcessGroup)
                groups[source, target] = group
    return groups
