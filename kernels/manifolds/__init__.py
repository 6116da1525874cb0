"""Maps from n x n logits to H_res: one file each, with its reference and its kernel."""

from pipehc.kernels.manifolds.base import Manifold
from pipehc.kernels.manifolds.birkhoff import Birkhoff
from pipehc.kernels.manifolds.harmonized import Harmonized
from pipehc.kernels.manifolds.hybrid import Hybrid
from pipehc.kernels.manifolds.identity_offset import IdentityOffset
from pipehc.kernels.manifolds.isometric import Isometric

__all__ = ["Birkhoff", "Harmonized", "Hybrid", "IdentityOffset", "Isometric", "Manifold"]
