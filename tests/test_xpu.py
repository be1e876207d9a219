"""On an Intel GPU: conformance. Skipped without one."""

from __future__ import annotations

import pytest
import torch

from polybit.spec import OPS
from polybit.testing import check

pytestmark = pytest.mark.skipif(not torch.xpu.is_available(), reason="needs an Intel GPU")


@pytest.mark.parametrize("op", OPS)
def test_samples(op: str) -> None:
    result = check(op, "sycl", "xpu")
    assert (result.kind, result.unsupported) == ("native", 0)
    result.raise_failures()
