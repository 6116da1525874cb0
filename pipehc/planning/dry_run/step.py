"""The whole step, simulated from what its actions cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import NamedTuple

from pipehc.planning.dry_run.hardware import Link
from pipehc.planning.dry_run.roofline import Cost
from pipehc.planning.dry_run.tables import Key
from pipehc.schedules import Costs, Program, SimulationResult, simulate

NodeCost = tuple[str, str, Cost]
"""Name, empty outside of nodes; queue; and what it launches for one micro-batch."""
Nodes = Mapping[Key, Sequence[NodeCost]]
"""By stage and action."""


class Step(NamedTuple):
    """Simulated. ms: from the first forward to the new weights. pipeline: its simulation, in ms, and what it was fed with.
    sums_ms: what the sums of gradients add after it. optimizer_ms: after those."""

    ms: float
    pipeline: SimulationResult
    costs: Costs
    sums_ms: float
    optimizer_ms: float


def simulated(
    program: Program, nodes: Nodes, message_bytes: int, link: Link, sums_ms: float, optimizer_ms: float, at_once: tuple[str, ...]
) -> Step:
    """The step of a program whose stages cost what `nodes` says. link: between pipeline neighbours. at_once: see `Costs`. For the
    rest see `stepped`."""
    costs = replace(simulation_costs(nodes, message_bytes, link), at_once=at_once)
    return stepped(program, costs, sums_ms, optimizer_ms)


def stepped(program: Program, costs: Costs, sums_ms: float, optimizer_ms: float) -> Step:
    """The step of a program under `costs`, in ms.

    sums_ms: how long the gradients of a rank take to be summed, in equal parts for its stages. optimizer_ms: what comes after.
    """
    result, ranks = simulate(program, costs), range(program.schedule.ranks)
    sums_ms = max(0.0, max(_sums_end(program, result, rank, sums_ms) for rank in ranks) - result.makespan)
    return Step(result.makespan + sums_ms + optimizer_ms, result, costs, sums_ms, optimizer_ms)


def _sums_end(program: Program, result: SimulationResult, rank: int, sums_ms: float) -> float:
    """When the gradients of a rank are summed: those of a stage start when its last one is there, and those before have ended."""
    held = program.schedule.placement.held(rank)
    last = [max(s.end for s in result.spans if s.rank == rank and (s.lane, s.stage) == own and s.kind in "BW") for own in held]
    end = 0.0
    for ready in sorted(last):
        end = max(end, ready) + sums_ms / len(last)
    return end


def simulation_costs(nodes: Nodes, message_bytes: int, link: Link) -> Costs:
    """What the simulator is told: the nodes of every F, B and W, and the time of every R."""
    rows = {(stage, kind): _rows(nodes[stage, "F"], found, kind) for (stage, kind), found in nodes.items() if kind != "R"}
    again = {key: sum(cost.ms for _, _, cost in found) for key, found in nodes.items() if key[1] == "R"}
    return Costs(table=again, nodes=rows, link=1e3 * message_bytes / link.rate, latency=1e-3 * link.latency_us)


def _rows(forward: Sequence[NodeCost], found: Sequence[NodeCost], kind: str) -> list[tuple[str, str, float]]:
    """What is outside of nodes goes to the last one; of W, to all in proportion, as small additions that its host launches while
    the device is at its products."""
    named = [(name, queue, cost.ms) for name, queue, cost in found if name]
    named = named or [(next(name for name, *_ in forward if name), "compute", 0.0)]
    rest = sum(cost.ms for name, _, cost in found if not name)
    of_nodes = sum(ms for *_, ms in named)
    if kind == "W" and of_nodes:
        whole = reduce(Cost.plus, (cost for *_, cost in found)).ms
        return [(name, queue, ms * whole / of_nodes) for name, queue, ms in named]
    name, queue, ms = named[-1]
    return [*named[:-1], (name, queue, ms + rest)]


def model_flops(table: Mapping[Key, Cost]) -> float:
    """FLOPs of one micro-batch through the whole model: three times those of its forward, as is usual, without recomputation and
    without what hyper-connections add."""
    return 3 * sum(cost.products for (_, kind), cost in table.items() if kind == "F")
