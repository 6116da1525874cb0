"""Models of a few blocks, one stage of each kind, whose dry runs add up to the stages of any layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipehc.config.schema import Config
from pipehc.planning import parameters
from pipehc.planning.dry_run.hardware import Hardware
from pipehc.planning.dry_run.operations import Operation
from pipehc.planning.dry_run.rank_run import RankRun
from pipehc.planning.dry_run.roofline import Cost, collectives, cost
from pipehc.planning.dry_run.summary import sum_of
from pipehc.planning.dry_run.tables import Key, NodeWork, actions, phase
from pipehc.planning.parameters import Parameters
from pipehc.planning.search.footprint import Footprint
from pipehc.planning.search.layouts import changed

MICROBATCHES = 2  # the first is not quite like all others: it makes what the step keeps
KINDS = "FRBW"


class Unit(NamedTuple):
    """What decides how much a block costs."""

    ep: int
    micro_batch: int
    recompute: bool
    block: int | None


def unit_of(config: Config) -> Unit:
    return Unit(config.parallel.ep, config.train.micro_batch, config.recompute.enabled, config.recompute.block)


class Places(NamedTuple):
    """Stages of a unit's model: with embedding; a dense and a main block alone; two main ones; with the head."""

    first: int
    dense: int | None
    one: int
    two: int
    last: int


def places(config: Config) -> Places:
    """Main blocks are those with experts, if there are any."""
    if config.model.moe_blocks and config.model.dense_blocks:
        return Places(0, 1, 2, 3, 4)
    return Places(0, None, 1, 2, 3)


def unit_config(config: Config, unit: Unit) -> Config:
    """All stages on the ranks that share layers, twice as many replicas as the experts need."""
    mixed = places(config).dense is not None
    sizes = (1, 1, 1, 2, 1) if mixed else (1, 1, 2, 1)
    dense = 2 if mixed else sum(sizes) if not config.model.moe_blocks else 0
    dp = 2 * unit.ep
    return changed(
        config,
        model={"blocks": sum(sizes), "dense_blocks": dense},
        parallel={"pp": 1, "ep": unit.ep, "dp": dp, "blocks_per_stage": sizes},
        schedule={"name": "interleaved", "chunks": len(sizes)},
        recompute={"enabled": unit.recompute, "block": unit.block},
        train={"micro_batch": unit.micro_batch, "global_batch": MICROBATCHES * unit.micro_batch * dp},
        evaluation={"interval": 0},
    )


class UnitRun(NamedTuple):
    """A unit's dry run. config: of its small model. memory: by stage and action."""

    config: Config
    run: RankRun
    memory: Mapping[Key, Footprint]


class Composed(NamedTuple):
    """Of one layout. table, memory: by stage and action. persistent: bytes by category, by pipeline rank. optimizer_over: what the
    optimizer needs beside them. sums_ms, optimizer_ms: of the slowest rank. groups: process groups, pipeline neighbours aside."""

    table: dict[Key, Cost]
    memory: dict[Key, Footprint]
    persistent: list[dict[str, float]]
    optimizer_over: float
    sums_ms: float
    optimizer_ms: float
    groups: int


class Composer:
    """Adds up one unit's stages."""

    def __init__(self, unit: UnitRun, hardware: Hardware) -> None:
        self._unit, self._hardware = unit, hardware
        self._places = places(unit.config)
        ep = unit.config.parallel.ep
        self._costs = {
            key: sum_of([_cost_of(node, hardware, ep) for node in nodes]) for key, nodes in actions(unit.run.launches).items()
        }

    def __call__(self, config: Config) -> Composed:
        shapes, counts = _shapes(config), parameters.stages(config)
        table = {(s, kind): found for s, x in enumerate(shapes) for kind in KINDS if (found := self._cost(kind, *x)).launches > 0}
        memory = {(s, kind): self._footprint(kind, *x) for s, x in enumerate(shapes) for kind in KINDS}
        placement, run = config.placement, self._unit.run
        held = [[counts[stage] for _, stage in placement.held(rank)] for rank in range(config.parallel.pp)]
        return Composed(
            table,
            memory,
            [self._persistent(config, own) for own in held],
            run.peaks["optimizer"].total - sum(run.persistent.values()),
            max(self._sums_ms(config, own) for own in held),
            max(self._optimizer_ms(config, own) for own in held),
            run.groups + _shares_embedding(config),
        )

    @property
    def block_ms(self) -> float:
        """What one more main block adds to all actions of a stage."""
        at = self._places
        return sum(self._ms(at.two, kind) - self._ms(at.one, kind) for kind in KINDS)

    def _ms(self, stage: int, kind: str) -> float:
        return self._costs.get((stage, kind), Cost()).ms

    def persistent_bytes(self, config: Config) -> float:
        """Of the fullest rank: parameters, gradients and optimizer."""
        counts, placement = parameters.stages(config), config.placement
        held = ([counts[stage] for _, stage in placement.held(rank)] for rank in range(config.parallel.pp))
        return max(sum(self._persistent(config, own).values()) for own in held)

    def _weights(self, dense: int, main: int, first: bool, last: bool) -> list[tuple[int, float]]:
        """A stage as a sum of the unit's: each block after the first adds what two have more than one."""
        at, more = self._places, dense + main - 1
        found = [(at.one, 1.0 - more), (at.two, float(more))]
        if at.dense is not None:
            found += [(at.dense, float(dense)), (at.one, -float(dense))]
        if first:
            found += [(at.first, 1.0), (at.one if at.dense is None else at.dense, -1.0)]
        if last:
            found += [(at.last, 1.0), (at.one, -1.0)]
        return found

    def _cost(self, kind: str, *shape: Any) -> Cost:
        total = Cost()
        for stage, weight in self._weights(*shape):
            total = total.plus(Cost(*(weight * value for value in self._costs.get((stage, kind), Cost()))))
        return Cost(*(max(0.0, value) for value in total))

    def _footprint(self, kind: str, dense: int, main: int, first: bool, last: bool) -> Footprint:
        of, at = self._unit.memory, self._places

        def found(stage: int) -> Footprint:
            return of.get((stage, kind), Footprint())

        net = sum(weight * found(stage).net for stage, weight in self._weights(dense, main, first, last))
        like = [at.two if dense + main > 1 else at.one]
        like += [at.first] * first + [at.last] * last
        return Footprint(net, max(found(stage).over for stage in like))

    def _per_parameter(self) -> tuple[int, float]:
        """Parameters of the unit's rank, and those that its optimizer holds."""
        config = self._unit.config
        counts = parameters.stages(config)
        return sum(_on_rank(count, config) for count in counts), sum(_owned(count, config) for count in counts)

    def _persistent(self, config: Config, own: Sequence[Parameters]) -> dict[str, float]:
        there, sharded = self._per_parameter()
        whole = sum(_on_rank(count, config) for count in own) / there
        share = sum(_owned(count, config) for count in own) / sharded
        scale = {"parameters": whole, "gradients": whole, "optimizer": share}
        return {name: scale.get(name, 1.0) * size for name, size in self._unit.run.persistent.items()}

    def _sums_ms(self, config: Config, own: Sequence[Parameters]) -> float:
        there = self._per_parameter()[0]
        replicas, ep = _replicas(config), config.parallel.ep
        summed = sum(_on_rank(count, config) if replicas > ep else count.common + count.cut for count in own)
        work: dict[Any, float] = {}
        for where, counts in self._unit.run.launches.items():
            if where.kind == "step" or where.stage >= 0:
                for operation, n in counts.items():
                    operation = _of_any_size(operation)
                    work[operation] = work.get(operation, 0.0) + n * summed / there
        return collectives(work, replicas, self._hardware.link(replicas))[1]

    def _optimizer_ms(self, config: Config, own: Sequence[Parameters]) -> float:
        """The weights of its share, and then the gathers of all that it holds."""
        (there, sharded), replicas = self._per_parameter(), _replicas(config)
        share = sum(_owned(count, config) for count in own) / sharded
        whole = sum(_on_rank(count, config) for count in own) / there
        work = phase(self._unit.run.launches, "optimizer")
        weights, gathers = ({_of_any_size(operation): n * scale for operation, n in work.items()} for scale in (share, whole))
        return cost(weights, self._hardware, 1).device_ms + collectives(gathers, replicas, self._hardware.link(replicas))[1]


def _cost_of(node: NodeWork, hardware: Hardware, experts: int) -> Cost:
    """Whatever is on the queue of all-to-alls, as counts of tokens are, takes its time there: pairs hide it with them."""
    found = cost(node.work, hardware, experts)
    return found._replace(device_ms=0.0, host_ms=0.0, exchange_ms=found.ms) if node.queue == "communication" else found


def _of_any_size(operation: Operation) -> Operation:
    """Not of the unit's number of processes."""
    return operation._replace(processes=0)


def _on_rank(count: Parameters, config: Config) -> int:
    return count.on_rank(config.parallel.tp, config.parallel.ep)


def _owned(count: Parameters, config: Config) -> float:
    """Of which a rank has the optimizer's state: what its group shares is sharded over its replicas alone."""
    return (count.total + count.common * (config.parallel.tp - 1)) / _replicas(config)


def _shares_embedding(config: Config) -> bool:
    """Whether two ranks sum the gradients of the embedding in a group of their own: the unit, on one rank, has none."""
    at, last = config.placement, config.stages - 1
    return config.model.mtp_depth > 0 and at.lanes == 1 and at.rank(0, 0) != at.rank(0, last)


def _replicas(config: Config) -> int:
    assert config.parallel.dp is not None
    return config.parallel.dp * config.parallel.tp * config.placement.lanes


def _shapes(config: Config) -> list[tuple[int, int, bool, bool]]:
    """Of every stage its dense blocks, its main ones, and whether it has the embedding and the head."""
    stages, model = config.stage_blocks(), config.model
    dense = [sum(block < model.dense_blocks for block in blocks) if model.moe_blocks else 0 for blocks in stages]
    return [(n, len(blocks) - n, s == 0, s == len(stages) - 1) for s, (n, blocks) in enumerate(zip(dense, stages))]
