"""Drawings agree with the spans they are made of; the HTML page is driven in headless Chromium where there is one."""

from __future__ import annotations

import io
import json
import re
import struct
import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest
from browser import browse
from rich.console import Console

from pipehc.schedules import Costs, Span, build, compile
from pipehc.schedules.draw import Timeline, chrome_trace, page, png, recorded, simulated, svg
from pipehc.schedules.draw.axis import ticks
from pipehc.schedules.draw.terminal import show

COSTS = Costs(f=4, b=4, w=4, r=1, link=1.5, latency=0.5)


def timelines() -> list[Timeline]:
    return [simulated(compile(build(name, 4, 10), recompute=True), COSTS) for name in ("dualpipe", "1f1b")]


def shown(timeline: Timeline) -> int:
    return sum(len(track) for row in timeline.rows for track in row.tracks)


def test_rows_hold_every_span_once_and_nothing_overlaps_on_a_track() -> None:
    for timeline in timelines():
        spans = [span for row in timeline.rows for track in row.tracks for span in track]
        assert sorted(spans, key=repr) == sorted((s for s in timeline.spans if s.end > s.start), key=repr)
        for row in timeline.rows:
            for track in row.tracks:
                assert all(span.rank == row.rank for span in track)
                assert all(one.end <= two.start + 1e-6 for one, two in pairwise(track))
        for summary in timeline.summaries:
            assert summary.busy + summary.exposed + summary.idle == pytest.approx(timeline.end)


def test_a_recording_is_summed_up_like_the_simulation_it_could_be() -> None:
    """The same spans without the simulator's own sums: busy must agree, exposed at least bound it from below (links may queue)."""
    for timeline in timelines():
        again = recorded(timeline.spans, "again")
        for one, two in zip(timeline.summaries, again.summaries):
            assert two.busy == pytest.approx(one.busy)
            assert two.exposed <= one.exposed + 1e-6
            assert two.busy + two.exposed + two.idle == pytest.approx(timeline.end)
        assert sum(s.exposed for s in again.summaries) > 0.5 * sum(s.exposed for s in timeline.summaries) > 0


def test_waiting_for_a_message_that_is_not_sent_yet_is_idle_not_exposed() -> None:
    spans = [
        Span(0, "compute", 0, 10, "0F0", "F", 0, 0, 0),
        Span(0, "send", 10, 13, "activation 1.0", "activation", 0, 1, 0),
        Span(1, "recv", 10, 13, "activation 1.0", "activation", 0, 1, 0),
        Span(1, "wait", 0, 13, "wait activation 1.0", "activation", 0, 1, 0),
        Span(1, "compute", 13, 20, "1F0", "F", 0, 1, 0),
    ]
    assert [tuple(s[:3]) for s in recorded(spans, "two ranks").summaries] == [(10, 0, 10), (7, 3, 10)]
    with pytest.raises(ValueError, match="empty: no spans recorded"):
        recorded([], "empty")


def test_terminal_grid_shows_every_action_in_order() -> None:
    schedule = build("dualpipe", 4, 10)
    timeline = simulated(schedule, Costs(f=4, b=4, w=4))
    console = Console(file=io.StringIO(), width=400, color_system=None)
    show([timeline], console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for rank in range(4):
        line = next(line for line in text.splitlines() if line.startswith(f"rank {rank} "))
        printed = re.findall(r"[FBIWR]\d+", line)
        spans = sorted((s for s in timeline.spans if s.rank == rank and s.queue == "compute"), key=lambda s: s.start)
        assert printed == [f"{s.kind}{s.microbatch}" for s in spans]


def test_terminal_grid_breaks_into_blocks_and_colours() -> None:
    timeline = simulated(build("1f1b", 2, 12), COSTS)
    plain, colour = (Console(file=io.StringIO(), width=60, color_system=system) for system in (None, "truecolor"))
    colour._force_terminal = True
    for console in (plain, colour):
        show([timeline, timeline], console)
    lines = plain.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 60 and sum(line.startswith("rank 0 ") for line in lines) > 4
    assert "\x1b[" in colour.file.getvalue() and "\x1b[" not in plain.file.getvalue()  # type: ignore[attr-defined]


def test_svg_has_a_box_with_a_tooltip_for_every_span() -> None:
    both = timelines()
    root = ElementTree.fromstring(svg(both))
    space = "{http://www.w3.org/2000/svg}"
    boxes = [box for box in root.iter(f"{space}rect") if box.find(f"{space}title") is not None]
    assert len(boxes) == sum(map(shown, both))
    first = next(s for s in both[0].spans if s.what == "0F0")
    tip = next(box for box in boxes if box.findtext(f"{space}title", "").startswith("0F0, rank 0, compute: 0 to 4"))
    last = max(float(box.get("x", 0)) + float(box.get("width", 0)) for box in boxes)
    end = max(timeline.end for timeline in both)
    assert float(tip.get("width", 0)) / (last - 70) == pytest.approx((first.end - first.start) / end, rel=0.01)


def test_chrome_trace_has_every_span_and_an_arrow_per_message() -> None:
    both = timelines()
    events = json.loads(chrome_trace(both))["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == sum(len(timeline.spans) for timeline in both)
    assert {event["pid"] for event in complete} == set(range(8))
    sends = sum(span.queue == "send" for timeline in both for span in timeline.spans)
    starts, ends = ({e["id"]: e for e in events if e["ph"] == phase} for phase in "sf")
    assert len(starts) == len(ends) == sends > 50
    for key, start in starts.items():
        assert start["pid"] != ends[key]["pid"] and start["ts"] < ends[key]["ts"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {names[e["pid"], e["tid"]] for e in complete} >= {"compute", "wait", "send", "recv"}


def test_png_is_drawn_without_a_display(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    png(timelines(), tmp_path / "s.png", width=10, dpi=60)
    data = (tmp_path / "s.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width == 600 and height > 150
    import matplotlib.image

    pixels = matplotlib.image.imread(tmp_path / "s.png")
    assert len({tuple(p) for p in (pixels[::2, ::2, :3] * 255).astype(int).reshape(-1, 3)}) > 50  # boxes, not a blank sheet


def test_png_without_matplotlib_says_what_to_install(tmp_path: Path) -> None:
    script = """
        import sys
        sys.modules["matplotlib"] = None
        from pipehc.schedules.__main__ import main
        sys.exit(main(["show", "1f1b", "--ranks", "2", "--microbatches", "4", "--png", sys.argv[1]]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "s.png")], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'pipehc[viz]'" in done.stderr and "Traceback" not in done.stderr


def test_page_needs_no_network_and_holds_the_spans() -> None:
    both = timelines()
    text = page(both)
    assert not re.search(r"https?://|src=|@import|url\(", text) and "@@" not in text
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S).group(1))  # type: ignore[union-attr]
    for timeline, packed in zip(both, data["timelines"]):
        assert sum(len(track) for _, _, tracks in packed["rows"] for track in tracks) == shown(timeline)
        assert packed["ranks"] == 4 and packed["end"] == timeline.end
        for rank, row in enumerate(timeline.summaries):
            assert f"<tr><td>{rank}</td>" in text and f"{row.busy:g} (" in text


def test_page_is_safe_from_what_spans_and_titles_say() -> None:
    timeline = recorded([Span(0, "compute", 0, 1, "</script><b>", "F", 0, 0, 0)], "<i>&")
    text = page([timeline])
    assert "</script><b>" not in text and "<i>&" not in text and "&lt;i&gt;&amp;" in text


def test_ticks_are_round_and_cover_the_axis() -> None:
    for end in (0.0, 0.37, 1.0, 63, 2520, 1e6):
        found = ticks(end)
        assert found[0] == 0 and found[-1] <= end + 1e-9 and len(found) <= 13
        assert end == 0 or end - found[-1] <= (found[1] - found[0]) * (1 + 1e-9)


PROBE = """
const failures = [], check = (name, ok) => { if (!ok) failures.push(name); };
const canvas = panels[0].canvas, box = () => canvas.getBoundingClientRect();
const at = (x, y) => ({clientX: box().left + x, clientY: box().top + y});
const fire = (kind, x, y) => canvas.dispatchEvent(new MouseEvent(kind, at(x, y)));
const target = panels[0].tracks.find(t => t.rank === 2 && t.name === "compute");
const span = target.spans.find(s => s[QUEUE] !== "wait");
const middle = toX(panels[0], (span[START] + span[STOP]) / 2);
fire("mousemove", middle, target.y + 5);
check("hover " + tip.textContent, tip.style.display === "block" && tip.textContent.includes("rank 2, compute"));
check("two canvases", panels.length === 2 && panels.every(p => +p.canvas.dataset.drawn > 100));
const before = +canvas.dataset.drawn;
canvas.dispatchEvent(new WheelEvent("wheel", {...at(middle, 20), deltaY: -900, cancelable: true}));
check("zoom", view.to - view.from < 0.4 * END && +canvas.dataset.drawn < before);
check("zoom keeps the place", Math.abs(toX(panels[0], (span[START] + span[STOP]) / 2) - middle) < 2);
check("both zoom", panels.every(p => +p.canvas.dataset.drawn < before));
fire("dblclick", middle, 20);
check("whole step again", view.from === 0 && view.to === END);
const height = panels[0].height;
document.getElementById("comm").click();
check("communication rows go", panels[0].height < height);
fire("click", middle, panels[0].tracks.find(t => t.rank === 2).y + 5);
check("follow", followed && followed[1] === span[MICROBATCH]);
const pixels = panels[0].context.getImageData(0, 0, canvas.width, canvas.height).data, seen = new Set();
for (let i = 0; i < pixels.length; i += 4) seen.add(pixels[i] * 65536 + pixels[i + 1] * 256 + pixels[i + 2]);
check("colours " + seen.size, seen.size > 20);
document.body.dataset.probe = failures.length ? "FAILED: " + failures.join("; ") : "passed";
"""


def test_page_works_in_a_browser(tmp_path: Path) -> None:
    assert browse(page(timelines()), PROBE, tmp_path) == "passed"
