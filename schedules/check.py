"""Proves that a schedule is complete and can run: every action once, in an order that no message timing can block."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from pipehc.schedules.actions import Action, Cell, Pair, actions_of, flatten
from pipehc.schedules.schedule import Schedule

Place = tuple[int, int]  # rank, index in its row


class ScheduleError(ValueError):
    """A schedule that cannot run. `reason` is one sentence, `places` are the offending (rank, index) cells, `grid` shows them."""

    def __init__(self, reason: str, schedule: Schedule | None = None, places: Iterable[Place] = ()) -> None:
        self.reason, self.places = reason, tuple(places)
        self.grid = "" if schedule is None else excerpt(schedule, self.places)
        super().__init__(f"{reason}\n{self.grid}" if self.grid else reason)


@dataclass(frozen=True)
class Facts:
    """What `check` learned.

    peak_live[rank]: activations alive at once, F start to W end, in units of 1/P of the model. earliest[rank][index]: the time slot
    at which a cell can run at the earliest, if every cell takes one slot and messages take none.
    """

    peak_live: tuple[float, ...]
    earliest: tuple[tuple[int, ...], ...] = field(repr=False)


def check(schedule: Schedule) -> Facts:
    """Raises ScheduleError unless every forward and backward is there exactly once, on its rank, in an order that can run.

    A backward is one B, or one I and one W. A deadlock is a circle of actions that wait for each other, through the order within
    a rank and through messages; no rank ever waits for a *send*, so a schedule without such a circle ends at any message timing.
    """
    where = _locate(schedule)
    _check_complete(schedule, where)
    earliest = _run_untimed(schedule, where)
    return Facts(tuple(_peak_live(schedule, rank) for rank in range(schedule.ranks)), earliest)


def producer(schedule: Schedule, action: Action) -> tuple[Action, ...]:
    """The actions of which any one must have run before `action` can: F of the stage before, backward of the stage after."""
    kind, stage, microbatch, lane = action
    if kind == "F":
        return (Action("F", stage - 1, microbatch, lane),) if stage else ()
    if kind == "W":
        return (Action("I", stage, microbatch, lane),)
    if kind in "BI" and stage + 1 < schedule.placement.stages:
        return (Action("B", stage + 1, microbatch, lane), Action("I", stage + 1, microbatch, lane))
    return (Action("F", stage, microbatch, lane),)


def _locate(schedule: Schedule) -> dict[Action, Place]:
    placement = schedule.placement
    where: dict[Action, Place] = {}
    if len(schedule.rows) != placement.ranks:
        raise ScheduleError(f"{len(schedule.rows)} rows for the {placement.ranks} ranks of the placement")
    for rank, row in enumerate(schedule.rows):
        for index, cell in enumerate(row):
            if isinstance(cell, Pair) and (cell.forward.kind, cell.backward.kind) != ("F", "B"):
                raise ScheduleError(f"{_short(cell)}: a pair is a forward F and a full backward B", schedule, [(rank, index)])
            for action in actions_of(cell):
                place = (rank, index)
                if not (0 <= action.lane < placement.lanes and 0 <= action.stage < placement.stages):
                    raise ScheduleError(f"{action}: no such lane or stage in the placement", schedule, [place])
                if action.microbatch not in schedule.lane_microbatches(action.lane):
                    own = schedule.lane_microbatches(action.lane)
                    reason = f"{action}: lane {action.lane} carries micro-batches {own.start} to {own.stop - 1}"
                    raise ScheduleError(reason, schedule, [place])
                if (home := placement.rank(action.lane, action.stage)) != rank:
                    raise ScheduleError(f"{action} is on rank {rank}, but its stage lives on rank {home}", schedule, [place])
                if action in where:
                    raise ScheduleError(f"{action} is there twice", schedule, [where[action], place])
                where[action] = place
    return where


def _check_complete(schedule: Schedule, where: dict[Action, Place]) -> None:
    placement = schedule.placement
    for lane in range(placement.lanes):
        for stage in range(placement.stages):
            rank = placement.rank(lane, stage)
            for microbatch in schedule.lane_microbatches(lane):
                F, B, I, W = (Action(kind, stage, microbatch, lane) for kind in "FBIW")  # type: ignore[arg-type]
                if F not in where:
                    raise ScheduleError(f"{F} is missing on rank {rank}", schedule, [(rank, 0)])
                there = [a for a in (B, I, W) if a in where]
                if schedule.forward_only:
                    if there:
                        raise ScheduleError(f"{there[0]} in a forward-only schedule", schedule, [where[there[0]]])
                    continue
                if there != [B] and there != [I, W]:
                    found = "no backward" if not there else "only " + " and ".join(map(str, there))
                    reason = f"{B} on rank {rank}: {found}; needs one B, or one I and one W"
                    raise ScheduleError(reason, schedule, [where[a] for a in (F, *there)])
                for earlier, later in zip([F, *there], there):
                    if where[earlier] >= where[later]:
                        reason = f"{later} comes before {earlier}, which it needs"
                        raise ScheduleError(reason, schedule, [where[later], where[earlier]])
                if (R := Action("R", stage, microbatch, lane)) in where and not where[F] < where[R] < where[there[0]]:
                    reason = f"{R} must lie between {F} and {there[0]}"
                    raise ScheduleError(reason, schedule, [where[a] for a in (F, R, there[0])])


def _run_untimed(schedule: Schedule, where: dict[Action, Place]) -> tuple[tuple[int, ...], ...]:
    """The earliest slot of every cell. Raises ScheduleError, marking the circle of waits, if some cell can never run."""
    done: dict[Action, int] = {}  # action -> its slot
    slots: list[list[int]] = [[] for _ in schedule.rows]
    waiting: dict[Action, list[int]] = {}  # action that is not done -> ranks stuck until it is
    runnable = list(range(schedule.ranks))
    while runnable:
        rank = runnable.pop()
        row, own = schedule.rows[rank], slots[rank]
        while len(own) < len(row):
            slot = own[-1] + 1 if own else 0
            for action in actions_of(row[len(own)]):
                if needed := producer(schedule, action):
                    found = next((done[a] for a in needed if a in done), None)
                    if found is None:
                        missing = next(a for a in needed if a in where)
                        waiting.setdefault(missing, []).append(rank)
                        break
                    slot = max(slot, found + 1)
            else:
                for action in actions_of(row[len(own)]):
                    done[action] = slot
                    runnable.extend(waiting.pop(action, ()))
                own.append(slot)
                continue
            break
    if waiting:
        needs = {rank: action for action, ranks in waiting.items() for rank in ranks}
        raise _deadlock(schedule, where, [len(own) for own in slots], needs)
    return tuple(map(tuple, slots))


def _deadlock(schedule: Schedule, where: dict[Action, Place], position: list[int], needs: dict[int, Action]) -> ScheduleError:
    """Every stuck rank waits for an action that lies behind the cell at which its own rank is stuck: so some wait in a circle."""
    seen: list[int] = []
    rank = min(needs)
    while rank not in seen:
        seen.append(rank)
        rank = where[needs[rank]][0]
    circle = seen[seen.index(rank) :]
    stuck = {r: (r, position[r]) for r in circle}
    waits = [
        f"rank {r} at {_short(schedule.rows[r][i])} waits for {needs[r]} of rank {where[needs[r]][0]}" for r, i in stuck.values()
    ]
    places = [place for r in circle for place in (stuck[r], where[needs[r]])]
    return ScheduleError("deadlock: " + ", ".join(waits), schedule, places)


def _peak_live(schedule: Schedule, rank: int) -> float:
    live = peak = 0
    for action in flatten(schedule.rows[rank]):
        if action.kind == "F":
            live += 1
            peak = max(peak, live)
        if action.kind in "BW" or schedule.forward_only:
            live -= 1
    return peak * schedule.placement.share


def excerpt(schedule: Schedule, places: Iterable[Place], around: int = 3) -> str:
    """The offending ranks' rows near the offending cells: those stand in brackets, the first of every rank in one column."""
    marks: dict[int, set[int]] = {}
    for rank, index in places:
        marks.setdefault(rank, set()).add(index)
    left: dict[int, list[str]] = {}
    right: dict[int, list[str]] = {}
    for rank, marked in sorted(marks.items()):
        row = schedule.rows[rank]
        shown = sorted({i for m in marked for i in range(max(0, m - around), min(len(row), m + around + 1))})
        first = min(marked)
        left[rank] = (["..."] if shown and shown[0] > 0 else []) + [_short(row[i]) for i in shown if i < first]
        right[rank] = []
        for before, i in zip([first, *(i for i in shown if i >= first)], (i for i in shown if i >= first)):
            right[rank] += ["..."] * (i > before + 1) + [f"[{_short(row[i])}]" if i in marked else _short(row[i])]
        right[rank] += ["..."] if shown and shown[-1] + 1 < len(row) else []
    lines = {rank: [""] * (max(map(len, left.values())) - len(left[rank])) + left[rank] + right[rank] for rank in left}
    width = max((len(cell) for line in lines.values() for cell in line), default=0)
    names = max((len(str(rank)) for rank in lines), default=0)
    return "\n".join(
        f"  rank {rank:>{names}} | {' '.join(f'{cell:^{width}}' for cell in line).rstrip()}" for rank, line in lines.items()
    )


def _short(cell: Cell) -> str:
    return f"{cell.forward}+{cell.backward}" if isinstance(cell, Pair) else str(cell)
