"""The search itself: candidates of all placements race; the better half goes on, until one is left or the bound is reached."""

from __future__ import annotations

from collections.abc import Sequence
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
            field = field[:survivors]
            share = (self.budget.actions - self.budget.used) / rounds
            start = self.budget.used
            for i, candidate in enumerate(field):
                field[i] = self._improve(candidate, start + share * (i + 1) / len(field), SLACKS[i % len(SLACKS)])
            field.sort()
            survivors, rounds = max(1, survivors // 2), rounds - 1

    def _explore(self, until: float) -> list[Candidate]:
        """Random rules, every second ones of a steady state. Returns the best of each placement, sorted.

        The placements take turns, but those that are behind get less.
        """
        found: dict[int, list[Candidate]] = {id(problem): [] for problem in self.problems}
        for candidate in self.best:
            found[id(candidate.problem)].append(candidate)
        spent = {id(problem): 0.0 for problem in self.problems}
        turn = 0
        while not self.won and not self.budget.over(until):
            turn += 1
            open_problems = [p for p in self.problems if not self.best or p.bound < self.best[0].makespan * ROUNDING]
            problem = min(open_problems, key=lambda p: spent[id(p)] * self._handicap(found[id(p)]))
            own = found[id(problem)]
            rules = steady(problem, self.random) if turn % 2 else priorities(problem, self.random)
            before = self.budget.used
            if rules is None:
                self.budget.spend(problem.actions // 4)
            else:
                cutoff = own[3].makespan * ROUNDING if len(own) > 3 else NEVER
                new = self._try(problem, rules, cutoff)
                if new is not None:
                    own.append(new)
                    own.sort()
                    del own[4:]
            spent[id(problem)] += self.budget.used - before
        return sorted(candidate for own in found.values() for candidate in own)

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

    def _handicap(self, own: Sequence[Candidate]) -> float:
        return (own[0].makespan / self.best[0].makespan) ** 30 if own else 1.0

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
