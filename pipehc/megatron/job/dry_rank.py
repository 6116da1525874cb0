"""One rank of a job of megatron.training, run on tensors without data, in a process without peers, and counted.

The script runs as it is: its arguments, model provider, wrappers, optimizer and forward step. What it would load or leave on disk
is taken out of its arguments; its batches are zeros; of its iterations one runs, after an optimizer step on gradients of zero that
makes the optimizer's state.
"""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model

from pipehc.comm.queues import IssueQueue
from pipehc.megatron import meta
from pipehc.megatron.job import cpu_job, mirror
from pipehc.megatron.job import schedule as job_schedule
from pipehc.megatron.job.chunk import ChunkStage
from pipehc.megatron.job.diagnostics import Diagnostics
from pipehc.megatron.job.enable import Enabled
from pipehc.megatron.job.schedule import ForwardBackward
from pipehc.megatron.job.searched import Searched
from pipehc.megatron.job.source import Given
from pipehc.megatron.layer import hyper_connection_layers
from pipehc.planning.dry_run.counting import counting, persistent
from pipehc.planning.dry_run.job import Job
from pipehc.planning.dry_run.observer import Observer, TellingStage
from pipehc.planning.dry_run.peaks import peak
from pipehc.planning.dry_run.rank_run import RankRun
from pipehc.planning.dry_run.shortened import fewest_microbatches, one_each
from pipehc.planning.dry_run.tracker import Moment, Tracker, Where
from pipehc.schedules import Program, Schedule, compile

# Arguments of megatron.training that make a job read a checkpoint, write anything, or ask for what is not there.
NOTHING_KEPT: dict[str, Any] = {
    "load": None, "pretrained_checkpoint": None, "save": None, "save_interval": None, "ckpt_convert_format": None,
    "non_persistent_ckpt_type": None, "non_persistent_save_interval": None, "async_save": False, "save_params_interval": None,
    "save_wgrads_interval": None, "save_dgrads_interval": None, "save_activations_interval": None,
    "save_tokens_per_expert_interval": None, "dump_param_to_param_group_map": None, "logits_save_dir": None,
    "tensorboard_dir": None, "wandb_project": "", "enable_one_logger": False, "log_progress": False, "log_energy": False,
    "log_straggler": False, "config_logger_dir": "", "moe_routing_trace_path": None, "profile": False,
    "record_memory_history": False, "exit_signal_handler": False, "exit_signal_handler_for_training": False,
    "gpu_sniff_test_interval": None, "run_workload_inspector_server": False, "rerun_mode": "disabled",
    "use_gloo_process_groups": False, "use_cpu_initialization": False, "data_parallel_random_init": False,
}  # fmt: skip

# Those that a dry run cannot have, and why.
REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("transformer_impl", "transformer_engine", "its kernels run on a GPU alone; a dry run needs --transformer-impl local"),
    ("moe_use_upcycling", True, "builds two models and writes a checkpoint; leave it out"),
    ("perform_rl_step", True, "a dry run is of pretraining"),
)


class Request(NamedTuple):
    """script, arguments: as the job has them. rank: of the world. schedule: where it is searched; None: rank 0 does, for given
    costs, or else every rank runs one micro-batch a direction. plain: with the residual connections as the job has them.
    device, host: see `Tracker`; for comparisons with real tensors.
    """

    script: str
    arguments: tuple[str, ...]
    rank: int
    world_size: int
    imbalance: float = 1.0
    schedule: Schedule | None = None
    plain: bool = False
    device: str = "meta"
    host: bool = False


class Found(NamedTuple):
    """pipeline: the ranks of its pipeline, of the world. program: of the whole step, of `microbatches`. search: what finds the
    schedule of that step, if that needs costs first; the program is then one that tells them.
    """

    run: RankRun
    job: Job
    pipeline: tuple[int, ...]
    program: Program
    microbatches: int
    search: Searched | None


class Failure(NamedTuple):
    """Of a script. refused: whether it was asked for what cannot be; else `text` ends in its output."""

    refused: bool
    text: str


def run_rank(request: Request) -> Found | Failure:
    """Once a process: it becomes that rank for good."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            return _Rank(request).run()
    except ValueError as error:
        return Failure(True, str(error))
    except SystemExit as end:
        return Failure(False, f"the script ended with {end.code!r} before its first iteration\n{_tail(out.getvalue())}")
    except Exception:
        return Failure(False, f"{_tail(out.getvalue())}{traceback.format_exc()}")


def _tail(text: str, lines: int = 12) -> str:
    return "".join(line + "\n" for line in text.splitlines()[-lines:])


class _Counted(BaseException):
    """The iteration has run: the script need not go on. No Exception, which a script may catch."""


class _Rank:
    def __init__(self, request: Request) -> None:
        self._request = request
        self.tracker = Tracker(torch.device(request.device), request.host)
        self.schedule = request.schedule
        self.optimizers: list[Any] = []
        self.warming = self.stepping = False
        self.pipeline_peak = Moment(0, 0)
        self._persistent: dict[str, int] = {}
        self.function: DryForwardBackward | None = None

    def run(self) -> Found:
        request = self._request
        device = torch.device(request.device)
        meta.install(request.rank, request.world_size, device, request.imbalance)
        cpu_job.install(device)
        cpu_job.allow_pretrain()
        self._replace(request.plain)
        sys.argv = [request.script, *request.arguments]
        sys.path.insert(0, str(Path(request.script).resolve().parent))
        with counting(self.tracker):
            try:
                runpy.run_path(request.script, run_name="__main__")
            except _Counted:
                return self._found()
        raise ValueError(f"{request.script}: ended without a training iteration of megatron.training")

    def begin(self, chunks: Sequence[Any]) -> None:
        """Before the iteration that counts."""
        tracker = self.tracker
        for optimizer in self.optimizers:
            inner = getattr(optimizer, "optimizer", None)
            if isinstance(inner, torch.optim.Optimizer):
                tracker.mark([list(state.values()) for state in inner.state.values()], "optimizer")
                tracker.mark([group["params"] for group in inner.param_groups], "optimizer")  # copies in fp32, if it has its own
        for chunk in chunks:
            tracker.mark([*chunk.parameters(), *unwrap_model(chunk).buffers()], "parameters")
            for buffer in _gradient_buffers(chunk):
                tracker.mark([buffer.param_data], "parameters")
                tracker.mark([buffer.grad_data], "gradients")
        tracker.mark_rest("other")
        self._persistent = persistent(tracker)
        tracker.launches.clear()
        tracker.groups.clear()
        tracker.turn(Where("step"))

    def end_pipeline(self) -> None:
        self.pipeline_peak = self.tracker.turn(Where("optimizer"))

    def _found(self) -> Found:
        function, tracker = self.function, self.tracker
        assert function is not None and function.job is not None, "no iteration was counted"
        moments = {"pipeline": self.pipeline_peak, "optimizer": tracker.peak}
        run = RankRun(
            rank=function.rank,
            stages=function.stages,
            microbatches=function.microbatches,
            peaks={name: peak(tracker.history, moment) for name, moment in moments.items()},
            persistent=self._persistent,
            launches=dict(tracker.launches),
            saved={},
            groups=len(tracker.groups),
        )
        return Found(run, function.job, function.pipeline, function.program, function.whole, function.search)

    # -- in the places of others' functions

    def _replace(self, plain: bool) -> None:
        from megatron.core.optimizer.optimizer import MegatronOptimizer
        from megatron.core.timers import Timers
        from megatron.training import global_vars, training

        job_schedule.ForwardBackward = lambda *given: self._forward_backward(*given)  # type: ignore[assignment,misc]
        job_schedule.refuse_places = lambda *_: None  # compares what all ranks of the pipeline hold
        mirror.gathered = _gathered_by_mirror
        global_vars.set_args = _around(global_vars.set_args, self._set_args)
        training.build_train_valid_test_data_iterators = _zeros
        training.train_step = _around(training.train_step, self._train_step)
        Timers.log = lambda *_, **__: None  # compares the times of ranks
        MegatronOptimizer.__init__ = _around(MegatronOptimizer.__init__, self._optimizer)
        if plain:
            Enabled.__init__ = _around(Enabled.__init__, _without_residual)  # type: ignore[method-assign]

    def _forward_backward(self, *given: Any) -> DryForwardBackward:
        self.function = DryForwardBackward(self, *given)
        return self.function

    def _set_args(self, original: Callable[[Any], None], args: Any) -> None:
        for name, value, why in REFUSED:
            if getattr(args, name, None) == value:
                raise ValueError(f"--{name.replace('_', '-')} {value}: {why}")
        for name, value in NOTHING_KEPT.items():
            if hasattr(args, name):
                setattr(args, name, value)
        original(args)

    def _train_step(self, original: Callable[..., Any], *given: Any, **named: Any) -> NoReturn:
        if self.function is None:
            raise ValueError(
                "the job runs Megatron's own schedule: a dry run counts ours alone; give one to pipehc.megatron.enable"
            )
        self.warming = self.stepping = True
        original(*given, **named)
        self.warming = False
        original(*given, **named)
        raise _Counted

    def _optimizer(self, original: Callable[..., None], optimizer: Any, *given: Any, **named: Any) -> None:
        original(optimizer, *given, **named)
        self.optimizers.append(optimizer)


def _around(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        return wrapper(original, *given, **named)

    return call


def _without_residual(
    original: Callable[..., None], enabled: Any, function: Any, residual: Any, from_plain: bool, allow_changes: bool
) -> None:
    original(enabled, function, None, False, allow_changes)


def _gradient_buffers(chunk: Any) -> list[Any]:
    """Of Megatron's DDP, which puts them in the place of a module's `buffers()`."""
    return [*chunk.buffers, *chunk.expert_parallel_buffers] if hasattr(chunk, "expert_parallel_buffers") else []


def _gathered_by_mirror(own: Any) -> list[Any]:
    """For `mirror.gathered`: what all ranks say, of which a rank needs its own and its mirror's, so far away in every group."""
    ranks, other = own
    everyone, me = [own] * dist.get_world_size(), dist.get_rank()
    everyone[other] = {name: [rank + other - me for rank in group] for name, group in ranks.items()}, me
    return everyone


def _zeros(provider: Any) -> tuple[Any, None, None]:
    """Batches as Megatron's data sets give them, on the host; no data set is built."""
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.training import get_args

    args = get_args()
    args.do_train, args.do_valid, args.do_test = True, False, False
    b, s = args.micro_batch_size, args.seq_length
    sizes = {"tokens": torch.int64, "labels": torch.int64, "loss_mask": torch.float32, "position_ids": torch.int64}
    batch = {name: torch.zeros(b, s, dtype=dtype) for name, dtype in sizes.items()}
    if getattr(args, "create_attention_mask_in_dataloader", True):
        batch["attention_mask"] = torch.zeros(b, 1, s, s, dtype=torch.bool)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield dict(batch)

    return RerunDataIterator(batches()), None, None


class _Stage(TellingStage, ChunkStage):
    """A job's."""


class _Silent:
    """In the place of a report of waits: nothing waits."""

    timeout_s = 600.0
    folder = Path()

    class watchdog:
        begin = end = staticmethod(lambda *_: None)

    @contextlib.contextmanager
    def around(self, where: str, mailbox: Any) -> Iterator[None]:
        yield


class DryForwardBackward(ForwardBackward):
    """Counts the one call that is not for warming. job, program, whole (the micro-batches of a step): known after it."""

    stage_type = _Stage

    def __init__(self, dry: _Rank, source: Any, recompute: bool, block: int | None, overlap: bool, tracing: Any, *_: Any) -> None:
        self.search: Searched | None = None
        if isinstance(source, Searched) and dry.schedule is None and source.costs is None:
            self.search = source
        elif isinstance(source, Searched) and dry.schedule is not None:
            source = Given(dry.schedule)
        tracing.steps, tracing.nvtx = None, False
        silent: Any = _Silent()
        super().__init__(source, recompute, block, overlap, tracing, silent, Diagnostics(0, Path(), 20.0))
        self._dry = dry
        self.job: Job | None = None
        self._queues = dict.fromkeys(("compute", "high", "communication"), IssueQueue())

    def __call__(self, **arguments: Any) -> list:
        if self._dry.warming:
            return []
        if not self._dry.stepping:
            raise ValueError("a loop that is not megatron.training's: a dry run is of scripts that call its pretrain()")
        model = arguments["model"]
        chunks: list[Any] = model if isinstance(model, list) else [model]
        self.whole, pipeline = arguments["num_microbatches"], parallel_state.get_pipeline_model_parallel_group()
        self.rank, self.pipeline = pipeline.rank(), tuple(dist.get_process_group_ranks(pipeline))
        microbatches, ranks = self.whole, pipeline.size()
        if self.search is not None:
            schedule = one_each(self.search.placement(ranks))
            self.source, microbatches = Given(schedule), schedule.microbatches
        else:
            schedule = self.source.build(ranks, self.whole, False)
            if not isinstance(self.source, Searched | Given):  # those are for their number of micro-batches
                microbatches = fewest_microbatches(lambda n: self.source.build(ranks, n, False), self.whole)
        self.microbatches = microbatches
        self.program = compile(schedule, recompute=self._recompute, high=True, hosts_wait=True)
        self.stages = tuple(sorted(stage for _, stage in schedule.placement.held(self.rank)))
        self._dry.begin(chunks)
        reports = super().__call__(**arguments | {"num_microbatches": microbatches})
        self._dry.end_pipeline()
        self.job = self._job(chunks, schedule, arguments)
        return reports

    def hosts_wait(self) -> bool:
        """The program of a GPU."""
        return True

    def own_observers(self) -> list[Any]:
        return [Observer(self._dry.tracker)]

    def _job(self, chunks: Sequence[Any], schedule: Schedule, arguments: dict[str, Any]) -> Job:
        ((shape, dtype),) = self._mailboxes
        layers = hyper_connection_layers([unwrap_model(chunk) for chunk in chunks])
        replicas = parallel_state.get_data_parallel_world_size()
        samples = schedule.microbatches * arguments["micro_batch_size"] * replicas
        return Job(
            residual=layers[0].residual.kind if layers else "none",
            schedule=schedule.name,
            placement=schedule.placement,
            processes=dist.get_world_size(),
            experts=parallel_state.get_expert_model_parallel_world_size(),
            microbatches=schedule.microbatches,
            tokens=samples * arguments["seq_length"],
            message_bytes=torch.Size(shape).numel() * dtype.itemsize,
            half=dtype.itemsize == 2,
        )
