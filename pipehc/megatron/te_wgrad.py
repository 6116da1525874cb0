"""Deferred weight gradients (pipehc.model.wgrad) for TransformerEngine's linear layers, through TE's own delayed computation.

A TE layer has a `wgrad_store`. Where that is enabled, the backward puts what it takes to compute a weight gradient there, and
`backward_dw` takes it out and computes it. Here every forward gets a store of its own, which hands `backward_dw` on to the store
of its micro-batch; so W may come in any order, and nothing has to be set where the layers are built.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from pipehc.model.wgrad import WeightGradStore, open_store


class Accumulators(Protocol):
    """Where gradients go."""

    def owe(self, parameters: Sequence[nn.Parameter]) -> None:
        """A gradient of each will come later."""

    def __getitem__(self, parameter: nn.Parameter) -> Callable[[torch.Tensor | None], None]:
        """What takes one; None says that it has been added to `main_grad`."""


def te_linear_layers(model: nn.Module) -> list[nn.Module]:
    """TransformerEngine's linear layers in `model`, and those that Megatron derives from them."""
    return [m for m in model.modules() if _te_class(m) is not None and getattr(m, "wgrad_store", None) is not None]


def defer_te_layers(layers: Sequence[nn.Module], accumulators: Accumulators, *, overlapped: bool) -> Counter[str]:
    """Route the weight gradients of `layers` through `pipehc.model.wgrad` where TE can delay them.

    overlapped: DDP starts reductions in the backward, and insists on a gradient for each parameter there.

    Returns reason -> number of the layers whose gradients come in the backward.
    """
    at_once: Counter[str] = Counter()
    for layer in layers:
        weights = [p for name, p in layer.named_parameters(recurse=False) if name.startswith("weight")]
        if not any(p.requires_grad for p in weights):
            continue
        reason = _reason_against(layer, weights, overlapped)
        if reason is None:
            layer.register_forward_pre_hook(_Delayed(layer, weights, accumulators).begin)
        else:
            at_once[reason] += 1
            layer.register_forward_pre_hook(_add_always)
    return at_once


def _te_class(layer: nn.Module) -> type[Any] | None:
    return next((c for c in type(layer).__mro__ if c.__module__.partition(".")[0] == "transformer_engine"), None)


def _reason_against(layer: Any, weights: Sequence[nn.Parameter], overlapped: bool) -> str | None:
    if not all(p.requires_grad for p in weights):
        return "some of their weights are frozen"
    if layer.use_bias:
        return "TE computes the gradient of a bias together with that of the weight, and DDP looks for it before"
    if layer.config.tp_comm_overlap:
        return "tp_comm_overlap exchanges tensors inside the products"
    if overlapped and not layer.fuse_wgrad_accumulation:
        return "overlap_grad_reduce without gradient_accumulation_fusion wants every gradient in the backward"
    return None


def _add_always(layer: Any, _: Any) -> None:
    """In the first micro-batch to go forward, TE overwrites `main_grad` rather than adding to it (gradient_accumulation_fusion).
    That is right only if its gradient also comes first; the job zeroes `main_grad`, so adding always is."""
    if torch.is_grad_enabled() and hasattr(layer, "is_first_microbatch"):
        layer.is_first_microbatch = False


class _Delayed:
    """A layer whose weight gradients wait for W."""

    def __init__(self, layer: Any, weights: Sequence[nn.Parameter], accumulators: Accumulators) -> None:
        self._layer, self._weights, self._accumulators = layer, weights, accumulators
        self._te: Any = _te_class(layer)
        self._at_once = layer.wgrad_store

    def begin(self, layer: Any, inputs: Any) -> None:
        """Before a forward of the layer."""
        _add_always(layer, inputs)
        store = open_store()
        layer.wgrad_store = self._at_once if store is None or not torch.is_grad_enabled() else self._handing_on(store)

    def _handing_on(self, owed: WeightGradStore) -> Any:
        store = type(self._at_once)(True)
        put = store.put

        def put_and_owe(tensors: Any, compute: Any) -> None:
            put(tensors, compute)
            self._accumulators.owe(self._weights)
            owed.put(partial(self._compute, store))

        store.put = put_and_owe
        return store

    @torch.no_grad()
    def _compute(self, store: Any) -> None:
        # TE either adds to main_grad itself, or sets `grad`, whatever is there.
        before = [weight.grad for weight in self._weights]
        for weight in self._weights:
            weight.grad = None
        self._layer.wgrad_store = store
        # Not the layer's own backward_dw: Megatron's do nothing unless its configuration has delay_wgrad_compute.
        self._te.backward_dw(self._layer)
        for weight, old in zip(self._weights, before):
            gradient, weight.grad = weight.grad, old
            self._accumulators[weight](gradient)
