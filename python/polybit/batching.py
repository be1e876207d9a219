"""torch.func.vmap over the ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from polybit.ops import LIB, ROWS

# Their first argument has free leading dimensions and its rows do not know of each other: one call does for the batch.
_BY_ROWS = (
    "matmul_kbit",
    "matmul_kbit_transposed",
    "matmul_int8",
    "linear_int8_transposed",
    "gather_kbit",
    "gather_int8",
)


def _by_rows(name: str, args: Sequence[Any]) -> bool:
    if name == "linear_int8":
        *_, threshold, row_outliers = args
        return threshold == 0.0 or bool(row_outliers)  # otherwise outlier columns are found over all rows
    return name in _BY_ROWS


def _rule(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.polybit, name).default

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        dims = [dim if isinstance(arg, Tensor) else None for arg, dim in zip(args, in_dims, strict=True)]
        if dims[0] is not None and not any(dim is not None for dim in dims[1:]) and _by_rows(name, args):
            return op(args[0].movedim(dims[0], 0), *args[1:]), 0
        # A batch of weights, or rows that belong together: one call after another.
        if info.batch_size == 0:
            raise ValueError(f"{name}: vmap over an empty batch")
        outs = [
            op(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(outs[0], Tensor):
            return torch.stack(outs), 0
        stacked = tuple(torch.stack(parts) for parts in zip(*outs, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def register() -> None:
    """Register the rules; called once, at import. Ops on lists of tensors have none."""
    for name, row in ROWS.items():
        if not any(kind in ("INS", "MUTS") for kind, _ in row.inputs):
            torch.library.register_vmap(f"polybit::{name}", _rule(name), lib=LIB)


register()
