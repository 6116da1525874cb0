"""What the simulator is told of a layout that is only compared: times of whole stages, where a dry run has those of nodes."""

from __future__ import annotations

from collections.abc import Mapping

from pipehc.planning.dry_run.hardware import Link
from pipehc.planning.dry_run.roofline import Cost
from pipehc.planning.dry_run.tables import Key
from pipehc.schedules import Costs, Placement


def stage_costs(placement: Placement, table: Mapping[Key, Cost], message_bytes: int, link: Link) -> Costs:
    """Stages differ by one factor each, and pairs hide all that is on the queue of all-to-alls. table: ms of one micro-batch."""
    stages = range(placement.stages)

    def mean(kind: str, exchange: bool = True) -> float:
        found = [table[s, kind] for s in stages if (s, kind) in table]
        ms = (cost.ms if exchange else cost.ms - cost.exchange_ms for cost in found)
        return sum(ms) / len(stages) / placement.share

    whole = [sum(table[s, kind].ms for kind in "FBW") for s in stages]
    return Costs(
        f=mean("F"),
        b=mean("B"),
        w=mean("W"),
        r=mean("R"),
        pair=sum(mean(kind, exchange=False) for kind in "FBW"),
        link=1e3 * message_bytes / link.rate,
        latency=1e-3 * link.latency_us,
        weights=tuple(ms * len(whole) / sum(whole) for ms in whole),
    )
