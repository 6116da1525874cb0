"""Deferred weight gradients (pipehc.model.wgrad) for the linear layers of Megatron's models: its local ones, which have none
of their own, and TransformerEngine's; and for hyper-connections, whose gradients other queues than W's compute."""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from pipehc.megatron.feed_forward import FeedForward
from pipehc.megatron.te_wgrad import defer_te_layers, te_linear_layers
from pipehc.megatron.versions import weight_shards
from pipehc.model.hyper_connection import HyperConnection
from pipehc.model.products import add_product, product_adds
from pipehc.model.wgrad import Accumulate, Split, StandIns, linear


class Account(Protocol):
    """Told of every gradient that goes around autograd."""

    def owe(self, parameter: nn.Parameter) -> None:
        """In the backward: it will come."""

    def landed(self, parameter: nn.Parameter) -> None:
        """It is there."""


def install_deferral(model: nn.Module, account: Account | None = None, *, add_products: bool = False) -> None:
    """Route the weight gradients of every column- and row-parallel linear of `model` through `pipehc.model.wgrad`; call it once.

    That is all projections of attention, dense FFN, routed and shared experts, and the output layer, with any tensor and sequence
    parallelism: what the layers exchange of activations and their gradients stays in forward and backward. The bias that a
    column-parallel layer adds itself is deferred with its weight. The gradients of hyper-connections, and of the norms behind them,
    are computed in the backward, on whichever queue, and added by W. Embedding, router, other norms and biases that are added after
    a product was summed keep autograd's own. Without a store the gradients come at once, by the same arithmetic.

    A weight with several uses, as of a tied embedding and output layer, gets the gradient of each use once.

    TransformerEngine's layers are deferred too where TE can delay them; a warning of rank 0 says how many are not, and why.

    Args:
        model: a stage, or Megatron's DDP around one: then gradients go into `main_grad` through DDP's own hook, which also starts
            the overlapped reduction of a bucket whose gradients are complete.
        account: keeps track of these gradients.
        add_products: the product that computes a weight gradient adds it to `main_grad`, where torch can: it is then never rounded
            to the parameters' dtype, and the sum over micro-batches ends in other last digits.

    Raises:
        ValueError: for what replaces the weight gradient by another: defer_embedding_wgrad_compute, and weights in shards (GTP).
    """
    layers: list[Any] = [m for m in model.modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)]
    te_layers: list[Any] = te_linear_layers(model)
    for layer in layers + te_layers:
        if layer.config.defer_embedding_wgrad_compute:
            raise ValueError("defer_embedding_wgrad_compute = True: must be False, weight gradients are deferred by the schedule")
        if weight_shards(layer) != 1:
            raise ValueError(f"gtp_remat size = {weight_shards(layer)}: must be 1, weights in shards cannot be deferred")
    accumulators = _Accumulators(model, account, add_products)
    for layer in layers:
        layer._forward_impl = _forward_impl(layer, accumulators)
    for module in model.modules():
        if isinstance(module, FeedForward):
            module.defer(accumulators.of)
    stand_ins = StandIns(accumulators.account)
    for module in model.modules():
        if isinstance(module, HyperConnection):
            module.defer(stand_ins)
        if isinstance(module, TransformerLayer):
            for norm in (module.input_layernorm, module.pre_mlp_layernorm):
                setattr(norm, _STAND_INS, stand_ins)
    overlapped = isinstance(model, DistributedDataParallel) and model.ddp_config.overlap_grad_reduce
    at_once = defer_te_layers(te_layers, accumulators, overlapped=overlapped)
    if not dist.is_initialized() or dist.get_rank() == 0:
        for reason, count in at_once.items():
            text = f"pipehc: {count} TransformerEngine layers compute their weight gradients in the backward, not in W: {reason}"
            warnings.warn(text, stacklevel=2)


_STAND_INS = "pipehc_stand_ins"


def stand_ins_of(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What graphs take in the place of the parameters of a norm behind a hyper-connection; None where nothing is deferred."""
    found: StandIns | None = getattr(module, _STAND_INS, None)
    return found


class _Accumulators:
    """For a parameter: what autograd would do with a gradient of it. Adds it to `.grad`, then runs DDP's hook if there is one.

    Called with None, it only says that the gradient has been added to `main_grad`.
    """

    def __init__(self, model: nn.Module, account: Account | None, add_products: bool) -> None:
        self._ddp, self._account = model if isinstance(model, DistributedDataParallel) else None, account
        self._add_products = add_products
        self._made: dict[nn.Parameter, Callable[[torch.Tensor | None], None]] = {}

    def owe(self, parameters: Sequence[nn.Parameter]) -> None:
        if self._account is not None:
            for parameter in parameters:
                self._account.owe(parameter)

    def account(self, parameter: Any) -> Accumulate:
        """What takes its gradient, and is told before that it will come."""
        return Accumulate(self[parameter], owe=partial(self.owe, [parameter]))

    def of(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> Accumulate:
        """What takes the gradients of a linear layer, that of the weight as a product if it can be added as one."""
        owe = partial(self.owe, [weight] if bias is None else [weight, bias])
        return Accumulate(self[weight], None if bias is None else self[bias], owe, self._product(weight))

    def _product(self, weight: Any) -> Callable[[torch.Tensor, torch.Tensor], None] | None:
        if not self._add_products or self._ddp is None or not product_adds(weight, weight.main_grad):
            return None
        landed = self[weight]

        def add(dy: torch.Tensor, x: torch.Tensor) -> None:
            add_product(weight.main_grad, dy, x)
            # DDP's hook looks for a gradient, and does not add one that says that it has been added.
            weight.grad_added_to_main_grad = True
            landed(weight.detach())
            weight.grad_added_to_main_grad = False

        return add

    def __getitem__(self, parameter: nn.Parameter) -> Callable[[torch.Tensor | None], None]:
        if parameter not in self._made:
            self._made[parameter] = self._make(parameter)
        return self._made[parameter]

    def _make(self, parameter: nn.Parameter) -> Callable[[torch.Tensor | None], None]:
        hook = self._ddp._make_backward_post_hook(parameter) if self._ddp is not None else None

        def accumulate(gradient: torch.Tensor | None) -> None:
            if gradient is not None:
                with torch.no_grad():
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
                    if hook is not None:
                        hook()
            if self._account is not None:
                self._account.landed(parameter)

        return accumulate


def _forward_impl(layer: nn.Module, accumulators: _Accumulators) -> Callable[..., torch.Tensor]:
    upstream = type(layer)._forward_impl  # type: ignore[attr-defined]

    def forward(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        # Frozen layers owe nothing. A weight that is no parameter is a result of others, and its gradient must go on to them.
        given = [p for p in (weight, bias) if p is not None]
        parameters = [p for p in given if isinstance(p, nn.Parameter) and p.requires_grad]
        if not torch.is_grad_enabled() or len(parameters) < len(given):
            return upstream(layer, input=input, weight=weight, bias=bias, **kwargs)
        scattered = kwargs["sequence_parallel"]
        split = Split(kwargs["tp_group"], scattered) if scattered or kwargs["allreduce_dgrad"] else None
        return linear(input, weight, accumulators.of(*parameters), bias, split)

    return forward
