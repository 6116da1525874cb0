"""Leaving half of a sub-layer's backward to a launch that reads the same rows anyway.

A sub-layer is x' = H_res x + H_post^T F(y). Backward starts at its end, in `post_res`, where only the gradient of f is needed at
once: F waits for it. Everything else - the gradients of H_res, H_post and x - is needed only after F's backward, when the operation
that computed the coefficients from the same x (`coefficients_pre` or `post_res_pre`) runs its own. So `post_res` hands it the
gradient of x' and f, and returns nothing for x, H_post and H_res. That saves reading x once, and writing and reading a partial
gradient of x.

What is handed on goes through autograd: the operation that made the coefficients has two results more, which post_res takes, and
their "gradients" are those two. So whoever brings gradients from one graph to another, or from one CUDA stream to another, brings
these as well: `carriers` and `join`.

The pair is found by a `Link` on the coefficient tensors. It is used only if post_res gets exactly the x, H_post and H_res of that
operation, once, unchanged and in one autograd graph, and neither coefficient has hooks or retains its gradient; otherwise post_res
computes all of its gradients. What a link takes away: `torch.autograd.grad(loss, h_res)` finds no gradient there. Pass
`h_res.view_as(h_res)` to post_res to get it.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

_ATTRIBUTE = "_pipehc_link"


class Link:
    """From the operation that made (H_post, H_res) of x to the one `post_res` that uses all three.

    x_next [T, n, C], f [T, C]: the carriers, results of that operation and arguments of post_res. Their contents are nothing; the
    gradient of x_next is that of x', and the gradient of f is f.
    """

    def __init__(self, x: Tensor, x_next: Tensor, f: Tensor) -> None:
        self.x_next, self.f = x_next, f
        self._source = weakref.ref(_root(x))
        self._state = _state(x)
        self._x = weakref.ref(x)
        self._claimed = False

    def attach(self, *coefficients: Tensor) -> None:
        """Marks the tensors by which `claim` finds this link."""
        for h in coefficients:
            setattr(h, _ATTRIBUTE, self)

    def _accepts(self, x: Tensor) -> bool:
        # A detached copy shares the storage but not the graph: it is a leaf, or has another root.
        same = x is self._x() or (x.grad_fn is not None and self._source() is _root(x))
        return same and self._state == _state(x)


def new_carriers(x: Tensor) -> tuple[Tensor, Tensor]:
    """A pair for streams x [T, n, C], to be returned by an autograd function. They share its memory, so that they take none."""
    return x.detach(), x[:, 0].detach()


def claim(x: Tensor, f: Tensor, h_post: Tensor, h_res: Tensor) -> Link | None:
    """The link of x and its coefficients, taken for good, or None if there is none to use."""
    link = _link_of(h_res)
    if link is None or _link_of(h_post) is not link or link._claimed or not link._accepts(x):
        return None
    if not (h_post.requires_grad and h_res.requires_grad) or any(h.retains_grad or h._backward_hooks for h in (h_post, h_res)):
        return None
    if f.dtype != x.dtype and torch.promote_types(f.dtype, x.dtype) != x.dtype:
        return None  # a gradient has the dtype of what it is of: f would be rounded
    link._claimed = True
    return link


def carriers(h_post: Tensor | None, h_res: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """What is to go beside these coefficients, as they were returned, into the graph where they are used; None if nothing is.

    The gradients that the carriers get there are to come back here, as those of the coefficients are.
    """
    link = None if h_res is None else _link_of(h_res)
    return (None, None) if link is None or h_post is None or _link_of(h_post) is not link else (link.x_next, link.f)


def join(x: Tensor, h_post: Tensor, h_res: Tensor, x_next: Tensor | None, f: Tensor | None) -> None:
    """Links coefficients in the graph that they were brought to, together with their x (of any shape) and `carriers`."""
    if x_next is not None and f is not None:
        Link(x.reshape(x_next.shape), x_next, f).attach(h_post, h_res)


def _link_of(h: Tensor) -> Link | None:
    link: Link | None = getattr(h, _ATTRIBUTE, None)
    return link


def _root(x: Tensor) -> Tensor:
    """The tensor that a chain of views starts from."""
    return x._base if x._is_view() and x._base is not None else x


def _state(x: Tensor) -> tuple[object, ...]:
    """What must be the same of x in both operations."""
    return x.storage_offset(), x.shape, x.stride(), x.requires_grad, x._version
