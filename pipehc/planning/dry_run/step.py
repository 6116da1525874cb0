"""The whole step, simulated from what its actions cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pipehc.planning.dry_run.hardware import Link
from pipehc.planning.dry_run.roofline import Cost
from pipehc.planning.dry_run.tables import Key
from pipehc.schedules import Costs, Program, SimulationResult, simulate
from pipehc.schedules.program import Run

Table = Mapping[Key, Cost]


class Step(NamedTuple):
    """Simulated. ms: from the first forward to the new weights. pipeline: its simulation, in ms, and what it was fed with.
    sums_ms: what the sums of gradients add after it. optimizer_ms: after those. exposed_exchange_ms: of the fullest rank,
    all-to-alls that nothing hides."""

    ms: float
    pipeline: SimulationResult
    costs: Costs
    sums_ms: float
    optimizer_ms: float
    exposed_exchange_ms: float


def simulated(program: Program, table: Table, message_bytes: int, link: Link, sums_ms: float, optimizer_ms: float) -> Step:
    """The step of a program whose stages cost what `table` says.

    link: between pipeline neighbours. sums_ms: how long the gradients of a rank take to be summed, in equal parts for its stages.
    """
    costs = simulation_costs(program, table, message_bytes, link)
    result, ranks = simulate(program, costs), range(program.schedule.ranks)
    left = max(_sums_end(program, result, rank, sums_ms) for rank in ranks) - result.makespan
    exposed = max(_exposed(program, table, rank) for rank in ranks)
    sums_ms = max(0.0, left)
    return Step(result.makespan + sums_ms + optimizer_ms, result, costs, sums_ms, optimizer_ms, exposed)


def _sums_end(program: Program, result: SimulationResult, rank: int, sums_ms: float) -> float:
    """When the gradients of a rank are summed: those of a stage start when its last one is there, and those before have ended."""
    held = program.schedule.placement.held(rank)
    last = [max(s.end for s in result.spans if s.rank == rank and (s.lane, s.stage) == own and s.kind in "BW") for own in held]
    end = 0.0
    for ready in sorted(last):
        end = max(end, ready) + sums_ms / len(last)
    return end


def simulation_costs(program: Program, table: Table, message_bytes: int, link: Link) -> Costs:
    """What the simulator is told: stages differ by one factor each, and pairs hide all of their all-to-alls."""
    placement = program.schedule.placement
    stages = range(placement.stages)

    def mean(kind: str, exchange: bool = True) -> float:
        ms = (table[s, kind].ms if exchange else _alone(table[s, kind]) for s in stages if (s, kind) in table)
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


def _alone(cost: Cost) -> float:
    return max(cost.device_ms, cost.host_ms)


def _exposed(program: Program, table: Table, rank: int) -> float:
    """All-to-alls of actions outside of pairs: nothing runs beside them."""
    runs = [i for i in program.instructions[rank] if isinstance(i, Run) and i.pair is None]
    return sum(table[i.action.stage, "B" if i.action.kind == "I" else i.action.kind].exchange_ms for i in runs)


def model_flops(table: Table) -> float:
    """FLOPs of one micro-batch through the whole model: three times those of its forward, as is usual, without recomputation and
    without what hyper-connections add."""
    return 3 * sum(cost.products for (_, kind), cost in table.items() if kind == "F")
