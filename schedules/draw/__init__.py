"""Drawings of simulated or recorded steps: terminal, SVG, PNG, Chrome trace, HTML."""

from pipehc.schedules.draw.page import page
from pipehc.schedules.draw.png import png
from pipehc.schedules.draw.svg import svg
from pipehc.schedules.draw.timeline import Summary, Timeline, recorded, simulated
from pipehc.schedules.draw.trace import chrome_trace

__all__ = ["Summary", "Timeline", "chrome_trace", "page", "png", "recorded", "simulated", "svg"]
