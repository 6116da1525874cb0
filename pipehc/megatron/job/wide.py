"""Megatron's own pipeline schedules for streams: their stage messages become n times as wide."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.utils import get_model_config
from torch import nn

from pipehc.megatron.job.announcement import announce, megatrons_own
from pipehc.megatron.job.feedback import gain_feedback
from pipehc.megatron.job.promise import keeping_promise
from pipehc.megatron.job.refusals import refuse_groups
from pipehc.megatron.job.source import Megatrons
from pipehc.megatron.layer import hyper_connection_layers
from pipehc.megatron.versions import default_groups


class WideCommunicator(P2PCommunicator):
    """Megatron's stage messages with the hidden size times `streams`."""

    def __init__(self, pp_group: Any, config: Any, streams: int) -> None:
        super().__init__(pp_group, config)
        self._streams = streams

    def _communicate(self, *, tensor_shape: Any, **rest: Any) -> Any:
        if tensor_shape is not None:
            tensor_shape = (*tensor_shape[:-1], tensor_shape[-1] * self._streams)
        return super()._communicate(tensor_shape=tensor_shape, **rest)


# As they are before `enable` puts its own in their places.
NO_PIPELINE = schedules.forward_backward_no_pipelining
ONE_STAGE = schedules.forward_backward_pipelining_without_interleaving
INTERLEAVED = schedules.forward_backward_pipelining_with_interleaving


class MegatronsOwn:
    """What Megatron's `get_forward_backward_func` would return, for models with hyper-connections."""

    def __init__(self) -> None:
        self.source = Megatrons()
        self._announced = False

    @keeping_promise
    def __call__(self, **arguments: Any) -> list:
        ranks = parallel_state.get_pipeline_model_parallel_world_size()
        virtual_stages = parallel_state.get_virtual_pipeline_model_parallel_world_size()
        if not self._announced:
            self._announced = True
            model = arguments["model"]
            announce(megatrons_own(ranks, virtual_stages, model if isinstance(model, list) else [model]))
        own = NO_PIPELINE if ranks == 1 else ONE_STAGE if virtual_stages is None else INTERLEAVED
        return widened(own)(**arguments)


def streams_of(model: Sequence[nn.Module]) -> int:
    """Streams of the hyper-connection layers in `model`; 1 if it has none."""
    return max((layer.streams for layer in hyper_connection_layers(model)), default=1)


def widened(function: Callable[..., list]) -> Callable[..., list]:
    """A schedule of Megatron's (see its get_forward_backward_func), whose contract it keeps, for models with hyper-connections."""

    def forward_backward(**arguments: Any) -> list:
        model = arguments["model"]
        model = model if isinstance(model, list) else [model]
        streams = streams_of(model)
        if streams > 1 and parallel_state.get_pipeline_model_parallel_world_size() > 1:
            refuse_groups(arguments.get("p2p_communicator"), arguments.get("pg_collection"))
            group = parallel_state.get_pipeline_model_parallel_group()
            arguments["p2p_communicator"] = WideCommunicator(group, get_model_config(model[0]), streams)
            arguments["pg_collection"] = arguments.get("pg_collection") or default_groups()
        with nullcontext() if arguments.get("forward_only") else gain_feedback(model):
            return function(**arguments)

    return forward_backward
