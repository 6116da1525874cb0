"""The composite gain of the whole depth, over all pipeline stages, and the feedback with which Harmonized HC holds it.

Every stage knows the token means of its own maps H_res. One small sum over all ranks a step, off the critical path, gives every
rank the maps of all sub-layers, hence the same product, the same gain and the same s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipehc.model.hyper_connection import HyperConnection, composite, composite_gain


class CompositeGain:
    """Gathers the applied maps of a step. `connections`: those on this rank, by sub-layer (2 * block, + 1 for the FFN)."""

    def __init__(self, connections: Mapping[int, HyperConnection], sublayers: int, streams: int) -> None:
        self._connections, self._sublayers, self._streams = connections, sublayers, streams
        self._sum: torch.Tensor | None = None
        self._work: dist.Work | None = None

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """The maps of forwards inside count: those of training steps do, those of evaluations do not."""
        for connection in self._connections.values():
            connection.track = True
        try:
            yield
        finally:
            for connection in self._connections.values():
                connection.track = False

    def start(self, device: torch.device) -> None:
        """Starts the sum over all ranks of the maps of this step. Collective, asynchronous."""
        n = self._streams
        total = torch.zeros(self._sublayers, n * n + 1, device=device)
        for sublayer, connection in self._connections.items():
            mean = connection.take_mean_h_res()
            if mean is not None:
                total[sublayer, :-1] = mean.flatten()
                total[sublayer, -1] = 1  # every rank that holds a stage sees equally many tokens
        self._sum, self._work = total, dist.all_reduce(total, async_op=True)

    def finish(self) -> float:
        """Largest absolute row or column sum of H_L ... H_1, each the mean over the tokens of the step; the same on every rank."""
        assert self._sum is not None and self._work is not None
        self._work.wait()
        maps = (self._sum[:, :-1] / self._sum[:, -1:]).cpu().view(-1, self._streams, self._streams)
        self._sum = self._work = None
        return composite_gain(composite(maps, self._streams))


@dataclass
class GainFeedback:
    """Sets s of Harmonized HC (spec section 2): ema <- 0.95 ema + 0.05 G; s <- clamp(s * (target / ema)^power, smallest, 1).

    G is the *applied* composite gain: feeding back on the raw maps drifts. The first G starts the average.
    """

    target: float
    power: float
    smallest: float
    s: float = 1.0
    average: float | None = None

    def update(self, gain: float) -> float:
        """The s of the next step."""
        self.average = gain if self.average is None else 0.95 * self.average + 0.05 * gain
        self.s = min(1.0, max(self.smallest, self.s * (self.target / self.average) ** self.power))
        return self.s

    def state(self) -> dict[str, Any]:
        """JSON-able; floats survive JSON to the last bit."""
        return {"s": self.s, "average": self.average}

    def load(self, state: Mapping[str, Any]) -> None:
        self.s, self.average = state["s"], state["average"]
