"""What a run shows and leaves behind: recorded steps, metrics, progress, the run folder; and the reading of profiles.

Imports model, schedules and comm. Begin with `trace.py`, which records a step as spans; `profiles/` reads others' recordings.
"""
