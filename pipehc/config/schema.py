"""The configuration as typed, frozen models: one class a section, and the checks that cross sections.

`configs/cpu_demo.yaml` shows every key. Reading files and overrides is `loading`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import pairwise
from math import gcd
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pipehc.comm.budgets import MOST_BLOCKS
from pipehc.config.retrieval import retrieval_problems
from pipehc.config.stages import assign_blocks, placement_of
from pipehc.schedules.families import FAMILIES
from pipehc.schedules.placement import Placement

if TYPE_CHECKING:
    ScheduleName = str
else:
    ScheduleName = Literal[*FAMILIES, "auto"]

Count = Annotated[int, Field(ge=0, le=10**12)]
Size = Annotated[int, Field(gt=0, le=10**12)]
Blocks = Annotated[int, Field(ge=1, le=MOST_BLOCKS)]
Rate = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
Place = Annotated[Text, AfterValidator(os.path.expanduser)]  # no shell expands a ~ inside YAML
# YAML has lists only; tuples keep a configuration immutable.
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Texts = Annotated[tuple[Text, ...], AsTuple]
Places = Annotated[tuple[Place, ...], AsTuple]
Beta = Annotated[float, Field(ge=0, lt=1)]
DecayStep = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], Rate], AsTuple]

MAX_BLOCKS = 10_000  # far above any model; a typing error must not build lists without end
BYTES = {"fp32": 4, "bf16": 2}  # of one number in a stage message


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Sizes of the transformer. A block is attention and FFN; the first `dense_blocks` have a dense FFN, the rest experts."""

    vocab_size: Size
    hidden_size: Size
    blocks: Annotated[int, Field(gt=0, le=MAX_BLOCKS)]
    dense_blocks: Count
    heads: Size
    head_dim: Size
    rope_dim: Size
    rope_theta: Positive = 10000.0
    kv_rank: Size
    expert_ffn_size: Count = 0
    dense_ffn_size: Size
    experts: Count = 0
    experts_active: Count = 0
    experts_shared: Count = 0
    bias_update_rate: Rate = 0.001
    norm_eps: Positive = 1.0e-20
    init_std: Positive = 0.02
    mtp_depth: Annotated[int, Field(ge=0, le=MAX_BLOCKS)] = 0  # tokens that are predicted beyond the next one
    mtp_loss_weight: Positive = 0.3  # of the mean of their losses
    mtp_input: Literal["exit", "mean", "sum"] = "exit"  # exit: as residual.exit

    @model_validator(mode="before")
    @classmethod
    def _fill_dense_ffn_size(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("dense_ffn_size") is None:
            expert_size = data.get("expert_ffn_size")
            if type(expert_size) is int and expert_size > 0:
                return {**data, "dense_ffn_size": 8 * expert_size}
        return data

    @property
    def moe_blocks(self) -> int:
        return self.blocks - self.dense_blocks


class ResidualConfig(Section):
    """The residual connection: one stream, or a member of the hyper-connection family over `streams` of them."""

    kind: Literal["none", "hc", "mhc", "isohc", "hybrid", "harmonized"]
    streams: Annotated[int, Field(ge=1, le=16)] = 4
    init: Literal["even", "staggered", "onehot", "scattered"] = "even"
    alpha: float = 0.01
    sinkhorn_iterations: Size = 20
    condition: Annotated[float, Field(ge=1)] = 1.0e4
    static: bool = False
    fixed: Annotated[tuple[Literal["pre", "post", "res"], ...], AsTuple] = ()
    norm_eps: Positive = 1.0e-20  # of the norm that the maps are made of
    target_gain: Annotated[float, Field(ge=1)] = 5.0
    gain_power: Positive = 1.0
    smallest_s: Annotated[float, Field(gt=0, le=1)] = 0.05
    exit: Literal["mean", "sum"] = "mean"

    @property
    def width(self) -> int:
        """Streams that a token really has: 1 for the plain residual."""
        return 1 if self.kind == "none" else self.streams


class ParallelConfig(Section):
    pp: Size = 1
    tp: Size = 1
    ep: Size = 1
    dp: Size | None = None
    blocks_per_stage: Annotated[tuple[Size, ...], AsTuple] | None = None


class SearchConfig(Section):
    """What schedule.name auto searches for: times of 1/pp of the model for one micro-batch, in any unit (see schedules.Costs).

    Without any of them they come from a dry run on `gpu`, a hardware file's name or path; without that, on the GPU that is there.
    """

    placement: Literal["linear", "v", "bidirectional"] = "v"
    f: Positive | None = None
    b: Positive | None = None
    w: Positive | None = None
    r: Annotated[float, Field(ge=0)] | None = None
    link: Annotated[float, Field(ge=0)] | None = None
    latency: Annotated[float, Field(ge=0)] | None = None
    gpu: Place | None = None
    max_live: Positive | None = None
    time_limit: Positive = 10.0


class ScheduleConfig(Section):
    name: ScheduleName = "1f1b"
    chunks: Size | None = None  # stages a rank, of interleaved
    deferred: Annotated[tuple[Literal["attention", "ffn"], ...], AsTuple] | None = None  # whose weight gradients I leaves to W


Module = Literal["swiglu", "mla_up_proj"]


class RecomputeConfig(Section):
    enabled: bool = False
    block: Size | None = None  # sub-layers; None: all of a stage
    modules: Annotated[tuple[Module, ...], AsTuple] = ()  # of attention and FFN; whether enabled or not


class DataConfig(Section):
    kind: Literal["text", "megatron", "retrieval"] = "text"
    paths: Places = ()
    suffixes: Texts = (".py", ".txt", ".md")
    tokenizer: Place = "bytes"
    end_of_document: Text | None = None  # a token of the tokenizer; None: the one it names itself
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    pairs: Annotated[int, Field(ge=1, le=128)] = 8  # of a sample of kind retrieval


class TrainConfig(Section):
    steps: Size
    sequence_length: Size
    micro_batch: Size
    global_batch: Size
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1234


class OptimizerConfig(Section):
    lr: Positive
    betas: Annotated[tuple[Beta, Beta], AsTuple] = (0.9, 0.95)
    eps: Positive = 1.0e-20
    weight_decay: Rate = 0.1
    clip_grad: Rate = 1.0  # 0: no clipping
    connection_lr: Positive = 1.0  # of hyper-connections: this multiple of lr
    connection_decay: bool = True  # whether weight_decay is for their phi, too
    warmup_steps: Count = 0
    decay: Annotated[tuple[DecayStep, ...], AsTuple] = ()


class EvaluationConfig(Section):
    interval: Count = 0
    samples: Size = 64


class CheckpointConfig(Section):
    interval: Count = 0
    keep: Size = 2
    resume: Place = "auto"
    weights: Place | None = None
    allow_changes: Texts = ()  # keys that may differ from the checkpoint's; see `changes`


class DiagnosticsConfig(Section):
    interval: Count = 10  # steps; 0: never
    gain_bound: Annotated[float, Field(gt=1)] = 20.0  # a composite gain above it is warned of


class RunConfig(Section):
    folder: Place
    log_interval: Size = 1
    tensorboard: bool = False


class RuntimeConfig(Section):
    timeout_s: Positive = 120.0
    overlap: bool = True
    fused: bool = True  # our own feed-forward layers and sums of weight gradients, not Megatron's local ones
    bucket_size: Size = 40_000_000  # gradients that are summed over the replicas together
    message_blocks: Blocks | None = None  # None: as comm/budgets.py says, or the environment
    all_to_all_blocks: Blocks | None = None
    transport: Literal["device", "host"] = "device"  # host: all that ranks exchange goes through host memory


class TraceConfig(Section):
    steps: Annotated[tuple[Size, Size], AsTuple] | None = None  # the first and the last step to record
    nvtx: bool = False


class Config(Section):
    model: ModelConfig
    residual: ResidualConfig
    parallel: ParallelConfig = ParallelConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    search: SearchConfig = SearchConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig
    optimizer: OptimizerConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    run: RunConfig
    runtime: RuntimeConfig = RuntimeConfig()
    trace: TraceConfig = TraceConfig()

    @property
    def placement(self) -> Placement:
        """Which pipeline rank holds which stage."""
        return placement_of(self, self.parallel.pp)

    @property
    def lanes(self) -> int:
        """Directions in which micro-batches enter the pipeline."""
        return placement_of(self, 1).lanes

    @property
    def stages(self) -> int:
        """Stages that the model is cut into; under dualpipe each of them exists twice."""
        return self.parallel.pp * placement_of(self, 1).stages

    @property
    def smallest_dp(self) -> int:
        """The smallest data-parallel size that ep allows; no larger one makes valid what this one does not."""
        return self.parallel.ep // gcd(self.parallel.ep, self.parallel.tp)

    def stage_blocks(self) -> list[range]:
        """The blocks of each stage."""
        return assign_blocks(self.model.blocks, self.stages, self.parallel.blocks_per_stage)

    def microbatches(self, dp: int) -> int:
        """Micro-batches of one step on one of `dp` data-parallel replicas, both directions of dualpipe together."""
        return self.train.global_batch // (self.train.micro_batch * dp)

    def evaluation_microbatches(self, dp: int) -> int:
        """As `microbatches`, of one evaluation."""
        return self.evaluation.samples // (self.train.micro_batch * dp)

    def stage_message_bytes(self) -> int:
        """Bytes of one micro-batch's hidden states between two stages, from one rank to another: sequence / tp x micro-batch x
        streams x hidden size."""
        tokens = self.train.sequence_length // self.parallel.tp * self.train.micro_batch
        return tokens * self.residual.width * self.model.hidden_size * BYTES[self.train.precision]

    @model_validator(mode="after")
    def _check_across_sections(self) -> Config:
        problems = [*_model_problems(self), *_tensor_parallel_problems(self), *_layout_problems(self), *_training_problems(self)]
        problems += data_parallel_problems(self, self.parallel.dp or self.smallest_dp)
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _model_problems(config: Config) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    if config.residual.static and config.residual.kind != "harmonized":
        yield f"residual.static: true: only harmonized has a static form, but residual.kind is {config.residual.kind}"
    if model.rope_dim % 2:
        yield f"model.rope_dim: {model.rope_dim}: must be even, RoPE rotates pairs"
    if model.dense_blocks > model.blocks:
        yield f"model.dense_blocks: {model.dense_blocks}: must be at most model.blocks = {model.blocks}"
    if model.experts_active > model.experts:
        yield f"model.experts_active: {model.experts_active}: must be at most model.experts = {model.experts}"
    if model.moe_blocks > 0:
        why = f"at least 1: {model.moe_blocks} of {model.blocks} blocks have experts (or set dense_blocks: {model.blocks})"
        for key in ("experts", "experts_active", "expert_ffn_size"):
            if getattr(model, key) < 1:
                yield f"model.{key}: {getattr(model, key)}: must be {why}"
    if model.mtp_depth >= config.train.sequence_length:
        yield (
            f"model.mtp_depth: {model.mtp_depth}: must be below train.sequence_length = {config.train.sequence_length}, "
            "no token lies that much further on"
        )
    if model.experts % parallel.ep or (parallel.ep > 1 and model.experts == 0):
        yield f"parallel.ep: {parallel.ep}: must divide model.experts = {model.experts}"
    if config.data.kind == "text" and config.data.tokenizer == "bytes" and model.vocab_size < 256:
        yield f"model.vocab_size: {model.vocab_size}: must be at least 256 with data.tokenizer bytes"
    if config.data.kind == "retrieval" and model.vocab_size < 256:
        yield f"model.vocab_size: {model.vocab_size}: must be at least 256 with data.kind retrieval: 128 keys and 128 values"


def _tensor_parallel_problems(config: Config) -> Iterator[str]:
    model, tp = config.model, config.parallel.tp
    cut = {
        "model.heads": model.heads,
        "model.vocab_size": model.vocab_size,
        "train.sequence_length": config.train.sequence_length,
        "model.kv_rank + rope_dim": model.kv_rank + model.rope_dim,  # not cut, but Megatron's layer is made as if it were
    }
    if model.dense_blocks:
        cut["model.dense_ffn_size"] = model.dense_ffn_size
    if model.mtp_depth:
        cut["model.hidden_size, with model.mtp_depth > 0,"] = model.hidden_size
    if model.moe_blocks:
        cut["model.experts_shared x expert_ffn_size"] = model.experts_shared * model.expert_ffn_size
    for name, size in cut.items():
        if size % tp:
            yield f"parallel.tp: {tp}: must divide {name} = {size}"


def _layout_problems(config: Config) -> Iterator[str]:
    parallel, schedule, stages, blocks = config.parallel, config.schedule.name, config.stages, config.model.blocks
    if config.lanes == 2 and parallel.pp % 2:
        yield f"parallel.pp: {parallel.pp}: must be even, at least 2, with schedule.name {schedule} (or use 1f1b or dualpipev)"
    if config.schedule.chunks is not None and schedule != "interleaved":
        yield f"schedule.chunks: {config.schedule.chunks}: only interleaved takes it, but schedule.name is {schedule}"
    if stages > blocks:
        yield (
            f"parallel.pp: {parallel.pp}: makes {stages} stages with schedule.name {schedule}; "
            f"must be at most model.blocks = {blocks}, every stage needs a block"
        )
    elif parallel.blocks_per_stage is not None:
        try:
            config.stage_blocks()
        except ValueError as error:
            yield f"parallel.{error}"


def _training_problems(config: Config) -> Iterator[str]:
    optimizer, steps = config.optimizer, config.train.steps
    if config.recompute.modules and not config.runtime.fused:
        yield f"recompute.modules: {list(config.recompute.modules)}: must be [] with runtime.fused: false, whose layers keep all"
    if optimizer.warmup_steps > steps:
        yield f"optimizer.warmup_steps: {optimizer.warmup_steps}: must be at most train.steps = {steps}"
    fractions = [fraction for fraction, _ in optimizer.decay]
    if any(late <= early for early, late in pairwise(fractions)):
        yield f"optimizer.decay: fractions {fractions}: must increase"
    if config.trace.steps is not None and config.trace.steps[0] > config.trace.steps[1]:
        yield f"trace.steps: {list(config.trace.steps)}: the first step must not be after the last"
    data, checkpoint = config.data, config.checkpoint
    yield from retrieval_problems(data, config.train.sequence_length)
    if data.kind == "megatron" and not data.paths:
        yield "data.paths: []: must name at least one prefix of a .bin/.idx pair with data.kind megatron"
    if data.kind != "retrieval" and data.end_of_document is not None and (data.kind == "megatron" or data.tokenizer == "bytes"):
        what = "data.kind megatron: that is tokenized" if data.kind == "megatron" else "data.tokenizer bytes: it is byte 0"
        yield f"data.end_of_document: {data.end_of_document!r}: must be null with {what}"
    if checkpoint.weights is not None and checkpoint.resume not in ("auto", "never"):
        yield (
            f"checkpoint.weights: {checkpoint.weights!r}: starts a new training, but checkpoint.resume names one to go on with, "
            f"{checkpoint.resume!r}; set one of the two"
        )


def data_parallel_problems(config: Config, dp: int) -> Iterator[str]:
    """What is wrong with `dp` data-parallel replicas, a message each."""
    parallel, train, schedule = config.parallel, config.train, config.schedule.name
    if dp * parallel.tp % parallel.ep:
        yield f"parallel.ep: {parallel.ep}: must divide dp x tp = {dp * parallel.tp}, the ranks of one stage"
    sequences = train.micro_batch * dp
    of = f"train.micro_batch x dp = {train.micro_batch} x {dp}"
    if train.global_batch % sequences:
        yield f"train.global_batch: {train.global_batch}: must be a multiple of {of} = {sequences}"
    else:
        least = 2 * parallel.pp if schedule.startswith("dualpipe") else config.lanes
        count = train.global_batch // sequences
        if count < least or count % config.lanes:
            yield (
                f"train.global_batch: {train.global_batch}: makes {count} micro-batches ({of}); schedule.name {schedule} over "
                f"pp = {parallel.pp} needs {'an even number, ' if config.lanes == 2 else ''}at least {least}"
            )
    evaluated = sequences * config.lanes
    if config.evaluation.interval and config.evaluation.samples % evaluated:
        both = " x 2 (dualpipe enters at both ends)" if config.lanes == 2 else ""
        yield f"evaluation.samples: {config.evaluation.samples}: must be a multiple of {of}{both} = {evaluated}"
