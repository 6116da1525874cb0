"""Stages from Megatron's layers: against plain PyTorch, in every partition, with two micro-batches in flight."""

import math

import pytest
import torch
import torch.distributed as dist
from plain_model import PlainModel
from processes import run_ranks
from tiny_model import cut, micro_batch, tiny_config

from pipehc.config.schema import Config
from pipehc.megatron import cpu
from pipehc.megatron.trainer.groups import Groups, build_groups
from pipehc.megatron.trainer.model import StageModel, buffer_names, build_stage, initialise, parameter_names
from pipehc.planning import parameters

KINDS = ("none", "mhc")


def build(config: Config, groups: Groups, partition: list[range], seed: int = 7) -> list[StageModel]:
    last = len(partition) - 1
    stages = [build_stage(config, groups, blocks, i == 0, i == last) for i, blocks in enumerate(partition)]
    for stage in stages:
        initialise(stage, seed, config.model.init_std)
    return stages


def whole(config: Config, groups: Groups | None = None) -> StageModel:
    return build(config, groups or build_groups(1, 1, 1, False), [range(config.model.blocks)])[0]


def named(stages: list[StageModel]) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for stage in stages for name, parameter in parameter_names(stage).items()}


def run(stages: list[StageModel], tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Forward through all stages, then backward, handing detached tensors on as ranks do. Returns the summed loss."""
    handed: list[tuple[torch.Tensor, torch.Tensor]] = []
    x = None
    for stage in stages:
        y = stage(x, tokens if stage.first else None, labels if stage.last else None)
        handed.append((x, y))
        x = y.detach().requires_grad_()
    gradient = None
    for x, y in reversed(handed):
        y.backward(gradient)
        gradient = None if x is None else x.grad
    return y if len(stages) == 1 else handed[-1][1]


def test_importing_patches_nothing():
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_install_is_idempotent():
    def installed(rank):
        cpu.install()
        patched = torch.zeros, torch.Tensor.type, torch.cuda.current_device
        cpu.install()
        return patched == (torch.zeros, torch.Tensor.type, torch.cuda.current_device)

    assert run_ranks(installed, 1, init=False) == [True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_untrained_model_guesses(kind, precision):
    config = tiny_config(f"residual.kind={kind}", f"train.precision={precision}")

    def loss_and_gradients(rank):
        stage = whole(config)
        loss = run([stage], *micro_batch(config, 0))
        assert loss.dtype == torch.float32
        dtypes = {name: p.dtype for name, p in parameter_names(stage).items()}
        return loss.item(), {name: p.grad.norm().item() for name, p in parameter_names(stage).items()}, dtypes

    [(loss, norms, dtypes)] = run_ranks(loss_and_gradients, 1)
    tokens = config.train.micro_batch * config.train.sequence_length
    assert abs(loss / tokens - math.log(config.model.vocab_size)) < 0.1
    assert all(math.isfinite(norm) for norm in norms.values())
    # With 22 tokens and 4 experts everything takes part.
    assert all(norm > 0 for name, norm in norms.items() if "connection" not in name)
    wanted = torch.float32 if precision == "fp32" else torch.bfloat16
    assert {dtype for name, dtype in dtypes.items() if "connection" not in name} == {wanted}
    assert {dtype for name, dtype in dtypes.items() if "connection" in name} <= {torch.float32}


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_parameter_count_is_the_planned_one(kind, depth):
    config = tiny_config(f"residual.kind={kind}", f"model.mtp_depth={depth}")
    assert run_ranks(lambda rank: sum(p.numel() for p in whole(config).parameters()), 1) == [parameters.total(config)]


def test_forward_equals_plain_pytorch():
    config = tiny_config("residual.kind=none", "model.init_std=0.2")

    def losses(rank):
        stage = whole(config)
        for i, bias in enumerate(buffer_names(stage).values()):
            bias.copy_(torch.tensor([0.3, -0.2, 0.0, -0.1]).roll(i))  # moves the choice of experts, not their weights
        tokens, labels = micro_batch(config, 0)
        weights = {name: p.detach().double() for name, p in parameter_names(stage).items()}
        buffers = {name: b.double() for name, b in buffer_names(stage).items()}
        return stage(None, tokens, labels).item(), PlainModel(config, weights | buffers).loss(tokens, labels).item()

    [(loss, reference)] = run_ranks(losses, 1)
    assert loss == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_partition_is_the_same_model(kind):
    config = tiny_config(f"residual.kind={kind}")

    def compare(rank):
        groups = build_groups(1, 1, 1, False)
        one = build(config, groups, [range(4)])
        loss = run(one, *micro_batch(config, 0))
        for partition in (cut(4, 2), cut(4, 3), cut(4, 4)):
            many = build(config, groups, partition)
            assert len(named(many)) == sum(len(parameter_names(stage)) for stage in many), "a name is in two stages"
            assert named(many).keys() == named(one).keys()
            for name, parameter in named(many).items():
                assert torch.equal(parameter, named(one)[name]), name
            torch.testing.assert_close(run(many, *micro_batch(config, 0)), loss, rtol=1e-6, atol=0)
            for name, parameter in named(many).items():
                torch.testing.assert_close(parameter.grad, named(one)[name].grad, rtol=1e-6, atol=0, msg=name)

    run_ranks(compare, 1)


def test_weights_depend_on_the_seed():
    config = tiny_config()

    def differ(rank):
        groups = build_groups(1, 1, 1, False)
        a, b = (named(build(config, groups, [range(4)], seed)) for seed in (1, 2))
        return {name: torch.equal(a[name], b[name]) for name in a if a[name].dim() > 1 and "connection" not in name}

    [equal] = run_ranks(differ, 1)
    assert equal and not any(equal.values())


def test_mhc_with_alpha_0_is_the_plain_residual():
    def losses_and_gradients(rank):
        groups = build_groups(1, 1, 1, False)
        found = []
        for config in (tiny_config("residual.kind=none"), tiny_config("residual.kind=mhc", "residual.alpha=0.0")):
            stage = whole(config, groups)
            loss = run([stage], *micro_batch(config, 0))
            found.append((loss, {name: p.grad for name, p in parameter_names(stage).items() if "connection" not in name}))
        (plain_loss, plain), (loss, gradients) = found
        torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=0)
        assert plain.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (gradient - plain[name]).norm() <= 1e-5 * plain[name].norm(), name

    run_ranks(losses_and_gradients, 1)


def test_expert_parallel_ranks_share_the_experts_out():
    config = tiny_config()

    def weights(rank, ep):
        stage = whole(config, build_groups(1, 1, ep, False))
        return {name: p.detach().numpy() for name, p in parameter_names(stage).items()}

    [one] = run_ranks(weights, 1, 1)
    ranks = run_ranks(weights, 2, 2)
    routed = [{name for name in held if ".experts." in name} for held in ranks]
    assert routed[0] and routed[0].isdisjoint(routed[1])
    assert ranks[0].keys() | ranks[1].keys() == one.keys()
    for held in ranks:
        for name, weight in held.items():
            assert (weight == one[name]).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_two_micro_batches_in_flight(kind):
    """1F1B runs F of the next micro-batch before B of this one: what the dispatcher keeps of the latest must not leak into B."""
    config = tiny_config(f"residual.kind={kind}", "parallel.ep=2")

    def gradients(stage: StageModel) -> dict[str, torch.Tensor]:
        found = {name: p.grad.clone() for name, p in parameter_names(stage).items()}
        stage.zero_grad()
        return found

    def compare(rank):
        stage = whole(config, build_groups(1, 1, 2, False))
        batches = [micro_batch(config, 2 * m + rank) for m in range(2)]
        alone = []
        for tokens, labels in batches:
            stage(None, tokens, labels).backward()
            alone.append(gradients(stage))
        losses = [stage(None, tokens, labels) for tokens, labels in batches]
        for loss, expected in zip(losses, alone):
            loss.backward()
            for name, gradient in gradients(stage).items():
                assert torch.equal(gradient, expected[name]), name

    run_ranks(compare, 2)


def test_tokens_are_counted_in_training_only():
    config = tiny_config()

    def counts(rank):
        stage = whole(config)
        router = stage.decoder.layers["1"].mlp.router
        with torch.no_grad():
            stage(None, *micro_batch(config, 0))
        idle = router.local_tokens_per_expert.sum().item()
        stage(None, *micro_batch(config, 0))
        return idle, router.local_tokens_per_expert.sum().item()

    tokens = config.train.micro_batch * config.train.sequence_length
    assert run_ranks(counts, 1) == [(0, tokens * config.model.experts_active)]


def test_stage_without_its_input():
    def message(rank):
        with pytest.raises(ValueError, match="tokens: None; needed are tokens on the first stage"):
            whole(tiny_config())(None, None, None)

    run_ranks(message, 1)


def test_sizes_that_do_not_fit():
    def messages(rank):
        for sizes, text in (
            ((2, 1, 1, False), "parallel.pp x parallel.tp = 2 x 1 does not divide the number of processes, 1"),
            ((1, 1, 2, False), "parallel.ep = 2 does not divide the 1 processes"),
            ((1, 1, 1, True), "parallel.pp = 1: two replicas of every stage need an even number"),
        ):
            with pytest.raises(ValueError, match=text):
                build_groups(*sizes)

    run_ranks(messages, 1)


def test_layouts():
    """Ranks are pp_rank * dp + dp_rank; with replicas, gradients are summed over the mirrored position too, per expert shard."""

    def layout(rank, pp, ep, replicated):
        groups = build_groups(pp, 1, ep, replicated)
        c = groups.collection
        ranks = [dist.get_process_group_ranks(g) for g in (groups.dp, groups.ep, c.dp_cp, c.expt_dp)]
        return groups.pp_rank, groups.dp_rank, groups.ep_rank, *ranks

    sizes = (2, 1, False), (2, 2, True), (4, 1, True), (1, 2, False)
    first, second, third, fourth = (run_ranks(layout, 4, *size) for size in sizes)
    assert first[2] == (1, 0, 0, [2, 3], [2], [2, 3], [2, 3])
    assert second[1] == (0, 1, 1, [0, 1], [0, 1], [0, 1, 2, 3], [1, 3])
    assert second[2] == (1, 0, 0, [2, 3], [2, 3], [0, 1, 2, 3], [0, 2])
    assert third[1] == (1, 0, 0, [1], [1], [1, 2], [1, 2])
    assert third[3] == (3, 0, 0, [3], [3], [0, 3], [0, 3])
    assert fourth[2] == (0, 2, 0, [0, 1, 2, 3], [2, 3], [0, 1, 2, 3], [0, 2])
