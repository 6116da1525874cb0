"""The verifier against programs that were broken on purpose, and against a brute-force proof written another way."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from pipehc.schedules import Program, ProgramError, build, compile, verify
from pipehc.schedules.actions import Action
from pipehc.schedules.program import Instruction, Post, Run, Send, Wait

SMALL: list[tuple[str, int, int, dict[str, Any]]] = [
    ("gpipe", 2, 3, {}),
    ("1f1b", 2, 5, {}),
    ("1f1b", 3, 6, {"high": True, "recompute": True, "ahead": 1}),
    ("interleaved", 2, 4, {}),
    ("interleaved", 3, 4, {"high": True}),
    ("zb_h1", 3, 7, {"ahead": 1}),
    ("zbv", 2, 5, {"high": True, "recompute": True}),
    ("zbv", 3, 5, {}),
    ("dualpipe", 2, 6, {"high": True, "recompute": True}),
    ("dualpipe", 4, 10, {}),
    ("dualpipe", 4, 8, {"split_backward": False, "ahead": 3}),
    ("dualpipev", 2, 7, {"high": True}),
]


def programs() -> Iterator[Program]:
    for name, ranks, microbatches, options in SMALL:
        yield compile(build(name, ranks, microbatches), **options)
        yield compile(build(name, ranks, microbatches, forward=True), high=options.get("high", False))


def edited(program: Program, rank: int, row: list[Instruction]) -> Program:
    return replace(program, instructions=(*program.instructions[:rank], tuple(row), *program.instructions[rank + 1 :]))


def test_removing_any_single_event_is_found() -> None:
    removed = 0
    for program in programs():
        for rank, row in enumerate(program.instructions):
            for at, instruction in enumerate(row):
                broken: list[Instruction] = []
                if not isinstance(instruction, Wait):
                    broken += [instruction._replace(after=tuple(e for e in instruction.after if e != x)) for x in instruction.after]
                if isinstance(instruction, (Run, Send)) and instruction.event is not None:
                    broken.append(instruction._replace(event=None))
                for one in broken:
                    removed += 1
                    with pytest.raises(ProgramError):
                        verify(edited(program, rank, [*row[:at], one, *row[at + 1 :]]))
    assert removed > 1000


def test_removing_or_repeating_any_single_instruction_is_found() -> None:
    for program in programs():
        for rank, row in enumerate(program.instructions):
            for at, instruction in enumerate(row):
                optional = isinstance(instruction, Run) and instruction.action.kind == "R" and instruction.event is None
                if not optional:
                    with pytest.raises(ProgramError):
                        verify(edited(program, rank, [*row[:at], *row[at + 1 :]]))
                with pytest.raises(ProgramError):
                    verify(edited(program, rank, [*row[:at], instruction, instruction, *row[at + 1 :]]))


def test_an_event_on_the_other_queue_is_needed_when_the_post_residual_leaves_the_compute_queue() -> None:
    program = compile(build("zbv", 2, 4), high=True)
    row = list(program.instructions[1])  # holds stages 1 and 2: the output of 1 is handed over on this rank
    at = next(i for i, x in enumerate(row) if isinstance(x, Run) and x.action[:2] == ("F", 2))
    maker = next(x for x in row if isinstance(x, Run) and x.action[:2] == ("F", 1))
    assert maker.event in row[at].after  # type: ignore[union-attr]
    row[at] = row[at]._replace(after=())
    with pytest.raises(ProgramError, match="may touch 'activation 0 2 0' at the same time"):
        verify(edited(program, 1, row))


def test_running_an_action_before_what_it_needs_on_its_own_rank_is_found() -> None:
    """Also where no message is involved: F before I before W, and both stages of a V on the rank where it turns."""
    moved = 0
    for program in programs():
        placement = program.schedule.placement
        for rank, row in enumerate(program.instructions):
            places = {x.action: k for k, x in enumerate(row) if isinstance(x, Run)}
            for action, at in places.items():
                kind, stage, m, lane = action
                needed = {"F": [("F", stage - 1)], "W": [("I", stage)]}.get(
                    kind, [("F", stage), ("I", stage + 1), ("B", stage + 1)]
                )
                for other, other_stage in needed if kind != "R" else [("F", stage)]:
                    before = places.get(Action(other, other_stage, m, lane))  # type: ignore[arg-type]
                    if before is None or not 0 <= other_stage < placement.stages:
                        continue
                    moved += 1
                    late = [*row[:before], row[at], *row[before:at], *row[at + 1 :]]
                    with pytest.raises(ProgramError):
                        verify(edited(program, rank, late))
    assert moved > 500


def test_messages_out_of_order_are_found() -> None:
    program = compile(build("1f1b", 3, 6))
    row = list(program.instructions[1])
    first, second = (i for i, x in enumerate(row) if isinstance(x, Post) and x.message.source == 0 and x.message.microbatch < 2)
    row[first], row[second] = row[second], row[first]
    with pytest.raises(ProgramError, match="edge 0 -> 1: sends and posted receives are not the same list"):
        verify(edited(program, 1, row))


def test_a_circle_of_waits_is_found() -> None:
    program = compile(build("1f1b", 2, 4))
    row = list(program.instructions[0])
    # Rank 0 waits for the gradient of micro-batch 0 before it sends the activation that rank 1 needs for it.
    message = next(x.message for x in row if isinstance(x, Wait))
    early = [x for x in row if isinstance(x, (Post, Wait)) and x.message == message]
    row = early + [x for x in row if x not in early]
    with pytest.raises(ProgramError, match=r"deadlock: rank 0 waits until gradient .* is sent; rank 1 waits until activation"):
        verify(edited(program, 0, row))


def test_a_circle_through_the_completion_of_sends_is_found() -> None:
    program = compile(build("dualpipe", 2, 4, forward=True))
    for rank in (0, 1):
        row = list(program.instructions[rank])
        posts = [x for x in row if isinstance(x, Post)]
        row = [x for x in row if not isinstance(x, Post)]
        send = next(i for i, x in enumerate(row) if isinstance(x, Send))
        row[send] = row[send]._replace(event=90)  # type: ignore[call-arg]
        row[send + 1 : send + 1] = [posts[0]._replace(after=(90,)), *posts[1:]]
        program = edited(program, rank, row)
        if rank == 0:
            verify(program)  # rank 1 has posted its receive, so the first send of rank 0 ends
    with pytest.raises(ProgramError, match=r"deadlock: rank 0 waits until activation .* is posted; rank 1 waits until activation"):
        verify(program)  # both wait until the other posts: on gloo no send ends before that


def test_a_pair_that_waits_for_itself_is_found() -> None:
    program = compile(build("dualpipe", 4, 12))
    row = list(program.instructions[0])
    pair = next(x.pair for x in row if isinstance(x, Run) and x.pair is not None)
    forward, backward = (i for i, x in enumerate(row) if isinstance(x, Run) and x.pair == pair and x.action.kind in "FI")
    row[backward] = row[backward]._replace(after=(*row[backward].after, row[forward].event))  # type: ignore[union-attr,call-arg]
    with pytest.raises(ProgramError, match="are a pair, but cannot be interleaved"):
        verify(edited(program, 0, row))


# ---- an independent proof: every pair of uses, reachability in the whole graph ----


def brute_force_is_ordered(program: Program, rank: int) -> bool:
    """Start and end of every piece as graph nodes; every two conflicting uses must be joined by a path. Only for one rank's row."""
    row = program.instructions[rank]
    placement = program.schedule.placement
    edges: dict[tuple, set[tuple]] = {}
    uses: list[tuple[str, bool, tuple, tuple]] = []  # what, writes, start node, end node, in order of issue
    last: dict[str, tuple[tuple, tuple]] = {}
    recorded: dict[int, tuple] = {}
    posts: dict[tuple, tuple] = {}
    holds: dict[str, tuple] = {}

    def buffer(kind: str, lane: int, stage: int, m: int) -> str | None:
        """Where the input (F) or output gradient (I) of a stage lies."""
        source = stage - 1 if kind == "F" else stage + 1
        if not 0 <= source < placement.stages:
            return None
        name = "activation" if kind == "F" else "gradient"
        for x in row:
            if isinstance(x, (Post, Send)) and x.message[:4] == (name, lane, stage, m):
                return f"{type(x).__name__} {x.message.source} {x.message.target} {x.slot}"
        return f"handed over {kind} {lane} {stage} {m}"

    def piece(index: int, part: int, queue: str, weak: bool, before: list[tuple], reads: list, writes: list) -> tuple:
        start, end = (index, part, 0), (index, part, 1)
        edges.setdefault(start, set()).add(end)
        for node in before:
            edges.setdefault(node, set()).add(start)
        if queue in last:
            edges[last[queue][0] if weak else last[queue][1]].add(start)
            edges.setdefault(last[queue][1], set()).add(end)
        edges.setdefault(end, set())
        last[queue] = start, end
        uses.extend((x, False, start, end) for x in reads if x)
        uses.extend((x, True, start, end) for x in writes if x)
        return end

    waits: dict[str, list[tuple]] = {"compute": [], "high": []}
    for index, x in enumerate(row):
        if isinstance(x, Wait):
            waits[x.queue].append(posts[x.message])
            continue
        before = [recorded[e] for e in x.after]
        if isinstance(x, Post):
            where = buffer("F" if x.message.kind == "activation" else "I", *x.message[1:4])
            posts[x.message] = piece(index, 0, f"recv {x.message.source}", True, before, [], [where])
            holds[str(where)] = x.message[:4]
            continue
        if isinstance(x, Send):
            where = buffer("F" if x.message.kind == "activation" else "I", *x.message[1:4])
            if holds.get(str(where)) != x.message[:4]:
                return False
            end = piece(index, 0, f"send {x.message.target}", True, before, [where], [])
        else:
            kind, stage, m, lane = x.action
            inputs = [buffer("F", lane, stage, m)] + ([buffer("I", lane, stage, m)] if kind in "BIW" else [])
            for name, where in zip(("activation", "gradient"), inputs):
                if where and where.startswith("Post") and holds.get(where) != (name, lane, stage, m):
                    return False
            own = f"{lane} {stage} {m}"
            reads = inputs + ([f"saved {own}"] if kind != "F" else []) + ([f"deferred {own}"] if kind == "W" else [])
            keeps = {"F": ["saved"], "R": ["saved"], "I": ["deferred"], "B": ["deferred"], "W": []}[kind]
            writes = [f"{k} {own}" for k in keeps] + ([f"sum {lane} {stage}"] if kind in "BW" else [])
            result = None
            if kind == "F" and stage + 1 < placement.stages:
                result = buffer("F", lane, stage + 1, m)
                holds[str(result)] = ("activation", lane, stage + 1, m)
            if kind in "BI" and stage:
                result = buffer("I", lane, stage - 1, m)
                holds[str(result)] = ("gradient", lane, stage - 1, m)
            queues = [q for q, ok in ((x.entry, x.entry != "compute"), ("compute", True), (x.exit, x.exit != "compute")) if ok]
            end = None
            for part, queue in enumerate(queues):
                hand = [result] if part == len(queues) - 1 else []
                links = [end] if end else before
                end = piece(index, part, queue, False, [*links, *waits[queue]], reads, writes + hand)  # type: ignore[list-item]
                waits[queue] = []
        if x.event is not None:
            recorded[x.event] = end  # type: ignore[assignment]

    order = sorted(edges, reverse=True)  # (issue, part, side): every edge leads upwards
    bit = {node: 1 << k for k, node in enumerate(order)}
    reach: dict[tuple, int] = {}
    for node in order:
        reach[node] = bit[node]
        for follower in edges[node]:
            reach[node] |= reach[follower]
    return all(
        reach[end] & bit[start]
        for k, (where, writes, _, end) in enumerate(uses)
        for other, also_writes, start, later_end in uses[k + 1 :]
        if where == other and (writes or also_writes) and end != later_end
    )


def mutated(row: tuple[Instruction, ...], rng: random.Random) -> list[Instruction]:
    """Drops or bends one to three events or slots; never the order of the instructions."""
    result = list(row)
    for _ in range(rng.randint(1, 3)):
        at = rng.choice([i for i, x in enumerate(result) if not isinstance(x, Wait)])
        x = result[at]
        assert not isinstance(x, Wait)
        recorded = [y.event for y in result[:at] if isinstance(y, (Run, Send)) and y.event is not None]
        if x.after and rng.random() < 0.5:
            dropped = rng.choice(x.after)
            result[at] = x._replace(after=tuple(e for e in x.after if e != dropped))
        elif recorded and rng.random() < 0.6:
            result[at] = x._replace(after=(*x.after, rng.choice(recorded)))
        elif isinstance(x, (Post, Send)):
            result[at] = x._replace(slot=rng.randrange(4))
    return result


def test_verdicts_agree_with_a_brute_force_proof() -> None:
    rng = random.Random(5)
    agreed = {True: 0, False: 0}
    for program in programs():
        for rank, row in enumerate(program.instructions):
            if len(row) > 60:
                continue
            assert brute_force_is_ordered(program, rank)
            for _ in range(40):
                candidate = edited(program, rank, mutated(row, rng))
                expected = brute_force_is_ordered(candidate, rank)
                try:
                    verify(candidate)
                    found = True
                except ProgramError as error:
                    if "deadlock" in str(error) or "cannot be interleaved" in str(error):
                        continue  # refused for another good reason than a race
                    found = False
                assert found == expected, candidate.instructions[rank]
                agreed[found] += 1
    assert agreed[True] > 100 and agreed[False] > 100, agreed
