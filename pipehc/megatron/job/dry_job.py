"""A dry run of a whole job: the ranks that differ, side by side, under its residual and under the plain one."""

from __future__ import annotations

from collections.abc import Sequence

from pipehc.config.strict_yaml import ConfigError
from pipehc.megatron.job.dry_rank import Failure, Found, Request, run_rank
from pipehc.planning.dry_run.command import Asked, check_ranks
from pipehc.planning.dry_run.processes import side_by_side
from pipehc.planning.dry_run.shortened import distinct_ranks
from pipehc.planning.dry_run.summary import DryRun, assemble
from pipehc.schedules import Costs


class ScriptError(RuntimeError):
    """The script failed; the message has its last output."""


def dry_runs(script: str, arguments: Sequence[str], world_size: int, asked: Asked) -> list[DryRun]:
    """Of the job as it is, and, if its residual is another, of the job with the plain one.

    Rank 0 runs first: it tells what the others are, and searches the schedule if that is asked for; without costs to search with,
    all ranks run one micro-batch a direction before. Raises ConfigError for what the job refuses, ScriptError where it fails.
    """
    request, first = _first(script, arguments, world_size, asked)
    ranks = list(asked.ranks) if asked.ranks is not None else distinct_ranks(first.job.placement)
    if first.search is not None:
        costs = _costs(request, first, asked)
        try:
            request = request._replace(schedule=first.search.search(len(first.pipeline), first.microbatches, costs).schedule)
        except ValueError as error:
            raise ConfigError(f"schedule = 'auto': {error}") from error
        [first] = _runs([request])
    everyone = _others(request._replace(schedule=first.program.schedule), first, ranks, plain=first.job.residual != "none")
    return [
        assemble(own[0].job, asked.hardware, [one.run for one in own], own[0].program)
        for own in (everyone[at : at + len(ranks)] for at in range(0, len(everyone), len(ranks)))
    ]


def costs(script: str, arguments: Sequence[str], world_size: int, asked: Asked) -> Costs:
    """What every stage costs, in ms; with a schedule that is searched, before it is."""
    return _costs(*_first(script, arguments, world_size, asked), asked)


def _first(script: str, arguments: Sequence[str], world_size: int, asked: Asked) -> tuple[Request, Found]:
    request = Request(script, tuple(arguments), 0, world_size, asked.imbalance)
    [first] = _runs([request])
    check_ranks(asked.ranks, first.job.placement.ranks, "pipeline-model-parallel-size")
    return request, first


def _costs(request: Request, first: Found, asked: Asked) -> Costs:
    if first.search is None:
        request = request._replace(schedule=first.program.schedule)
    everyone = _others(request, first, distinct_ranks(first.job.placement), plain=False)
    step = assemble(first.job, asked.hardware, [one.run for one in everyone], first.program).step
    assert step is not None, "every stage was run"
    return step.costs


def _others(request: Request, first: Found, ranks: Sequence[int], plain: bool) -> list[Found]:
    """What `ranks` of the pipeline find, and, if `plain`, again with the plain residual. first: what rank 0 found."""
    residuals = (False, True) if plain else (False,)
    requests = [request._replace(rank=first.pipeline[rank], plain=other) for other in residuals for rank in ranks]
    there = [k for k, one in enumerate(requests) if one.rank or one.plain]
    found = dict(zip(there, _runs([requests[k] for k in there])))
    return [found.get(k, first) for k in range(len(requests))]


def _runs(requests: Sequence[Request]) -> list[Found]:
    found = []
    for request, result in zip(requests, side_by_side(run_rank, requests) if requests else []):
        if isinstance(result, Failure):
            if result.refused:
                raise ConfigError(result.text)
            raise ScriptError(f"{request.script} failed in the dry run of rank {request.rank}:\n{result.text}")
        found.append(result)
    return found
