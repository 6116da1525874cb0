"""Before the first step: neighbours agree on what they will exchange, and every connection is up."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist

from pipehc.comm.groups import Edge


def digest(parts: Iterable[object]) -> str:
    """16 hex digits that are equal for equal texts, on every machine."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def compare_neighbours(facts: Mapping[str, object], neighbours: Iterable[int]) -> None:
    """Compares what two ranks must agree on; collective over the world.

    facts: name -> value, compared as text: shape and dtype of the messages, digest of the schedule. neighbours: ranks of the world
    that this one believes to exchange messages with. Raises ValueError on every rank, naming the two ranks, the fact and both
    values, wherever one differs.
    """
    own = ({name: str(value) for name, value in facts.items()}, sorted(set(neighbours)))
    everyone = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    problems = []
    # One of the two is enough: with different layouts they need not see each other.
    for rank, other in sorted({(min(a, b), max(a, b)) for a, (_, others) in enumerate(everyone) for b in others}):
        mine, theirs = everyone[rank][0], everyone[other][0]
        for name in sorted(mine.keys() | theirs.keys()):
            a, b = mine.get(name, "nothing"), theirs.get(name, "nothing")
            if a != b:
                problems.append(f"{name}: rank {rank} has {a}, its neighbour rank {other} has {b}")
    if problems:
        raise ValueError("; ".join(problems) + ": must be equal (do all ranks run the same code and configuration?)")


def first_problem(problem: str | None) -> str | None:
    """The problem of the first rank that has one, on every rank; with its number, unless all have the same. Collective."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    for rank, text in enumerate(found):
        if text is not None:
            return text if found.count(text) == len(found) else f"rank {rank}: {text}"
    return None


def connect(groups: Mapping[Edge, dist.ProcessGroup], device: torch.device | str = "cpu") -> None:
    """Sends one element over every edge, one edge after the other in an order that is the same on all ranks.

    NCCL connects two ranks when they first talk, and blocks both until they do: in the order of a schedule that can be a circle.
    """
    for (source, target), group in sorted(groups.items()):
        ranks = dist.get_process_group_ranks(group)
        # Pipeline positions rise with ranks, and so do positions in the group.
        sender, receiver = ranks if source < target else reversed(ranks)
        element = torch.zeros(1, device=device)
        if dist.get_rank() == sender:
            dist.send(element, receiver, group)
        else:
            dist.recv(element, sender, group)
