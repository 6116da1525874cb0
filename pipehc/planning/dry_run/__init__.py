"""What a program does to a rank's memory and device, counted while it runs on tensors that may have no data.

`tracker` counts, `operations` says what one operation costs, `peaks` and `tables` sum up, `hardware` and `roofline` turn counts
into times, `shares` and `recomputation` compare those, `report` prints. Nothing here knows Megatron or the trainer:
`pipehc.dry_run` runs the trainer, and `pipehc.megatron.job.dry_run` the script of a job; `job` is what either says of what it runs.
"""
