"""Reads what profilers, or pipehc itself, wrote of a step, and says where each rank's time went: `python -m pipehc.report`.

What lives here: a reader for each kind of file (`recorded`: steps of `trace.steps`; `torch_profiler`: Chrome traces; `nsight`:
SQLite exports), all of which give the rows of `model`. `files` opens and tells them apart; `kernels` makes a row of one GPU's
kernels, with `names` (which kernels communicate), `steps` (where steps begin) and `intervals`. Start with `model`, then `kernels`.

It may import `pipehc.schedules` (recordings and spans), and neither torch nor the trainer: a report is read on any machine.
"""
