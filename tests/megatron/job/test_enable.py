"""`enable` before Megatron's own pretrain(): the whole job, data, optimizer, scheduler, logging, evaluation and checkpoints."""

import contextlib
import io
import multiprocessing
import os
import re
import runpy
import sys
from pathlib import Path

import preloaded_pretrain  # noqa: F401
import pytest
from processes import run_ranks

SCRIPT = Path(__file__).parents[3] / "tools" / "pretrain_megatron.py"
JOB = """
--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 1
--lr 1e-3 --min-lr 1e-4 --mock-data --tokenizer-type NullTokenizer --vocab-size 127
--transformer-impl local --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --eval-interval 3
--eval-iters 1 --log-interval 1 --distributed-backend gloo --use-cpu-initialization --no-masked-softmax-fusion
--no-persist-layer-norm --no-gradient-accumulation-fusion --no-rope-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion
--hidden-dropout 0 --attention-dropout 0 --ckpt-format torch_dist --train-iters 6 --global-batch-size 8 --num-workers 0
"""
PP2, VPP2 = "--pipeline-model-parallel-size 2 ", "--num-virtual-stages-per-pipeline-rank 2 "
DEEP = "--num-layers 8 "
SHORT = "--train-iters 3 "
TIED = "--tied "  # of this file: the job unties its embedding and output head unless it is there
SHARDED = "--use-distributed-optimizer --overlap-grad-reduce --dist-ckpt-optim-fully-reshardable --overlap-param-gather "


def command_line(arguments):
    tied = arguments.replace(TIED, "") if TIED in arguments else f"{arguments} --untie-embeddings-and-output-weights"
    return [*JOB.split(), *tied.split()]


def pretrain(rank, arguments):
    """What the script prints on this rank."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron asks for it with sequence parallelism
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  (saving starts a helper process)
    sys.argv = [str(SCRIPT), *command_line(arguments)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as end:  # of --exit-interval
            assert not end.code, end.code
    return out.getvalue()


def losses(processes, arguments):
    """[(loss, gradient norm, norm of the parameters if it is logged)] of the iterations, and the validation loss after the last."""
    printed = "".join(run_ranks(pretrain, processes, arguments, timeout=280))
    steps = re.findall(r"lm loss: ([\d.E+-]+) .* grad norm: ([\d.]+)(?: .* params norm: ([\d.]+))?", printed)
    last = 3 if SHORT in arguments else 6
    validation = re.findall(rf"validation loss at iteration {last} \| lm loss value: ([\d.E+-]+)", printed)
    return [tuple(float(figure) for figure in step if figure) for step in steps], float(validation[-1]) if validation else None


def assert_same(found, expected, first=0, rounding=1.0):
    """Iterations from `first` on. After a restart Megatron prints the mean since the last print, of which it knows but one."""
    steps, other = found[0], expected[0][first:]
    assert len(steps) == len(other)
    for k, (a, b) in enumerate(zip(steps, other)):
        if first and k == 1:
            b = ((other[0][0] + b[0]) / 2, *b[1:])
        assert a[0] == pytest.approx(b[0], abs=rounding * 3e-6) and a[1:] == pytest.approx(b[1:], abs=rounding * 1.1e-3), (k, a, b)
    assert found[1] == pytest.approx(expected[1], abs=rounding * 5e-6)


@pytest.fixture(scope="module")
def plain():
    """The job as it was, over two pipeline ranks."""
    found = losses(2, PP2)
    assert len(found[0]) == 6 and found[1] < found[0][0][0] - 0.1
    return found


def test_the_job_under_dualpipe(plain):
    assert_same(losses(2, PP2 + "--schedule dualpipe"), plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "arguments"),
    [
        (2, PP2 + "--schedule 1f1b"),
        (2, PP2 + "--schedule auto"),
        (2, PP2 + "--schedule dualpipe --from-config"),
        (4, PP2 + "--schedule dualpipe " + SHARDED),
    ],
    ids=str,
)
def test_the_job_in_other_layouts(plain, processes, arguments):
    assert_same(losses(processes, arguments), plain)


EXPERTS = "--num-experts 4 --moe-token-dispatcher-type alltoall --expert-model-parallel-size 2 --moe-router-topk 2 "

# Overflows in its first iterations, which Megatron's own loop does not survive with --overlap-param-gather.
HALF = "--fp16 --initial-loss-scale 8388608 --accumulate-allreduce-grads-in-fp32 --hysteresis 1 "


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        "--pipeline-model-parallel-size 4 ",
        PP2 + "--bf16 " + SHARDED + "--ddp-num-buckets 4 ",
        PP2 + HALF + "--use-distributed-optimizer --overlap-grad-reduce --log-params-norm ",
        PP2 + "--tensor-model-parallel-size 2 --sequence-parallel ",
        PP2 + EXPERTS + "--moe-aux-loss-coeff 1e-2 --log-params-norm ",
        PP2 + EXPERTS + "--bf16 --use-distributed-optimizer --residual mhc --log-params-norm ",
        PP2 + EXPERTS + SHARDED + "--calculate-per-token-loss ",
    ],
)
def test_other_jobs_under_dualpipe(arguments):
    """Layouts that draw their weights from other numbers, each against itself under Megatron's own schedule."""
    # In 16 bits gradients are rounded before they are summed, in another order.
    rounding = 50 if "bf16" in arguments or "fp16" in arguments else 1
    arguments += "" if "fp16" in arguments else SHORT
    assert_same(losses(4, arguments + "--schedule dualpipe"), losses(4, arguments), rounding=rounding)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A deeper job, and its checkpoint after three iterations."""
    folder = tmp_path_factory.mktemp("halfway")
    losses(2, f"{PP2}{DEEP}--save-interval 3 --exit-interval 3 --save {folder}")
    return losses(2, PP2 + DEEP), folder


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "ranks"), [("dualpipev", 2), ("dualpipev", 4), ("zbv", 2), ("interleaved", 4)])
def test_two_chunks_a_rank_go_on_where_the_plain_job_stopped(deep, schedule, ranks):
    """Their own weights would be drawn from other numbers."""
    plain, halfway = deep
    arguments = f"--pipeline-model-parallel-size {ranks} {VPP2}{DEEP}--schedule {schedule} --load {halfway}"
    assert_same(losses(ranks, arguments), plain, first=3)


@pytest.mark.slow
def test_mixed_precision_at_the_turn_of_a_v():
    """The last stage is on the first rank, where Megatron's wrappers would not look for it."""
    arguments = PP2 + VPP2 + "--bf16 "
    found = losses(2, arguments + "--schedule dualpipev")
    assert_same(found, losses(2, arguments + "--schedule zbv"), rounding=50)
    assert found[1] < found[0][0][0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["--schedule dualpipe", "--schedule megatron"])
def test_hyper_connections_in_the_job(arguments):
    """Over two ranks, as in one with Megatron's own schedule."""
    expected = losses(2, PP2 + SHORT + "--schedule 1f1b --residual mhc")
    assert_same(losses(2, PP2 + SHORT + "--residual mhc " + arguments), expected)


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--mtp-num-layers 1 ", SHARDED + TIED], ids=["prediction", "sharded, tied"])
def test_checkpoints_go_both_ways(tmp_path, options):
    """Written by the plain job, resumed under dualpipe (and dualpipev), and back, with the losses of the undisturbed job."""
    plain = losses(2, PP2 + options.removeprefix(SHARDED))
    stop = f"{PP2}{options}--save-interval 3 --exit-interval 3 --save {tmp_path}/"
    losses(2, stop + "plain")
    assert_same(losses(2, f"{PP2}{options}--schedule dualpipe --load {tmp_path}/plain"), plain, first=3)
    losses(2, stop + "dual --schedule dualpipe")
    assert_same(losses(2, f"{PP2}{options}--load {tmp_path}/dual"), plain, first=3)
    if TIED in options:
        vee = f"{PP2}{VPP2}{options}--schedule dualpipev "
        assert_same(losses(2, f"{vee}--load {tmp_path}/plain"), plain, first=3)
        at_four = f"--train-iters 6 --exit-interval 4 --save-interval 4 --save {tmp_path}/vee --load {tmp_path}/plain"
        losses(2, vee + at_four)
        found, validation = losses(2, f"{PP2}{options}--load {tmp_path}/vee")
        assert len(found) == 2 and validation == pytest.approx(plain[1], abs=5e-6)
