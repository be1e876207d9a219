"""The short way from values to the codes of the dynamic maps (backends/cpu/code256.h)."""

from __future__ import annotations

import time

import pytest
import torch

import polybit
from polybit.spec import codebooks
from polybit.spec.blockwise import noise

OPS = torch.ops.polybit


@pytest.mark.alone
@pytest.mark.parametrize("signed", [True, False])
def test_is_taken(signed: bool) -> None:
    """That the proof succeeds for the dynamic maps: where it fails, the same codes take three times as long."""
    x = noise(300_000, 1)
    dynamic = codebooks.dynamic(signed=signed).code
    other = dynamic.clone()
    other[200] = other[199:202].mean() * 1.001
    assert (other[1:] > other[:-1]).all()
    times: dict[str, list[float]] = {"dynamic": [], "other": []}
    with polybit.backend("cpu", fallback="error"):
        for _ in range(9):
            for name, code in (("dynamic", dynamic), ("other", other)):
                start = time.perf_counter()
                OPS.quantize_blockwise(x, code, 256)
                times[name].append(time.perf_counter() - start)
    ratio = min(times["other"]) / min(times["dynamic"])
    print(f"{ratio:.2f} times as fast")
    assert ratio > 1.3
