"""HybridModel under our placements: what is refused of its layer pattern, and its layers in their hyper-connection form."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from megatron.core import parallel_state

from pipehc.megatron.job.flags import named, without
from pipehc.megatron.job.position import acting_ranks_told
from pipehc.megatron.job.spec import STACK_LAYERS, Residual, converted_once
from pipehc.megatron.layer import HyperConnectionLayer

REFUSED = {
    "M": ("Mamba layers", "their mixer has not been tried under our schedules"),
    "D": ("layers of DeepSeek's sparse attention", "they may share state"),
}
"""Symbol of Megatron's patterns -> (what it stands for, why not)."""


def layer_pattern(pattern: str) -> list[str]:
    """The layers of each pipeline segment, without those of multi-token prediction."""
    return pattern.split("/")[0].split("|")


def _named(pattern: str | None) -> str:
    return named("hybrid_layer_pattern", pattern)  # which imports megatron.training: only where it is said


def refuse_pattern(pattern: str, predicted: int | None) -> None:
    """ValueError for layers that cannot be taken apart. predicted: depths of multi-token prediction (`mtp_num_layers`)."""
    _, *depths = pattern.split("/")
    if any(depths):
        raise ValueError(f"{_named(pattern)}: has layers of multi-token prediction; leave out what begins with '/'")
    if predicted:
        raise ValueError(f"{named('mtp_num_layers', predicted)}: not supported in a HybridModel; {without('mtp_num_layers', None)}")
    for symbol, (layers, reason) in REFUSED.items():
        if symbol in pattern:
            raise ValueError(f"{_named(pattern)}: has {layers} ({symbol}): {reason}; use {', '.join(STACK_LAYERS)}")


def refuse_segments(pattern: str, ranks: int, chunks: int) -> None:
    """ValueError for a pattern that is not cut into the stages of a placement with so many chunks a rank and direction."""
    segments = layer_pattern(pattern)
    stages = ranks * chunks
    if len(segments) == 1 and chunks == 1:
        return  # Megatron cuts it itself
    if len(segments) != stages:
        raise ValueError(
            f"{_named(pattern)}: has {len(segments)} pipeline segments, the schedule {stages} stages over {ranks} ranks; cut the "
            f"pattern with {stages - 1} '|'"
        )
    if not all(segments):
        raise ValueError(f"{_named(pattern)}: has a segment without layers, every stage needs one; move '|'")


def building(residual: Residual | None) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What to put around HybridModel.__init__: it raises ValueError before anything is built, and builds the layers in their
    hyper-connection form, unless there is no residual."""

    def wrap(original: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(original)
        stack_spec = list(signature.parameters)[2]  # hybrid_stack_spec, mamba_stack_spec until 0.17

        @functools.wraps(original)
        def init(*args: Any, **given: Any) -> None:
            call = signature.bind(*args, **given)
            arguments = call.arguments
            pattern = arguments.get("hybrid_layer_pattern") or arguments.get("hybrid_override_pattern")
            if not pattern:  # Megatron would make one with Mamba layers, of its deprecated ratios, or have none
                raise ValueError(f"{_named(pattern)}: must name the layers")
            _refuse(pattern, arguments)
            if residual is not None:
                arguments[stack_spec] = spec = converted_once(arguments[stack_spec], residual)
                for symbol in sorted(set("".join(layer_pattern(pattern)))):
                    layer = getattr(spec.submodules, STACK_LAYERS[symbol], None)
                    if getattr(layer, "module", None) is not HyperConnectionLayer:
                        raise ValueError(
                            f"{stack_spec}: {STACK_LAYERS[symbol]} is {getattr(layer, 'module', layer)}; must be of "
                            "megatron.core's TransformerLayer"
                        )
            with acting_ranks_told():
                original(*call.args, **call.kwargs)

        return init

    return wrap


def _refuse(pattern: str, arguments: dict[str, Any]) -> None:
    refuse_pattern(pattern, getattr(arguments["config"], "mtp_num_layers", None))
    ranks = parallel_state.get_pipeline_model_parallel_world_size()
    refuse_segments(pattern, ranks, parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1)
    layers, told = sum(map(len, layer_pattern(pattern))), arguments["config"].num_layers
    if layers != told:
        raise ValueError(f"{named('num_layers', told)}: hybrid_layer_pattern = {pattern!r} has {layers}; set num_layers = {layers}")
