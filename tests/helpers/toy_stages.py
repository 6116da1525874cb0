"""Toy stages in fp64 that split I from W by hand, alone and in overlapped pairs, and what one process computes with them."""

import torch

ROWS, WIDTH = 3, 5


class ToyStage:
    """x + tanh(x W^T), with a loss on the last stage. Splits I from W by hand, and counts what is alive."""

    def __init__(self, index, stages):
        self.index, self.last = index, index == stages - 1
        generator = torch.Generator().manual_seed(100 + index)
        self.weight = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / 3
        self.grad = torch.zeros_like(self.weight)
        self.saved, self.deferred, self.losses = {}, {}, {}

    def forward(self, microbatch, x):
        if self.index == 0:
            x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(microbatch), dtype=torch.float64)
        z = torch.tanh(x @ self.weight.T)
        y = x + z
        self.saved[microbatch] = (x, z, y)
        if self.last:
            self.losses[microbatch] = float(y.square().sum())
            return None
        return y

    def backward_input(self, microbatch, grad):
        x, z, y = self.saved.pop(microbatch)
        grad = 2 * y if self.last else grad
        dz = grad * (1 - z * z)
        self.deferred[microbatch] = (dz, x)
        return grad + dz @ self.weight if self.index else None

    def backward_weight(self, microbatch):
        dz, x = self.deferred.pop(microbatch)
        self.grad += dz.T @ x

    def recompute(self, microbatch):
        x, _, y = self.saved[microbatch]
        self.saved[microbatch] = (x, torch.tanh(x @ self.weight.T), y)


def reference(stages, microbatches, forward=False):
    chain = [ToyStage(i, stages) for i in range(stages)]
    for m in range(microbatches):
        value = None
        for stage in chain:
            value = stage.forward(m, value)
        for stage in reversed(chain if not forward else []):
            value = stage.backward_input(m, value)
            stage.backward_weight(m)
    return chain


class OverlapToyStage(ToyStage):
    """Interleaves pairs as far as it has something to interleave, and writes down what happens when."""

    def __init__(self, index, stages, log):
        super().__init__(index, stages)
        self.log = log

    def recompute(self, microbatch):
        self.log.append(("R", self.index, microbatch))
        super().recompute(microbatch)

    def overlap(self, microbatch, x, other, other_microbatch, grad):
        return ToyPair(self, microbatch, x, other, other_microbatch, grad)


class ToyPair:
    def __init__(self, stage, microbatch, x, other, other_microbatch, grad):
        assert (x is None) == (stage.index == 0) and (grad is None) == other.last
        self.stage, self.microbatch, self.x, self.other, self.other_microbatch, self.grad = (
            stage, microbatch, x, other, other_microbatch, grad
        )  # fmt: skip
        if ("R", other.index, other_microbatch) in stage.log:
            stage.log.append(("pair after R", other.index, other_microbatch))

    def output(self):
        self.stage.log.append(("output", self.stage.index, self.microbatch))
        return self.stage.forward(self.microbatch, self.x)

    def input_gradient(self):
        self.stage.log.append(("gradient", self.other.index, self.other_microbatch))
        return self.other.backward_input(self.other_microbatch, self.grad)

    def finish(self):
        self.stage.log.append(("finish", self.other.index, self.other_microbatch))
