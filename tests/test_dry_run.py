"""A dry run is the program: what it counts equals what the same program does to real tensors, to the byte."""

import json
import multiprocessing
import os

import preloaded  # noqa: F401
import pytest
from processes import run_ranks
from tiny_model import tiny_config

BASE = ("parallel.pp=4", "schedule.name=dualpipe", "train.global_batch=16", "recompute.enabled=true")


def dry(overrides, rank, device):
    """One step of one rank, in a process of its own; maps by the reference and attention as a CPU chooses it, on either device."""
    config = tiny_config(*BASE, *overrides)

    def fn(_):
        os.environ |= {"PIPEHC_KERNELS": "reference", "CUDA_VISIBLE_DEVICES": ""}
        from pipehc.dry_run import run_rank
        from pipehc.megatron import meta

        meta._patch_attention = lambda: None
        return run_rank(config, rank, device=device, host=True)

    return run_ranks(fn, 1, init=False)[0]


def same(overrides, rank):
    counted, real = dry(overrides, rank, "meta"), dry(overrides, rank, "cpu")
    for where in counted.launches.keys() | real.launches.keys():
        if where.kind not in ("setup", "host"):
            assert counted.launches.get(where) == real.launches.get(where), where
    assert counted.peaks.keys() == real.peaks.keys()
    for moment, peak in counted.peaks.items():
        other = real.peaks[moment]
        assert (peak.total, peak.bytes, peak.at) == (other.total, other.bytes, other.at), moment
        # Some 8 bytes of the set-up are made by another operation.
        assert [(key[:2], size) for key, size in peak.makers] == [(key[:2], size) for key, size in other.makers], moment
    assert counted.persistent == real.persistent
    assert counted.saved == real.saved
    assert sum(o.flops for counts in counted.launches.values() for o in counts) > 0


EXPERTS = ("parallel.ep=2", "parallel.dp=2", "train.global_batch=32", "train.precision=bf16")
OTHERS = {
    "dualpipev": ("schedule.name=dualpipev", "parallel.pp=2"),
    "interleaved": ("schedule.name=interleaved", "parallel.pp=2"),
    "deferred FFN": ("schedule.name=zbv", "schedule.deferred=[ffn]", "parallel.pp=2"),
    "1f1b without recomputation": ("schedule.name=1f1b", "recompute.enabled=false"),
    "dualpipe without recomputation": ("recompute.enabled=false",),
    "without overlap": ("runtime.overlap=false",),
    "recompute blocks": ("recompute.block=1",),
    "experts over two ranks": EXPERTS,
    **{kind: (f"residual.kind={kind}",) for kind in ("none", "hybrid", "harmonized")},
    "masked labels": ("data.kind=retrieval", "data.pairs=3", "residual.streams=16"),
    "multi-token prediction": ("model.mtp_depth=2", *EXPERTS),
    "multi-token prediction over one direction": ("model.mtp_depth=1", "schedule.name=1f1b", "parallel.pp=2"),
    "static": ("residual.kind=harmonized", "residual.static=true"),
    "tensor parallelism": ("parallel.tp=2", "parallel.pp=2", "train.sequence_length=12", "recompute.modules=[mla_up_proj]"),
}


def test_counts_are_those_of_real_tensors():
    same(EXPERTS, 1)


# Most are the same on every rank, the embedding aside, which the first has.
CASES = [*((case, 1) for case in OTHERS), ("dualpipev", 0), ("multi-token prediction", 0), ("tensor parallelism", 0)]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "rank"), CASES)
def test_counts_are_those_of_real_tensors_elsewhere(case, rank):
    same(OTHERS[case], rank)


def test_saved_activations_are_those_of_the_plan_and_of_the_first_step():
    from pipehc.planning.activations import planned

    found = dry((), 1, "meta").saved
    plan = planned(tiny_config(*BASE))
    assert found.keys() == {1, 2}
    for stage, saved in found.items():  # Table 3: nC at the start of a block, C a sub-layer, (n + 2) C rebuilt
        assert (saved.streams, saved.outputs, saved.connections) == (plan[stage].streams, plan[stage].outputs, 0)
        assert 0.4 * plan[stage].rebuilt < saved.rebuilt < 2 * plan[stage].rebuilt


@pytest.mark.slow
@pytest.mark.parametrize(("placement", "family"), [("bidirectional", "dualpipe"), ("v", "dualpipev"), ("linear", "zb_h1")])
def test_costs_before_there_is_a_schedule_are_those_of_a_dry_run_with_one(placement, family):
    """Of the same placement: of one micro-batch a direction what is counted of many. Messages too."""
    from pipehc.schedules import Costs

    def found(*overrides):
        config = tiny_config(*BASE, "parallel.pp=2", *overrides)

        def fn(_):
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
            multiprocessing.current_process()._config["daemon"] = False  # ranks are processes of their own
            from pipehc.dry_run import costs_for_search, dry_runs
            from pipehc.planning.dry_run.hardware import load_hardware

            hardware = load_hardware("h100")
            if config.schedule.name == "auto":
                return costs_for_search(config, hardware)
            return dry_runs([config], hardware)[0].step.costs

        return run_ranks(fn, 1, init=False)[0]

    before, after = found("schedule.name=auto", f"search.placement={placement}"), found(f"schedule.name={family}")
    assert (before.stages, before.link, before.latency) == (after.stages, after.link, after.latency) and before.link > 0
    for stage in range(before.stages):
        for kind in "FBWR":
            assert before.time(kind, stage) == pytest.approx(after.time(kind, stage), rel=0.03), (kind, stage)
    assert Costs.from_json(before.to_json()) == before


def test_the_command_prints_what_a_plan_needs(tmp_path, monkeypatch, capsys):
    from tiny_model import DEMO, TINY

    from pipehc.plan import main

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    arguments = ["--config", str(DEMO), *TINY, *BASE, "parallel.pp=2", "train.global_batch=40", "--dry-run"]
    page = tmp_path / "step.html"
    assert main([*arguments, "--html", str(page)]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    tables = "Peak memory", "kept by F", "NCCL, estimated", "F + R + B + W", "step, simulated", "What the residual costs"
    for words in (*tables, "host-bound"):
        assert words in text
    assert "simulated from a dry run" in page.read_text()
    assert main([*arguments, "--json", "--gpu", "a100", "--ranks", "0"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpu"].startswith("A100") and found["plain_residual"]["residual"] == "none"
    assert (found["microbatches"], found["microbatches_run"]) == (20, 8)
    [rank] = found["ranks"]
    assert (rank["rank"], rank["mirror"], rank["stages"], rank["fits"]) == (0, 1, [0, 1], True)
    assert sum(rank["bytes"].values()) == rank["peak_bytes"]
    assert {(a["stage"], a["action"]) for a in found["actions"]} == {(s, kind) for s in (0, 1) for kind in "FRBW"}
    for share in found["shares"]:
        whole = sum(a["device_ms"] for a in found["actions"] if a["stage"] == share["stage"])
        parts = {name: ms for name, ms in share.items() if name != "stage"}
        assert sum(parts.values()) == pytest.approx(whole) and min(parts.values()) > 0, share
    assert [share["stage"] for share in found["shares"]] == [0, 1]
    assert all(share["connections"] == 0 < share["attention"] for share in found["plain_residual"]["shares"])
    assert found["step"]["ms"] > found["step"]["pipeline_ms"] > 0
