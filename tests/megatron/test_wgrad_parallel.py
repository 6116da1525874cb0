"""Deferred weight gradients of layers that are split over ranks, have a bias, or share their weight: upstream's, bit for bit."""

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from processes import run_ranks
from torch import nn

from pipehc.megatron.trainer.groups import Groups, build_groups
from pipehc.megatron.wgrad import install_deferral
from pipehc.model.wgrad import WeightGradStore

HIDDEN, WIDE, VOCABULARY, LENGTH, BATCH = 6, 8, 10, 4, 3
SEQUENCE = pytest.mark.parametrize("sequence", [False, True], ids=["whole", "sequence"])


class Tied(MegatronModule):
    """Embedding, x + row(gelu(column(x))) with biases, and an output layer that has the embedding's weight: [s, b] -> loss."""

    def __init__(self, groups: Groups, sequence: bool, dtype: torch.dtype) -> None:
        config = TransformerConfig(
            num_layers=1, hidden_size=HIDDEN, num_attention_heads=2, tensor_model_parallel_size=groups.tp_size,
            sequence_parallel=sequence, perform_initialization=False, gradient_accumulation_fusion=False, params_dtype=dtype,
            bf16=dtype == torch.bfloat16, calculate_per_token_loss=True,
        )  # fmt: skip
        super().__init__(config=config)
        common = {"config": config, "init_method": None, "tp_group": groups.tp}
        self.embedding = VocabParallelEmbedding(VOCABULARY, HIDDEN, reduce_scatter_embeddings=sequence, **common)
        self.column = ColumnParallelLinear(HIDDEN, WIDE, bias=True, **common)
        self.row = RowParallelLinear(WIDE, HIDDEN, bias=True, input_is_parallel=True, skip_bias_add=False, **common)
        self.output = ColumnParallelLinear(HIDDEN, VOCABULARY, bias=False, skip_weight_param_allocation=True, **common)
        generator = torch.Generator().manual_seed(1 + groups.tp_rank)
        shared = torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            one = shared if name == "row.bias" else generator
            parameter.data = torch.randn(parameter.shape, generator=one).to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        if not self.config.sequence_parallel:
            x = x.transpose(0, 1)
        x = x + self.row(nn.functional.gelu(self.column(x)[0]))[0]
        return self.output(x, weight=self.embedding.weight)[0].float().square().sum()


def wrapped(groups: Groups, sequence: bool, dtype: torch.dtype, *, overlap: bool, sharded: bool = False) -> DistributedDataParallel:
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, use_distributed_optimizer=sharded
    )
    model = Tied(groups, sequence, dtype)
    return DistributedDataParallel(model.config, settings, model, disable_bucketing=True, pg_collection=groups.collection)


def tokens(index: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(index))


def gradients(ddp: DistributedDataParallel) -> dict[str, torch.Tensor]:
    return {name: p.main_grad.clone() for name, p in ddp.module.named_parameters()}


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tied: float) -> None:
    for name, gradient in expected.items():
        if name == "embedding.weight":  # upstream adds its two uses up in the dtype of the weight, here they add up in fp32
            assert (found[name] - gradient).norm() <= tied * gradient.norm()
        else:
            assert torch.equal(found[name], gradient), name


def split_backward(ddp: DistributedDataParallel, batch: torch.Tensor) -> WeightGradStore:
    store = WeightGradStore()
    with store.deferring():
        loss = ddp.module(batch)
    loss.backward()
    return store


@SEQUENCE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_two_tensor_parallel_ranks_equal_upstream(sequence, dtype):
    def compare(rank):
        groups = build_groups(1, 2, 1, False)
        upstream, ours = (wrapped(groups, sequence, dtype, overlap=False) for _ in range(2))
        install_deferral(ours)
        for index in range(2):
            upstream.module(tokens(index)).backward()
        expected = gradients(upstream)
        assert all(g.any() for g in expected.values())

        for index in range(2):
            ours.module(tokens(index)).backward()  # without a store
        check_equal(gradients(ours), expected, tied=1e-6 if dtype == torch.float32 else 1e-2)

        ours.zero_grad_buffer()
        stores = [split_backward(ours, tokens(index)) for index in range(2)]
        assert [len(store) for store in stores] == [3, 3]
        early = gradients(ours)
        assert not any(early[name].any() for name in ("column.weight", "column.bias", "row.weight"))
        assert torch.equal(early["row.bias"], expected["row.bias"])  # it is added after the sum over ranks
        for store in stores:
            store.flush()
        check_equal(gradients(ours), expected, tied=1e-6 if dtype == torch.float32 else 1e-2)

    run_ranks(compare, 2)


@SEQUENCE
def test_the_weight_gradients_talk_to_nobody(sequence):
    """W may run at any time of the step: whatever tensor-parallel ranks exchange is in forward and I."""

    def count(rank):
        groups = build_groups(1, 2, 1, False)
        ddp = wrapped(groups, sequence, torch.float32, overlap=False)
        install_deferral(ddp)
        store = split_backward(ddp, tokens(0))
        dist.barrier()
        if rank == 0:  # its peer does nothing meanwhile
            store.flush()
        dist.barrier()
        return len(store)

    assert run_ranks(count, 2) == [0, 3]


@SEQUENCE
def test_overlapped_reduction_and_distributed_optimizer(sequence):
    """Two replicas of two tensor-parallel ranks: reduction starts in W, and three steps end with upstream's weights."""

    def train(rank):
        groups = build_groups(1, 2, 1, False)

        def steps(deferred: bool) -> dict[str, torch.Tensor]:
            ddp = wrapped(groups, sequence, torch.float32, overlap=True, sharded=True)
            if deferred:
                install_deferral(ddp)
            settings = OptimizerConfig(optimizer="adam", lr=0.01, use_distributed_optimizer=True, params_dtype=torch.float32)
            with torch.no_grad():
                optimizer = get_megatron_optimizer(settings, [ddp], use_gloo_process_groups=False, pg_collection=groups.collection)
            for step in range(3):
                ddp.zero_grad_buffer()
                optimizer.zero_grad()
                batches = [tokens(4 * step + 2 * groups.dp_rank + i) for i in range(2)]
                [bucket] = ddp.bucket_groups
                with ddp.no_sync():
                    (split_backward(ddp, batches[0]).flush() if deferred else ddp.module(batches[0]).backward())
                if deferred:
                    store = split_backward(ddp, batches[1])
                    assert bucket.grad_reduce_handle is None
                    store.flush()
                else:
                    ddp.module(batches[1]).backward()
                assert (bucket.grad_reduce_handle is not None) == (step > 0)  # the first step only counts
                ddp.finish_grad_sync()
                optimizer.step()
            return {name: p.detach().clone() for name, p in ddp.module.named_parameters()}

        expected = steps(deferred=False)
        for name, weight in steps(deferred=True).items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6, msg=name)

    run_ranks(train, 4)


def test_upstreams_own_deferral_is_refused():
    def refuse(rank):
        ddp = wrapped(build_groups(1, 1, 1, False), False, torch.float32, overlap=False)
        ddp.module.output.config.defer_embedding_wgrad_compute = True
        with pytest.raises(ValueError, match="defer_embedding_wgrad_compute = True: must be False"):
            install_deferral(ddp)

    run_ranks(refuse, 1)
