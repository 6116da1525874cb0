"""Reading run folders for their pictures: what is there, what a crash leaves, and how bad files are told."""

import json

import numpy as np
import pytest
from diagnosed_runs import write_run

from pipehc.diagnostics import main
from pipehc.watch.pictures.run import read_runs


def lines_of(folder):
    return (folder / "diagnostics.jsonl").read_text().splitlines()


def refused(arguments, capsys):
    """The sentence with which the command says no."""
    assert main([str(each) for each in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_figures_are_those_of_the_files(tmp_path):
    folder = write_run(tmp_path / "a", "harmonized", blocks=2)
    (run,) = read_runs([folder])
    raw = [json.loads(line) for line in lines_of(folder)]
    assert run.name == "a" and list(run.lines) == [10, 20, 30, 40] and run.target_gain == 5.0
    assert run.at(20).gain.backward.tolist() == raw[1]["gain"]["backward"]
    assert run.last.maps.tolist() == raw[-1]["maps"] and run.last.s == raw[-1]["s"]
    assert run.last.whole_gain == max(raw[-1]["composite"]["forward"][0], raw[-1]["composite"]["backward"][0])
    assert run.metrics[0].val_loss == 5.55 and run.metrics[0].loss is None and len(run.metrics) == 41


def test_null_is_not_finite_and_absent_is_none(tmp_path):
    folder = write_run(tmp_path / "a", "hc", blocks=1, streams=2)
    line = json.loads(lines_of(folder)[0])
    line |= {"loss": None, "gradient": [None, 1.0, 2], "warnings": ["gain above 20"]}
    del line["similarity"]
    (folder / "diagnostics.jsonl").write_text(json.dumps(line) + "\n")
    (found,) = read_runs([folder])
    assert np.isnan(found.last.loss) and np.isnan(found.last.gradient[0]) and found.last.gradient[2] == 2
    assert found.last.similarity is None and found.target_gain is None and found.warnings == [(10, "gain above 20")]


def test_a_cut_last_line_is_left_out(tmp_path):
    folder = write_run(tmp_path / "a", "mhc")
    for name, steps in (("diagnostics.jsonl", [10, 20, 30]), ("metrics.jsonl", list(range(40)))):
        text = (folder / name).read_text()
        (folder / name).write_text(text[:-20])
        (run,) = read_runs([folder])
        assert list(run.lines if name == "diagnostics.jsonl" else run.metrics) == steps


def test_a_damaged_line_is_told_with_its_number(tmp_path, capsys):
    folder = write_run(tmp_path / "a", "mhc", blocks=2)
    path, good = folder / "diagnostics.jsonl", lines_of(folder)

    def told(line):
        path.write_text("\n".join([good[0], line, good[2]]) + "\n")
        text = refused([folder], capsys)
        assert f"{path}, line 2: " in text
        return text

    assert "is damaged" in told(good[1][:50])
    line = json.loads(good[1])
    assert "gain.forward has shape [3]: must be [4] for 4 sub-layers and 4 streams" in told(
        json.dumps(line | {"gain": {"forward": [1.0] * 3, "backward": [1.0] * 4}})
    )
    assert "stream_norm has shape [4, 4]: must be [5, 4]" in told(json.dumps(line | {"stream_norm": line["stream_norm"][1:]}))
    assert "maps: must be a list of numbers" in told(json.dumps(line | {"maps": [[1.0, 2.0], [3.0]]}))
    assert "step: " in told(json.dumps({key: value for key, value in line.items() if key != "step"}))
    assert "must be one JSON object" in told("[1, 2]")
    path.write_text("\n".join(good) + "\n")
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*metrics[:3], "{", *metrics[4:]]))
    assert f"{folder / 'metrics.jsonl'}, line 4: is damaged" in refused([folder], capsys)


def test_folders_without_diagnostics(tmp_path, capsys):
    assert "nothing: there is no such run folder" in refused([tmp_path / "nothing"], capsys)
    assert "diagnostics.interval" in refused([tmp_path], capsys)
    (tmp_path / "diagnostics.jsonl").write_text('{"step": 10, "kin')
    assert "has no whole line yet" in refused([tmp_path], capsys)
    folder = write_run(tmp_path / "a", "harmonized")
    (folder / "config.yaml").write_text("residual: [")
    assert "config.yaml: has no readable residual.target_gain" in refused([folder], capsys)


def test_steps_and_maps_that_are_not_there(tmp_path, capsys):
    few, many = write_run(tmp_path / "few", "mhc"), write_run(tmp_path / "many", "mhc", blocks=1, steps=70, interval=2)
    assert "--step 15: few has no such diagnosed step; must be one of 10, 20, 30, 40" in refused([few, "--step", "15"], capsys)
    assert "one of 35 from 2 to 70, the nearest are 14 and 16" in refused([many, "--step", "15"], capsys)
    assert "--maps 1,6: must be sub-layers from 0 to 5" in refused([few, "--maps", "1,6", "--png", "x.png"], capsys)
    assert main([str(few), "--step", "20"]) == 0 and "step 20" in capsys.readouterr().out


def test_names_tell_runs_apart(tmp_path, capsys):
    first, second = write_run(tmp_path / "1" / "a", "mhc", steps=10), write_run(tmp_path / "2" / "a", "mhc", steps=10)
    third = write_run(tmp_path / "b", "none", steps=10)
    runs = read_runs([first, second, third / "diagnostics.jsonl"])
    assert [run.name for run in runs] == [str(first), str(second), "b"] and runs[2].metrics
    earlier = (third / "diagnostics.jsonl").rename(third / "diagnostics-1.jsonl")
    (run,) = read_runs([earlier])
    assert run.name == str(earlier) and not run.metrics  # which are of a later training
    assert "is named twice" in refused([first, first / "."], capsys)


@pytest.mark.parametrize("kind", ["none", "hc", "mhc", "isohc", "hybrid", "harmonized"])
def test_drawn_maps_have_their_invariants(tmp_path, kind):
    """Of the helper: pictures of impossible runs would prove little."""
    line = read_runs([write_run(tmp_path / "a", kind, blocks=4)])[0].last
    if kind == "none":
        assert line.streams == 1 and line.gain is line.maps is line.similarity is None and line.gradient.shape == (9,)
        return
    assert line.distance.rows.max() < (1e-9 if kind in ("mhc", "isohc", "hybrid") else 10)
    assert line.distance.orthogonality.max() < (1e-9 if kind == "isohc" else 10)
    assert line.transported[-1] == pytest.approx(line.gradient[-1])
    assert line.composite.forward[-1] == line.gain.forward[-1]
