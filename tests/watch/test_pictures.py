"""What the pictures and tables of runs show, and the files they are written to."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from browser import browse
from diagnosed_runs import write_run
from rich.console import Console

from pipehc.diagnostics import main
from pipehc.watch.pictures.columns import columns, figure
from pipehc.watch.pictures.depth import depth_panels
from pipehc.watch.pictures.line import Line
from pipehc.watch.pictures.maps import heat_maps
from pipehc.watch.pictures.panel import Chosen
from pipehc.watch.pictures.run import read_runs
from pipehc.watch.pictures.steps import step_panels
from pipehc.watch.pictures.terminal import show, sparkline

MAPPED = {
    "Gain of single maps",
    "Composite gain from there to the end",
    "Composite gain of the whole depth",
    "Similarity of streams",
}
ALWAYS = {"Loss", "Gradient norm of the parameters", "Gradient norm of streams", "Norm of streams"}


def chosen(*folders):
    return [Chosen(number, run, run.last) for number, run in enumerate(read_runs(folders))]


def panels(runs):
    return {panel.title: panel for panel in (*step_panels(runs), *depth_panels(runs))}


def raw(folder, name="diagnostics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def curves(panel, number, meaning=None):
    return [curve for curve in panel.curves if curve.number == number and meaning in (None, curve.meaning)]


@pytest.mark.parametrize("kind", ["none", "hc", "mhc", "isohc", "hybrid", "harmonized"])
def test_panels_of_each_kind(tmp_path, kind):
    found = panels(chosen(write_run(tmp_path / "a", kind)))
    expected = ALWAYS | (set() if kind == "none" else MAPPED) | ({"Harmonized: s"} if kind == "harmonized" else set())
    assert set(found) == expected
    target = found["Composite gain of the whole depth"].levels if kind != "none" else []
    assert list(target) == ([(5.0, 0, "target")] if kind == "harmonized" else [])


def test_curves_are_the_figures_of_the_files(tmp_path):
    folders = [write_run(tmp_path / "plain", "none", steps=30), write_run(tmp_path / "a", "harmonized", blocks=5, streams=3)]
    found = panels(chosen(*folders))
    line, metrics = raw(folders[1])[-1], [raw(folder, "metrics.jsonl")[1:] for folder in folders]
    for title, name in (("Gain of single maps", "gain"), ("Composite gain from there to the end", "composite")):
        forward, backward = curves(found[title], 1)
        assert forward.x.tolist() == list(range(10)) and forward.y.tolist() == line[name]["forward"]
        assert backward.y.tolist() == line[name]["backward"] and backward.style != forward.style
    gradient, transported = curves(found["Gradient norm of streams"], 1)
    assert gradient.y.tolist() == line["gradient"] and transported.y.tolist() == line["transported"]
    assert curves(found["Gradient norm of streams"], 0)[0].y.tolist() == raw(folders[0])[-1]["gradient"]
    assert curves(found["Similarity of streams"], 1)[0].y.tolist() == line["similarity"]
    assert curves(found["Loss"], 1, "")[0].y.tolist() == [each["loss"] for each in metrics[1]]
    assert curves(found["Loss"], 1, "validation")[0].x.tolist() == [0, 10, 20, 30, 40]
    (gap,) = found["Loss minus that of plain"].curves
    assert gap.number == 1 and gap.x.tolist() == list(range(1, 31))  # the steps of both
    assert gap.y.tolist() == [a["loss"] - b["loss"] for a, b in zip(metrics[1], metrics[0])]
    whole = curves(found["Composite gain of the whole depth"], 1, "of a diagnosed sequence")[0]
    assert whole.x.tolist() == [10, 20, 30, 40]
    assert whole.y.tolist() == [max(each["composite"][way][0] for way in ("forward", "backward")) for each in raw(folders[1])]
    assert found["Harmonized: s"].curves[0].y.tolist() == [each["s"] for each in raw(folders[1])]


def test_axes_are_logarithmic_where_gains_explode(tmp_path):
    found = panels(chosen(write_run(tmp_path / "deep", "hc", blocks=20), write_run(tmp_path / "a", "mhc")))
    assert found["Composite gain from there to the end"].log and not found["Gain of single maps"].log
    assert not panels(chosen(tmp_path / "a"))["Composite gain from there to the end"].log


def test_many_steps_are_drawn_with_their_running_mean(tmp_path):
    faint, mean, _ = panels(chosen(write_run(tmp_path / "a", "none", steps=200)))["Loss"].curves
    assert len(faint.x) == 200 and (faint.style, mean.meaning) == ("faint", "mean of 5 steps")
    assert mean.x[0] == 5 and mean.y[0] == pytest.approx(faint.y[:5].mean()) and mean.y[-1] == pytest.approx(faint.y[-5:].mean())


def test_heat_maps_are_those_chosen(tmp_path):
    (one,) = chosen(write_run(tmp_path / "a", "mhc"))
    found = heat_maps(one.line)
    titles = ["sub-layer 0 (attention)", "sub-layer 3 (FFN)", "sub-layer 5 (FFN)", "product of all 6"]
    assert [each.title for each in found] == titles
    assert found[1].matrix.tolist() == raw(tmp_path / "a")[-1]["maps"][3]
    assert [each.title[:11] for each in heat_maps(one.line, [4, 1, 99])] == ["sub-layer 4", "sub-layer 1", "product of "]


def test_layers_of_a_hybrid_model_are_sub_layers(tmp_path):
    (line, *_) = raw(write_run(tmp_path / "a", "mhc"))
    found = Line(**line, layers="*E+-*-")
    assert [found.name_of(l) for l in range(6)] == ["attention", "FFN"] * 3
    assert Line(**line, layers="E*GM+-").name_of(0) == "FFN"
    with pytest.raises(ValueError, match="layers has 2 symbols: must be 6 for 6 sub-layers"):
        Line(**line, layers="*E")


def printed(*runs):
    console = Console(file=io.StringIO(), width=140)
    show(runs, console)
    return console.file.getvalue()


def test_the_table_of_a_run(tmp_path):
    folder = write_run(tmp_path / "a", "isohc")
    lines = raw(folder)
    lines[1]["warnings"] = [f"number {i} [red]" for i in range(7)]
    lines[-1]["gain"]["forward"][2] = None
    (folder / "diagnostics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = printed(*chosen(folder))
    assert text.startswith("a (isohc, 4 streams, step 40), 6 sub-layers\n")
    row = next(line for line in text.splitlines() if line.startswith("3 FFN"))
    assert figure(lines[-1]["composite"]["backward"][3]) in row and figure(lines[-1]["gradient"][3]) in row
    assert "not finite*" in text and "rows: one of" not in text
    assert "warning at step 20: number 4 [red]\n" in text and "number 5" not in text and "and 2 more warnings" in text
    assert re.search(r"composite gain, largest over the depth: \S{4}  1\.\d+ to 1\.\d+, largest 1\.\d+ at step \d0\n", text)


def test_deep_tables_stay_short_and_keep_extremes(tmp_path):
    (one,) = chosen(write_run(tmp_path / "a", "hc", blocks=30))
    text = printed(one)
    assert text.count("\n") < 32 and "rows: one of every 6 sub-layers" in text
    shown = {int(number) for number in re.findall(r"^(\d+) (?:FFN|attention)", text, re.M)}
    found = columns(one.line, brief=True)
    assert shown - set(range(0, 60, 6)) - {59} and {one.line.gain.forward.argmax(), one.line.gain.backward.argmax()} <= shown
    assert len([column for column in found if column.group == "distance"]) == 0  # nothing constrains hc
    assert [column.name for column in columns(one.line) if column.group == "distance"] == ["rows", "columns", "orthogonality"]


def test_sparklines():
    assert sparkline(np.array([0.0, 1, 2, 7])) == "▁▂▃█" and sparkline(np.array([1.0, 1.0])) == "▁▁"
    assert sparkline(np.array([1.0, 10, 100, np.nan])) == "▁▄█×" or sparkline(np.array([1.0, 10, 100, np.nan])) == "▁▅█×"
    assert len(sparkline(np.arange(1000.0))) == 24 and sparkline(np.array([np.nan])) == "×"


def test_tables_need_no_matplotlib_and_pictures_say_so(tmp_path):
    folder = write_run(tmp_path / "a", "mhc", steps=10)
    code = "import sys; sys.modules['matplotlib'] = None; from pipehc.diagnostics import main; sys.exit(main(sys.argv[1:]))"
    for more, rc, words in (([], 0, "composite gain"), (["--png", str(tmp_path / "x.png")], 2, "pip install 'pipehc[viz]'")):
        done = subprocess.run([sys.executable, "-c", code, str(folder), *more], capture_output=True, text=True)
        assert done.returncode == rc and words in done.stdout + done.stderr


def test_files_of_runs_of_other_depth_and_width(tmp_path):
    """Beside a plain run one of 9 streams whose gain is not finite; the page in a browser."""
    folders = [write_run(tmp_path / "a<b>", "none"), write_run(tmp_path / "deep", "hc", blocks=5, streams=9)]
    lines = raw(folders[1])
    lines[-1] |= {"composite": dict.fromkeys(("forward", "backward"), [None] * 10), "warnings": ["composite <gain>"]}
    (folders[1] / "diagnostics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    png, html = tmp_path / "x.png", tmp_path / "x.html"
    assert main([*map(str, folders), "--png", str(png), "--html", str(html)]) == 0
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and png.stat().st_size > 100_000
    text = html.read_text()
    assert len(text) < 500_000 and "a&lt;b&gt; (none, step 40)" in text and "step 40: composite &lt;gain&gt;" in text
    assert not re.search(r"<script|<link|<img|url\((?!#)|@import|src=", text)
    assert set(re.findall(r"https?://[^\"]*", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    named = re.findall(r' id="([^"]*)"', text)
    assert len(named) == len(set(named))
    probe = "document.body.dataset.probe = [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width > 200)"
    assert browse(text, probe, tmp_path) == ",".join(["true"] * 3)
