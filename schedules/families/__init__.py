"""The schedule families by name. A new family is a file beside this one and a line in FAMILIES."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pipehc.schedules.families import dualpipe, gpipe, interleaved, one_f_one_b, zero_bubble
from pipehc.schedules.families.forward import forward_only
from pipehc.schedules.placement import Placement
from pipehc.schedules.schedule import Schedule


class Family(NamedTuple):
    """`placement(ranks)` and `rows(ranks, microbatches)`; both raise ValueError for what the family cannot do.

    chunks: the default, for families that let the caller choose the stages per rank; they take `chunks` as a last argument.
    """

    placement: Callable[..., Placement]
    rows: Callable[..., tuple]
    chunks: int | None = None


FAMILIES: dict[str, Family] = {
    "gpipe": Family(gpipe.placement, gpipe.rows),
    "1f1b": Family(one_f_one_b.placement, one_f_one_b.rows),
    "interleaved": Family(interleaved.placement, interleaved.rows, chunks=2),
    "zb_h1": Family(zero_bubble.placement, zero_bubble.rows),
    "zbv": Family(zero_bubble.vee_placement, zero_bubble.vee_rows),
    "dualpipe": Family(dualpipe.placement, dualpipe.rows),
    "dualpipev": Family(dualpipe.vee_placement, dualpipe.vee_rows),
}


def build(name: str, ranks: int, microbatches: int, *, chunks: int | None = None, forward: bool = False) -> Schedule:
    """Generates a schedule of the named family.

    name: one of FAMILIES. microbatches: of both directions together. chunks: stages per rank, for interleaved (default 2).
    forward: forward passes only (evaluation), over the family's placement.
    Raises ValueError naming the value and what is allowed.
    """
    if name not in FAMILIES:
        raise ValueError(f"schedule = {name!r}: must be one of {', '.join(FAMILIES)}")
    if ranks < 1:
        raise ValueError(f"ranks = {ranks}: must be at least 1")
    if microbatches < 1:
        raise ValueError(f"microbatches = {microbatches}: must be at least 1")
    family = FAMILIES[name]
    if chunks is not None and family.chunks is None:
        choosable = ", ".join(other for other, of in FAMILIES.items() if of.chunks is not None)
        raise ValueError(f"chunks = {chunks}: {name} has a fixed number of stages per rank; only {choosable} takes chunks")
    options = () if family.chunks is None else (family.chunks if chunks is None else chunks,)
    placement = family.placement(ranks, *options)
    rows = forward_only(placement, microbatches) if forward else family.rows(ranks, microbatches, *options)
    return Schedule(name, placement, microbatches, rows, forward_only=forward)
