"""Costs by stage and kind of action, and of the nodes of each: brought into one frozen form, and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from pipehc.schedules.pair_order import NODE_KINDS, kind_of, pair_order

Queue = Literal["compute", "high", "communication"]
Key = tuple[int, str]  # stage, kind: F, B (the input gradient alone), W or R
Table = tuple[tuple[Key, float], ...]
KINDS = ("F", "B", "W", "R")


class NodeCost(NamedTuple):
    """Work of one action that follows each other on one queue. name: BLOCK.KIND, of the node at whose turn it is issued."""

    name: str
    queue: Queue
    ms: float


Nodes = tuple[tuple[Key, tuple[NodeCost, ...]], ...]


class PairStep(NamedTuple):
    """What is issued next in a pair: a node of one of its halves, or None where what `mark` says has been issued."""

    what: Literal["F", "B", "W"]
    cost: NodeCost | None
    mark: str = ""


def frozen_table(given: Mapping[Key, float] | Table) -> Table:
    """Raises ValueError, naming the key, for what is no time of an action."""
    table = {}
    for key, ms in _items(given):
        table[_key("table", key)] = _time(f"costs.table[{_show(key)}]", ms)
    return tuple(sorted(table.items()))


def frozen_nodes(given: Mapping[Key, Sequence[tuple[str, str, float]]] | Nodes) -> Nodes:
    """The same of nodes; neighbours of one name and queue become one. Raises ValueError, naming the key, for what cannot be."""
    nodes: dict[Key, tuple[NodeCost, ...]] = {}
    for key, rows in _items(given):
        where = f"costs.nodes[{_show(key)}]"
        found: list[NodeCost] = []
        for row in rows:
            try:
                name, queue, ms = row
                block, _, kind = name.rpartition(".")
            except (TypeError, ValueError, AttributeError):
                raise ValueError(f"{where}: {row!r} must be (name, queue, ms)") from None
            if not block or kind not in NODE_KINDS:
                raise ValueError(f"{where}: {name!r} must be named BLOCK.KIND, KIND one of {', '.join(NODE_KINDS)}")
            allowed = get_args(Queue) if key[1] != "W" else ("compute",)
            if queue not in allowed:
                raise ValueError(f"{where}: queue {queue!r} of {name} must be {' or '.join(allowed)}")
            ms = _time(f"{where}: ms of {name}", ms)
            if found and found[-1][:2] == (name, queue):
                ms += found.pop().ms
            found.append(NodeCost(name, queue, ms))
        nodes[_key("nodes", key)] = tuple(found)
    for stage in sorted({stage for stage, _ in nodes}):
        _check_order(nodes, stage)
    return tuple(sorted(nodes.items()))


def names(nodes: Iterable[NodeCost]) -> list[str]:
    """Of nodes, each once, in their order."""
    return list(dict.fromkeys(node.name for node in nodes))


def pair_steps(
    forward: Sequence[NodeCost], of_stage: Sequence[NodeCost], backward: Sequence[NodeCost], weight: Sequence[NodeCost]
) -> list[PairStep]:
    """What a pair issues: the nodes of F on one stage, of B and W on another, in `pair_order`, and its marks.

    of_stage: the nodes of F on that other stage.
    """
    found: list[PairStep] = []
    costs: dict[tuple[str, str], list[NodeCost]] = {}
    for what, nodes in (("F", forward), ("B", backward), ("W", weight)):
        for node in nodes:
            costs.setdefault((what, node.name), []).append(node)
    for turn in pair_order(names(forward), names(of_stage)):
        if isinstance(turn, str):
            found.append(PairStep("F" if turn == "output" else "B", None, turn))
        else:
            found += [PairStep(turn[0], node) for node in costs.get(turn, ())]
    return found


def _check_order(nodes: Mapping[Key, Sequence[NodeCost]], stage: int) -> None:
    order = names(nodes.get((stage, "F"), ()))
    wanted = sorted(order, key=lambda name: (_first(order, name), NODE_KINDS.index(kind_of(name))))
    if order != wanted:
        raise ValueError(
            f"costs.nodes[{_show((stage, 'F'))}]: must have block after block, each in the order {', '.join(NODE_KINDS)}; "
            f"has {', '.join(order)}"
        )
    for kind in "BW":
        own = names(nodes.get((stage, kind), ()))
        for name in own:
            if name not in order:
                raise ValueError(f"costs.nodes[{_show((stage, kind))}]: {name!r} is no node of costs.nodes[{_show((stage, 'F'))}]")
        wanted = [name for name in reversed(order) if name in own]
        if kind == "B" and own != wanted:
            raise ValueError(
                f"costs.nodes[{_show((stage, 'B'))}]: must have the nodes in the order in which their backwards are issued, "
                f"{', '.join(wanted)}; has {', '.join(own)}"
            )


def _first(order: Sequence[str], name: str) -> int:
    """Where the first node of the same block is."""
    block = name.rpartition(".")[0]
    return next(i for i, other in enumerate(order) if other.rpartition(".")[0] == block)


def _items(given: Any) -> list[tuple[Any, Any]]:
    return list(given.items()) if isinstance(given, Mapping) else list(given)


def _key(what: str, key: Any) -> Key:
    if not (isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], int) and key[0] >= 0 and key[1] in KINDS):
        raise ValueError(f"costs.{what}[{key!r}]: the key must be (stage, kind): a number >= 0, and F, B, W or R")
    return key[0], key[1]


def _time(what: str, ms: Any) -> float:
    try:
        value = float(ms)
    except (TypeError, ValueError):
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"{what} = {ms}: must be a number >= 0")
    return value


def _show(key: Any) -> str:
    return f"{key[0]}, {key[1]!r}" if isinstance(key, tuple) and len(key) == 2 else repr(key)
