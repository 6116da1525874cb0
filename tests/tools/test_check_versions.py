"""Other versions of Triton and torch, installed in turn: here the oldest Triton with one map, the rest by hand."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import check_versions

QUICK = ["tests/kernels/test_hybrid.py"]


@pytest.mark.slow
def test_the_oldest_triton(tmp_path):
    """Hybrid calls the functions of two other maps, with the settings of both."""
    version = check_versions.TRITON[0]
    arguments = ["--torch", "--triton", version, "--arch", "90", "--manifold", "Hybrid", "--json", str(tmp_path / "rows.json")]
    failed = check_versions.main([*arguments, "--tests", "-m", "not slow", *QUICK])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    if row["state"] == "not offered":
        pytest.skip(f"Triton {version} cannot be installed here: {row['checks']['imports']}")
    assert not failed, row
    assert f"triton {version}" in row["tried"] and set(row["checks"]) == {"imports", "compiled", "tests"}


@pytest.mark.slow
def test_a_version_that_does_not_exist_is_not_offered(capsys):
    assert check_versions.main(["--torch", "--triton", "0.99"]) == 1
    shown = capsys.readouterr()
    assert "triton 0.99: not offered" in shown.err and "pip finds no" in shown.out


@pytest.fixture
def here(monkeypatch):
    """Nothing is installed: the running environment stands for every version. Its imports and kernels are not looked at."""

    def environment(folder, package, version, dependencies):
        if version == "9":
            raise check_versions.InstallError("installing triton==9.*: ERROR: no space")
        folder.mkdir()
        return Path(sys.executable)

    monkeypatch.setattr(check_versions, "environment", environment)
    for check in ("_imports", "_compiled"):
        monkeypatch.setattr(check_versions, check, lambda *arguments: None)


def test_failures_are_told_by_their_first_line(here, tmp_path, capsys):
    (tmp_path / "test_one.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\ndef test_worse(): assert 1 == 3\n")
    arguments = ["--triton", "3.5", "9", "--torch", "--folder", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    assert check_versions.main([*arguments, "--tests", str(tmp_path / "test_one.py")]) == 1
    tested, not_installed = json.loads((tmp_path / "rows.json").read_text())
    assert tested["state"] == not_installed["state"] == "failed"
    said = tested["checks"]["tests"]
    assert said.startswith("failed: 2 failed, 1 passed") and "::test_bad - assert 1 == 2" in said and "test_worse" not in said
    assert not_installed["checks"]["imports"] == "failed: installing triton==9.*: ERROR: no space"


def test_a_version_that_passes_leaves_no_environment(here, tmp_path, monkeypatch):
    monkeypatch.setattr(check_versions.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "test_one.py").write_text("def test_good(): pass\n")
    assert check_versions.main(["--triton", "3.5", "--torch", "--tests", str(tmp_path / "test_one.py")]) == 0
    assert [path.name for path in tmp_path.iterdir() if path.is_dir() and path.name != "__pycache__"] == []
