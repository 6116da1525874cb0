"""Costs of every stage and node, from a recorded step that has spans of nodes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import mean, median
from typing import NamedTuple

from pipehc.schedules.costs import Costs
from pipehc.schedules.node_costs import Key, NodeCost, Queue, names
from pipehc.schedules.pair_order import ALL_TO_ALLS, kind_of
from pipehc.schedules.recording import Recording
from pipehc.schedules.spans import Span

Part = tuple[str, Queue]  # name of a node, and its queue
Where = tuple[int, int, int]  # lane, stage, micro-batch
Nodes = Mapping[tuple[str, Where], list[Span]]  # kind, where -> in the order in which they began


class _Action(NamedTuple):
    """One recorded F, B (the input gradient) or W: the time of its nodes, in order, and of all of it; paired: interleaved."""

    kind: str
    stage: int
    paired: bool
    whole: float | None  # None where it cannot be told from other work
    nodes: dict[Part, float]


def measured_node_costs(recording: Recording, *, one_worker: bool) -> Costs:
    """What every node took on average, and the messages; one_worker: recorded on a CPU, see `Costs`.

    All-to-alls are taken from actions outside of interleaved pairs, where they are waited for at once; if there is none, the
    shortest. What actions took beside their nodes, there, is spread over these. If the pairs were not interleaved, the costs
    are those of whole actions, as the simulator then runs pairs.
    Raises ValueError if there are no spans of nodes, or if a stage never ran.
    """
    if not any(span.queue == "node" for span in recording.spans):
        raise ValueError(f"{recording.title}: has no spans of nodes")
    actions = _actions(recording)
    stages = range(recording.schedule.placement.stages)
    nodes: dict[Key, list[NodeCost]] = {}
    beside = {kind: _beside([a for a in actions if a.kind == kind]) for kind in "FB"}
    for stage in stages:
        for kind in "FB" if not recording.schedule.forward_only else "F":
            own = [action for action in actions if (action.kind, action.stage) == (kind, stage)]
            if not own:
                raise ValueError(f"{recording.title}: stage {stage} has no {kind} with spans of nodes")
            nodes[stage, kind] = _mean_nodes(own, beside[kind])
        if not recording.schedule.forward_only:
            weights = [action for action in actions if (action.kind, action.stage) == ("W", stage)]
            if not weights:
                raise ValueError(f"{recording.title}: stage {stage} has no W")
            nodes[stage, "W"] = _weight_nodes(weights, nodes[stage, "B"])
    again = {(s, "R"): mean(t) for s in stages if (t := _lengths(x for x in recording.spans if x.kind == "R" and x.stage == s))}
    moved = [span.end - span.start for span in recording.spans if span.queue == "recv"]
    rest = {"link": median(moved or [0.0]), "one_worker": one_worker}
    if any(span.pair is not None for span in recording.spans) and not any(action.paired for action in actions):
        table = again | {key: sum(node.ms for node in rows) for key, rows in nodes.items()}
        return Costs(table=table, **rest)  # type: ignore[arg-type]
    return Costs(table=again, nodes=nodes, **rest)  # type: ignore[arg-type]


def _lengths(spans: Iterable[Span]) -> list[float]:
    return [span.end - span.start for span in spans if span.queue == "compute"]


def _actions(recording: Recording) -> list[_Action]:
    runs = [span for span in recording.spans if span.queue == "compute"]
    nodes: dict[tuple[str, Where], list[Span]] = defaultdict(list)
    for span in sorted((s for s in recording.spans if s.queue in ("node", "high")), key=lambda s: s.start):
        nodes[span.kind, _where(span)].append(span)
    together = _interleaved(runs, nodes)
    found = []
    for run in runs:
        of, paired = _where(run), (run.rank, run.pair) in together
        if run.kind == "F":
            found.append(_Action("F", run.stage, paired, None if paired else run.end - run.start, _parts(nodes["F", of])))
        if run.kind in "BI":
            rebuilt = [span for span in nodes["R", of] if span.start >= run.start]  # by the backward itself
            parts = sorted([*nodes["B", of], *rebuilt], key=lambda s: s.start)
            if not parts:
                raise ValueError(f"{recording.title}: {run.what} has no spans of nodes")
            end = run.end if run.kind == "I" else parts[-1].end
            found.append(_Action("B", run.stage, paired, None if paired else end - run.start, _parts(parts)))
            if run.kind == "B" and not paired:
                found.append(_Action("W", run.stage, False, run.end - end, {}))
        if run.kind == "W" and not paired:
            found.append(_Action("W", run.stage, False, run.end - run.start, {}))
        if run.kind in "WB" and paired:
            found.append(_Action("W", run.stage, True, None, _parts(nodes["W", of])))
    return found


def _interleaved(runs: Iterable[Span], nodes: Nodes) -> set[tuple[int, int | None]]:
    """(rank, pair) of which the backward had begun before the forward ended."""
    pairs: dict[tuple[int, int | None], dict[str, list[Span]]] = defaultdict(dict)
    for run in runs:
        if run.pair is not None and run.kind in "FBI":
            kind = "F" if run.kind == "F" else "B"
            pairs[run.rank, run.pair][kind] = nodes.get((kind, _where(run)), [])
    return {key for key, pair in pairs.items() if all(map(pair.get, "FB")) and pair["B"][0].start < pair["F"][-1].end}


def _where(span: Span) -> Where:
    return span.lane, span.stage, span.microbatch


def _parts(spans: Iterable[Span]) -> dict[Part, float]:
    """The nodes of one action, with their times; what is rebuilt belongs to the node that comes next."""
    found: dict[Part, float] = {}
    waiting = 0.0
    for span in spans:
        if span.kind == "R":
            waiting += span.end - span.start
            continue
        name = span.what.split()[1]
        move = kind_of(name) in ALL_TO_ALLS
        queue: Queue = "high" if span.queue == "high" else "communication" if move else "compute"
        part = name, queue
        found[part] = found.get(part, 0.0) + span.end - span.start + waiting
        waiting = 0.0
    return found


def _beside(actions: Iterable[_Action]) -> float:
    """What actions took beside their nodes, per node that computes."""
    gaps = [(a.whole - sum(a.nodes.values()), len([1 for _, q in a.nodes if q != "communication"])) for a in actions if a.whole]
    return max(0.0, sum(gap for gap, _ in gaps) / max(1, sum(count for _, count in gaps)))


def _mean_nodes(actions: list[_Action], beside: float) -> list[NodeCost]:
    alone = [action for action in actions if not action.paired]
    found = []
    for name, queue in (alone or actions)[0].nodes:
        times = [action.nodes.get((name, queue), 0.0) for action in actions]
        if queue != "communication":
            found.append(NodeCost(name, queue, mean(times) + beside))
        elif alone:
            found.append(NodeCost(name, queue, mean(action.nodes.get((name, queue), 0.0) for action in alone)))
        else:
            found.append(NodeCost(name, queue, min(times)))
    return found


def _weight_nodes(actions: list[_Action], backward: list[NodeCost]) -> list[NodeCost]:
    """Pairs tell what the nodes take, all together as much as W on average; without pairs it is all at the last turn."""
    paired = [action for action in actions if action.paired]
    if not paired:
        return [NodeCost(backward[-1].name, "compute", mean(action.whole or 0.0 for action in actions))]
    whole = mean(sum(action.nodes.values()) if action.whole is None else action.whole for action in actions)
    times = {name: mean(action.nodes.get((name, queue), 0.0) for action in paired) for name, queue in paired[0].nodes}
    scale = whole / sum(times.values()) if sum(times.values()) else 1.0
    order = names(backward)  # pairs have another
    return [NodeCost(name, "compute", times[name] * scale) for name in sorted(times, key=order.index)]
