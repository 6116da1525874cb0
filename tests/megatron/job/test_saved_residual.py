"""A checkpoint of a job says which residual it was trained with."""

import multiprocessing

import pytest
import torch
from megatron_job import initialize, model_config, provider
from processes import run_ranks

from pipehc.megatron import enable


def build(residual):
    from pipehc.megatron import build_model_chunks

    return build_model_chunks(provider(model_config(layers=2)), "1f1b", residual=residual)[0]


def test_another_residual_is_refused_unless_it_is_asked_for(tmp_path, capfd):
    def both(rank):
        from megatron.core import dist_checkpointing

        multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  (saving starts a helper process)
        initialize()
        with enable("1f1b", residual={"kind": "mhc", "streams": 2}):
            dist_checkpointing.save({"model": build({"kind": "mhc", "streams": 2}).sharded_state_dict(), "iteration": 3}, tmp_path)

        def load(residual, **options):
            with enable("1f1b", residual=residual, **options):
                return dist_checkpointing.load({"model": build(residual).sharded_state_dict()}, tmp_path)

        found = load({"kind": "mhc", "streams": 2, "alpha": 0.5})  # where weights begin
        assert set(found) == {"model", "iteration"} and found["iteration"] == 3
        with pytest.raises(ValueError, match=r"another residual: residual.kind = 'mhc' then, 'isohc' now.* allow_changes=True"):
            load({"kind": "isohc", "streams": 2})
        with pytest.raises(ValueError, match=r"residual.sinkhorn_iterations = 20 then, 5 now; give"):
            load({"kind": "mhc", "streams": 2, "sinkhorn_iterations": 5})
        other = load({"kind": "isohc", "streams": 2}, allow_changes=True)
        for name, value in found["model"].items():
            assert not isinstance(value, torch.Tensor) or torch.equal(value, other["model"][name])

    run_ranks(both, 1)
    assert "goes on with another residual: residual.kind = 'mhc' then, 'isohc' now" in capfd.readouterr().out
