"""8-bit blockwise quantization with a codebook of 256 values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import codebooks
from .base import (
    FLOATS,
    SMALLEST_NORMAL,
    Op,
    Sample,
    absmax_bits,
    block_count,
    check_block,
    check_float,
    check_out_dtype,
    check_tensor,
    empty_like,
    rank,
    reciprocal,
    to_blocks,
)


def scaled(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(s, absmax) of fp32 [blocks, block]: s = x * (1 / absmax); a zero block has s = 0 and absmax = 0."""
    absmax = absmax_bits(blocks)
    zero = absmax < SMALLEST_NORMAL
    s = torch.where(zero[:, None], 0.0, blocks * reciprocal(absmax)[:, None])
    return s, torch.where(zero, 0.0, absmax)


def midpoints(code: Tensor) -> Tensor:
    """The thresholds between neighbouring codes, fp32 [255]."""
    return (code[:-1] + code[1:]) * 0.5


def quantize_values(x: Tensor, thresholds: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(q like x, absmax [blocks])."""
    s, absmax = scaled(to_blocks(x, block))
    q = rank(s, thresholds).to(torch.uint8)
    return q.view(-1)[: x.numel()].view(x.shape), absmax


def dequantize_values(q: Tensor, absmax: Tensor, code: Tensor, block: int) -> Tensor:
    """fp32 like q."""
    scale = absmax.repeat_interleave(block)[: q.numel()]
    return (code[q.reshape(-1).long()] * scale).view(q.shape)


def quantize_alloc(x: Tensor, code: Tensor, block: int) -> tuple[Tensor, ...]:
    """q uint8 like x, absmax fp32 [blocks]."""
    op = "quantize_blockwise"
    check_float(op, "x", x)
    check_tensor(op, "code", code, torch.float32, 256)
    check_block(op, block)
    q = empty_like(x, torch.uint8)
    return q, torch.empty(block_count(x.numel(), block), dtype=torch.float32, device=x.device)


def quantize_reference(x: Tensor, code: Tensor, block: int) -> tuple[Tensor, ...]:
    """docs/numerics.md, 8-bit blockwise."""
    return quantize_values(x, midpoints(code), block)


def dequantize_alloc(q: Tensor, absmax: Tensor, code: Tensor, block: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """y like q, of the dtype."""
    op = "dequantize_blockwise"
    check_tensor(op, "q", q, torch.uint8)
    check_block(op, block)
    check_tensor(op, "absmax", absmax, torch.float32, block_count(q.numel(), block))
    check_tensor(op, "code", code, torch.float32, 256)
    check_out_dtype(op, dtype)
    return (empty_like(q, dtype),)


def dequantize_reference(q: Tensor, absmax: Tensor, code: Tensor, block: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """code[q] * absmax in fp32, rounded to the dtype."""
    return (dequantize_values(q, absmax, code, block).to(dtype),)


def noise(shape: int | tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Seeded Gaussian values."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def inputs() -> Iterator[tuple[str, Tensor, int]]:
    """(name, x, block) for every quantizer: sizes, blocks, dtypes, and values that break careless code."""
    for dtype in FLOATS:
        for i, block in enumerate((16, 32, 64, 128, 256, 512, 1024, 2048, 4096)):
            count = 3 * block + (0, 1, 7, block - 1)[i % 4]
            yield f"{dtype}-block={block}".replace("torch.", ""), noise(count, i, dtype), block
        for count in (0, 1, 2, 3, 5, 15, 31, 33, 63, 65, 127, 1003):
            yield f"{dtype}-count={count}".replace("torch.", ""), noise(count, count, dtype), 64
    yield "rows", noise((7, 3, 37), 1), 64
    yield "small", noise(300, 2, scale=1e-30), 64
    yield "large", noise(300, 3, scale=1e30), 64
    x = noise(512, 4)
    x[64:128] = 0.0
    x[128:192] = -0.0
    x[192:256] = 2.0**-130
    x[256] = -0.0
    yield "zero-blocks", x, 64
    for name, value in (("nan", float("nan")), ("inf", float("inf")), ("minus-inf", float("-inf"))):
        x = noise(300, 5)
        x[70] = value
        yield name, x, 64
    # Every value a multiple of 2^-10 of the absmax: exact ties of the integer grids and FP4 thresholds occur.
    x = torch.arange(-1024, 1025, dtype=torch.float32) / 1024.0
    x = torch.cat([x[i::33] for i in range(33)])
    x[0::64] = 1.0
    yield "grid", x, 64


def quantize_samples(device: torch.device | str) -> Iterator[Sample]:
    """All inputs with the dynamic map; the other maps, and every tie of each."""
    code = codebooks.dynamic()[0].to(device)
    for name, x, block in inputs():
        yield Sample(name, (x.to(device), code, block))
    for name, (code, thresholds, _) in maps().items():
        yield Sample(f"map-{name}", (noise(1003, 6).to(device), code.to(device), 256))
        ties = torch.stack([thresholds, thresholds.nextafter(torch.ones(())), -thresholds], 1).reshape(-1)
        ties = torch.cat([ties, code, torch.zeros(16 - (ties.numel() + 256) % 16)]).view(-1, 16)
        ties = torch.cat([torch.ones(len(ties), 16), ties], 1)
        yield Sample(f"ties-{name}", (ties.to(device), code.to(device), 32))
        # So many that a backend may prepare tables for them.
        small = torch.logspace(-38, 0, 2048) * noise(2048, 8).sign()
        small[::32] = 1.0
        small[100:103] = torch.tensor([float("nan"), 0.0, -0.0])
        small[200] = float("inf")
        x = torch.cat([ties.reshape(-1).repeat(16_384 // ties.numel()), small, small * 1e-30, noise(4096, 9)])
        yield Sample(f"many-special-{name}", (x.to(device), code.to(device), 32))
        if name.startswith("dynamic"):
            # One in 64, so that a backend that looks closer at ties sees nothing else to look at.
            x = torch.zeros(3 * 255, 64)
            x[:, 0] = 1.0
            one = torch.ones(())
            x[:, 1] = torch.cat([thresholds, thresholds.nextafter(one), thresholds.nextafter(-one)])
            yield Sample(f"lone-ties-{name}", (x.to(device), code.to(device), 64))


def maps() -> dict[str, codebooks.Codebook]:
    """The 8-bit codebooks."""
    return {
        "dynamic": codebooks.dynamic(),
        "dynamic-unsigned": codebooks.dynamic(signed=False),
        "linear": codebooks.linear(),
        "linear-unsigned": codebooks.linear(signed=False),
        "fp8-e4m3": codebooks.fp8(4, 3),
        "fp8-e5m2": codebooks.fp8(5, 2),
    }


def dequantize_samples(device: torch.device | str) -> Iterator[Sample]:
    """The quantized inputs, to each dtype."""
    code = codebooks.dynamic()[0]
    for i, (name, x, block) in enumerate(inputs()):
        q, absmax = quantize_values(x, midpoints(code), block)
        dtypes = FLOATS if "-" not in name else (FLOATS[i % 3],)
        for dtype in dtypes:
            tensors = (q.to(device), absmax.to(device), code.to(device))
            yield Sample(f"{name}-to-{dtype}".replace("torch.", ""), (*tensors, block, dtype))
    every = torch.arange(256, dtype=torch.uint8).repeat(2)
    for name, (code, _, _) in maps().items():
        absmax = noise(8, 7).abs()
        yield Sample(f"map-{name}", (every.to(device), absmax.to(device), code.to(device), 64, torch.bfloat16))


OPS = (
    Op("quantize_blockwise", quantize_alloc, quantize_reference, quantize_samples),
    Op("dequantize_blockwise", dequantize_alloc, dequantize_reference, dequantize_samples),
)
