"""The trainer, its tools and the plug-in for Megatron jobs. Imports nothing: `pipehc.schedules` must load in a blink.

Commands stand here: `train`, `plan`, `report`, `diagnostics`, `study`; what only one of them uses stands beside it. Everything else
lives in a room, and a room imports only from rooms below it (`[tool.importlinter]` in pyproject.toml, proved by `make lint`). Begin
with `trainer.py`.
"""
