"""2, 3 and 4 bits with any codebook: quantization, scale search, packing, and the restored weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import absmax as scales
from . import codebooks
from .base import (
    FLOATS,
    SMALLEST_NORMAL,
    Op,
    Sample,
    block_count,
    check_bits,
    check_block,
    check_float,
    check_out_dtype,
    check_tensor,
    fail,
    rank,
    reciprocal,
    tree_sum,
)
from .blockwise import inputs, noise, scaled

# q absmax code nested_absmax nested_code nested_offset: a quantized weight, the last three None when not nested.
Run = Sequence[Any]

SEARCH_STEPS = [(j + 13) * 2.0**-5 for j in range(32)]


def byte_count(count: int, bits: int) -> int:
    """Bytes of `count` packed elements."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int, fill: Tensor) -> Tensor:
    """uint8 [ceil(n k / 8)] from uint8 codes [n]; positions behind the end hold the code `fill`, cut to the byte."""
    count = codes.numel()
    padded = (count + 7) // 8 * 8
    codes = torch.cat([codes, fill.to(torch.uint8).expand(padded - count)])
    if bits == 4:
        packed = (codes[0::2] << 4) | codes[1::2]
    else:
        place = torch.arange(bits, dtype=torch.uint8, device=codes.device)
        stream = ((codes[:, None] >> place) & 1).view(-1, 8)
        weight = 1 << torch.arange(8, dtype=torch.int32, device=codes.device)
        packed = (stream * weight).sum(-1).to(torch.uint8)
    return packed[: byte_count(count, bits)]


def unpack(q: Tensor, count: int, bits: int) -> Tensor:
    """int64 codes [count]."""
    q = q.reshape(-1)
    if bits == 4:
        return torch.stack([q >> 4, q & 15], 1).view(-1)[:count].long()
    stream = (q[:, None] >> torch.arange(8, dtype=torch.uint8, device=q.device)) & 1
    weight = 1 << torch.arange(bits, device=q.device)
    return (stream.view(-1)[: count * bits].view(count, bits).long() * weight).sum(-1)


def searched(blocks: Tensor, absmax: Tensor, code: Tensor, thresholds: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """(s, absmax) after the scale search over fp32 [blocks, block]; docs/numerics.md, scale search."""
    plain = blocks * reciprocal(absmax)[:, None]
    best_gain = torch.zeros_like(absmax)
    best_ratio = torch.ones_like(absmax)
    for f in SEARCH_STEPS:
        g = 1.0 / torch.full((), f, dtype=torch.float32, device=blocks.device)
        chosen = code[order[rank(plain * g, thresholds)].long()]
        num, den = tree_sum(plain * chosen), tree_sum(chosen * chosen)
        gain = torch.where((den > 0) & (num > 0), torch.div(num * num, den), 0.0)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_ratio = torch.where(better, torch.div(num, den), best_ratio)
    scale = absmax * best_ratio
    won = (best_gain > 0) & (scale >= SMALLEST_NORMAL) & scale.isfinite() & absmax.isfinite()
    s = torch.where(won[:, None], blocks * reciprocal(scale)[:, None], plain)
    return s, torch.where(won, scale, absmax)


def quantize_codes(
    x: Tensor, code: Tensor, thresholds: Tensor, order: Tensor, block: int, search: int
) -> tuple[Tensor, Tensor]:
    """(stored codes uint8 [n], absmax fp32 [blocks])."""
    count = x.numel()
    full = count // block * block
    flat = x.reshape(-1).to(torch.float32)
    parts = []
    # The short last block goes alone, at its own width: zeros behind the end then count nowhere.
    for part in (flat[:full], flat[full:]):
        if part.numel() == 0:
            continue
        blocks = part.view(-1, block if part.numel() >= block else part.numel())
        s, absmax = scaled(blocks)
        if search:
            s_found, absmax_found = searched(blocks, absmax, code, thresholds, order)
            usable = (absmax > 0) & absmax.isfinite()
            s = torch.where(usable[:, None], s_found, s)
            absmax = torch.where(usable, absmax_found, absmax)
        parts.append((order[rank(s, thresholds)].view(-1), absmax))
    if not parts:
        return order.new_empty(0), flat.new_empty(0)
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def quantize_alloc(
    x: Tensor, code: Tensor, thresholds: Tensor, order: Tensor, block: int, bits: int, search: int
) -> tuple[Tensor, ...]:
    """q uint8 [ceil(n k / 8)], absmax fp32 [blocks]."""
    op = "quantize_kbit"
    check_float(op, "x", x)
    check_block(op, block)
    check_bits(op, bits)
    levels = 1 << bits
    check_tensor(op, "code", code, torch.float32, levels)
    check_tensor(op, "thresholds", thresholds, torch.float32, levels - 1)
    check_tensor(op, "order", order, torch.uint8, levels)
    if search not in (0, 1):
        raise fail(op, "search", "0 or 1", search)
    count, device = x.numel(), x.device
    q = torch.empty(byte_count(count, bits), dtype=torch.uint8, device=device)
    return q, torch.empty(block_count(count, block), dtype=torch.float32, device=device)


def quantize_reference(
    x: Tensor, code: Tensor, thresholds: Tensor, order: Tensor, block: int, bits: int, search: int
) -> tuple[Tensor, ...]:
    """docs/numerics.md, k-bit."""
    codes, absmax = quantize_codes(x, code, thresholds, order, block, search)
    zero = order[rank(torch.zeros(1, device=x.device), thresholds)]
    return pack(codes, bits, zero), absmax


def check_weight(
    op: str,
    count: int,
    last_dimension: int,
    run: Run,
    block: int,
    bits: int,
    block_offset: int,
    block_stride: int,
) -> None:
    """A quantized weight of `count` elements is consistent: dtypes, sizes, and its place in the whole."""
    q, absmax, code, nested_absmax, nested_code, nested_offset = run
    check_block(op, block)
    check_bits(op, bits)
    if q.dtype != torch.uint8 or q.numel() != byte_count(count, bits):
        check_tensor(op, "q", q, torch.uint8, byte_count(count, bits))
    blocks = block_count(count, block)
    check_tensor(op, "code", code, torch.float32, 1 << bits)
    if nested_absmax is None or nested_code is None or nested_offset is None:
        if nested_absmax is not None or nested_code is not None or nested_offset is not None:
            raise fail(op, "nested_absmax, nested_code, nested_offset", "all given or all None", "a part of them")
        check_tensor(op, "absmax", absmax, torch.float32, blocks)
        return
    check_tensor(op, "absmax", absmax, torch.uint8, blocks)
    check_tensor(op, "nested_absmax", nested_absmax, torch.float32)
    check_tensor(op, "nested_code", nested_code, torch.float32, 256)
    check_tensor(op, "nested_offset", nested_offset, torch.float32, 1)
    if block_stride and last_dimension % block:
        raise fail(op, "block", f"a divisor of the last dimension {last_dimension} when block_stride is set", block)
    scales.check_places(op, blocks, nested_absmax.numel(), block_offset, last_dimension // block, block_stride)


def weight_values(
    count: int,
    last_dimension: int,
    run: Run,
    block: int,
    bits: int,
    block_offset: int,
    block_stride: int,
) -> Tensor:
    """The restored weight, fp32 [count]: code[c] * absmax[b]."""
    q, code = run[0], run[2]
    values: Tensor = code[unpack(q, count, bits)]
    scale = element_scales(count, last_dimension, run, block, block_offset, block_stride)
    return values * scale


def element_scales(
    count: int, last_dimension: int, run: Run, block: int, block_offset: int, block_stride: int
) -> Tensor:
    """The restored absmax of every element, fp32 [count]."""
    _, absmax, _, nested_absmax, nested_code, nested_offset = run
    flat: Tensor = absmax.reshape(-1)
    if nested_absmax is not None:
        place = scales.places(flat.numel(), block_offset, last_dimension // block, block_stride, flat.device)
        flat = scales.restore(flat, nested_absmax, nested_code, nested_offset, place)
    return flat.repeat_interleave(block)[:count]


def dequantize_alloc(
    q: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    block: int,
    bits: int,
    block_offset: int,
    block_stride: int,
    dtype: torch.dtype,
    shape: list[int],
) -> tuple[Tensor, ...]:
    """y of the shape and dtype."""
    op = "dequantize_kbit"
    check_out_dtype(op, dtype)
    y = torch.empty(shape, dtype=dtype, device=q.device)
    last = shape[-1] if shape else 1
    run = (q, absmax, code, nested_absmax, nested_code, nested_offset)
    check_weight(op, y.numel(), last, run, block, bits, block_offset, block_stride)
    return (y,)


def dequantize_reference(
    q: Tensor,
    absmax: Tensor,
    code: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    block: int,
    bits: int,
    block_offset: int,
    block_stride: int,
    dtype: torch.dtype,
    shape: list[int],
) -> tuple[Tensor, ...]:
    """weight_values, rounded to the dtype."""
    count = 1
    for size in shape:
        count *= size
    last = shape[-1] if shape else 1
    run = (q, absmax, code, nested_absmax, nested_code, nested_offset)
    y = weight_values(count, last, run, block, bits, block_offset, block_stride)
    return (y.to(dtype).view(shape),)


def weight(x: Tensor, name: str, block: int, double_quant: bool) -> tuple[Tensor | None, ...]:
    """The run q ... nested_offset of x in the codebook `name`."""
    code, thresholds, order = codebooks.kbit()[name]
    q, absmax = quantize_reference(x, code, thresholds, order, block, int(name[-1]), 0)
    if not double_quant:
        return q, absmax, code, None, None, None
    nested_code = codebooks.dynamic()[0]
    q8, nested_absmax, offset = scales.quantize_reference(absmax, nested_code)
    return q, q8, code, nested_absmax, nested_code, offset


def moved(tensors: tuple[Tensor | None, ...], device: torch.device | str) -> tuple[Tensor | None, ...]:
    """The tensors on the device."""
    return tuple(None if t is None else t.to(device) for t in tensors)


def scaled_to(end: float, rest: float, code: Tensor, thresholds: Tensor, order: Tensor) -> Tensor:
    """fp32 [13, 16]: blocks with one largest value, whose searched scales are `end` and its neighbours."""
    block = torch.full((1, 16), rest)
    block[0, 0] = 1.0
    ratio = quantize_codes(block, code, thresholds, order, 16, 1)[1]
    places = (end / ratio.double()).float().view(torch.int32) + torch.arange(-6, 7, dtype=torch.int32)
    return block * places.view(torch.float32)[:, None]


def quantize_samples(device: torch.device | str) -> Iterator[Sample]:
    """All inputs in NF4, and with every codebook a short last block, ties, special values, with and without search."""
    books = codebooks.kbit()
    for name, (code, thresholds, order) in books.items():
        bits = int(name[-1])
        book = moved((code, thresholds, order), device)
        for i, (case, x, block) in enumerate(inputs()):
            chosen = name in ("nf4", "lloyd3", "nf2") or i % 5 == 0 or case in ("nan", "grid", "zero-blocks")
            if chosen:
                search = int(i % 3 == 1 or case == "grid")
                yield Sample(f"{name}-{case}-search={search}", (x.to(device), *book, block, bits, search))
        above = thresholds.nextafter(torch.tensor(2.0))
        ties = torch.cat([thresholds, above, -thresholds, -above, code])
        ties = torch.cat([ties, torch.zeros(-len(ties) % 15)]).view(-1, 15)
        ties = torch.cat([torch.ones(len(ties), 1), ties], 1)
        for search in (0, 1):
            yield Sample(f"{name}-ties-search={search}", (ties.to(device), *book, 16, bits, search))
        # A value alone in its block, and the largest value with others: the searched scale may leave the range of fp32.
        largest, smallest = torch.finfo(torch.float32).max, SMALLEST_NORMAL
        alone = [
            1.0,
            -1.0,
            0.3,
            -7.0,
            65504.0,
            1e-30,
            largest,
            -largest,
            3e38,
            -3e38,
            smallest,
            -smallest,
            2 * smallest,
        ]
        crowd = noise((4, 16), 10).tanh() * largest
        crowd[:, 0] = largest
        extremes = torch.cat([torch.nn.functional.pad(torch.tensor(alone)[:, None], (2, 13)), crowd])
        extremes = torch.cat([extremes, scaled_to(largest, 0.45, code, thresholds, order)])
        extremes = torch.cat([extremes, scaled_to(smallest, 0.3, code, thresholds, order)])
        yield Sample(f"{name}-extremes-search", (extremes.to(device), *book, 16, bits, 1))
        # Behind an odd end whose block has a NaN stand codes of 0.
        tail = noise(37, 11)
        tail[33] = float("nan")
        yield Sample(f"{name}-nan-tail", (tail.to(device), *book, 16, bits, 0))
        # More blocks than threads, so that every thread has a range of its own.
        yield Sample(f"{name}-many", (noise(40003, 8).to(device), *book, 64, bits, 0))
        yield Sample(f"{name}-many-search", (noise(20003, 9).to(device), *book, 32, bits, 1))


def dequantize_samples(device: torch.device | str) -> Iterator[Sample]:
    """Every codebook, dtype, plain and double; shards by offset and by stride; sizes around a byte's elements."""
    for i, name in enumerate(codebooks.kbit()):
        bits = int(name[-1])
        for double in (False, True):
            for j, block in enumerate((16, 32, 64, 128, 256, 512, 1024, 2048, 4096)):
                shape = [(3, 5, 7, 1)[(i + j) % 4], block + (0, 1, 11)[j % 3]]
                tensors = moved(weight(noise(tuple(shape), i + j), name, block, double), device)
                dtype = FLOATS[(i + j) % 3]
                case = f"{name}-block={block}-double={int(double)}-{dtype}".replace("torch.", "")
                yield Sample(case, (*tensors, block, bits, 0, 0, dtype, shape))
        for count in (0, 1, 2, 3, 5, 7, 8, 9, 15, 17, 63, 65, 1003):
            tensors = moved(weight(noise(count, count), name, 64, False), device)
            yield Sample(f"{name}-count={count}", (*tensors, 64, bits, 0, 0, torch.float32, [count]))
    yield from shard_samples(device)


def shard_samples(device: torch.device | str) -> Iterator[Sample]:
    """A row shard and a column shard of one double-quantized [64, 1024] weight."""
    for name in ("nf4", "nf3", "lloyd2"):
        bits = int(name[-1])
        q, absmax, code, *nested = weight(noise((64, 1024), 11), name, 64, True)
        assert q is not None and absmax is not None and code is not None
        rest = moved((code, *nested), device)
        bytes_of_row = 1024 * bits // 8
        rows = q[20 * bytes_of_row : 50 * bytes_of_row].clone().to(device)
        part = absmax[20 * 16 : 50 * 16].clone().to(device)
        yield Sample(f"{name}-rows", (rows, part, *rest, 64, bits, 320, 0, torch.float32, [30, 1024]))
        columns = q.view(64, bytes_of_row)[:, bytes_of_row // 2 :].reshape(-1).to(device)
        part = absmax.view(64, 16)[:, 8:].reshape(-1).to(device)
        yield Sample(f"{name}-columns", (columns, part, *rest, 64, bits, 8, 16, torch.bfloat16, [64, 512]))


OPS = (
    Op("quantize_kbit", quantize_alloc, quantize_reference, quantize_samples),
    Op("dequantize_kbit", dequantize_alloc, dequantize_reference, dequantize_samples),
)
