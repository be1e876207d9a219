"""Rows of a quantized table, dequantized: embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import codebooks
from .base import FLOATS, INDICES, Op, Sample, check_out_dtype, check_tensor, fail, fail_type
from .blockwise import noise
from .int8 import dequantize_reference as dequantize_int8
from .int8 import quantize_reference as quantize_int8
from .kbit import check_weight, moved, weight, weight_values


def check_index(op: str, index: Tensor) -> None:
    """Whether it is in range is the reference's and the kernels' to say: alloc may not look at values."""
    if index.dtype not in INDICES:
        raise fail_type(op, "index", "int64 or int32", index.dtype)


def rows(op: str, table: Tensor, index: Tensor) -> Tensor:
    """table[index]; out of range raises IndexError on the CPU and gives NaN elsewhere."""
    n = table.shape[0]
    if index.numel() == 0:
        return table.new_empty((*index.shape, table.shape[1]))
    outside = (index < 0) | (index >= n)
    if index.device.type == "cpu":
        if bool(outside.any()):
            raise IndexError(f"{op}: index must be in [0, {n}), got {int(index[outside][0])}")
        return table[index.long()]
    picked = table[torch.where(outside, 0, index).long()] if n else table.new_zeros((*index.shape, table.shape[1]))
    return torch.where(outside[..., None], torch.nan, picked)


def kbit_alloc(index: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """index of any shape, a table [n, k] -> y [*index, k] of the dtype."""
    op = "gather_kbit"
    *run, n, k, block, bits, block_offset, block_stride, dtype = rest
    check_index(op, index)
    check_out_dtype(op, dtype)
    check_weight(op, n * k, k, run, block, bits, block_offset, block_stride)
    return (torch.empty((*index.shape, k), dtype=dtype, device=index.device),)


def kbit_reference(index: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Rows of the restored table."""
    *run, n, k, block, bits, block_offset, block_stride, dtype = rest
    table = weight_values(n * k, k, run, block, bits, block_offset, block_stride).view(n, k)
    return (rows("gather_kbit", table, index).to(dtype),)


def int8_alloc(index: Tensor, q: Tensor, absmax: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """index of any shape, q int8 [n, k], absmax fp32 [n] -> y [*index, k] of the dtype."""
    op = "gather_int8"
    check_index(op, index)
    check_tensor(op, "q", q, torch.int8)
    if q.dim() != 2:
        raise fail(op, "q", "2-D", f"{q.dim()}-D")
    check_tensor(op, "absmax", absmax, torch.float32, q.shape[0])
    check_out_dtype(op, dtype)
    return (torch.empty((*index.shape, q.shape[1]), dtype=dtype, device=index.device),)


def int8_reference(index: Tensor, q: Tensor, absmax: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Rows of the dequantized table."""
    table = dequantize_int8(q, absmax, torch.float32)[0]
    return (rows("gather_int8", table, index).to(dtype),)


def indices(n: int, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Index tensors into a table of n rows."""
    generator = torch.Generator().manual_seed(seed)
    some = torch.randint(0, n, (3, 5), generator=generator)
    yield "int64", some
    yield "int32", some.to(torch.int32)
    yield "edges", torch.tensor([n - 1, 0, n - 1])
    yield "scalar", torch.tensor(n // 2)
    yield "empty", torch.empty(0, 4, dtype=torch.int64)


def kbit_samples(device: torch.device | str) -> Iterator[Sample]:
    """Every codebook; rows that start inside a block and inside a byte; a column shard."""
    i = 0
    for name in codebooks.kbit():
        bits = int(name[-1])
        for n, k, block, double in ((10, 128, 64, False), (37, 100, 64, True), (9, 33, 16, False), (300, 64, 32, True)):
            run = moved(weight(noise((n, k), n), name, block, double), device)
            for case, index in indices(n, i):
                dtype = FLOATS[i % 3]
                i += 1
                args = (index.to(device), *run, n, k, block, bits, 0, 0, dtype)
                yield Sample(f"{name}-n={n}-k={k}-double={int(double)}-{case}-{dtype}".replace("torch.", ""), args)
    q, absmax, *rest = weight(noise((32, 1024), 13), "nf4", 32, True)
    assert q is not None and absmax is not None
    part = (q.view(32, 512)[:, 256:].reshape(-1), absmax.view(32, 32)[:, 16:].reshape(-1), *rest)
    index = torch.tensor([31, 0, 16], device=device)
    yield Sample("columns", (index, *moved(part, device), 32, 512, 32, 4, 16, 32, torch.float32))


def int8_samples(device: torch.device | str) -> Iterator[Sample]:
    """Shapes, dtypes, index tensors."""
    for i, (n, k) in enumerate(((10, 128), (37, 33), (1, 1), (5, 1003))):
        q, absmax, _ = quantize_int8(noise((n, k), i), 0.0)
        for case, index in indices(n, i):
            for dtype in FLOATS:
                args = (index.to(device), q.to(device), absmax.to(device), dtype)
                yield Sample(f"n={n}-k={k}-{case}-{dtype}".replace("torch.", ""), args)


OPS = (
    Op("gather_kbit", kbit_alloc, kbit_reference, kbit_samples),
    Op("gather_int8", int8_alloc, int8_reference, int8_samples),
)
