"""The CPU backend under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer.

The conformance program brings its own threads, so ThreadSanitizer sees no OpenMP runtime. Each build also runs a
backend with a fault that only its sanitizer sees: what is not instrumented would find nothing, too.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conformance.program import Build, build, counts
from tools import cpu_variants

FAULTS = {"none", "read", "overflow", "race"}


@pytest.fixture(scope="module", params=["asan", pytest.param("tsan", marks=pytest.mark.slow)])
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Build:
    return build(request.param, tmp_path_factory.mktemp("sanitized") / request.param)


def test_samples_without_a_report(sanitized: Build, samples: tuple[Path, dict[str, int]]) -> None:
    path, written = samples
    done = sanitized.run(path, sanitized.cpu)
    assert done.returncode == 0, done.stderr[:4000]
    assert done.stderr == ""
    ran = counts(done.stdout)
    assert sorted(ran) == sorted(cpu_variants())
    assert set(ran["cpu:scalar"]) == set(written)
    for backend, ops in ran.items():
        assert ops == {op: (written[op], 0, 0) for op in ops}, backend


@pytest.mark.parametrize(
    ("width", "order"), [(16, "shuffled:3"), (32, "descending"), pytest.param(64, "ascending", marks=pytest.mark.slow)]
)
def test_the_kernels_of_gpus_without_a_report(
    sanitized: Build, samples: tuple[Path, dict[str, int]], width: int, order: str
) -> None:
    """On the emulator; every access of a kernel is one of this process."""
    if sanitized.folder.name != "asan":
        pytest.skip("ThreadSanitizer cannot follow the emulator's fibers")
    path, written = samples
    done = sanitized.run(path, sanitized.emulator, f"emulator:{width}", POLYBIT_EMULATOR_ORDER=order)
    assert done.returncode == 0, done.stderr[:4000]
    assert done.stderr == ""
    assert counts(done.stdout) == {f"emulator:{width}": {op: (number, 0, 0) for op, number in written.items()}}


def test_a_fault_is_reported(sanitized: Build, small: tuple[Path, int]) -> None:
    seen = {
        "asan": {"read": "AddressSanitizer: use-after-poison", "overflow": "runtime error: signed integer overflow"},
        "tsan": {"race": "ThreadSanitizer: data race"},
    }[sanitized.folder.name]
    for fault in FAULTS:
        done = sanitized.run(small[0], sanitized.faulty, f"faulty:{fault}")
        assert (done.returncode != 0) == (fault in seen), (fault, done.stderr)
        assert seen.get(fault, "") in done.stderr, fault
