"""What pipehc.megatron.te_wgrad relies on of TransformerEngine, on CPU: a linear layer that can delay its weight gradients.

With `fuse_wgrad_accumulation` it adds them to `main_grad` itself, or overwrites that in the first micro-batch to go forward.
"""

import math
from queue import Queue

import torch
from torch import nn


class WeightGradStore:
    def __init__(self, delay_wgrad_compute=False, ub_bulk_wgrad=False):
        self.enabled = delay_wgrad_compute
        self.context = Queue() if delay_wgrad_compute else None

    def delay_wgrad_compute(self):
        return self.enabled

    def put(self, tensors, compute):
        assert self.enabled
        self.context.put((tensors, compute))

    def pop(self):
        assert self.enabled
        tensors, compute = self.context.get(block=False)
        return compute(*tensors), tensors


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layer, is_first_microbatch):
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.store, ctx.has_bias = weight, layer.wgrad_store, bias is not None
        ctx.fuse, ctx.add = layer.fuse_wgrad_accumulation, not is_first_microbatch
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors

        def compute(x, dy):
            rows = dy.reshape(-1, dy.shape[-1])
            gradient = rows.t().matmul(x.reshape(-1, x.shape[-1]))
            bias = rows.sum(0) if ctx.has_bias else None
            if ctx.fuse:
                gradient = ctx.weight.main_grad.add_(gradient) if ctx.add else ctx.weight.main_grad.copy_(gradient)
            return gradient, bias

        gradient = bias = None
        if ctx.store.delay_wgrad_compute():
            ctx.store.put([x, dy], compute)
        else:
            gradient, bias = compute(x, dy)
        if ctx.fuse:
            ctx.weight.grad_added_to_main_grad = True
            gradient = torch.full_like(weight, math.nan)  # of no meaning: DDP must not look at it
        return dy.matmul(weight), gradient, bias, None, None


class Linear(nn.Module):
    __module__ = "transformer_engine.stand_in"

    def __init__(self, inputs, outputs, bias=False, fuse_wgrad_accumulation=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.use_bias, self.fuse_wgrad_accumulation = bias, fuse_wgrad_accumulation
        self.wgrad_store = WeightGradStore()

    def forward(self, x, is_first_microbatch):
        return Product.apply(x, self.weight, self.bias, self, is_first_microbatch)

    def backward_dw(self):
        assert self.wgrad_store.delay_wgrad_compute()
        (gradient, _), _ = self.wgrad_store.pop()
        if not self.fuse_wgrad_accumulation:
            self.weight.grad = gradient


class MegatronLinear(Linear):
    """As Megatron derives its layers from TE's."""

    __module__ = "te_stand_in"

    def __init__(self, config, weight, bias, fuse):
        super().__init__(*weight.shape[::-1], bias=bias, fuse_wgrad_accumulation=fuse)
        self.weight, self.config, self.is_first_microbatch = weight, config, True

    def forward(self, x):
        y = super().forward(x, self.is_first_microbatch)
        self.is_first_microbatch = False
        return y, None

    def backward_dw(self):
        assert self.config.delay_wgrad_compute


def put_te_layers(model, *, fuse, bias=False):
    """The stand-in in the place of every linear of the decoder of a GPTModel without tensor parallelism."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    for parent in list(model.decoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ColumnParallelLinear | RowParallelLinear):
                setattr(parent, name, MegatronLinear(model.config, child.weight, bias, fuse))
    return model
