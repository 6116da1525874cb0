"""Megatron's local feed-forward layers, dense, shared and of experts, that compute with `pipehc.model.feed_forward`.

Names, shapes and initialisation of their parameters are Megatron's; so are checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import nn

from pipehc.model.feed_forward import Groups, Projection, feed_forward
from pipehc.model.products import stacked, why_not_grouped
from pipehc.model.wgrad import Accumulate, Split


class FeedForward:
    """A part of these layers: SwiGLU between two linear layers without biases."""

    rebuild = False
    """Whether the output of SwiGLU is made again in the backward."""
    _accumulate: Callable[[nn.Parameter], Accumulate] | None = None
    _projections: tuple[Projection, Projection] | None = None

    def parts(self) -> Sequence[Any]:
        """Megatron's MLPs with the parameters, one for each expert."""
        raise NotImplementedError

    def defer(self, accumulate: Callable[[nn.Parameter], Accumulate]) -> None:
        """Weight gradients go to what `accumulate` finds for a weight, whose memory stays where it is from now on."""
        self._accumulate = accumulate
        self._projections = self._project()

    def projections(self) -> tuple[Projection, Projection]:
        """Of fc1 and fc2."""
        return self._projections or self._project()

    def _project(self) -> tuple[Projection, Projection]:
        layers = ([part.linear_fc1.weight for part in self.parts()], [part.linear_fc2.weight for part in self.parts()])
        if self._accumulate is None:
            fc1, fc2 = (Projection(weights) for weights in layers)
        else:
            groups = all(why_not_grouped(weights[0]) is None for weights in layers)
            takes = [[self._accumulate(weight) for weight in weights] for weights in layers]
            fc1, fc2 = (Projection(w, stacked(w) if groups else None, taken) for w, taken in zip(layers, takes))
        return fc1, fc2


class Mlp(FeedForward, MLP):
    """Megatron's MLP: a dense FFN."""

    def parts(self) -> Sequence[Any]:
        return [self]

    def forward(self, hidden_states: torch.Tensor, per_token_scale: torch.Tensor | None = None, **_: Any) -> Any:
        """[..., C] -> ([..., C], None)"""
        assert per_token_scale is None, "experts are apart"
        x, ranks = hidden_states.reshape(-1, hidden_states.shape[-1]), self.tp_group.size()
        split = Split(self.tp_group, self.config.sequence_parallel) if ranks > 1 else None
        tokens = x.shape[0] * (ranks if self.config.sequence_parallel else 1)
        out = feed_forward(x, *self.projections(), Groups([tokens]), rebuild=self.rebuild, split=split)
        return out.view(hidden_states.shape), None


class SharedExperts(SharedExpertMLP, Mlp):
    """Megatron's shared experts, which are one MLP."""


class _LastFirst(nn.ModuleList):
    """Registered from the last to the first. DDP lays parameters out from the last to the first: so the weights of an expert lie
    behind those of the one before, equally far apart, and are one tensor to a grouped product."""

    def __init__(self, modules: nn.ModuleList) -> None:
        super().__init__()
        for index in reversed(range(len(modules))):
            self.add_module(str(index), modules[index])

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[index] for index in range(len(self)))


class Experts(FeedForward, SequentialMLP):
    """Megatron's local experts: products are grouped where they can be, else one after the other into one result."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.local_experts: nn.ModuleList = _LastFirst(self.local_experts)

    def parts(self) -> Sequence[Any]:
        return list(self.local_experts)

    @property
    def grouped(self) -> bool:
        """Whether it wants to know on the device where the tokens of each expert end."""
        return all(projection.stacked is not None for projection in self.projections())

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
        ends: torch.Tensor | None = None,
    ) -> Any:
        """tokens [T, C] in the order of the experts, their numbers on the host, probs [T] -> ([T, C], None). ends: see `Groups`."""
        groups = Groups(tokens_per_expert.tolist(), ends)
        probs = permuted_probs
        return feed_forward(permuted_local_hidden_states, *self.projections(), groups, probs, rebuild=self.rebuild), None

    def compute(
        self, dispatcher: MoEAlltoAllTokenDispatcher, tokens: torch.Tensor, probs: torch.Tensor, ends: torch.Tensor | None
    ) -> torch.Tensor:
        """What `MoELayer.routed_experts_compute` does. Without an all-to-all tokens are in the order of the experts already: they
        are not copied, and come back as they are."""
        if dispatcher.ep_size > 1 or dispatcher.tp_size > 1:
            tokens, counts, probs = dispatcher.dispatch_postprocess(tokens, probs)
            return dispatcher.combine_preprocess(self(tokens, counts, probs, ends)[0])
        counts = dispatcher.tokens_per_expert
        for point in ("before_permutation_2", "before_finish"):
            counts = dispatcher._maybe_dtoh_and_synchronize(point, counts)
        dispatcher.tokens_per_expert = None
        out: torch.Tensor = self(tokens, counts, probs, ends)[0]
        return out
