"""Which weight gradients an I had better leave to its W: those that the step gains by, since each keeps tensors until then."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

from pipehc.schedules.costs import Costs
from pipehc.schedules.program import Program
from pipehc.schedules.simulate import simulate

PARTS = {"attention": ("attention",), "ffn": ("mlp", "mlp_post")}
"""Of a block, by name: kinds of nodes. The output layer is a part of the last FFN."""
SLACK = 1e-3
"""Of the step's simulated time: less is given away for memory."""


def at_once(deferred: tuple[str, ...] | None) -> tuple[str, ...]:
    """Kinds of nodes whose weight gradients are not left to W, if those of the parts `deferred` are; None: all are."""
    return () if deferred is None else tuple(kind for part, kinds in PARTS.items() if part not in deferred for kind in kinds)


def parts_to_defer(program: Program, costs: Costs) -> tuple[str, ...]:
    """The fewest parts with which the program is as fast, but for SLACK, as with those that make it fastest.

    W fills bubbles; computed with I instead, a weight gradient hides an all-to-all. costs: with nodes, without `at_once`.
    """
    choices = [parts for count in range(len(PARTS) + 1) for parts in combinations(PARTS, count)]
    times = [simulate(program, replace(costs, at_once=at_once(parts))).makespan for parts in choices]
    return next(parts for parts, time in zip(choices, times) if time <= (1 + SLACK) * min(times))
