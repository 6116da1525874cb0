"""A transformer layer whose attention and FFN each sit inside their own residual connection."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor, unwrap_model
from torch import nn

from pipehc.megatron.connection import build_connection
from pipehc.megatron.nodes import LayerNodes, first_of
from pipehc.model.hyper_connection import HyperConnection, contract, expand
from pipehc.model.sublayers import Sublayer


class HyperConnectionLayer(TransformerLayer):
    """Takes and returns streams [s, b, n*C] (n = 1 for the plain residual); every submodule of Megatron's layer keeps its name.

    residual: settings as in the section `residual` of our configuration. ends: the first layer of the model takes one stream
    [s, b, C] and copies it, the last one returns one; without it, expanding and contracting are left to the caller.

    Raises:
        ValueError: if `config` or `submodules` ask for what the layer does not do, naming the option and the remedy.
    """

    def __init__(
        self, config: Any, submodules: Any, layer_number: int = 1, *, residual: Any, ends: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(config=config, submodules=submodules, layer_number=layer_number, **kwargs)
        refuse_layer(self)
        self.attention_connection = build_connection(config.hidden_size, residual)
        self.mlp_connection = build_connection(config.hidden_size, residual)
        self.residual = residual
        self.streams = 1 if residual.kind == "none" else residual.streams
        self.exit = residual.exit
        self.expands = ends and self.streams > 1 and self.layer_number == 1
        self.contracts = ends and self.streams > 1 and self.layer_number == config.num_layers
        self._nodes = LayerNodes(self)
        if config.sequence_parallel:
            # Every tensor-parallel rank sees its own tokens: Megatron sums the gradients of parameters that say so.
            for connection in (self.attention_connection, self.mlp_connection):
                if isinstance(connection, HyperConnection):
                    for parameter in connection.parameters():
                        parameter.sequence_parallel = True  # type: ignore[attr-defined]

    def sublayers(self) -> tuple[Sublayer, Sublayer]:
        """Attention and FFN, as pieces."""
        return self._nodes.sublayers(self.attention_connection, self.mlp_connection)

    def connections(self) -> dict[int, HyperConnection]:
        """The hyper-connections by sub-layer of the whole model: 2 * block for attention, 2 * block + 1 for the FFN."""
        both = enumerate((self.attention_connection, self.mlp_connection))
        return {2 * (self.layer_number - 1) + i: connection for i, connection in both if isinstance(connection, HyperConnection)}

    def forward(self, hidden_states: torch.Tensor, *_: Any, context: Any = None, **given: Any) -> tuple[torch.Tensor, Any]:
        """[s, b, n*C] -> ([s, b, n*C], context), as Megatron's blocks call their layers; one stream at the ends of the model.

        Modules are called as modules, so that the hooks of DDP (overlapped parameter gather) see them.
        """
        if given.get("inference_context") is not None:
            raise ValueError("inference_context: hyper-connection layers train and evaluate; Megatron's inference is not supported")
        x = self.expand(hidden_states)
        h, h_post, h_res = self.attention_connection(x)  # type: ignore[operator]
        (f,) = self._nodes.attention(first_of(self.input_layernorm(h)), given)
        x, h, h_post, h_res = self.mlp_connection(x, (self.attention_connection, f, h_post, h_res))  # type: ignore[operator]
        (f,) = self._nodes.whole_mlp(first_of(self.pre_mlp_layernorm(h)), given)
        out = self.contract(self.mlp_connection.post_res(x, f, h_post, h_res))
        # Megatron's schedules free the data of what they have sent, and refuse to do so for views.
        return make_viewless_tensor(inp=out, requires_grad=out.requires_grad, keep_graph=True), context

    def expand(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, C] -> [s, b, n*C] at the start of the model; elsewhere x as it is."""
        return expand(x, self.streams) if self.expands else x

    def contract(self, x: torch.Tensor) -> torch.Tensor:
        """[s, b, n*C] -> [s, b, C] at the end of the model; elsewhere x as it is."""
        return contract(x, self.streams, self.exit) if self.contracts else x


def hyper_connection_layers(chunks: Sequence[nn.Module]) -> list[HyperConnectionLayer]:
    """Those of the decoders of a job's model chunks, in their wrappers or not."""
    decoders = [getattr(unwrap_model(chunk), "decoder", None) for chunk in chunks]
    layers = (layer for decoder in decoders for layer in getattr(decoder, "layers", ()))
    return [layer for layer in layers if isinstance(layer, HyperConnectionLayer)]


def refuse_layer(layer: TransformerLayer) -> None:
    """ValueError for options of a Megatron layer that go through `TransformerLayer.forward` alone, which our layers replace."""
    config = layer.config
    problems = {
        "--recompute-modules (recompute_modules) contains 'layernorm'": (
            layer.recompute_input_layernorm or layer.recompute_pre_mlp_layernorm,
            "drop it; pipehc's own recomputation covers norms",
        ),
        "--recompute-modules (recompute_modules) contains 'mlp'": (layer.recompute_mlp, "drop it, or recompute 'core_attn'"),
        "a cross attention": (not isinstance(layer.cross_attention, IdentityOp), "use a decoder-only model"),
        f"--cuda-graph-impl (cuda_graph_impl = {getattr(config, 'cuda_graph_impl', 'none')!r})": (
            getattr(config, "cuda_graph_impl", "none") not in (None, "none"),
            "leave it out (set 'none')",
        ),
        "--fp32-residual-connection (fp32_residual_connection = True)": (
            config.fp32_residual_connection,
            "leave it out (set False); the maps are fp32 anyway",
        ),
        "--fine-grained-activation-offloading (fine_grained_activation_offloading = True)": (
            getattr(config, "fine_grained_activation_offloading", False),
            "leave it out (set False)",
        ),
        f"--mlp-chunks-for-training (mlp_chunks_for_training = {getattr(config, 'mlp_chunks_for_training', 1)})": (
            getattr(config, "mlp_chunks_for_training", 1) > 1,
            "leave it out (set 1)",
        ),
    }
    for what, (found, remedy) in problems.items():
        if found:
            raise ValueError(f"{what}: not supported by hyper-connection layers; {remedy}")
