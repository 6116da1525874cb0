"""The search itself: candidates of all placements race; the better half goes on, until one is left or the bound is reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from time import monotonic

from pipehc.schedules.schedule import Schedule
from pipehc.schedules.search.dispatch import NEVER, Rules, dispatch
from pipehc.schedules.search.problem import Op, Problem
from pipehc.schedules.search.rules import change, imitate, plain, priorities, retrace, steady
from pipehc.schedules.spans import Span

ROUNDING = 1 - 1e-9  # what is better by less than this is the same
SLACKS = (0.0, 0.01, 0.003, 0.005)  # how much worse a change may make a candidate, by its place in the race


@dataclass
class Budget:
    """How long to search. Counted in placed actions, so that the same seed does the same; the clock only stops what is too slow."""

    actions: float
    deadline: float  # of time.monotonic
    used: float = 0.0
    cut_short: bool = False  # by the clock

    def spend(self, actions: int) -> None:
        self.used += actions
        self.cut_short = self.cut_short or monotonic() > self.deadline

    def over(self, until: float) -> bool:
        """True if the clock has run out, or `until` actions are used."""
        return self.cut_short or self.used >= min(until, self.actions)


@dataclass(order=True)
class Candidate:
    makespan: float
    number: int  # breaks ties by age
    problem: Problem = field(compare=False)
    rules: Rules = field(compare=False)
    rows: list[list[Op]] = field(compare=False, repr=False)


@dataclass
class _Source:
    """Random rules of one kind for one placement, and how well they did."""

    problem: Problem
    make: Callable[[Problem, Random], Rules | None]
    spent: float = 0.0
    best: float = NEVER

    def handicap(self, lead: float) -> float:
        """How much less it gets than what made the leading schedule: a bad start may be bad luck, so never less than a quarter."""
        return min(4.0, (self.best / lead) ** 30)


class Race:
    """Runs the list scheduler and remembers the best of what it found."""

    def __init__(self, problems: Sequence[Problem], budget: Budget, seed: int, keep: int = 6) -> None:
        self.problems, self.budget, self.random, self.keep = problems, budget, Random(seed), keep
        self.bound = min(problem.bound for problem in problems)
        self.number = 0
        self.best: list[Candidate] = []  # of all placements, sorted

    @property
    def won(self) -> bool:
        return bool(self.best) and self.best[0].makespan * ROUNDING <= self.bound

    def run(self, examples: Sequence[tuple[Schedule, Sequence[Span]]]) -> None:
        """Fills `best`. `examples` are schedules to start from, with their simulated spans."""
        for problem in self.problems:
            self._try(problem, plain(problem), NEVER)
            for schedule, spans in examples:
                if schedule.placement == problem.placement:
                    for rules in imitate(problem, schedule, spans):
                        self._try(problem, rules, NEVER)
        field = self._explore(self.budget.used + 0.3 * (self.budget.actions - self.budget.used))
        survivors, rounds = 4, 3
        while rounds and not self.won and not self.budget.over(NEVER):
            # A placement whose bound is no better than what is there already is out.
            field = [c for c in field if c.problem.bound < self.best[0].makespan * ROUNDING][:survivors]
            share = (self.budget.actions - self.budget.used) / rounds
            start = self.budget.used
            for i, candidate in enumerate(field):
                field[i] = self._improve(candidate, start + share * (i + 1) / len(field), SLACKS[i % len(SLACKS)])
            field.sort()
            survivors, rounds = survivors // 2, rounds - 1

    def _explore(self, until: float) -> list[Candidate]:
        """Random rules, plain and of steady states, for every placement. Returns the best two of each placement, sorted.

        Placements and kinds of rules take turns, but those that are behind get less.
        """
        found: dict[int, list[Candidate]] = {id(problem): [] for problem in self.problems}
        for candidate in self.best:
            found[id(candidate.problem)].append(candidate)
        sources = [_Source(problem, make) for problem in self.problems for make in (steady, priorities)]
        while not self.won and not self.budget.over(until):
            lead = self.best[0].makespan
            source = min((s for s in sources if s.problem.bound < lead * ROUNDING), key=lambda s: s.spent * s.handicap(lead))
            own = found[id(source.problem)]
            before = self.budget.used
            rules = source.make(source.problem, self.random)
            if rules is None:
                self.budget.spend(source.problem.actions // 4)
            else:
                new = self._try(source.problem, rules, own[3].makespan * ROUNDING if len(own) > 3 else NEVER)
                if new is not None:
                    source.best = min(source.best, new.makespan)
                    own.append(new)
                    own.sort()
                    del own[4:]
            source.spent += self.budget.used - before
        return sorted(candidate for own in found.values() for candidate in own[:2])

    def _improve(self, best: Candidate, until: float, slack: float) -> Candidate:
        """Random changes, kept if they do no harm, or little: at most `slack` over the best at first, then less and less."""
        current, start = best, self.budget.used
        problem = best.problem
        while not self.won and not self.budget.over(until) and problem.bound < best.makespan * ROUNDING:
            rules = current.rules
            if self.random.random() < 0.01:
                rules = retrace(problem, rules, current.rows)
            left = 1 - (self.budget.used - start) / max(1.0, until - start)
            tried = self._try(problem, change(problem, rules, self.random), best.makespan * (1 + slack * left) / ROUNDING)
            if tried is not None:
                current = tried
                best = min(best, tried)
        return best

    def _try(self, problem: Problem, rules: Rules, cutoff: float) -> Candidate | None:
        makespan, rows, placed = dispatch(problem, rules, cutoff)
        self.budget.spend(placed)
        if makespan == NEVER:
            return None
        self.number += 1
        candidate = Candidate(makespan, self.number, problem, rules, rows)
        if len(self.best) < self.keep or makespan <= self.best[-1].makespan:
            self.best.append(candidate)
            self.best.sort()
            del self.best[self.keep :]
        return candidate
