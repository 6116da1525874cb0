"""The end of a step's gradients, by the job's own `finalize_model_grads_func`, and what our placements need beside it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from pipehc.megatron.job.mirror import mirrored_groups
from pipehc.megatron.job.position import exchanged
from pipehc.megatron.job.tied import ends_meet, sum_gradients, tied_on_ranks
from pipehc.schedules import Placement


def finalize(
    chunks: Sequence[Any],
    held: Sequence[tuple[int, int]],
    placement: Placement,
    config: Any,
    tokens: Sequence[int] | None,
    groups: Any,
    force_all_reduce: bool | None,
) -> None:
    """Reductions, sequence-parallel and tied sums, division by tokens, biases of experts. Collective.

    held: the (lane, stage) of each chunk; tokens: of each, if the loss is per token. `groups` is the caller's own copy.
    """
    total = None
    if tokens is not None:
        total = torch.as_tensor(sum(tokens), dtype=torch.int, device=next(chunks[0].parameters()).device)
        if scattered_losses(placement):
            dist.all_reduce(total, group=groups.pp)  # afterwards Megatron takes the last rank's
    replicas = {}
    if placement.lanes == 2:
        replicas = {groups.tp_dp_cp: mirrored_groups(groups.pp)[groups.tp_dp_cp]}
        groups.tp_dp_cp = replicas[groups.tp_dp_cp]
    if ends_meet(placement):
        groups.embd = None
    # 0.17 asks its parallel state for the group that sums the token counts of experts.
    with exchanged(replicas), tied_on_ranks(placement):
        config.finalize_model_grads_func(chunks, total, pg_collection=groups, force_all_reduce=force_all_reduce)
    sum_gradients(chunks, held, placement)


def scattered_losses(placement: Placement) -> bool:
    """Whether losses are computed elsewhere than on the last pipeline rank, where Megatron looks for them."""
    return {lane[-1] for lane in placement.table} != {placement.ranks - 1}
