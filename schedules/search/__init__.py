"""The parts of `auto`: the problem as flat arrays, a list scheduler, generators of its priorities, and their improvement."""
