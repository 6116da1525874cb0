"""Rival schedulers on sleeping stages: torch.distributed.pipelining, megatron-core, DeepSeek's DualPipe."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from schedule_bench.contenders import Contender, Job
from schedule_bench.sleeping import Chain, SleepingModule, loss
from torch.nn import Sequential

from pipehc.schedules import Program, Schedule, build, compile
from pipehc.schedules.actions import parse
from pipehc.schedules.placement import looped, vee

_TORCH = {
    "1f1b": ("1F1B", 1),
    "interleaved1f1b": ("Interleaved1F1B", 2),
    "interleavedzerobubble": ("InterleavedZeroBubble", 2),
    "zbvzerobubble": ("ZBVZeroBubble", 2),
    "dualpipev": ("DualPipeV", 2),
}


def set_up(name: str, job: Job) -> Contender:
    """The rival of that name (torch-..., mcore-..., deepseek-...) on this rank. Collective."""
    family, _, schedule = name.partition("-")
    if family == "torch":
        return Torch(job, *_TORCH[schedule])
    if family == "mcore":
        return MegatronCore(job, chunks=1 if schedule == "1f1b" else 2, overlap=schedule.endswith("overlap"))
    return DeepSeek(job, v_shaped=schedule.endswith("v"))


def _held(job: Job, chunks: int, v_shaped: bool) -> list[int]:
    """The stages of this rank, of ranks x chunks."""
    placement = vee(job.ranks) if v_shaped else looped(job.ranks, chunks)
    return [stage for _, stage in placement.held(job.rank)]


def _message(job: Job, microbatch: int) -> torch.Tensor:
    return job.work.message(microbatch, 0).requires_grad_()


class Torch:
    """A schedule of torch.distributed.pipelining, as its documentation says to use it."""

    replicas = 1

    def __init__(self, job: Job, name: str, chunks: int) -> None:
        from torch.distributed.pipelining import PipelineStage
        from torch.distributed.pipelining.schedules import get_schedule_class

        self.job, self.name, stages = job, name, job.ranks * chunks
        held = _held(job, chunks, v_shaped=name in ("ZBVZeroBubble", "DualPipeV"))
        work = job.work.split(chunks)
        self.chains = [Chain(work, index, stages) for index in held]
        # A group of its own: its messages have no tags, and DeepSeek's use the default group.
        group = dist.new_group()
        parts = [
            PipelineStage(
                SleepingModule(chain),
                chain.index,
                stages,
                torch.device("cpu"),
                input_args=(_message(job, 0),),
                output_args=(_message(job, 0),),
                group=group,
            )
            for chain in self.chains
        ]
        self.schedule: Any = get_schedule_class(name)(
            parts[0] if chunks == 1 else parts,  # type: ignore[arg-type]
            job.microbatches,
            loss_fn=loss,
            scale_grads=False,
        )
        self.arguments: dict[str, Any] = {}

    def prepare(self) -> None:
        indices, count = [chain.index for chain in self.chains], self.job.microbatches
        last = self.chains[0].stages - 1
        self.arguments = {"return_outputs": False}
        if 0 in indices:
            self.arguments["arg_mbs"] = [(_message(self.job, m),) for m in range(count)]
        if last in indices:
            self.arguments |= {"target_mbs": [torch.zeros(1)] * count, "losses": []}

    def step(self) -> None:
        self.schedule.step(**self.arguments)

    def theory(self) -> Program | None:
        if self.name == "1F1B":  # its own listing of its order is wrong on the last rank
            return compile(build("1f1b", self.job.ranks, self.job.microbatches), split_backward=False)
        order = self.schedule.pipeline_order
        rows = tuple(tuple(parse(str(action)) for action in order[rank] if action is not None) for rank in range(self.job.ranks))
        placement = vee(self.job.ranks) if self.name in ("ZBVZeroBubble", "DualPipeV") else looped(self.job.ranks, 2)
        return compile(Schedule(self.name, placement, self.job.microbatches, rows), split_backward=False)


class MegatronCore:
    """megatron-core's forward_backward_func: one stage a rank, or two (interleaved), its messages overlapped or not."""

    replicas = 1

    def __init__(self, job: Job, chunks: int, overlap: bool) -> None:
        _stand_in_for_cuda()
        from megatron.core.enums import ModelType
        from megatron.core.model_parallel_config import ModelParallelConfig
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
        from megatron.core.process_groups_config import ProcessGroupCollection

        self.job, self.chunks = job, chunks
        config: Any = ModelParallelConfig(
            pipeline_model_parallel_size=job.ranks,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            pipeline_dtype=torch.float32,
            overlap_p2p_comm=overlap,
            batch_p2p_comm=not overlap,
            batch_p2p_sync=False,
        )
        config.hidden_size = job.work.numel
        # The smallest group that it takes: the rest of the micro-batches must be none, or no fewer than the ranks.
        config.microbatch_group_size_per_vp_stage = next(
            size for size in range(job.ranks, job.microbatches + job.ranks) if not 0 < job.microbatches % size < job.ranks
        )
        alone = [dist.new_group([rank]) for rank in range(job.ranks)][job.rank]
        self.groups = ProcessGroupCollection()
        for name in ("tp", "cp", "dp", "dp_cp", "tp_dp_cp"):
            setattr(self.groups, name, alone)
        self.groups.pp = dist.new_group()
        self.groups.embd = self.groups.pos_embd = None
        self.communicator = P2PCommunicator(self.groups.pp, config)
        work, stages = job.work.split(chunks), job.ranks * chunks
        self.chains = [Chain(work, index, stages) for index in _held(job, chunks, v_shaped=False)]

        class Stage(SleepingModule):
            model_type = ModelType.encoder_or_decoder

            def __init__(self, chain: Chain, number: int) -> None:
                super().__init__(chain)
                self.config, self.vp_stage, self.input = config, number if chunks > 1 else None, None

            def set_input_tensor(self, tensor: Any) -> None:
                self.input = tensor[0] if isinstance(tensor, list) else tensor

        self.model = [Stage(chain, number) for number, chain in enumerate(self.chains)]
        self.run = (
            schedules.forward_backward_pipelining_with_interleaving
            if chunks > 1
            else schedules.forward_backward_pipelining_without_interleaving
        )
        self.data: list[Any] = []

    def prepare(self) -> None:
        count = self.job.microbatches
        self.data = [iter([_message(self.job, m) if chain.index == 0 else None for m in range(count)]) for chain in self.chains]

    def step(self) -> None:
        self.run(
            forward_step_func=self._forward,
            data_iterator=self.data if self.chunks > 1 else self.data[0],
            model=self.model if self.chunks > 1 else self.model[0],
            num_microbatches=self.job.microbatches,
            seq_length=1,
            micro_batch_size=1,
            p2p_communicator=self.communicator,
            pg_collection=self.groups,
        )

    def _forward(self, data: Any, model: Any) -> tuple[torch.Tensor, Any]:
        x = next(data)
        y = model(model.input.view(1, -1) if x is None else x)
        if model.chain.index == model.chain.stages - 1:
            return y, lambda output: (loss(output), {})
        return y.unsqueeze(0), None  # sequence, batch, hidden

    def theory(self) -> Program:
        ranks, count = self.job.ranks, self.job.microbatches
        name, chunks = ("interleaved", 2) if self.chunks > 1 else ("1f1b", None)
        return compile(build(name, ranks, count, chunks=chunks), split_backward=False)


class DeepSeek:
    """deepseek-ai/DualPipe, from a folder that holds its package."""

    def __init__(self, job: Job, v_shaped: bool) -> None:
        _stand_in_for_cuda()
        if job.sources["dualpipe"] not in sys.path:
            sys.path.insert(0, job.sources["dualpipe"])
        import dualpipe
        from dualpipe import comm
        from dualpipe.utils import WeightGradStore

        def defer(weight_gradient: Any) -> bool:
            if WeightGradStore.enabled:
                WeightGradStore.put(weight_gradient)
            return WeightGradStore.enabled

        def buffers() -> list[torch.Tensor]:  # the original asks for device="cuda"
            return [torch.empty(shape, dtype=comm.TENSOR_DTYPE, requires_grad=True) for shape in comm.TENSOR_SHAPES]

        comm.build_from_tensor_shapes = buffers
        dualpipe.set_p2p_tensor_shapes([(1, job.work.numel)])
        dualpipe.set_p2p_tensor_dtype(torch.float32)
        self.job, self.v_shaped, self.replicas = job, v_shaped, 1 if v_shaped else 2
        work, stages = job.work.split(3 - self.replicas), job.ranks * (3 - self.replicas)
        held = _held(job, 2, v_shaped=True) if v_shaped else [job.rank, job.ranks - 1 - job.rank]
        self.chains = [Chain(work, index, stages) for index in held]
        modules = Sequential(*(SleepingModule(chain, defer) for chain in self.chains))
        self.pipe = (dualpipe.DualPipeV if v_shaped else dualpipe.DualPipe)(modules, process_group=dist.new_group())
        self.feeds = job.rank == 0 or (not v_shaped and job.rank == job.ranks - 1)
        self.inputs: torch.Tensor | None = None

    def prepare(self) -> None:
        count = self.job.microbatches // self.replicas
        self.inputs = torch.cat([self.job.work.message(m, 0) for m in range(count)]) if self.feeds else None

    def step(self) -> None:
        labels = torch.zeros(self.job.microbatches // self.replicas, 1) if self.feeds else None
        self.pipe.step(self.inputs, num_chunks=self.job.microbatches, criterion=loss, labels=(labels,))

    def theory(self) -> Program:
        name = "dualpipev" if self.v_shaped else "dualpipe"
        return compile(build(name, self.job.ranks, self.job.microbatches), split_backward=False)


def _stand_in_for_cuda() -> None:
    """megatron-core and DualPipe ask for the current CUDA device by name: lets them have the CPU."""
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    if torch.zeros is _ZEROS:
        torch.zeros = _zeros_on_cpu  # type: ignore[assignment]


_ZEROS = torch.zeros


def _zeros_on_cpu(*arguments: Any, **options: Any) -> torch.Tensor:
    if str(options.get("device")) == "cuda":
        options["device"] = "cpu"
    return _ZEROS(*arguments, **options)
