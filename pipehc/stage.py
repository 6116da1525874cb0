"""One stage of the model as the schedule's executor sees it: forward, input gradient, weight gradient, per micro-batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pipehc.wgrad import WeightGradStore

Batch = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


class ModelStage:
    """Runs `model` for the micro-batches of one step; implements `pipehc.schedules.execute.Stage`.

    model: a StageModel: (hidden, tokens, labels) -> hidden, or the summed loss from the last stage. batch: micro-batch -> (tokens,
    labels), both int64 [b, s]; asked by the first and the last stage alone. loss_scale: the factor of the loss in the backward, for
    example 1 / tokens of the global batch. With gradients switched off, only `forward` may be called.
    """

    def __init__(self, model: nn.Module, batch: Batch, loss_scale: float) -> None:
        self._model, self._batch, self._loss_scale = model, batch, loss_scale
        self._live: dict[int, tuple[torch.Tensor | None, torch.Tensor, WeightGradStore]] = {}
        self._deferred: dict[int, WeightGradStore] = {}
        self.losses: dict[int, torch.Tensor] = {}  # micro-batch -> summed, unscaled loss, on the last stage

    def forward(self, microbatch: int, x: torch.Tensor | None) -> torch.Tensor | None:
        first, last = self._model.first, self._model.last
        tokens, labels = self._batch(microbatch) if first or last else (None, None)
        store = WeightGradStore()
        if x is not None and torch.is_grad_enabled():
            x.requires_grad_()
        with store.deferring():
            y = self._model(x, tokens if first else None, labels if last else None)
        if last:
            self.losses[microbatch] = y.detach()
            y = y * self._loss_scale
        if torch.is_grad_enabled():
            self._live[microbatch] = (x, y, store)
        return None if last else y.detach()

    def backward_input(self, microbatch: int, grad: torch.Tensor | None) -> torch.Tensor | None:
        x, y, store = self._live.pop(microbatch)
        torch.autograd.backward(y, grad)
        self._deferred[microbatch] = store
        return None if x is None else x.grad

    def backward_weight(self, microbatch: int) -> None:
        self._deferred.pop(microbatch).flush()

    def recompute(self, microbatch: int) -> None:
        """Nothing is dropped after the forward yet, so there is nothing to rebuild."""
