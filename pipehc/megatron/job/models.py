"""The models of a job: GPTModel, whose layers are attention and FFN, and HybridModel, whose layers are one of the two."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer
from torch import nn

from pipehc.megatron.versions import hybrid_model

HybridModel, HybridStack = hybrid_model()
DECODERS = (TransformerBlock, HybridStack)
LAYERS = (TransformerLayer, MoETransformerLayer, MLPLayer)
"""Those that compute what TransformerLayer does; other classes override the forward that ours replaces."""


def final_norm(decoder: Any) -> nn.Module | None:
    """Behind the last layer of the model; None on other stages."""
    norm: nn.Module | None = getattr(decoder, "final_norm" if isinstance(decoder, HybridStack) else "final_layernorm", None)
    return norm


def hands_on(model: Any) -> bool:
    """Whether a stage before the last is known to return what its decoder makes, and nothing else."""
    return type(model) in (GPTModel, HybridModel)
