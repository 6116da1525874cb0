"""What a study leaves: a CSV with a row a run, a report whose sentences stand under their verdict, small pictures."""

import csv
import io

import pytest
from rich.console import Console
from study_cases import STUDY

from pipehc.studies import ablation
from pipehc.studies.catalogue import STUDIES
from pipehc.studies.design import Report, Row, Statement, Table
from pipehc.studies.document import as_csv, as_markdown, png, show
from pipehc.studies.figures import curves, differences
from pipehc.studies.paired import gap

ROWS = [
    Row("a", {"kind": "mhc", "seed": 1}, {"val_loss": 2.5, "gain": None}),
    Row("b", {"kind": "hc", "seed": 1, "lr": 0.1}, {"val_loss": None, "gain": 3.0}, broke_at=7),
]
REPORT = Report(
    [Table("Losses", ("residual", "a|b"), (("mhc", "1"),), note="of one run")],
    [Statement("differs", "It is not so."), Statement("agrees", "It is so.")],
    rules=["By hand."],
)


def test_csv_has_a_row_a_run_and_nothing_where_nothing_was_measured():
    found = list(csv.DictReader(io.StringIO(as_csv(ROWS, [1.5, 2.5]))))
    assert found == [
        {"run": "a", "kind": "mhc", "seed": "1", "lr": "", "broke_at": "", "seconds": "1.5", "val_loss": "2.5", "gain": ""},
        {"run": "b", "kind": "hc", "seed": "1", "lr": "0.1", "broke_at": "7", "seconds": "2.5", "val_loss": "", "gain": "3.0"},
    ]


def test_report_says_how_it_was_made_and_what_broke():
    text = as_markdown(STUDY, REPORT, ROWS, {"command": "`x`", "seeds": "1"})
    assert "- command: `x`\n- seeds: 1\n- broke off: b at step 7\n" in text
    assert text.index("## Agrees with the papers\n\n- It is so.") < text.index(
        "## Does not agree with the papers\n\n- It is not so."
    )
    assert "| residual | a\\|b |\n| --- | ---: |\n| mhc | 1 |\n\nof one run\n" in text
    assert "open" not in text and "## How the sentences were chosen\n\n- By hand." in text


def test_terminal_shows_tables_and_sentences():
    console = Console(record=True, width=100, quiet=False, file=io.StringIO())
    show(REPORT, console)
    text = console.export_text()
    assert "mhc" in text and "Does not agree with the papers: It is not so." in text


def test_pictures_are_small_files():
    runs = ablation.runs("small", 6)
    report = ablation.summarise(
        [Row(r.name, r.factors, {"val_loss": 2.0 + 0.01 * len(r.name) * (-1) ** k}) for k, r in enumerate(runs)]
    )
    [picture] = [png(figure) for figure in report.figures]
    assert picture.startswith(b"\x89PNG") and len(picture) < 100_000


def test_a_picture_leaves_out_what_is_not_there():
    from matplotlib.figure import Figure

    one, two = Figure().subplots(1, 2)
    differences(one, {"mhc": gap([0.1, 0.2]), "hc": None}, "x")
    curves(two, {"mhc": {1: [2.0, 4.0], 2: []}, "hc": {}}, "x", "y", "xy")
    assert [list(line.get_ydata()) for line in two.lines] == [[3.0]] and two.get_xscale() == "log"


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_reports_even_when_every_run_broke(name):
    study = STUDIES[name]
    if study.command == "plan":
        return
    runs = study.runs("small", 2)
    keys = study.summarise.__globals__.get("PARTS") or {"init": ("full", "half")}.get(name, ())
    known = ("val_loss", "val_accuracy", "gain", "drift", "gain_most", "broke", "warned", "warned_before",
             "gradient_off", "gain_end", "gradient_ratio",
             "transported_off", "target_off", "gain_bound", *keys)  # fmt: skip
    report = study.summarise([Row(r.name, r.factors, dict.fromkeys(known), broke_at=3) for r in runs])
    assert all(statement.verdict in ("open", "measured", "differs") for statement in report.statements)
    assert all(png(figure) for figure in report.figures)
