"""What a stage and a message cost: the numbers that simulation and search work with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from pipehc.schedules.node_costs import Key, NodeCost, Nodes, Table, frozen_nodes, frozen_table
from pipehc.schedules.pair_order import kind_of
from pipehc.schedules.placement import Placement

Weights = tuple[float, ...] | tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Costs:
    """Times of 1/P of the model for one micro-batch, in any one unit: a stage that holds half of that costs half.

    f: forward. b: input gradient alone (a full backward is b + w). w: weight gradient. r: recompute.
    high: the part of f, and of b, that runs on the high-priority queue where the program has one.
    pair: an overlapped forward and full backward, together; default f + b + w, that is, no gain.
    pair_leave: how much of a pair has passed, as fractions, when its forward's output and when its input gradient leave; the pair
        then starts when the inputs of both halves are there, as where nodes are interleaved. Neither leaves sooner than its half
        takes alone. Default None: first the forward, then the backward, each when its own input is there.
    link: how long one stage message holds its directed link, whatever the stage's size; latency: added after it.
    weights: factors on equal parts of the model, from its entry to its exit, one tuple for all lanes or one per lane. A stage
        takes the mean over the part it holds, so the same weights serve placements of P and of 2P stages.
    microbatch_weights: factors on micro-batches 0, 1, ... (sequences of uneven length).
    activation_bytes: what the forward of 1/P of the model keeps for one micro-batch; scaled by the weights like time.
    table: the time of every action on its own stage instead: (stage, kind) -> time of one micro-batch, kind F, B (the input
        gradient alone, an I), W or R. It is for placements of just these stages; f, b, w and r are not used then.
    nodes: what these actions are made of, (stage, kind) -> (name, queue, time) in the order in which they are issued: a backward
        begins with the last block. name: BLOCK.KIND as in `pair_order`; queue: compute, high or communication (all-to-alls, one
        in-order queue a rank). Each waits for the one before it, and for its queue. Pairs are then simulated node by node. An
        action with nodes needs no entry in the table; if it has one, they must add up to it.
    at_once: kinds of nodes whose weight gradients an I computes itself, rather than leave them to its W; in pairs all have turns.
    one_worker: as on a CPU: what is on the high-priority queue is done by the compute queue, in its place; all-to-alls start when
        they are issued, also beside each other.
    Raises ValueError for a negative time or factor, or what cannot be together.
    """

    f: float = 1.0
    b: float = 1.0
    w: float = 1.0
    r: float = 0.0
    high: float = 0.0
    pair: float | None = None
    pair_leave: tuple[float, float] | None = None
    link: float = 0.0
    latency: float = 0.0
    weights: Weights | None = None
    microbatch_weights: tuple[float, ...] | None = None
    activation_bytes: float = 0.0
    table: Mapping[Key, float] | Table | None = None
    nodes: Mapping[Key, Sequence[tuple[str, str, float]]] | Nodes | None = None
    at_once: tuple[str, ...] = ()
    one_worker: bool = False

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}  # of from_json

    def __post_init__(self) -> None:
        for key in ("f", "b", "w", "r", "high", "pair", "link", "latency", "activation_bytes"):
            value = getattr(self, key)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"costs.{key} = {value}: must be a number >= 0")
        if self.f + self.b + self.w <= 0:
            raise ValueError(f"costs f = {self.f}, b = {self.b}, w = {self.w}: at least one must be > 0")
        if self.high > min(self.f, self.b):
            raise ValueError(f"costs.high = {self.high}: it is a part of f = {self.f} and of b = {self.b}, and cannot be more")
        if self.pair_leave is not None and not 0 <= self.pair_leave[0] <= self.pair_leave[1] <= 1:
            raise ValueError(f"costs.pair_leave = {self.pair_leave}: must be two fractions of a pair, 0 <= output <= gradient <= 1")
        if self.weights is not None and not (self.weights and all(_positive(row) for row in self._weight_rows)):
            raise ValueError(f"costs.weights = {self.weights}: needs one or more factors > 0, or such a tuple per lane")
        if self.microbatch_weights is not None and not _positive(self.microbatch_weights):
            raise ValueError(f"costs.microbatch_weights = {self.microbatch_weights}: needs one or more factors > 0")
        if self.by_stage:
            self._freeze()
        if self.at_once and not self.nodes:
            raise ValueError(f"costs.at_once = {self.at_once}: needs costs.nodes, which say what these weight gradients take")

    def _freeze(self) -> None:
        object.__setattr__(self, "table", frozen_table(self.table or {}))
        object.__setattr__(self, "nodes", frozen_nodes(self.nodes or {}))
        for key, unset in (("high", 0.0), ("pair", None), ("pair_leave", None), ("weights", None)):
            if getattr(self, key) != unset:
                raise ValueError(
                    f"costs.{key} = {getattr(self, key)}: not with costs.table or costs.nodes, which say it themselves"
                )
        for (stage, kind), time in self._table.items():
            parts = sum(node.ms for node in self._nodes.get((stage, kind), ()))
            if (stage, kind) in self._nodes and abs(parts - time) > 0.01 * max(time, parts):
                key = f"[{stage}, {kind!r}]"
                raise ValueError(f"costs.nodes{key} add up to {parts:g}, but costs.table{key} = {time:g}")
        if not any(self._times.values()):
            raise ValueError("costs.table and costs.nodes: at least one time must be > 0")

    def to_json(self) -> str:
        """As one JSON object of what is not the default."""
        from pydantic import TypeAdapter  # takes longer to import than all of this package

        return TypeAdapter(Costs).dump_json(self, exclude_defaults=True).decode()

    @classmethod
    def from_json(cls, text: str) -> Costs:
        """What `to_json` wrote. Raises ValueError for what is no Costs."""
        from pydantic import TypeAdapter

        return TypeAdapter(Costs).validate_json(text)

    @property
    def by_stage(self) -> bool:
        """Whether there are times of every stage, rather than of 1/P of the model."""
        return self.table is not None or self.nodes is not None

    @property
    def stages(self) -> int | None:
        """For placements of how many stages they are, if there are times of every stage."""
        return 1 + max(stage for stage, _ in self._times) if self.by_stage else None

    @cached_property
    def _table(self) -> dict[Key, float]:
        return dict(self.table or ())

    @cached_property
    def _nodes(self) -> dict[Key, tuple[NodeCost, ...]]:
        return dict(self.nodes or ())  # type: ignore[arg-type]

    @cached_property
    def _times(self) -> dict[Key, float]:
        return self._table | {key: sum(node.ms for node in nodes) for key, nodes in self._nodes.items()}

    @property
    def _weight_rows(self) -> tuple[tuple[float, ...], ...]:
        weights = self.weights or (1.0,)
        return weights if isinstance(weights[0], tuple) else (weights,)  # type: ignore[return-value]

    @cached_property
    def pair_scale(self) -> float:
        """Factor on both halves of an overlapped pair."""
        return 1.0 if self.pair is None else self.pair / (self.f + self.b + self.w)

    def time(self, kind: str, stage: int = 0) -> float:
        """Time of one action of `kind` (F B I W R), on 1/P of the model or, if there are times of every stage, on `stage`.

        I without the weight gradients of `at_once`: they run beside its all-to-alls, or after them; W without them.

        Raises ValueError, naming the key, if it is one of these that is not there.
        """
        if not self.by_stage:
            return {"F": self.f, "I": self.b, "W": self.w, "B": self.b + self.w, "R": self.r}[kind]
        if kind == "B":
            return self.time("I", stage) + self.time("W", stage) + self._at_once(stage)
        key = stage, "B" if kind == "I" else kind
        if key not in self._times:
            raise ValueError(f"costs.table: no entry for ({stage}, {key[1]!r})" + _those(self._times))
        return self._times[key] - (self._at_once(stage) if kind == "W" else 0.0)

    def computed_at_once(self, stage: int) -> dict[str, float]:
        """What the weight gradients take that an I computes itself, by node."""
        nodes = self._nodes.get((stage, "W"), ())
        return {node.name: node.ms for node in nodes if kind_of(node.name) in self.at_once}

    def _at_once(self, stage: int) -> float:
        return sum(self.computed_at_once(stage).values()) if self.at_once else 0.0

    def nodes_of(self, kind: str, stage: int) -> tuple[NodeCost, ...] | None:
        """What one action of `kind` (F I W R) is made of; None if there are no nodes at all, or none for R.

        Raises ValueError, naming the key, if there are nodes, but not these.
        """
        key = stage, "B" if kind == "I" else kind
        if self._nodes and kind != "R" and key not in self._nodes:
            raise ValueError(f"costs.nodes: no entry for ({stage}, {key[1]!r})" + _those(self._nodes))
        return self._nodes.get(key)

    def least_work(self, kind: str, stage: int) -> float:
        """Of `time`, what is on the compute queue, at least: no two actions of a rank do theirs at the same time."""
        nodes = self.nodes_of(kind, stage)
        if nodes is None:
            beside = self.high if kind in "FI" and not self.one_worker else 0.0
            return self.time(kind, stage) - beside
        own = sum(node.ms for node in nodes if node.queue == "compute" or (self.one_worker and node.queue == "high"))
        return own + {"I": 1, "W": -1}.get(kind, 0) * self._at_once(stage)

    def stage_factors(self, placement: Placement) -> tuple[tuple[float, ...], ...]:
        """[lane][stage]: what `time` is to be multiplied with: the stage's size in units of 1/P of the model, times its weight.

        Raises ValueError if there are weights for several lanes, but not for those of the placement, or times of other stages.
        """
        stages = placement.stages
        if self.by_stage:
            if more := [key for key in self._times if key[0] >= stages]:
                raise ValueError(f"costs.table has ({more[0][0]}, {more[0][1]!r}): the placement has stages 0..{stages - 1}")
            return ((1.0,) * stages,) * placement.lanes
        rows = self._weight_rows
        if len(rows) not in (1, placement.lanes):
            raise ValueError(f"costs.weights for {len(rows)} lanes: the placement has {placement.lanes}")
        return tuple(
            tuple(placement.share * _mean(rows[lane % len(rows)], s / stages, (s + 1) / stages) for s in range(stages))
            for lane in range(placement.lanes)
        )

    def sizes(self, placement: Placement) -> tuple[tuple[float, ...], ...]:
        """[lane][stage]: what `activation_bytes` is to be multiplied with."""
        return ((placement.share,) * placement.stages,) * placement.lanes if self.by_stage else self.stage_factors(placement)

    def microbatch_factors(self, microbatches: int) -> tuple[float, ...]:
        """One factor per micro-batch. Raises ValueError if `microbatch_weights` are there, but not that many."""
        factors = self.microbatch_weights
        if factors is None:
            return (1.0,) * microbatches
        if len(factors) != microbatches:
            raise ValueError(f"costs.microbatch_weights: {len(factors)} factors for {microbatches} micro-batches")
        return factors


def _positive(factors: tuple[float, ...]) -> bool:
    return len(factors) > 0 and all(0 < x < float("inf") for x in factors)


def _those(found: Mapping[Key, object]) -> str:
    return f"; it has stages {', '.join(map(str, sorted({stage for stage, _ in found})))}" if found else "; it is empty"


def _mean(profile: tuple[float, ...], low: float, high: float) -> float:
    """Mean of the piecewise constant `profile` over [low, high] of [0, 1]."""
    parts = len(profile)
    total = sum(x * max(0.0, min(high, (i + 1) / parts) - max(low, i / parts)) for i, x in enumerate(profile))
    return total / (high - low) if len(set(profile)) > 1 else profile[0]
