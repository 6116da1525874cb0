"""Configuration: what the keys are, how a file and overrides become a checked `Config`, what the user reads when it is wrong.

Imports schedules only, and never torch: `pipehc.plan` answers in half a second. Begin with `schema.py`: a new key is a line
there, in its section, and an explanation in configs/cpu_demo.yaml; `stages.py` is what the sections schedule and parallel mean.
"""
