"""The timeline as a colour grid in the terminal: one line per rank, as wide as the terminal, in as many blocks as that takes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.style import Style
from rich.table import Table
from rich.text import Text

from pipehc.schedules.draw.axis import ticks
from pipehc.schedules.draw.colors import KINDS, color, ink
from pipehc.schedules.draw.timeline import Timeline
from pipehc.schedules.spans import Span

_BLOCKS = 10  # a step fills at most so many lines a rank


def show(timelines: Sequence[Timeline], console: Console) -> None:
    """Prints grids and summaries. Numbers are micro-batches; without colours a letter tells the kind (F B I W R, . is a wait)."""
    letters = console.color_system is None
    per_char = min(_time_per_character(timeline, letters) for timeline in timelines)
    # The shortest action of a recorded step may be very short.
    per_char = max(per_char, max(timeline.end for timeline in timelines) / (_BLOCKS * console.width))
    for timeline in timelines:
        console.print(Text(timeline.title, style="bold"))
        for line in _grid(timeline, per_char, letters, console.width):
            console.print(line, no_wrap=True, overflow="ignore", crop=False)
        console.print(_summary(timeline))
        if any(span.queue == "node" for span in timeline.spans):
            console.print(_nodes(timeline))
    if not letters:
        there = {span.kind for timeline in timelines for span in timeline.spans if span.queue == "compute"}
        legend = [Text(f" {name} ", Style(color=ink(color(k)), bgcolor=color(k))) for k, (_, name) in KINDS.items() if k in there]
        console.print(Text(" ").join(legend))


def _time_per_character(timeline: Timeline, letters: bool) -> float:
    """So that the number of the last micro-batch fits into the shortest action, with a space after it."""
    compute = [s for s in timeline.spans if s.queue == "compute" and s.end > s.start]
    shortest = min((s.end - s.start for s in compute), default=1.0)
    longest = len(str(max((s.microbatch for s in compute), default=0)))
    return shortest / (longest + letters + 1)


def _grid(timeline: Timeline, per_char: float, letters: bool, width: int) -> list[Text]:
    name = len(timeline.row(timeline.ranks - 1)) + 1
    characters = max(1, round(timeline.end / per_char))
    lines = [_line(timeline, rank, per_char, characters, letters) for rank in range(timeline.ranks)]
    block = max(20, width - name)
    result: list[Text] = []
    for start in range(0, characters, block):
        axis = [" "] * block
        for tick in ticks(timeline.end, max(2, characters // 20)):
            label, at = f"|{tick:g}{timeline.unit}", round(tick / per_char) - start
            if at >= 0 and at + len(label) <= block:
                axis[at : at + len(label)] = label
        result.append(Text(" " * name + "".join(axis).rstrip(), style="dim"))
        for rank, line in enumerate(lines):
            result.append(Text(f"{timeline.row(rank)} ".rjust(name)) + line[start : min(start + block, characters)])
    return result


def _line(timeline: Timeline, rank: int, per_char: float, characters: int, letters: bool) -> Text:
    cells: list[tuple[str, Style | None]] = [(" ", None)] * characters
    for span in timeline.spans:
        if span.rank != rank or span.queue not in ("compute", "wait"):
            continue
        first, last = round(span.start / per_char), min(round(span.end / per_char), characters)
        if last <= first:
            continue
        text, style = _cell(timeline, span, letters)
        cells[first:last] = [(c, style) for c in text[: last - first].ljust(last - first, "." if span.queue == "wait" else " ")]
    line = Text()
    for style, run in groupby(cells, key=lambda cell: cell[1]):
        line.append("".join(character for character, _ in run), style)
    return line


def _cell(timeline: Timeline, span: Span, letters: bool) -> tuple[str, Style | None]:
    if span.queue == "wait":
        return "", Style(color=color("wait"))
    text = (span.kind if letters else "") + (str(span.microbatch) if span.microbatch >= 0 else span.what)
    if letters:
        return text, None
    back = color(span.kind, *timeline.chunk(span))
    return text, Style(color=ink(back), bgcolor=back, underline=span.pair is not None)


def _summary(timeline: Timeline) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("rank", "busy", "idle", "exposed", "hidden R", "peak live"):
        table.add_column(heading, justify="right")
    percent = 100 / timeline.end if timeline.end else 0.0
    for rank, s in enumerate(timeline.summaries):
        live = "" if s.peak_live is None else f"{s.peak_live:g}"
        shares = (f"{x:.6g} ({percent * x:.1f} %)" for x in (s.busy, s.idle, s.exposed))
        table.add_row(timeline.row(rank).removeprefix("rank "), *shares, f"{s.hidden:g}", live)
    return table


def _nodes(timeline: Timeline) -> Table:
    """Time in the nodes of all ranks, by what they are (a node is called BLOCK.KIND) and the action they are a part of."""
    spent: dict[str, dict[str, float]] = {}
    for span in timeline.spans:
        if span.queue in ("node", "high"):
            times = spent.setdefault(span.what.rsplit(".", 1)[-1], {})
            times[span.kind] = times.get(span.kind, 0.0) + span.end - span.start
    kinds = [kind for kind in KINDS if any(kind in times for times in spent.values())]
    table = Table(box=None, pad_edge=False)
    for heading in (f"{timeline.where}all ranks, time in nodes", *(KINDS[kind][1] for kind in kinds)):
        table.add_column(heading, justify="right" if table.columns else "left")
    for name, times in spent.items():
        table.add_row(escape(name), *(f"{times[kind]:.1f}" if kind in times else "" for kind in kinds))
    return table
