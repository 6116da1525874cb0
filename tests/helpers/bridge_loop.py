"""A training loop with the habits of Megatron Bridge's: a provider builds and wraps the chunks of Megatron's own layout; the
forward-backward function comes from `schedules`, is asked for once, and is handed communicator and groups."""

import contextlib
import io
from functools import partial

import megatron_job
import torch
from hybrid_model import hybrid_provider
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func  # imported before any `enable`


class Provider:
    """config: of the model. pattern: its layers, of a HybridModel. After `provide_distributed_model` chunks are in DDP."""

    def __init__(self, config, pattern=None):
        self.config = config
        self.provider = megatron_job.provider(config) if pattern is None else hybrid_provider(config, pattern)

    def provide(self, pre_process, post_process, vp_stage=None):
        return self.provider(pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)

    def provide_distributed_model(self, ddp_config, pg_collection):
        from megatron.core.distributed import DistributedDataParallel

        rank, size = pg_collection.pp.rank(), pg_collection.pp.size()
        virtual = self.config.virtual_pipeline_model_parallel_size
        chunks = []
        for v in range(virtual or 1):
            first, last = rank == 0 and v == 0, rank == size - 1 and v == (virtual or 1) - 1
            chunks.append(self.provide(first, last, None if virtual is None else v))
            megatron_job.initialise(chunks[-1])
        return [
            DistributedDataParallel(self.config, ddp_config, chunk, disable_bucketing=v > 0, pg_collection=pg_collection)
            for v, chunk in enumerate(chunks)
        ]


class Loop:
    """One rank's training. overlap: of the reduction of gradients."""

    def __init__(self, overlap=False, layers=8, pattern=None, **parallel):
        from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.process_groups_config import ProcessGroupCollection

        self.config = megatron_job.model_config(layers=layers, **parallel)
        self.groups = ProcessGroupCollection.use_mpu_process_groups()
        ddp = DistributedDataParallelConfig(overlap_grad_reduce=overlap)
        self.model = Provider(self.config, pattern).provide_distributed_model(ddp, self.groups)
        settings = OptimizerConfig(optimizer="adam", lr=1e-3, weight_decay=0.01, clip_grad=1.0, params_dtype=torch.float32)
        self.optimizer = get_megatron_optimizer(settings, self.model, use_gloo_process_groups=False)
        if overlap:
            no_sync, start = ([getattr(chunk, name) for chunk in self.model] for name in ("no_sync", "start_grad_sync"))
            alone = len(self.model) == 1
            self.config.no_sync_func, self.config.grad_sync_func = (no_sync[0], start[0]) if alone else (no_sync, start)
        self.config.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=self.groups)
        self.config.grad_scale_func = self.optimizer.scale_loss

    def forward_backward(self):
        virtual = self.config.virtual_pipeline_model_parallel_size
        return get_forward_backward_func(pp_size=self.groups.pp.size(), vp_size=virtual)

    def call(self, forward_backward, step, microbatches, **more):
        """The reports of one call. more: other arguments of it."""
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        data = [megatron_job.batches(step, microbatches) for _ in self.model]
        arguments = dict(
            forward_step_func=megatron_job.forward_step,
            data_iterator=data if len(data) > 1 else data[0],
            model=self.model,
            num_microbatches=microbatches,
            seq_length=megatron_job.SEQUENCE,
            micro_batch_size=megatron_job.MICRO_BATCH,
            decoder_seq_length=megatron_job.SEQUENCE,
            forward_only=False,
            adjust_tensor_shapes_fn=None,
            p2p_communicator=P2PCommunicator(pp_group=self.groups.pp, config=self.config),
            pg_collection=self.groups,
        )
        return forward_backward(**(arguments | more))

    def train(self, steps, microbatches):
        """([(loss, gradient norm)] of the last pipeline rank, elsewhere losses are None; what was printed)."""
        from megatron.core.rerun_state_machine import get_rerun_state_machine

        forward_backward = self.forward_backward()
        machine = get_rerun_state_machine()
        machine.current_iteration = 0
        found, printed = [], io.StringIO()
        for step in range(steps):
            while machine.should_run_forward_backward(None):
                for chunk in self.model:
                    chunk.zero_grad_buffer()
                self.optimizer.zero_grad()
                with contextlib.redirect_stdout(printed):
                    reports = self.call(forward_backward, step, microbatches)
            _, norm, _ = self.optimizer.step()
            total = torch.stack([report["lm loss"] for report in reports]).sum(0) if reports else None
            found.append((None if total is None else float(total[0] / total[1]), float(norm)))
        return found, printed.getvalue()
