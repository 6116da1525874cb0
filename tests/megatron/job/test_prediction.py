"""Multi-token prediction in jobs: losses, gradient norms and the logged losses of depths are those of Megatron's own schedule."""

import pytest
from megatron_job import Job
from processes import run_ranks
from test_job_matrix import DENSE, STANDARD

SHARDED = {"distributed_optimizer": True, "overlap_grad_reduce": True}


def train(rank, arguments, steps=3, microbatches=8):
    """[(loss, gradient norm, losses and counts of the depths as the last rank would log them)], an evaluation loss."""
    import torch
    from megatron.core import parallel_state as ps
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    job = Job(**arguments)
    share = microbatches // ps.get_data_parallel_world_size()
    found = []
    for step in range(steps):
        loss, norm = job.step(step, share)
        if step == 1:
            continue  # nothing is logged: the next log has the sums of two steps
        MTPLossLoggingHelper.reduce_metrics_in_tracker()
        tracker = MTPLossLoggingHelper.tracker
        names = {"loss_values": share, "correct_values": 1, "total_values": 1}  # Megatron's log divides losses by micro-batches
        depths = [(tracker[name] / by).tolist() for name, by in names.items() if name in tracker]
        assert ps.is_pipeline_last_stage() or not torch.tensor(depths).any()
        found.append((loss, norm, torch.tensor(depths).flatten().tolist() if ps.is_pipeline_last_stage() else None))
        MTPLossLoggingHelper.clean_metrics_in_tracker()
    return found, job.evaluate(7, share // 2)


def check(processes, arguments, steps):
    model = {name: arguments[name] for name in ("residual", "model_options") if name in arguments}
    options = {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.3} | arguments.get("options", {})
    whole = {name: value for name, value in options.items() if name != "pipeline_model_parallel_layout"}
    expected, evaluation = run_ranks(train, 1, model | {"options": whole}, steps, timeout=240)[0]
    logged = 0
    for found, evaluated in run_ranks(train, processes, arguments | {"options": options}, steps, timeout=240):
        for (loss, norm, depths), (other_loss, other_norm, other_depths) in zip(found, expected, strict=True):
            assert loss == pytest.approx(other_loss, abs=1e-6) and norm == pytest.approx(other_norm, rel=1e-5)
            if depths is not None:
                assert depths == pytest.approx(other_depths, rel=1e-6)
                logged += 1
        assert evaluated == pytest.approx(evaluation, abs=1e-6)
    assert logged


BIASES = STANDARD | DENSE | {"add_bias_linear": True, "add_qkv_bias": True}
TIED = {"model_options": {"share_embeddings_and_output_weights": True}}
QUICK = [
    (2, {"schedule": "dualpipe", "pp": 2, "residual": "mhc"}),
    (2, {"schedule": "dualpipev", "pp": 2, "vpp": 2, **TIED}),
]
SLOW = [
    (2, {"schedule": "1f1b", "pp": 2, "residual": "isohc", **TIED}),
    (2, {"pp": 2, "residual": "mhc"}),
    (4, {"schedule": "auto", "pp": 4, "search": {"time_limit": 2}, "residual": "mhc", **TIED}),
    (4, {"schedule": "dualpipe", "pp": 2, "ep": 2, "residual": "mhc", **SHARDED, "bucket_size": 20000}),
    (4, {"schedule": "dualpipev", "pp": 2, "vpp": 2, "ep": 2, **SHARDED, **TIED}),
    (4, {"schedule": "dualpipe", "pp": 2, "tp": 2, "residual": "mhc", "options": {"calculate_per_token_loss": True}}),
    (2, {"schedule": "dualpipev", "pp": 2, "vpp": 2, "residual": "mhc", "overlap_grad_reduce": True, "options": BIASES}),
    (2, {"schedule": "dualpipe", "pp": 2, "options": {"pipeline_model_parallel_layout": "Etttt|ttttmmL"}}),
    (2, {"schedule": "dualpipe", "pp": 2, "residual": "hc", "options": {"mtp_use_repeated_layer": True, "mtp_detach_heads": True}}),
]


@pytest.mark.parametrize(("processes", "arguments"), QUICK, ids=str)
def test_three_steps_equal_megatrons_own_schedule(processes, arguments):
    check(processes, arguments, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "arguments"), SLOW, ids=str)
def test_equals_megatrons_own_schedule(processes, arguments):
    """A step, and the loss after it."""
    check(processes, arguments, 1)
