"""Which ranks differ, and how few micro-batches show all that a rank ever does."""

from __future__ import annotations

from collections.abc import Callable

from pipehc.config.schema import Config
from pipehc.config.stages import build_schedule
from pipehc.schedules import Action, Placement, Schedule, check


def distinct_ranks(placement: Placement) -> list[int]:
    """Pipeline ranks that differ: with two replicas of every stage, mirrored ranks do the same."""
    ranks = placement.ranks
    return list(range(ranks // 2 if placement.lanes == 2 and ranks > 1 else ranks))


def fewest_microbatches(build: Callable[[int], Schedule], whole: int) -> int:
    """So many that only the length of the step changes: no rank keeps fewer of them.

    build: the schedule of so many, which may raise ValueError for all but `whole`.
    """
    schedule = build(whole)
    live = check(schedule).peak_live
    for microbatches in range(2 * schedule.ranks + 4, whole):
        try:
            found = check(build(microbatches)).peak_live
        except ValueError:
            continue
        if found == live:
            return microbatches
    return whole


def shortened(config: Config, dp: int) -> Config:
    """The configuration with as few micro-batches as change nothing but the length of the step.

    A searched schedule is one for its number of micro-batches, and stays.
    """
    if config.schedule.name == "auto":
        return config
    microbatches = fewest_microbatches(lambda n: build_schedule(config, config.parallel.pp, n), config.microbatches(dp))
    batch = microbatches * dp * config.train.micro_batch
    return config.model_copy(update={"train": config.train.model_copy(update={"global_batch": batch})})


def one_each(placement: Placement) -> Schedule:
    """One micro-batch a lane, its forwards before its backwards: every action of every stage, once."""

    def row(rank: int) -> tuple[Action, ...]:
        held = sorted(placement.held(rank), key=lambda own: own[1])
        forwards = [Action("F", stage, lane, lane) for lane, stage in held]
        return (*forwards, *(action._replace(kind="B") for action in reversed(forwards)))

    return Schedule("one of each", placement, placement.lanes, tuple(map(row, range(placement.ranks))))
