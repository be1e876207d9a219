"""What the ops of the specification share: the Op and Sample records, checks of arguments, the tree sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALLEST_NORMAL = 2.0**-126
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INDICES = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Sample:
    """Arguments of one call, in schema order. `rtol` None: equal bits, else |got - want| <= atol + rtol |want|."""

    id: str
    args: tuple[Any, ...]
    rtol: float | None = None
    atol: float = 0.0


@dataclass(frozen=True)
class Op:
    """One op: what it allocates (and refuses), what it computes, and on what it is tested.

    `alloc(*args)` checks the arguments and returns empty outputs; it is the fake kernel, too.
    `reference(*args)` returns the outputs in plain torch; an op that mutates returns ().
    `samples(device)` yields the same samples at every call, which share no tensor that is changed.
    """

    name: str
    alloc: Callable[..., tuple[Tensor, ...]]
    reference: Callable[..., tuple[Tensor, ...]]
    samples: Callable[[torch.device | str], Iterator[Sample]]


def tree_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension by adding neighbours, zeros behind the end: docs/numerics.md, T."""
    count = x.shape[-1]
    if count == 0:
        return x.new_zeros(x.shape[:-1])
    width = 1 << (count - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, width - count))
    while width > 1:
        x = x[..., 0::2] + x[..., 1::2]
        width //= 2
    return x[..., 0]


def absmax_bits(x: Tensor) -> Tensor:
    """Largest |x| over the last dimension as an integer maximum of sign-cleared bits; a NaN comes out as 0x7fc00000."""
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1], dtype=torch.float32)
    bits = (x.to(torch.float32).contiguous().view(torch.int32) & 0x7FFFFFFF).amax(-1)
    return torch.where(bits > 0x7F800000, 0x7FC00000, bits).view(torch.float32)


def reciprocal(x: Tensor, numerator: float = 1.0) -> Tensor:
    """numerator / x, correctly rounded (a true division, never an approximation times the numerator)."""
    return torch.div(torch.full_like(x, numerator), x)


def block_count(count: int, block: int) -> int:
    """Blocks of `count` elements, the last one possibly short."""
    return (count + block - 1) // block


def to_blocks(x: Tensor, block: int) -> Tensor:
    """x flattened, in fp32, padded with zeros to [blocks, block]."""
    flat = x.reshape(-1).to(torch.float32)
    blocks = block_count(flat.numel(), block)
    return torch.nn.functional.pad(flat, (0, blocks * block - flat.numel())).view(blocks, block)


def rank(s: Tensor, thresholds: Tensor) -> Tensor:
    """How many thresholds (ascending) are below s; 0 for NaN. int64."""
    counted = torch.searchsorted(thresholds, s.contiguous())
    return torch.where(s.isnan(), 0, counted)


def empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor of x's shape; half the cost of torch.empty with a shape and a device."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def fail(op: str, argument: str, wanted: str, got: object) -> ValueError:
    """The error for a wrong value, to be raised by the caller."""
    return ValueError(f"{op}: {argument} must be {wanted}, got {got}")


def fail_type(op: str, argument: str, wanted: str, got: object) -> TypeError:
    """The error for a wrong dtype, to be raised by the caller."""
    return TypeError(f"{op}: {argument} must be {wanted}, got {got}")


def check_block(op: str, block: int) -> None:
    """A block is a power of two from 16 to 4096."""
    if block < 16 or block > 4096 or block & (block - 1):
        raise fail(op, "block", "a power of two from 16 to 4096", block)


def check_bits(op: str, bits: int) -> None:
    """k is 2, 3 or 4."""
    if bits < 2 or bits > 4:
        raise fail(op, "bits", "2, 3 or 4", bits)


def check_float(op: str, argument: str, x: Tensor) -> None:
    """Activations and weights are fp32, fp16 or bf16."""
    if x.dtype not in FLOATS:
        raise fail_type(op, argument, "float32, float16 or bfloat16", x.dtype)


def check_out_dtype(op: str, dtype: torch.dtype) -> None:
    """Outputs of dequantization are fp32, fp16 or bf16."""
    if dtype not in FLOATS:
        raise fail_type(op, "dtype", "float32, float16 or bfloat16", dtype)


def check_tensor(op: str, argument: str, x: Tensor, dtype: torch.dtype, count: int | None = None) -> None:
    """x has this dtype and, where given, this many elements."""
    if x.dtype != dtype:
        raise fail_type(op, argument, str(dtype), x.dtype)
    if count is not None and x.numel() != count:
        raise fail(op, argument, f"a tensor of {count} elements", f"shape {list(x.shape)}")
