"""Stages that sleep instead of computing: many ranks on few cores then run truly side by side.

A message is a float32 row: element 0 is the micro-batch, element 1 counts the stages it went through. Every stage checks both, so a
scheduler that skips, repeats or mixes anything up fails instead of looking fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn


@dataclass(frozen=True)
class Work:
    """What one rank does for one micro-batch: seconds of F, I and W over all its stages, and bytes of a message."""

    f: float
    b: float
    w: float
    bytes: int

    def split(self, chunks: int) -> Work:
        """The work of one of `chunks` equal stages."""
        return replace(self, f=self.f / chunks, b=self.b / chunks, w=self.w / chunks)

    @property
    def numel(self) -> int:
        return max(2, self.bytes // 4)

    def message(self, microbatch: int, hops: int) -> torch.Tensor:
        """float32 [1, numel]; all but two elements are whatever was in memory."""
        tensor = torch.empty(1, self.numel)
        tensor[0, 0], tensor[0, 1] = microbatch, hops
        return tensor


def sleep_until(deadline: float) -> None:
    """Sleeps to a time of time.monotonic: bookkeeping since the start of an action is part of its time, not added to it."""
    if (rest := deadline - time.monotonic()) > 0:
        time.sleep(rest)


class Chain:
    """One stage of the chain of stages: where it stands, how long its work takes, what it has done in this step."""

    def __init__(self, work: Work, index: int, stages: int) -> None:
        self.work, self.index, self.stages = work, index, stages
        self.done = {"F": 0, "I": 0, "W": 0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        until = time.monotonic() + self.work.f
        self._check(x, self.index, "input")
        y = self.work.message(int(x[0, 0]), self.index + 1)
        self._finish("F", until)
        return y

    def input_gradient(self, grad: torch.Tensor, microbatch: int) -> torch.Tensor:
        until = time.monotonic() + self.work.b
        self._check(grad, self.stages - 1 - self.index, "gradient", microbatch)
        dx = self.work.message(microbatch, self.stages - self.index)
        self._finish("I", until)
        return dx

    def weight_gradient(self) -> None:
        self._finish("W", time.monotonic() + self.work.w)

    def check_step(self, microbatches: int) -> None:
        """Raises RuntimeError unless every piece of work was done once for each micro-batch; starts counting anew."""
        if self.done != dict.fromkeys("FIW", microbatches):
            raise RuntimeError(f"stage {self.index} did {self.done}, expected {microbatches} of each")
        self.done = {"F": 0, "I": 0, "W": 0}

    def _finish(self, kind: str, until: float) -> None:
        sleep_until(until)
        self.done[kind] += 1

    def _check(self, tensor: torch.Tensor, hops: int, what: str, microbatch: int | None = None) -> None:
        found = int(tensor[0, 0]), int(tensor[0, 1])
        if found[1] != hops or microbatch not in (None, found[0]):
            raise RuntimeError(f"stage {self.index}: {what} of (micro-batch, hops) {found}, expected ({microbatch}, {hops})")


class SleepingStage:
    """A stage for pipehc's executor."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain

    def forward(self, microbatch: int, x: torch.Tensor | None) -> torch.Tensor | None:
        y = self.chain.forward(self.chain.work.message(microbatch, 0) if x is None else x)
        return None if self.chain.index == self.chain.stages - 1 else y

    def backward_input(self, microbatch: int, grad: torch.Tensor | None) -> torch.Tensor | None:
        dx = self.chain.input_gradient(self.chain.work.message(microbatch, 0) if grad is None else grad, microbatch)
        return dx if self.chain.index else None

    def backward_weight(self, microbatch: int) -> None:
        self.chain.weight_gradient()

    def recompute(self, microbatch: int) -> None:
        """Nothing is ever dropped."""


class SleepingModule(nn.Module):
    """A stage for autograd. Input and weight gradients are nodes of their own, so that a scheduler can run them apart.

    defer: asked in the backward whether it takes the weight gradient, a closure, for later; then both are one node.
    """

    def __init__(self, chain: Chain, defer: Callable[[Callable[[], None]], bool] | None = None) -> None:
        super().__init__()
        self.chain, self.defer = chain, defer
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.defer is not None:
            return _Both.apply(x, self.weight, self)
        return _Meet.apply(_Input.apply(x, self.chain), _Weight.apply(self.weight, self.chain), self.chain)


def loss(y: torch.Tensor, *_: object) -> torch.Tensor:
    """A scalar whose gradient starts the way back."""
    return _Loss.apply(y)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        ctx.shape, ctx.microbatch = y.shape, float(y[0, 0])
        return y[0, 1].clone()

    @staticmethod
    def backward(ctx, grad):
        dy = torch.empty(ctx.shape)
        dy[0, 0], dy[0, 1] = ctx.microbatch, 0
        return dy


class _Input(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, chain):
        ctx.chain, ctx.microbatch = chain, int(x[0, 0])
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.chain.input_gradient(grad, ctx.microbatch), None


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, chain):
        ctx.chain = chain
        return weight.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.chain.weight_gradient()
        return grad, None


class _Meet(torch.autograd.Function):
    """The forward's work; its backward costs nothing and leads to both gradients."""

    @staticmethod
    def forward(ctx, x, weight, chain):
        return chain.forward(x)

    @staticmethod
    def backward(ctx, grad):
        return grad, torch.zeros(1), None


class _Both(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, module):
        ctx.module, ctx.microbatch = module, int(x[0, 0])
        return module.chain.forward(x)

    @staticmethod
    def backward(ctx, grad):
        chain = ctx.module.chain
        dx = chain.input_gradient(grad, ctx.microbatch)
        if not ctx.module.defer(chain.weight_gradient):
            chain.weight_gradient()
        return dx, None, None
