"""All work that a host has issued ends without it: over all families, against an executor of streams and hardware queues."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from random_schedules import random_auto, random_family, random_schedule

from pipehc.schedules import FAMILIES, Action, Program, ProgramError, build, compile
from pipehc.schedules.issued import check_hosts_wait, check_issued
from pipehc.schedules.program import Message, Post, Run, Send, Wait, inputs_first

EAGER = sorted((Path(__file__).parent / "data").glob("eager_*.json"))
"""What the compiler made when it posted four receives ahead, whatever their messages depended on."""


def load(path):
    data = json.loads(path.read_text())
    kinds = {kind.__name__: kind for kind in (Post, Wait, Send, Run)}

    def instruction(name, first, *rest):
        first = Action(*first) if name == "Run" else Message(*first)
        return kinds[name](first, *(tuple(x) if isinstance(x, list) else x for x in rest))

    schedule = build(data["family"], data["ranks"], data["microbatches"])
    return Program(schedule, tuple(tuple(instruction(*i) for i in row) for row in data["instructions"]))


def ends(program, rank, stop, mapping=None):
    """Whether all that `rank` has issued ends if its host stops before instruction `stop` and the others' go on.

    mapping: (rank, stream) -> hardware queue; None: a queue for every stream. A plain executor: whatever can start, starts.
    """
    rows = [inputs_first(row) for row in program.instructions]
    queues, order = {}, {}
    for r, row in enumerate(rows):
        for index, i in enumerate(row[:stop] if r == rank else row):
            stream = "compute" if isinstance(i, (Run, Wait)) else (type(i).__name__, i.message[4:])
            order.setdefault((r, stream), []).append((r, index))
            queues.setdefault((r, stream if mapping is None else mapping(r, stream)), []).append((r, index))
    events = [{i.event: (r, k) for k, i in enumerate(row) if not isinstance(i, (Post, Wait))} for r, row in enumerate(rows)]
    posts = {i.message: (r, k) for r, row in enumerate(rows) for k, i in enumerate(row) if isinstance(i, Post)}
    sends = {i.message: (r, k) for r, row in enumerate(rows) for k, i in enumerate(row) if isinstance(i, Send)}
    ended = set()
    before = {here: work[k - 1] for work in order.values() for k, here in enumerate(work) if k}
    front = dict.fromkeys(queues, 0)

    def can_start(here):
        r, index = here
        i = rows[r][index]
        if here in before and before[here] not in ended:
            return False
        needs = [posts[i.message]] if isinstance(i, Wait) else [events[r][event] for event in i.after]
        return all(need in ended for need in needs)

    def at_front(here):
        return any(k < len(queues[key]) and queues[key][k] == here for key, k in front.items())

    moved = True
    while moved:
        moved = False
        for key, work in queues.items():
            while front[key] < len(work):
                here = work[front[key]]
                i = rows[here[0]][here[1]]
                if here not in ended:
                    if not can_start(here):
                        break
                    if isinstance(i, (Post, Send)):
                        other = (sends if isinstance(i, Post) else posts)[i.message]
                        if not (at_front(other) and can_start(other)):
                            break
                        ended.add(other)
                    ended.add(here)
                front[key] += 1
                moved = True
    return all((rank, index) in ended for index in range(min(stop, len(rows[rank]))))


def holds(program, mapping=None):
    return all(
        ends(program, rank, stop, mapping)
        for rank, row in enumerate(program.instructions)
        for stop in range(1, len(row) + 1)
        if stop == len(row) or isinstance(inputs_first(row)[stop - 1], (Post, Send))
    )


def test_what_was_posted_too_early_is_rejected():
    assert len(EAGER) == 2
    for path in EAGER:
        program = load(path)
        with pytest.raises(ProgramError, match=r"receives the .* before it .*, without which that cannot end"):
            check_issued(program)
        with pytest.raises(ProgramError, match="every host waits"):
            check_hosts_wait(program)
        assert not holds(program)


SMALL = [("gpipe", 3, 3), ("1f1b", 3, 4), ("1f1b", 4, 6), ("zb_h1", 3, 5), ("interleaved", 2, 4), ("interleaved", 3, 3)]
SMALL += [("zbv", 2, 4), ("zbv", 3, 6), ("dualpipe", 2, 4), ("dualpipe", 4, 8), ("dualpipev", 2, 5), ("dualpipev", 3, 6)]


@pytest.mark.parametrize(("name", "ranks", "microbatches"), SMALL)
@pytest.mark.parametrize("forward", [False, True])
def test_programs_hold_on_an_executor_of_streams(name, ranks, microbatches, forward):
    schedule = build(name, ranks, microbatches, forward=forward)
    assert holds(compile(schedule, recompute=not forward, high=True))
    safe = compile(schedule, recompute=not forward, high=True, hosts_wait=True)
    assert holds(safe, lambda rank, stream: 0)
    rng = random.Random(f"{name}{ranks}")
    for count in (2, 3):
        chosen = {}
        assert holds(safe, lambda rank, stream, count=count, chosen=chosen: chosen.setdefault((rank, stream), rng.randrange(count)))


def moved(program, rng):
    """The program with one post at an earlier place."""
    rank = rng.randrange(len(program.instructions))
    row = list(program.instructions[rank])
    posts = [k for k, i in enumerate(row) if isinstance(i, Post)]
    if not posts:
        return None
    k = rng.choice(posts)
    earlier = [j for j in posts if j < k and row[j].message[4:] == row[k].message[4:]]
    to = rng.randint(earlier[-1] + 1 if earlier else 0, k)
    row.insert(to, row.pop(k)._replace(after=()))
    return replace(program, instructions=(*program.instructions[:rank], tuple(row), *program.instructions[rank + 1 :]))


def rejects(check, program):
    try:
        check(program)
    except ProgramError:
        return True
    return False


@pytest.mark.slow
def test_verdicts_are_those_of_the_executor():
    rng, verdicts = random.Random(0), {check_issued: [], check_hosts_wait: []}
    for _ in range(60):
        name, ranks, microbatches = rng.choice(SMALL)
        program = moved(compile(build(name, ranks, microbatches), hosts_wait=rng.random() < 0.5), rng)
        if program is None:
            continue
        for check, mapping in ((check_issued, None), (check_hosts_wait, lambda rank, stream: 0)):
            verdict = rejects(check, program)
            assert verdict != holds(program, mapping), (name, ranks, microbatches)
            verdicts[check].append(verdict)
    assert all(3 < sum(found) < len(found) - 3 for found in verdicts.values()), verdicts


@pytest.mark.parametrize(
    "ranks", [2, 3, 4, 6, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (8, 12, 16))]
)
def test_every_family_is_safe_with_any_number_of_queues(ranks):
    """`compile` verifies what it makes: with as many queues as streams, or with one."""
    for name in FAMILIES:
        for microbatches in (2 * ranks, 3 * ranks + 2)[: 1 if ranks > 8 else 2]:
            try:
                schedule = build(name, ranks, microbatches)
            except ValueError:
                assert name in ("dualpipe", "interleaved")  # odd numbers
                continue
            for hosts_wait in (False, True):
                check_issued(compile(schedule, recompute=True, high=True, hosts_wait=hosts_wait))
                compile(build(name, ranks, microbatches, forward=True), hosts_wait=hosts_wait)


@pytest.mark.slow
def test_a_thousand_random_schedules_are_safe():
    rng = random.Random(12)
    for k in range(1000):
        make = random_auto if k % 20 == 0 else random_family if k % 2 else random_schedule
        schedule = make(rng, rng.choice((2, 4, 6) if make is random_family else (2, 3, 4, 6)))
        options = {"ahead": rng.randint(1, 5), "split_backward": rng.random() < 0.7, "high": rng.random() < 0.5}
        check_issued(compile(schedule, **options))
        check_hosts_wait(compile(schedule, hosts_wait=True, **options))
