"""The versions of megatron-core that the plug-in runs on, and all that it does differently for them."""

from __future__ import annotations

import re
from typing import Any

ALLOWED = ((0, 17), (0, 18), (0, 19))
TRAINER = (0, 19)


def megatron_version() -> tuple[int, int]:
    """(major, minor) of the megatron-core that this process imports."""
    from megatron import core

    match = re.match(r"(\d+)\.(\d+)", core.__version__)
    if not match:
        raise ValueError(f"megatron-core {core.__version__}: is no version number; must be {_allowed()}")
    return int(match[1]), int(match[2])


def check_version() -> None:
    """Raises ValueError, naming the version found and those allowed, if the plug-in was not tried with it."""
    if megatron_version() not in ALLOWED:
        from megatron import core

        raise ValueError(f"megatron-core {core.__version__}: not supported; must be {_allowed()}")


def check_trainer_version() -> None:
    """Raises ValueError for versions of the plug-in alone: our trainer's optimizer lays out its buckets by what came with 0.19."""
    check_version()
    if megatron_version() < TRAINER:
        from megatron import core

        needs = ".".join(map(str, TRAINER))
        raise ValueError(f"megatron-core {core.__version__}: the trainer needs {needs}; the plug-in for Megatron's jobs takes it")


def refuse_optimizer(optimizer: str) -> None:
    """Raises ValueError for an optimizer that this version builds by a function of its own, which knows no replicas of a stage."""
    if "muon" in optimizer and megatron_version() < (0, 18):
        from megatron import core

        raise ValueError(
            f"--optimizer (optimizer = {optimizer!r}): not supported with two replicas of every stage under megatron-core "
            f"{core.__version__}; use adam or sgd, or 0.18"
        )


def default_groups() -> Any:
    """The groups that Megatron's schedules take from its parallel state, under the names of its ProcessGroupCollection."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp = parallel_state.get_data_parallel_group()
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True)
    groups.tp_dp_cp = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    return groups


def hybrid_model() -> tuple[Any, Any]:
    """Megatron's model of layers that are single sub-layers, and its decoder: MambaModel until 0.17, then HybridModel."""
    if megatron_version() < (0, 18):
        from megatron.core.models.mamba.mamba_model import MambaModel
        from megatron.core.ssm.mamba_block import MambaStack

        return MambaModel, MambaStack
    from megatron.core.models.hybrid.hybrid_block import HybridStack
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    return HybridModel, HybridStack


def weight_shards(linear: Any) -> int:
    """Into how many shards a linear layer's weight is cut beside tensor parallelism (GTP, since 0.19)."""
    shards: int = getattr(linear, "gtp_remat_size", 1)
    return shards


def _allowed() -> str:
    return "one of " + ", ".join(f"{major}.{minor}" for major, minor in ALLOWED)
