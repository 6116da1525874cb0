"""How many tokens go where: counted, told to the other ranks and copied to the host off the compute queue.

Megatron's all-to-all dispatcher does this in the middle of its permutation, on the compute queue, where everything behind it waits
for the slowest rank of the group, and the host for the queue. The permutation itself needs no counts unless tokens are dropped or
padded.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from pipehc.comm.expert import Splits
from pipehc.comm.host_memory import fetching

_SPLITS = "input_splits", "output_splits", "output_splits_tp"


def can_be_apart(dispatcher: MoEAlltoAllTokenDispatcher) -> bool:
    """Whether the permutation does without counts: every token goes to as many experts, as it is."""
    config = dispatcher.config
    return config.moe_expert_capacity_factor is None and not config.moe_router_padding_for_quantization


@contextmanager
def left_out(dispatcher: MoEAlltoAllTokenDispatcher) -> Iterator[None]:
    """Inside, `dispatch_preprocess` permutes and does not count."""

    def preprocess(routing_map: torch.Tensor) -> None:
        dispatcher.num_out_tokens = routing_map.size(0) * dispatcher.config.moe_router_topk

    dispatcher.preprocess = preprocess
    dispatcher._maybe_dtoh_and_synchronize = lambda point, tokens_per_expert=None: tokens_per_expert
    try:
        yield
    finally:
        del dispatcher.preprocess, dispatcher._maybe_dtoh_and_synchronize


class Counts:
    """Of one micro-batch in one layer. To make it starts counting, on the current queue.

    routing_map: [tokens, experts], bool. chunks: tokens for each expert here by rank, int64, where the permutation of what arrives
    reads them on the device, else None. ends: where those of each expert here end, int32, if they are asked for, else None. Who
    uses them must hold them.
    """

    def __init__(self, dispatcher: MoEAlltoAllTokenDispatcher, routing_map: torch.Tensor, *, ends: bool = False) -> None:
        self._dispatcher = dispatcher
        dispatcher.tokens_per_expert = dispatcher.preprocess(routing_map)
        self.ends: torch.Tensor | None = dispatcher.tokens_per_expert.cumsum(0, dtype=torch.int32) if ends else None
        names = ["tokens_per_expert", *_SPLITS]
        self.chunks: torch.Tensor | None = None
        if dispatcher.num_local_experts > 1:
            if dispatcher.config.moe_permute_fusion:
                self.chunks = dispatcher.num_global_tokens_per_local_expert
            else:
                names.append("num_global_tokens_per_local_expert")
        found = {name: getattr(dispatcher, name) for name in names}
        self._shapes = {name: tensor.shape for name, tensor in found.items()}
        self._fetch = fetching(torch.cat([tensor.reshape(-1) for tensor in found.values()]))
        self._splits: Splits | None = None

    @property
    def splits(self) -> Splits:
        """Of the dispatch. The first to ask waits for the copy, on the host, and gives the dispatcher the numbers."""
        if self._splits is None:
            numbers = torch.tensor(self._numbers()).split([shape.numel() for shape in self._shapes.values()])
            for (name, shape), own in zip(self._shapes.items(), numbers):
                setattr(self._dispatcher, name, own.view(shape).numpy() if name in _SPLITS else own.view(shape))
            self._splits = Splits(self._dispatcher.input_splits.tolist(), self._dispatcher.output_splits.tolist())
        return self._splits

    def _numbers(self) -> list[int]:
        """All of them, in the order of `_shapes`, when the copy has come."""
        found: list[int] = self._fetch().tolist()
        return found
