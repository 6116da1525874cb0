"""A transformer block whose attention and FFN each sit inside their own residual connection, cut where the queue changes."""

from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from pipehc.hyper_connection import HyperConnection
from pipehc.megatron.attention import CoreAttention, LatentAttention

Coefficients = torch.Tensor | None


class Connection(Protocol):
    """What joins a sub-layer F to the residual: x_{l+1} = H_res x_l + H_post^T F(H_pre x_l)."""

    def coefficients_pre(self, x: torch.Tensor) -> tuple[torch.Tensor, Coefficients, Coefficients]:
        """[s, b, n*C] -> the input of F [s, b, C], H_post, H_res."""
        ...

    def post_res(self, x: torch.Tensor, f: torch.Tensor, h_post: Any, h_res: Any) -> torch.Tensor:
        """[s, b, n*C] and the output of F [s, b, C] -> [s, b, n*C]."""
        ...


class PlainConnection(nn.Module):
    """The baseline: one stream, x + F(x)."""

    def coefficients_pre(self, x: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return x, None, None

    def post_res(self, x: torch.Tensor, f: torch.Tensor, h_post: Coefficients, h_res: Coefficients) -> torch.Tensor:
        return x + f


def build_connection(hidden_size: int, residual: Any) -> Connection:
    """The connection that the section `residual` of the configuration asks for."""
    if residual.kind == "none":
        return PlainConnection()
    return HyperConnection(
        hidden_size,
        residual.streams,
        residual.kind,
        alpha=residual.alpha,
        iterations=residual.sinkhorn_iterations,
        condition=residual.condition,
        static=residual.static,
        fixed=residual.fixed,
    )


class AfterAttention(NamedTuple):
    """What the node `attention` hands on. Dense blocks have no `tokens` and `probs`, the plain residual no coefficients."""

    x: torch.Tensor  # [s, b, n*C], the residual after the attention sub-layer
    h_post: Coefficients  # of the FFN sub-layer
    h_res: Coefficients
    normed: torch.Tensor  # [s, b, C], the normalised input of the FFN
    tokens: torch.Tensor | None  # [s*b*k, C], sorted by expert
    probs: torch.Tensor | None  # [s*b*k]


class HyperConnectionLayer(TransformerLayer):
    """One block: attention | dispatch | mlp | combine | mlp_post.

    The methods of these names (for `mlp`, a module: `experts` or `dense`) are the nodes of a stage; `forward` chains them.
    All that autograd needs goes through their arguments and results, so the backward of one micro-batch may run between the nodes
    of another's forward. What must not happen is a second *forward* of the same layer between its `attention` and its `mlp_post`:
    the token dispatcher keeps the routing of the latest one.
    """

    def __init__(self, config: Any, submodules: Any, layer_number: int = 1, **kwargs: Any) -> None:
        super().__init__(config=config, submodules=submodules, layer_number=layer_number, **kwargs)
        self.attention_connection = build_connection(config.hidden_size, config.residual)
        self.mlp_connection = build_connection(config.hidden_size, config.residual)

    def attention(self, x: torch.Tensor) -> AfterAttention:
        """The attention sub-layer, then all that comes before the all-to-all: coefficients, norm, routing, sorting by expert."""
        h, h_post, h_res = self.attention_connection.coefficients_pre(x)
        f, _ = self.self_attention(self.input_layernorm(h), attention_mask=None)
        x = self.attention_connection.post_res(x, f, h_post, h_res)
        h, h_post, h_res = self.mlp_connection.coefficients_pre(x)
        normed = self.pre_mlp_layernorm(h)
        if not self.is_moe_layer:
            return AfterAttention(x, h_post, h_res, normed, None, None)
        tokens, probs = self.mlp.preprocess(normed, *self.mlp.route(normed))
        return AfterAttention(x, h_post, h_res, normed, tokens, probs)

    def dispatch(self, tokens: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All-to-all: each token to the ranks of its experts. Experts only."""
        return self.mlp.dispatch(tokens, probs)

    def experts(self, normed: torch.Tensor, tokens: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The node `mlp` of a block with experts: (routed [tokens, C], shared [s, b, C] or None)."""
        shared = self.mlp.shared_experts_compute(normed)
        routed, _ = self.mlp.routed_experts_compute(tokens, probs)
        return routed, shared

    def dense(self, normed: torch.Tensor) -> torch.Tensor:
        """The node `mlp` of a dense block: [s, b, C] -> [s, b, C]."""
        return self.mlp(normed)[0]

    def combine(self, routed: torch.Tensor) -> torch.Tensor:
        """All-to-all: each expert's output back to the rank of its token. Experts only."""
        return self.mlp.combine(routed)

    def mlp_post(
        self, x: torch.Tensor, f: torch.Tensor, shared: torch.Tensor | None, h_post: Coefficients, h_res: Coefficients
    ) -> torch.Tensor:
        """Sum what the experts said of each token (`f` from `combine` or `dense`) and join it to the residual: [s, b, n*C]."""
        if self.is_moe_layer:
            f = self.mlp.postprocess(f, shared)
        return self.mlp_connection.post_res(x, f, h_post, h_res)

    def forward(self, hidden_states: torch.Tensor, *_: Any, context: Any = None, **__: Any) -> tuple[torch.Tensor, Any]:
        """[s, b, n*C] -> ([s, b, n*C], context), as Megatron's blocks call their layers. Attention is always causal."""
        a = self.attention(hidden_states)
        if a.tokens is None or a.probs is None:
            f, shared = self.dense(a.normed), None
        else:
            f, shared = self.experts(a.normed, *self.dispatch(a.tokens, a.probs))
            f = self.combine(f)
        return self.mlp_post(a.x, f, shared, a.h_post, a.h_res), context


def hyper_connection_layer_spec(config: Any, block: int) -> ModuleSpec:
    """Megatron's released local spec of block `block` (from 0), with this layer and MLA that runs without TransformerEngine.

    `config` is a `pipehc.megatron.model.StageConfig`: an MLATransformerConfig that also has the section `residual`.
    """
    spec = get_gpt_decoder_layer_specs(config, use_transformer_engine=False, normalization=config.normalization)[block]
    attention = spec.submodules.self_attention
    # Copied, not changed: blocks of one kind share their spec.
    attention = replace(attention, module=LatentAttention, submodules=replace(attention.submodules, core_attention=CoreAttention))
    return replace(spec, module=HyperConnectionLayer, submodules=replace(spec.submodules, self_attention=attention))
