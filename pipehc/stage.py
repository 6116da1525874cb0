"""One stage of the model as the schedule's executor sees it: forward, input gradient, weight gradient, per micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from pipehc.comm.queues import Queue
from pipehc.recompute import Chain, Pass
from pipehc.wgrad import WeightGradStore

Batch = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


class ModelStage:
    """Runs a stage for the micro-batches of one step; implements `pipehc.schedules.execute.Stage`.

    chain: of a StageModel; its result is the streams, or the summed loss of the last stage. queues: see `comm.queues.make_queues`.
    batch: micro-batch -> (tokens, labels), both int64 [b, s]; asked by the first and the last stage alone. loss_scale: the factor
    of the loss in the backward, for example 1 / tokens of the global batch. recompute: drop after the forward what
    hyper-connections can rebuild. With gradients switched off, only `forward` may be called.
    """

    def __init__(
        self, chain: Chain, queues: Mapping[str, Queue], batch: Batch, loss_scale: float, *, recompute: bool = False
    ) -> None:
        self._chain, self._queues, self._batch, self._loss_scale, self._recompute = chain, queues, batch, loss_scale, recompute
        needed = {name for piece in chain.pieces for name in piece.inputs}
        self._first, self._last = "tokens" in needed, "labels" in needed
        self._live: dict[int, tuple[Pass, WeightGradStore]] = {}
        self._deferred: dict[int, WeightGradStore] = {}
        self.losses: dict[int, torch.Tensor] = {}  # micro-batch -> summed, unscaled loss, on the last stage

    def forward(self, microbatch: int, x: torch.Tensor | None) -> torch.Tensor | None:
        given: dict[str, Any] = {}
        if x is not None:
            given["x0"] = x
        if self._first or self._last:
            tokens, labels = self._batch(microbatch)
            given |= {"tokens": tokens} if self._first else {}
            given |= {"labels": labels} if self._last else {}
        store = WeightGradStore()
        run = Pass(self._chain, self._queues, given, recompute=self._recompute, scope=store.deferring)
        run.forward_all()
        y: torch.Tensor = run.result()
        if torch.is_grad_enabled():
            self._live[microbatch] = run, store
        if self._last:
            self.losses[microbatch] = y
            return None
        return y

    def backward_input(self, microbatch: int, grad: torch.Tensor | None) -> torch.Tensor | None:
        run, store = self._live.pop(microbatch)
        if self._last:
            grad = torch.full_like(self.losses[microbatch], self._loss_scale)
        assert grad is not None
        run.seed(self._chain.result, grad)
        run.backward_all()
        self._deferred[microbatch] = store
        return None if self._first else run.gradient("x0")

    def backward_weight(self, microbatch: int) -> None:
        self._deferred.pop(microbatch).flush()

    def recompute(self, microbatch: int) -> None:
        self._live[microbatch][0].rebuild()
