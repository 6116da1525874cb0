"""Which ranks differ, and how few micro-batches show all that a rank ever does."""

from __future__ import annotations

from pipehc.config.schema import Config
from pipehc.config.stages import build_schedule
from pipehc.schedules import Schedule, check


def distinct_ranks(config: Config) -> list[int]:
    """Pipeline ranks that differ: with two replicas of every stage, mirrored ranks do the same."""
    ranks = config.parallel.pp
    return list(range(ranks // 2 if config.placement.lanes == 2 and ranks > 1 else ranks))


def shortened(config: Config, dp: int) -> Config:
    """The configuration with as few micro-batches as change nothing but the length of the step: where no rank keeps fewer of them.

    A searched schedule is one for its number of micro-batches, and stays.
    """
    whole = config.microbatches(dp)
    if config.schedule.name == "auto":
        return config
    live = check(build_schedule(config, config.parallel.pp, whole)).peak_live
    for microbatches in range(2 * config.parallel.pp + 4, whole):
        found = _schedule(config, microbatches)
        if found is not None and check(found).peak_live == live:
            batch = microbatches * dp * config.train.micro_batch
            return config.model_copy(update={"train": config.train.model_copy(update={"global_batch": batch})})
    return config


def _schedule(config: Config, microbatches: int) -> Schedule | None:
    try:
        return build_schedule(config, config.parallel.pp, microbatches)
    except ValueError:
        return None
