"""Pipeline schedules as data: generate -> check -> compile -> (simulate | draw | execute).

Needs no torch and no process group, `execute.py` aside. Begin with `actions.py` and `schedule.py`, then `compile.py` and
`program.py`. A new family is a file in `families/` and a line in its `FAMILIES`.
"""

from pipehc.schedules.actions import Action, Pair
from pipehc.schedules.auto import AutoReport, auto, auto_report
from pipehc.schedules.check import ScheduleError, check
from pipehc.schedules.compile import compile
from pipehc.schedules.costs import Costs
from pipehc.schedules.families import FAMILIES, build
from pipehc.schedules.placement import Placement
from pipehc.schedules.program import Program
from pipehc.schedules.schedule import Schedule
from pipehc.schedules.simulate import SimulationResult, simulate
from pipehc.schedules.spans import Span
from pipehc.schedules.verify import ProgramError, verify

__all__ = [
    "FAMILIES",
    "Action",
    "AutoReport",
    "Costs",
    "Pair",
    "Placement",
    "Program",
    "ProgramError",
    "Schedule",
    "ScheduleError",
    "SimulationResult",
    "Span",
    "auto",
    "auto_report",
    "build",
    "check",
    "compile",
    "simulate",
    "verify",
]
