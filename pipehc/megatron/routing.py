"""The way of tokens to experts and back, by `pipehc.kernels.routing`, for routers that do no more than the trainer's.

Between the two it is the token dispatcher that keeps the routing, as it does for Megatron's own functions.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import router_gating_linear

from pipehc.kernels.routing import choose, collect, place, spread
from pipehc.model.products import widens


def is_plain(mlp: MoELayer) -> bool:
    """Whether the router takes those of largest sigmoid(logit) + bias, each with its share in the sum of sigmoids, in fp32, and no
    more."""
    config, router = mlp.config, mlp.router
    return (
        config.moe_router_score_function == "sigmoid"
        and config.moe_router_dtype == "fp32"
        and config.moe_router_load_balancing_type == "none"
        and router.expert_bias is not None
        and router.bias is None
        and router.router_replay is None
        and not router.is_aux_loss_enabled()
        and not any(
            getattr(config, name, None)
            for name in (
                "moe_z_loss_coeff", "moe_input_jitter_eps", "moe_router_num_groups", "moe_router_topk_scaling_factor",
                "moe_router_fusion", "moe_permute_fusion", "moe_router_force_load_balancing", "moe_router_force_biased",
                "moe_apply_probs_on_input", "moe_router_padding_for_quantization",
            )
        )
        and config.moe_expert_capacity_factor is None
    )  # fmt: skip


def send(mlp: MoELayer, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[s, b, C] -> tokens [s*b*k, C] and probs [s*b*k], sorted by expert: `MoELayer.route` and `preprocess` without the counts."""
    router, dispatcher = mlp.router, mlp.token_dispatcher
    x = normed.reshape(-1, normed.shape[-1])
    router._maintain_float32_expert_bias()
    probs, chosen = choose(gate(x, router.weight), router.expert_bias, router.topk)
    router._apply_expert_bias(chosen)
    dispatcher.hidden_shape, dispatcher.routing_map = normed.shape, chosen
    dispatcher.reversed_local_input_permutation_mapping = rows = place(chosen, router.topk)
    return spread(x, probs, rows)


def bring_back(mlp: MoELayer, returned: torch.Tensor, shared: torch.Tensor | None) -> torch.Tensor:
    """Of every token the sum of what its experts said, and of shared [s, b, C]: `MoELayer.postprocess`."""
    dispatcher = mlp.token_dispatcher
    more = None if shared is None else shared.reshape(-1, shared.shape[-1])
    return collect(returned, dispatcher.reversed_local_input_permutation_mapping, more).view(dispatcher.hidden_shape)


def gate(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Logits [T, E] in fp32, of x [T, C] and weight [E, C]. In 16 bits without copies in fp32, where torch can: the products are as
    exact, and the gradient of the logits enters the backward as the sum of two numbers of 16 bits."""
    logits: torch.Tensor = _Gate.apply(x, weight) if widens(x) else router_gating_linear(x, weight, None, torch.float32)
    return logits


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        parts = two_parts(grad, x.dtype)
        d_weight = torch.mm(parts.t(), x, out_dtype=torch.float32).view(2, *weight.shape).sum(0)
        return parts.mm(torch.cat((weight, weight))), d_weight.to(weight.dtype)


def two_parts(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [T, E] in fp32 -> [T, 2 E] in 16 bits: x rounded, and what that leaves, rounded. In bf16 the sum is right to 2^-17."""
    rounded = x.to(dtype)
    return torch.cat((rounded, (x - rounded).to(dtype)), dim=1)
