"""The plug-in under the versions of megatron-core it allows, installed in turn; others are refused by name at start."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import megatron_job
import pytest
from processes import run_ranks

import pipehc.megatron
from pipehc.megatron import versions

STANDARD = {"multi_latent_attention": False}
JOBS = {
    **{name: {"schedule": name} for name in ("dualpipe", None)},
    "dualpipev": {"schedule": "dualpipev", "vpp": 2},
    "hybrid, two chunks": {"schedule": "dualpipev", "vpp": 2, "pattern": "*|-|*|E", "options": STANDARD},
}
"""Arguments of jobs (schedule None: Megatron's own): two pipeline ranks, mHC, experts with biases that follow the load."""


def figures():
    """job -> ([(loss, gradient norm)] of two steps, evaluation loss), under whatever version is imported."""
    assert pipehc.megatron.build_model_chunks and pipehc.megatron.forward_backward_func  # imported once, for all children
    import megatron.core.models.gpt.gpt_model
    import megatron.core.optimizer  # noqa: F401

    return {
        str(name): run_ranks(megatron_job.train, 2, dict(pp=2, layers=4, residual="mhc", **more), 2, 8)[0]
        for name, more in JOBS.items()
    }


def report():
    """For the process that has another version on its path."""
    from importlib.metadata import version

    print("FIGURES", json.dumps([version("megatron-core"), figures()]))


def run_with(version, folder, function):
    """Standard output of `function` of this file in a process of its own with that version of megatron-core; its exit code."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), f"megatron-core=={version}"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"megatron-core {version} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    path = os.pathsep.join(map(str, (folder, Path(__file__).parent, Path(__file__).parents[1] / "helpers")))
    command = [sys.executable, "-W", "ignore", "-c", f"import test_versions; test_versions.{function}()"]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)


@functools.cache
def figures_here():
    return json.loads(json.dumps(figures()))


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.17.1", "0.18.2"])
def test_every_allowed_version_trains_the_same(version, tmp_path):
    done = run_with(version, tmp_path, "report")
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    installed, found = json.loads(line.removeprefix("FIGURES "))
    assert installed == version
    for schedule, (steps, evaluation) in figures_here().items():
        found_steps, found_evaluation = found[schedule]
        for (loss, norm), (expected_loss, expected_norm) in zip(found_steps, steps):
            assert loss == pytest.approx(expected_loss, abs=1e-6), schedule
            assert norm == pytest.approx(expected_norm, rel=1e-5), schedule
        assert found_evaluation == pytest.approx(evaluation, abs=1e-6), schedule


@pytest.mark.slow
def test_an_older_version_is_refused_at_start(tmp_path):
    done = run_with("0.16.1", tmp_path, "report")
    assert done.returncode == 1
    assert "ValueError: megatron-core 0.16.1: not supported; must be one of 0.17, 0.18, 0.19" in done.stderr


@pytest.mark.parametrize("version", ["0.16.9", "0.20.0rc1", "1.17.0"])
@pytest.mark.parametrize("name", pipehc.megatron.__all__)
def test_every_entry_refuses_other_versions(name, version, monkeypatch):
    monkeypatch.setattr("megatron.core.__version__", version)
    with pytest.raises(ValueError, match=f"megatron-core {version}: not supported; must be one of 0.17, 0.18, 0.19"):
        getattr(pipehc.megatron, name)


@pytest.mark.parametrize("version", ["0.17.0", "0.18.2", "0.19.2+0123abc", "0.19.3"])
def test_versions_that_are_allowed(version, monkeypatch):
    monkeypatch.setattr("megatron.core.__version__", version)
    versions.check_version()
    assert pipehc.megatron.hyper_connection_layer_spec


def test_the_trainer_refuses_what_its_optimizer_cannot_use(monkeypatch):
    def refused(rank):
        from pipehc.megatron.trainer.groups import build_groups

        monkeypatch.setattr("megatron.core.__version__", "0.18.2")
        with pytest.raises(ValueError, match=r"megatron-core 0.18.2: the trainer needs 0.19; the plug-in"):
            build_groups(1, 1, 1, False)
        return True

    assert run_ranks(refused, 1) == [True]


def test_muon_is_refused_where_it_cannot_know_replicas(monkeypatch):
    versions.refuse_optimizer("dist_muon")
    monkeypatch.setattr("megatron.core.__version__", "0.17.1")
    versions.refuse_optimizer("adam")
    with pytest.raises(
        ValueError, match=r"optimizer = 'dist_muon'\): not supported .* megatron-core 0.17.1; use adam or sgd, or 0.18"
    ):
        versions.refuse_optimizer("dist_muon")
