"""A virtual environment that has another version of one package, and everything else from the environment that runs this."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import venv
from pathlib import Path


class NotOffered(Exception):
    """The index has no such version, or cannot be reached."""


class InstallError(Exception):
    """pip failed for another reason; says its last line."""


def environment(folder: Path, package: str, version: str, dependencies: bool) -> Path:
    """The Python of an environment in `folder` with the newest `package` that begins with `version` ("3.6": 3.6.0 or 3.6.1).

    dependencies: with the ones it asks for, else alone. An environment that is there already is used again.
    """
    python, fallback = folder / "bin" / "python", folder / "fallback.pth"
    if not fallback.exists():
        venv.create(folder, clear=True, symlinks=True)
        _install(python, f"{package}=={version}.*" if version.count(".") < 2 else f"{package}=={version}", dependencies)
        # Written last: pip should not see what the fallback has, and without this file the environment is not whole.
        fallback.write_text("\n".join(site.getsitepackages()))
        code = f"import site; [site.addsitedir(line) for line in open({str(fallback)!r}).read().splitlines()]\n"
        (next((folder / "lib").glob("python*")) / "site-packages" / "fallback.pth").write_text(code)
    return python


def _install(python: Path, requirement: str, dependencies: bool) -> None:
    options = ["--quiet", "--no-cache-dir", "--only-binary", ":all:", *([] if dependencies else ["--no-deps"])]
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", *options, requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        if f"No matching distribution found for {requirement}" in done.stderr:
            none = "(from versions: none)" in done.stderr
            raise NotOffered("pip finds no version at all: no index?" if none else f"pip finds no {requirement}")
        raise InstallError(f"installing {requirement}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def clean_variables(folder: Path, **more: str) -> dict[str, str]:
    """Variables of this process without those that would bring other packages or choose how kernels run; caches go to `folder`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "PIPEHC", "PYTHONPATH"))}
    return kept | {"TRITON_CACHE_DIR": str(folder / "triton"), "OMP_NUM_THREADS": "1"} | more
