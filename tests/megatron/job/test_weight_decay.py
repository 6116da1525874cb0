"""Weight decay of hyper-connections in jobs, whose optimizer goes by Megatron's rule: what our trainer's does."""

import pytest
from megatron_job import Job
from processes import run_ranks
from tiny_model import tiny_config

from pipehc.megatron.trainer.groups import build_groups
from pipehc.megatron.trainer.model import build_stage, initialise, parameter_names
from pipehc.megatron.trainer.optimizer import build_optimizer


def in_a_job(rank, kind):
    job = Job(residual=kind, layers=2, distributed_optimizer=False)
    names = {parameter: name for name, parameter in job.chunks[0].module.named_parameters()}
    return {names[p]: group["wd_mult"] for group in job.optimizer.param_groups for p in group["params"]}


def in_the_trainer(rank, kind):
    config = tiny_config(f"residual.kind={kind}")
    groups = build_groups(1, 1, 1, False)
    model = build_stage(config, groups, range(config.model.blocks), True, True)
    initialise(model, 7, 0.1)
    found = {}
    for part in build_optimizer(config, groups, [model])._parts:
        for name, parameter in parameter_names(model).items():
            if parameter in part.model_param_group_index_map:
                index, _ = part.model_param_group_index_map[parameter]
                found[name] = part.param_groups[index]["wd_mult"]
    return found


def of_connections(found):
    """Factors of the weight decay, by the parameter's name in its hyper-connection."""
    assert {1.0, 0.0} == set(found.values())
    factors = {}
    for name, factor in found.items():
        if "connection" in name:
            assert factors.setdefault(name.rpartition(".")[2], factor) == factor, name
    return factors


OTHERS = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("hc", "mhc", "isohc", "harmonized")]


@pytest.mark.parametrize("kind", ["hybrid", *OTHERS])
def test_phi_alone_decays(kind):
    [job], [trainer] = run_ranks(in_a_job, 1, kind), run_ranks(in_the_trainer, 1, kind)
    own = {"blend_logit": 0.0} if kind == "hybrid" else {}
    assert of_connections(job) == of_connections(trainer) == {"phi": 1.0, "alpha": 0.0, "bias": 0.0, **own}
