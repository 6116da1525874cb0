"""Do the kernels compile, and the tests pass, under other versions of Triton and torch than the installed ones?

    python tools/check_versions.py                                  # the versions that pyproject.toml allows
    python tools/check_versions.py --torch --triton 3.5.0 3.9       # two of Triton, none of torch
    python tools/check_versions.py --triton --torch 2.11 --tests -m "not slow" tests

A version of two numbers means the newest release of it. Each gets a virtual environment of its own, outside of the repository,
where pip installs it (torch with the Triton and the CUDA libraries that it asks for, up to 6 GB); the rest comes from the
environment that runs this. Under every version all modules of pipehc are imported. Under every Triton all kernels are compiled
ahead of time for sm_80, sm_90 and sm_100, at n = 4 in bf16, which fails above the registers that they may take, or where they
spill more than a few bytes of a thread, and the quick tests of the kernels run in the interpreter. Under every torch the quick
tests run that torch can break. --tests runs others, given as arguments of pytest. An environment is removed before the next is
made, unless --folder keeps them for another time.

Prints a table; the exit code is 1 if anything failed, or nothing was offered.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

from rich.console import Console
from rich.table import Table
from version_checks.environment import InstallError, NotOffered, clean_variables, environment

ROOT = Path(__file__).parents[1]
TRITON = ["3.5.0", "3.6", "3.7", "3.8", "3.9"]
TORCH = ["2.9.0", "2.10", "2.11", "2.12", "2.13", "2.14"]
FOLDERS = {
    "triton": ["kernels"],
    "torch": ["checkpoint", "comm", "data", "kernels", "megatron", "model", "planning", "recompute", "watch", "test_dry_run.py"],
}


@dataclass
class Row:
    """One version: `tried` says what was installed, `checks` what each check said; `state` is ok, failed or not offered."""

    package: str
    version: str
    state: str = "ok"
    tried: str = ""
    checks: dict[str, str] = field(default_factory=dict)

    def add(self, check: str, failed: bool, said: str) -> None:
        self.checks[check] = f"failed: {said}" if failed else said
        if failed:
            self.state = "failed"


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    wanted = [("triton", version) for version in options.triton] + [("torch", version) for version in options.torch]
    with tempfile.TemporaryDirectory(prefix="check_versions-") as temporary:
        rows = [_row(package, version, options.folder or Path(temporary), options) for package, version in wanted]
    table = Table("version", "", *(checks := ("imports", "compiled", "tests")))
    for row in rows:
        table.add_row(row.tried or f"{row.package} {row.version}", row.state, *(row.checks.get(name, "") for name in checks))
    Console(width=200).print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    states = {row.state for row in rows}
    return 1 if "failed" in states or states == {"not offered"} else 0


def _row(package: str, version: str, folder: Path, options: argparse.Namespace) -> Row:
    row, home = Row(package, version), folder.resolve() / f"{package}-{version}"
    began = time.monotonic()
    try:
        python = environment(home, package, version, dependencies=package == "torch")
    except NotOffered as error:
        row.state, row.checks["imports"] = "not offered", str(error)
    except InstallError as error:
        row.add("imports", True, str(error))
    else:
        _imports(row, python, home)
        if package == "triton":
            _compiled(row, python, home, options)
        _tests(row, python, home, options.tests or ["-m", "not slow", *(f"tests/{name}" for name in FOLDERS[package])])
    if not options.folder:
        rmtree(home, ignore_errors=True)
    print(f"{package} {version}: {row.state}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return row


def _imports(row: Row, python: Path, home: Path) -> None:
    found = _inside(row, python, home, "imports")
    if found:
        row.tried = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        row.add("imports", bool(found["errors"]), _said(found, "modules"))


def _compiled(row: Row, python: Path, home: Path, options: argparse.Namespace) -> None:
    more = ["--manifold", options.manifold] if options.manifold else []
    found = _inside(row, python, home, "compiled", "--arch", *map(str, options.arch), *more)
    if found:
        figures = f"at most {found['registers']} registers, {found['spilled']} B spilled"
        row.add("compiled", bool(found["errors"]), f"{_said(found, 'kernels')}; {figures}")


def _inside(row: Row, python: Path, home: Path, what: str, *more: str) -> Any:
    """What the check says as JSON; None, noted in the row, if it did not come that far."""
    command = [str(python), "-W", "ignore", str(ROOT / "tools" / "version_checks" / "inside.py"), what, *more]
    done = subprocess.run(command, env=clean_variables(home), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        row.add(what, True, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        return None
    return json.loads(done.stdout.splitlines()[-1])


def _tests(row: Row, python: Path, home: Path, arguments: list[str]) -> None:
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "--durations=0", *arguments]
    wide = clean_variables(home, COLUMNS="250")  # pytest cuts what it says about a failure to the width of the terminal
    done = subprocess.run(command, env=wide, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    (home / "tests.log").write_text(done.stdout + done.stderr)
    last = lines[-1].strip("= ") if lines else f"exit code {done.returncode}"
    first = next((line for line in lines if re.match(r"(FAILED|ERROR) ", line)), "")
    row.add("tests", done.returncode != 0, f"{last}; first: {first}" if first else last)


def _said(found: dict[str, Any], things: str) -> str:
    errors = found["errors"]
    return f"{len(errors)} of {found['tried']} {things}, first: {errors[0]}" if errors else f"{found['tried']} {things}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", nargs="*", default=TRITON, metavar="VERSION")
    parser.add_argument("--torch", nargs="*", default=TORCH, metavar="VERSION")
    parser.add_argument("--folder", type=Path, help="where environments are kept, with the output of their tests, for a next time")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--manifold", help="compile only kernels with this map, for example Hybrid")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--tests", nargs=argparse.REMAINDER, help="arguments of pytest for other tests; the last option")
    return parser


if __name__ == "__main__":
    sys.exit(main())
