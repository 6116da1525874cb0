"""One-lane schedules for the runtime of torch.distributed.pipelining, as CSV."""

from __future__ import annotations

from os import PathLike

from pipehc.schedules.interchange import write_rows
from pipehc.schedules.schedule import Schedule


def to_torch_csv(schedule: Schedule, path: str | PathLike[str]) -> None:
    """Writes a schedule for `_PipelineScheduleRuntime._load_csv(path, format="compute_only")`. R is left out: torch has none.

    Raises ValueError for what that runtime cannot run: two lanes, or forwards only (there `schedule.eval` is what torch offers).
    """
    if schedule.placement.lanes > 1:
        raise ValueError(f"{schedule.name}: has {schedule.placement.lanes} lanes; torch.distributed.pipelining runs one")
    if schedule.forward_only:
        raise ValueError(f"{schedule.name}: is forward-only; torch.distributed.pipelining wants every backward")
    write_rows(tuple(tuple(c for c in row if c[0] != "R") for row in schedule.rows), path)
