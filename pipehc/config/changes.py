"""What it means when a training goes on from a checkpoint that another configuration wrote: every key, one of four effects.

A new key of the schema must be entered here; a test walks them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pipehc.config.schema import Config, ResidualConfig, Section
from pipehc.config.strict_yaml import ConfigError, parse_yaml


class Effect(Enum):
    NONE = "none"  # where and how it runs, not what is trained; or only how weights begin
    TRAINING = "training"  # the same model, trained otherwise from here on: said
    DATA = "data"  # refused if the data's fingerprint tells other tokens or samples, else said
    MODEL = "model"  # the same weights make another function, or none: refused


_EFFECTS = {
    "model": {
        Effect.MODEL: "vocab_size hidden_size blocks dense_blocks heads head_dim rope_dim rope_theta kv_rank expert_ffn_size "
        "dense_ffn_size experts experts_active experts_shared norm_eps mtp_depth mtp_input",
        Effect.TRAINING: "bias_update_rate mtp_loss_weight",
        Effect.NONE: "init_std",
    },
    "residual": {
        Effect.MODEL: "kind streams sinkhorn_iterations condition static fixed norm_eps exit",
        Effect.TRAINING: "target_gain gain_power smallest_s",
        Effect.NONE: "init alpha",
    },
    "parallel": {Effect.NONE: "pp tp ep dp blocks_per_stage"},
    "schedule": {Effect.NONE: "name chunks deferred"},
    "search": {Effect.NONE: "placement f b w r link latency gpu max_live time_limit"},
    "recompute": {Effect.NONE: "enabled block modules"},
    "data": {Effect.DATA: "kind paths suffixes tokenizer end_of_document validation_fraction pairs"},
    "train": {
        Effect.DATA: "sequence_length seed",
        Effect.TRAINING: "steps global_batch precision",
        Effect.NONE: "micro_batch",
    },
    "optimizer": {Effect.TRAINING: "lr betas eps weight_decay clip_grad connection_lr connection_decay warmup_steps decay"},
    "evaluation": {Effect.TRAINING: "samples", Effect.NONE: "interval"},
    "checkpoint": {Effect.NONE: "interval keep resume weights allow_changes"},
    "diagnostics": {Effect.NONE: "interval gain_bound"},
    "run": {Effect.NONE: "folder log_interval tensorboard"},
    "runtime": {Effect.NONE: "timeout_s overlap fused bucket_size message_blocks all_to_all_blocks transport"},
    "trace": {Effect.NONE: "steps nvtx"},
}
EFFECTS: dict[str, Effect] = {
    f"{section}.{key}": effect
    for section, effects in _EFFECTS.items()
    for effect, names in effects.items()
    for key in names.split()
}
REFUSED = tuple(key for key, effect in EFFECTS.items() if effect in (Effect.MODEL, Effect.DATA))

# Keys that only some configurations use: what another one says there changes nothing.
_ONLY_KINDS = {
    **dict.fromkeys(
        (
            "residual.streams",
            "residual.fixed",
            "residual.norm_eps",
            "residual.exit",
            "optimizer.connection_lr",
            "optimizer.connection_decay",
        ),
        ("hc", "mhc", "isohc", "hybrid", "harmonized"),
    ),
    "residual.sinkhorn_iterations": ("mhc", "hybrid"),
    "residual.condition": ("isohc", "hybrid"),
    **dict.fromkeys(("residual.static", "residual.target_gain", "residual.gain_power", "residual.smallest_s"), ("harmonized",)),
}
_OF_EXPERTS = tuple(
    f"model.{key}" for key in ("expert_ffn_size", "experts", "experts_active", "experts_shared", "bias_update_rate")
)
_OF_TEXT = ("data.suffixes", "data.tokenizer", "data.end_of_document")


@dataclass(frozen=True)
class Change:
    """A key whose value differs: in the checkpoint's configuration (None too where that has no such key), and now."""

    key: str
    before: Any
    now: Any
    effect: Effect


def saved_values(text: Any) -> dict[str, dict[str, Any]] | None:
    """The sections of the YAML that a checkpoint carries; None where it carries none, or something else."""
    try:
        values = parse_yaml(text) if isinstance(text, str) else None
    except ConfigError:
        return None
    return values if isinstance(values, dict) and all(isinstance(section, dict) for section in values.values()) else None


def changes(before: Mapping[str, Mapping[str, Any]], config: Config) -> list[Change]:
    """All keys that have an effect and differ.

    before: `saved_values`, of an older version perhaps: a key that it lacks had its default.
    """
    return _changes(before, config.model_dump(mode="json"), EFFECTS)


def residual_changes(before: Mapping[str, Any], residual: ResidualConfig) -> list[Change]:
    """`changes` of the section `residual` alone."""
    keys = [name for name in EFFECTS if name.startswith("residual.")]
    return _changes({"residual": before}, {"residual": residual.model_dump(mode="json")}, keys)


def _changes(before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> list[Change]:
    found = []
    for name in names:
        effect, (section, key) = EFFECTS[name], name.split(".")
        new = now[section][key]
        old = before.get(section, {}).get(key, _default(section, key, new))
        if name == "residual.fixed":  # a set
            old, new = sorted(set(old)), sorted(set(new))
        if effect is not Effect.NONE and _plain(old) != _plain(new) and (_matters(name, before) or _matters(name, now)):
            found.append(Change(name, old, new, effect))
    return found


def unknown(before: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Keys of a checkpoint's configuration that this version does not have."""
    return [f"{section}.{key}" for section, values in before.items() for key in values if f"{section}.{key}" not in EFFECTS]


def _default(section: str, key: str, otherwise: Any) -> Any:
    model = Config.model_fields[section].annotation
    assert isinstance(model, type) and issubclass(model, Section)
    field = model.model_fields[key]
    return otherwise if field.is_required() else field.default


def _plain(value: Any) -> Any:
    """Tuples of the schema are lists in YAML."""
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _matters(name: str, config: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the key is used at all with the other values of `config`."""
    residual, model, data = (config.get(section, {}) for section in ("residual", "model", "data"))
    if name in _ONLY_KINDS:
        return residual.get("kind") in _ONLY_KINDS[name]
    if name in _OF_EXPERTS:
        return model.get("dense_blocks", 0) < model.get("blocks", 1)
    if name == "model.dense_ffn_size":
        return model.get("dense_blocks", 1) > 0
    if name in ("model.mtp_loss_weight", "model.mtp_input"):
        return model.get("mtp_depth", 0) > 0
    if name == "data.pairs":
        return data.get("kind") == "retrieval"
    return name not in _OF_TEXT or data.get("kind", "text") == "text"
