"""Threads, fork, and the one OpenMP pool."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tools import cpu_variants, run_python

import polybit
from polybit import _C
from polybit.backends import last_backend
from polybit.formats import get_format

NF4 = get_format("nf4")
CODE = torch.linspace(-1, 1, 256)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def work(seed: int) -> list[torch.Tensor]:
    """Quantize, dequantize, multiply: large enough for several grains."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(96, 1024, generator=generator)
    x = torch.randn(5, 1024, generator=generator)
    q, absmax = torch.ops.polybit.quantize_kbit(w, NF4.code, NF4.thresholds, NF4.order, 64, 4, 1)
    q8, absmax8 = torch.ops.polybit.quantize_blockwise(w, CODE, 256)
    y8 = torch.ops.polybit.dequantize_blockwise(q8, absmax8, CODE, 256, torch.bfloat16)
    y = torch.ops.polybit.matmul_kbit(x, q, absmax, NF4.code, None, None, None, None, None, 96, 64, 4, 0, 0)
    rows = torch.ops.polybit.quantize_int8(w, 2.0)
    norm = torch.ops.polybit.sum_squares_multi([w, x])
    return [q, absmax, q8, absmax8, y8, y, *rows, norm]


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), f"result {i} differs"


def test_the_pool_is_torchs() -> None:
    assert "omp" in os.path.basename(_C.openmp_library())
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    with open("/proc/self/maps", encoding="utf-8") as maps:
        loaded = {line.split()[-1] for line in maps if "omp" in os.path.basename(line.split()[-1])}
    assert os.path.realpath(_C.openmp_library()) in {os.path.realpath(path) for path in loaded}


@pytest.mark.parametrize("variant", cpu_variants())
def test_results_do_not_depend_on_the_number_of_threads(variant: str, threads: Callable[[int], None]) -> None:
    with polybit.backend(variant, fallback="error"):
        threads(1)
        want = work(0)
        for count in (2, 3, 8):
            threads(count)
            assert _C.thread_count() == count
            assert_same(work(0), want)


def test_many_python_threads() -> None:
    """Every thread forces its own variant and gets its own results; routes and warnings are made meanwhile."""
    variants = cpu_variants()
    want = {}
    for variant in variants:
        with polybit.backend(variant, fallback="error"):
            want[variant] = [work(seed) for seed in range(4)]

    def task(i: int) -> None:
        variant = variants[i % len(variants)]
        with polybit.backend(variant, fallback="error"):
            assert_same(work(i % 4), want[variant][i % 4])
            with polybit.backend("cpu:scalar", fallback="error"):
                torch.ops.polybit.quantize_blockwise(torch.ones(64), CODE, 64)
                assert last_backend() == "cpu:scalar"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(task, range(64)))


def test_first_use_by_many_threads_at_once() -> None:
    """Discovery runs once, whoever comes first."""
    code = """
import threading, torch, polybit
from polybit.backends import last_backend, list_backends
code = torch.linspace(-1, 1, 256)
start = threading.Barrier(8)
seen = []
def first():
    start.wait()
    q, _ = torch.ops.polybit.quantize_blockwise(torch.ones(128), code, 64)
    seen.append((last_backend(), q.sum().item()))
group = [threading.Thread(target=first) for _ in range(8)]
[t.start() for t in group]
[t.join() for t in group]
names = [info.name for info in list_backends()]
assert len(names) == len(set(names)), names
assert len(seen) == 8 and len(set(seen)) == 1, seen
print(seen[0][0])
"""
    assert run_python(code).stdout.startswith("cpu:")


def test_fork_after_use() -> None:
    """The parent's OpenMP threads do not exist in the child: an op there must not wait for them."""
    code = """
import os, sys, signal, torch, polybit
code = torch.linspace(-1, 1, 256)
x = torch.randn(1 << 20)
torch.set_num_threads(4)
want = torch.ops.polybit.quantize_blockwise(x, code, 64)
child = os.fork()
if child == 0:
    signal.alarm(60)
    got = torch.ops.polybit.quantize_blockwise(x, code, 64)
    torch.set_num_threads(1)  # torch's own loops do hang after a fork
    os._exit(0 if all(torch.equal(a, b) for a, b in zip(got, want)) else 3)
_, status = os.waitpid(child, 0)
again = torch.ops.polybit.quantize_blockwise(x, code, 64)
assert torch.equal(again[0], want[0])
print(os.waitstatus_to_exitcode(status))
"""
    assert run_python(code, PYTHONWARNINGS="ignore").stdout.strip() == "0"


@pytest.mark.alone
def test_alternating_with_torch_shares_the_cores() -> None:
    """Loose, because CI machines are busy: a second pool would cost several times as much (benchmarks/openmp.py)."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two cores")
    a = torch.randn(256, 256)
    x = torch.randn(1 << 19)

    def mm() -> None:
        torch.mm(a, a)

    def ours() -> None:
        torch.ops.polybit.quantize_blockwise(x, CODE, 64)

    def both() -> None:
        mm()
        ours()

    def median(function: Callable[[], None]) -> float:
        times = []
        for _ in range(40):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    both()
    ratios = [median(both) / (median(mm) + median(ours)) for _ in range(5)]
    assert min(ratios) < 1.5, ratios
