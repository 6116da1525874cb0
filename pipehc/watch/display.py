"""Progress on the terminal: one live line with a bar, or plain lines where standard output is a file or a pipe."""

import math
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column

# How a metric is shown, in this order; other metrics are written to files only. Short: all fits into 80 columns.
_SHOWN = {
    "loss": ("loss", ".4f"),
    "mtp_1_loss": ("mtp", ".2f"),
    "tokens_per_s": ("tok/s", ",.0f"),
    "grad_norm": ("|grad|", ".3g"),
    "lr": ("lr", ".2e"),
}


class Display:
    """Shows step, metrics and the time left. Times start with this object: steps of an earlier run do not count."""

    def __init__(self, total_steps: int, start_step: int, console: Console | None = None) -> None:
        self._console = console or Console()
        self._total, self._start_step = total_steps, start_step
        self._start_time = time.monotonic()
        self._progress: Progress | None = None
        if self._console.is_terminal:
            bar = [BarColumn(bar_width=20)] if self._console.width >= 110 else []
            text = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
            # Drawn at each step, without rich's refresh thread: nothing runs beside the training.
            self._progress = Progress(
                TextColumn("step"), MofNCompleteColumn(), *bar, text, console=self._console, auto_refresh=False
            )
            self._task: TaskID = self._progress.add_task("", total=total_steps, completed=start_step)
            self._progress.start()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """After `step` of the total steps."""
        text = "  ".join([f"{label} {metrics[key]:{form}}" for key, (label, form) in _SHOWN.items() if key in metrics])
        text += f"  left {self._left(step)}"
        if self._progress:
            self._progress.update(self._task, completed=step, description=text, refresh=True)
        else:
            self.say(f"step {step}/{self._total}  {text}")

    def say(self, text: str, style: str | None = None) -> None:
        """A line of its own, above the bar."""
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Give the terminal back; the last state of the bar stays."""
        if self._progress:
            self._progress.stop()

    def _left(self, step: int) -> str:
        done = step - self._start_step
        if done <= 0:
            return "?"
        return clock((time.monotonic() - self._start_time) / done * max(0, self._total - step))


def clock(seconds: float) -> str:
    """Rounded up to whole seconds: 0:00:09, 27:46:40."""
    minutes, seconds = divmod(math.ceil(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
