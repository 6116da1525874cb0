"""How jobs under `enable` start, by what they print: the first line, a plain checkpoint, iterations after a resume, refusals."""

import pytest
from processes import run_ranks
from test_enable import PP2, losses, pretrain


def printed(arguments):
    """By each rank: the first announces, the last has the losses."""
    return run_ranks(pretrain, 2, PP2 + arguments, timeout=280)


@pytest.mark.slow
def test_a_plain_checkpoint_starts_a_job_with_hyper_connections_which_resumes(tmp_path, monkeypatch):
    """At the loss of the plain job; afterwards its own checkpoints are found first. Recorded iterations are those of its log."""
    losses(2, f"{PP2}--save-interval 3 --exit-interval 3 --save {tmp_path}/plain")
    ((expected, _),), _ = losses(2, f"{PP2}--exit-interval 1 --finetune --load {tmp_path}/plain")
    start = f"{PP2}--schedule dualpipe --residual mhc --pretrained-checkpoint {tmp_path}/plain "
    with pytest.raises(RuntimeError, match=r"has no hyper-connections, the model has; .*from_plain=True"):
        losses(2, start)
    start += f"--from-plain --save {tmp_path}/new --load {tmp_path}/new --save-interval 3 "
    (first, *_), _ = losses(2, f"{start} --exit-interval 3")
    assert first[0] == pytest.approx(expected, abs=0.002)
    monkeypatch.chdir(tmp_path)
    first_rank, last_rank = printed(f"{start.removeprefix(PP2)} --trace-steps 5 5 ")
    assert "iteration        4/       6" in last_rank and "traces of iterations 5 to 5 in pipehc_trace/" in first_rank
    assert [path.name for path in (tmp_path / "pipehc_trace").iterdir()] == ["step-000005.json"]


@pytest.mark.slow
def test_the_job_says_once_that_it_is_on():
    first, last = printed("--schedule 1f1b --residual mhc --exit-interval 1 ")
    (said,) = [line for line in first.splitlines() if line.startswith("pipehc: on; ")]
    assert said.startswith("pipehc: on; schedule 1f1b, 2 stages over 2 ranks, 8 micro-batches") and "pipehc: on" not in last


@pytest.mark.slow
def test_a_mamba_model_is_refused_before_it_is_built():
    with pytest.raises(RuntimeError, match=r"--hybrid-layer-pattern \(hybrid_layer_pattern = '.*has Mamba layers \(M\)"):
        printed("--schedule dualpipe --hybrid-layer-pattern M-M-M-M-M-M-M-M- ")
