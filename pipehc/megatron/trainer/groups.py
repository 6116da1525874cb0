"""Process groups: Megatron's own, plus mirrored data-parallel groups when every stage exists twice (DualPipe)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import NamedTemporaryFile

import torch
import torch.distributed as dist
import yaml
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from pipehc.comm.budgets import ALL_TO_ALL_BLOCKS, blocks
from pipehc.comm.host_group import HOST
from pipehc.megatron import cpu
from pipehc.megatron.versions import check_trainer_version


@dataclass
class Groups:
    """Where this rank stands. Ranks are laid out as `pp_rank * (dp * tp) + dp_rank * tp + tp_rank`: Megatron's default order.

    `dp` is the data-parallel group of this pipeline position alone: what shares out batches. The groups that sum gradients are in
    `collection` (dp_cp, expt_dp): with `replicated` they also span the mirrored pipeline position, which holds the same stages.
    """

    pp: dist.ProcessGroup
    pp_rank: int
    pp_size: int
    tp: dist.ProcessGroup
    tp_rank: int
    tp_size: int
    dp: dist.ProcessGroup
    dp_rank: int
    dp_size: int
    ep: dist.ProcessGroup
    ep_rank: int
    ep_size: int
    replicated: bool
    collection: ProcessGroupCollection  # for the modules, DDP and the optimizer


def build_groups(pp: int, tp: int, ep: int, replicated: bool, all_to_all_blocks: int | None = None) -> Groups:
    """Build all process groups; torch.distributed must be initialised, and every rank of the world must call this.

    Args:
        pp, tp, ep: sizes of pipeline, tensor and expert parallelism; data parallelism is what the world leaves.
        replicated: pipeline positions r and pp-1-r hold the same stages (DualPipe), so their gradients are summed.
        all_to_all_blocks: thread blocks of an expert all-to-all on CUDA; None: as `comm.budgets` says.

    Raises:
        ValueError: if the sizes do not fit the world or one another, or for a version of megatron-core that the trainer cannot use.
    """
    check_trainer_version()
    world = dist.get_world_size()
    if world % (pp * tp):
        raise ValueError(f"parallel.pp x parallel.tp = {pp} x {tp} does not divide the number of processes, {world}")
    dp = world // (pp * tp)
    if (dp * tp) % ep:
        raise ValueError(f"parallel.ep = {ep} does not divide the {dp * tp} processes of one pipeline position")
    if replicated and pp % 2:
        raise ValueError(f"parallel.pp = {pp}: two replicas of every stage need an even number of pipeline ranks")
    if not torch.cuda.is_available():
        cpu.install()
    with _nccl_settings(all_to_all_blocks) as settings:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
            nccl_communicator_config_path=settings,
        )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    own_dp = collection.dp
    # The distributed optimizer gives every parameter element one owner in the world: the gradient norm sums over all ranks.
    collection.intra_dist_opt = dist.group.WORLD
    if replicated:
        _mirror(collection, pp, dp, tp, ep)
    return Groups(
        pp=collection.pp,
        pp_rank=collection.pp.rank(),
        pp_size=pp,
        tp=collection.tp,
        tp_rank=collection.tp.rank(),
        tp_size=tp,
        dp=own_dp,
        dp_rank=own_dp.rank(),
        dp_size=dp,
        ep=collection.ep,
        ep_rank=collection.ep.rank(),
        ep_size=ep,
        replicated=replicated,
        collection=collection,
    )


@contextmanager
def _nccl_settings(all_to_all_blocks: int | None) -> Iterator[str | None]:
    """Path of a file with what NCCL is to know of Megatron's groups; None where it carries nothing."""
    if not torch.cuda.is_available() or dist.get_backend() == HOST:
        yield None
        return
    # NCCL's kernels run on the group's stream, not on ours: all-to-alls must not queue behind the computation that hides them.
    settings = {"ep": {"is_high_priority_stream": True, "max_ctas": blocks(ALL_TO_ALL_BLOCKS, all_to_all_blocks)}}
    with NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(yaml.safe_dump(settings))
        file.flush()
        yield file.name


def _mirror(collection: ProcessGroupCollection, pp: int, dp: int, tp: int, ep: int) -> None:
    """Replace the data-parallel groups of `collection` by their unions over pipeline positions r and pp-1-r."""
    position = dp * tp  # ranks at one pipeline position
    dense, experts, whole = [], [], []
    for h in range(pp // 2):
        pair = (h, pp - 1 - h)
        dense += [[r * position + d * tp + t for r in pair for d in range(dp)] for t in range(tp)]
        # Expert tensor parallelism is 1, so the expert shard of a rank is its place within the position, modulo ep.
        experts += [[r * position + i for r in pair for i in range(position) if i % ep == e] for e in range(ep)]
        whole.append([r * position + i for r in pair for i in range(position)])
    for ranks, fields in (
        (dense, ("dp", "dp_cp", "dp_cp_gtp_remat", "intra_dp_cp")),
        (experts, ("expt_dp", "expt_dp_gtp_remat", "intra_expt_dp")),
        (whole, ("tp_dp_cp",)),
    ):
        group, _ = dist.new_subgroups_by_enumeration(ranks)
        assert isinstance(group, dist.ProcessGroup)  # the enumerations name every rank
        for field in fields:
            setattr(collection, field, group)
