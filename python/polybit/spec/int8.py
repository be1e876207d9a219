"""int8: quantization by row, exact products, and the linear layer of LLM.int8() (Dettmers et al. 2022) as one op."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .base import (
    FLOATS,
    SMALLEST_NORMAL,
    Op,
    Sample,
    absmax_bits,
    check_float,
    check_out_dtype,
    check_tensor,
    empty_like,
    fail,
    reciprocal,
)
from .blockwise import noise
from .matmul import add_bias, check_bias, features, tolerance

# The fp32 nearest 1/127.
INVERSE = 0.007874015718698502
# 127 * 127 * K stays below 2^31.
LONGEST = 133152


def check_threshold(op: str, threshold: float) -> None:
    """0 switches outliers off."""
    if not threshold >= 0.0:
        raise fail(op, "threshold", "at least 0", threshold)


def check_longest(op: str, argument: str, k: int) -> None:
    """int32 accumulates exactly up to here."""
    if k > LONGEST:
        raise fail(op, argument, f"at most {LONGEST} long in its last dimension", k)


def quantize_alloc(x: Tensor, threshold: float) -> tuple[Tensor, ...]:
    """q int8 like x, absmax fp32 [rows], outlier uint8 [K]."""
    op = "quantize_int8"
    check_float(op, "x", x)
    k = features(op, "x", x)
    check_threshold(op, threshold)
    device = x.device
    absmax = torch.empty(math.prod(x.shape[:-1]), dtype=torch.float32, device=device)
    q = torch.empty(x.shape, dtype=torch.int8, device=device)
    return q, absmax, torch.empty(k, dtype=torch.uint8, device=device)


def quantize_reference(x: Tensor, threshold: float) -> tuple[Tensor, ...]:
    """docs/numerics.md, int8. A product beyond int8 (only rows of an absmax below 2^-121) is clamped to +-127."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).to(torch.float32)
    limit = torch.full((), threshold, dtype=torch.float32, device=x.device)
    outliers = rows.abs() >= limit if threshold > 0 else torch.zeros_like(rows, dtype=torch.bool)
    marked = outliers.any(0)
    absmax = absmax_bits(torch.where(outliers, 0.0, rows))
    zero = absmax < SMALLEST_NORMAL
    scaled = rows * reciprocal(absmax, 127.0)[:, None]
    dropped = marked[None, :] | zero[:, None] | scaled.isnan()
    q = torch.where(dropped, 0.0, scaled).round().clamp(-127, 127).to(torch.int8)
    return q.view(x.shape), torch.where(zero, 0.0, absmax), marked.to(torch.uint8)


def dequantize_alloc(q: Tensor, absmax: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q int8 [..., K], absmax fp32 [rows] -> y like q, of the dtype."""
    op = "dequantize_int8"
    check_tensor(op, "q", q, torch.int8)
    features(op, "q", q)
    check_tensor(op, "absmax", absmax, torch.float32, math.prod(q.shape[:-1]))
    check_out_dtype(op, dtype)
    return (empty_like(q, dtype),)


def dequantize_reference(q: Tensor, absmax: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(float(q) * absmax) * (1/127), rounded to the dtype."""
    y = (q.to(torch.float32) * absmax.view(*q.shape[:-1], 1)) * INVERSE
    return (y.to(dtype),)


def matmul_alloc(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """a int8 [..., K], b int8 [N, K] -> y int32 [..., N]."""
    op = "matmul_int8"
    check_tensor(op, "a", a, torch.int8)
    check_tensor(op, "b", b, torch.int8)
    k = features(op, "a", a)
    if b.dim() != 2 or b.shape[1] != k:
        raise fail(op, "b", f"of shape [N, {k}]", list(b.shape))
    check_longest(op, "a", k)
    return (torch.empty((*a.shape[:-1], b.shape[0]), dtype=torch.int32, device=a.device),)


def matmul_reference(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Exact: fp64 holds every partial sum."""
    return ((a.double() @ b.double().t()).to(torch.int32),)


def check_weight(op: str, weight: Tensor, weight_absmax: Tensor, x: Tensor) -> None:
    """weight int8 [N, K], weight_absmax fp32 [N]."""
    check_tensor(op, "weight", weight, torch.int8)
    if weight.dim() != 2:
        raise fail(op, "weight", "2-D", f"{weight.dim()}-D")
    check_tensor(op, "weight_absmax", weight_absmax, torch.float32, weight.shape[0])


def linear_alloc(
    x: Tensor, weight: Tensor, weight_absmax: Tensor, bias: Tensor | None, threshold: float, row_outliers: int
) -> tuple[Tensor, ...]:
    """x [..., K], weight int8 [N, K], weight_absmax fp32 [N], bias [N] -> y [..., N] of the dtype of x."""
    op = "linear_int8"
    check_float(op, "x", x)
    check_weight(op, weight, weight_absmax, x)
    n, k = weight.shape
    if features(op, "x", x) != k:
        raise fail(op, "x", f"of shape [..., {k}]", list(x.shape))
    check_longest(op, "x", k)
    check_threshold(op, threshold)
    if row_outliers not in (0, 1):
        raise fail(op, "row_outliers", "0 or 1", row_outliers)
    check_bias(op, bias, n, x.dtype, x)
    return (torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device),)


def linear_reference(
    x: Tensor, weight: Tensor, weight_absmax: Tensor, bias: Tensor | None, threshold: float, row_outliers: int
) -> tuple[Tensor, ...]:
    """The int8 product of the regular columns plus the high precision one of the outlier columns, rounded once."""
    if row_outliers and x.dim() > 1 and x.numel():
        rows = [linear_reference(row, weight, weight_absmax, bias, threshold, 0)[0] for row in x.flatten(0, -2)]
        return (torch.stack(rows).view(*x.shape[:-1], weight.shape[0]),)
    q, absmax, outlier = quantize_reference(x, threshold)
    weight_scale = weight_absmax * INVERSE
    scale = (absmax * INVERSE).view(*x.shape[:-1], 1) * weight_scale
    y = (q.double() @ weight.double().t()) * scale.double()
    # Only the outlier columns: an infinity elsewhere must not meet a zero.
    columns = outlier.bool()
    w = weight[:, columns].float() * weight_scale[:, None]
    y = y + x[..., columns].double() @ w.double().t()
    return (add_bias(y, bias).to(x.dtype),)


def transposed_alloc(dy: Tensor, weight: Tensor, weight_absmax: Tensor) -> tuple[Tensor, ...]:
    """dy [..., N] -> dx [..., K] of the dtype of dy."""
    op = "linear_int8_transposed"
    check_float(op, "dy", dy)
    check_weight(op, weight, weight_absmax, dy)
    n, k = weight.shape
    if features(op, "dy", dy) != n:
        raise fail(op, "dy", f"of shape [..., {n}]", list(dy.shape))
    return (torch.empty((*dy.shape[:-1], k), dtype=dy.dtype, device=dy.device),)


def transposed_reference(dy: Tensor, weight: Tensor, weight_absmax: Tensor) -> tuple[Tensor, ...]:
    """dx = dy (float(w) * (w_absmax * (1/127)))."""
    w = weight.float() * (weight_absmax * INVERSE)[:, None]
    return ((dy.double() @ w.double()).to(dy.dtype),)


SHAPES = ((1, 64), (3, 100), (17, 33), (5, 1), (4, 1003), (0, 64), (33, 256), (2, 0))


def quantize_samples(device: torch.device | str) -> Iterator[Sample]:
    """Shapes, dtypes, thresholds; ties, zero rows, NaN, infinity, tiny rows."""
    for i, (m, k) in enumerate(SHAPES):
        for dtype in FLOATS:
            for threshold in (0.0, 2.0, 6.0):
                case = f"m={m}-k={k}-{dtype}-threshold={threshold:g}".replace("torch.", "")
                yield Sample(case, (noise((m, k), i, dtype, 2.5).to(device), threshold))
    x = noise((2, 3, 50), 1).to(device)
    yield Sample("3-d", (x, 0.0))
    yield Sample("1-d", (x[0, 0].clone(), 2.0))
    yield Sample("low-threshold", (x / 4, 0.5))
    ties = (torch.arange(-127, 128).float() / 2).repeat(2, 1)
    ties[0, 0], ties[1, 0] = 127.0, -127.0
    yield Sample("ties", (ties.to(device), 0.0))
    yield Sample("at-threshold", (torch.tensor([[6.0, 1.0, -6.0, 5.999], [0.0, 6.0, 2.0, 3.0]], device=device), 6.0))
    yield Sample("all-outliers", (torch.full((3, 9), 7.0, device=device), 6.0))
    x = noise((6, 40), 2)
    x[0] = 0.0
    x[1] = -0.0
    x[2, 3] = float("nan")
    x[3, 5] = float("inf")
    x[4] *= 2.0**-124
    x[5] = 2.0**-130
    for threshold in (0.0, 6.0):
        yield Sample(f"special-threshold={threshold:g}", (x.to(device), threshold))


def dequantize_samples(device: torch.device | str) -> Iterator[Sample]:
    """Shapes and dtypes."""
    for i, (m, k) in enumerate(SHAPES):
        q, absmax, _ = quantize_reference(noise((m, k), i), 0.0)
        for dtype in FLOATS:
            yield Sample(f"m={m}-k={k}-{dtype}".replace("torch.", ""), (q.to(device), absmax.to(device), dtype))
    absmax = torch.tensor([float("nan"), float("inf"), 0.0], device=device)
    yield Sample("special", (torch.ones(3, 20, dtype=torch.int8, device=device), absmax, torch.float32))


def integers(shape: tuple[int, ...], seed: int, low: int = -128) -> Tensor:
    """Seeded int8, low...127."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 128, shape, dtype=torch.int8, generator=generator)


PRODUCTS = (
    (1, 1, 1), (1, 64, 64), (3, 17, 100), (17, 33, 256), (1, 5, 1007), (4, 127, 192), (33, 64, 384), (0, 8, 64),
    (3, 0, 64), (3, 8, 0), (5, 2, 4099),
)  # fmt: skip


def matmul_samples(device: torch.device | str) -> Iterator[Sample]:
    """Shapes over the whole range of int8; the extremes, where a saturating instruction would show."""
    for i, (m, n, k) in enumerate(PRODUCTS):
        yield Sample(f"m={m}-n={n}-k={k}", (integers((m, k), i).to(device), integers((n, k), i + 50).to(device)))
    yield Sample("3-d", (integers((2, 3, 70), 1).to(device), integers((9, 70), 2).to(device)))
    for a in (-128, 127):
        for b in (-128, 127):
            full = [torch.full((n, 515), v, dtype=torch.int8, device=device) for n, v in ((3, a), (5, b))]
            yield Sample(f"all-{a}-{b}", (full[0], full[1]))


def linear_samples(device: torch.device | str) -> Iterator[Sample]:
    """Shapes, dtypes, thresholds 0 and 6, with and without bias, outliers in some columns, special values."""
    for i, (m, n, k) in enumerate(PRODUCTS):
        weight, absmax = integers((n, k), i, -127).to(device), (noise(n, i).abs() + 2).to(device)
        for j, dtype in enumerate(FLOATS):
            for threshold in (0.0, 6.0):
                x = noise((m, k), i + 100)
                x[:, 3::50] *= 10
                bias = noise(n, i + 200, dtype).to(device) if (i + j) % 2 else None
                case = f"m={m}-n={n}-k={k}-{dtype}-threshold={threshold:g}".replace("torch.", "")
                limits = tolerance(dtype, 4 * k)
                yield Sample(case, (x.to(dtype).to(device), weight, absmax, bias, threshold, 0), **limits)
                if threshold and m > 1:
                    x = x.clone()
                    x[m // 2] *= 4  # a row with outliers that the others do not have
                    args = (x.to(dtype).to(device), weight, absmax, bias, threshold, 1)
                    yield Sample(f"{case}-by-row", args, **limits)
    weight, absmax = integers((6, 40), 1, -127).to(device), noise(6, 3).abs().to(device)
    x = noise((2, 2, 40), 4)
    x[0, 0, 3] = float("nan")
    x[0, 1, :] = 0.0
    for threshold in (0.0, 6.0):
        case = f"nan-threshold={threshold:g}"
        yield Sample(case, (x.to(device), weight, absmax, None, threshold, 0), **tolerance(torch.float32, 160))
    x = noise((3, 40), 5)
    x[1, 7] = float("inf")
    for by_row in (0, 1):
        args = (x.to(device), weight, absmax, None, 6.0, by_row)
        yield Sample(f"inf-by-row={by_row}", args, **tolerance(torch.float32, 160))


def transposed_samples(device: torch.device | str) -> Iterator[Sample]:
    """Shapes and dtypes."""
    for i, (m, n, k) in enumerate(PRODUCTS):
        weight, absmax = integers((n, k), i, -127).to(device), (noise(n, i).abs() + 2).to(device)
        for dtype in FLOATS:
            dy = noise((m, n), i + 100, dtype).to(device)
            yield Sample(
                f"m={m}-n={n}-k={k}-{dtype}".replace("torch.", ""), (dy, weight, absmax), **tolerance(dtype, 4 * n)
            )


OPS = (
    Op("quantize_int8", quantize_alloc, quantize_reference, quantize_samples),
    Op("dequantize_int8", dequantize_alloc, dequantize_reference, dequantize_samples),
    Op("matmul_int8", matmul_alloc, matmul_reference, matmul_samples),
    Op("linear_int8", linear_alloc, linear_reference, linear_samples),
    Op("linear_int8_transposed", transposed_alloc, transposed_reference, transposed_samples),
)
