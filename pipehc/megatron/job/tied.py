"""A weight that the first and the last stage share, where both lie on one rank: two replicas, or a V.

Embedding and output head may be tied, and multi-token prediction embeds tokens on the last stage. Megatron keeps one copy of such a
weight on the first and one on the last pipeline rank, starts them equal and sums their gradients between these ranks. Over our
placements each rank with a first stage has a last one too and does both by itself, after replicas were made equal and their
gradients summed as those of any weight. Megatron's marks stay what they are: the norm counts the first stage's copy, and each copy
has a bucket of its own, so that the distributed optimizer cuts both alike.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import nn

from pipehc.megatron.job.position import exchanged
from pipehc.schedules import Placement


def ends_meet(placement: Placement) -> bool:
    """Whether first and last stages lie on the same ranks, of several."""
    return placement.ranks > 1 and _ranks_of(placement, 0) == _ranks_of(placement, -1)


def is_tied(model: Any) -> bool:
    """Whether a chunk has a copy of the embedding's weight at the other end: for the output head, or for multi-token prediction."""
    return bool(getattr(model, "share_embeddings_and_output_weights", False) or getattr(model.config, "mtp_num_layers", None))


def refuse_tied(placement: Placement) -> None:
    """ValueError if neither Megatron nor we would sum the gradients of the two copies."""
    if ends_meet(placement) or (_ranks_of(placement, 0) == {0} and _ranks_of(placement, -1) == {placement.ranks - 1}):
        return
    raise ValueError(
        "share_embeddings_and_output_weights = True, or mtp_num_layers > 0: not supported over a placement whose first stages are "
        f"on ranks {_ranks_of(placement, 0)} and last ones on {_ranks_of(placement, -1)}; use schedule = '1f1b', or set "
        "--untie-embeddings-and-output-weights (share_embeddings_and_output_weights = False) and leave out --mtp-num-layers"
    )


@contextmanager
def tied_on_ranks(placement: Placement) -> Iterator[None]:
    """Inside, Megatron knows no ranks to share the weight between, where `tie` and `sum_gradients` do it on each."""
    group = parallel_state.get_embedding_group(check_initialized=False)
    with exchanged({group: None} if ends_meet(placement) and isinstance(group, dist.ProcessGroup) else {}):
        yield


def tie(chunks: Sequence[nn.Module], held: Sequence[tuple[int, int]], placement: Placement) -> None:
    """The last stage's copy starts equal to the first's. held: the (lane, stage) of each chunk of this rank."""
    for first, last in _pairs(chunks, held, placement):
        with torch.no_grad():
            last.copy_(first)


def sum_gradients(chunks: Sequence[nn.Module], held: Sequence[tuple[int, int]], placement: Placement) -> None:
    """Gives both copies the sum of their gradients, each of which is reduced over data parallelism and replicas already."""
    for first, last in _pairs(chunks, held, placement):
        if first.requires_grad:
            first.main_grad.add_(last.main_grad)  # type: ignore[attr-defined]
            last.main_grad.copy_(first.main_grad)  # type: ignore[attr-defined]


def _pairs(
    chunks: Sequence[nn.Module], held: Sequence[tuple[int, int]], placement: Placement
) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """The two copies on this rank, or nothing."""
    if not ends_meet(placement):
        return
    models = {stage: unwrap_model(chunk) for chunk, (_, stage) in zip(chunks, held, strict=True)}
    first, last = models.get(0), models.get(placement.stages - 1)
    if first is not None and is_tied(first):
        assert last is not None
        yield first.shared_embedding_or_output_weight(), last.shared_embedding_or_output_weight()


def _ranks_of(placement: Placement, stage: int) -> set[int]:
    return {lane[stage] for lane in placement.table}
