"""Jobs that give Megatron a configuration of their model: its builder goes by the configuration of DDP beside it."""

import pytest
from processes import run_ranks
from test_enable import DEEP, PP2, VPP2, assert_same, losses, pretrain


def configured(rank, arguments):
    """What the job prints on this rank, with a line for each DDP that it makes. Its script gives DDP buckets of 1000 elements."""
    from pipehc.megatron.job import cpu_job

    cpu_job.install()
    cpu_job.allow_pretrain()
    from megatron.core.distributed import DistributedDataParallel
    from megatron.training import argument_utils

    container_of = argument_utils.pretrain_cfg_container_from_args
    ddp = DistributedDataParallel.__init__

    def pretrain_cfg_container_from_args(*given):
        container = container_of(*given)
        container.ddp.bucket_size = 1000
        container.ddp.grad_reduce_in_fp32 = True
        return container

    def init(self, config, ddp_config, module, *args, **given):
        ddp(self, config, ddp_config, module, *args, **given)
        layers = [layer.layer_number for layer in module.decoder.layers]
        groups = [len(group.params) for group in self.bucket_groups]
        print(f"\nDDP of layers {layers}: {ddp_config.grad_reduce_in_fp32} {groups}")

    argument_utils.pretrain_cfg_container_from_args = pretrain_cfg_container_from_args
    DistributedDataParallel.__init__ = init
    return pretrain(rank, arguments)


def wrappers(arguments):
    """The lines of all ranks, each once; buckets are smaller than the model on the first pipeline rank alone."""
    printed = "".join(run_ranks(configured, 2, arguments, timeout=280))
    return {line for line in printed.splitlines() if line.startswith("DDP of")}


CONFIGURED = PP2 + DEEP + "--from-config --overlap-grad-reduce --train-iters 1 --eval-iters 0 "


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["", "--use-distributed-optimizer "], ids=["plain", "sharded"])
def test_the_jobs_own_configuration_of_ddp(arguments):
    expected = wrappers(CONFIGURED + arguments)
    first, second = sorted(expected)
    assert "layers [1, 2, 3, 4]: True" in first and first.count(",") > 10 and second.count(",") < 6
    assert wrappers(CONFIGURED + arguments + "--schedule dualpipe") == expected


@pytest.mark.slow
def test_what_the_builder_does_not_heed_changes_nothing():
    """--freeze-all-layers is an option of Megatron's get_model, which such a job does not call."""
    plain = losses(2, PP2 + "--from-config --freeze-all-layers")
    assert plain[1] < plain[0][0][0] - 0.1
    assert_same(losses(2, PP2 + "--from-config --freeze-all-layers --schedule dualpipe"), plain)
    virtual = losses(2, PP2 + VPP2 + "--from-config --freeze-all-layers --schedule dualpipev")
    assert virtual[1] < virtual[0][0][0] - 0.1
