"""Gradients summed and optimizer state sharded over all replicas of a stage: Megatron's DDP and distributed AdamW."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, ParamGroupOverride, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MixedPrecisionOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias
from torch import nn

from pipehc.checkpoint.flat_slices import Held
from pipehc.megatron.buckets import BucketReduction
from pipehc.megatron.gradient_norm import gradient_norm
from pipehc.megatron.trainer.cuts import Joined, cut_of, is_shared, join
from pipehc.megatron.trainer.groups import Groups
from pipehc.megatron.trainer.model import DTYPES, StageModel, buffer_names, parameter_names
from pipehc.megatron.trainer.tied import Tied, is_copy
from pipehc.megatron.wgrad import install_deferral
from pipehc.model.hyper_connection import HyperConnection

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """Gradients, optimizer state and expert biases of the stages that this rank holds.

    The replicas of a stage (data-parallel and, with two replicas of every stage, mirrored) share its optimizer state out among
    them: every parameter element is owned by one rank of the world. All methods but `zero_grad` are collective.
    """

    def __init__(self, config: Any, groups: Groups, models: Sequence[StageModel]) -> None:
        self.models = list(models)
        self._device = next(self.models[0].parameters()).device
        self._settings, self._groups = config.optimizer, groups
        self._bias_update_rate = config.model.bias_update_rate
        self._chunks = [_wrap(model, groups, config.runtime.bucket_size) for model in models]
        self._tied = Tied(self._chunks, groups)
        self._reduction = BucketReduction()
        for chunk in self._chunks:
            install_deferral(chunk, self._reduction, add_products=config.runtime.fused)
            self._reduction.watch(chunk)
        self._megatron = _distributed_optimizer(config, groups, self._chunks)
        self._parts: list[DistributedOptimizer] = self._megatron.chained_optimizers  # dense and, with ep > 1, experts
        self._reducing: set[StageModel] = set()
        self._shared: list[torch.Tensor] | None = None
        self._joined: list[Joined] = []
        self._names = {parameter: name for model in models for name, parameter in parameter_names(model).items()}
        self._steps = torch.zeros(1, dtype=torch.int64)
        for part in self._parts:
            part.init_state_fn(part.optimizer, part.config)
        self._set_steps(0)

    def zero_grad(self) -> None:
        """Forget all gradients; call before the first backward of a step."""
        self._joined.clear()
        for chunk in self._chunks:
            chunk.zero_grad_buffer()
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                group.is_last_microbatch = False  # reductions start when we say so, not by counting gradients
        self._megatron.zero_grad()
        self._reducing.clear()
        self._reduction.begin_step()

    def expect_last(self, model: StageModel) -> None:
        """From now on only the last W of a stage computes gradients of it: each bucket is summed as soon as it has all of them.

        All replicas must begin, and start, the reduction of their stages in the same order.
        """
        self._reduction.expect_last(self._chunks[self.models.index(model)])

    def start_reduction(self, model: StageModel) -> None:
        """Start to sum what is left of a stage's gradients over its replicas; call after its last weight gradient. Asynchronous."""
        self._reduction.start(self._chunks[self.models.index(model)])
        self._reducing.add(model)

    def reduce_gradients(self) -> None:
        """Sum the gradients over the replicas, of stages not yet started in their order; call after the last backward of a step."""
        for model in self.models:
            if model not in self._reducing:
                self.start_reduction(model)
        self._reduction.end_step(self._chunks)
        for chunk in self._chunks:
            chunk.finish_grad_sync()
        self._sum_shared()
        self._tied.sum_gradients()

    def gradients(self) -> dict[str, torch.Tensor]:
        """After `reduce_gradients`, before `step`: the fp32 gradient of every parameter (or part) held here, by global name."""
        found = {}
        for buffer in self._buffers():
            for bucket in buffer.buckets:
                ranks = buffer.data_parallel_group.size()
                shard = bucket.grad_data.chunk(ranks)[buffer.data_parallel_group.rank()]
                whole = torch.empty_like(bucket.grad_data)
                dist.all_gather_into_tensor(whole, shard.contiguous(), group=buffer.data_parallel_group)
                for parameter in bucket.params_list:
                    start, end, _ = buffer.param_index_map[parameter]
                    piece = whole[start - bucket.offset : end - bucket.offset]
                    found[self._names[parameter]] = piece.view(parameter.shape).clone()
        return found

    def step(self, lr: float) -> float:
        """Clip, update with learning rate `lr`, and give every replica the new weights.

        Returns:
            The norm of the whole model's gradient before clipping, the same on every rank.

        Raises:
            FloatingPointError: on every rank, before anything has changed, if that norm is not finite.
        """
        self._megatron.prepare_grads()
        # Every parameter element has one owner in the world.
        owned = [gradient for part in self._parts for gradient in part.get_grads_for_grad_norm()]
        norm = gradient_norm(owned, self._device)
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}")
        for part in self._parts:
            if self._settings.clip_grad > 0:
                clip_grad_by_total_norm_fp32(part.get_parameters(), self._settings.clip_grad, norm)
            for group in part.param_groups:
                group["lr"] = lr * (group["max_lr"] / self._settings.lr)
                group["weight_decay"] = self._settings.weight_decay * group["wd_mult"]
            # Without the all-gather that follows there: with experts there are two parts, and either would gather all weights.
            MixedPrecisionOptimizer.step_with_ready_grads(part)
        self._gather_weights()
        self._steps += 1
        return norm

    def update_expert_bias(self) -> None:
        """Loss-free balancing (arXiv:2408.15664): raise the bias of experts that had too few tokens, lower that of others.

        Tokens since the last call count, summed over all replicas, so that their biases stay equal.
        """
        routers = [m for model in self.models for m in model.modules() if getattr(m, "expert_bias", None) is not None]
        if not routers:
            return
        tokens = torch.stack([router.local_tokens_per_expert for router in routers])
        biases = torch.stack([router.expert_bias for router in routers])
        updated = get_updated_expert_bias(tokens, biases, self._bias_update_rate, self._groups.collection.tp_dp_cp)
        for router, bias in zip(routers, updated):
            router.expert_bias.copy_(bias)
            router.local_tokens_per_expert.zero_()

    def state(self) -> dict[str, Held]:
        """What a checkpoint must hold, by names that no layout changes, as it lies in memory: save it, or load it in place. What
        tensor parallelism cuts by columns is copied: rows that all its ranks have together are one range, not one a row.

        `weights.NAME`, `optimizer.exp_avg.NAME`, `optimizer.exp_avg_sq.NAME`: the elements that this rank owns, fp32.
        `optimizer.steps`: how many steps there have been, int64 [1]. `buffers.NAME`: expert biases, fp32 [experts].
        """
        state: dict[str, Held] = {"optimizer.steps": self._steps}
        self._joined = []
        for part in self._parts:
            for parameter, shard, start in _owned(part):
                if is_copy(parameter):
                    continue
                name, cut = self._names[parameter], cut_of(parameter, self._groups.tp)
                moments = {f"optimizer.{moment}.{name}": part.optimizer.state[shard][moment] for moment in MOMENTS}
                for key, tensor in {f"weights.{name}": shard.data, **moments}.items():
                    joined = join(tensor, tuple(parameter.shape), start, cut, self._groups.tp)
                    state[key] = joined.held
                    self._joined.append(joined)
        for model in self.models:
            state |= {f"buffers.{name}": buffer for name, buffer in buffer_names(model).items()}
        return state

    @torch.no_grad()
    def after_load(self) -> None:
        """After loading into `state()`: give the model, on every replica, the weights that were loaded."""
        for joined in self._joined:
            joined.take()
        self._tied.follow(self._owned_tensors)
        for part in self._parts:
            part._copy_main_params_to_model_params()
        self._gather_weights()
        self._set_steps(int(self._steps))

    def _gather_weights(self) -> None:
        """Give every replica what the others own of the weights."""
        for chunk in self._chunks:
            chunk.start_param_sync(force_sync=True)

    def _owned_tensors(self, wanted: nn.Parameter) -> list[torch.Tensor]:
        found = ((part, shard) for part in self._parts for parameter, shard, _ in _owned(part) if parameter is wanted)
        return [t for part, shard in found for t in (shard.data, *(part.optimizer.state[shard][m] for m in MOMENTS))]

    def _sum_shared(self) -> None:
        """Sums the gradients of what all tensor-parallel ranks have and use for their own tokens. What this rank owns of them lies
        where it does on the others: they hold the same shapes."""
        if self._groups.tp_size == 1:
            return
        if self._shared is None:
            self._shared = [part for buffer in self._buffers() for part in _owned_of_shared(buffer, self._groups.tp)]
        if self._shared:
            together = torch.cat(self._shared)
            dist.all_reduce(together, group=self._groups.tp)
            torch._foreach_copy_(self._shared, together.split([part.numel() for part in self._shared]))

    def _buffers(self) -> Iterator[Any]:
        for chunk in self._chunks:
            yield from chunk.buffers + chunk.expert_parallel_buffers

    def _set_steps(self, steps: int) -> None:
        """Torch's AdamW counts steps in the state of each parameter, TransformerEngine's in each group."""
        for part in self._parts:
            for group in part.param_groups:
                if isinstance(part.optimizer, torch.optim.AdamW):
                    for shard in group["params"]:
                        part.optimizer.state[shard]["step"] = torch.tensor(float(steps))
                else:
                    group["step"] = steps


def build_optimizer(config: Any, groups: Groups, models: Sequence[StageModel]) -> Optimizer:
    """Wrap this rank's stages for gradient reduction and deferred weight gradients, and build their optimizer. Collective.

    Args:
        config: our configuration (sections model, optimizer, train).
        models: initialised, and in the order of their stages: all replicas must reduce them in the same order.
    """
    return Optimizer(config, groups, models)


def _wrap(model: StageModel, groups: Groups, bucket_size: int) -> DistributedDataParallel:
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True, use_distributed_optimizer=True)
    layout = DistributedOptimizer.compute_full_param_layout(
        [p for p in model.parameters() if p.requires_grad],
        bucket_size,
        groups.collection.dp_cp.size(),
        settings,
        expert_data_parallel_world_size=groups.collection.expt_dp.size(),
    )
    # Not `disable_bucketing`: that puts the bf16 and fp32 weights of a stage into one coalesced all-gather, which gloo garbles.
    # The layout, not DDP, says how many buckets there are. DDP would cut those of pipeline rank 0 alone, and not those of its
    # mirror. `overlap_grad_reduce` lets reductions be asynchronous.
    return DistributedDataParallel(model.config, settings, model, pg_collection=groups.collection, full_param_layout=layout)


def _distributed_optimizer(config: Any, groups: Groups, chunks: list[DistributedDataParallel]) -> Any:
    o, precision = config.optimizer, config.train.precision
    settings = OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.betas[0],
        adam_beta2=o.betas[1],
        adam_eps=o.eps,
        clip_grad=o.clip_grad,
        bf16=precision == "bf16",
        params_dtype=DTYPES[precision],
        use_distributed_optimizer=True,
    )
    # Norm weights, and the scalars and biases of hyper-connections.
    vectors = ParamKey(predicate=ParamPredicate(name="vectors", fn=lambda parameter: parameter.dim() < 2))
    connections = {p for chunk in chunks for m in chunk.modules() if isinstance(m, HyperConnection) for p in m.parameters()}
    own = ParamKey(predicate=ParamPredicate(name="connections", fn=connections.__contains__))
    override = ParamGroupOverride(**({"max_lr": o.connection_lr * o.lr} if o.connection_lr != 1 else {}))
    if not o.connection_decay:
        override["wd_mult"] = 0.0
    with torch.no_grad():  # the shards of fp32 parameters are views of them, which must not become part of a graph
        return get_megatron_optimizer(
            settings,
            chunks,
            config_overrides={vectors: ParamGroupOverride(wd_mult=0.0), **({own: override} if override else {})},
            use_gloo_process_groups=False,
            pg_collection=groups.collection,
        )


def _owned_of_shared(buffer: Any, tp_group: Any) -> Iterator[torch.Tensor]:
    """Of a buffer of DDP, what this rank owns of the gradients that tensor-parallel ranks sum: fp32, one dimension."""
    group = buffer.data_parallel_group
    for bucket in buffer.buckets:
        own = bucket.grad_data.numel() // group.size()
        begin = bucket.offset + own * group.rank()
        for parameter in bucket.params_list:
            start, end, _ = buffer.param_index_map[parameter]
            start, end = max(start, begin), min(end, begin + own)
            if is_shared(parameter, tp_group) and start < end:
                yield bucket.grad_data[start - bucket.offset : end - bucket.offset]


def _owned(part: DistributedOptimizer) -> Iterator[tuple[nn.Parameter, torch.Tensor, int]]:
    """Each model parameter of which this rank owns elements, with the fp32 master of those and where they start in it."""
    pairs = [
        (part.model_float16_groups, part.shard_fp32_from_float16_groups),
        (part.model_fp32_groups, part.shard_fp32_groups),
    ]
    for model_groups, shard_groups in pairs:
        for parameters, shards in zip(model_groups, shard_groups):
            for parameter, shard in zip(parameters, shards):
                yield parameter, shard, part._get_model_param_range_map(parameter)["param"].start
