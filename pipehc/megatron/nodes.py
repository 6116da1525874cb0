"""The sub-layers of any Megatron TransformerLayer, cut into pieces where the queue changes."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import nn
from torch.func import functional_call

from pipehc.comm.expert import start_all_to_all
from pipehc.megatron.counts import Counts, can_be_apart, left_out
from pipehc.megatron.feed_forward import Experts
from pipehc.megatron.routing import bring_back, is_plain, send
from pipehc.megatron.wgrad import stand_ins_of
from pipehc.model.norm import Norm, RMSNorm
from pipehc.model.sublayers import CONTEXT, Connection, Sublayer
from pipehc.recompute import Exchange, Piece

Context = Mapping[str, Any] | None
"""What Megatron's blocks give their layers beside the streams (attention_mask, rotary_pos_emb, padding_mask ...), by name."""

ATTENTION_ARGUMENTS = ("rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin", "attention_bias", "packed_seq_params")
CONTEXT_ARGUMENTS = (*ATTENTION_ARGUMENTS, "padding_mask")
"""Of Megatron's blocks, beside attention_mask: what the pieces hand on."""


class LayerNodes:
    """The F of the sub-layers of `layer`, in the nodes attention | dispatch | mlp | combine | mlp_post.

    A dense block has no all-to-alls; experts behind another dispatcher than Megatron's all-to-all are one piece. single: the layer
    is one of HybridModel's, attention or FFN, each with a residual of its own; else it has both.

    All that a backward needs goes through the values of the pieces, so the backward of one micro-batch may run between the pieces
    of another's forward. What must not happen is a second *forward* of the same layer between its `attention` and its `mlp_post`:
    the token dispatcher keeps the routing of the latest one.
    """

    def __init__(self, layer: TransformerLayer, single: bool = False) -> None:
        self.layer, self.mlp, self.single = layer, layer.mlp, single
        self.kinds = tuple(kind for kind, module in (("attention", layer.self_attention), ("mlp", layer.mlp)) if is_there(module))
        if len(self.kinds) != 2 - single:
            has, must = " and ".join(self.kinds) or "nothing", "one of the two" if single else "both"
            raise ValueError(f"layer {layer.layer_number}: has {has} of attention and FFN; must have {must}")
        self.own_routing = layer.is_moe_layer and isinstance(layer.mlp.experts, Experts) and is_plain(layer.mlp)

    @property
    def first(self) -> int:
        """The number of the layer's first sub-layer in the whole model."""
        return (self.layer.layer_number - 1) * len(self.kinds)

    def norm_of(self, kind: str) -> nn.Module:
        """Of the input of a sub-layer."""
        found: nn.Module = self.layer.input_layernorm if kind == "attention" else self.layer.pre_mlp_layernorm
        return found

    def whole(self, kind: str) -> Callable[[torch.Tensor, Context], tuple[torch.Tensor]]:
        """The F of a sub-layer in one, [s, b, C] -> [s, b, C]."""
        return self.attention if kind == "attention" else self.whole_mlp

    def sublayers(self, connections: Sequence[Connection], block: int | None = None) -> list[Sublayer]:
        """Each inside its connection. block: whose nodes the pieces are; None: the layer is a block of its own."""
        block = self.layer.layer_number - 1 if block is None else block
        node = partial("{}.{}".format, block)
        return [
            self._attention(connection, node) if kind == "attention" else self._mlp(connection, node)
            for kind, connection in zip(self.kinds, connections, strict=True)
        ]

    def _attention(self, connection: Connection, node: Callable[[str], str]) -> Sublayer:
        attention = Piece("f", self.attention, ("normed", CONTEXT), ("f",), node("attention"))
        name = f"{self.layer.layer_number - 1}.attention"
        return Sublayer(name, connection, norm(self.layer.input_layernorm), (attention,))

    def _mlp(self, connection: Connection, node: Callable[[str], str]) -> Sublayer:
        if not self.in_pieces:
            mlp: tuple[Piece, ...] = (Piece("f", self.whole_mlp, ("normed", CONTEXT), ("f",), node("mlp")),)
        else:
            exchanged = self.mlp.token_dispatcher.ep_size > 1
            arrived = ("arrived", "probs_arrived", "chunks", "ends") if exchanged else ("tokens", "probs")
            routed = ("tokens", "probs", "routing_map") if exchanged else ("tokens", "probs")
            route = Piece("route", self._route, ("normed", CONTEXT), routed, node("attention"))
            experts = Piece("experts", self._experts, ("normed", *arrived), ("routed", "shared"), node("mlp"))
            sum_up = Piece("sum", self._sum, ("returned" if exchanged else "routed", "shared"), ("f",), node("mlp_post"))
            mlp = route, experts, sum_up
            if exchanged:
                count = Piece(
                    "count", self._count, ("routing_map",), ("counts", "chunks", "ends"), node("dispatch"),
                    queue="communication", differentiable=False,
                )  # fmt: skip
                dispatch = Exchange(
                    "dispatch", self._dispatch, ("tokens", "probs", "counts"), arrived[:2], node("dispatch"),
                    queue="communication", run_backward=self._dispatch_backward,
                )  # fmt: skip
                combine = Exchange(
                    "combine", self._combine, ("routed", "counts"), ("returned",), node("combine"),
                    queue="communication", run_backward=self._combine_backward,
                )  # fmt: skip
                mlp = route, count, dispatch, experts, combine, sum_up
        name = f"{self.layer.layer_number - 1}.mlp"
        return Sublayer(name, connection, norm(self.layer.pre_mlp_layernorm), mlp, node("mlp_post"), "high")

    @property
    def in_pieces(self) -> bool:
        """Whether the FFN is experts behind an all-to-all that can be started and ended apart."""
        return (
            self.layer.is_moe_layer
            and type(self.mlp.token_dispatcher) is MoEAlltoAllTokenDispatcher
            and not self.mlp.shared_expert_overlap
            and not self.mlp.token_dispatcher.drop_and_pad  # its all-to-all has no splits
            and not self.mlp.moe_layer_recompute
            and not getattr(self.layer.config, "moe_latent_size", None)
        )

    def attention(self, normed: torch.Tensor, context: Context) -> tuple[torch.Tensor]:
        """[s, b, C] -> [s, b, C]: attention, its bias and dropout."""
        context = context or {}
        given = {name: context[name] for name in ATTENTION_ARGUMENTS if context.get(name) is not None}
        with self.random_state():
            return (self.drop(self.layer.self_attention(normed, attention_mask=context.get("attention_mask"), **given)),)

    def whole_mlp(self, normed: torch.Tensor, context: Context) -> tuple[torch.Tensor]:
        """[s, b, C] -> [s, b, C]: the FFN as Megatron runs it, its bias and dropout."""
        with self.random_state():
            out = self.mlp(normed, padding_mask=padding_mask(context)) if self.layer.is_moe_layer else self.mlp(normed)
            return (self.drop(out),)

    def drop(self, out: Any) -> torch.Tensor:
        """(output, bias or None) of a sub-layer -> what is added to the residual."""
        f, bias = out
        if bias is not None:
            f = f + bias
        p = self.layer.hidden_dropout
        return torch.dropout(f, p, self.layer.training) if p else f

    def random_state(self) -> AbstractContextManager[Any]:
        """With sequence parallelism every rank holds other tokens, and draws other numbers, as inside Megatron's blocks; not so
        inside its HybridStack. The trainer, which draws none, has no states for it."""
        tracker = get_cuda_rng_tracker()
        forked = self.layer.config.sequence_parallel and not self.single and tracker.is_initialized()
        return tracker.fork() if forked else nullcontext()

    def _route(self, normed: torch.Tensor, context: Context) -> tuple[torch.Tensor, ...]:
        """[s, b, C] -> tokens [s*b*k, C] sorted by expert, probs [s*b*k], and with expert parallelism the routing map."""
        mask = padding_mask(context)
        if mask is not None:
            mask = mask.transpose(0, 1).bool()
        dispatcher = self.mlp.token_dispatcher
        exchanged = dispatcher.ep_size > 1
        if self.own_routing and mask is None:
            tokens, probs = send(self.mlp, normed)
            if not exchanged:
                counts = dispatcher.preprocess(dispatcher.routing_map)
                dispatcher.tokens_per_expert = dispatcher._maybe_dtoh_and_synchronize("before_permutation_1", counts)
        else:
            with self.random_state(), left_out(dispatcher) if exchanged and can_be_apart(dispatcher) else nullcontext():
                tokens, probs = self.mlp.preprocess(normed, *self.mlp.route(normed, mask))
        if exchanged:
            return tokens, probs, dispatcher.routing_map
        # Upstream's own all-to-all starts with this: with tensor parallelism the counts are numbers on the host afterwards.
        dispatcher.tokens_per_expert = dispatcher._maybe_dtoh_and_synchronize("before_ep_alltoall", dispatcher.tokens_per_expert)
        return tokens, probs

    def _count(self, routing_map: torch.Tensor) -> tuple[Counts, torch.Tensor | None, torch.Tensor | None]:
        """How many tokens go to which rank, later; and what `_experts` reads of it on the device."""
        experts = self.mlp.experts
        found = Counts(self.mlp.token_dispatcher, routing_map, ends=isinstance(experts, Experts) and experts.grouped)
        return found, found.chunks, found.ends

    def _dispatch(self, tokens: torch.Tensor, probs: torch.Tensor, counts: Counts) -> Callable[[], tuple[torch.Tensor, ...]]:
        """Each token to the ranks of its experts."""
        return start_all_to_all((tokens, probs), counts.splits, self.mlp.token_dispatcher.ep_group)

    def _dispatch_backward(self, gradients: tuple[torch.Tensor, ...], counts: Counts) -> Callable[[], tuple[Any, ...]]:
        end = start_all_to_all(gradients, counts.splits.back(), self.mlp.token_dispatcher.ep_group)
        return lambda: (*end(), None)

    def _experts(
        self,
        normed: torch.Tensor,
        tokens: torch.Tensor,
        probs: torch.Tensor,
        chunks: torch.Tensor | None = None,
        ends: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(routed [tokens, C], shared [s, b, C] or None). chunks: as the dispatcher has it, and so on this queue, too."""
        with self.random_state():
            shared = self.mlp.shared_experts_compute(normed)
            if isinstance(self.mlp.experts, Experts):
                return self.mlp.experts.compute(self.mlp.token_dispatcher, tokens, probs, ends), shared
            routed, _ = self.mlp.routed_experts_compute(tokens, probs)
        return routed, shared

    def _combine(self, routed: torch.Tensor, counts: Counts) -> Callable[[], tuple[torch.Tensor, ...]]:
        """Each expert's output back to the rank of its token."""
        return start_all_to_all((routed,), counts.splits.back(), self.mlp.token_dispatcher.ep_group)

    def _combine_backward(self, gradients: tuple[torch.Tensor, ...], counts: Counts) -> Callable[[], tuple[Any, ...]]:
        end = start_all_to_all(gradients, counts.splits, self.mlp.token_dispatcher.ep_group)
        return lambda: (*end(), None)

    def _sum(self, returned: torch.Tensor, shared: torch.Tensor | None) -> tuple[torch.Tensor]:
        """What the experts said of each token, [s, b, C]."""
        with self.random_state():
            out = bring_back(self.mlp, returned, shared) if self.own_routing else self.mlp.postprocess(returned, shared)
            return (self.drop((out, None)),)


def is_there(module: nn.Module) -> bool:
    """Whether a layer has this part."""
    return not isinstance(module, IdentityOp)


def node_blocks(layers: Sequence[TransformerLayer]) -> list[int]:
    """Of consecutive layers, the blocks whose nodes their pieces are, see `sublayers`: an FFN ends a block, so that attention and
    the FFN behind it are one, in layers of both and in HybridModel's."""
    found: list[int] = []
    begins = True
    for layer in layers:
        found.append(layer.layer_number - 1 if begins else found[-1])
        begins = is_there(layer.mlp)
    return found


def padding_mask(context: Context) -> torch.Tensor | None:
    """What experts get of a context. ValueError for joined samples, which Megatron's own layers part for them."""
    context = context or {}
    if getattr(context.get("packed_seq_params"), "tokens_per_sample", None) is not None:
        raise ValueError("packed_seq_params.tokens_per_sample: must be None, experts would balance joined samples as one")
    return context.get("padding_mask")


def norm(module: nn.Module) -> Norm:
    """What a norm that Megatron built computes; torch's RMSNorm in the form that hyper-connections do themselves.
    `install_deferral` lets W add its gradients."""

    def entering(parameter: torch.Tensor) -> torch.Tensor:
        stand_ins = stand_ins_of(module)
        return parameter if stand_ins is None else stand_ins(parameter)

    def as_module(x: torch.Tensor) -> torch.Tensor:
        if stand_ins_of(module) is None or not torch.is_grad_enabled():
            return first_of(module(x))
        parameters = {name: entering(parameter) for name, parameter in module.named_parameters()}
        return first_of(functional_call(module, parameters, (x,), tie_weights=False) if parameters else module(x))

    if type(module) is not nn.RMSNorm:
        return as_module
    eps = module.eps
    assert eps is not None
    return RMSNorm(lambda: entering(module.weight), eps)


def first_of(normed: Any) -> torch.Tensor:
    """What a norm makes; one that is fused with the residual (`fused_residual_rmsnorm`) returns its input as well."""
    out: torch.Tensor = normed[0] if isinstance(normed, tuple) else normed
    return out
