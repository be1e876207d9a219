"""The binder of a torch without DLPack's exchange API (before 2.10) gives the same results."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import polybit
from polybit.backends.native import bind_torch
from polybit.testing import check


@pytest.fixture
def capsules() -> Iterator[None]:
    bind_torch(exchange_api=False)
    yield
    bind_torch()


@pytest.mark.usefixtures("capsules")
@pytest.mark.parametrize("op", ["dequantize_blockwise", "matmul_kbit_grouped", "sum_squares_multi", "linear_int8"])
def test_conformance_through_capsules(op: str) -> None:
    result = check(op, "cpu:avx2" if "cpu:avx2" in usable() else "cpu:scalar")
    result.raise_failures()
    assert result.kind == "native"
    assert result.samples > 0


@pytest.mark.usefixtures("capsules")
def test_odd_tensors_through_capsules() -> None:
    x = torch.randn(64, 48, requires_grad=True)
    with polybit.backend("cpu", fallback="error"):
        strided, _ = torch.ops.polybit.quantize_blockwise(x.t()[8:], codebook(), 64)
        dense, _ = torch.ops.polybit.quantize_blockwise(x.detach().t()[8:].contiguous(), codebook(), 64)
    assert torch.equal(strided, dense)


def codebook() -> torch.Tensor:
    return torch.linspace(-1, 1, 256)


def usable() -> set[str]:
    return {info.name for info in polybit.backends.list_backends() if info.usable}
