"""What a configuration will need, said before it runs: parameters, activations, what its schedule costs.

Imports config, schedules and recompute. Begin with `notes.py` for words, `parameters.py` and `activations.py` for numbers.
"""
