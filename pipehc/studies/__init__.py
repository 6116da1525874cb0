"""The papers' studies: what is compared, how the runs are started and kept, what their figures say.

Imports config and what lies below; the commands that it starts, train and plan, by name alone. Begin with `design.py` (what a study
is) and `ablation.py` (the shortest one); `catalogue.py` names them all. `runner.py` starts runs and keeps their outcomes
(`worker.py`: one run, one process), `paired.py` compares them, `document.py` writes what came of it. A new study is a file with a
`Study` in it and its line in `catalogue.py`.
"""
