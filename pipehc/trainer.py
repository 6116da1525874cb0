"""One rank's part of the training: the stages it holds, their optimizer, and one step or evaluation of the whole pipeline."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pipehc.comm.groups import edge_groups, neighbours_of
from pipehc.comm.handshake import compare_neighbours, connect, digest, first_problem
from pipehc.comm.messages import Mailbox
from pipehc.comm.queues import make_queues
from pipehc.config.schema import Config
from pipehc.config.stages import build_schedule
from pipehc.data.batches import Sampler, Split, batch, counted_labels
from pipehc.learning_rate import learning_rate
from pipehc.megatron.trainer.cuts import cut_of
from pipehc.megatron.trainer.groups import build_groups
from pipehc.megatron.trainer.model import DTYPES, StageModel, build_stage, initialise, parameter_names
from pipehc.megatron.trainer.optimizer import build_optimizer
from pipehc.model.gain import CompositeGain, GainFeedback
from pipehc.model.probe import Probe
from pipehc.model.reduction import EarlyReduction
from pipehc.model.stage import ModelStage
from pipehc.model.streams import Figures, Part, StreamFigures, is_due
from pipehc.planning.activations import Activations
from pipehc.recompute import Chain, SavedBytes
from pipehc.schedules import Program, Schedule, compile
from pipehc.schedules.deferral import at_once
from pipehc.schedules.execute import Observer, execute
from pipehc.searched import Found, training_schedule
from pipehc.watch.trace import Recorder, node_watch, save_step


class TrainingError(RuntimeError):
    """The training cannot go on, for a reason that its message gives in full."""


@dataclass(frozen=True)
class StepResult:
    loss: float  # mean over the labels of the global batch that count, in nats; of the next token alone
    grad_norm: float  # before clipping
    lr: float
    figures: dict[str, float]  # by their names in metrics.jsonl: `gain` of the composite of all maps, `mtp_1_loss` ... as loss
    streams: Figures | None = None  # on rank 0 after a diagnosed step, by their names in diagnostics.jsonl


class Evaluation(NamedTuple):
    """loss: mean over the labels that count, in nats. accuracy: the share of them that got the largest logit; None: not counted."""

    loss: float
    accuracy: float | None = None


Probes = Mapping[tuple[int, int], Probe]
"""By (lane, stage)."""


class Trainer:
    """Builds this rank's stages and runs them. torch.distributed must be initialised; every rank makes one, with equal arguments.

    config: must fit the world size (`check_world_size`). After construction the weights are those of `train.seed`, equal in every
    layout, until a checkpoint is loaded into `state()`. schedule: of a training step; None: that of the configuration. What runs
    the same program on other terms (`pipehc.dry_run`) overrides `stage_type` and the methods that touch data.
    """

    stage_type = ModelStage

    def __init__(self, config: Config, schedule: Schedule | None = None) -> None:
        self.config = config
        parallel, train = config.parallel, config.train
        dp = dist.get_world_size() // (parallel.pp * parallel.tp)
        given = Found(schedule, "", config.schedule.deferred) if schedule else None
        schedule, self.schedule_origin, deferred = given or training_schedule(config, config.microbatches(dp), dp)
        self._at_once = at_once(deferred)
        self.train_program = compile(schedule, recompute=config.recompute.enabled, high=True, hosts_wait=self.hosts_wait())
        placement = self.train_program.schedule.placement
        edges, replicas = self.train_program.edges(), dp * parallel.tp
        pipelines = [[position * replicas + i for position in range(parallel.pp)] for i in range(replicas)]
        shape = (train.sequence_length // parallel.tp, train.micro_batch, config.residual.width * config.model.hidden_size)
        facts = {"stage message": f"{shape} {DTYPES[train.precision]}", "schedule": digest(self.train_program.instructions)}
        try:  # before the first group: ranks that make different ones would wait for each other
            compare_neighbours(facts, neighbours_of(dist.get_rank(), pipelines, edges))
        except ValueError as error:
            raise TrainingError(str(error)) from error
        self.groups = build_groups(
            parallel.pp, parallel.tp, parallel.ep, placement.lanes == 2, all_to_all_blocks=config.runtime.all_to_all_blocks
        )

        blocks, last = config.stage_blocks(), placement.stages - 1
        self.models = {
            (lane, stage): build_stage(config, self.groups, blocks[stage], first=stage == 0, last=stage == last)
            for lane, stage in placement.held(self.groups.pp_rank)
        }
        for model in self.models.values():
            self.initialise(model)
        # By stage, not by lane: the two ranks that hold the same stages must reduce them in the same order.
        by_stage = [self.models[key] for key in sorted(self.models, key=lambda key: key[1])]
        self.optimizer = build_optimizer(config, self.groups, by_stage)

        self.device = next(by_stage[0].parameters()).device
        self.queues = make_queues(self.device)
        self._chains = {key: model.chain(config.recompute.block) for key, model in self.models.items()}
        residual = config.residual
        self._gain: CompositeGain | None = None
        if residual.kind != "none":
            connections = {i: connection for model in by_stage for i, connection in model.connections().items()}
            self._gain = CompositeGain(connections, 2 * config.model.blocks, residual.streams)
        self.feedback = GainFeedback(residual.target_gain, residual.gain_power, residual.smallest_s)
        timeout_s = config.runtime.timeout_s
        transport = config.runtime.transport
        carried = torch.device("cpu") if transport == "host" else self.device
        messages = edge_groups(pipelines, edges, timeout_s, carried, config.runtime.message_blocks)
        connect(messages, carried)
        self.samples_seen = 0  # of the training split; where the next step goes on, whatever the batch size was before
        self._saved: dict[int, SavedBytes] | None = None  # by stage, as counted in the first step
        self.observers: list[Observer] = []  # of every instruction, in training and evaluation
        self.mailbox = Mailbox(messages, shape, DTYPES[train.precision], self.device, timeout_s, transport=transport)

    def step(self, step: int, split: Split, sampler: Sampler) -> StepResult:
        """Trains on the next samples, as step `step` (from 1). Raises TrainingError, on every rank and before any weight changes,
        if the loss of a micro-batch or the gradient norm is not finite."""
        self.optimizer.zero_grad()
        streams = self._stream_figures() if self.is_diagnosed(step) else None
        with self._gain.tracking() if self._gain else nullcontext():
            probes = streams.probes if streams else {}
            losses = self._execute(self.train_program, self._chains, split, sampler, self.samples_seen, probes)
        counted, depth = self._counted(self.train_program, split), self.config.model.mtp_depth
        loss, *further = self.mean_losses(losses, counted, step, 1 + depth)
        if self._gain:
            self._gain.start(self.device)
        if streams:
            for tensor in streams.tensors():
                self.queues["compute"].hold(tensor)
            streams.start(self.device)
        self.optimizer.reduce_gradients()
        lr = learning_rate(step - 1, self.config)
        try:
            grad_norm = self.optimizer.step(lr)
        except FloatingPointError as error:
            raise TrainingError(f"step {step}: {error}, on all ranks; no weight was changed") from error
        self.optimizer.update_expert_bias()
        self.samples_seen += self.config.train.global_batch
        gain, s = self._gain.finish() if self._gain else None, self.feedback.s
        if gain is not None and self.config.residual.kind == "harmonized":
            self.feedback.update(gain)
            self.apply_feedback()
        found = streams.finish(1.0 / counted) if streams else None
        if found is not None and self.config.residual.kind == "harmonized":
            found |= {"s": s, "gain_average": self.feedback.average}
        figures = {} if gain is None else {"gain": gain}
        figures |= {f"mtp_{k}_loss": part * depth / self.config.model.mtp_loss_weight for k, part in enumerate(further, 1)}
        return StepResult(loss, grad_norm, lr, figures, found)

    def is_diagnosed(self, step: int) -> bool:
        """Whether this training step looks at its streams: the first, and every `diagnostics.interval` steps. None that is
        recorded, whose times are to be those of other steps."""
        return is_due(step, self.config.diagnostics.interval) and not self._is_recorded(step)

    def _is_recorded(self, step: int) -> bool:
        between = self.config.trace.steps
        return between is not None and between[0] <= step <= between[1]

    def _stream_figures(self) -> StreamFigures:
        """Of the first sequence of the global batch, which the first data-parallel replica has."""
        config, blocks = self.config, self.config.stage_blocks()
        held = {key: range(2 * blocks[key[1]].start, 2 * blocks[key[1]].stop) for key in self.models}
        part = Part(self.groups.tp_rank, self.groups.tp_size) if self.groups.dp_rank == 0 else Part(count=0)
        return StreamFigures(held, 2 * config.model.blocks, config.residual.width, config.train.sequence_length, part)

    def saved_activations(self) -> dict[int, Activations]:
        """By stage, the bytes that its first micro-batch of this process' first step kept. Collective; after a step."""
        everyone: list[dict[int, Activations]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, self.own_saved_activations())
        return {stage: saved for found in everyone for stage, saved in sorted(found.items())}

    def own_saved_activations(self) -> dict[int, Activations]:
        """Of this rank's stages alone."""
        assert self._saved is not None, "no step yet"
        return {s: Activations(c.inputs, c.outputs, c.by_f, c.by_rebuilt, c.transient) for s, c in self._saved.items()}

    def _count(self, stage: int) -> SavedBytes:
        """For the first step alone."""
        assert self._saved is not None
        held = [tensor for model in self.models.values() for tensor in (*model.parameters(), *model.buffers())]
        return self._saved.setdefault(stage, SavedBytes(held))

    @torch.no_grad()
    def evaluate(self, split: Split, step: int) -> Evaluation:
        """Of the next token, over the first `evaluation.samples` samples of `split`; they repeat if it has fewer. Accuracy: where
        it masks labels."""
        program, sampler = self._evaluation_program, InOrder(len(split))
        counted = self._counted(program, split)
        if counted_labels(split) is None:
            results = self._execute(program, self._loss_chains, split, sampler, 0, {})
            return Evaluation(*self.mean_losses(results, counted, step))
        results = self._execute(program, self._hit_chains, split, sampler, 0, {})
        [loss] = self.mean_losses([loss for loss, _ in results], counted, step)
        hits = sum((found.long() for _, found in results), torch.zeros((), dtype=torch.int64, device=self.device))
        dist.all_reduce(hits)
        return Evaluation(loss, int(hits) / counted)

    @cached_property
    def _loss_chains(self) -> dict[tuple[int, int], Chain]:
        return {key: model.chain(self.config.recompute.block, "loss") for key, model in self.models.items()}

    @cached_property
    def _hit_chains(self) -> dict[tuple[int, int], Chain]:
        return {key: model.chain(self.config.recompute.block, "loss_and_hits") for key, model in self.models.items()}

    @cached_property
    def _evaluation_program(self) -> Program:
        microbatches = self.config.evaluation_microbatches(self.groups.dp_size)
        schedule = build_schedule(self.config, self.config.parallel.pp, microbatches, forward=True)
        return compile(schedule, high=True, hosts_wait=self.hosts_wait())

    def check_replicas(self) -> None:
        """Raises TrainingError, on every rank, unless all ranks that hold a weight, or a part of one, hold the same bits of it.
        Collective."""
        own = [
            ((name, cut_of(weight, self.groups.tp).rank), checksum(weight))
            for model in self.models.values()
            for name, weight in parameter_names(model).items()
        ]
        everyone: list[list[tuple[tuple[str, int], int]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, own)
        first: dict[tuple[str, int], tuple[int, int]] = {}  # the first rank that holds it, and what it holds
        for rank, checksums in enumerate(everyone):  # one rank may hold a weight twice
            for part, value in checksums:
                other, wanted = first.setdefault(part, (rank, value))
                if value != wanted:
                    raise TrainingError(f"ranks {other} and {rank} hold different weights in {part[0]}: replicas drifted apart")

    def state(self) -> dict[str, Any]:
        """Weights, optimizer state and expert biases by global names: tensors and FlatSlices, to save or to load in place.
        Collective."""
        return self.optimizer.state()

    def after_load(self) -> None:
        """Makes the model's weights follow the optimizer state that was just loaded in place. Collective."""
        self.optimizer.after_load()

    def apply_feedback(self) -> None:
        """Gives every map of Harmonized HC the present s: after a step, and after loading `feedback` from a checkpoint."""
        for model in self.models.values():
            for connection in model.connections().values():
                if connection.kind == "harmonized":
                    connection.get_buffer("s").fill_(self.feedback.s)

    def _counted(self, program: Program, split: Split) -> int:
        """Labels that count among those of all samples of a program, over the whole world."""
        train, of_a_sample = self.config.train, counted_labels(split)
        samples = program.schedule.microbatches * train.micro_batch * self.groups.dp_size
        return samples * (train.sequence_length if of_a_sample is None else of_a_sample)

    def _execute(
        self,
        program: Program,
        chains: dict[tuple[int, int], Chain],
        split: Split,
        sampler: Any,
        first: int,
        probes: Probes,
    ) -> list[torch.Tensor]:
        """Executes a program over the samples from `first` on; returns what this rank's last stages made, one a micro-batch.

        probes: look at micro-batch 0.
        """
        train, schedule = self.config.train, program.schedule

        def microbatch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
            return self.microbatch(split, sampler, first + (index * self.groups.dp_size + self.groups.dp_rank) * train.micro_batch)

        recompute, scale = self.config.recompute.enabled, 1.0 / self._counted(program, split)
        first_step = self._saved is None and not schedule.forward_only
        self._saved = {} if first_step else self._saved
        stages = {
            key: self.stage_type(
                chain,
                self.queues,
                microbatch,
                scale,
                recompute=recompute,
                watch=node_watch(self.observers, *key),
                count=self._count(key[1]) if first_step else None,
                probe=probes.get(key),
                at_once=self._at_once,
            )
            for key, chain in chains.items()
        }
        instructions, overlap = program.instructions[self.groups.pp_rank], self.config.runtime.overlap
        observers = list(self.observers)
        if not schedule.forward_only:
            observers.append(EarlyReduction(program, self.groups.pp_rank, self._start_reduction, self._expect_last))
        self.mailbox.begin(schedule.forward_only)
        execute(instructions, schedule.placement, stages, self.mailbox, observers, overlap, self.queues)
        if self.groups.tp_rank:  # the others of the group have made the same
            return []
        return [result for stage in stages.values() for result in stage.losses.values()]

    def hosts_wait(self) -> bool:
        """Whether a host may have to wait for an idle device in the middle of a step, as many calls of CUDA do."""
        return torch.cuda.is_available()

    def initialise(self, model: StageModel) -> None:
        """Gives a stage the weights of `train.seed`."""
        initialise(model, self.config.train.seed, self.config.model.init_std)

    def microbatch(self, split: Split, sampler: Any, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, labels), int64 [b, s] each: one micro-batch of the samples from number `first` on, on the device."""
        tokens, labels = batch(split, sampler, first, self.config.train.micro_batch)
        return to_device(tokens, self.device), to_device(labels, self.device)

    def mean_losses(self, losses: list[torch.Tensor], counted: int, step: int, entries: int = 1) -> list[float]:
        """Means of the whole world, over `counted` labels. losses: this rank's sums, of so many entries each. Collective. Raises
        TrainingError."""
        totals = torch.zeros(entries, dtype=torch.float64, device=self.device)
        if losses:
            totals = torch.stack(losses).double().view(-1, entries).sum(0)
        finite = torch.isfinite(totals)
        everywhere = torch.cat([torch.where(finite, totals, 0.0), (~finite.all(0, keepdim=True)).double()])
        dist.all_reduce(everywhere)
        *sums, broken = everywhere.tolist()  # the host waits for the device once
        if broken:
            found = next((float(total) for total in totals if not math.isfinite(total)), None)
            own = None if found is None else f"the loss of step {step} is {found}; no weight was changed"
            raise TrainingError(first_problem(own))
        return [total / counted for total in sums]

    @contextmanager
    def recorded(self, step: int, folder: Path) -> Iterator[None]:
        """Records the training step in this block if `trace.steps` asks for it: a file in `folder`. Collective over the world."""
        if not self._is_recorded(step):
            yield
            return
        rank = self.groups.pp_rank
        recorder = Recorder(rank, self.device, self.queues)
        self.observers.append(recorder)
        try:
            with recorder.attached(self.mailbox):
                yield
        finally:
            self.observers.remove(recorder)
        pipeline = dist.get_rank() % (dist.get_world_size() // self.config.parallel.pp)
        save_step(recorder, self.train_program, step, folder, (pipeline, rank), recompute=self.config.recompute.enabled)

    def _expect_last(self, held: tuple[int, int]) -> None:
        self.optimizer.expect_last(self.models[held])

    def _start_reduction(self, held: tuple[int, int]) -> None:
        self.optimizer.start_reduction(self.models[held])


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`. On CUDA the host goes on: from pageable memory it would wait for all of the stream."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def checksum(weight: torch.Tensor) -> int:
    """A sum over the bits of a weight (fp32 or bf16): equal for equal bits, and rarely for others."""
    bits = weight.detach().contiguous().view(torch.int32 if weight.element_size() == 4 else torch.int16)
    return int(bits.sum(dtype=torch.int64))


class InOrder:
    """A sampler that takes the samples of a split as they come, over and over."""

    def __init__(self, length: int) -> None:
        self._length = length

    def index(self, k: int) -> int:
        return k % self._length
