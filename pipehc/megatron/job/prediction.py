"""Multi-token prediction: its layers in their hyper-connection form; its losses as Megatron logs them, on the last pipeline rank
and of all micro-batches."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from pipehc.megatron.job.spec import Residual, converted_once

# What the tracker sums over micro-batches; before 0.19 there was one name.
_SUMS = (
    ("loss_values", "correct_values", "total_values") if hasattr(MTPLossLoggingHelper, "save_metrics_to_tracker") else ("values",)
)


def predicting(residual: Residual) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """What to put around MultiTokenPredictionLayer.__init__: the transformer layer in it gets hyper-connections of its own."""

    def wrap(original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def init(layer: Any, config: Any, submodules: Any, *args: Any, **given: Any) -> None:
            inner = converted_once(submodules.mtp_model_layer, residual)
            original(layer, config, replace(submodules, mtp_model_layer=inner), *args, **given)

        return init

    return wrap


def losses_to_last_rank(depth: int, device: torch.device) -> None:
    """Moves what this rank's micro-batches left in Megatron's tracker to where it is logged. Collective over the pipeline.

    For placements whose last stages are elsewhere, or on several ranks. depth: Megatron's mtp_num_layers.
    """
    tracker: dict[str, Any] = MTPLossLoggingHelper.tracker
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    sums = torch.stack([tracker[name] if name in tracker else torch.zeros(depth, device=device) for name in _SUMS])
    dist.all_reduce(sums, group=pipeline)
    if pipeline.rank() + 1 < pipeline.size():
        sums.zero_()
    tracker.update(zip(_SUMS, sums.unbind(), strict=True))
    tracker["avg_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
