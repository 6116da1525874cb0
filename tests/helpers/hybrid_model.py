"""A HybridModel of a user's job on a machine without TransformerEngine: Megatron has stack specs for TE's layers alone."""

import inspect
from dataclasses import fields, replace
from functools import partial

import torch


def stack_spec(normalization="RMSNorm", qk_layernorm=False, gdn=False):
    """Megatron's local layers, each with the norm before it; MLA as in `megatron_attention`. gdn: with gated delta nets, too."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer, TransformerLayerSubmodules
    from megatron_attention import CoreAttention, LatentAttention

    from pipehc.megatron.versions import hybrid_model

    def whole(moe=False, latent=False):
        spec = get_gpt_layer_local_spec(
            num_experts=4 if moe else None, multi_latent_attention=latent, normalization=normalization, qk_layernorm=qk_layernorm
        )  # fmt: skip
        return spec.submodules

    def attention(latent=False):
        parts = whole(latent=latent)
        module = parts.self_attention
        if latent:
            module = replace(module, module=LatentAttention, submodules=replace(module.submodules, core_attention=CoreAttention))
        own = TransformerLayerSubmodules(
            input_layernorm=parts.input_layernorm, self_attention=module, self_attn_bda=parts.self_attn_bda
        )
        return ModuleSpec(module=TransformerLayer, submodules=own)

    def ffn(layer, moe=False):
        parts = whole(moe)
        own = TransformerLayerSubmodules(pre_mlp_layernorm=parts.pre_mlp_layernorm, mlp=parts.mlp, mlp_bda=parts.mlp_bda)
        return ModuleSpec(module=layer, submodules=own)

    def delta_net():
        from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules

        parts = whole()
        linear = parts.self_attention.submodules
        own = GatedDeltaNetSubmodules(in_proj=linear.linear_qkv, out_norm=parts.input_layernorm, out_proj=linear.linear_proj)
        module = ModuleSpec(module=GatedDeltaNet, submodules=own)
        own = TransformerLayerSubmodules(
            input_layernorm=parts.input_layernorm, self_attention=module, self_attn_bda=parts.self_attn_bda
        )
        return ModuleSpec(module=TransformerLayer, submodules=own)

    _, stack = hybrid_model()
    submodules = inspect.signature(stack).parameters["submodules"].annotation
    layers = dict(
        attention_layer=attention(), mla_layer=attention(latent=True), mlp_layer=ffn(MLPLayer),
        moe_layer=ffn(MoETransformerLayer, True), **({"gdn_layer": delta_net()} if gdn else {}),
    )  # fmt: skip
    known = {field.name for field in fields(submodules)}  # MLA came with 0.19
    return ModuleSpec(module=stack, submodules=submodules(**{name: layer for name, layer in layers.items() if name in known}))


def hybrid_provider(config, pattern, vocabulary=128, sequence=32, gdn=False, **options):
    """A model provider as pretraining scripts have it."""

    def model_provider(pre_process=True, post_process=True, vp_stage=None, config=config, pg_collection=None):
        from pipehc.megatron.versions import hybrid_model

        HybridModel, _ = hybrid_model()
        spec = stack_spec(config.normalization, config.qk_layernorm, gdn)
        return HybridModel(
            config, spec, vocabulary, sequence, hybrid_layer_pattern=pattern, pre_process=pre_process, post_process=post_process,
            vp_stage=vp_stage, pg_collection=pg_collection, **({"position_embedding_type": "rope"} | options),
        )  # fmt: skip

    return partial(model_provider, config=config)


def pretend_fla():
    """Lets Megatron's gated delta nets run without the package of their kernels: by torch, with `deterministic_mode`, but for one
    function."""
    from megatron.core.ssm.gated_delta_net import common

    torch._dynamo.config.disable = True  # Megatron compiles parts of them
    common.HAVE_FLA = True
    common.l2norm = lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
