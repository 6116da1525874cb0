"""One pipeline stage of the model: a run of blocks, with the embedding if it is the first and the loss if it is the last."""

import hashlib
import re
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import nn

from pipehc.megatron.feed_forward import Experts, FeedForward, Mlp, SharedExperts
from pipehc.megatron.layer import HyperConnectionLayer
from pipehc.megatron.norm import TorchRMSNorm, rms_norm
from pipehc.megatron.trainer.attention import CoreAttention, LatentAttention
from pipehc.megatron.trainer.cross_entropy import cross_entropy, likeliest
from pipehc.megatron.trainer.cuts import cut_of
from pipehc.megatron.trainer.groups import Groups
from pipehc.megatron.trainer.prediction import Prediction, share_of_depth
from pipehc.megatron.trainer.rotary import Rotation
from pipehc.megatron.trainer.tied import mark_copy
from pipehc.model.hyper_connection import HyperConnection, contract, expand
from pipehc.model.sublayers import build_chain
from pipehc.recompute import Chain, Piece, cut

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def stage_config(config: Any, groups: Groups) -> MLATransformerConfig:
    """Translate our configuration into Megatron's.

    It says pipeline size 1: our stages number their blocks globally, and Megatron must add no offset of its own.
    """
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
        tensor_model_parallel_size=groups.tp_size,
        sequence_parallel=groups.tp_size > 1,
        mtp_num_layers=m.mtp_depth or None,
        params_dtype=DTYPES[config.train.precision],
        bf16=config.train.precision == "bf16",
        calculate_per_token_loss=True,  # DDP then leaves the scale of gradients to us
        **moe,
    )


def layer_spec(config: MLATransformerConfig, residual: Any, block: int, fused: bool = True, **own: Any) -> ModuleSpec:
    """Megatron's released local spec of block `block` (from 0), with our layer and MLA that runs without TransformerEngine.

    fused: with our feed-forward layers, too. own: arguments of `LatentAttention`.
    """
    spec = get_gpt_decoder_layer_specs(config, use_transformer_engine=False, normalization=config.normalization)[block]
    attention = spec.submodules.self_attention
    # Copied, not changed: blocks of one kind share their spec.
    attention = replace(
        attention,
        module=LatentAttention,
        params=attention.params | own,
        submodules=replace(attention.submodules, core_attention=CoreAttention, kv_layernorm=TorchRMSNorm),
    )
    mlp = spec.submodules.mlp
    norms = {"input_layernorm": TorchRMSNorm, "pre_mlp_layernorm": TorchRMSNorm}
    submodules = replace(spec.submodules, self_attention=attention, mlp=_own(mlp) if fused else mlp, **norms)
    return replace(spec, module=HyperConnectionLayer, params={"residual": residual, "fused": fused}, submodules=submodules)


def _own(mlp: Any) -> Any:
    """The spec of an FFN with our modules in the place of Megatron's."""
    submodules = mlp.keywords["submodules"]
    if not isinstance(submodules, MoESubmodules):
        return partial(Mlp.as_mlp_submodule, submodules=submodules)
    experts = cast(Any, submodules.experts).keywords["submodules"]
    own = {"experts": partial(Experts, submodules=experts), "shared_experts": partial(SharedExperts, submodules=experts)}
    return partial(mlp.func, submodules=replace(submodules, **own))


class Decoder(nn.Module):
    """The blocks of a stage by their number in the whole model, so that parameter names are the same in every partition."""

    final_layernorm: nn.Module

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)


class StageModel(MegatronModule):
    """Blocks `blocks` of the model, in [s, b, n*C] (n = 1 for the plain residual).

    Behind the decoder the last stage has the modules of multi-token prediction, and embeds tokens for them: with a copy of the
    embedding, if it is not the first stage, too (`tied`).

    With tensor parallelism s is this rank's part of a sequence (sequence parallelism); tokens and labels are those of all of it.
    """

    def __init__(self, config: Any, groups: Groups, blocks: range, first: bool, last: bool) -> None:
        megatron = stage_config(config, groups)
        super().__init__(config=megatron)
        self.blocks, self.first, self.last = blocks, first, last
        self.streams = 1 if config.residual.kind == "none" else config.residual.streams
        self.exit = config.residual.exit
        self.tp_group = groups.tp
        self.fused = config.runtime.fused
        m, attention = config.model, dict[str, Any]()
        if self.fused:
            attention["rotation"] = Rotation.build(config.train.sequence_length, m.rope_dim, m.rope_theta, groups.collection.cp)
            attention["rebuild"] = "mla_up_proj" in config.recompute.modules
        self.depth = m.mtp_depth if last else 0
        self.depth_weight = m.mtp_loss_weight / m.mtp_depth if self.depth else 0.0
        self.depth_input = self.exit if m.mtp_input == "exit" else m.mtp_input
        if first or self.depth:
            self.embedding = LanguageModelEmbedding(
                config=megatron,
                vocab_size=config.model.vocab_size,
                max_sequence_length=config.train.sequence_length,
                position_embedding_type="rope",
                tp_group=groups.tp,
            )
        layers = {
            str(block): build_module(
                layer_spec(megatron, config.residual, block, self.fused, **attention),
                config=megatron,
                layer_number=block + 1,
                pg_collection=groups.collection,
                add_layer_offset=False,
            )
            for block in blocks
        }
        self.decoder = Decoder(layers)
        if self.depth:
            spec = layer_spec(megatron, config.residual, m.blocks - 1, self.fused, **attention)
            self.mtp = Prediction(megatron, spec, self.depth, groups.collection)
        for module in self.modules():
            if isinstance(module, FeedForward):
                module.rebuild = "swiglu" in config.recompute.modules
        if last:
            self.decoder.final_layernorm = TorchRMSNorm(megatron, megatron.hidden_size, megatron.layernorm_epsilon)
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
        if m.mtp_depth and first != last:
            mark_copy(self.embedding.word_embeddings.weight, counts=first)

    def connections(self) -> dict[int, HyperConnection]:
        """The hyper-connections by sub-layer of the whole model: 2 * block for attention, 2 * block + 1 for the FFN.

        Those of depth modules are not among them: their streams begin and end inside, so they are no part of the composite of all
        maps, of its figures, or of what Harmonized HC's feedback answers to. Their s stays 1.
        """
        layers = (cast(HyperConnectionLayer, layer) for layer in self.decoder.layers.values())
        return {sublayer: connection for layer in layers for sublayer, connection in layer.connections().items()}

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [b, s] -> [s, b, n*C]: every stream starts as a copy of the embedding."""
        return expand(self._embedded(tokens), self.streams)

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        # Not the whole module: with sequence parallelism that draws from Megatron's random states, for a dropout of 0.
        embedded: torch.Tensor = self.embedding.word_embeddings(tokens)
        # With sequence parallelism it has turned them before their sum over ranks.
        return embedded if self.config.sequence_parallel else embedded.transpose(0, 1).contiguous()

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """hidden [s, b, n*C], labels [b, s] -> the *sum* over tokens of the cross entropy, an fp32 scalar in nats; with tensor
        parallelism that of all tokens on every rank.

        Labels below 0 do not count: neither for the sum nor for any gradient.
        """
        return self._summed(self._logits(hidden), labels.transpose(0, 1))

    def losses(self, hidden: torch.Tensor, labels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """fp32 [1 + depth], whose sum is trained: `loss`, and of each depth its part, `depth_weight` times its sum of cross
        entropies, scaled as if as many of its labels counted as do of the next tokens."""
        normed = self._normed(hidden, self.exit)
        found = [self._summed(self._project(normed), labels.transpose(0, 1))]
        given = normed if self.depth_input == self.exit else self._normed(hidden, self.depth_input)
        for further, targets in self.mtp(given, tokens, labels, self._embedded):
            summed = self._summed(self._project(further), targets.transpose(0, 1))
            found.append(self.depth_weight * share_of_depth(labels, targets) * summed)
        return torch.stack(found)

    def loss_and_hits(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """`loss`, and how many of the labels that count have the largest logit: fp64 [2], without gradients."""
        logits, targets = self._logits(hidden), labels.transpose(0, 1)
        # First: the loss may overwrite the logits. No label below 0 is hit.
        hits = (likeliest(logits, self.tp_group) == targets).sum()
        return torch.stack((self._summed(logits, targets).double(), hits.double()))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._project(self._normed(hidden, self.exit))

    def _normed(self, hidden: torch.Tensor, exit: Literal["mean", "sum"]) -> torch.Tensor:
        norm, contracted = cast(nn.RMSNorm, self.decoder.final_layernorm), contract(hidden, self.streams, exit)
        normed: torch.Tensor = (
            rms_norm(contracted, norm.weight, self.config.layernorm_epsilon) if self.fused else norm(contracted)
        )
        return normed

    def _project(self, normed: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.output_layer(normed)[0]
        return logits

    def _summed(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.fused:
            return cross_entropy(logits, targets, self.tp_group).sum()
        losses = vocab_parallel_cross_entropy(logits.float(), targets.contiguous(), tp_group=self.tp_group)
        return losses.masked_fill(targets < 0, 0).sum()

    def forward(
        self, hidden: torch.Tensor | None = None, tokens: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """hidden [s, b, n*C] (all but the first stage), tokens [b, s] (the first), labels [b, s] (the last); others are ignored.

        Returns:
            [s, b, n*C], or from the last stage `loss`, without depth modules.
        """
        x = self.embed(_given("tokens", tokens)) if self.first else _given("hidden", hidden)
        for layer in self.decoder.layers.values():
            x, _ = layer(x)
        return self.loss(x, _given("labels", labels)) if self.last else x

    def chain(self, block: int | None = None, result: Literal["losses", "loss", "loss_and_hits"] = "losses") -> Chain:
        """The stage in pieces, in recompute blocks of at most `block` sub-layers (None: one block).

        It is given `x0` [s, b, n*C], on the first stage `tokens` [b, s] instead; on the last also `labels` [b, s]. Its result is
        the streams [s, b, n*C], on the last stage what the method `result` makes, the summed loss or more. `losses`, to train, is
        `loss` where no token but the next is predicted, and else takes `tokens`, too.
        """
        sublayers = [s for layer in self.decoder.layers.values() for s in cast(HyperConnectionLayer, layer).sublayers()]
        entry = Piece("embedding", lambda tokens: (self.embed(tokens),), ("tokens",), ("x0",)) if self.first else None
        exit = self._exit(f"x{len(sublayers)}", result) if self.last else None
        return build_chain(sublayers, cut(len(sublayers), block), entry, exit)

    def _exit(self, streams: str, result: str) -> Piece:
        """What depth modules do belongs to it: with recomputation they keep what they save."""
        predicts = result == "losses" and self.depth
        run = self.losses if predicts else self.loss_and_hits if result == "loss_and_hits" else self.loss
        inputs = (streams, "labels", "tokens") if predicts else (streams, "labels")
        return Piece("loss", lambda *given: (run(*given),), inputs, ("loss",))


def build_stage(config: Any, groups: Groups, blocks: range, first: bool, last: bool) -> StageModel:
    """Build one stage on this rank's device, uninitialised: call `initialise` or load a checkpoint.

    Args:
        config: our configuration (sections model, residual, train).
        blocks: the blocks of this stage, counted from 0 in the whole model.
        first, last: whether the stage has the embedding, whether it has the output layer and the loss.
    """
    return StageModel(config, groups, blocks, first, last)


def parameter_names(stage: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that this rank holds of `stage`, or its parts of them, by names that do not depend on the layout.

    Blocks and routed experts carry their global numbers: `decoder.layers.7.mlp.experts.5.linear_fc1.weight`.
    """
    experts = _first_local_experts(stage)
    return {_global_name(name, experts): parameter for name, parameter in stage.named_parameters()}


def buffer_names(stage: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that are part of the model's state, by global name: the experts' balancing biases (fp32 [experts])."""
    persistent = stage.state_dict().keys()
    return {name: buffer for name, buffer in stage.named_buffers() if name in persistent}


def initialise(stage: StageModel, seed: int, std: float) -> None:
    """Set every weight by its global name and `seed` alone, so that all layouts start equal.

    Matrices are normal(0, std), norms 1, expert biases 0; hyper-connections reset themselves, with the seed of their name.
    """
    connections = {name: module for name, module in stage.named_modules() if isinstance(module, HyperConnection)}
    own = tuple(f"{name}." for name in connections)
    tp_group = stage.tp_group
    with torch.no_grad():
        for name, parameter in parameter_names(stage).items():
            if name.startswith(own):
                continue
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                generator = torch.Generator().manual_seed(_seed(seed, name))
                cut = cut_of(parameter, tp_group)
                parameter.copy_(cut.own(torch.empty(cut.whole(parameter.shape)).normal_(0.0, std, generator=generator)))
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
