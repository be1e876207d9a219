"""POLYBIT_DETERMINISTIC=1: a row of a product depends on that row alone, whatever comes with it, whoever computes."""

from __future__ import annotations

import json

import pytest
from tools import cpu_variants, run_python

import polybit
from polybit.backends import BackendError, deterministic, reset

# Digests of the rows of each product, computed with every number of rows, threads and kernel; one digest is right.
PROGRAM = """
import hashlib, json, sys
import torch, polybit
from polybit import get_format
from polybit.functional import linear_int8

N, K = 37, 1344
generator = torch.Generator().manual_seed(7)
w = torch.randn(N, K, generator=generator)
x32 = torch.randn(64, K, generator=generator)
x32[5, 3], x32[60, 1000] = 40.0, -30.0  # outlier columns that only these rows have
dy32 = torch.randn(64, N, generator=generator)
code, thresholds, order = get_format("nf4").tables
q, absmax = torch.ops.polybit.quantize_kbit(w, code, thresholds, order, 64, 4, 0)
size = int(torch.ops.polybit.pack_size_kbit(q, N, K, 64, 4))
packed = torch.ops.polybit.pack_kbit(q, N, K, 64, 4, size)
run = (q, absmax, code, None, None, None)
int8 = polybit.quantize(w, "int8")

def products(x, dy):
    ends = torch.tensor([len(x)], dtype=torch.int32)
    ops = torch.ops.polybit
    a, a_absmax, _ = ops.quantize_int8(x, 0.0)
    return {
        "matmul_kbit": [ops.matmul_kbit(x, *run, None, p, N, 64, 4, 0, 0) for p in (None, packed)],
        "matmul_kbit_transposed": [ops.matmul_kbit_transposed(dy, *run, K, 64, 4, 0, 0)],
        "matmul_kbit_grouped": [ops.matmul_kbit_grouped(x, ends, *run, N, 64, 4, 0, 0)],
        "matmul_kbit_int8": [ops.matmul_kbit_int8(a, a_absmax, *run, None, N, 64, 4, 0, 0, x.dtype)],
        "linear_int8": [linear_int8(x, int8)],
        "linear_int8_transposed": [ops.linear_int8_transposed(dy, int8.q, int8.absmax)],
    }

found = {}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x, dy = x32.to(dtype), dy32.to(dtype)
    for threads, rows in ((1, 1), (2, 1), (2, 3), (2, 4), (2, 16), (3, 17), (2, 64)):
        torch.set_num_threads(threads)
        parts = [products(x[i : i + rows], dy[i : i + rows]) for i in range(0, 64, rows)]
        for name in parts[0]:
            for kernel in range(len(parts[0][name])):
                y = torch.cat([part[name][kernel] for part in parts])
                digest = hashlib.sha256(y.view(torch.uint8).numpy().tobytes()).hexdigest()
                found.setdefault(f"{name} {dtype}", {}).setdefault(digest, []).append([threads, rows, kernel])
print(json.dumps(found))
"""


def digests(variant: str, flag: str) -> dict[str, dict[str, list[list[int]]]]:
    env = {"POLYBIT_BACKEND": variant, "POLYBIT_FALLBACK": "error", "POLYBIT_DETERMINISTIC": flag}
    result: dict[str, dict[str, list[list[int]]]] = json.loads(run_python(PROGRAM, **env).stdout)
    return result


def test_rows_depend_on_themselves_alone() -> None:
    """One digest per product and dtype, over rows, threads, packed or not, and over all variants."""
    results = {variant: digests(variant, "1") for variant in cpu_variants()}
    assert len(results) >= 1
    for name in next(iter(results.values())):
        ways = {(variant, digest) for variant, found in results.items() for digest in found[name]}
        assert len({digest for _, digest in ways}) == 1, f"{name}: {sorted(ways)}"


def test_the_mode_is_what_makes_them_so() -> None:
    """Without it, outlier columns reach other rows: the test above would notice."""
    assert len(digests(cpu_variants()[0], "0")["linear_int8 torch.float32"]) > 1


def test_a_wrong_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYBIT_DETERMINISTIC", "yes")
    reset()
    try:
        with pytest.raises(BackendError, match="POLYBIT_DETERMINISTIC: wanted 0 or 1, got 'yes'"):
            deterministic()
        with pytest.raises(BackendError, match="POLYBIT_DETERMINISTIC"), polybit.backend("cpu"):
            pass
    finally:
        monkeypatch.undo()
        reset()
