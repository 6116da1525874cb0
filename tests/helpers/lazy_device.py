"""A device whose streams run late: copies that do not block are made only when somebody waits for them, so who forgets to finds
old values. As much of torch.cuda as copies through host memory use."""

from __future__ import annotations

import torch

from pipehc.comm import host_memory


def plain(tensor):
    """The same memory as an ordinary tensor."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


class Stream:
    """Work in order of issue, run when it is waited for."""

    def __init__(self):
        self.work = []
        self.done = 0

    def issue(self, work):
        self.work.append(work)

    def run(self, until=None):
        until = len(self.work) if until is None else until
        while self.done < until:
            self.done += 1
            self.work[self.done - 1]()


class LazyDevice:
    """Its tensors are made by `tensor`; `pinned` holds the host memory that was asked for it."""

    def __init__(self, monkeypatch):
        self.current = Stream()
        self.pinned = []
        device = self

        class Event:
            def record(self):
                self.stream, self.until = device.current, len(device.current.work)

            def wait(self):
                device.current.issue(self.synchronize)

            def synchronize(self):
                self.stream.run(self.until)

        class Tensor(torch.Tensor):
            @classmethod
            def __torch_function__(cls, function, types, args=(), kwargs=None):
                if function is torch.Tensor.copy_ and (kwargs or {}).get("non_blocking"):
                    target, source = map(plain, args)
                    device.current.issue(lambda: target.copy_(source))
                    return args[0]
                if function == torch.Tensor.device.__get__:
                    return torch.device("cuda")
                return super().__torch_function__(function, types, args, kwargs or {})

        def host(shape, dtype, on):
            assert on.type == "cuda"
            self.pinned.append(torch.full(tuple(shape), -1, dtype=dtype))
            return self.pinned[-1]

        self._type = Tensor
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(host_memory, "host_memory", host)

    def tensor(self, *values):
        return torch.tensor(values).as_subclass(self._type)

    def write(self, tensor, *values):
        """Work of the current stream."""
        own = plain(tensor)
        self.current.issue(lambda: own.copy_(torch.tensor(values)))

    def read(self, tensor, found):
        """Work of the current stream: adds what is there to `found`."""
        own = plain(tensor)
        self.current.issue(lambda: found.append(own.tolist()))
