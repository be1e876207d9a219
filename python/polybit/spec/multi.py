"""Ops on lists of tensors: what clipping the norm of all gradients needs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .base import FLOATS, Op, Sample, check_float, check_tensor, fail, tree_sum
from .blockwise import noise


def check_list(op: str, xs: list[Tensor]) -> None:
    """At least one tensor (the output's device is its), all floats on one device."""
    if not xs:
        raise fail(op, "xs", "a list of at least one tensor", "an empty one")
    device = xs[0].device
    for i, x in enumerate(xs):
        check_float(op, f"xs[{i}]", x)
        if x.device != device:
            raise fail(op, f"xs[{i}]", f"on {device}", x.device)


def sum_squares_alloc(xs: list[Tensor]) -> tuple[Tensor, ...]:
    """y fp32 [len(xs)]."""
    check_list("sum_squares_multi", xs)
    return (torch.empty(len(xs), dtype=torch.float32, device=xs[0].device),)


def sum_squares_reference(xs: list[Tensor]) -> tuple[Tensor, ...]:
    """y[i] = T(float(x)^2)."""
    flat = [x.reshape(-1).to(torch.float32) for x in xs]
    return (torch.stack([tree_sum(x * x) for x in flat]),)


def scale_alloc(xs: list[Tensor], factor: Tensor) -> tuple[Tensor, ...]:
    """Nothing: the tensors are changed in place."""
    check_list("scale_multi", xs)
    check_tensor("scale_multi", "factor", factor, torch.float32, 1)
    return ()


def scale_reference(xs: list[Tensor], factor: Tensor) -> tuple[Tensor, ...]:
    """x = round(float(x) * factor)."""
    for x in xs:
        x.copy_(x.to(torch.float32) * factor.reshape(()))
    return ()


def lists(device: torch.device | str) -> Iterator[tuple[str, list[Tensor]]]:
    """Lists of several lengths, sizes and dtypes."""
    for dtype in FLOATS:
        sizes = ((3, 5), (1,), (0,), (1003,), (64, 64), (16385,))
        name = str(dtype).replace("torch.", "")
        yield name, [noise(shape, i, dtype).to(device) for i, shape in enumerate(sizes)]
    mixed = [noise((i * 7 % 50,), i, FLOATS[i % 3]).to(device) for i in range(70)]
    yield "mixed-70", mixed
    # More than the arguments of one launch hold.
    yield "mixed-230", [noise(i * 3 % 7, i, FLOATS[i % 3]).to(device) for i in range(230)]
    special = noise(300, 1)
    special[7] = float("nan")
    yield "nan", [special.to(device), noise(9, 2).to(device)]
    yield "overflow", [torch.full((9,), 1e30, device=device)]


def sum_squares_samples(device: torch.device | str) -> Iterator[Sample]:
    """All lists, and a tensor long enough for several threads."""
    for name, xs in lists(device):
        yield Sample(name, (xs,))
    yield Sample("long", ([noise(300007, 3).to(device)],))


def scale_samples(device: torch.device | str) -> Iterator[Sample]:
    """All lists; factors of shape [] and [1]."""
    for i, factor in enumerate((0.5, 0.1, 3.0)):
        for name, xs in lists(device):
            value = torch.tensor(factor).reshape((1,) if i else ()).to(device)
            yield Sample(f"{name}-factor={factor:g}", (xs, value))


OPS = (
    Op("sum_squares_multi", sum_squares_alloc, sum_squares_reference, sum_squares_samples),
    Op("scale_multi", scale_alloc, scale_reference, scale_samples),
)
