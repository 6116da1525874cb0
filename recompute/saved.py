"""Bytes that are held for one micro-batch, counted storage by storage as autograd saves them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class SavedBytes:
    """Counts what a Pass keeps, in bytes. A storage counts once, whole, however many views of it are saved.

    inputs: the streams at the start of every block, n*C numbers a token each. outputs: of every F, C each. by_f: what F saves for
    its own backward, and what the embedding and the loss save. by_rebuilt: what hyper-connections save; with recomputation, their
    notes. transient: with recomputation, the most that one block rebuilt.
    """

    def __init__(self, persistent: Iterable[torch.Tensor] = ()) -> None:
        """persistent: tensors that are there anyway, such as parameters."""
        # Weak references, since an address is used again once its storage is gone.
        self._seen = {StorageWeakRef(tensor.untyped_storage()) for tensor in persistent}
        self._block = 0
        self.inputs = self.outputs = self.by_f = self.by_rebuilt = self.transient = 0

    @property
    def kept(self) -> int:
        """From the end of the forward to the backward."""
        return self.inputs + self.outputs + self.by_f + self.by_rebuilt

    def start_block(self) -> None:
        """What is counted by `add_transient` from now on belongs to another block."""
        self._block = 0

    def add_transient(self, tensor: torch.Tensor) -> None:
        """Counts a tensor that was rebuilt."""
        self._block += self.new(tensor)
        self.transient = max(self.transient, self._block)

    def new(self, tensor: torch.Tensor) -> int:
        """Bytes of the storage of `tensor`, 0 if it was counted before."""
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference in self._seen:
            return 0
        self._seen.add(reference)
        return storage.nbytes()
