"""The optimizer over replicas: gradients summed, norm counted once, state sharded, against PyTorch's AdamW in one process."""

import math

import numpy as np
import pytest
import torch
from processes import run_ranks
from tiny_model import cut, micro_batch, tiny_config

from pipehc.checkpoint import flat_slices
from pipehc.checkpoint.flat_slices import FlatSlice
from pipehc.config.schema import Config
from pipehc.learning_rate import learning_rate
from pipehc.megatron.trainer.groups import Groups, build_groups
from pipehc.megatron.trainer.model import DTYPES, StageModel, build_stage, initialise, parameter_names
from pipehc.megatron.trainer.optimizer import Optimizer, build_optimizer
from pipehc.model.wgrad import WeightGradStore

# pipeline positions, data-parallel size, expert-parallel size, two replicas of every stage
LAYOUTS = [(1, 2, 1, False), (2, 1, 1, True), (2, 2, 1, True), (2, 2, 2, True), (4, 1, 1, True), (2, 2, 2, False), (1, 2, 2, False)]


def held(config: Config, groups: Groups, seed: int = 7) -> dict[int, StageModel]:
    """The stages of this rank, by number: two of DualPipe's, or one."""
    r, last = groups.pp_rank, groups.pp_size - 1
    blocks = cut(config.model.blocks, groups.pp_size)
    mine = sorted({r, last - r}) if groups.replicated else [r]
    models = {s: build_stage(config, groups, blocks[s], s == 0, s == last) for s in mine}
    for model in models.values():
        initialise(model, seed, 0.1)
    return models


def local_loss(config: Config, stage: int, model: StageModel, index: int) -> torch.Tensor:
    """A loss of one stage alone, so that no messages are needed: random input, random weights of the output, by (stage, index)."""
    tokens, labels = micro_batch(config, index)
    generator = torch.Generator().manual_seed(1000 * stage + index)
    shape = (config.train.sequence_length, config.train.micro_batch, model.streams * config.model.hidden_size)
    hidden, weights = (torch.randn(shape, generator=generator).to(DTYPES[config.train.precision]) for _ in range(2))
    out = model(hidden.requires_grad_(), tokens, labels)
    return out / 100 if model.last else (out * weights).sum() / 100


def accumulate(config: Config, groups: Groups, models: dict[int, StageModel], step: int) -> None:
    """This rank's share of the gradients of one step: each of its stages on a micro-batch of its own."""
    replica = groups.pp_rank * groups.dp_size + groups.dp_rank if groups.replicated else groups.dp_rank
    for stage, model in models.items():
        local_loss(config, stage, model, 10 * step + replica).backward()


def one_process_gradients(config: Config, pp: int, dp: int, replicated: bool) -> dict[str, torch.Tensor]:
    """All stages in one process, each over the micro-batches that its replicas see in step 0."""
    models = all_stages(config, pp)
    for stage, model in models.items():
        for position in {stage, pp - 1 - stage} if replicated else {0}:
            for d in range(dp):
                local_loss(config, stage, model, position * dp + d).backward()
    return {name: p.grad for model in models.values() for name, p in parameter_names(model).items()}


def all_stages(config: Config, pp: int) -> dict[int, StageModel]:
    groups = build_groups(1, 1, 1, False)
    blocks = cut(config.model.blocks, pp)
    models = {s: build_stage(config, groups, blocks[s], s == 0, s == pp - 1) for s in range(pp)}
    for model in models.values():
        initialise(model, 7, 0.1)
    return models


@pytest.mark.parametrize(("pp", "dp", "ep", "replicated"), LAYOUTS)
def test_gradients_and_updates(pp, dp, ep, replicated):
    """The gradients of the first step equal one process's; every update is AdamW's of PyTorch, given the gradients."""
    clip, decay, lr, steps = 0.5, 0.3, 0.01, 3
    config = tiny_config(f"optimizer.clip_grad={clip}", f"optimizer.weight_decay={decay}", f"parallel.ep={ep}")

    def weights(models):
        return {name: p.detach().clone().numpy() for m in models.values() for name, p in parameter_names(m).items()}

    def many(rank):
        groups = build_groups(pp, 1, ep, replicated)
        models = held(config, groups)
        optimizer = build_optimizer(config, groups, list(models.values()))
        found = [(math.nan, {}, weights(models))]
        for step in range(steps):
            optimizer.zero_grad()
            accumulate(config, groups, models, step)
            optimizer.reduce_gradients()
            gradients = {name: g.numpy() for name, g in optimizer.gradients().items()}
            found.append((optimizer.step(lr), gradients, weights(models)))
        return found

    ranks = run_ranks(many, pp * dp)
    [reference] = run_ranks(lambda rank: {n: g.numpy() for n, g in one_process_gradients(config, pp, dp, replicated).items()}, 1)
    parameters = {name: torch.from_numpy(w).requires_grad_() for rank in ranks for name, w in rank[0][2].items()}
    assert parameters.keys() == reference.keys()
    vectors = [p for p in parameters.values() if p.dim() < 2]
    matrices = [p for p in parameters.values() if p.dim() > 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=lr, betas=config.optimizer.betas, eps=config.optimizer.eps)
    for step in range(1, steps + 1):
        for rank in ranks:
            for name, gradient in rank[step][1].items():
                found = torch.from_numpy(gradient)
                if step == 1:
                    assert relative_error(found, torch.from_numpy(reference[name])) < 1e-5, name
                parameters[name].grad = found.clone()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), clip))
        assert norm > clip, "clipping must matter"
        adamw.step()
        for rank in ranks:
            assert rank[step][0] == pytest.approx(norm, rel=1e-5)
            for name, weight in rank[step][2].items():
                torch.testing.assert_close(torch.from_numpy(weight), parameters[name].detach(), rtol=1e-5, atol=1e-6, msg=name)
        everyone = [(name, w) for rank in ranks for name, w in rank[step][2].items()]
        first = dict(reversed(everyone))
        assert all((w == first[name]).all() for name, w in everyone), "replicas have drifted apart"


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_every_element_has_one_owner():
    """State of all ranks together tiles every parameter exactly, with two replicas of every stage and split experts."""
    config = tiny_config("parallel.ep=2")

    def describe(rank):
        groups = build_groups(2, 1, 2, True)
        optimizer = build_optimizer(config, groups, list(held(config, groups).values()))
        state = optimizer.state()
        owned = sum(s.tensor.numel() for name, s in state.items() if name.startswith("weights.") and isinstance(s, FlatSlice))
        return flat_slices.pieces(state), owned

    results = run_ranks(describe, 4)
    whole = flat_slices.tile([pieces for pieces, _ in results])  # raises where elements are missing or overlap
    [sizes] = run_ranks(
        lambda rank: {n: p.numel() for m in all_stages(config, 1).values() for n, p in parameter_names(m).items()}, 1
    )
    for prefix in ("weights", "optimizer.exp_avg", "optimizer.exp_avg_sq"):
        assert {n.removeprefix(f"{prefix}.") for n in whole if n.startswith(f"{prefix}.")} == sizes.keys(), prefix
    assert sum(owned for _, owned in results) == sum(sizes.values())
    assert max(owned for _, owned in results) < 0.5 * sum(sizes.values()), "state is not shared out"
    assert sum(name.startswith("buffers.") for name in whole) == config.model.moe_blocks


def one_step(config: Config, groups: Groups, models: dict[int, StageModel], optimizer: Optimizer, step: int) -> float:
    optimizer.zero_grad()
    accumulate(config, groups, models, step)
    optimizer.reduce_gradients()
    norm = optimizer.step(0.01)
    optimizer.update_expert_bias()
    return norm


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_continues_bit_for_bit(precision):
    config = tiny_config(f"train.precision={precision}", "parallel.ep=2")

    def compare(rank):
        groups = build_groups(2, 1, 2, True)

        def begin(seed):
            models = held(config, groups, seed)
            return models, build_optimizer(config, groups, list(models.values()))

        models, optimizer = begin(7)
        for step in range(2):
            one_step(config, groups, models, optimizer, step)
        saved = {name: (s.tensor if isinstance(s, FlatSlice) else s).clone() for name, s in optimizer.state().items()}
        parameters = {name: p for model in models.values() for name, p in parameter_names(model).items()}
        for name, part in optimizer.state().items():
            if name.startswith("weights.") and isinstance(part, FlatSlice):
                parameter = parameters[name.removeprefix("weights.")]
                owned = parameter.detach().view(-1)[part.start : part.start + part.tensor.numel()]
                assert torch.equal(owned, part.tensor.to(parameter.dtype)), name
        norms = [one_step(config, groups, models, optimizer, step) for step in (2, 3)]

        others, resumed = begin(8)
        one_step(config, groups, others, resumed, 5)
        assert resumed.state().keys() == saved.keys()
        for name, part in resumed.state().items():
            (part.tensor if isinstance(part, FlatSlice) else part).copy_(saved[name])
        resumed.after_load()
        for model in others.values():  # counted before the state was loaded; the real thing loads before the first step
            assert all(not m.local_tokens_per_expert.any() for m in model.modules() if hasattr(m, "local_tokens_per_expert"))
        assert [one_step(config, groups, others, resumed, step) for step in (2, 3)] == norms
        for stage, model in models.items():
            for name, tensor in others[stage].state_dict().items():
                if tensor is not None:
                    assert torch.equal(tensor, model.state_dict()[name]), name
        return {str(p.dtype) for m in models.values() for p in m.parameters()}, {
            str(s.tensor.dtype) for s in optimizer.state().values() if isinstance(s, FlatSlice)
        }

    for weights, state in run_ranks(compare, 4):
        assert weights == ({"torch.float32"} if precision == "fp32" else {"torch.float32", "torch.bfloat16"})
        assert state == {"torch.float32"}


def test_expert_biases_follow_the_load():
    config = tiny_config("parallel.ep=2", "model.bias_update_rate=0.125")

    def move(rank):
        groups = build_groups(2, 1, 2, True)
        models = held(config, groups)
        optimizer = build_optimizer(config, groups, list(models.values()))
        routers = {n: m for model in models.values() for n, m in model.named_modules() if n.endswith("mlp.router")}
        seen = {}
        for step in range(2):
            accumulate(config, groups, models, step)
            counts = {name: router.local_tokens_per_expert.clone() for name, router in routers.items()}
            optimizer.update_expert_bias()
            assert all(not router.local_tokens_per_expert.any() for router in routers.values())
            seen[step] = {name: (counts[name].numpy(), router.expert_bias.clone().numpy()) for name, router in routers.items()}
        return seen

    ranks = run_ranks(move, 4)
    names = ranks[0][0].keys()
    assert len(names) == config.model.moe_blocks
    for name in names:
        bias = torch.zeros(config.model.experts)
        for step in range(2):
            tokens = sum(torch.from_numpy(rank[step][name][0]) for rank in ranks)
            assert tokens.sum() == 4 * config.train.micro_batch * config.train.sequence_length * config.model.experts_active
            bias += 0.125 * torch.sign(tokens.mean() - tokens)
            assert step or bias.any()
            for rank in ranks:
                assert torch.equal(torch.from_numpy(rank[step][name][1]), bias), (name, step)


def test_every_weight_is_gathered_once_a_step():
    config = tiny_config("parallel.ep=2")

    def count(rank):
        groups = build_groups(2, 1, 2, True)
        models = held(config, groups)
        optimizer = build_optimizer(config, groups, list(models.values()))
        calls: list[int] = []
        own = [group for chunk in optimizer._chunks for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups]
        for k, group in enumerate(own):
            gather = group.start_param_sync
            group.start_param_sync = lambda *args, _k=k, _gather=gather, **kwargs: (calls.append(_k), _gather(*args, **kwargs))
        optimizer.zero_grad()
        accumulate(config, groups, models, 0)
        optimizer.reduce_gradients()
        optimizer.step(0.1)
        return calls, len(own)

    for calls, groups in run_ranks(count, 4):
        assert sorted(calls) == list(range(groups)) and groups > 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradient_that_is_not_finite_changes_nothing(bad):
    config = tiny_config()

    def refuse(rank):
        groups = build_groups(2, 1, 1, True)
        models = held(config, groups)
        optimizer = build_optimizer(config, groups, list(models.values()))
        accumulate(config, groups, models, 0)
        if rank == 1:
            next(models[0].parameters()).main_grad.view(-1)[3] = bad
        before = {name: (s.tensor if isinstance(s, FlatSlice) else s).clone() for name, s in optimizer.state().items()}
        optimizer.reduce_gradients()
        with pytest.raises(FloatingPointError, match=r"the gradient norm is (nan|inf)"):
            optimizer.step(0.01)
        for name, part in optimizer.state().items():
            assert torch.equal(part.tensor if isinstance(part, FlatSlice) else part, before[name]), name

    run_ranks(refuse, 2)


def test_learning_rate_schedule():
    config = tiny_config(
        "train.steps=100", "optimizer.lr=2.0", "optimizer.warmup_steps=4", "optimizer.decay=[[0.8, 0.316], [0.9, 0.1]]"
    )
    rates = [learning_rate(step, config) for step in range(100)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert set(rates[4:80]) == {2.0}
    assert rates[80:90] == pytest.approx([0.632] * 10)
    assert rates[90:] == pytest.approx([0.2] * 10)


def test_learning_rate_without_warm_up_and_decay():
    config = tiny_config("train.steps=10", "optimizer.lr=2.0", "optimizer.warmup_steps=0", "optimizer.decay=[]")
    assert {learning_rate(step, config) for step in range(10)} == {2.0}


@pytest.mark.parametrize(("fraction", "steps", "first"), [(0.7, 10, 7), (0.29, 100, 29), (0.5, 3, 2), (1.0, 5, 5)])
def test_learning_rate_falls_at_the_first_step_of_its_fraction(fraction, steps, first):
    config = tiny_config(
        f"train.steps={steps}", "optimizer.lr=2.0", "optimizer.warmup_steps=0", f"optimizer.decay=[[{fraction}, 0.5]]"
    )
    assert [learning_rate(step, config) for step in range(steps)] == [2.0] * first + [1.0] * (steps - first)


def test_buckets_are_summed_as_the_last_weight_gradients_land():
    """One reduction after the other while W runs, last layers first, and the same bits as in one bucket a buffer."""

    def run(rank, bucket_size):
        config = tiny_config(f"runtime.bucket_size={bucket_size}")
        groups = build_groups(2, 1, 1, True)
        models = held(config, groups)
        optimizer = build_optimizer(config, groups, list(models.values()))
        order = []

        def logged(key, group, start):
            def log_and_start(**options):
                if group.grad_reduce_handle is None:  # else upstream, which asks again at the end
                    order.append(key)
                start(**options)

            return log_and_start

        for number, buckets in enumerate(map(optimizer._reduction.buckets, optimizer._chunks)):
            for k, bucket in enumerate(buckets):
                bucket.group.start_grad_sync = logged((number, k), bucket.group, bucket.group.start_grad_sync)
        optimizer.zero_grad()
        stores = {stage: WeightGradStore() for stage in models}
        for stage, model in models.items():
            with stores[stage].deferring():
                loss = local_loss(config, stage, model, rank)
            loss.backward()
        early = []
        all_buckets = map(optimizer._reduction.buckets, optimizer._chunks)
        for (stage, model), buckets in zip(models.items(), all_buckets):
            if rank == 0 or stage == 0:  # rank 1 starts stage 1 as a whole, in the same order
                optimizer.expect_last(model)
            before = len(order)
            stores[stage].flush()
            early.append((len(order) - before, len(buckets)))
            optimizer.start_reduction(model)
        optimizer.reduce_gradients()
        counts = [len(optimizer._reduction.buckets(chunk)) for chunk in optimizer._chunks]
        assert order == [(n, k) for n, count in enumerate(counts) for k in range(count)]
        return {name: g.numpy() for name, g in optimizer.gradients().items()}, early

    small, large = run_ranks(run, 2, 2000), run_ranks(run, 2, 40_000_000)
    for (many, _), (one, _) in zip(small, large):
        assert all(np.array_equal(many[name], one[name]) for name in one) and many.keys() == one.keys()
    assert all(started > 3 and buckets > 5 for started, buckets in small[0][1]) and small[1][1][1][0] == 0
    assert all(buckets <= 2 for _, buckets in large[0][1])


def test_a_sum_before_the_weight_gradients_is_found():
    def run(rank):
        config = tiny_config()
        groups = build_groups(1, 1, 1, False)
        [model] = held(config, groups).values()
        optimizer, store = build_optimizer(config, groups, [model]), WeightGradStore()
        optimizer.zero_grad()
        with store.deferring():
            loss = local_loss(config, 0, model, 0)
        loss.backward()
        with pytest.raises(AssertionError, match=r"the bucket of .* is summed before \d+ of its gradients are there"):
            optimizer.reduce_gradients()

    run_ranks(run, 1)
