"""Leaving half of a sub-layer's backward to a launch that reads the same rows anyway.

A sub-layer is x' = H_res x + H_post^T F(y). Backward starts at its end, in `post_res`, where only the gradient of f is needed at
once: F waits for it. Everything else - the gradients of H_res, H_post and x - is needed only after F's backward, when the operation
that computed the coefficients from the same x (`coefficients_pre` or `post_res_pre`) runs its own. So `post_res` hands it the
gradient of x' and f, and returns nothing for x, H_post and H_res. That saves reading x once, and writing and reading a partial
gradient of x.

The pair is found by a `Link` on the coefficient tensors. It is used only if post_res gets exactly the x, H_post and H_res of that
operation, once, unchanged, in one autograd graph and on one CUDA stream, and neither coefficient has hooks or retains its gradient;
otherwise post_res computes all of its gradients. What a link takes away: `torch.autograd.grad(loss, h_res)` finds no gradient
there. Pass `h_res.view_as(h_res)` to post_res to get it.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

_ATTRIBUTE = "_pipehc_link"


class Link:
    """From the operation that made (H_post, H_res) of x to the one `post_res` that uses all three."""

    def __init__(self, x: Tensor) -> None:
        self._source = weakref.ref(_root(x))
        self._state = _state(x)
        self._x = weakref.ref(x)
        self._claimed = False
        self._delivery: tuple[int, tuple[Tensor, Tensor]] | None = None

    def attach(self, *coefficients: Tensor) -> None:
        """Marks the tensors by which `claim` finds this link."""
        for h in coefficients:
            setattr(h, _ATTRIBUTE, self)

    def deliver(self, d_x_next: Tensor, f: Tensor) -> None:
        """Called in the backward of post_res: the gradient of x' [T, n, C] and f [T, C]."""
        assert self._claimed
        self._delivery = (_backward_pass(), (d_x_next, f))

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Called in the backward of the coefficients: what post_res left, None if it took no part in this backward.

        What it left in another one that did not come to the coefficients is no part of this one's gradients.
        """
        delivery, self._delivery = self._delivery, None
        return delivery[1] if delivery is not None and delivery[0] == _backward_pass() else None

    def _accepts(self, x: Tensor) -> bool:
        # A detached copy shares the storage but not the graph: it is a leaf, or has another root.
        same = x is self._x() or (x.grad_fn is not None and self._source() is _root(x))
        return same and self._state == _state(x)


def claim(x: Tensor, h_post: Tensor, h_res: Tensor) -> Link | None:
    """The link of these three, taken for good, or None if there is none to use."""
    link = _link_of(h_res)
    if link is None or _link_of(h_post) is not link or link._claimed or not link._accepts(x):
        return None
    if not (h_post.requires_grad and h_res.requires_grad) or any(h.retains_grad or h._backward_hooks for h in (h_post, h_res)):
        return None
    link._claimed = True
    return link


def _link_of(h: Tensor) -> Link | None:
    link: Link | None = getattr(h, _ATTRIBUTE, None)
    return link


def _root(x: Tensor) -> Tensor:
    """The tensor that a chain of views starts from."""
    return x._base if x._is_view() and x._base is not None else x


def _state(x: Tensor) -> tuple[object, ...]:
    """What must be the same in both operations, of x and around it."""
    return x.storage_offset(), x.shape, x.stride(), x.requires_grad, x._version, _stream(x)


def _stream(x: Tensor) -> torch.cuda.Stream | None:
    """The stream that a backward will run on too. For gradients that it passes on itself, autograd orders streams and keeps memory
    from being used again too early; what a link delivers is none of these."""
    return torch.cuda.current_stream(x.device) if x.is_cuda else None


def _backward_pass() -> int:
    """Number of the backward that is running: one of each call of torch.autograd.backward or grad."""
    number: int = torch._C._current_graph_task_id()
    return number
