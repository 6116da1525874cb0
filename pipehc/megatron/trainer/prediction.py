"""Multi-token prediction (DeepSeek-V3): depth modules behind the decoder, each of which predicts one token further on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer, MultiTokenPredictionLayerSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from pipehc.megatron.norm import TorchRMSNorm

# Tokens that are rolled in at the end: Megatron's choice. No label that counts is predicted from them.
_NO_TOKEN, _NO_LABEL = 0, -1


class DepthModule(MultiTokenPredictionLayer):
    """Megatron's, called with embeddings in the place of tokens, and without its random states: the trainer draws nothing."""

    def forward(self, hidden: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """hidden, embedded [s, b, C]: of each token so far, and of the one that is `layer_number` further on -> [s, b, C], normed
        for the output layer."""
        x, _ = self.mtp_model_layer(self._concat_embeddings(hidden, embedded))
        y: torch.Tensor = self._postprocess(x)
        return y


class Prediction(nn.Module):
    """The depth modules of a model: `layers.0` predicts the token after the next one, and so on.

    spec: of a decoder layer. Each module has one of its own, with hyper-connections that expand and contract inside it.
    """

    def __init__(self, config: Any, spec: ModuleSpec, depth: int, pg_collection: Any) -> None:
        super().__init__()
        submodules = MultiTokenPredictionLayerSubmodules(
            enorm=TorchRMSNorm,
            hnorm=TorchRMSNorm,
            layer_norm=TorchRMSNorm,
            eh_proj=ColumnParallelLinear,
            mtp_model_layer=replace(spec, params=spec.params | {"ends": True}),
        )
        self.layers = nn.ModuleList(
            DepthModule(config, submodules, layer_number=number, pg_collection=pg_collection) for number in range(1, depth + 1)
        )

    def forward(
        self, hidden: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of each depth what the output layer takes, and its labels.

        hidden [s, b, C]: what the output layer takes for the next token. tokens, labels [b, s]. embed: tokens [b, s] -> [s, b, C].
        """
        for module in self.layers:
            tokens, labels = _rolled(tokens, _NO_TOKEN), _rolled(labels, _NO_LABEL)
            hidden = module(hidden, embed(tokens))
            yield hidden, labels


def share_of_depth(labels: torch.Tensor, of_depth: torch.Tensor) -> torch.Tensor:
    """What a depth's sum over its labels is multiplied by, so that divided by the number of `labels` that count it is their mean:
    fewer count the further on they lie. As Megatron's, of one micro-batch; a sum over none is 0."""
    counted, left = (labels >= 0).sum(), (of_depth >= 0).sum()
    return counted / left.clamp(min=1)


def _rolled(x: torch.Tensor, fill: int) -> torch.Tensor:
    """[b, s], one place to the left."""
    return nn.functional.pad(x[:, 1:], (0, 1), value=fill)
