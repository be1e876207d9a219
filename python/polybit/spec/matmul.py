"""Products with a k-bit weight: y = x W^T + bias, dx = dy W, their grouped forms, and the one with int8 activations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import codebooks
from .base import FLOATS, Op, Sample, check_float, check_out_dtype, check_tensor, fail
from .blockwise import noise
from .kbit import check_weight, element_scales, moved, unpack, weight, weight_values


def features(op: str, argument: str, x: Tensor) -> int:
    """The last dimension of x."""
    if x.dim() == 0:
        raise fail(op, argument, "at least 1-D", "a scalar")
    return x.shape[-1]


def check_bias(op: str, bias: Tensor | None, n: int, dtype: torch.dtype, x: Tensor) -> None:
    """bias is [n], of the dtype of the output."""
    if bias is not None:
        check_tensor(op, "bias", bias, dtype, n)


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """y + bias in the precision of y."""
    return y if bias is None else y + bias.to(y.dtype)


# In the functions below `run` is q absmax code nested_absmax nested_code nested_offset.


def forward_alloc(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """x [..., K] -> y [..., n] of the dtype of x; bias [n] of that dtype."""
    op = "matmul_kbit"
    *run, bias, packed, n, block, bits, block_offset, block_stride = rest
    check_float(op, "x", x)
    k = features(op, "x", x)
    check_weight(op, n * k, k, run, block, bits, block_offset, block_stride)
    check_bias(op, bias, n, x.dtype, x)
    if packed is not None:
        check_tensor(op, "packed", packed, torch.uint8)
    return (torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device),)


def forward_reference(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """y = x W^T + bias, summed in fp64, rounded once. `packed` is a layout of the same q: no part of the meaning."""
    *run, bias, _packed, n, block, bits, block_offset, block_stride = rest
    k = x.shape[-1]
    w = weight_values(n * k, k, run, block, bits, block_offset, block_stride).view(n, k)
    return (add_bias(x.double() @ w.double().t(), bias).to(x.dtype),)


def transposed_alloc(dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """dy [..., N] -> dx [..., k] of the dtype of dy."""
    op = "matmul_kbit_transposed"
    *run, k, block, bits, block_offset, block_stride = rest
    check_float(op, "dy", dy)
    check_weight(op, features(op, "dy", dy) * k, k, run, block, bits, block_offset, block_stride)
    return (torch.empty((*dy.shape[:-1], k), dtype=dy.dtype, device=dy.device),)


def transposed_reference(dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """dx = dy W, summed in fp64, rounded once."""
    *run, k, block, bits, block_offset, block_stride = rest
    n = dy.shape[-1]
    w = weight_values(n * k, k, run, block, bits, block_offset, block_stride).view(n, k)
    return ((dy.double() @ w.double()).to(dy.dtype),)


def check_groups(op: str, argument: str, x: Tensor, group_end: Tensor) -> None:
    """x [T, features], group_end int32 [E]."""
    check_float(op, argument, x)
    if x.dim() != 2:
        raise fail(op, argument, "2-D", f"{x.dim()}-D")
    check_tensor(op, "group_end", group_end, torch.int32)
    if group_end.dim() != 1:
        raise fail(op, "group_end", "1-D", f"{group_end.dim()}-D")


def grouped_alloc(x: Tensor, group_end: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """x [T, K], group_end int32 [E], a stack [E, n, K] -> y [T, n] of the dtype of x."""
    op = "matmul_kbit_grouped"
    *run, n, block, bits, block_offset, block_stride = rest
    check_groups(op, "x", x, group_end)
    k = x.shape[1]
    check_weight(op, group_end.shape[0] * n * k, k, run, block, bits, block_offset, block_stride)
    return (torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device),)


def grouped_product(x: Tensor, group_end: Tensor, weights: Tensor) -> Tensor:
    """Rows [group_end[e-1], group_end[e]) of x times weights[e] (fp64); zeros behind the last group."""
    y = torch.zeros((x.shape[0], weights.shape[2]), dtype=torch.float64, device=x.device)
    begin = 0
    for e, end in enumerate(group_end.tolist()):
        y[begin:end] = x[begin:end].double() @ weights[e]
        begin = end
    return y.to(x.dtype)


def grouped_reference(x: Tensor, group_end: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """See grouped_product."""
    *run, n, block, bits, block_offset, block_stride = rest
    e, k = group_end.shape[0], x.shape[1]
    w = weight_values(e * n * k, k, run, block, bits, block_offset, block_stride).view(e, n, k)
    return (grouped_product(x, group_end, w.double().transpose(1, 2)),)


def grouped_transposed_alloc(dy: Tensor, group_end: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """dy [T, N], group_end int32 [E], a stack [E, N, k] -> dx [T, k] of the dtype of dy."""
    op = "matmul_kbit_grouped_transposed"
    *run, k, block, bits, block_offset, block_stride = rest
    check_groups(op, "dy", dy, group_end)
    check_weight(op, group_end.shape[0] * dy.shape[1] * k, k, run, block, bits, block_offset, block_stride)
    return (torch.empty((dy.shape[0], k), dtype=dy.dtype, device=dy.device),)


def grouped_transposed_reference(dy: Tensor, group_end: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """See grouped_product."""
    *run, k, block, bits, block_offset, block_stride = rest
    e, n = group_end.shape[0], dy.shape[1]
    w = weight_values(e * n * k, k, run, block, bits, block_offset, block_stride).view(e, n, k)
    return (grouped_product(dy, group_end, w.double()),)


def int8_alloc(x: Tensor, x_absmax: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """x int8 [..., K], x_absmax fp32 [rows] -> y [..., n] of the dtype; bias [n] of that dtype."""
    op = "matmul_kbit_int8"
    *run, bias, n, block, bits, block_offset, block_stride, dtype = rest
    k = features(op, "x", x)
    check_tensor(op, "x", x, torch.int8)
    check_out_dtype(op, dtype)
    y = torch.empty((*x.shape[:-1], n), dtype=dtype, device=x.device)
    check_tensor(op, "x_absmax", x_absmax, torch.float32, math.prod(x.shape[:-1]))
    check_weight(op, n * k, k, run, block, bits, block_offset, block_stride)
    check_bias(op, bias, n, dtype, x)
    return (y,)


def int8_reference(x: Tensor, x_absmax: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The codebook rounded to int8, the sum over the segments in fp64."""
    *run, bias, n, block, bits, block_offset, block_stride, dtype = rest
    q, code = run[0], run[2]
    k = x.shape[-1]
    largest = code.abs().max()
    code8 = (code * torch.div(torch.full_like(largest, 127.0), largest)).round()
    scale = element_scales(n * k, k, run, block, block_offset, block_stride)
    w = (code8.double()[unpack(q, n * k, bits)] * scale.double()).view(n, k)
    factor = (x_absmax * torch.tensor(1 / 127, device=x.device)) * torch.div(largest, torch.full_like(largest, 127.0))
    y = (x.double() @ w.t()) * factor.double().view(*x.shape[:-1], 1)
    return (add_bias(y, bias).to(dtype),)


def tolerance(dtype: torch.dtype, terms: int) -> dict[str, float]:
    """For sums of `terms` products of magnitude 1: one rounding of the result, and of every weight to the dtype."""
    unit = {torch.float32: 2.0**-21, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    return {"rtol": unit, "atol": 2 * unit * math.sqrt(terms + 1)}


SHAPES = ((1, 64, 64), (3, 17, 100), (17, 33, 256), (1, 5, 1007), (4, 127, 200), (2, 1, 1), (33, 64, 384), (0, 8, 64))


def cases() -> Iterator[tuple[str, int, int, int, str, int, bool, torch.dtype]]:
    """(id, m, n, k, codebook, block, double, dtype) of the plain products."""
    i = 0
    for name in codebooks.kbit():
        for double in (False, True):
            for m, n, k in SHAPES:
                block = (64, 32, 128, 16, 256, 64, 4096)[i % 7]
                # A step that is no divisor of 3, so that all dtypes meet all shapes.
                dtype = FLOATS[(i + i // 8) % 3]
                i += 1
                case = f"{name}-m={m}-n={n}-k={k}-block={block}-double={int(double)}-{dtype}".replace("torch.", "")
                yield case, m, n, k, name, block, double, dtype
    yield "empty-k", 3, 5, 0, "nf4", 64, False, torch.float32
    yield "empty-n", 3, 0, 64, "nf4", 64, False, torch.float32
    yield "large", 9, 300, 1088, "nf4", 64, True, torch.bfloat16
    # Rows that end one before a unit of eight, and in which a block does; rows of units, of which the last is half a
    # unit of sixteen.
    for k in (7, 9, 24):
        yield f"units-{k}", 12, 2, k, "nf4", 16, False, torch.float32


def shards() -> Iterator[tuple[str, tuple[Any, ...], int, int, tuple[int, int, int, int]]]:
    """(id, run, n, k, (block, bits, block_offset, block_stride)): rows and columns of one [32, 1024] weight."""
    for name in ("nf4", "lloyd3", "nf2"):
        bits = int(name[-1])
        q, absmax, *rest = weight(noise((32, 1024), 13), name, 32, True)
        assert q is not None and absmax is not None
        row = 1024 * bits // 8
        yield f"{name}-rows", (q[9 * row :].clone(), absmax[9 * 32 :].clone(), *rest), 23, 1024, (32, bits, 288, 0)
        part = (q.view(32, row)[:, row // 2 :].reshape(-1), absmax.view(32, 32)[:, 16:].reshape(-1), *rest)
        yield f"{name}-columns", part, 32, 512, (32, bits, 16, 32)


def forward_samples(device: torch.device | str) -> Iterator[Sample]:
    """cases with and without bias, NaN in x, more dimensions, shards, an infinite scale."""
    for i, (case, m, n, k, name, block, double, dtype) in enumerate(cases()):
        run = moved(weight(noise((n, k), i), name, block, double), device)
        x = noise((m, k), i + 1000, dtype).to(device)
        bias = noise(n, i + 2000, dtype).to(device) if i % 2 else None
        yield Sample(case, (x, *run, bias, None, n, block, int(name[-1]), 0, 0), **tolerance(dtype, k))
    run = moved(weight(noise((6, 70), 1), "nf4", 64, False), device)
    x = noise((2, 3, 70), 2)
    yield Sample("3-d", (x.to(device), *run, None, None, 6, 64, 4, 0, 0), **tolerance(x.dtype, 70))
    yield Sample("1-d", (x[0, 0].to(device), *run, None, None, 6, 64, 4, 0, 0), **tolerance(x.dtype, 70))
    x = x.clone()
    x[0, 1, 5] = float("nan")
    yield Sample("nan", (x.to(device), *run, None, None, 6, 64, 4, 0, 0), **tolerance(x.dtype, 70))
    for case, part, n, k, numbers in shards():
        x = noise((7, k), 3).to(device)
        yield Sample(case, (x, *moved(part, device), None, None, n, *numbers), **tolerance(x.dtype, k))
    # The scale of the last block is infinite, and so is y: zeros behind the end of x may not meet it.
    q, absmax, code, *_ = weight(noise((1, 70), 4), "lloyd2", 64, False)
    assert q is not None and absmax is not None and code is not None
    x = weight_values(70, 70, (q, absmax, code, None, None, None), 64, 2, 0, 0).sign().view(1, 70)
    absmax[1] = float("inf")
    run = moved((q, absmax, code, None, None, None), device)
    yield Sample("infinite-scale", (x.to(device), *run, None, None, 1, 64, 2, 0, 0), **tolerance(x.dtype, 70))


def transposed_samples(device: torch.device | str) -> Iterator[Sample]:
    """cases and shards."""
    for i, (case, m, n, k, name, block, double, dtype) in enumerate(cases()):
        run = moved(weight(noise((n, k), i), name, block, double), device)
        dy = noise((m, n), i + 1000, dtype).to(device)
        yield Sample(case, (dy, *run, k, block, int(name[-1]), 0, 0), **tolerance(dtype, n))
    for case, part, n, k, numbers in shards():
        dy = noise((5, n), 3).to(device)
        yield Sample(case, (dy, *moved(part, device), k, *numbers), **tolerance(dy.dtype, n))


def grouped_cases() -> Iterator[tuple[str, list[int], int, int, int, str, int, bool, torch.dtype]]:
    """(id, group_end, rows, n, k, codebook, block, double, dtype)."""
    ends = {
        "even": ([4, 8, 12], 12),
        "empty": ([0, 5, 5, 9], 9),
        "rest": ([2, 6], 7),
        "none": ([0, 0, 0], 4),
        "one": ([17], 17),
        "no-rows": ([0, 0], 0),
    }
    i = 0
    for case, (group_end, rows) in ends.items():
        for name in ("nf4", "fp4", "nf3", "lloyd2"):
            for double in (False, True):
                n, k = ((16, 64), (7, 100), (33, 48))[i % 3]
                dtype = FLOATS[(i // 3 + i) % 3]
                i += 1
                yield f"{case}-{name}-double={int(double)}-{i}", group_end, rows, n, k, name, 32, double, dtype


def grouped_samples(device: torch.device | str, transposed: bool = False) -> Iterator[Sample]:
    """Even, empty and missing groups, rows behind the last one; blocks that straddle experts."""
    for i, (case, group_end, rows, n, k, name, block, double, dtype) in enumerate(grouped_cases()):
        run = moved(weight(noise((len(group_end), n, k), i), name, block, double), device)
        end = torch.tensor(group_end, dtype=torch.int32, device=device)
        width, other = (n, k) if transposed else (k, n)
        x = noise((rows, width), i + 1000, dtype).to(device)
        yield Sample(case, (x, end, *run, other, block, int(name[-1]), 0, 0), **tolerance(dtype, width))


def grouped_transposed_samples(device: torch.device | str) -> Iterator[Sample]:
    """As grouped_samples."""
    return grouped_samples(device, transposed=True)


def int8_samples(device: torch.device | str) -> Iterator[Sample]:
    """cases with and without bias, x over the whole range of int8; shards; the last code's value is the largest."""
    for i, (case, m, n, k, name, block, double, dtype) in enumerate(cases()):
        run = moved(weight(noise((n, k), i), name, block, double), device)
        x = (noise((m, k), i + 1000) * 50).clamp(-127, 127).to(torch.int8).to(device)
        bias = noise(n, i + 2000, dtype).to(device) if i % 2 else None
        absmax = (noise(m, i + 3000).abs() + 2).to(device)
        place = (n, block, int(name[-1]), 0, 0)
        yield Sample(case, (x, absmax, *run, bias, *place, dtype), **tolerance(dtype, k))
    for case, part, n, k, numbers in shards():
        x = (noise((5, k), 3) * 50).clamp(-127, 127).to(torch.int8).to(device)
        absmax = (noise(5, 4).abs() + 2).to(device)
        weight_run = moved(part, device)
        yield Sample(case, (x, absmax, *weight_run, None, n, *numbers, torch.float32), **tolerance(torch.float32, k))
    q, scales, code, *nested = weight(noise((8, 64), 5), "nf3", 64, False)
    assert code is not None
    code = code * torch.linspace(0.5, 1.5, 8)
    x = (noise((3, 64), 6) * 50).clamp(-127, 127).to(torch.int8)
    run = moved((x, noise(3, 7).abs() + 2, q, scales, code, *nested), device)
    yield Sample("last-largest", (*run, None, 8, 64, 3, 0, 0, torch.float32), **tolerance(torch.float32, 64))


OPS = (
    Op("matmul_kbit", forward_alloc, forward_reference, forward_samples),
    Op("matmul_kbit_transposed", transposed_alloc, transposed_reference, transposed_samples),
    Op("matmul_kbit_grouped", grouped_alloc, grouped_reference, grouped_samples),
    Op(
        "matmul_kbit_grouped_transposed",
        grouped_transposed_alloc,
        grouped_transposed_reference,
        grouped_transposed_samples,
    ),
    Op("matmul_kbit_int8", int8_alloc, int8_reference, int8_samples),
)
