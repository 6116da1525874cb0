"""All layouts of a configuration over a number of GPUs that pass the checks of any configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from pydantic import ValidationError

from pipehc.config.schema import Config
from pipehc.schedules.families import FAMILIES

MICRO_BATCHES = (1, 2, 4)
CHUNKS = (2, 3, 4)  # of interleaved


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    """The configuration with other values, checked. Raises pydantic's ValidationError."""
    data = config.model_dump()
    for section, values in sections.items():
        data[section] |= values
    return Config.model_validate(data)


def layouts(config: Config, gpus: int) -> Iterator[Config]:
    """Every pp x tp x dp = gpus with the configuration's own tp, ep, micro-batch, recomputation and named schedule, with blocks as
    even as possible.

    On one pipeline rank all schedules do the same: 1f1b stands for them. Micro-batches and recomputation: `micro_batches`,
    `recomputations`.
    """
    tp = config.parallel.tp
    for pp in divisors(gpus // tp) if gpus % tp == 0 else []:
        if pp > config.model.blocks:
            continue
        dp = gpus // (pp * tp)
        experts = [ep for ep in divisors(config.model.experts or 1) if dp * tp % ep == 0]
        for ep, size, recompute, (name, chunks) in product(experts, micro_batches(config), recomputations(config), _schedules(pp)):
            try:
                yield changed(
                    config,
                    parallel={"pp": pp, "ep": ep, "dp": dp, "blocks_per_stage": None},
                    schedule={"name": name, "chunks": chunks},
                    recompute=recompute,
                    train={"micro_batch": size},
                )
            except ValidationError:
                continue


def _schedules(pp: int) -> list[tuple[str, int | None]]:
    if pp == 1:
        return [("1f1b", None)]
    return [(name, chunks) for name, family in FAMILIES.items() for chunks in (CHUNKS if family.chunks is not None else (None,))]


def micro_batches(config: Config) -> list[int]:
    return sorted({*MICRO_BATCHES, config.train.micro_batch})


def recomputations(config: Config) -> list[dict[str, Any]]:
    """Off, a whole stage at a time, and the configuration's own block."""
    if config.residual.kind == "none":
        return [{"enabled": False, "block": None}]
    blocks = dict.fromkeys([None, config.recompute.block])
    return [{"enabled": False, "block": None}, *({"enabled": True, "block": block} for block in blocks)]


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def with_blocks(config: Config, sizes: Sequence[int]) -> Config:
    return changed(config, parallel={"blocks_per_stage": tuple(sizes)})


def same_layout(one: Config, other: Config) -> bool:
    """Whether two configurations of one training do the same on the same GPUs."""
    sections = ("schedule", "recompute", "train")
    sizes = ("pp", "ep", "tp", "dp")
    return (
        all(getattr(one, name) == getattr(other, name) for name in sections)
        and all(getattr(one.parallel, name) == getattr(other.parallel, name) for name in sizes)
        and one.stage_blocks() == other.stage_blocks()
    )
