"""README says what the refusals say."""

from pathlib import Path

import pytest

from pipehc.megatron.job.support import COLUMNS, FEATURES, main, options, refusal, table

ROOT = Path(__file__).parents[3]


def test_readme_has_the_table():
    readme = (ROOT / "README.md").read_text()
    assert f"\n\n{table()}\n\n" in readme and f"{len(options())} options that are refused" in readme.replace("\n", " ")


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.name)
def test_every_feature_is_tested_or_refused_somewhere(feature):
    assert (ROOT / "tests" / "megatron" / "job" / feature.test).is_file()
    refused = [refusal(feature, column) for column in COLUMNS]
    assert feature.test != "test_refusals.py" or any(refused)
    assert None in refused or feature.test == "test_refusals.py"


def test_the_command_prints_both(capsys):
    main()
    printed = capsys.readouterr().out
    assert table() in printed and all(line in printed for line in options())
