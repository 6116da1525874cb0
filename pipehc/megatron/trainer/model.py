"""One pipeline stage of the model: a run of blocks, with the embedding if it is the first and the loss if it is the last."""

import hashlib
import re
from dataclasses import replace
from typing import Any, cast

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import nn

from pipehc.megatron.layer import HyperConnectionLayer
from pipehc.megatron.trainer.attention import CoreAttention, LatentAttention
from pipehc.megatron.trainer.groups import Groups
from pipehc.model.hyper_connection import HyperConnection, contract, expand
from pipehc.model.sublayers import build_chain
from pipehc.recompute import Chain, Piece, cut

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def stage_config(config: Any, groups: Groups) -> MLATransformerConfig:
    """Translate our configuration into Megatron's.

    It says pipeline size 1: our stages number their blocks globally, and Megatron must add no offset of its own.

    Raises:
        ValueError: for tensor parallelism, which is not supported yet.
    """
    if groups.tp_size != 1:
        raise ValueError(f"parallel.tp: {groups.tp_size} is not supported yet; allowed: 1")
    m = config.model
    moe: dict[str, Any] = {}
    if m.dense_blocks < m.blocks:
        moe = {
            "num_moe_experts": m.experts,
            "moe_layer_freq": [0] * m.dense_blocks + [1] * (m.blocks - m.dense_blocks),
            "moe_ffn_hidden_size": m.expert_ffn_size,
            "moe_shared_expert_intermediate_size": m.experts_shared * m.expert_ffn_size or None,
            "moe_router_topk": m.experts_active,
            "moe_router_score_function": "sigmoid",
            "moe_router_dtype": "fp32",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": m.bias_update_rate,
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "alltoall",
            "expert_model_parallel_size": groups.ep_size,
            "expert_tensor_parallel_size": 1,
        }
    return MLATransformerConfig(
        num_layers=m.blocks,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.dense_ffn_size,
        num_attention_heads=m.heads,
        multi_latent_attention=True,
        q_lora_rank=None,
        kv_lora_rank=m.kv_rank,
        qk_head_dim=m.head_dim,
        qk_pos_emb_head_dim=m.rope_dim,
        v_head_dim=m.head_dim,
        rope_type="rope",
        rotary_base=m.rope_theta,
        apply_rope_fusion=False,
        qk_layernorm=True,  # of the latent of keys and values
        normalization="RMSNorm",
        layernorm_epsilon=m.norm_eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        transformer_impl="local",
        perform_initialization=False,  # `initialise` does it
        params_dtype=DTYPES[config.train.precision],
        bf16=config.train.precision == "bf16",
        calculate_per_token_loss=True,  # DDP then leaves the scale of gradients to us
        **moe,
    )


def layer_spec(config: MLATransformerConfig, residual: Any, block: int) -> ModuleSpec:
    """Megatron's released local spec of block `block` (from 0), with our layer and MLA that runs without TransformerEngine."""
    spec = get_gpt_decoder_layer_specs(config, use_transformer_engine=False, normalization=config.normalization)[block]
    attention = spec.submodules.self_attention
    # Copied, not changed: blocks of one kind share their spec.
    attention = replace(attention, module=LatentAttention, submodules=replace(attention.submodules, core_attention=CoreAttention))
    submodules = replace(spec.submodules, self_attention=attention)
    return replace(spec, module=HyperConnectionLayer, params={"residual": residual}, submodules=submodules)


class Decoder(nn.Module):
    """The blocks of a stage by their number in the whole model, so that parameter names are the same in every partition."""

    final_layernorm: nn.Module

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)


class StageModel(MegatronModule):
    """Blocks `blocks` of the model, in [s, b, n*C] (n = 1 for the plain residual)."""

    def __init__(self, config: Any, groups: Groups, blocks: range, first: bool, last: bool) -> None:
        megatron = stage_config(config, groups)
        super().__init__(config=megatron)
        self.blocks, self.first, self.last = blocks, first, last
        self.streams = 1 if config.residual.kind == "none" else config.residual.streams
        self.exit = config.residual.exit
        self.tp_group = groups.tp
        if first:
            self.embedding = LanguageModelEmbedding(
                config=megatron,
                vocab_size=config.model.vocab_size,
                max_sequence_length=config.train.sequence_length,
                position_embedding_type="rope",
                tp_group=groups.tp,
            )
        layers = {
            str(block): build_module(
                layer_spec(megatron, config.residual, block),
                config=megatron,
                layer_number=block + 1,
                pg_collection=groups.collection,
                add_layer_offset=False,
            )
            for block in blocks
        }
        self.decoder = Decoder(layers)
        if last:
            self.decoder.final_layernorm = WrappedTorchNorm(megatron, megatron.hidden_size, megatron.layernorm_epsilon)
            self.output_layer = ColumnParallelLinear(
                megatron.hidden_size,
                config.model.vocab_size,
                config=megatron,
                init_method=megatron.init_method,
                bias=False,
                tp_group=groups.tp,
            )
        self.to(torch.cuda.current_device())
        # Megatron's norms come in fp32 whatever params_dtype says; hyper-connections are meant to stay so.
        own = {p for c in self.modules() if isinstance(c, HyperConnection) for p in c.parameters()}
        for parameter in self.parameters():
            if parameter not in own:
                parameter.data = parameter.data.to(megatron.params_dtype)

    def connections(self) -> dict[int, HyperConnection]:
        """The hyper-connections by sub-layer of the whole model: 2 * block for attention, 2 * block + 1 for the FFN."""
        layers = (cast(HyperConnectionLayer, layer) for layer in self.decoder.layers.values())
        return {sublayer: connection for layer in layers for sublayer, connection in layer.connections().items()}

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [b, s] -> [s, b, n*C]: every stream starts as a copy of the embedding."""
        return expand(self.embedding(tokens, None), self.streams)

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """hidden [s, b, n*C], labels [b, s] -> the *sum* over tokens of the cross entropy, an fp32 scalar in nats."""
        normed = self.decoder.final_layernorm(contract(hidden, self.streams, self.exit))
        logits, _ = self.output_layer(normed)
        losses = vocab_parallel_cross_entropy(logits.float(), labels.transpose(0, 1).contiguous(), tp_group=self.tp_group)
        return losses.sum()

    def forward(
        self, hidden: torch.Tensor | None = None, tokens: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """hidden [s, b, n*C] (all but the first stage), tokens [b, s] (the first), labels [b, s] (the last); others are ignored.

        Returns:
            [s, b, n*C], or from the last stage the *sum* over tokens of the cross entropy, an fp32 scalar.
        """
        x = self.embed(_given("tokens", tokens)) if self.first else _given("hidden", hidden)
        for layer in self.decoder.layers.values():
            x, _ = layer(x)
        return self.loss(x, _given("labels", labels)) if self.last else x


    def chain(self, block: int | None = None) -> Chain:
        """The stage in pieces, in recompute blocks of at most `block` sub-layers (None: one block).

        It is given `x0` [s, b, n*C], on the first stage `tokens` [b, s] instead; on the last also `labels` [b, s]. Its result is
        the streams [s, b, n*C], on the last stage the summed loss.
        """
        sublayers = [s for layer in self.decoder.layers.values() for s in cast(HyperConnectionLayer, layer).sublayers()]
        entry = Piece("embedding", lambda tokens: (self.embed(tokens),), ("tokens",), ("x0",)) if self.first else None
        streams = f"x{len(sublayers)}"
        exit = Piece("loss", lambda x, labels: (self.loss(x, labels),), (streams, "labels"), ("loss",)) if self.last else None
        return build_chain(sublayers, cut(len(sublayers), block), entry, exit)


def build_stage(config: Any, groups: Groups, blocks: range, first: bool, last: bool) -> StageModel:
    """Build one stage on this rank's device, uninitialised: call `initialise` or load a checkpoint.

    Args:
        config: our configuration (sections model, residual, train).
        blocks: the blocks of this stage, counted from 0 in the whole model.
        first, last: whether the stage has the embedding, whether it has the output layer and the loss.
    """
    return StageModel(config, groups, blocks, first, last)


def parameter_names(stage: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that this rank holds of `stage`, by names that do not depend on the layout.

    Blocks and routed experts carry their global numbers: `decoder.layers.7.mlp.experts.5.linear_fc1.weight`.
    """
    experts = _first_local_experts(stage)
    return {_global_name(name, experts): parameter for name, parameter in stage.named_parameters()}


def buffer_names(stage: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that are part of the model's state, by global name: the experts' balancing biases (fp32 [experts])."""
    persistent = stage.state_dict().keys()
    return {name: buffer for name, buffer in stage.named_buffers() if name in persistent}


def initialise(stage: nn.Module, seed: int, std: float) -> None:
    """Set every weight by its global name and `seed` alone, so that all layouts start equal.

    Matrices are normal(0, std), norms 1, expert biases 0; hyper-connections reset themselves, with the seed of their name.
    """
    connections = {name: module for name, module in stage.named_modules() if isinstance(module, HyperConnection)}
    own = tuple(f"{name}." for name in connections)
    with torch.no_grad():
        for name, parameter in parameter_names(stage).items():
            if name.startswith(own):
                continue
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                generator = torch.Generator().manual_seed(_seed(seed, name))
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        for name, buffer in stage.named_buffers():
            if name.endswith(".expert_bias"):
                buffer.zero_()
    for name, connection in connections.items():
        device = next(connection.parameters()).device
        connection.reset_parameters(torch.Generator(device).manual_seed(_seed(seed, name)))


def _given(name: str, tensor: torch.Tensor | None) -> torch.Tensor:
    if tensor is None:
        raise ValueError(f"{name}: None; needed are tokens on the first stage, hidden on all others, labels on the last")
    return tensor


_LOCAL_EXPERT = re.compile(r"(.*\.mlp\.experts)\.local_experts\.(\d+)\.(.*)")


def _first_local_experts(stage: nn.Module) -> dict[str, int]:
    """Name of each module of routed experts -> the global number of the first expert that this rank holds."""
    return {
        f"{name}.experts": module.local_expert_indices[0]
        for name, module in stage.named_modules()
        if hasattr(module, "local_expert_indices") and hasattr(module, "experts")
    }


def _global_name(name: str, experts: dict[str, int]) -> str:
    match = _LOCAL_EXPERT.fullmatch(name)
    if match is None:
        return name
    module, local, rest = match.groups()
    return f"{module}.{experts[module] + int(local)}.{rest}"


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
