"""Costs of every stage for a job that runs and gives none: from a dry run in a process of its own, once a configuration."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from pipehc.planning.dry_run.hardware import shipped
from pipehc.schedules import Costs

# What torchrun tells its processes: a dry run is a job of its own.
_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_", "TORCH_NCCL_")
LIMIT_S = 1200.0


class NoCosts(RuntimeError):
    """The dry run failed; the message is its last line."""


def cached_costs(arguments: Sequence[str], identity: Mapping[str, Any]) -> Costs:
    """What `python ARGUMENTS... --costs FILE` writes, in a process that has nothing of this one's job.

    identity: all that these costs depend on, as JSON has it, beside the versions that are installed. The same question is answered
    from $XDG_CACHE_HOME/pipehc, or ~/.cache/pipehc. Raises NoCosts.
    """
    path = _folder() / f"costs-{_key(identity)}.json"
    try:
        return Costs.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass  # not there yet, or not whole
    with tempfile.TemporaryDirectory(prefix="pipehc-") as folder:
        written = Path(folder) / "costs.json"
        environment = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHER)} | {"CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, *arguments[:2], "--costs", str(written), *arguments[2:]]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoCosts(str(error)) from error
        if done.returncode:
            raise NoCosts((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
        text = written.read_text(encoding="utf-8")
    _keep(path, text)
    return Costs.from_json(text)


def gpu_here(device_name: str) -> str:
    """The shipped hardware file of a GPU, by the name that its driver gives it; h100 if there is none."""
    return next((name for name in shipped() if name in device_name.lower()), "h100")


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pipehc"


def _key(identity: Mapping[str, Any]) -> str:
    versions = {name: metadata.version(name) for name in ("pipehc", "torch", "triton", "megatron-core")}
    text = json.dumps([identity, versions, _sources()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sources() -> str:
    """Of the package itself: a version number does not change with every commit."""
    total = hashlib.sha256()
    for name in ("pipehc", "pipehc.comm", "pipehc.kernels", "pipehc.recompute", "pipehc.schedules"):  # a checkout has them apart
        for folder in import_module(name).__path__:
            for file in sorted(Path(folder).rglob("*.py")):
                total.update(file.read_bytes())
    return total.hexdigest()


def _keep(path: Path, text: str) -> None:
    """Whole or not at all; without room for it, the next run asks again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except OSError:
        pass
