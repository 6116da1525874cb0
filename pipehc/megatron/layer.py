"""A transformer layer whose sub-layers, attention and FFN, each sit inside their own residual connection."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor, unwrap_model
from torch import nn

from pipehc.megatron.connection import build_connection
from pipehc.megatron.nodes import LayerNodes, first_of, norm
from pipehc.model.hyper_connection import HyperConnection, contract, expand
from pipehc.model.norm import Norm
from pipehc.model.sublayers import Sublayer


class HyperConnectionLayer(TransformerLayer):
    """Takes and returns streams [s, b, n*C] (n = 1 for the plain residual); every submodule of Megatron's layer keeps its name.

    residual: settings as in the section `residual` of our configuration. ends: the first layer of the model takes one stream
    [s, b, C] and copies it, the last one returns one, and one of multi-token prediction, which lies behind that, does both;
    without it, expanding and contracting are left to the caller. single: a layer of HybridModel, which is attention or FFN; else it
    is both. `attention_connection` and `mlp_connection` are of what there is. fused: see PlainConnection.

    Raises:
        ValueError: if `config` or `submodules` ask for what the layer does not do, naming the option and the remedy.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any,
        layer_number: int = 1,
        *,
        residual: Any,
        ends: bool = False,
        single: bool = False,
        fused: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config, submodules=submodules, layer_number=layer_number, **kwargs)
        refuse_layer(self)
        self._nodes = LayerNodes(self, single)
        predicts = bool(kwargs.get("is_mtp_layer"))  # Megatron counts these from 1 again
        self.model_sublayers = config.num_layers * len(self._nodes.kinds)
        for sublayer, kind in enumerate(self._nodes.kinds, self._nodes.first + (self.model_sublayers if predicts else 0)):
            self.add_module(f"{kind}_connection", build_connection(config.hidden_size, residual, sublayer, fused))
        self.residual = residual
        self.streams = 1 if residual.kind == "none" else residual.streams
        self.exit = residual.exit
        self.expands = ends and self.streams > 1 and (predicts or self.layer_number == 1)
        self.contracts = ends and self.streams > 1 and (predicts or self.layer_number == config.num_layers)
        if config.sequence_parallel:
            # Every tensor-parallel rank sees its own tokens: Megatron sums the gradients of parameters that say so.
            for connection in self.connections().values():
                for parameter in connection.parameters():
                    parameter.sequence_parallel = True  # type: ignore[attr-defined]

    def sublayers(self, block: int | None = None) -> list[Sublayer]:
        """Attention and FFN, or the one of them that the layer is, as pieces. block: see `LayerNodes.sublayers`."""
        return self._nodes.sublayers(self._connections(), block)

    def connections(self) -> dict[int, HyperConnection]:
        """The hyper-connections by sub-layer of the whole model: 2 * block for attention, 2 * block + 1 for the FFN; of HybridModel
        the number of the layer, from 0."""
        found = enumerate(self._connections(), self._nodes.first)
        return {sublayer: connection for sublayer, connection in found if isinstance(connection, HyperConnection)}

    def _connections(self) -> list[Any]:
        return [getattr(self, f"{kind}_connection") for kind in self._nodes.kinds]

    def forward(self, hidden_states: torch.Tensor, *_: Any, context: Any = None, **given: Any) -> tuple[torch.Tensor, Any]:
        """[s, b, n*C] -> ([s, b, n*C], context), as Megatron's blocks call their layers; one stream at the ends of the model.

        Modules are called as modules where they have hooks, as those of DDP (overlapped parameter gather).
        """
        if given.get("inference_context") is not None:
            raise ValueError("inference_context: hyper-connection layers train and evaluate; Megatron's inference is not supported")
        x, before = self.expand(hidden_states), None
        for kind, connection in zip(self._nodes.kinds, self._connections()):
            normed = _norm(self._nodes.norm_of(kind), connection)
            if before is None:
                h, h_post, h_res = connection(x, norm=normed)
            else:
                x, h, h_post, h_res = connection(x, before, normed)
            (f,) = self._nodes.whole(kind)(h, given)
            before = connection, f, h_post, h_res
        assert before is not None
        out = self.contract(before[0].post_res(x, *before[1:]))
        # Megatron's schedules free the data of what they have sent, and refuse to do so for views.
        return make_viewless_tensor(inp=out, requires_grad=out.requires_grad, keep_graph=True), context

    def expand(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, C] -> [s, b, n*C] at the start of the model; elsewhere x as it is."""
        return expand(x, self.streams) if self.expands else x

    def contract(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, n*C] -> [s, b, C] at the end of the model; elsewhere x as it is."""
        return contract(x, self.streams, self.exit) if self.contracts else x


def _norm(module: nn.Module, connection: nn.Module) -> Norm:
    """What a hyper-connection does itself if it is an RMSNorm, unless something hooks into the module."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    if any(hooks) or not isinstance(connection, HyperConnection):
        return lambda x: first_of(module(x))
    return norm(module)


def hyper_connection_layers(chunks: Sequence[nn.Module]) -> list[HyperConnectionLayer]:
    """Those of the decoders of a job's model chunks, in their wrappers or not."""
    decoders = [getattr(unwrap_model(chunk), "decoder", None) for chunk in chunks]
    layers = (layer for decoder in decoders for layer in getattr(decoder, "layers", ()))
    return [layer for layer in layers if isinstance(layer, HyperConnectionLayer)]


def refuse_layer(layer: TransformerLayer) -> None:
    """ValueError for options of a Megatron layer that go through `TransformerLayer.forward` alone, which our layers replace."""
    refuse_layer_options(layer.config)
    recomputed = {"layernorm": layer.recompute_input_layernorm or layer.recompute_pre_mlp_layernorm, "mlp": layer.recompute_mlp}
    remedies = {"layernorm": "drop it; pipehc's own recomputation covers norms", "mlp": "drop it, or recompute 'core_attn'"}
    for module in (module for module, found in recomputed.items() if found):
        _refuse(f"--recompute-modules (recompute_modules) contains {module!r}", remedies[module])
    if not isinstance(layer.cross_attention, IdentityOp):
        _refuse("a cross attention", "use a decoder-only model")


def refuse_layer_options(config: Any) -> None:
    """`refuse_layer` for what the configuration alone says."""
    options = {  # values that are fine, remedy
        "cuda_graph_impl": ((None, "none"), "leave it out (set 'none')"),
        "fp32_residual_connection": ((False, None), "leave it out (set False); the maps are fp32 anyway"),
        "fine_grained_activation_offloading": ((False, None), "leave it out (set False)"),
        "mlp_chunks_for_training": ((1, None), "leave it out (set 1)"),
    }
    for option, (fine, remedy) in options.items():
        value = getattr(config, option, None)
        if value not in fine:
            _refuse(f"--{option.replace('_', '-')} ({option} = {value!r})", remedy)


def _refuse(what: str, remedy: str) -> None:
    raise ValueError(f"{what}: not supported by hyper-connection layers; {remedy}")
