"""`python -m pipehc.megatron.job.dry_run`: what it prints, that it leaves nothing behind, and what it refuses."""

import json

import pytest
from test_enable import PP2, SCRIPT, command_line

from pipehc.megatron.job.dry_run import main


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def dry(arguments, *flags, script=SCRIPT):
    return main(["--nproc-per-node", "2", *flags, str(script), *command_line(arguments)])


def test_it_prints_the_plan_and_leaves_nothing_behind(tmp_path, capfd):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "latest_checkpointed_iteration.txt").write_text("no checkpoint: must not be read")
    outputs = "--save new --save-interval 1 --load old --tensorboard-dir tensorboard --log-progress --data-cache-path cache "
    assert dry(PP2 + outputs + "--schedule zb_h1 --trace-steps 1 2", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and len([*(tmp_path / "old").iterdir()]) == 1
    assert (found["schedule"], found["residual"], found["processes"]) == ("zb_h1", "none", 2)
    assert [rank["stages"] for rank in found["ranks"]] == [[0], [1]] and found["plain_residual"] is None
    assert found["step"]["ms"] > found["step"]["pipeline_ms"] > 0
    # 4 layers of 4 x 32 x 32 of attention, 3 x 32 x 64 of the MLP and two norms; the last norm and 128 x 32 twice for tokens.
    elements = 4 * (4 * 32 * 32 + 3 * 32 * 64 + 64) + 32 + 2 * 128 * 32
    assert sum(rank["bytes"]["parameters"] for rank in found["ranks"]) == 4 * elements
    assert sum(rank["bytes"]["gradients"] for rank in found["ranks"]) == 4 * elements
    assert sum(rank["bytes"]["optimizer"] for rank in found["ranks"]) == pytest.approx(8 * elements, rel=1e-3)


@pytest.mark.slow
def test_searched_schedules_and_residuals(capfd):
    assert dry(PP2 + "--schedule auto --residual hc") == 0
    text = capfd.readouterr().out
    assert "auto" in text and "What the residual costs" in text


@pytest.mark.parametrize(
    ("flags", "arguments", "words"),
    [
        (("--nnodes", "0"), "", "--nnodes 0: must be a whole number from 1 on"),
        (("--gpu", "h1"), "", "--gpu h1: no such GPU; must be"),
        (("--ranks", "x"), "", "--ranks x: must be pipeline ranks, with commas between them"),
        (("--ranks", "2"), "--schedule 1f1b", "--ranks 2: must be pipeline ranks from 0 to pipeline-model-parallel-size - 1 = 1"),
        ((), "", "the job runs Megatron's own schedule"),
        ((), "--schedule 1f1b --transformer-impl transformer_engine", "--transformer-impl transformer_engine: its kernels"),
        ((), "--schedule dualpipe --global-batch-size 1", "--global-batch-size"),
    ],
)
def test_refusals(flags, arguments, words, capfd):
    assert dry(PP2 + arguments, *flags) == 2
    captured = capfd.readouterr()
    assert words in captured.err and "Traceback" not in captured.err and captured.out == ""


def test_scripts_that_fail_or_train_nothing(tmp_path, capfd):
    assert dry("", script="none.py") == 2
    assert "SCRIPT none.py: there is no such file" in capfd.readouterr().err
    script = tmp_path / "script.py"
    script.write_text("print('nothing to do')")
    assert dry("", script=script) == 2
    assert "ended without a training iteration of megatron.training" in capfd.readouterr().err
    script.write_text("print('about to'); 1 / 0")
    assert dry("", script=script) == 1
    error = capfd.readouterr().err
    assert "failed in the dry run of rank 0" in error and "about to" in error and "ZeroDivisionError" in error
