"""More than 2^31 elements. One side is a zero tensor that the operating system never materialises."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from tools import cpu_variants

import polybit
from polybit.formats import get_format

NF4 = get_format("nf4")
CODE = torch.linspace(-1, 1, 256)
LIMIT = 2**31
pytestmark = pytest.mark.alone
ops = torch.ops.polybit


@pytest.fixture(autouse=True)
def best_variant() -> Iterator[None]:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < 6 << 30:
        pytest.skip(f"needs 6 GiB of free memory, {available >> 20} MiB are free")
    with polybit.backend(cpu_variants()[0], fallback="error"):
        yield


def lazy_input(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp16 zeros but for blocks of 4096 at both ends and on both sides of 2^31; and the mask of these blocks."""
    x = torch.zeros(count, dtype=torch.float16)
    touched = torch.zeros(-(-count // 4096), dtype=torch.bool)
    generator = torch.Generator().manual_seed(7)
    for start in (0, LIMIT - 4096, LIMIT, count // 4096 * 4096):
        values = torch.randn(min(4096, count - start), generator=generator).half()
        x[start : start + values.numel()] = values
        touched[start // 4096] = True
    return x, touched


def assert_blocks(
    x: torch.Tensor, touched: torch.Tensor, q: torch.Tensor, absmax: torch.Tensor, per_byte: int, small: object
) -> None:
    """The touched blocks are as when quantized alone, all others are zero blocks."""
    assert torch.equal(absmax != 0, touched)
    for block in touched.nonzero().flatten().tolist():
        part = x[block * 4096 : (block + 1) * 4096].clone()
        want_q, want_absmax = small(part)  # type: ignore[operator]
        start = block * 4096 // per_byte
        assert torch.equal(q[start : start + want_q.numel()], want_q.flatten()), f"block {block}"
        assert torch.equal(absmax[block : block + 1], want_absmax.flatten())
        assert float(want_absmax.max()) > 1


def test_quantize_kbit() -> None:
    x, touched = lazy_input(LIMIT + 4096 * 3 + 77)

    def quantize(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, absmax = ops.quantize_kbit(part, NF4.code, NF4.thresholds, NF4.order, 4096, 4, 0)
        return q, absmax

    q, absmax = quantize(x)
    q, absmax = q.flatten(), absmax.flatten()
    assert q.numel() == (x.numel() + 1) // 2
    assert_blocks(x, touched, q, absmax, 2, quantize)
    assert q[2048 * 5].item() == 0x77, "zero is nibble 7"


@pytest.mark.slow
def test_quantize_blockwise() -> None:
    x, touched = lazy_input(LIMIT + 4096 * 2 + 5)

    def quantize(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, absmax = ops.quantize_blockwise(part, CODE, 4096)
        return q, absmax

    q, absmax = quantize(x)
    assert_blocks(x, touched, q, absmax, 1, quantize)


def table(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
    """An NF4 table of n rows, zeros (absmax 0) but for the rows at both ends and around 2^31 elements."""
    q = torch.zeros(n * k // 2, dtype=torch.uint8)
    absmax = torch.zeros(n * k // 64)
    rows = {}
    generator = torch.Generator().manual_seed(9)
    for row in (0, LIMIT // k - 1, LIMIT // k, n - 1):
        values = torch.randn(k, generator=generator)
        part_q, part_absmax = ops.quantize_kbit(values, NF4.code, NF4.thresholds, NF4.order, 64, 4, 0)
        q[row * k // 2 : (row + 1) * k // 2] = part_q.flatten()
        absmax[row * k // 64 : (row + 1) * k // 64] = part_absmax.flatten()
        shape = [k]
        rows[row] = ops.dequantize_kbit(
            part_q, part_absmax, NF4.code, None, None, None, 64, 4, 0, 0, torch.float32, shape
        )
    return q, absmax, rows


def test_gather_kbit() -> None:
    k = 4096
    n = LIMIT // k + 3
    q, absmax, rows = table(n, k)
    index = torch.tensor([*rows, 5])
    y = ops.gather_kbit(index, q, absmax, NF4.code, None, None, None, n, k, 64, 4, 0, 0, torch.float32)
    for got, want in zip(y, [*rows.values(), torch.zeros(k)], strict=True):
        assert torch.equal(got, want)


def test_gather_int8() -> None:
    k = 4096
    n = LIMIT // k + 3
    q = torch.zeros(n, k, dtype=torch.int8)
    absmax = torch.zeros(n)
    last = torch.arange(k).remainder(255).sub(127).to(torch.int8)
    q[n - 1], absmax[n - 1] = last, 127.0
    y = ops.gather_int8(torch.tensor([n - 1, 0]), q, absmax, torch.float32)
    want = ops.dequantize_int8(last.view(1, k), torch.tensor([127.0]), torch.float32)
    assert torch.equal(y[0], want[0]) and not y[1].any()


@pytest.mark.slow
def test_matmul_kbit() -> None:
    k = 4096
    n = LIMIT // k + 3
    q, absmax, rows = table(n, k)
    x = torch.randn(1, k, generator=torch.Generator().manual_seed(11))
    y = ops.matmul_kbit(x, q, absmax, NF4.code, None, None, None, None, None, n, 64, 4, 0, 0)[0]
    assert torch.equal(y.nonzero().flatten(), torch.tensor(list(rows)))
    want = torch.stack([(x[0].double() * row.double()).sum() for row in rows.values()])
    torch.testing.assert_close(y[list(rows)].double(), want, rtol=1e-5, atol=1e-4)
