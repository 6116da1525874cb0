"""What a run shows and leaves behind: recorded steps, metrics, progress, the run folder; readers of profiles, pictures of runs.

Imports model, schedules and comm. Begin with `trace.py`, which records a step as spans; `profiles/` reads others' recordings,
`pictures/` draws runs.
"""
