"""What goes between ranks and between queues: groups, stage messages, expert all-to-alls, queues; what waits too long is named.

Imports torch alone. Begin with `queues.py` (a backend is a class with the methods of `Queue` and a case in `make_queues`) and
`messages.py`. What all of it may take of a device, and may be told otherwise, is in `budgets.py`.
"""
