"""Types that Triton's interpreter (3.5 to 3.9) works out at every operation, worked out once: half of what was left of its time.

Of no consequence for any number. Shapes, once made, are never changed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def remember() -> None:
    """Let shapes of blocks and NumPy's types be looked up. Calling it again changes nothing."""
    if getattr(tl.block_type.__init__, "remembers", False):
        return
    shipped_block, shipped_tensor, shipped_dtype = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
    shipped_broadcast = TritonSemantic.broadcast_impl_value
    blocks: dict[tuple[int, ...], tuple[Any, int, str]] = {}  # by sizes: those of the type, their product, and as text
    tensors: dict[tuple[int, ...], tuple[Any, Any]] = {}  # by sizes: those of a tensor, which are constants, and their product
    dtypes: dict[str, np.dtype[Any]] = {}

    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        if sizes not in blocks:
            shipped_block(self, element_ty, shape)
            blocks[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty, self.sizes = element_ty, sizes
        self.shape, self.numel, text = blocks[sizes]
        self.name = f"<{text}, {element_ty}>"

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        sizes = type.sizes if type.is_block() else ()
        if sizes not in tensors:
            shipped_tensor(self, handle, type)
            tensors[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[sizes]

    def np_dtype(given: Any) -> np.dtype[Any]:
        name = given.scalar.name
        if name not in dtypes:
            dtypes[name] = shipped_dtype(given)
        return dtypes[name]

    def broadcast(self: Any, left: Any, right: Any) -> Any:
        """Nothing is to be done where sizes are the same already."""
        a, b = (each.type.sizes if each.type.is_block() else () for each in (left, right))
        return (left, right) if a == b else shipped_broadcast(self, left, right)

    block_init.remembers = True  # type: ignore[attr-defined]
    tl.block_type.__init__ = block_init
    tl.tensor.__init__ = tensor_init
    interpreter._get_np_dtype = np_dtype
    TritonSemantic.broadcast_impl_value = broadcast
