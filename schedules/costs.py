"""What a stage and a message cost: the numbers that simulation and search work with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

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
    Raises ValueError for a negative time or factor.
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

    @property
    def _weight_rows(self) -> tuple[tuple[float, ...], ...]:
        weights = self.weights or (1.0,)
        return weights if isinstance(weights[0], tuple) else (weights,)  # type: ignore[return-value]

    @cached_property
    def pair_scale(self) -> float:
        """Factor on both halves of an overlapped pair."""
        return 1.0 if self.pair is None else self.pair / (self.f + self.b + self.w)

    def time(self, kind: str) -> float:
        """Time of one action of `kind` (F B I W R) on 1/P of the model."""
        return {"F": self.f, "I": self.b, "W": self.w, "B": self.b + self.w, "R": self.r}[kind]

    def stage_factors(self, placement: Placement) -> tuple[tuple[float, ...], ...]:
        """[lane][stage]: the stage's size in units of 1/P of the model, times its weight.

        Raises ValueError if there are weights for several lanes, but not for those of the placement.
        """
        rows = self._weight_rows
        if len(rows) not in (1, placement.lanes):
            raise ValueError(f"costs.weights for {len(rows)} lanes: the placement has {placement.lanes}")
        stages = placement.stages
        return tuple(
            tuple(placement.share * _mean(rows[lane % len(rows)], s / stages, (s + 1) / stages) for s in range(stages))
            for lane in range(placement.lanes)
        )

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


def _mean(profile: tuple[float, ...], low: float, high: float) -> float:
    """Mean of the piecewise constant `profile` over [low, high] of [0, 1]."""
    parts = len(profile)
    total = sum(x * max(0.0, min(high, (i + 1) / parts) - max(low, i / parts)) for i, x in enumerate(profile))
    return total / (high - low) if len(set(profile)) > 1 else profile[0]
