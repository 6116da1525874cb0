"""Checkpoints whose hyper-connections are not those of the model: a plain one starts an mHC job, and nothing is lost silently."""

import contextlib
import io
import multiprocessing
import warnings

import megatron_job
import pytest
from processes import run_ranks

from pipehc.megatron import enable


def model(residual=None, pp=1):
    from pipehc.megatron import build_model_chunks

    (chunk,) = build_model_chunks(megatron_job.provider(megatron_job.model_config(layers=4, pp=pp)), "megatron", residual=residual)
    megatron_job.initialise(chunk)
    return chunk


def load(model, folder, **more):
    """The warnings, and what was printed."""
    from megatron.core import dist_checkpointing

    printed = io.StringIO()
    state = {"model": model.sharded_state_dict(), **more}
    with warnings.catch_warnings(record=True) as said, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        model.load_state_dict(dist_checkpointing.load(state, str(folder))["model"])
    return [str(w.message) for w in said if "pipehc" in str(w.message)], printed.getvalue()


def save(model, folder):
    from megatron.core import dist_checkpointing

    multiprocessing.current_process()._config["daemon"] = False  # Megatron's writer starts a process of its own
    folder.mkdir(exist_ok=True)
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(folder), async_sharded_save=False)


def from_plain(rank, folder):
    """Losses of the plain model, and of the one that starts from its checkpoint."""
    plain = megatron_job.Job(schedule=None, layers=4, pp=2)
    save(plain.chunks[0].module, folder)
    expected = plain.evaluate(0, 2)
    with enable("megatron", residual="mhc", from_plain=True):
        mhc = model(pp=2)
        fresh = {}
        for name, parameter in mhc.named_parameters():
            if "_connection." not in name:
                parameter.data.zero_()
            elif name.endswith("alpha"):
                parameter.data.fill_(0.01)  # as in a model of the trainer's, or of a job
            fresh[name] = parameter.detach().clone()
        said, printed = load(mhc, folder)
        assert not said and all((p == fresh[name]).all() for name, p in mhc.named_parameters() if "_connection." in name)
        assert printed.startswith("pipehc: checkpoint ") == ("24 tensors" in printed) == (rank == 0)
        with pytest.raises(ValueError, match=r"its optimizer state is of a plain model; name it with --pretrained-checkpoint"):
            load(mhc, folder, optimizer={})
        plain.chunks = [mhc]
        return expected, plain.evaluate(0, 2)


def test_a_plain_checkpoint_starts_a_job_with_hyper_connections(tmp_path):
    """At nearly the plain loss: the streams start equal, and the maps near the identity."""
    expected, found = run_ranks(from_plain, 2, tmp_path)[0]
    assert found == pytest.approx(expected, abs=0.01)


def the_other_way(rank, folder):
    """What is said of checkpoints that have other hyper-connections than the model."""
    megatron_job.initialize()
    save(model("hybrid"), folder / "hybrid")
    save(model("mhc"), folder / "mhc")
    save(model(), folder / "plain")
    found = {}
    with enable("1f1b"):
        found["dropped"] = load(model(), folder / "hybrid")
        found["nothing"] = load(model(), folder / "plain")
    with enable("1f1b", residual="hybrid"):
        found["equal"] = load(model(), folder / "hybrid")
    with enable("1f1b", residual="mhc"):
        found["fewer"] = load(model(), folder / "hybrid")
        with pytest.raises(ValueError, match=r"plain: has no hyper-connections, the model has; .*from_plain=True"):
            load(model(), folder / "plain")
    with enable("1f1b", residual="hybrid", from_plain=True), pytest.raises(ValueError, match=r"another form, without 8 .*blend"):
        load(model(), folder / "mhc")
    return found


def test_hyper_connections_that_a_load_drops_are_named(tmp_path):
    (found,) = run_ranks(the_other_way, 1, tmp_path)
    assert found["nothing"] == found["equal"] == ([], "")
    (dropped,), _ = found["dropped"]
    assert "hybrid: 32 tensors of hyper-connections (such as decoder.layers.0.attention_connection.alpha) that the" in dropped
    (fewer,), _ = found["fewer"]
    assert "8 tensors" in fewer and "blend_logit" in fewer and "residual=..." in fewer
