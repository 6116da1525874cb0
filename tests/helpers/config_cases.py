"""The configurations of the repository."""

from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "configs"
DEMO = CONFIGS / "cpu_demo.yaml"
ALL = sorted(CONFIGS.glob("*.yaml"))
