"""What each action of each stage launches for one micro-batch, node by node."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from pipehc.planning.dry_run.operations import Operation
from pipehc.planning.dry_run.tracker import Where

Work = Mapping[Operation, float]
"""How often each operation runs: a mean over micro-batches."""

Key = tuple[int, str]  # stage, kind of action: F, B (the gradient of the input), W, R


class NodeWork(NamedTuple):
    """name: BLOCK.KIND, or empty for what an action does outside of its nodes. queue: compute, high or communication."""

    name: str
    queue: str
    work: Work


def actions(launches: Mapping[Where, Counter[Operation]]) -> dict[Key, tuple[NodeWork, ...]]:
    """By stage and action, its nodes in the order of their first use."""
    microbatches: dict[Key, set[int]] = defaultdict(set)
    found: dict[Key, dict[tuple[str, str], Counter[Operation]]] = defaultdict(lambda: defaultdict(Counter))
    for where, counts in launches.items():
        if where.stage >= 0:
            key = where.stage, where.kind
            microbatches[key].add(where.microbatch)
            found[key][where.node, where.queue].update(counts)
    return {
        key: tuple(
            NodeWork(name, queue, {operation: n / len(microbatches[key]) for operation, n in counts.items()})
            for (name, queue), counts in nodes.items()
        )
        for key, nodes in sorted(found.items())
    }


def phase(launches: Mapping[Where, Counter[Operation]], kind: str) -> Work:
    """What a phase outside of actions launches, once a step."""
    total: Counter[Operation] = Counter()
    for where, counts in launches.items():
        if where.kind == kind:
            total.update(counts)
    return total
