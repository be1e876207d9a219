"""The meaning of every op of core/ops.def in plain torch: what it allocates, what it computes, on what it is tested.

Normative together with docs/numerics.md. Nothing here depends on the rest of polybit.
"""

from __future__ import annotations

from . import absmax, blockwise, codebooks, gather, int8, kbit, matmul, multi, optim, pack
from .base import Op, Sample

OPS: dict[str, Op] = {
    op.name: op for module in (blockwise, kbit, absmax, matmul, int8, pack, gather, multi, optim) for op in module.OPS
}

__all__ = ["OPS", "Op", "Sample", "codebooks"]
