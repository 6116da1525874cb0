"""The cross entropy of logits that are read once, in their own dtype, and turn into their gradient where they lie."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipehc.megatron.fused import fused


def cross_entropy(logits: Tensor, targets: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """logits [..., V], targets [...] in 0 .. V - 1 -> losses [...] in nats; all arithmetic in fp32 or better.

    Targets below 0 do not count: their losses are 0, and so are the gradients of their logits.
    The backward, which can run once, writes the gradient of the logits into them: nobody else may need them by then. A product
    saves what it multiplied, not its result.

    group: its ranks have equal parts of the V logits, in their order, and all get the losses. Three numbers a token are exchanged.
    """
    losses: Tensor = _CrossEntropy.apply(logits, targets, group)
    return losses


def likeliest(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """logits [..., V], in parts as for `cross_entropy` -> the number of the largest, int64 [...]."""
    largest, where = logits.max(-1)
    if group.size() == 1:
        return where
    where += logits.shape[-1] * group.rank()
    everyone = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (largest, where) for _ in range(group.size())]
    dist.all_gather(everyone[: group.size()], largest.contiguous(), group=group)
    dist.all_gather(everyone[group.size() :], where.contiguous(), group=group)
    best = torch.stack(everyone[: group.size()]).argmax(0, keepdim=True)
    return torch.stack(everyone[group.size() :]).gather(0, best).squeeze(0)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.first = 0
        if group is None or group.size() == 1:
            losses, largest, total = cross_entropy_forward(logits, targets)
        else:
            ctx.first = logits.shape[-1] * group.rank()
            largest = cross_entropy_largest(logits)
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
            sums = cross_entropy_sums(logits, targets, largest, ctx.first)
            dist.all_reduce(sums, group=group)
            losses, total = cross_entropy_losses(sums, targets), sums[0]
        ctx.save_for_backward(logits, targets, largest, total)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, largest, total = ctx.saved_tensors
        cross_entropy_backward(logits, targets, largest, total, gradient, ctx.first)
        return logits, None, None


@fused()
def cross_entropy_forward(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, largest logit, sum of exp(logit - largest)) [...]."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = wide.amax(-1, keepdim=True)
    total = (wide - largest).exp().sum(-1, keepdim=True)
    losses = total.log() - (wide.gather(-1, targets.clamp(min=0).unsqueeze(-1)) - largest)
    return losses.squeeze(-1).masked_fill(targets < 0, 0), largest.squeeze(-1), total.squeeze(-1)


@fused()
def cross_entropy_largest(logits: Tensor) -> Tensor:
    """[...], of these logits."""
    return logits.amax(-1).to(torch.promote_types(logits.dtype, torch.float32))


@fused()
def cross_entropy_sums(logits: Tensor, targets: Tensor, largest: Tensor, first: int) -> Tensor:
    """[2, ...]: of these logits, which begin with number `first`, the sum of exp(logit - largest), and logit - largest of the
    target, 0 where it is not among them."""
    over = logits.to(largest.dtype) - largest.unsqueeze(-1)
    hit = torch.arange(first, first + logits.shape[-1], device=logits.device) == targets.unsqueeze(-1)
    return torch.stack((over.exp().sum(-1), torch.where(hit, over, 0.0).sum(-1)))


@fused()
def cross_entropy_losses(sums: Tensor, targets: Tensor) -> Tensor:
    """[...], of sums over all logits."""
    return (sums[0].log() - sums[1]).masked_fill(targets < 0, 0)


@fused(mutates=("logits",))
def cross_entropy_backward(
    logits: Tensor, targets: Tensor, largest: Tensor, total: Tensor, gradient: Tensor, first: int
) -> None:
    """Logits, which begin with number `first`, become their gradient. gradient: of the losses."""
    chances = (logits - largest.unsqueeze(-1)).exp() / total.unsqueeze(-1)
    hit = torch.arange(first, first + logits.shape[-1], device=logits.device) == targets.unsqueeze(-1)
    logits.copy_((chances - hit.to(chances.dtype)) * gradient.masked_fill(targets < 0, 0).unsqueeze(-1))
