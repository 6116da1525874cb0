"""A CUDA device, emulated on CPU tensors, for tests of what runs on streams.

Every operation that torch dispatches is only issued: it runs later, when its stream comes to it, in an order that a seed chooses.
Whoever reads too early, or memory that was given back, reads NaN. `device.py`: streams in hardware queues, events, the host's
waits. `memory.py`: the allocator. `launch.py`: operations, host reads and autograd's own ordering. `groups.py`: NCCL's behaviour,
messages carried by gloo. `queue.py`: what the product is given in the place of CUDA's queues.
"""
