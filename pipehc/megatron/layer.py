"""A transformer block whose attention and FFN each sit inside their own residual connection, cut where the queue changes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn

from pipehc.comm.expert import Splits, start_all_to_all
from pipehc.hyper_connection import HyperConnection
from pipehc.megatron.attention import CoreAttention, LatentAttention
from pipehc.norm import rms_norm
from pipehc.recompute import Exchange, Piece
from pipehc.sublayers import Coefficients, Connection, Sublayer


class PlainConnection(nn.Module):
    """The baseline: one stream, x + F(x)."""

    track = False

    def coefficients_pre(self, x: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return x, None, None

    def post_res(self, x: torch.Tensor, f: torch.Tensor, h_post: Coefficients, h_res: Coefficients) -> torch.Tensor:
        return x + f

    def post_res_pre(
        self, x: torch.Tensor, f: torch.Tensor, h_post: Coefficients, h_res: Coefficients, following: Any
    ) -> tuple[torch.Tensor, torch.Tensor, Coefficients, Coefficients]:
        x = self.post_res(x, f, h_post, h_res)
        return x, *following.coefficients_pre(x)


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


class HyperConnectionLayer(TransformerLayer):
    """One block of two sub-layers, in the nodes attention | dispatch | mlp | combine | mlp_post; a dense block has no all-to-alls.

    All that a backward needs goes through the values of the pieces, so the backward of one micro-batch may run between the pieces
    of another's forward. What must not happen is a second *forward* of the same layer between its `attention` and its `mlp_post`:
    the token dispatcher keeps the routing of the latest one.
    """

    def __init__(self, config: Any, submodules: Any, layer_number: int = 1, **kwargs: Any) -> None:
        super().__init__(config=config, submodules=submodules, layer_number=layer_number, **kwargs)
        self.attention_connection = build_connection(config.hidden_size, config.residual)
        self.mlp_connection = build_connection(config.hidden_size, config.residual)

    def sublayers(self) -> tuple[Sublayer, Sublayer]:
        """Attention and FFN, as pieces."""
        block = self.layer_number - 1
        node = partial("{}.{}".format, block)
        attention = Piece("f", self._attention, ("normed",), ("f",), node("attention"))
        if not self.is_moe_layer:
            mlp: tuple[Piece, ...] = (Piece("f", self._dense, ("normed",), ("f",), node("mlp")),)
        else:
            exchanged = self.mlp.token_dispatcher.ep_size > 1
            arrived = ("arrived", "probs_arrived") if exchanged else ("tokens", "probs")
            route = Piece("route", self._route, ("normed",), ("tokens", "probs", "splits"), node("attention"))
            experts = Piece("experts", self._experts, ("normed", *arrived), ("routed", "shared"), node("mlp"))
            sum_up = Piece("sum", self._sum, ("returned" if exchanged else "routed", "shared"), ("f",), node("mlp_post"))
            mlp = route, experts, sum_up
            if exchanged:
                dispatch = Exchange(
                    "dispatch", self._dispatch, ("tokens", "probs", "splits"), arrived, node("dispatch"),
                    queue="communication", run_backward=self._dispatch_backward,
                )  # fmt: skip
                combine = Exchange(
                    "combine", self._combine, ("routed", "splits"), ("returned",), node("combine"),
                    queue="communication", run_backward=self._combine_backward,
                )  # fmt: skip
                mlp = route, dispatch, experts, combine, sum_up
        return (
            Sublayer(f"{block}.attention", self.attention_connection, _norm(self.input_layernorm), (attention,)),
            Sublayer(f"{block}.mlp", self.mlp_connection, _norm(self.pre_mlp_layernorm), mlp, node("mlp_post"), "high"),
        )

    def forward(self, hidden_states: torch.Tensor, *_: Any, context: Any = None, **__: Any) -> tuple[torch.Tensor, Any]:
        """[s, b, n*C] -> ([s, b, n*C], context), as Megatron's blocks call their layers. Attention is always causal."""
        for sublayer in self.sublayers():
            hidden_states = sublayer(hidden_states)
        return hidden_states, context

    def _attention(self, normed: torch.Tensor) -> tuple[torch.Tensor]:
        """[s, b, C] -> [s, b, C]."""
        f, _ = self.self_attention(normed, attention_mask=None)
        return (f,)

    def _dense(self, normed: torch.Tensor) -> tuple[torch.Tensor]:
        """[s, b, C] -> [s, b, C]."""
        return (self.mlp(normed)[0],)

    def _route(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Splits | None]:
        """[s, b, C] -> tokens [s*b*k, C] sorted by expert, probs [s*b*k], and how many of them go to which rank."""
        tokens, probs = self.mlp.preprocess(normed, *self.mlp.route(normed))
        dispatcher = self.mlp.token_dispatcher
        if dispatcher.ep_size == 1:
            return tokens, probs, None
        # Upstream's own all-to-all starts with this: afterwards the counts are numbers on the host.
        dispatcher.tokens_per_expert = dispatcher._maybe_dtoh_and_synchronize("before_ep_alltoall", dispatcher.tokens_per_expert)
        return tokens, probs, Splits(dispatcher.input_splits.tolist(), dispatcher.output_splits.tolist())

    def _dispatch(self, tokens: torch.Tensor, probs: torch.Tensor, splits: Splits) -> Callable[[], tuple[torch.Tensor, ...]]:
        """Each token to the ranks of its experts."""
        return start_all_to_all((tokens, probs), splits, self.mlp.token_dispatcher.ep_group)

    def _dispatch_backward(self, gradients: tuple[torch.Tensor, ...], splits: Splits) -> Callable[[], tuple[Any, ...]]:
        end = start_all_to_all(gradients, splits.back(), self.mlp.token_dispatcher.ep_group)
        return lambda: (*end(), None)

    def _experts(self, normed: torch.Tensor, tokens: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(routed [tokens, C], shared [s, b, C] or None)."""
        shared = self.mlp.shared_experts_compute(normed)
        routed, _ = self.mlp.routed_experts_compute(tokens, probs)
        return routed, shared

    def _combine(self, routed: torch.Tensor, splits: Splits) -> Callable[[], tuple[torch.Tensor, ...]]:
        """Each expert's output back to the rank of its token."""
        return start_all_to_all((routed,), splits.back(), self.mlp.token_dispatcher.ep_group)

    def _combine_backward(self, gradients: tuple[torch.Tensor, ...], splits: Splits) -> Callable[[], tuple[Any, ...]]:
        end = start_all_to_all(gradients, splits, self.mlp.token_dispatcher.ep_group)
        return lambda: (*end(), None)

    def _sum(self, returned: torch.Tensor, shared: torch.Tensor | None) -> tuple[torch.Tensor]:
        """What the experts said of each token, [s, b, C]."""
        return (self.mlp.postprocess(returned, shared),)


def _norm(module: nn.RMSNorm) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a norm that Megatron built computes, saving less."""
    eps = module.eps
    assert eps is not None
    return lambda x: rms_norm(x, module.weight, eps)


def hyper_connection_layer_spec(config: Any, block: int) -> ModuleSpec:
    """Megatron's released local spec of block `block` (from 0), with this layer and MLA that runs without TransformerEngine.

    `config` is a `pipehc.megatron.model.StageConfig`: an MLATransformerConfig that also has the section `residual`.
    """
    spec = get_gpt_decoder_layer_specs(config, use_transformer_engine=False, normalization=config.normalization)[block]
    attention = spec.submodules.self_attention
    # Copied, not changed: blocks of one kind share their spec.
    attention = replace(attention, module=LatentAttention, submodules=replace(attention.submodules, core_attention=CoreAttention))
    return replace(spec, module=HyperConnectionLayer, submodules=replace(spec.submodules, self_attention=attention))
