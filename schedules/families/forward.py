"""Forward passes only, over any placement: evaluation."""

from __future__ import annotations

from pipehc.schedules.actions import Action, Cell
from pipehc.schedules.placement import Placement
from pipehc.schedules.schedule import lane_microbatches


def forward_only(placement: Placement, microbatches: int) -> tuple[tuple[Cell, ...], ...]:
    """Every rank orders its forwards by the time slot at which they could run at the earliest.

    The slot grows by one from stage to stage, so no order of the ranks can wait in a circle.
    """
    if microbatches % placement.lanes:
        raise ValueError(f"microbatches = {microbatches}: must be a multiple of {placement.lanes}, the lanes of the placement")

    def row(rank: int) -> tuple[Cell, ...]:
        slots = [
            (position + stage, -stage, Action("F", stage, microbatch, lane))
            for lane, stage in placement.held(rank)
            for position, microbatch in enumerate(lane_microbatches(microbatches, placement.lanes, lane))
        ]
        return tuple(action for *_, action in sorted(slots))

    return tuple(row(rank) for rank in range(placement.ranks))
