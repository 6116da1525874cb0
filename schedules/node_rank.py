"""One rank of a simulation whose costs know the nodes of the actions: it issues node after node, pairs in `pair_order`.

Every node waits for the node before it in its micro-batch, and for its queue, which is in order: compute, high, or communication
for the all-to-alls. The compute queue idles where a node's input is not there yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from pipehc.schedules.actions import Action
from pipehc.schedules.costs import Costs
from pipehc.schedules.links import Link
from pipehc.schedules.node_costs import NodeCost, PairStep
from pipehc.schedules.pair_time import Interval, place, steps_of, uncovered
from pipehc.schedules.program import Program, Run, inputs_first
from pipehc.schedules.rank import Rank
from pipehc.schedules.spans import Span


class _Half:
    """A micro-batch on one stage: its forward, or its backward with the weight gradients. `ready`: when its next node can start."""

    def __init__(self, action: Action, factor: float, ready: float, turn: float) -> None:
        self.action, self.factor, self.ready = action, factor, ready
        self.turn = turn  # when the compute queue got to the action: it is not late before


class _Pair(NamedTuple):
    steps: Iterator[PairStep]
    halves: dict[str, _Half]
    marks: set[str]


class NodeRank(Rank):
    """moves, works: when all-to-alls were on their way, and when the compute and high-priority queues were at work."""

    def __init__(self, program: Program, costs: Costs, rank: int, links: dict[tuple[int, int], Link]) -> None:
        super().__init__(program, costs, rank, links)
        self.costs, self.one_worker = costs, costs.one_worker
        self.instructions = tuple(inputs_first(self.instructions))
        self.clock["communication"] = 0.0
        runs = [i for i in self.instructions if isinstance(i, Run)]
        self.backwards = {i.pair: i for i in runs if i.pair is not None and i.action.kind in "BI"}
        self.run_events = {i.event for i in runs}
        self.open: dict[int, _Pair] = {}
        self.orders: dict[tuple[int, int], Sequence[PairStep]] = {}  # by stages of the forward and of the backward
        self.moves: list[Interval] = []
        self.works: list[Interval] = []
        self.first = 0.0  # start of the first node of the current instruction
        self.stalls: list[Interval] = []  # when the compute queue waited for messages, before and in it
        self.stalled = 0.0  # in all, inside of actions

    @property
    def busy(self) -> float:
        """Time in actions, without what they waited for messages."""
        return super().busy - self.stalled

    @property
    def all_to_all(self) -> float:  # type: ignore[override]
        return uncovered(self.moves)

    @property
    def exposed_all_to_all(self) -> float:  # type: ignore[override]
        return uncovered(self.moves, self.works)

    def _run(self, instruction: Run, after: float) -> None:
        free = self.clock["compute"]
        self.first, self.stalls = float("inf"), []
        self._start_after(instruction, after)
        if instruction.pair is None or instruction.action.kind == "R":
            half = self._half(instruction, after)
            self._alone(half)
        else:
            if instruction.action.kind == "F":
                self._begin_pair(instruction, after)
            half = self._go_on(instruction)
        exit = self.on[instruction.exit]
        end = self.clock[exit] = max(self.clock[exit], half.ready)
        kind, stage, microbatch, lane = instruction.action
        start, stop = max(free, min(self.first, self.clock["compute"])), self.clock["compute"]
        what = str(instruction.action)
        self.spans.append(Span(self.rank, "compute", start, stop, what, kind, lane, stage, microbatch, instruction.pair))
        self.stalled += sum(max(0.0, min(high, stop) - max(low, start)) for low, high in self.stalls)
        self._account(instruction, start if kind == "R" else end, end)

    def _start_after(self, instruction: Run, after: float) -> None:
        entry = self.on[instruction.entry]
        self.clock[entry] = max(self.clock[entry], after)

    def _half(self, run: Run, after: float) -> _Half:
        """A micro-batch that begins its forward or backward."""
        _, stage, microbatch, lane = run.action
        turn = self.clock["compute"]
        if run.action.kind in "BI":
            after = max(after, self.arrived.pop((lane, stage, microbatch), 0.0))
        return _Half(run.action, self.microbatch[microbatch], after if run.entry == "high" else max(after, turn), turn)

    def _alone(self, half: _Half) -> None:
        kind, stage = half.action.kind, half.action.stage
        nodes = self.costs.nodes_of("I" if kind == "B" else kind, stage)
        if kind == "W" or nodes is None:  # the weight gradients of all nodes at once; R if nothing more is known
            self._issue(half, NodeCost("", "compute", self.time[kind][stage]), kind)
            return
        at_once = {} if kind == "F" else self.costs.computed_at_once(stage)
        weights = _Half(half.action, half.factor, 0.0, half.turn)  # they wait for their node alone
        for k, node in enumerate(nodes):
            self._issue(half, node, "B" if kind == "I" else kind)
            if k + 1 == len(nodes) or nodes[k + 1].queue != "communication":
                for name in [name for name in at_once if name in [before.name for before in nodes[: k + 1]]]:
                    self._issue(weights, NodeCost(name, "compute", at_once.pop(name)), "W")
        if kind == "B":
            self._issue(half, NodeCost("", "compute", self.costs.time("W", stage)), "W")

    def _begin_pair(self, forward: Run, after: float) -> None:
        assert forward.pair is not None
        backward = self.backwards[forward.pair]
        events = [self.events[event] for event in backward.after if event in self.run_events]
        backward_after = max((at for at in events if isinstance(at, float)), default=0.0)
        self._start_after(backward, backward_after)
        halves = {"F": self._half(forward, after), "B": self._half(backward, backward_after)}
        halves["W"] = _Half(backward.action, halves["B"].factor, 0.0, 0.0)  # what it needs is before it on the compute queue
        key = forward.action.stage, backward.action.stage
        if key not in self.orders:
            self.orders[key] = steps_of(self.costs, *key)
        self.open[forward.pair] = _Pair(iter(self.orders[key]), halves, set())

    def _go_on(self, instruction: Run) -> _Half:
        """Goes on with both halves of a pair until the action's result is there. Returns the action's half."""
        assert instruction.pair is not None
        pair = self.open[instruction.pair]
        mark = {"F": "output", "I": "gradient"}.get(instruction.action.kind, "end")
        while mark not in pair.marks:
            step = next(pair.steps)
            if step.cost is None:
                pair.marks.add(step.mark)
            else:
                self._issue(pair.halves[step.what], step.cost, step.what)
        if mark == "end":
            del self.open[instruction.pair]
        return pair.halves[instruction.action.kind if instruction.action.kind != "I" else "B"]

    def _issue(self, half: _Half, node: NodeCost, kind: str) -> None:
        """One node of the micro-batch, of its `kind` of work."""
        queue, length = node.queue, node.ms * half.factor
        free = self.clock["compute"]
        start, end = place(self.clock, self.one_worker, node, length, half.ready)
        if queue == "communication":
            self.moves.append((start, end))
        else:
            if self.on[queue] == "compute" and self.awaited is not None:
                self.stalls.append(self._expose(free, start))
            if queue == "high" and length:
                self.high_delay += max(0.0, start - max(half.ready, half.turn))
            self.works.append((start, end))
            self.first = min(self.first, start)
        half.ready = end
        if node.name:
            _, stage, microbatch, lane = half.action
            on: Literal["high", "node"] = "high" if queue == "high" else "node"
            self.spans.append(Span(self.rank, on, start, end, f"{kind}{microbatch} {node.name}", kind, lane, stage, microbatch))
