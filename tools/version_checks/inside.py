"""Checks that run inside of an environment: python inside.py imports, or compiled [--arch ...] [--manifold ...]; prints JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MAX_SPILLED = {"3.5": 24, "3.6": 16}
"""Bytes of a thread, by version of Triton: for two and one of 132 kernels, on sm_100; with others 8, and 3.8 must do without any on
the H100 (tests/tools/test_kernel_report.py)."""
sys.path.insert(0, str(ROOT / "tools"))


def imports() -> dict[str, Any]:
    """Every module of pipehc is imported; {versions, tried, errors: [text]}."""
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    tried, errors = 0, []
    for package in packages:
        names = [package]
        for name in names:
            tried += 1
            try:
                module = importlib.import_module(name)
            except Exception as error:
                errors.append(f"{name}: {type(error).__name__}: {error}")
                continue
            if name == package:
                found = pkgutil.iter_modules(module.__path__)
                names += [f"{package}.{one.name}" for one in found if not one.ispkg and one.name != "__main__"]
    versions = {name: version(name) for name in ("torch", "triton", "megatron-core")}
    return {"versions": versions, "tried": tried, "errors": errors}


def compiled(architectures: list[int], manifold: str | None) -> dict[str, Any]:
    """Every kernel is compiled at n = 4, C = 2560, bf16; {tried, errors: [text], the most registers, the most spilled bytes}."""
    from compiled import forms, resources

    from pipehc.kernels.tiles import max_registers

    bound = MAX_SPILLED.get(version("triton").rpartition(".")[0], 8)
    tried, errors = 0, []
    registers, spilled = 0, 0
    for arch in architectures:
        for name, form in forms(arch=arch).items():
            if manifold and not name.endswith((manifold, "all streams", "streams apart")):
                continue
            tried += 1
            try:
                row = resources(form, 2560, arch)
            except Exception as error:
                errors.append(f"{name}, sm_{arch}: {type(error).__name__}: {_first_line(error)}")
                continue
            registers, spilled = max(registers, row["registers"]), max(spilled, row["spilled"])
            most = form.options.get("maxnreg", max_registers(4, factors=True))
            if row["registers"] > most or row["spilled"] > bound or row["atomics"]:
                figures = (f"{row[name]} {name}" for name in ("registers", "spilled", "atomics"))
                errors.append(f"{name}, sm_{arch}: {', '.join(figures)}")
    return {"tried": tried, "errors": errors, "registers": registers, "spilled": spilled}


def _first_line(error: BaseException) -> str:
    """What went wrong first: Triton wraps errors once for every device function that they pass."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line for line in reversed(str(error).splitlines()) if line.strip()), "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["imports", "compiled"])
    parser.add_argument("--arch", type=int, nargs="+")
    parser.add_argument("--manifold")
    options = parser.parse_args()
    print(json.dumps(imports() if options.what == "imports" else compiled(options.arch, options.manifold)))
