"""Layouts of a training over a number of GPUs, and what each would cost, composed from dry runs of models of a few blocks.

`layouts` enumerates, `units` says which small models to run and adds them up to stages, `footprint` and `walk` do so for memory,
`report` prints. Nothing here runs a model: `pipehc.layout_search`, above, does.
"""
