"""Our schedules inside Megatron jobs: losses and gradient norms are those of one process under Megatron's own schedule."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from megatron_job import MICRO_BATCH, SEQUENCE, Job, forward_step, train
from processes import run_ranks

from pipehc.schedules import Costs, build

ORACLE = [(4.9318385, 1.5512176), (4.9503145, 1.3769631), (4.9131899, 1.4277873)]
SHARDED = {"distributed_optimizer": True, "overlap_grad_reduce": True}


def check(expected, processes, train=train, **arguments):
    """Every rank sees the same losses (to 1e-6) and gradient norms (to 1e-5) in every step, then the same evaluation loss."""
    for steps, evaluation in run_ranks(train, processes, arguments, len(expected[0]), timeout=240):
        for (loss, norm), (other_loss, other_norm) in zip(steps, expected[0], strict=True):
            assert loss == pytest.approx(other_loss, abs=1e-6), (arguments, steps)
            assert norm == pytest.approx(other_norm, rel=1e-5), (arguments, steps)
        assert evaluation == pytest.approx(expected[1], abs=1e-6), arguments


@pytest.fixture(scope="module")
def reference():
    """What one process computes under Megatron's own schedule, by residual and steps."""
    found = {}

    def of(residual, steps=1):
        if (residual, steps) not in found:
            found[residual, steps] = run_ranks(train, 1, {"residual": residual}, steps, timeout=240)[0]
        return found[residual, steps]

    return of


def test_megatrons_own_schedule_gives_the_oracle(reference):
    losses, evaluation = reference(None, 3)
    for (loss, norm), (other_loss, other_norm) in zip(losses, ORACLE, strict=True):
        assert loss == pytest.approx(other_loss, abs=1e-6) and norm == pytest.approx(other_norm, rel=1e-5)
    assert evaluation < losses[0][0] + 0.1


RECOMPUTED = ["core_attn", "mla_up_proj", "moe", "shared_experts"]
# Every family over two ranks, with much else, is in test_job_matrix.py.
QUICK = [
    (4, {"schedule": "dualpipe", "pp": 4}),
    (4, {"schedule": "dualpipev", "pp": 2, "vpp": 2, "ep": 2, **SHARDED}),
    (2, {"schedule": "auto", "pp": 2, "search": {"placement": "bidirectional", "time_limit": 2}}),
]
SLOW = [
    (4, {"schedule": "dualpipe", "pp": 2, "tp": 2}),
    (1, {"schedule": "1f1b"}),
    (4, {"schedule": "dualpipev", "pp": 4, "vpp": 2}),
    (4, {"schedule": "auto", "pp": 4, "search": {"costs": Costs(f=1, b=1, w=1, link=0.5), "time_limit": 2}}),
    (4, {"schedule": "auto", "pp": 4, "vpp": 2, "search": {"placement": "v", "time_limit": 2}}),
    (4, {"schedule": "dualpipe", "pp": 2, "ep": 2, **SHARDED, "bucket_size": 20000}),
    (4, {"schedule": "dualpipe", "pp": 2, "overlap_grad_reduce": True}),
    (4, {"schedule": "dualpipev", "pp": 2, "tp": 2, "vpp": 2}),
    (4, {"schedule": "auto", "pp": 2, "tp": 2, "search": {"time_limit": 2}}),
    (4, {"schedule": "dualpipe", "pp": 2, "cp": 2}),
    (4, {"schedule": "dualpipe", "pp": 2, "cp": 2, "ep": 2, **SHARDED}),
    (8, {"schedule": "dualpipe", "pp": 2, "tp": 2, "ep": 2, **SHARDED}),
    (4, {"schedule": "dualpipe", "pp": 4, "run": {"overlap": False, "recompute": False}}),
    (4, {"schedule": build("dualpipe", 4, 8), "pp": 4, "run": {"recompute_block": 1, "transport": "host"}}),
    (2, {"schedule": "1f1b", "pp": 2, "options": {"num_layers_in_first_pipeline_stage": 3}}),
    (2, {"schedule": "dualpipe", "pp": 2, "options": {"num_layers_in_first_pipeline_stage": 3}}),
    (2, {"schedule": "dualpipe", "pp": 2, "options": {"pipeline_model_parallel_layout": "Ettt|tttttL"}}),
    (2, {"schedule": "dualpipe", "pp": 2, "options": {"recompute_granularity": "selective", "recompute_modules": RECOMPUTED}}),
    (2, {"schedule": "dualpipe", "pp": 2, "options": {"moe_token_dispatcher_type": "allgather"}}),
]


@pytest.mark.parametrize(("processes", "arguments"), QUICK, ids=str)
def test_two_steps_equal_megatrons_own_schedule(reference, processes, arguments):
    check(reference(None, 2), processes, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "arguments"), SLOW, ids=str)
def test_equals_megatrons_own_schedule(reference, processes, arguments):
    """A step, and the loss after it."""
    check(reference(None), processes, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"pp": 2}, {"pp": 2, "tp": 2}], ids=str)
def test_dropout_draws_the_numbers_that_it_would_have(layout):
    """The same ones where the forwards of a rank keep their order; with sequence parallelism, others on every tensor rank."""
    arguments = layout | {"options": {"hidden_dropout": 0.2}}
    processes = layout["pp"] * layout.get("tp", 1)
    check(run_ranks(train, processes, arguments, 1, timeout=240)[0], processes, schedule="1f1b", **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [r"embedding|layers\.[0-3]\.", r"^(?!.*layers\.5\.)", "attention|experts"])
def test_frozen_parameters(frozen):
    """A whole stage; all but one layer; the weights that most of the time goes to."""
    expected = run_ranks(train, 2, {"pp": 2, "frozen": frozen}, 2, timeout=240)[0]
    for more in ({"schedule": "1f1b"}, {"schedule": "dualpipe", **SHARDED}):
        check(expected, 2, pp=2, frozen=frozen, **more)


@pytest.mark.slow
def test_tied_embeddings_over_one_lane():
    arguments = {"pp": 2, "model_options": {"share_embeddings_and_output_weights": True}}
    check(run_ranks(train, 2, arguments, 2, timeout=240)[0], 2, schedule="1f1b", **arguments)


FAMILY = [
    (4, "mhc", {"schedule": "dualpipe", "pp": 4}),
    (2, "harmonized", {"schedule": "dualpipev", "pp": 2, "vpp": 2}),
]
SLOW_FAMILY = [
    (4, "mhc", {"schedule": "dualpipev", "pp": 4, "vpp": 2}),
    (4, "mhc", {"schedule": "dualpipe", "pp": 2, "ep": 2, **SHARDED}),
    (4, "mhc", {"schedule": "dualpipe", "pp": 2, "tp": 2}),
    (4, "mhc", {"schedule": "auto", "pp": 4, "search": {"time_limit": 2}}),
    (4, "mhc", {"schedule": "dualpipev", "pp": 2, "vpp": 2, "cp": 2}),
    (4, "mhc", {"pp": 2, "cp": 2}),
    *((4, kind, {"schedule": "dualpipe", "pp": 4}) for kind in ("isohc", "harmonized")),
    (4, "harmonized", {"pp": 4}),
]


@pytest.mark.parametrize(("processes", "residual", "arguments"), FAMILY, ids=str)
def test_two_steps_with_hyper_connections_equal_one_process(reference, processes, residual, arguments):
    check(reference(residual, 2), processes, residual=residual, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "residual", "arguments"), SLOW_FAMILY, ids=str)
def test_hyper_connections_equal_one_process(reference, processes, residual, arguments):
    check(reference(residual), processes, residual=residual, **arguments)


# -- Megatron's contract, in one launch over two ranks


def two_tuple(loss_mask, output):
    loss = (output.float().view(-1) * loss_mask.view(-1)).sum() / loss_mask.sum()
    return loss, {"lm loss": loss.detach()}


def step_with(loss, iterator, model):
    output, _ = forward_step(iterator, model)
    return output, partial(loss, torch.ones(MICRO_BATCH, SEQUENCE))


def non_loss_step(iterator, model):
    output, _ = forward_step(iterator, model)
    return output, lambda out, non_loss_data: out.detach().sum()


def greedy_step(iterator, model):
    next(iterator)
    return forward_step(iterator, model)


def gradients(job):
    return [p.main_grad.clone() for chunk in job.chunks for p in chunk.parameters()]


def contract(rank, schedule, vpp):
    from megatron.core.parallel_state import destroy_model_parallel

    job = Job(schedule, pp=2, vpp=vpp)
    last = rank == 1
    found = {}

    def run(name, **more):
        for chunk in job.chunks:
            chunk.zero_grad_buffer()
        reports = job.call(0, 8, **more)
        assert len(reports) == (8 if last else 0), name
        found[name] = [r if torch.is_tensor(r) else r["lm loss"] for r in reports], gradients(job)

    run("three")
    run("decoder's length", seq_length=2 * SEQUENCE)  # which Megatron's 1F1B goes by
    run("two", forward_step=partial(step_with, two_tuple))
    job.config.calculate_per_token_loss = True
    for chunk in job.chunks:  # what DDP does at construction for this option
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            assert all(bucket.gradient_scaling_factor == 1 for bucket in buffer.buckets)  # no data parallelism
    run("per token")
    job.config.calculate_per_token_loss = False
    with torch.no_grad():
        reports = job.call(0, 6, forward_only=True)
        assert len(reports) == (6 if last else 0)
        reports = job.call(0, 2, forward_only=True, forward_step=non_loss_step, collect_non_loss_data=True)
        assert len(reports) == (2 if last else 0) and all(torch.is_tensor(r) for r in reports)
    if schedule == "dualpipe":  # where both ranks take data before they wait for each other
        with pytest.raises(ValueError, match="second item"):
            job.call(0, 8, forward_step=greedy_step)
    dist.barrier()
    destroy_model_parallel()
    return found


@pytest.mark.parametrize(("schedule", "vpp"), [("dualpipe", None), pytest.param("dualpipev", 2, marks=pytest.mark.slow)])
def test_losses_and_gradients_by_megatrons_rules(schedule, vpp):
    """2- and 3-tuples, per-token loss, forward_only, non-loss data: reports in the order of micro-batches, on the last rank."""
    mine = run_ranks(contract, 2, schedule, vpp, timeout=240)
    theirs = run_ranks(contract, 2, None, None, timeout=240)
    for name in ("three", "decoder's length", "two", "per token"):
        assert torch.stack(mine[1][name][0]).sub(torch.stack(theirs[1][name][0])).abs().max() < 1e-4, name
        for part in (mine, theirs):
            assert any(float(g.abs().max()) > 0 for g in part[0][name][1])
        norms = [sum(float(g.double().square().sum()) for rank in part for g in rank[name][1]) for part in (mine, theirs)]
        copies = 2 if schedule == "dualpipe" else 1  # reduced over both replicas
        assert norms[0] == pytest.approx(copies * norms[1], rel=1e-5), name


def step_with_more(given, iterator, model):
    unwrapped = model.module
    unwrapped.forward = partial(type(unwrapped).forward, unwrapped, **given)
    return forward_step(iterator, model)


JOINED = PackedSeqParams(qkv_format="sbhd", tokens_per_sample=8, max_seqlen_q=SEQUENCE, max_seqlen_kv=SEQUENCE)
MORE = [
    ({"extra_block_kwargs": {"context_mask": 1}}, "context_mask: must be None"),
    ({"packed_seq_params": JOINED}, "tokens_per_sample: must be None"),
]


@pytest.mark.parametrize(("given", "message"), MORE, ids=lambda value: value if isinstance(value, str) else "")
def test_what_layers_would_not_get_is_refused(given, message):
    def call(rank):
        with pytest.raises(ValueError, match=message):
            Job("1f1b").call(0, 1, forward_step=partial(step_with_more, given))

    run_ranks(call, 1)


def grad_sync(rank):
    """A job's own grad_sync_func is asked once a step for every chunk, when its last weight gradient is there."""
    job = Job("dualpipe", pp=2, ep=1, overlap_grad_reduce=True, distributed_optimizer=True)
    asked = []

    def function(index):
        def start(parameters):
            asked.append((index, len(list(parameters))))
            job.chunks[index].start_grad_sync()

        return start

    job.config.grad_sync_func = [function(i) for i in range(2)]
    first = job.step(0, 4)
    return first, sorted(asked), [len(list(c.parameters())) for c in job.chunks]


def test_grad_sync_func_of_the_job_is_used():
    for (loss, norm), asked, parameters in run_ranks(grad_sync, 4, timeout=240):
        assert loss == pytest.approx(ORACLE[0][0], abs=1e-6) and norm == pytest.approx(ORACLE[0][1], rel=1e-5)
        assert asked == list(enumerate(parameters))


def test_batches_are_handed_out_by_number():
    from pipehc.megatron.job.batches import OneItem, batches_of

    source = iter(range(10))
    first, second = batches_of(source, [range(2), range(2, 4)], 4)
    assert first is second and batches_of([source, None], [range(4)] * 2, 4)[1] is None
    assert next(OneItem(first, 2)) == 2 and next(OneItem(second, 0)) == 0
    first.finish()
    assert next(source) == 4  # the whole step is taken
    untouched = batches_of(source, [range(4)], 4)[0]
    untouched.finish()
    assert next(source) == 5
    with pytest.raises(ValueError, match="a list of 3"):
        batches_of([source] * 3, [range(4)] * 2, 4)
