"""A dry run of a whole job: the ranks that differ, side by side, under its residual and under the plain one."""

from __future__ import annotations

from collections.abc import Sequence

from pipehc.config.strict_yaml import ConfigError
from pipehc.megatron.job.dry_rank import Failure, Found, Request, run_rank
from pipehc.planning.dry_run.command import Asked, check_ranks
from pipehc.planning.dry_run.processes import side_by_side
from pipehc.planning.dry_run.shortened import distinct_ranks
from pipehc.planning.dry_run.summary import DryRun, assemble


class ScriptError(RuntimeError):
    """The script failed; the message has its last output."""


def dry_runs(script: str, arguments: Sequence[str], world_size: int, asked: Asked) -> list[DryRun]:
    """Of the job as it is, and, if its residual is another, of the job with the plain one.

    Rank 0 runs first: it tells what the others are, and searches the schedule if that is asked for. Raises ConfigError for what
    the job refuses, ScriptError where it fails.
    """
    request = Request(script, tuple(arguments), 0, world_size, asked.imbalance)
    [first] = _runs([request])
    placement = first.job.placement
    check_ranks(asked.ranks, placement.ranks, "pipeline-model-parallel-size")
    ranks = list(asked.ranks) if asked.ranks is not None else distinct_ranks(placement)
    searched = first.program.schedule
    requests = [
        request._replace(rank=first.pipeline[rank], schedule=searched, plain=plain)
        for plain in ((False,) if first.job.residual == "none" else (False, True))
        for rank in ranks
    ]
    there = [k for k, other in enumerate(requests) if other.rank or other.plain]
    found = dict(zip(there, _runs([requests[k] for k in there])))
    everyone = [found.get(k, first) for k in range(len(requests))]
    return [
        assemble(own[0].job, asked.hardware, [one.run for one in own], own[0].program)
        for own in (everyone[at : at + len(ranks)] for at in range(0, len(everyone), len(ranks)))
    ]


def _runs(requests: Sequence[Request]) -> list[Found]:
    found = []
    for request, result in zip(requests, side_by_side(run_rank, requests) if requests else []):
        if isinstance(result, Failure):
            if result.refused:
                raise ConfigError(result.text)
            raise ScriptError(f"{request.script} failed in the dry run of rank {request.rank}:\n{result.text}")
        found.append(result)
    return found
