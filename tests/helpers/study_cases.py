"""A study whose trainer is a script: what the runner makes of runs, without any training."""

import sys
from pathlib import Path

from rich.console import Console

from pipehc.studies.asked import Place
from pipehc.studies.design import Report, Study, Table
from pipehc.studies.run import Run
from pipehc.studies.runner import Runner

# Called as the trainer is. The learning rate says what it does: 0.5 breaks off, 0.25 fails, 8 waits to be killed, the first time.
_TRAINER = """
import json, pathlib, sys, time, yaml
config = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
folder, lr = pathlib.Path(config["run"]["folder"]), config["optimizer"]["lr"]
with open(folder / "starts", "a") as starts:
    starts.write("x")
    first = starts.tell() == 1
(folder / "metrics.jsonl").write_text(json.dumps({"step": 2, "val_loss": lr}) + "\\n")
print("hello")
if lr == 8 and first:
    time.sleep(60)
if lr == 0.5:
    sys.exit("pipehc: rank 0 ended in step 7: the loss of step 7 is nan; no weight was changed")
if lr == 0.25:
    sys.exit("no space left on device")
"""


def launcher(folder: Path) -> list[str]:
    """What stands before `-m pipehc.train`."""
    script = folder / "trainer.py"
    script.write_text(_TRAINER)
    return [sys.executable, str(script)]


def run(name: str, lr: float, seed: int = 1, **factors) -> Run:
    return Run(name, {"seed": seed, **factors}, (f"optimizer.lr={lr}", f"train.seed={seed}"))


STUDY = Study(
    name="fake",
    question="Does the runner run?",
    seeds={"small": 1, "paper": 1},
    runs=lambda scale, seeds: [run("a", 0.1), run("b", 0.2)],
    measure=lambda outcome: {"val_loss": outcome.last("val_loss")},
    summarise=lambda rows: Report([Table("losses", ("run",), tuple((row.name,) for row in rows))], []),
)


def runner(out: Path, folder: Path, jobs: int = 2, overrides: tuple[str, ...] = ()) -> Runner:
    return Runner(STUDY, Place(out, overrides=overrides), jobs, launcher(folder), Console(quiet=True))


def starts(out: Path, name: str) -> int:
    """How often this run was started."""
    path = out / "runs" / name / "starts"
    return len(path.read_text()) if path.exists() else 0
