"""`enable` before Megatron's own pretrain() of a HybridModel: the whole job, data, optimizer, evaluation and checkpoints."""

import pytest
from test_enable import EXPERTS, PP2, SHARDED, SHORT, assert_same, losses

HYBRID = PP2 + "--spec local_stack LOCAL_STACK --hybrid-layer-pattern "
TWO, FOUR = HYBRID + "*-*-|*--* ", HYBRID + "*-|*-|*-|-* "  # the same layers


@pytest.fixture(scope="module")
def plain():
    """The job as it was, over two pipeline ranks."""
    found = losses(2, TWO)
    assert len(found[0]) == 6 and found[1] < found[0][0][0] - 0.1
    return found


@pytest.mark.slow
def test_the_job_under_dualpipe(plain):
    assert_same(losses(2, TWO + "--schedule dualpipe"), plain)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["--schedule auto", "--schedule dualpipe --from-config"])
def test_the_job_in_other_ways(plain, arguments):
    assert_same(losses(2, TWO + arguments), plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        SHARDED + "--moe-aux-loss-coeff 1e-2 --calculate-per-token-loss ",
        "--bf16 --use-distributed-optimizer --residual mhc --log-params-norm ",
    ],
)
def test_experts_under_dualpipe(arguments):
    rounding = 50 if "bf16" in arguments else 1
    job = HYBRID + "*E*-|*E-E " + EXPERTS + SHORT + arguments
    assert_same(losses(4, job + "--schedule dualpipe"), losses(4, job), rounding=rounding)


@pytest.mark.slow
def test_hyper_connections_in_the_job():
    expected = losses(2, TWO + "--schedule megatron --residual mhc")
    assert_same(losses(2, TWO + "--residual mhc --schedule dualpipe"), expected)


@pytest.mark.slow
def test_checkpoints_go_both_ways(plain, tmp_path):
    """Written by the plain job, resumed under dualpipe and dualpipev, and back, with the losses of the undisturbed job."""
    stop = f"{TWO}{SHARDED}--save-interval 3 --exit-interval 3 --save {tmp_path}/"
    losses(2, stop + "plain")
    for job in (TWO + "--schedule dualpipe ", FOUR + "--schedule dualpipev "):
        assert_same(losses(2, f"{job}{SHARDED}--load {tmp_path}/plain"), plain, first=3)
    losses(2, stop + "dual --schedule dualpipe")
    assert_same(losses(2, f"{TWO}{SHARDED}--load {tmp_path}/dual"), plain, first=3)


@pytest.mark.slow
def test_hyper_connections_start_from_a_plain_checkpoint(tmp_path):
    """At its loss: the streams start equal, and the maps at the identity."""
    losses(2, f"{TWO}--save-interval 3 --exit-interval 3 --save {tmp_path}")
    goes_on = f"{TWO}--load {tmp_path} --finetune --exit-interval 3 "
    expected, _ = losses(2, goes_on)
    found, _ = losses(2, goes_on + "--schedule dualpipe --residual mhc --from-plain")
    assert found[0][0] == pytest.approx(expected[0][0], abs=3e-6) and abs(found[2][0] - expected[2][0]) > 1e-5
