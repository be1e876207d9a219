"""The backend against the specification: python -m pytest, once it is installed."""

from __future__ import annotations

import pytest
import torch

import polybit
from polybit.backends import last_backend, resolve
from polybit.spec import OPS
from polybit.testing import check

NATIVE = {"quantize_int8"}


def test_it_has_the_ops_that_it_should() -> None:
    with polybit.backend("template", fallback="error"):
        assert {op for op in OPS if resolve(op).owner == "template"} == NATIVE


@pytest.mark.parametrize("op", sorted(NATIVE))
def test_every_sample(op: str) -> None:
    """Every dtype, odd sizes, empty, NaN; outputs between guard bytes, inputs unaligned and strided."""
    result = check(op, "template")
    assert result.kind == "native" and result.samples > 0
    assert result.unsupported == 0  # of a backend that declines cases: their number
    result.raise_failures()


def test_it_runs_below_the_front_end() -> None:
    """What a user calls, the op that the backend has, and the one that it has not."""
    weight = torch.randn(48, 100, generator=torch.Generator().manual_seed(0))
    with polybit.backend("template", fallback="error"):
        quantized = polybit.quantize(weight, "int8")
        assert last_backend() == "template"
        with pytest.raises(polybit.BackendError, match="template does not implement it"):
            quantized.dequantize()
    assert float((quantized.dequantize() - weight).abs().max()) <= float(weight.abs().max()) / 254 * 1.001


def test_threads_change_nothing() -> None:
    x = torch.randn(301, 517, generator=torch.Generator().manual_seed(1)) * 3
    before = torch.get_num_threads()
    try:
        with polybit.backend("template", fallback="error"):
            torch.set_num_threads(1)
            want = torch.ops.polybit.quantize_int8(x, 6.0)
            torch.set_num_threads(3)
            got = torch.ops.polybit.quantize_int8(x, 6.0)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
