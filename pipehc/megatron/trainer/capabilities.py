"""What the layers of the trainer's model compute with, and why not with more: one table, said at the start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from pipehc.kernels.backend import MAX_STREAMS, backend_of
from pipehc.megatron.feed_forward import Experts, FeedForward
from pipehc.model.products import product_adds, why_not_grouped


class Capability(NamedTuple):
    """name: of the faster form. why_not: it is not used; None: it is."""

    name: str
    why_not: str | None


def capabilities(config: Any, models: Sequence[nn.Module]) -> list[Capability]:
    """Of this rank's stages, whose gradients have their place already. config: ours."""
    layers = [m for model in models for m in model.modules() if isinstance(m, FeedForward)]
    experts = [layer for layer in layers if isinstance(layer, Experts)]
    weights: list[Any] = [weight for layer in layers for projection in layer.projections() for weight in projection.weights]
    if not config.runtime.fused:
        off: Any = "runtime.fused is false"
        kernels = routing = grouped = added = off
    else:
        triton = backend_of(weights[0].unsqueeze(1), 1) == "triton"
        off, kernels = None, None if triton else "PyTorch's operations on this device"
        routing = kernels if experts else "no experts on this rank"
        grouped = _why_not_grouped(experts)
        added = None if all(product_adds(w, w.main_grad) for w in weights) else "this device adds products of fp32 alone"
    return [
        *_hyper_connections(config, next(models[0].parameters())),
        Capability("feed-forward layers that keep what fc1 made alone", off),
        Capability("SwiGLU in one kernel", kernels),
        Capability("routing in kernels", routing),
        Capability("experts in grouped products", grouped),
        Capability("weight gradients added by their products", added),
    ]


def _hyper_connections(config: Any, weight: Any) -> list[Capability]:
    """weight: any, on the device."""
    streams = config.residual.streams
    if config.residual.kind == "none":
        return []
    triton = backend_of(weight.new_empty(1, 1, config.model.hidden_size), streams) == "triton"
    too_many = f"they take {MAX_STREAMS} streams, not residual.streams = {streams}"
    why_not = None if triton else too_many if streams > MAX_STREAMS else "PyTorch's operations on this device"
    return [Capability("hyper-connections in kernels", why_not)]


def _why_not_grouped(experts: Sequence[Experts]) -> str | None:
    if not experts:
        return "no experts on this rank"
    reasons = (why_not_grouped(w) for layer in experts for projection in layer.projections() for w in projection.weights)
    if (reason := next((r for r in reasons if r is not None), None)) is not None:
        return reason
    together = all(layer.grouped for layer in experts)
    return None if together else "the ends of buckets keep their weights apart, runtime.bucket_size can bring them together"


def described(found: Sequence[Capability]) -> str:
    """One line for people."""
    on = [c.name for c in found if c.why_not is None]
    off = [f"{c.name} ({c.why_not})" for c in found if c.why_not is not None]
    return "; ".join(f"{word}: {', '.join(names)}" for word, names in (("layers with", on), ("without", off)) if names)
