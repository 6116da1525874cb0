"""Loading distributed checkpoints whose hyper-connections are not those of the model: a plain one into mHC, or the other way."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from pipehc.config.schema import ResidualConfig
from pipehc.megatron.job.announcement import announce
from pipehc.megatron.job.saved_residual import take_residual

CONNECTION = re.compile(r"(?!.*optimizer).*\b(attention|mlp)_connection\.")
LENIENT = ("ignore_all", "log_all", "return_all")


def loading(
    original: Callable[..., Any], from_plain: bool, residual: ResidualConfig | None, allow_changes: bool
) -> Callable[..., Any]:
    """In the place of Megatron's `dist_checkpointing.load`.

    from_plain: a checkpoint without any hyper-connections may be loaded; those of the model keep their initial values.

    What it returns raises ValueError, on every rank, if the checkpoint lacks hyper-connections of the model, or was trained with
    another residual (unless `allow_changes`), and warns of those that the model lacks.
    """

    @functools.wraps(original)
    def load(sharded_state_dict: Any, checkpoint_dir: Any, *args: Any, **given: Any) -> Any:
        keys = {value.key for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)}
        asked, saved, whole = _compared(keys, checkpoint_dir, given.get("process_group"))
        if whole and saved - asked:
            _warn(f"checkpoint {checkpoint_dir}: {_count(saved - asked)} that the model lacks are dropped; {_meant()}")
        missing = asked - saved
        strict = getattr(given.get("strict"), "value", given.get("strict"))
        if not missing or (strict in LENIENT and not from_plain):
            loaded = original(sharded_state_dict, checkpoint_dir, *args, **given)
            take_residual(_state(loaded), checkpoint_dir, residual, allow_changes)
            return loaded
        if saved:
            raise ValueError(
                f"checkpoint {checkpoint_dir}: has hyper-connections of another form, without {_count(missing)}; {_meant()}"
            )
        if not from_plain:
            raise ValueError(
                f"checkpoint {checkpoint_dir}: has no hyper-connections, the model has; to start from a plain model, call "
                "pipehc.megatron.enable(..., from_plain=True)"
            )
        if "optimizer" in sharded_state_dict:
            raise ValueError(
                f"checkpoint {checkpoint_dir}: its optimizer state is of a plain model; name it with --pretrained-checkpoint, "
                "or with --load and --finetune (checkpoint.finetune)"
            )
        kept = list(_taken_out(sharded_state_dict, missing))
        loaded = original(sharded_state_dict, checkpoint_dir, *args, **given)
        for path, tensor in kept:
            *place, name = path
            functools.reduce(lambda inner, key: inner[key], place, _state(loaded))[name] = tensor.data
        announce(f"checkpoint {checkpoint_dir}: is of the plain model; {_count(missing)} start from their initial values")
        return loaded

    return load


def _state(loaded: Any) -> Any:
    return loaded[0] if isinstance(loaded, tuple) else loaded


def _compared(keys: set[str], checkpoint_dir: Any, group: dist.ProcessGroup | None) -> tuple[set[str], set[str], bool]:
    """Keys of hyper-connections that the ranks ask for, and that the checkpoint has; whether layers are asked for. Collective."""
    everyone: list[set[str]] = [set()] * dist.get_world_size(group)
    dist.all_gather_object(everyone, keys, group=group)
    asked = set().union(*everyone)
    has: list[Any] = [None]
    if dist.get_rank(group) == 0:
        try:
            has = [{key for key in dist_checkpointing.load_tensors_metadata(str(checkpoint_dir)) if CONNECTION.match(key)}]
        except Exception:  # not readable: what loads it says so better
            has = [{key for key in asked if CONNECTION.match(key)}]
    dist.broadcast_object_list(has, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    layers = any("layers." in key and "optimizer" not in key for key in asked)
    return {key for key in asked if CONNECTION.match(key)}, has[0], layers


def _taken_out(state: Any, keys: set[str], path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], ShardedTensor]]:
    """Removes the tensors of `keys` from nested dicts; yields each with its path."""
    for name, value in list(state.items()):
        if isinstance(value, dict):
            yield from _taken_out(value, keys, (*path, name))
        elif isinstance(value, ShardedTensor) and value.key in keys:
            yield (*path, name), state.pop(name)


def _count(keys: set[str]) -> str:
    return f"{len(keys)} tensors of hyper-connections (such as {min(keys)})"


def _meant() -> str:
    return "is residual=... of pipehc.megatron.enable that of the job which saved it?"


def _warn(text: str) -> None:
    if dist.get_rank() == 0:
        warnings.warn(f"pipehc: {text}", stacklevel=3)
