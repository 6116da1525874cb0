"""What a run reports: metrics.jsonl, TensorBoard, the saved configuration, and lines on the terminal, all from rank 0."""

import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from rich.console import Console

from pipehc.checkpoint.aside import set_aside
from pipehc.watch.display import Display
from pipehc.watch.stream_warnings import summary
from pipehc.watch.whole_file import write_whole

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
DIAGNOSTICS = "diagnostics.jsonl"
TENSORBOARD = "tensorboard"


class MetricsFile:
    """`metrics.jsonl`, `diagnostics.jsonl`: one JSON object a line, one line a step; what is not finite is null.

    Opened at `start_step` k > 0 (a resumed run), lines of steps after k go, because these steps are done again. At 0 (a new
    run) an earlier file is kept under another name.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self.best: dict[str, Any] | None = None  # step and val_loss of the best evaluation
        self.kept: list[dict[str, Any]] = []  # the lines before the start
        self._last_step: int | None = None
        if start_step == 0:
            set_aside(path)
        kept = self.kept = [line for line in read_lines(path) if line["step"] <= start_step]
        for line in kept:
            self._note_best(line)
        if path.exists():
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._last_step = kept[-1]["step"] if kept else None
        self._file: BinaryIO = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 (closed by close)
        self._file.seek(0, os.SEEK_END)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line and flush it; a second call for the last step adds to its line. values: numbers, texts, lists of them,
        mappings."""
        finite = {key: _finite(value) for key, value in values.items()}
        self._note_best({"step": step, **finite})
        if step == self._last_step:
            # One write over the closing brace: at no time is the line gone.
            self._file.seek(-2, os.SEEK_END)
            text = "".join(f", {json.dumps(key)}: {json.dumps(value)}" for key, value in finite.items()) + "}\n"
        else:
            text = json.dumps({"step": step, **finite}) + "\n"
        self._file.write(text.encode())
        self._file.flush()
        self._last_step = step

    def close(self) -> None:
        self._file.close()

    def _note_best(self, line: dict[str, Any]) -> None:
        value = line.get("val_loss")
        if value is not None and (self.best is None or value < self.best["val_loss"]):
            self.best = {"step": line["step"], "val_loss": value}


class Reporter:
    """Reports a run of `total_steps` steps that goes on after `start_step`. Every rank may make and call one; only the one with
    `is_main` writes and prints. As a context manager it gives the terminal back when the training fails.

    config: the text of the resolved configuration, saved in `folder`. diagnostics: whether there will be `streams`.
    Raises ValueError, on every rank, if TensorBoard is asked for (`tensorboard`) but not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        total_steps: int,
        start_step: int = 0,
        tensorboard: bool = False,
        is_main: bool = True,
        config: str | None = None,
        console: Console | None = None,
        diagnostics: bool = False,
    ) -> None:
        if tensorboard:
            check_tensorboard()
        self._folder = Path(folder)
        self._display: Display | None = None
        self._file: MetricsFile | None = None
        self._streams: MetricsFile | None = None
        self._board: Any = None
        if not is_main:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        if config is not None:
            save_config(self._folder, config)
        self._file = MetricsFile(self._folder / METRICS, start_step)
        if diagnostics or (self._folder / DIAGNOSTICS).exists():  # lines of another course must not stay beside these metrics
            self._streams = MetricsFile(self._folder / DIAGNOSTICS, start_step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # an extra, and slow to import

            # At a new start 0 purges all; on resuming, what comes after the step that is resumed.
            self._board = SummaryWriter(str(self._folder / TENSORBOARD), purge_step=start_step + 1 if start_step else 0)
        self._display = Display(total_steps, start_step, console)

    @property
    def best(self) -> dict[str, Any] | None:
        """`step` and `val_loss` of the best evaluation in this folder so far; None before one and on ranks that do not report."""
        return self._file.best if self._file else None

    def step(self, step: int, **metrics: float) -> None:
        """After training step `step` (the first is 1). Metrics: loss [nats], grad_norm, lr, tokens_per_s, and any others."""
        self._record(step, metrics)
        if self._display:
            self._display.step(step, metrics)

    def evaluation(self, step: int, val_loss: float, val_accuracy: float | None = None) -> None:
        """After an evaluation of the weights after `step` steps; val_loss in nats per token, val_accuracy from 0 to 1."""
        self._record(step, {"val_loss": val_loss} | ({} if val_accuracy is None else {"val_accuracy": val_accuracy}))
        accuracy = "" if val_accuracy is None else f"  accuracy {100 * val_accuracy:.2f} %"
        self.say(f"step {step}: validation loss {val_loss:.4f}{accuracy}")

    @property
    def earlier_streams(self) -> list[dict[str, Any]]:
        """The diagnosed steps of this run before it was resumed."""
        return self._streams.kept if self._streams else []

    def streams(self, step: int, figures: Mapping[str, Any], warnings: Sequence[str] = ()) -> None:
        """After a diagnosed step: its figures, by the names of diagnostics.jsonl, and what they warn of."""
        if self._streams:
            self._streams.write(step, {**figures, **({"warnings": list(warnings)} if warnings else {})})
        if self._board:
            for key, value in summary(figures).items():
                self._board.add_scalar(f"streams/{key}", value, step)
        for text in warnings:
            self.warn(f"step {step}: {text}")

    def say(self, text: str) -> None:
        """A line for the user."""
        if self._display:
            self._display.say(text)

    def warn(self, text: str) -> None:
        """A warning to the user, on a line of its own."""
        if self._display:
            self._display.say(f"warning: {text}", style="yellow")

    def finish(self) -> None:
        """The last line: the best validation loss (of earlier runs in this folder too) and where everything lies."""
        if self._display and self._file:
            best = self.best
            result = f"best validation loss {best['val_loss']:.4f} at step {best['step']}" if best else "no evaluation was made"
            where = [METRICS, *([CONFIG] if (self._folder / CONFIG).exists() else []), *([TENSORBOARD] if self._board else [])]
            self._display.close()
            self._display.say(f"done: {result}; {', '.join(where)} and checkpoints are in {self._folder}")
        self.close()

    def close(self) -> None:
        """Close files and give the terminal back, without a last line."""
        for part in (self._display, self._board, self._file, self._streams):
            if part:
                part.close()
        self._display = self._board = self._file = self._streams = None

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _record(self, step: int, values: dict[str, float]) -> None:
        if self._file:
            self._file.write(step, values)
        if self._board:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)


def check_tensorboard() -> None:
    """Raises ValueError if TensorBoard cannot be used."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("run.tensorboard: true, but tensorboard is not installed: pip install 'pipehc[viz]', or set it to false")


def save_config(folder: str | os.PathLike, text: str) -> Path:
    """Write the resolved configuration to `folder`/config.yaml (rank 0 calls this). One that differs is kept as config-1.yaml,
    config-2.yaml ... in the order in which they were replaced."""
    path = Path(folder) / CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.read_text() == text:
        return path
    set_aside(path)
    write_whole(path, text)
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines that can be read: a crash may have cut the last one."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _finite(value: Any) -> Any:
    """The same for JSON: null for what is not finite."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {key: _finite(part) for key, part in value.items()}
        case list() | tuple():
            return [_finite(part) for part in value]
    return value
