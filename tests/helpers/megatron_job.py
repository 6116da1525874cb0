"""A small Megatron-core training job, as a user would have it: model provider, forward step, DDP, optimizer, scheduler, loop.

MLA and MoE layers, vocabulary 128, sequences of 32. Weights are set by global name, so that every layout starts equal; with the
default arguments three steps give the losses 4.9318385, 4.9503145, 4.9131899 in one process and in every layout.
"""

import hashlib
import re
from functools import partial

import torch
import torch.distributed as dist
from hybrid_model import hybrid_provider

VOCABULARY, SEQUENCE, MICRO_BATCH = 128, 32, 2


def initialize(tp=1, pp=1, ep=1, vpp=None, cp=1):
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from pipehc.megatron.job import cpu_job

    cpu_job.install()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1 if ep > 1 else None,
    )
    torch.manual_seed(1234)
    model_parallel_cuda_manual_seed(1234)


def model_config(tp=1, pp=1, ep=1, vpp=None, layers=8, **overrides):
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    options = dict(
        num_layers=layers, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128,
        multi_latent_attention=True, q_lora_rank=None, kv_lora_rank=32, qk_head_dim=16, qk_pos_emb_head_dim=8, v_head_dim=16,
        rope_type="rope", rotary_percent=1.0, apply_rope_fusion=False, qk_layernorm=True,
        normalization="RMSNorm", add_bias_linear=False, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False, bias_dropout_fusion=False, hidden_dropout=0.0, attention_dropout=0.0,
        masked_softmax_fusion=False, transformer_impl="local", gradient_accumulation_fusion=False,
        num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=32, moe_shared_expert_intermediate_size=32,
        moe_layer_freq=[0] + [1] * (layers - 1), moe_token_dispatcher_type="alltoall", moe_grouped_gemm=False,
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_bias_update_rate=1e-3,
        moe_router_load_balancing_type="none", moe_aux_loss_coeff=0.0, moe_router_dtype="fp32",
        use_cpu_initialization=True, params_dtype=torch.float32, pipeline_dtype=torch.float32,
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, expert_model_parallel_size=ep,
        virtual_pipeline_model_parallel_size=vpp, sequence_parallel=tp > 1,
    )  # fmt: skip
    if ep > 1:
        options["expert_tensor_parallel_size"] = 1
    return MLATransformerConfig(**(options | overrides))


def block_spec(config, vp_stage=None, pp_rank=None):
    """Megatron's local spec, with MLA that runs without TransformerEngine."""
    from dataclasses import replace

    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron_attention import CoreAttention, LatentAttention

    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage, pp_rank=pp_rank
    )

    def fixed(layer):
        attention = layer.submodules.self_attention
        if not config.multi_latent_attention:
            return layer
        parts = replace(attention.submodules, core_attention=CoreAttention)
        attention = replace(attention, module=LatentAttention, submodules=parts)
        return replace(layer, submodules=replace(layer.submodules, self_attention=attention))

    return replace(spec, layer_specs=[fixed(layer) for layer in spec.layer_specs])


def provider(config, **options):
    """A model provider as pretraining scripts have it."""

    def model_provider(pre_process=True, post_process=True, vp_stage=None, config=config, pg_collection=None):
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
        from megatron.core.models.gpt.gpt_model import GPTModel

        arguments = dict(
            vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
        )
        spec = block_spec(config, vp_stage)
        prediction = get_gpt_mtp_block_spec(config, spec, False, vp_stage) if config.mtp_num_layers else None
        return GPTModel(
            config, spec, mtp_block_spec=prediction, pre_process=pre_process, post_process=post_process,
            vp_stage=vp_stage, pg_collection=pg_collection, **(arguments | options),
        )  # fmt: skip

    return partial(model_provider, config=config)


def initialise(model, std=0.05):
    """Every weight by its global name alone."""
    from megatron.core import parallel_state as ps

    from pipehc.model.hyper_connection import HyperConnection

    own = tuple(name for name, m in model.named_modules() if isinstance(m, HyperConnection))
    for name, parameter in model.named_parameters():
        title = global_name(model, name)
        seed = int.from_bytes(hashlib.sha256(title.encode()).digest()[:4], "little")
        generator = torch.Generator().manual_seed(seed)
        if name.startswith(own) and own:
            with torch.no_grad():
                if name.endswith("phi"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
                elif name.endswith("alpha"):
                    parameter.fill_(0.3)
            continue
        if parameter.dim() < 2 and not name.endswith(("bias", "A_log")):
            continue
        expert = ".experts." in title
        size = ps.get_expert_tensor_parallel_world_size() if expert else ps.get_tensor_model_parallel_world_size()
        rank = ps.get_expert_tensor_parallel_rank() if expert else ps.get_tensor_model_parallel_rank()
        shape, dim = list(parameter.shape), getattr(parameter, "partition_dim", -1)
        sharded = size > 1 and getattr(parameter, "tensor_model_parallel", False) and dim >= 0
        if sharded:
            shape[dim] *= size
        full = torch.randn(shape, generator=generator) * std
        if sharded and "linear_fc1" in title:  # gate and up, each split
            full = torch.cat([half.chunk(size, 0)[rank] for half in full.chunk(2, 0)], 0)
        elif sharded:
            full = full.chunk(size, dim)[rank]
        with torch.no_grad():
            parameter.copy_(full)


def global_name(model, name):
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    match = re.match(r"(decoder|mtp)\.layers\.(\d+)\.(?:mtp_model_layer\.)?(.*)", name)
    if not match:
        return name
    layer, rest = getattr(model, match[1]).layers[int(match[2])], match[3]
    layer = getattr(layer, "mtp_model_layer", layer)
    expert = re.match(r"mlp\.experts\.local_experts\.(\d+)\.(.*)", rest)
    if expert:
        rest = f"mlp.experts.local_experts.{layer.mlp.local_expert_indices[int(expert[1])]}.{expert[2]}"
    return f"{match[1]}.layers.{layer.layer_number - 1}.{rest}"


def batches(step, microbatches):
    """The share of this data-parallel rank in `microbatches` * dp random micro-batches."""
    from megatron.core import parallel_state as ps

    size, rank = ps.get_data_parallel_world_size(), ps.get_data_parallel_rank()
    for i in range(microbatches):
        generator = torch.Generator().manual_seed(1000 * step + i * size + rank)
        text = torch.randint(0, VOCABULARY, (MICRO_BATCH, SEQUENCE + 1), generator=generator)
        yield text[:, :-1].contiguous(), text[:, 1:].contiguous()


def loss_function(loss_mask, output):
    loss = (output.float().view(-1) * loss_mask.view(-1)).sum()
    tokens = loss_mask.sum().int()
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def forward_step(iterator, model):
    from megatron.core import parallel_state as ps
    from megatron_attention import context_positions

    tokens, labels = next(iterator)
    own = context_positions(SEQUENCE, ps.get_context_parallel_world_size(), ps.get_context_parallel_rank())
    tokens, labels = tokens[:, own], labels[:, own]
    positions = own[None].expand(MICRO_BATCH, -1)
    mask = torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool), 1)
    output = model(tokens, positions, mask, labels=labels)
    return output, partial(loss_function, torch.ones_like(labels, dtype=torch.float32))


class Job:
    """Chunks, optimizer and scheduler of one rank.

    schedule: None for Megatron's own, else what `pipehc.megatron.forward_backward_func` takes. frozen: matches the global names of
    parameters that are not trained. pattern: the layers of a HybridModel; None: a GPTModel of `layers`.
    """

    def __init__(self, schedule=None, *, tp=1, pp=1, ep=1, cp=1, vpp=None, layers=8, pattern=None, residual=None,
                 distributed_optimizer=False, overlap_grad_reduce=False, overlap_param_gather=False, bucket_size=None, options=(),
                 model_options=(), frozen=None, run=(), search=()):  # fmt: skip
        from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        from pipehc.megatron import build_model_chunks, forward_backward_func, gradient_groups_of, wrap_model_chunks

        initialize(tp, pp, ep, vpp, cp)
        self.schedule, search = schedule, dict(search)
        layers = layers if pattern is None else len(pattern.replace("|", ""))
        self.config = config = model_config(tp, pp, ep, vpp, layers, context_parallel_size=cp, **dict(options))
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=False, overlap_grad_reduce=overlap_grad_reduce, use_distributed_optimizer=distributed_optimizer,
            bucket_size=bucket_size, overlap_param_gather=overlap_param_gather,
        )  # fmt: skip
        name = schedule or "megatron"
        made = provider if pattern is None else partial(hybrid_provider, pattern=pattern)
        model_provider = made(config, **dict(model_options))
        chunks = build_model_chunks(model_provider, name, residual=residual, **search)
        for chunk in chunks:
            initialise(chunk)
            for title, parameter in chunk.named_parameters():
                parameter.requires_grad_(not (frozen and re.search(frozen, global_name(chunk, title))))
        self.chunks = wrap_model_chunks(chunks, ddp, name, **search)
        settings = OptimizerConfig(
            optimizer="adam", lr=1e-3, min_lr=0.0, weight_decay=0.01, clip_grad=1.0, params_dtype=torch.float32,
            use_distributed_optimizer=distributed_optimizer,
        )  # fmt: skip
        with gradient_groups_of(name, **search):
            self.optimizer = get_megatron_optimizer(settings, self.chunks, use_gloo_process_groups=False)
        self.scheduler = OptimizerParamScheduler(
            self.optimizer, init_lr=0.0, max_lr=1e-3, min_lr=1e-4, lr_warmup_steps=1, lr_decay_steps=10, lr_decay_style="cosine",
            start_wd=0.01, end_wd=0.01, wd_incr_steps=10, wd_incr_style="constant",
        )  # fmt: skip
        config.grad_scale_func = self.optimizer.scale_loss
        config.finalize_model_grads_func = finalize_model_grads
        if overlap_grad_reduce:
            config.no_sync_func = [c.no_sync for c in self.chunks] if len(self.chunks) > 1 else self.chunks[0].no_sync
        own = "megatron" if schedule is None else schedule
        self.forward_backward = forward_backward_func(own, **({} if schedule is None else dict(run) | search))

    def call(self, step, microbatches, forward_only=False, forward_step=forward_step, **more):
        iterators = [batches(step, microbatches) for _ in self.chunks]
        arguments = dict(
            forward_step_func=forward_step, data_iterator=iterators if len(iterators) > 1 else iterators[0], model=self.chunks,
            num_microbatches=microbatches, seq_length=SEQUENCE, micro_batch_size=MICRO_BATCH, decoder_seq_length=SEQUENCE,
            forward_only=forward_only,
        )  # fmt: skip
        return self.forward_backward(**(arguments | more))

    def step(self, step, microbatches):
        """(loss, gradient norm), the same on every rank."""
        reports = self.accumulate(step, microbatches)
        norm = self.update()
        return self.mean(reports), norm

    def accumulate(self, step, microbatches):
        """The gradients of a step alone; returns what the loss function reported."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self.call(step, microbatches)

    def update(self):
        """Their norm."""
        successful, norm, _ = self.optimizer.step()
        assert successful
        self.scheduler.step(increment=1)
        return float(norm)

    def evaluate(self, step, microbatches):
        with torch.no_grad():
            return self.mean(self.call(step, microbatches, forward_only=True))

    def mean(self, reports):
        from megatron.core import parallel_state as ps

        total = torch.stack([r["lm loss"] for r in reports]).sum(0) if reports else torch.zeros(2)
        dist.all_reduce(total, group=ps.get_data_parallel_group(with_context_parallel=True))
        dist.broadcast(total, ps.get_pipeline_model_parallel_last_rank(), group=ps.get_pipeline_model_parallel_group())
        return float(total[0] / total[1])


def train(rank, arguments, steps=3, microbatches=8):
    """[(loss, gradient norm)] of `steps` steps of a Job, then its evaluation loss."""
    from megatron.core import parallel_state as ps

    job = Job(**arguments)
    share = microbatches // ps.get_data_parallel_world_size()
    found = [job.step(step, share) for step in range(steps)]
    return found, job.evaluate(7, share // 2 if microbatches >= 8 else share)  # no less than ranks of a pipeline
