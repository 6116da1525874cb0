"""The schedule families by name. A new family is a file beside this one and a line in FAMILIES."""

from __future__ import annotations

from collections.abc import Callable

from pipehc.schedules.families import dualpipe, one_f_one_b
from pipehc.schedules.families.forward import forward_only
from pipehc.schedules.placement import Placement
from pipehc.schedules.schedule import Schedule

# name -> (placement(ranks), rows(ranks, microbatches)); both raise ValueError for what the family cannot do
FAMILIES: dict[str, tuple[Callable, Callable]] = {
    "1f1b": (one_f_one_b.placement, one_f_one_b.rows),
    "dualpipe": (dualpipe.placement, dualpipe.rows),
    "dualpipev": (dualpipe.vee_placement, dualpipe.vee_rows),
}


def build(name: str, ranks: int, microbatches: int, *, forward: bool = False) -> Schedule:
    """Generates a schedule of the named family.

    name: one of FAMILIES. microbatches: of both directions together. forward: forward passes only (evaluation), over the family's
    placement. Raises ValueError naming the value and what is allowed.
    """
    if name not in FAMILIES:
        raise ValueError(f"schedule = {name!r}: must be one of {', '.join(FAMILIES)}")
    if microbatches < 1:
        raise ValueError(f"microbatches = {microbatches}: must be at least 1")
    place, rows = FAMILIES[name]
    placement: Placement = place(ranks)
    if forward:
        return Schedule(name, placement, microbatches, forward_only(placement, microbatches), forward_only=True)
    return Schedule(name, placement, microbatches, rows(ranks, microbatches))
