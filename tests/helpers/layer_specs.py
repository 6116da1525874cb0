"""Layer specs as jobs have them, small: dense and mixture of experts, standard and latent attention; and layers built from them."""

from dataclasses import replace

import megatron_job
import torch
from megatron_attention import CoreAttention, LatentAttention
from torch.nn.functional import gelu

SEQUENCE, BATCH, CHANNELS = 7, 2, 24
KINDS = ("hc", "mhc", "isohc", "hybrid", "harmonized")


def standard_config(**overrides):
    from megatron.core.transformer.transformer_config import TransformerConfig

    options = {
        "num_layers": 1,
        "hidden_size": CHANNELS,
        "num_attention_heads": 3,
        "ffn_hidden_size": 40,
        "add_bias_linear": True,
        "activation_func": gelu,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": torch.float32,
        "perform_initialization": True,
    }
    return TransformerConfig(**(options | overrides))


def experts(**overrides):
    options = {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 16,
        "moe_shared_expert_intermediate_size": 20,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "add_bias_linear": False,
        "moe_grouped_gemm": False,
    }
    return standard_config(**(options | overrides))


def latent(**overrides):
    return megatron_job.model_config(layers=1, **({"moe_layer_freq": [0]} | overrides))


def latent_experts(**overrides):
    return megatron_job.model_config(layers=1, **({"moe_layer_freq": [1]} | overrides))


def local(config, moe=False, **options):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if moe else None,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=config.multi_latent_attention,
        normalization=config.normalization,
        **options,
    )


def local_latent(config, moe=False):
    """With what MLA lacks without TransformerEngine."""
    spec = local(config, moe)
    attention = spec.submodules.self_attention
    parts = replace(attention.submodules, core_attention=CoreAttention)
    return replace(
        spec, submodules=replace(spec.submodules, self_attention=replace(attention, module=LatentAttention, submodules=parts))
    )


def from_block(config):
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    return get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization).layer_specs[0]


SPECS = {
    "dense": (standard_config, local),
    "dense, RMSNorm, no biases": (lambda: standard_config(normalization="RMSNorm", add_bias_linear=False), local),
    "dense, gated, grouped queries": (
        lambda: standard_config(
            num_attention_heads=4, num_query_groups=2, gated_linear_unit=True, activation_func=torch.nn.functional.silu
        ),
        local,
    ),
    "dense, qk_layernorm": (lambda: standard_config(qk_layernorm=True), local),
    "dense, qk_l2_norm": (lambda: standard_config(qk_l2_norm=True), lambda config: local(config, qk_l2_norm=True)),
    "dense, dropout": (lambda: standard_config(hidden_dropout=0.2, attention_dropout=0.1), local),
    "experts": (experts, lambda config: local(config, True)),
    "experts, all-gather": (lambda: experts(moe_token_dispatcher_type="allgather"), lambda config: local(config, True)),
    "experts, dropout": (lambda: experts(hidden_dropout=0.2), lambda config: local(config, True)),
    "latent attention": (latent, local_latent),
    "latent attention, experts": (latent_experts, lambda config: local_latent(config, True)),
    "block spec, dense": (standard_config, from_block),
    "block spec, experts": (experts, from_block),
}


def build(spec, config, seed=5):
    from megatron.core.transformer.spec_utils import build_module

    torch.manual_seed(seed)
    layer = build_module(spec, config=config, layer_number=1)
    for parameter in layer.parameters():
        if parameter.dim() < 2:  # biases and norms that are not what they start as
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def converted(spec, plain, config, residual):
    """The layer of the hyper-connection form, with the weights of `plain`."""
    from pipehc.megatron import hyper_connection_layer_spec

    layer = build(hyper_connection_layer_spec(spec, residual), config, seed=6)
    for name, module in layer.named_modules():
        if name in ("attention_connection", "mlp_connection") and hasattr(module, "reset_parameters"):
            module.reset_parameters()
    missing, unexpected = layer.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith(("attention_connection.", "mlp_connection.")) for name in missing)
    return layer


def mask():
    return torch.triu(torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool), 1)


def run_layer(layer, width, dtype=torch.float32):
    """Output, gradient of the input, gradients by name: for a fixed input, fixed random numbers and a fixed loss."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SEQUENCE, BATCH, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(SEQUENCE, BATCH, width, generator=generator, dtype=torch.float64).to(dtype)
    torch.manual_seed(11)
    model_parallel_cuda_manual_seed(11)
    out, _ = layer(x, attention_mask=mask())
    (out * weight).sum().backward()
    return out.detach(), x.grad, {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
