"""The short way from values to codes of 8 bits, by cells of floats (backends/cpu/code256.h)."""

from __future__ import annotations

import time

import pytest
import torch
from tools import cpu_variants
from torch import Tensor

import polybit
from polybit.spec import codebooks
from polybit.spec.blockwise import midpoints, noise

OPS = torch.ops.polybit
BLOCK = 4096


def ascending(seed: int, low: float, mirrored: bool) -> Tensor:
    """A random map: sizes from `low` to 1, of both signs around zero at code 127, or none negative."""
    count = 127 if mirrored else 255
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp(torch.rand(count, generator=generator) * torch.tensor(low).log()).sort().values
    sizes[-1] = 1.0
    if mirrored:
        return torch.cat([-sizes.flip(0), torch.zeros(1), sizes, torch.ones(1)])
    return torch.cat([torch.zeros(1), sizes])


def spread(low: float, high: float) -> Tensor:
    """256 levels, evenly apart."""
    return torch.linspace(low, high, 256)


def with_pair(code: Tensor, at: int) -> Tensor:
    """A map with two midpoints so close to each other that they share a cell."""
    code = code.clone()
    code[at] = code[at - 1] * (1 + 2.0**-20)
    code[at + 1] = code[at - 1] * (1 + 2.0**-19)
    return code


SIGNED, UNSIGNED = (codebooks.dynamic(signed=signed).code for signed in (True, False))
MAPS = {
    "dynamic": SIGNED,
    "dynamic unsigned": UNSIGNED,
    "linear": torch.cat([torch.arange(-127, 128) / 127, torch.ones(1)]),
    "linear without zero": spread(-1.0, 1.0),
    "linear unsigned": spread(0.0, 1.0),
    "positive": spread(0.25, 1.0),
    "negative": spread(-1.0, 0.0),
    "above 1": spread(0.0, 4.0),
    "wide": ascending(1, 1e-6, mirrored=True),
    "wide unsigned": ascending(2, 1e-7, mirrored=False),
    "too wide": ascending(3, 1e-12, mirrored=True),
    "too wide unsigned": ascending(4, 1e-30, mirrored=False),
    "pair": with_pair(SIGNED, 200),
    "pair unsigned": with_pair(UNSIGNED, 70),
    "equal codes": torch.cat([SIGNED[:240], SIGNED[239].expand(16)]),
    "not mirrored": torch.cat([SIGNED[:126] * 0.99, SIGNED[126:]]),
}


@pytest.mark.parametrize("variant", cpu_variants())
@pytest.mark.parametrize("name", MAPS)
def test_codes(name: str, variant: str) -> None:
    """Midpoints of both signs and their neighbours, the ends and zeros, and noise of every size."""
    code = MAPS[name]
    middle = midpoints(code)
    ends = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1.2e-38, 1e-30, -1e-7, 2.0**-24])
    x = torch.cat([middle, middle.nextafter(torch.tensor(2.0)), middle.nextafter(torch.tensor(-2.0)), ends])
    x = torch.cat([x, -x])
    x = torch.cat([x[x.abs() <= 1], noise(30_000, 5) * 0.2, noise(30_000, 6) ** 9]).clamp(-1, 1)
    x = torch.cat([x, torch.zeros(-len(x) % (BLOCK - 1))]).view(-1, BLOCK - 1)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)  # every absmax is 1, so that values stay what they are
    with polybit.backend(variant, fallback="error"):
        q, absmax = OPS.quantize_blockwise(x, code, BLOCK)
    assert (absmax == 1).all()
    want = torch.bucketize(x, middle).view(q.shape)
    assert torch.equal(q.int(), want.int())


@pytest.mark.alone
def test_is_taken() -> None:
    """For the dynamic maps: the search for the same codes takes longer."""
    x = noise(300_000, 1)
    times: dict[str, list[float]] = {"dynamic": [], "pair": []}
    with polybit.backend("cpu", fallback="error"):
        for _ in range(9):
            for name, taken in times.items():
                start = time.perf_counter()
                OPS.quantize_blockwise(x, MAPS[name], 256)
                taken.append(time.perf_counter() - start)
    ratio = min(times["pair"]) / min(times["dynamic"])
    print(f"{ratio:.2f} times as fast")
    assert ratio > 1.3
