"""Recorded steps, with nodes, in every drawing: real recordings' kinds of spans, counted where they come out."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from browser import browse
from rich.console import Console

from pipehc.schedules import Costs, Span, build, compile, simulate
from pipehc.schedules.__main__ import main
from pipehc.schedules.draw import Timeline, chrome_trace, page, png, recorded, svg
from pipehc.schedules.draw.colors import KINDS, color
from pipehc.schedules.draw.terminal import show
from pipehc.schedules.draw.timeline import HEIGHTS
from pipehc.schedules.recording import Recording

NODES = ("0.attention", "0.dispatch", "0.mlp", "0.combine", "0.mlp_post")


def recording(step: int | None = 6, pipeline: int = 0, schedule: str = "dualpipe", nodes: bool = True) -> Recording:
    """A simulated step as if it had been recorded: every action has nodes, the last one of them on the high queue."""
    program = compile(build(schedule, 4, 8), recompute=True)
    spans = list(simulate(program, Costs(f=5, b=5, w=4, r=1, link=1.5)).spans)
    for span in [span for span in spans if span.queue == "compute" and nodes]:
        length = (span.end - span.start) / len(NODES)
        for i, name in enumerate(NODES):
            begin = span.start + i * length
            what = f"{span.kind}{span.microbatch} {name}"
            queue = "high" if name.endswith("post") else "node"
            spans.append(Span(span.rank, queue, begin, begin + length, what, *span[5:9]))  # type: ignore[arg-type]
    title = f"{schedule}: 4 ranks, 8 micro-batches, step {step}"
    return Recording(title, program.schedule, True, tuple(spans), step, pipeline, "cpu")


def timeline(**options) -> Timeline:
    found = recording(**options)
    return recorded(found.spans, found.title, where=found.where)


def shown(t: Timeline) -> int:
    return sum(len(track) for row in t.rows for track in row.tracks)


def test_every_queue_of_a_span_has_a_line_with_a_height() -> None:
    """A queue that no drawing knows was what ended all of them."""
    t = timeline()
    assert {row.name for row in t.rows} == set(HEIGHTS) == {"compute", "nodes", "high", "comm"}
    assert shown(t) == sum(span.end > span.start for span in t.spans)
    assert {span.queue for span in t.spans} == {"compute", "wait", "node", "high", "send", "recv"}


def test_svg_has_every_span_the_names_of_lines_and_a_legend_for_every_colour() -> None:
    t = timeline()
    root = ElementTree.fromstring(svg([t]))
    space = "{http://www.w3.org/2000/svg}"
    assert sum(box.find(f"{space}title") is not None for box in root.iter(f"{space}rect")) == shown(t)
    texts = [text.text for text in root.iter(f"{space}text")]
    assert [texts.count(name) for name in ("nodes", "high", "comm", "step 6 rank 2")] == [4, 4, 4, 1]
    assert {"forward", "recompute", "expert all-to-all", "wait for a message"} <= set(texts)
    right = max(float(box.get("x", 0)) + float(box.get("width", "0").rstrip("%")) for box in root.iter(f"{space}rect"))
    assert right <= 1400


def test_png_has_the_colours_of_nodes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    import matplotlib.image

    png([timeline()], tmp_path / "s.png", width=12, dpi=60)
    pixels = (matplotlib.image.imread(tmp_path / "s.png")[:, :, :3] * 255).round().astype(int)
    seen = {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in pixels.reshape(-1, 3)}
    tints = {color("exchange", chunk, 2) for chunk in (0, 1)}  # only nodes have it
    assert tints <= seen


def test_chrome_trace_has_a_thread_for_nodes() -> None:
    t = timeline()
    events = json.loads(chrome_trace([t]))["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(t.spans)
    threads = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert threads == {"compute", "wait", "node", "high", "send", "recv"}


def test_terminal_names_the_step_and_sums_up_the_nodes() -> None:
    t = timeline()
    console = Console(file=io.StringIO(), width=160, color_system=None)
    show([t], console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert sum(line.startswith("step 6 rank 3 ") for line in lines) >= 2  # in the grid, and in the table
    row = next(line.split() for line in lines if line.startswith("dispatch"))
    forwards = sum(span.end - span.start for span in t.spans if span.what.endswith(".dispatch") and span.kind == "F")
    assert float(row[1]) == pytest.approx(forwards, abs=0.06)


# Clicks every box off and on again, and counts the pixels of a node's colour: zero with its row hidden.
PROBE = """
const failures = [], check = (name, ok) => { if (!ok) failures.push(name); };
const boxes = [...document.querySelectorAll("header input")].map(box => box.id);
check("boxes " + boxes, boxes.join() === EXPECTED_BOXES);
for (const panel of panels) {
  const {canvas, context} = panel, full = panel.height;
  const total = panel.timeline.rows.flatMap(row => row[2]).reduce((sum, track) => sum + track.length, 0);
  check("drawn " + canvas.dataset.drawn + " of " + total, +canvas.dataset.drawn > 0.5 * total);
  const pixels = () => {
    const wanted = NODE_COLOURS, found = context.getImageData(0, 0, canvas.width, canvas.height).data;
    let count = 0;
    for (let i = 0; i < found.length; i += 4) {
      const hex = "#" + [0, 1, 2].map(k => found[i + k].toString(16).padStart(2, "0")).join("");
      if (wanted.includes(hex)) count++;
    }
    return count;
  };
  const hasNodes = panel.timeline.rows.some(row => row[1] === "nodes");
  check("nodes seen", pixels() > 50 === hasNodes);
  for (const id of boxes) {
    const before = panel.height;
    document.getElementById(id).click();
    const there = panel.timeline.rows.some(row => row[1] === id);
    check("row " + id + " goes", (panel.height < before) === there);
    if (id === "nodes") check("nodes hidden", pixels() === 0);
    document.getElementById(id).click();
  }
  check("all rows again", panel.height === full);
  const track = panel.tracks.find(t => t.name === "nodes");
  if (track) {
    const span = track.spans[0], x = toX(panel, (span[START] + span[STOP]) / 2), box = canvas.getBoundingClientRect();
    canvas.dispatchEvent(new MouseEvent("mousemove", {clientX: box.left + x, clientY: box.top + track.y + 3}));
    check("tip " + tip.textContent, tip.style.display === "block" && tip.textContent.includes(", node"));
  }
}
document.body.dataset.probe = failures.length ? "FAILED: " + failures.join("; ") : "passed";
"""


def probe(boxes: str) -> str:
    colours = json.dumps([color("exchange", chunk, 2) for chunk in (0, 1)])
    return PROBE.replace("NODE_COLOURS", colours).replace("EXPECTED_BOXES", json.dumps(boxes))


def test_page_shows_nodes_in_a_browser(tmp_path: Path) -> None:
    """Boxes for the rows that are there, no error on the console, boxes of nodes on the screen."""
    assert browse(page([timeline(), timeline(nodes=False)]), probe("nodes,high,comm"), tmp_path) == "passed"


def test_page_without_messages_or_nodes_shows_in_a_browser(tmp_path: Path) -> None:
    alone = recorded([Span(0, "compute", 0, 9, "0F0", "F", 0, 0, 0), Span(0, "node", 1, 8, "F0 0.combine", "F", 0, 0, 0)], "one")
    assert browse(page([alone]), probe("nodes"), tmp_path) == "passed"


def test_the_legend_names_every_colour() -> None:
    text = page([timeline()])
    for kind in ("F", "I", "W", "R", "exchange", "activation", "gradient", "wait"):
        assert f"</i>{KINDS[kind][1]}</span>" in text


def test_the_command_line_takes_several_steps_and_pipelines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    names = []
    for step, pipeline in ((6, 0), (6, 1), (7, 0)):
        names.append(str(tmp_path / f"{step}-{pipeline}.json"))
        recording(step=step, pipeline=pipeline).save(names[-1])
    files = {kind: str(tmp_path / f"s.{kind}") for kind in ("svg", "html", "trace")}
    assert main(["show", names[0], "--png", str(tmp_path / "s.png")]) == 0
    assert main(["show", *names, *(part for kind, path in files.items() for part in (f"--{kind}", path))]) == 0
    assert capsys.readouterr() == ("", "")
    assert all(Path(path).stat().st_size > 1000 for path in files.values())
    assert main(["show", *names]) == 0
    out = capsys.readouterr().out
    for where in ("step 6 rank 1 ", "step 6 pipeline 1 rank 1 ", "step 7 rank 1 "):
        assert out.count(where) >= 4  # grid and table, predicted and measured
    assert main(["show", *names, "--step", "7"]) == 0
    out = capsys.readouterr().out
    assert "step 7 rank 0" in out and "step 6" not in out


@pytest.mark.parametrize(
    ("kept", "complaint"),
    [
        (lambda span: False, "holds no forward of stage 0"),
        (lambda span: span.queue == "wait", "holds no forward of stage 0"),
        (lambda span: span.queue == "node", "holds no forward of stage 0"),
        (lambda span: span.stage != 1, "holds no forward of stage 1"),
        (lambda span: span.kind == "F", "has no backward: not a whole recording"),
        (lambda span: span.kind != "F" or span.pair is None, "has no forward: not a whole recording"),
    ],
)
def test_a_recording_that_is_not_whole_is_refused_in_a_sentence(tmp_path, capsys, kept, complaint) -> None:
    found = recording()
    replace(found, spans=tuple(filter(kept, found.spans))).save(tmp_path / "x.json")
    assert main(["show", str(tmp_path / "x.json")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and complaint in captured.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["a.json", "--step", "9"], "error: --step 9: no such step; there are 6"),
        (["a.json", "1f1b"], "error: 1f1b: recorded steps are shown below their own"),
        (["a.json", "--compare", "1f1b"], "error: --compare: recorded steps are shown below their own"),
        (["1f1b", "zbv", "--ranks", "2", "--microbatches", "6"], "error: 1f1b zbv: several names are for recorded steps"),
        (["1f1b", "--ranks", "2", "--microbatches", "6", "--step", "3"], "error: --step 3: is for recorded steps"),
        (["a.json", "a.json", "--csv", "x.csv"], "error: --csv x.csv: holds one schedule, and there are 2"),
        (["none.json"], "error: [Errno 2]"),
    ],
)
def test_what_cannot_be_shown_is_told(tmp_path, monkeypatch, capsys, arguments, complaint) -> None:
    monkeypatch.chdir(tmp_path)
    recording().save("a.json")
    assert main(["show", *arguments]) == 2
    assert capsys.readouterr().err.startswith(complaint)
