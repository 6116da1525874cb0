"""What the children of `processes.run_ranks` use of Megatron and of ours, imported once: each would spend a second on it."""

# ruff: noqa: F401
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import megatron.core.models.gpt.gpt_layer_specs
import megatron.core.models.gpt.gpt_model
import megatron.core.optimizer
import megatron.core.optimizer_param_scheduler
import megatron.core.pipeline_parallel.schedules
import megatron_attention
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel import random

import pipehc.megatron.job.cpu_job
import pipehc.megatron.job.feedback
import pipehc.megatron.job.hang
import pipehc.megatron.job.iteration
import pipehc.megatron.job.mirror
import pipehc.megatron.job.model_chunks
import pipehc.megatron.job.schedule
import pipehc.megatron.job.spec
import pipehc.megatron.job.tracing
import pipehc.megatron.job.wide
import pipehc.trainer

import_module("megatron.core.models.mimo.optimizer")  # as its optimizers do


def _share_storage(output, again):
    """Megatron lets a discarded output have the memory of the one computed again, in C++ that takes a minute to compile."""
    output.untyped_storage().resize_(again.untyped_storage().nbytes()).copy_(again.untyped_storage())


random._share_storage_ext = SimpleNamespace(share_storage=_share_storage)

# Saving starts a process, which would import all that its parent has.
filesystem_async.get_write_results_queue = partial(filesystem_async.get_write_results_queue, "fork")
