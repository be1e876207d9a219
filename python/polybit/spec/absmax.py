"""Double quantization: the scales of a quantized weight, themselves quantized to 8 bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import codebooks
from .base import Op, Sample, block_count, check_tensor, empty_like, fail, tree_sum
from .blockwise import midpoints, quantize_values

NESTED_BLOCK = 256


def places(count: int, block_offset: int, row_blocks: int, block_stride: int, device: torch.device) -> Tensor:
    """p(i): the place of block i of this weight in the whole that was quantized. int64 [count]."""
    i = torch.arange(count, device=device)
    if block_stride == 0:
        return block_offset + i
    return block_offset + torch.div(i, row_blocks, rounding_mode="floor") * block_stride + i % row_blocks


def restore(q: Tensor, nested_absmax: Tensor, nested_code: Tensor, nested_offset: Tensor, place: Tensor) -> Tensor:
    """fp32 scales: code[q[i]] * nested_absmax[p(i) / 256] + offset, two roundings."""
    nested = nested_absmax.reshape(-1)[torch.div(place, NESTED_BLOCK, rounding_mode="floor")]
    return nested_code[q.reshape(-1).long()] * nested + nested_offset.reshape(())


def check_places(op: str, count: int, nested_count: int, block_offset: int, row_blocks: int, block_stride: int) -> None:
    """The last place must have its nested absmax."""
    if block_offset < 0:
        raise fail(op, "block_offset", "at least 0", block_offset)
    if block_stride == 0:
        last = block_offset + count - 1
    else:
        if row_blocks < 1 or count % row_blocks:
            raise fail(op, "row_blocks", f"a divisor of the {count} blocks when block_stride is set", row_blocks)
        if block_stride < row_blocks:
            raise fail(op, "block_stride", f"0 or at least the {row_blocks} blocks of a row", block_stride)
        last = block_offset + (count // row_blocks - 1) * block_stride + row_blocks - 1
    if count > 0 and last // NESTED_BLOCK >= nested_count:
        raise fail(op, "nested_absmax", f"at least {last // NESTED_BLOCK + 1} elements long", nested_count)


def quantize_alloc(absmax: Tensor, code: Tensor) -> tuple[Tensor, ...]:
    """q uint8 like absmax, nested_absmax fp32 [ceil(count / 256)], nested_offset fp32 []."""
    op = "quantize_absmax"
    check_tensor(op, "absmax", absmax, torch.float32)
    check_tensor(op, "code", code, torch.float32, 256)
    device = absmax.device
    nested = torch.empty(block_count(absmax.numel(), NESTED_BLOCK), dtype=torch.float32, device=device)
    q = torch.empty(absmax.shape, dtype=torch.uint8, device=device)
    return q, nested, torch.empty((), dtype=torch.float32, device=device)


def quantize_reference(absmax: Tensor, code: Tensor) -> tuple[Tensor, ...]:
    """The mean is a tree sum over all blocks, divided by float(count); 0 when there are no blocks."""
    flat = absmax.reshape(-1)
    if flat.numel() == 0:
        return absmax.to(torch.uint8), absmax.new_zeros(0), absmax.new_zeros(())
    total = tree_sum(flat)
    offset = torch.div(total, torch.full_like(total, float(flat.numel())))
    q, nested = quantize_values(flat - offset, midpoints(code), NESTED_BLOCK)
    return q.view(absmax.shape), nested, offset


def dequantize_alloc(
    q: Tensor,
    nested_absmax: Tensor,
    nested_code: Tensor,
    nested_offset: Tensor,
    block_offset: int,
    row_blocks: int,
    block_stride: int,
) -> tuple[Tensor, ...]:
    """absmax fp32 like q."""
    op = "dequantize_absmax"
    check_tensor(op, "q", q, torch.uint8)
    check_tensor(op, "nested_absmax", nested_absmax, torch.float32)
    check_tensor(op, "nested_code", nested_code, torch.float32, 256)
    check_tensor(op, "nested_offset", nested_offset, torch.float32, 1)
    check_places(op, q.numel(), nested_absmax.numel(), block_offset, row_blocks, block_stride)
    return (empty_like(q, torch.float32),)


def dequantize_reference(
    q: Tensor,
    nested_absmax: Tensor,
    nested_code: Tensor,
    nested_offset: Tensor,
    block_offset: int,
    row_blocks: int,
    block_stride: int,
) -> tuple[Tensor, ...]:
    """See restore."""
    place = places(q.numel(), block_offset, row_blocks, block_stride, q.device)
    return (restore(q, nested_absmax, nested_code, nested_offset, place).view(q.shape),)


def scales(count: int, seed: int) -> Tensor:
    """Scales as a weight has them: positive, around 2.5 standard deviations."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator).abs() * 0.3 + 2.4


def quantize_samples(device: torch.device | str) -> Iterator[Sample]:
    """Sizes around the block of 256 and the tree's powers of two; zeros, NaN, infinity."""
    code = codebooks.dynamic()[0].to(device)
    for count in (0, 1, 2, 3, 5, 17, 255, 256, 257, 511, 512, 513, 1000, 4097, 20011):
        yield Sample(f"count={count}", (scales(count, count).to(device), code))
    yield Sample("unsigned", (scales(700, 1).to(device), codebooks.dynamic(signed=False)[0].to(device)))
    yield Sample("zeros", (torch.zeros(300, device=device), code))
    yield Sample("equal", (torch.full((300,), 0.1, device=device), code))
    for name, value in (("nan", float("nan")), ("inf", float("inf"))):
        x = scales(300, 2)
        x[17] = value
        yield Sample(name, (x.to(device), code))


def dequantize_samples(device: torch.device | str) -> Iterator[Sample]:
    """Whole weights, row shards (offset) and column shards (offset and stride)."""
    code = codebooks.dynamic()[0]
    q, nested, offset = quantize_reference(scales(2048, 3), code)

    def sample(name: str, part: Tensor, block_offset: int, row_blocks: int, block_stride: int) -> Sample:
        tensors = [t.to(device) for t in (part, nested, code, offset)]
        return Sample(name, (*tensors, block_offset, row_blocks, block_stride))

    for count in (0, 1, 255, 256, 257, 2048):
        yield sample(f"count={count}", q[:count].clone(), 0, 0, 0)
    yield sample("rows", q[300:1000].clone(), 300, 0, 0)
    yield sample("last-rows", q[301:].clone(), 301, 0, 0)
    for width in (1, 3, 8, 64):
        part = q.view(32, 64)[:, 64 - width :].reshape(-1).clone()
        yield sample(f"columns={width}", part, 64 - width, width, 64)
    low, low_nested, low_offset = quantize_reference(torch.full((300,), float("nan")), code)
    yield Sample("nan", tuple(t.to(device) for t in (low, low_nested, code, low_offset)) + (0, 0, 0))


OPS = (
    Op("quantize_absmax", quantize_alloc, quantize_reference, quantize_samples),
    Op("dequantize_absmax", dequantize_alloc, dequantize_reference, dequantize_samples),
)
