"""Prepacking: a backend's own layout of q for its products. The reference's layout is q itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import codebooks
from .base import Op, Sample, check_bits, check_block, check_tensor, fail
from .blockwise import noise
from .kbit import byte_count, weight


def check_q(op: str, q: Tensor, n: int, k: int, block: int, bits: int) -> None:
    """q is that of a weight [n, k]."""
    check_block(op, block)
    check_bits(op, bits)
    check_tensor(op, "q", q, torch.uint8, byte_count(n * k, bits))


def size_alloc(q: Tensor, n: int, k: int, block: int, bits: int) -> tuple[Tensor, ...]:
    """size int64 [], on the CPU: the bytes that pack_kbit wants, 0 if the backend has no layout for this weight."""
    check_q("pack_size_kbit", q, n, k, block, bits)
    return (torch.empty((), dtype=torch.int64),)


def size_reference(q: Tensor, n: int, k: int, block: int, bits: int) -> tuple[Tensor, ...]:
    """As many bytes as q has."""
    return (torch.tensor(q.numel()),)


def pack_alloc(q: Tensor, n: int, k: int, block: int, bits: int, size: int) -> tuple[Tensor, ...]:
    """packed uint8 [size]."""
    check_q("pack_kbit", q, n, k, block, bits)
    if size < 0:
        raise fail("pack_kbit", "size", "what pack_size_kbit returned", size)
    return (torch.empty(size, dtype=torch.uint8, device=q.device),)


def pack_reference(q: Tensor, n: int, k: int, block: int, bits: int, size: int) -> tuple[Tensor, ...]:
    """A copy of q."""
    if size != q.numel():
        raise fail("pack_kbit", "size", f"{q.numel()}, which pack_size_kbit returns", size)
    return (q.reshape(-1).clone(),)


def unpack_alloc(packed: Tensor, n: int, k: int, block: int, bits: int) -> tuple[Tensor, ...]:
    """q uint8 [ceil(n k bits / 8)]."""
    op = "unpack_kbit"
    check_block(op, block)
    check_bits(op, bits)
    check_tensor(op, "packed", packed, torch.uint8)
    return (torch.empty(byte_count(n * k, bits), dtype=torch.uint8, device=packed.device),)


def unpack_reference(packed: Tensor, n: int, k: int, block: int, bits: int) -> tuple[Tensor, ...]:
    """A copy of packed."""
    size = byte_count(n * k, bits)
    if packed.numel() != size:
        raise fail("unpack_kbit", "packed", f"a tensor of {size} elements", f"shape {list(packed.shape)}")
    return (packed.reshape(-1).clone(),)


def weights(device: torch.device | str) -> Iterator[tuple[str, Tensor, int, int, int, int]]:
    """(id, q, n, k, block, bits): shapes that fit a backend's tiles and shapes that do not."""
    for name in codebooks.kbit():
        for n, k, block in ((32, 128, 64), (48, 256, 32), (17, 100, 64), (1, 3, 16), (5, 998, 128), (0, 64, 64)):
            q = weight(noise((n, k), n + k), name, block, False)[0]
            assert q is not None
            yield f"{name}-n={n}-k={k}-block={block}", q.to(device), n, k, block, int(name[-1])


def size_samples(device: torch.device | str) -> Iterator[Sample]:
    """All weights. The size is the backend's; polybit.testing checks the round trip in its place."""
    for case, *args in weights(device):
        yield Sample(case, tuple(args))


def pack_samples(device: torch.device | str) -> Iterator[Sample]:
    """All weights, with the size of the reference."""
    for case, q, *numbers in weights(device):
        yield Sample(case, (q, *numbers, q.numel()))


OPS = (
    Op("pack_size_kbit", size_alloc, size_reference, size_samples),
    Op("pack_kbit", pack_alloc, pack_reference, pack_samples),
    Op("unpack_kbit", unpack_alloc, unpack_reference, size_samples),
)
