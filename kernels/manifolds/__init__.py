"""Maps from n x n logits to H_res: one file each, with its reference and its Triton functions.

Begin with `base.py`, which says what a manifold is, and `identity_offset.py`, the shortest one. A file imports from
`pipehc.kernels` what stands below the operations (shapes, matrices, differentiation, language), and may build on other manifolds,
as `hybrid.py` does.

A new map is a file here and its line in KINDS: the operations, their kernels and `HyperConnection(kind=...)` then know it. In YAML
its name is one more word of `residual.kind` in `pipehc/config/schema.py`, which knows no torch; the planner's closed form
(`pipehc/planning/parameters.py`) changes only if it has other parameters than mHC. A test fails until both agree with KINDS.
`tests/kernels/test_<name>.py` proves the map itself, with `check_map` for its Triton functions.
"""

from pipehc.kernels.manifolds.base import Manifold, Settings
from pipehc.kernels.manifolds.birkhoff import Birkhoff
from pipehc.kernels.manifolds.harmonized import Harmonized
from pipehc.kernels.manifolds.hybrid import Hybrid
from pipehc.kernels.manifolds.identity_offset import IdentityOffset
from pipehc.kernels.manifolds.isometric import Isometric

KINDS: dict[str, type[Manifold]] = {
    "hc": IdentityOffset,
    "mhc": Birkhoff,
    "isohc": Isometric,
    "hybrid": Hybrid,
    "harmonized": Harmonized,
}
"""By the name of the connection, as users write it."""

__all__ = ["KINDS", "Birkhoff", "Harmonized", "Hybrid", "IdentityOffset", "Isometric", "Manifold", "Settings"]
