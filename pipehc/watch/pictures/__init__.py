"""The papers' pictures of runs, from diagnostics.jsonl and metrics.jsonl of their folders: `python -m pipehc.diagnostics`.

`line` is the format of the files, `run` reads a folder, `panel` what a picture consists of; `depth`, `steps` and `maps` say what is
in the pictures, as data; `figure` draws it with matplotlib, `page` puts all into one HTML file, `columns` and `terminal` make
the tables. Begin with `run`, then `depth`.

It imports neither torch nor the trainer: pictures are made on any machine. Only `figure` needs matplotlib.
"""
