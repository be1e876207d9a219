"""The NEON variants, cross-compiled and run by the conformance program under qemu-user (natively on an ARM)."""

from __future__ import annotations

import platform
import struct
import subprocess
from pathlib import Path
from typing import TypeAlias

import pytest
from conformance.program import Build, build, counts
from tools import require_tool

from polybit.spec import OPS

Samples: TypeAlias = "tuple[Path, dict[str, int]]"
ON_ARM = platform.machine() in ("aarch64", "arm64")
DOTPROD_OPS = {"matmul_int8", "linear_int8", "matmul_kbit_int8"}
# What the program itself must see, sanitizers or not. The rest is for tests/test_sanitizers.py.
SEEN = {
    "value": "1 of ",
    "after": "bytes outside an output were written",
    "before": "bytes outside an output were written",
    "input": "an input was changed",
    "threads": "its result depends on threads or alignment",
    "greedy": "asked for scratch that it already had",
    "eager": "wrote before it asked for scratch",
}


@pytest.fixture(scope="module")
def neon(tmp_path_factory: pytest.TempPathFactory) -> Build:
    folder = tmp_path_factory.mktemp("neon")
    if ON_ARM:
        return build("conformance", folder)
    require_tool("aarch64-linux-gnu-g++")
    return build("aarch64", folder, (require_tool("qemu-aarch64"), "-L", "/usr/aarch64-linux-gnu"))


def test_samples_of_every_op(neon: Build, samples: Samples) -> None:
    path, written = samples
    assert set(written) == set(OPS)
    for backend in ("cpu:neon", "cpu:scalar"):
        done = neon.run(path, neon.cpu, backend)
        assert done.returncode == 0, done.stderr
        assert counts(done.stdout) == {backend: {op: (count, 0, 0) for op, count in written.items()}}


@pytest.mark.skipif(ON_ARM, reason="needs an emulated processor")
def test_dotprod_where_the_processor_has_it(neon: Build, samples: Samples) -> None:
    path, written = samples
    qemu, *rest = neon.launcher
    with_it = Build(neon.folder, (qemu, "-cpu", "max", *rest))
    done = with_it.run(path, neon.cpu, "cpu:neon_dotprod")
    assert done.returncode == 0, done.stderr
    assert counts(done.stdout) == {"cpu:neon_dotprod": {op: (written[op], 0, 0) for op in DOTPROD_OPS}}

    without = Build(neon.folder, (qemu, "-cpu", "cortex-a53", *rest))
    done = without.run(path, neon.cpu, "cpu:neon_dotprod")
    assert done.returncode == 2
    assert "cpu:neon_dotprod is not usable: this processor lacks DotProd" in done.stdout


def test_the_compiler_makes_dot_products(neon: Build) -> None:
    """cpu:neon_dotprod is the same source: without the instruction it would be a second cpu:neon."""
    objdump = require_tool("objdump") if ON_ARM else require_tool("aarch64-linux-gnu-objdump")
    objects = {path.name: path for path in neon.folder.glob("backends/cpu/**/*.o")}
    for name, wanted in (("isa_neon_dotprod.cpp.o", True), ("isa_neon.cpp.o", False)):
        code = subprocess.run([objdump, "-d", str(objects[name])], check=True, capture_output=True, text=True).stdout
        assert ("\tsdot\t" in code) == wanted, name


@pytest.mark.parametrize("fault", [*SEEN, "none"])
def test_the_program_notices(neon: Build, small: tuple[Path, int], fault: str) -> None:
    path, written = small
    done = neon.run(path, neon.faulty, f"faulty:{fault}")
    assert done.returncode == (0 if fault == "none" else 1), done.stderr
    ran, unsupported, failures = counts(done.stdout)[f"faulty:{fault}"]["matmul_int8"]
    assert ran == written and unsupported == 0
    assert (failures == 0) == (fault == "none")
    if fault != "none":
        assert SEEN[fault] in done.stderr


def test_a_wrong_expectation_is_noticed(neon: Build, small: tuple[Path, int], tmp_path: Path) -> None:
    """The file ends with the last expected output: one bit of it."""
    data = bytearray(small[0].read_bytes())
    data[-1] ^= 1
    planted = tmp_path / "planted"
    planted.write_bytes(data)
    done = neon.run(planted, neon.cpu, "cpu:neon")
    assert done.returncode == 1
    assert counts(done.stdout)["cpu:neon"]["matmul_int8"][2] == 1
    assert "1 of " in done.stderr and "wanted 0x" in done.stderr


def test_bad_usage(neon: Build, small: tuple[Path, int], tmp_path: Path) -> None:
    path, _ = small
    data = path.read_bytes()
    files = {
        "ends too early": data[:-1],
        "goes on behind its last sample": data + b"\0",
        "is no file of samples": b"polybit0" + data[8:],
        "another op table": data[:8] + struct.pack("<Q", 1) + data[16:],
        "no op is called": data.replace(b"matmul_int8", b"matmul_int9"),
        "is damaged": data[:16] + struct.pack("<Q", 1 << 60) + data[24:],
    }
    for reason, content in files.items():
        bad = tmp_path / "bad"
        bad.write_bytes(content)
        done = neon.run(bad, neon.cpu)
        assert done.returncode == 2 and reason in done.stderr, (reason, done.stderr)
    for arguments in ((), (path,), (tmp_path / "missing", neon.cpu), (path, tmp_path / "missing.so")):
        done = neon.run(*arguments)
        assert done.returncode == 2 and done.stderr, arguments
    done = neon.run(path, neon.cpu, "cpu:unknown")
    assert done.returncode == 2 and "missing or not usable" in done.stderr
