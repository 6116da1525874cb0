"""Before the first step: neighbours agree on what they will exchange, every connection is up, and nothing in the way of overlap."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist

from pipehc.comm.groups import Edge


def digest(parts: Iterable[object]) -> str:
    """16 hex digits that are equal for equal texts, on every machine."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def compare_neighbours(facts: Mapping[str, object], groups: Mapping[Edge, dist.ProcessGroup]) -> None:
    """Compares what two ranks must agree on, over every edge between them; collective over the world.

    facts: name -> value, compared as text: shape and dtype of the messages, digest of the schedule. groups: this rank's edges (see
    `edge_groups`). Raises ValueError on every rank, naming the two ranks of the world, the fact and both values, for every edge
    on which one differs.
    """
    neighbours = sorted({rank for group in groups.values() for rank in dist.get_process_group_ranks(group)} - {dist.get_rank()})
    own = ({name: str(value) for name, value in facts.items()}, neighbours)
    everyone = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    problems = []
    for rank, (mine, others) in enumerate(everyone):
        for other in (other for other in others if other > rank):
            theirs = everyone[other][0]
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


def overlap_warnings(environment: Mapping[str, str], ranks_here: int, cores: int, on_gpu: bool) -> list[str]:
    """What in the environment of a process keeps communication from hiding behind computation, a sentence each.

    ranks_here: processes on this machine. cores: its processor cores.
    """
    reasons = {
        ("CUDA_DEVICE_MAX_CONNECTIONS", "1"): "all streams share one hardware queue, so messages and high-priority kernels wait "
        "behind computation; unset it, or set 8 or more",
        ("CUDA_LAUNCH_BLOCKING", "1"): "every kernel is waited for; unset it",
        ("TORCH_NCCL_BLOCKING_WAIT", "1"): "the host waits for every message; unset it",
        ("NCCL_BLOCKING_WAIT", "1"): "the host waits for every message; unset it",
        ("TORCH_DISTRIBUTED_DEBUG", "DETAIL"): "every collective is checked with one more; set INFO or OFF",
    }
    found = [f"{key}={value}: {why}" for (key, value), why in reasons.items() if environment.get(key, "").upper() == value]
    threads = environment.get("OMP_NUM_THREADS", "")
    if not on_gpu and threads.isdigit() and int(threads) * ranks_here > max(cores, ranks_here):
        found.append(
            f"OMP_NUM_THREADS={threads}: {ranks_here} processes with {threads} threads each on {cores} cores delay each other's "
            "messages; set 1"
        )
    return found
