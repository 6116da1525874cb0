"""Every study: its runs can be trained, and its sentences follow from made-up numbers by the rules that it states."""

import json
from pathlib import Path

import pytest
from config_cases import CONFIGS

from pipehc.studies import ablation, initialisation, overhead, retrieval, scaling, stability
from pipehc.studies.asked import Place, configuration
from pipehc.studies.catalogue import STUDIES
from pipehc.studies.design import Row
from pipehc.studies.outcome import End, Outcome


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("scale", ["small", "paper"])
def test_runs_can_be_trained_and_have_names_of_their_own(name, scale):
    runs = STUDIES[name].runs(scale, 2)
    assert len({run.name for run in runs}) == len({tuple(run.factors.items()) for run in runs}) == len(runs)
    place = Place(Path("out"), CONFIGS)
    configs = [configuration(run, place) for run in runs if run.factors.get("seed", 1) == 1]
    same = [config.model_dump(exclude={"run"}) for config in configs]
    assert all(one not in same[:k] for k, one in enumerate(same))  # no two runs are one
    for config in configs:
        interval, steps = config.evaluation.interval, config.train.steps
        assert name == "overhead" or (interval and steps % interval == 0)


@pytest.mark.parametrize("study, parts", [("scaling", 4), ("init", 2)])
def test_parts_of_a_training_are_evaluated(study, parts):
    for scale in ("small", "paper"):
        for run in STUDIES[study].runs(scale, 1):
            config = configuration(run, Place(Path("out"), CONFIGS))
            assert config.train.steps % parts == 0 and config.train.steps // parts % config.evaluation.interval == 0
            assert config.optimizer.decay == ()  # or an earlier loss is not that of a shorter training


def verdicts(report):
    return [statement.verdict for statement in report.statements]


def made(runs, value):
    """Rows with val_loss etc. as `value` says by factors."""
    return [Row(run.name, run.factors, value(run.factors), None) for run in runs]


def test_ablation_compares_shares_with_table_1():
    gains = {"res": -0.022, "res+pre": -0.025, "res+pre+post": -0.027}

    def loss(factors):
        by_map = gains.get(factors["maps"], 0.0) if factors["kind"] == "hc" else 0.0
        return {"val_loss": 2.0 + factors["seed"] + by_map * (1 + 0.01 * factors["seed"])}

    report = ablation.summarise(made(ablation.runs("small", 3), loss))
    assert verdicts(report) == ["agrees"] * 4 + ["measured"]
    assert "81 %" in report.statements[3].text
    gains["res"] = 0.022
    assert verdicts(ablation.summarise(made(ablation.runs("small", 3), loss))) == [
        "differs",
        "agrees",
        "agrees",
        "differs",
        "measured",
    ]


def test_init_takes_means_over_cells_by_seed():
    def loss(factors):
        noise = 0.001 * factors["seed"] * (-1) ** factors["seed"]
        better = {"staggered": -0.05, "even": -0.01}.get(factors["init"], 0.0) if factors["kind"] == "mhc" else 0.1
        value = 2.0 + factors["seed"] + (0.0 if factors["kind"] == "none" else better + noise)
        return {"full": value, "half": value + 1}

    report = initialisation.summarise(made(initialisation.runs("small", 4), loss))
    said = {s.text.split(":")[0]: s for s in report.statements if s.verdict != "measured"}
    assert said["mhc"].verdict == "agrees" and "best start is staggered" in said["mhc"].text
    assert said["hc"].verdict == "differs"
    [more] = [s.text for s in report.statements if s.verdict == "measured" and s.text.startswith("mhc")]
    assert "staggered less even is -0.0400" in more and "better than even" in more


def test_scaling_looks_at_every_size_and_at_the_change():
    def loss(factors):
        gap = {"w32": -0.03, "w96": 0.02}[factors["size"]] * (factors["kind"] == "mhc")
        return dict.fromkeys(scaling.PARTS, 2.0 + factors["seed"] + gap * (1 + 0.01 * factors["seed"]))

    assert verdicts(scaling.summarise(made(scaling.runs("small", 3), loss))) == ["agrees", "differs", "differs"]


def test_retrieval_tells_equal_from_not_decided():
    accuracy = {"hc": 0.9, "harmonized": 0.91, "mhc": 0.7, "none": 0.8, "isohc": 0.8}

    def value(factors):
        seed = factors["seed"]
        return {"course": accuracy[factors["kind"]] + 0.001 * seed * (-1) ** seed * (factors["kind"] != "hc"),
                "val_loss": 1.0, "gain": 4.0, "drift": 0.5 + 0.01 * seed, "gain_most": 5.5}  # fmt: skip

    runs = retrieval.runs("small", 4)
    assert verdicts(retrieval.summarise(made(runs, value))) == ["agrees", "agrees", "agrees", "agrees", "measured"]
    accuracy["harmonized"], accuracy["mhc"] = 0.5, 0.95
    assert verdicts(retrieval.summarise(made(runs, value)))[:2] == ["differs", "differs"]


def test_overhead_is_relative_to_the_plain_residual():
    steps = {"hc": 104.0, "mhc": 106.0, "isohc": 105.0, "hybrid": 110.0, "harmonized": 104.0}
    rest = {"plain_ms": 100.0, "memory_gib": 11.0, "plain_gib": 10.0}
    report = overhead.summarise(made(overhead.runs("small", 0), lambda factors: {"step_ms": steps[factors["kind"]], **rest}))
    assert verdicts(report) == ["agrees", "agrees"]
    assert ("27b", "mhc", "106", "+6.0 %", "11.00", "+1.00 (+10.0 %)") in report.tables[0].rows
    steps["isohc"], steps["mhc"] = 120.0, 115.0
    assert (
        verdicts(overhead.summarise(made(overhead.runs("small", 0), lambda f: {"step_ms": steps[f["kind"]], **rest})))
        == ["differs"] * 2
    )


def stable(factors):
    """As the papers have it: hc runs away at depth, and is warned of."""
    hc = factors["kind"] == "hc" and factors["blocks"] == 24
    return {
        "val_loss": None if hc else 2.0, "broke": 40 if hc else None, "warned": 30 if hc else None,
        "warned_before": 1.0 if hc else None, "gradient_off": 0.02, "gain_end": 90.0 if hc else 1.5,
        "gain_most": 100.0 if hc else 1.6, "gradient_ratio": 2.0, "transported_off": 0.01, "target_off": 0.1, "gain_bound": 20.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "kind, key, number, place",
    [
        ("hc", "gain_most", 10.0, 0), ("hc", "warned_before", 0.0, 1), ("mhc", "gain_most", 2.1, 2),
        ("isohc", "gradient_off", 0.06, 3), ("isohc", "transported_off", 0.06, 4),
        ("harmonized", "target_off", 0.3, 5), ("isohc", "broke", 70, 6),
    ],
)  # fmt: skip
def test_stability_has_a_bound_for_every_claim(kind, key, number, place):
    runs = stability.runs("small", 3)
    assert verdicts(stability.STUDY.summarise(made(runs, stable))) == ["agrees"] * 7
    one = next(run.name for run in runs if run.factors["kind"] == kind and run.factors["blocks"] == 24)
    rows = [
        Row(r.name, r.factors, {**r.values, key: number} if r.name == one or kind == "hc" else r.values) for r in made(runs, stable)
    ]
    assert verdicts(stability.STUDY.summarise(rows))[place] == "differs"


def test_stability_decides_nothing_where_nothing_breaks():
    rows = [row._replace(values={**row.values, "broke": None}) for row in made(stability.runs("small", 3), stable)]
    assert [verdicts(stability.STUDY.summarise(rows))[k] for k in (1, 6)] == ["open", "open"]


def diagnosed(folder, kind, lines, losses, broke_at=None, gains=()):
    folder.mkdir()
    (folder / "diagnostics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": k + 1, "loss": x} | dict(zip(["gain"], gains[k : k + 1]))) + "\n" for k, x in enumerate(losses))
    )
    run = next(run for run in stability.runs("small", 1) if run.factors["kind"] == kind)
    config = configuration(run, Place(folder.parent))
    from pipehc.config.loading import to_yaml

    (folder / "config.yaml").write_text(to_yaml(config))
    return stability.measure(Outcome(run, folder, End(broke_at, 1.0)))


def line(step, gains, **more):
    composite = {"forward": gains, "backward": gains}
    return {"step": step, "composite": composite, "gradient": [1.0, 2.0, 4.0], "transported": [1.0, 1.02, 1.04], **more}


def test_stability_measures_what_the_files_say(tmp_path):
    copies = "the streams are still all but copies of each other"
    lines = [line(5, [1.0, 2.0], warnings=[copies]), line(10, [30.0, 3.0], warnings=["gain"]), line(15, [4.0, None])]
    found = diagnosed(tmp_path / "a", "hc", lines, [3.0] * 5 + [2.0] * 9 + [9.0])
    assert (found["warned"], found["broke"], found["gain_most"], found["gain_end"]) == (10, 15, float("inf"), float("inf"))
    assert found["warned_before"] == 1.0  # the first of the five steps is 11
    late = [lines[0], line(11, [30.0, 3.0], warnings=["gain"])]
    assert diagnosed(tmp_path / "d", "hc", late, [3.0] * 5 + [2.0] * 9 + [9.0])["warned_before"] == 0.0
    assert found["gradient_ratio"] == 4.0 and found["transported_off"] == pytest.approx(0.04)
    assert diagnosed(tmp_path / "b", "hc", lines[:2], [3.0, 2.0], broke_at=3)["broke"] == 3
    assert diagnosed(tmp_path / "c", "hc", lines[:2], [3.0, 2.0, 4.0] * 3)["broke"] is None  # single batches differ


def test_stability_asks_for_the_target_when_the_feedback_has_settled(tmp_path):
    """The warm-up has 10 steps, the target is 5: means over twenty steps count, a hundred steps after the gain first reached it."""
    wild = [20.0, 0.0] * 50 + [20.0]  # reaches it at step 1
    for name, gains, off in (
        ("a", [*wild, *[4.0, 5.0] * 20], 0.1), ("b", [*wild, *[6.5] * 40], 0.3), ("c", [4.9] * 200, None), ("d", [20.0] * 120, None)
    ):  # fmt: skip
        found = diagnosed(tmp_path / name, "harmonized", [line(1, [1.0])], [3.0] * len(gains), gains=gains)["target_off"]
        assert found == (off and pytest.approx(off)), name


def test_stability_of_the_plain_residual_has_no_maps(tmp_path):
    found = diagnosed(tmp_path / "a", "none", [{"step": 5, "gradient": [1.0, 3.0]}], [3.0])
    assert found["gradient_ratio"] == 3.0 and found["gain_end"] is None and found["transported_off"] is None
