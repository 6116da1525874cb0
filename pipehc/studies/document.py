"""What a study leaves: results.csv, figures, report.md, and tables on the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from pipehc.studies.design import Figure, Report, Row, Study, Table
from pipehc.studies.outcome import Outcome
from pipehc.watch.whole_file import write_whole

_VERDICTS = {
    "agrees": "Agrees with the papers",
    "differs": "Does not agree with the papers",
    "open": "Not decided by these numbers",
    "measured": "Measured",
}


def rows_of(study: Study, outcomes: Sequence[Outcome]) -> list[Row]:
    return [Row(o.run.name, o.run.factors, study.measure(o), o.end.broke_at) for o in outcomes]


def write_all(
    study: Study, report: Report, rows: Sequence[Row], outcomes: Sequence[Outcome], facts: Mapping[str, str], out: Path
) -> None:
    """Into the folder `out`, each file whole or not at all. facts: lines of the report's head, by what they are about."""
    write_whole(out / "results.csv", as_csv(rows, [o.end.seconds for o in outcomes]))
    for figure in report.figures:
        write_whole(out / f"{figure.name}.png", png(figure))
    write_whole(out / "report.md", as_markdown(study, report, rows, facts))


def as_csv(rows: Sequence[Row], seconds: Sequence[float]) -> str:
    """A row a run; empty where there is nothing."""
    factors = list(dict.fromkeys(key for row in rows for key in row.factors))
    values = list(dict.fromkeys(key for row in rows for key in row.values))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *factors, "broke_at", "seconds", *values])
    for row, took in zip(rows, seconds, strict=True):
        named = [row.factors.get(key, "") for key in factors]
        writer.writerow([row.name, *named, row.broke_at, took, *(row.values.get(key) for key in values)])
    return text.getvalue()


def as_markdown(study: Study, report: Report, rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    lines = [f"# Study `{study.name}`", "", study.question, ""]
    lines += [f"- {key}: {value}" for key, value in facts.items()]
    broken = [row for row in rows if row.broke_at is not None]
    if broken:
        lines.append(f"- broke off: {', '.join(f'{row.name} at step {row.broke_at}' for row in broken)}")
    for verdict, title in _VERDICTS.items():
        if found := [statement.text for statement in report.statements if statement.verdict == verdict]:
            lines += ["", f"## {title}", "", *(f"- {text}" for text in found)]
    for table in report.tables:
        lines += ["", f"## {table.title}", "", *_table(table)]
    for figure in report.figures:
        lines += ["", f"![{figure.title}]({figure.name}.png)", "", f"*{figure.title}*"]
    if report.rules:
        lines += ["", "## How the sentences were chosen", "", *(f"- {rule}" for rule in report.rules)]
    return "\n".join(lines) + "\n"


def show(report: Report, console: Console) -> None:
    for table in report.tables:
        shown = RichTable(title=table.title, title_justify="left", caption=table.note or None, caption_justify="left")
        for k, column in enumerate(table.columns):
            shown.add_column(escape(column), justify="right" if k else "left")
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console.print(shown)
    for verdict, title in _VERDICTS.items():
        for statement in report.statements:
            if statement.verdict == verdict:
                console.print(f"{title}: {statement.text}", markup=False, highlight=False)


def check_matplotlib() -> None:
    """Raises ValueError, before hours of runs, if figures cannot be drawn."""
    try:
        import matplotlib  # noqa: F401 - an extra
    except ModuleNotFoundError:
        raise ValueError("a study draws figures with matplotlib, which is not installed: pip install 'pipehc[viz]'") from None


def png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=figure.inches, dpi=100, layout="constrained")
    FigureCanvasAgg(drawing)
    figure.draw(drawing)
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _table(table: Table) -> list[str]:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    lines = [row(table.columns), row(["---"] + ["---:"] * (len(table.columns) - 1)), *map(row, table.rows)]
    return [*lines, "", table.note] if table.note else lines
