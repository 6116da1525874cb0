"""The drop-in for what Megatron's `get_forward_backward_func` returns: our compiled programs behind Megatron's contract."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config, unwrap_model
from torch import nn
from torch.utils._pytree import tree_map_only

from pipehc.comm.environment import overlap_warnings
from pipehc.comm.groups import Edge, edge_groups, neighbours_of
from pipehc.comm.handshake import compare_neighbours, connect, digest
from pipehc.comm.messages import Mailbox, Transport
from pipehc.comm.queues import make_queues
from pipehc.megatron.buckets import BucketReduction
from pipehc.megatron.job.announcement import Setup, announce
from pipehc.megatron.job.batches import batches_of
from pipehc.megatron.job.chunk import ChunkStage, ForwardStep, decoder_chain, wrappers
from pipehc.megatron.job.diagnostics import Diagnostics
from pipehc.megatron.job.feedback import gain_feedback
from pipehc.megatron.job.finalize import finalize, scattered_losses
from pipehc.megatron.job.grad_sync import early_reduction, reduces_early, refuse_param_sync, start_gathers, without_grad_sync
from pipehc.megatron.job.hang import HangReport
from pipehc.megatron.job.option_values import is_positive, is_whole, refuse_unless
from pipehc.megatron.job.position import held_stages, megatron_place
from pipehc.megatron.job.prediction import losses_to_last_rank
from pipehc.megatron.job.promise import keeping_promise
from pipehc.megatron.job.refusals import BUILD, refuse_call, refuse_model, refuse_places, refuse_unmirrored, refusing_everywhere
from pipehc.megatron.job.source import ScheduleSource, refuse_unknown_options, source_of
from pipehc.megatron.job.tracing import Tracing
from pipehc.megatron.job.wide import MegatronsOwn, streams_of
from pipehc.megatron.versions import default_groups
from pipehc.megatron.wgrad import install_deferral
from pipehc.recompute import Chain
from pipehc.schedules import Placement, Program, Schedule, compile
from pipehc.schedules.execute import execute
from pipehc.watch.markers import available
from pipehc.watch.trace import Recorder, node_watch


def forward_backward_func(
    schedule: str | Schedule = "dualpipe",
    *,
    recompute: bool = True,
    recompute_block: int | None = None,
    overlap: bool = True,
    transport: Transport = "device",
    timeout_s: float = 600.0,
    trace_steps: tuple[int, int] | None = None,
    trace_folder: str = "pipehc_trace",
    watchdog_folder: str = "pipehc_watchdog",
    nvtx: bool = False,
    diagnostics_interval: int = 0,
    diagnostics_folder: str = "pipehc_diagnostics",
    gain_bound: float = 20.0,
    **search: Any,
) -> ForwardBackward | MegatronsOwn:
    """A function to call, or to let Megatron's `train_step` call, as what `get_forward_backward_func()` returns.

    The model chunks must be those of the schedule's placement: `build_model_chunks`, or Megatron's own for linear and interleaved
    ones. Programs are compiled when they are first needed, process groups are made in the first call, which is collective.

    Args:
        schedule: "megatron" for Megatron's own schedule, for models with hyper-connections; a family of `pipehc.schedules` (1f1b,
            gpipe, zb_h1, interleaved, zbv, dualpipe, dualpipev); "auto" to search one; a `Schedule`, or the path of its CSV file.
        recompute: drop after the forward what hyper-connections can rebuild, and rebuild it before the gradient arrives.
        recompute_block: sub-layers of a recompute block; None: all of a chunk.
        overlap: interleave the two halves of an overlapped pair, node by node.
        transport: "host" carries stage messages over gloo through pinned host memory, slowly, to tell whether NCCL is at fault; the
            job's own groups stay as they are.
        timeout_s: how long a rank waits inside a step, for a stage message or anything else of other ranks, before it fails.
            Computing does not count.
        watchdog_folder: a rank that fails inside a step writes there what it waited for, its last 200 instructions and its stacks.
        trace_steps: record these iterations (first and last) into files in `trace_folder`. They are the job's own, as its log has
            them, also after a resume; a loop that uses neither megatron.training nor Megatron's rerun state machine has its steps
            counted from 1 in this process.
        nvtx: open a range for every action and node, for Nsight Systems and torch.profiler. Needs the package nvtx.
        diagnostics_interval: every so many iterations, figures of the streams of one sequence go into `diagnostics_folder`
            (diagnostics.jsonl, and for TensorBoard if that is installed); 0: never. `python -m pipehc.diagnostics` draws them.
            Gradients are those of the loss of a micro-batch: its mean, or its sum if `calculate_per_token_loss`.
        gain_bound: a composite gain above it is warned of.
        search: for "auto": costs (`pipehc.schedules.Costs`), placement ("linear", "v" or "bidirectional"), and max_live,
            time_limit, seed as `pipehc.schedules.auto` takes them.

    Raises:
        ValueError: naming the argument, its value and what is allowed. The function it returns raises ValueError, on every rank,
            for model, configuration or arguments that it cannot run.
    """
    run = {
        "recompute": recompute, "recompute_block": recompute_block, "overlap": overlap, "transport": transport,
        "timeout_s": timeout_s, "trace_steps": trace_steps, "trace_folder": trace_folder, "watchdog_folder": watchdog_folder,
        "nvtx": nvtx, "diagnostics_interval": diagnostics_interval, "diagnostics_folder": diagnostics_folder,
        "gain_bound": gain_bound,
    }  # fmt: skip
    defaults = forward_backward_func.__kwdefaults__ or {}
    refuse_unknown_options(schedule, {name: value for name, value in run.items() if value != defaults[name]} | search)
    if schedule == "megatron":
        return MegatronsOwn()
    refuse_unless(transport in ("device", "host"), "transport", transport, "device or host")
    refuse_unless(is_positive(timeout_s), "timeout_s", timeout_s, "more than 0 seconds")
    block = recompute_block is None or is_whole(recompute_block, 1)
    refuse_unless(block, "recompute_block", recompute_block, "at least 1, or None for all sub-layers of a chunk")
    steps = trace_steps is None or (
        isinstance(trace_steps, (tuple, list)) and len(trace_steps) == 2 and all(is_whole(step, 1) for step in trace_steps)
        and trace_steps[0] <= trace_steps[1]
    )  # fmt: skip
    refuse_unless(steps, "trace_steps", trace_steps, "(first, last) with 1 <= first <= last, or None")
    folders = {"trace_folder": trace_folder, "watchdog_folder": watchdog_folder, "diagnostics_folder": diagnostics_folder}
    for name, folder in folders.items():
        refuse_unless(isinstance(folder, (str, PathLike)) and bool(str(folder)), name, folder, "a path")
    refuse_unless(is_whole(diagnostics_interval, 0), "diagnostics_interval", diagnostics_interval, "at least 0 iterations")
    refuse_unless(is_positive(gain_bound) and gain_bound > 1, "gain_bound", gain_bound, "more than 1")
    refuse_unless(not nvtx or available(), "nvtx", nvtx, "False where the package nvtx (0.2.12 or newer) is not installed")
    tracing = Tracing(trace_steps, Path(trace_folder), nvtx)
    hang = HangReport(timeout_s, Path(watchdog_folder))
    streams = Diagnostics(diagnostics_interval, Path(diagnostics_folder), gain_bound)
    return ForwardBackward(source_of(schedule, search), recompute, recompute_block, overlap, tracing, hang, streams, transport)


class ForwardBackward:
    """Runs our programs on the chunks of a Megatron job. See `forward_backward_func`.

    What runs them on other terms (`dry_rank`) overrides `stage_type` and `own_observers`.
    """

    stage_type = ChunkStage

    def __init__(
        self,
        source: ScheduleSource,
        recompute: bool,
        recompute_block: int | None,
        overlap: bool,
        tracing: Tracing,
        hang: HangReport,
        diagnostics: Diagnostics,
        transport: Transport = "device",
    ) -> None:
        self._transport: Transport = transport
        self.source, self._tracing, self._hang, self._diagnostics = source, tracing, hang, diagnostics
        self._recompute, self._block, self._overlap = recompute, recompute_block, overlap
        self._chains: dict[nn.Module, Chain] = {}
        self._reduction = BucketReduction()
        self._programs: dict[tuple[int, bool], Program] = {}
        self._groups: dict[Edge, dist.ProcessGroup] = {}
        self._pipelines: list[list[int]] = []
        self._neighbours: list[int] = []
        self._mailboxes: dict[tuple, Mailbox] = {}
        self._announced: set[bool] = set()  # whether forward only
        self._message = "no stage messages"

    @keeping_promise
    def __call__(
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Any,
        model: Any,
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
        decoder_seq_length: int | None = None,
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        first_val_step: bool | None = None,
        adjust_tensor_shapes_fn: Any = None,
        p2p_communicator: Any = None,
        pg_collection: Any = None,
        force_all_reduce: bool | None = False,
    ) -> list:
        """One step, or one evaluation, as Megatron's schedules run it; all arguments are theirs.

        Returns what the loss function reported of every micro-batch, in their order, on the last pipeline rank; elsewhere [].
        """
        chunks: list[Any] = model if isinstance(model, list) else [model]
        config = get_model_config(chunks[0])
        refuse_call(config, adjust_tensor_shapes_fn, p2p_communicator, pg_collection)
        refuse_param_sync(chunks, config)
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        placement = self.source.placement(pipeline.size())
        held = held_stages(placement, pipeline.rank())
        if len(chunks) != len(held):
            raise ValueError(
                f"model: {len(chunks)} chunks on a rank; {self.source.name} over {pipeline.size()} ranks needs {len(held)}: {BUILD}"
            )
        if placement.lanes == 2 and not forward_only:
            refuse_unmirrored(chunks)
        self._prepare(chunks, held, placement)
        program = self._program(pipeline.size(), num_microbatches, forward_only)
        if config.timers is not None:
            config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)
        groups = copy.copy(pg_collection) or default_groups()
        step = ForwardStep(
            forward_step_func, config, num_microbatches, groups.cp.size(), collect_non_loss_data, first_val_step, forward_only
        )
        lanes = [program.schedule.lane_microbatches(lane) for lane, _ in held]
        batches = batches_of(data_iterator, lanes, num_microbatches)
        recompute = self._recompute and not forward_only
        # Megatron's 1F1B goes by the decoder's length if it is given.
        mailbox = self._mailbox(config, decoder_seq_length or seq_length, micro_batch_size, streams_of(chunks), groups)
        self._announce(program, chunks)
        tracing = self._tracing.observers(forward_only, pipeline.rank(), self._device, self._queues, held)
        seen = None
        if not forward_only and not any(isinstance(one, Recorder) for one in tracing):  # whose times are to be those of other steps
            step_number, tokens = self._tracing.step, decoder_seq_length or seq_length
            seen = self._diagnostics.begin(step_number, chunks, held, config, tokens, num_microbatches, groups)
        observers: list[Any] = [self._hang.watchdog, *self.own_observers(), *tracing]
        stages = {
            (lane, stage): self.stage_type(
                chunk, self._chains[chunk], megatron_place(placement, stage), (stage == 0, stage + 1 == placement.stages),
                self._queues, step, own, recompute=recompute, watch=node_watch(observers, lane, stage),
                probe=seen.figures.probes.get((lane, stage)) if seen else None,
            )
            for (lane, stage), chunk, own in zip(held, chunks, batches)
        }  # fmt: skip
        where = "in an evaluation" if forward_only else f"in training step {self._tracing.step}"
        with self._hang.around(where, mailbox):
            with contextlib.ExitStack() as stack:
                stack.enter_context(self._tracing.recording(observers, mailbox, program, self._pipelines, recompute))
                for stage in stages.values():
                    stack.enter_context(stage.intercepted())
                if not forward_only:
                    stack.enter_context(gain_feedback(chunks))
                    stack.enter_context(without_grad_sync(chunks, config))
                    start_gathers(chunks)
                    reduced_early = chunks if not force_all_reduce and all(map(reduces_early, chunks)) else []
                    stack.enter_context(self._reduction.step(reduced_early))
                    if reduced_early:
                        by_place = dict(zip(held, chunks))
                        early = early_reduction(program, pipeline.rank(), by_place, config, self._reduction)
                        observers.append(early)
                instructions = program.instructions[pipeline.rank()]
                mailbox.begin(forward_only)
                execute(instructions, placement, stages, mailbox, observers, self._overlap, self._queues)
            for own in {id(b): b for b in batches if b is not None}.values():
                own.finish()
            if seen:
                for tensor in seen.figures.tensors():
                    self._queues["compute"].hold(tensor)
                seen.figures.start(self._device)
            if config.finalize_model_grads_func is not None and not forward_only:
                counted = [stage.tokens for stage in stages.values()] if config.calculate_per_token_loss else None
                finalize(chunks, held, placement, config, counted, groups, force_all_reduce)
            self._reduction.checks.finish()
            if seen:
                self._diagnostics.end(seen, chunks)
            reports = {m: data for stage in stages.values() for m, report in stage.reported.items() for data in report}
            if scattered_losses(placement):
                if not forward_only and getattr(config, "mtp_num_layers", None):
                    losses_to_last_rank(config.mtp_num_layers, self._device)
                reports = _gathered(reports, pipeline, self._device)
        if config.timers is not None:
            config.timers("forward-backward").stop()
        return [reports[m] for m in sorted(reports)] if pipeline.rank() + 1 == pipeline.size() else []

    def own_observers(self) -> list[Any]:
        """Of every instruction."""
        return []

    # -- made or said once

    def _announce(self, program: Program, chunks: Sequence[nn.Module]) -> None:
        """In the first step; in an evaluation before it too, which has less to say."""
        kinds = {program.schedule.forward_only, False}
        if dist.get_rank() != 0 or self._announced & kinds:
            return
        self._announced.add(program.schedule.forward_only)
        setup = Setup(
            program, self.source.name, self.source.origin(program.schedule.microbatches), self._message, self._block, self._overlap,
            self._tracing.steps, self._tracing.folder, self._tracing.nvtx, self._hang.timeout_s, self._hang.folder,
            self._diagnostics.interval, self._diagnostics.folder,
        )  # fmt: skip
        announce(setup.text(chunks))

    def _prepare(self, chunks: Sequence[Any], held: Sequence[tuple[int, int]], placement: Placement) -> None:
        """Takes chunks apart that were not seen before. Collective then."""
        new = [chunk for chunk in chunks if chunk not in self._chains]
        if not new:
            return
        with refusing_everywhere():
            for chunk in new:
                refuse_model(unwrap_model(chunk), placement)
        with refusing_everywhere():
            refuse_places(chunks, held, placement, parallel_state.get_pipeline_model_parallel_group())
            self._diagnostics.prepare()
            for chunk in new:
                self._chains[chunk] = decoder_chain(unwrap_model(chunk).decoder, self._block)
                self._device = next(chunk.parameters()).device
                install_deferral(chunk, self._reduction)
                if reduces_early(chunk):
                    self._reduction.watch(chunk)
                for wrapper in wrappers(chunk):
                    if hasattr(wrapper, "pg_collection"):
                        # Float16Module asks it whether this is the last stage; without it, it asks as `acting_at` lets it.
                        wrapper.pg_collection = None  # type: ignore[assignment]

    @cached_property
    def _queues(self) -> Any:
        return make_queues(self._device)

    @property
    def _carried(self) -> torch.device:
        """Where stage messages lie when they are sent."""
        return torch.device("cpu") if self._transport == "host" else self._device

    def _program(self, ranks: int, microbatches: int, forward_only: bool) -> Program:
        key = microbatches, forward_only
        if key not in self._programs:
            schedule = self.source.build(ranks, microbatches, forward_only)
            recompute = self._recompute and not forward_only
            program = compile(schedule, recompute=recompute, high=True, hosts_wait=self.hosts_wait())
            self._connect(schedule.placement, {"schedule": digest(program.instructions)})
            self._programs[key] = program
        return self._programs[key]

    def hosts_wait(self) -> bool:
        """Whether a host may have to wait for an idle device in the middle of a step, as many calls of CUDA do."""
        return self._device.type == "cuda"

    def _mailbox(self, config: Any, seq_length: int, micro_batch_size: int, streams: int, groups: Any) -> Mailbox:
        """The messages of one shape: [s, b, n*C], s the share of a rank under context and sequence parallelism."""
        split = groups.cp.size() * (groups.tp.size() if config.sequence_parallel else 1)
        shape = (seq_length // split, micro_batch_size, config.hidden_size * streams)
        dtype = config.pipeline_dtype or config.params_dtype
        if (shape, dtype) not in self._mailboxes:
            compare_neighbours({"stage message": f"{shape} {dtype}"}, self._neighbours)
            if self._groups:
                carrier = "NCCL, in the first step through host memory" if self._carried.type == "cuda" else "gloo"
                carrier += ", through host memory (transport = 'host')" * (self._transport == "host")
                self._message = f"stage messages {' x '.join(map(str, shape))} {str(dtype).removeprefix('torch.')} over {carrier}"
            self._mailboxes[shape, dtype] = Mailbox(
                self._groups, shape, dtype, self._device, self._hang.timeout_s, transport=self._transport
            )
        return self._mailboxes[shape, dtype]

    def _connect(self, placement: Placement, facts: Mapping[str, object]) -> None:
        """Compares `facts` with the neighbours, and the first time then makes the groups of stage messages, of all pipelines in
        both directions."""
        if self._pipelines:
            compare_neighbours(facts, self._neighbours)
            return
        own = dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
        everyone: list[list[int]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
        self._pipelines = [list(ranks) for ranks in sorted({tuple(ranks) for ranks in everyone})]
        there = {(a, b) for lane in placement.table for a, b in pairwise(lane) if a != b}
        edges = sorted(there | {(b, a) for a, b in there})
        self._neighbours = neighbours_of(dist.get_rank(), self._pipelines, edges)
        compare_neighbours(facts, self._neighbours)
        self._groups = edge_groups(self._pipelines, edges, self._hang.timeout_s, self._carried)
        connect(self._groups, self._carried)
        if dist.get_rank() == 0:
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            for text in overlap_warnings(os.environ, ranks_here, os.cpu_count() or 1, self._device.type == "cuda"):
                warnings.warn(f"pipehc: {text}", stacklevel=2)


def _gathered(reports: dict[int, Any], pipeline: dist.ProcessGroup, device: torch.device) -> dict[int, Any]:
    """What all ranks of the pipeline have to report, by micro-batch, on `device`."""
    everyone: list[dict[int, Any]] = [{} for _ in range(pipeline.size())]
    dist.all_gather_object(everyone, tree_map_only(torch.Tensor, lambda t: t.detach().cpu(), reports), group=pipeline)
    merged = {m: data for part in everyone for m, data in part.items()}
    return tree_map_only(torch.Tensor, lambda t: t.to(device), merged)
