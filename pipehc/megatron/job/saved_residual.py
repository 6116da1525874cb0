"""A job's checkpoint says which residual it was trained with: mhc and isohc, for one, have the same tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from pipehc.config.changes import Effect, residual_changes
from pipehc.config.schema import ResidualConfig
from pipehc.megatron.job.announcement import announce

KEY = "pipehc_residual"


def saving(original: Callable[..., Any], residual: ResidualConfig | None) -> Callable[..., Any]:
    """In the place of Megatron's `dist_checkpointing.save`."""

    @functools.wraps(original)
    def save(sharded_state_dict: Any, *args: Any, **given: Any) -> Any:
        settings = {} if residual is None else {KEY: residual.model_dump(mode="json")}
        return original({**sharded_state_dict, **settings}, *args, **given)

    return save


def take_residual(state: dict[str, Any], checkpoint_dir: Any, residual: ResidualConfig | None, allow_changes: bool) -> None:
    """Takes what `saving` added out of a state that was loaded.

    Raises ValueError, on every rank alike, if the same weights would make another function under `residual`, unless
    `allow_changes`.
    """
    saved = state.pop(KEY, None)  # none in a plain checkpoint, or before there was such a key
    if saved is None or residual is None:
        return
    found = [change for change in residual_changes(saved, residual) if change.effect is Effect.MODEL]
    if not found:
        return
    text = ", ".join(f"{change.key} = {change.before!r} then, {change.now!r} now" for change in found)
    if not allow_changes:
        raise ValueError(
            f"checkpoint {checkpoint_dir}: was trained with another residual: {text}; give residual=... of pipehc.megatron.enable "
            "as it was, or allow_changes=True to go on with other functions of the same weights"
        )
    announce(f"checkpoint {checkpoint_dir}: goes on with another residual: {text}")
