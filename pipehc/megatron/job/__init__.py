"""Existing Megatron jobs: their model provider, data, optimizer and checkpoints, under our schedules and residuals.

May import what stands in `pipehc.megatron`, never `trainer`. Begin with `enable.py` (what it replaces, and when), then
`schedule.py` (one step) and `chunk.py` (a model chunk as a stage). What GPTModel and HybridModel differ in stands in `models.py`
and `hybrid.py`. An option of Megatron that cannot work is a line in the tables of `refusals.py` (model, DDP) or `job_refusals.py`
(arguments of megatron.training). `dry_run.py` launches a script without GPUs (`dry_job.py`: its ranks; `dry_rank.py`: one of
them).
"""
