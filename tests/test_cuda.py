"""The CUDA backend as far as a machine without a GPU goes: what nvcc makes of it, and its host side."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import nvcc
import pytest
from test_simt import EMULATOR, ROOT, SOURCES, execute
from tools import require_tool, run_python


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return nvcc.build(tmp_path_factory.mktemp("cuda"))


def test_registers_are_those_of_the_table_and_none_is_spilled(built: tuple[Path, str]) -> None:
    table = json.loads(nvcc.TABLE.read_text())
    found = nvcc.registers(built[1])
    assert all(set(row) == set(nvcc.ARCHITECTURES) for row in found.values())
    if nvcc.release() == table["nvcc"]:  # another ptxas allocates otherwise
        assert found == table["registers"], "python tests/nvcc.py writes the table anew"
    assert set(found) == set(table["registers"])


def test_the_library_needs_no_driver_and_says_why_it_is_unusable(built: tuple[Path, str]) -> None:
    needed = subprocess.run([require_tool("readelf"), "-d", str(built[0])], capture_output=True, text=True, check=True)
    assert not re.search(r"NEEDED.*(cuda|nv|torch|python)", needed.stdout), needed.stdout
    done = run_python(f"""
import polybit, torch
polybit.load_backend({str(built[0])!r})
info = next(info for info in polybit.backends.list_backends() if info.name == "cuda")
assert info.device_type == "cuda", info
assert info.usable == torch.cuda.is_available() or not torch.version.cuda, info
print(info.usable, info.reason)
""")
    assert re.match(r"True $|False no usable device: cudaError\w+ \(.+\)", done.stdout), done.stdout


def test_it_exports_one_symbol(built: tuple[Path, str]) -> None:
    command = [require_tool("nm"), "-D", "--defined-only", str(built[0])]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.findall(r" (\w+)$", symbols, re.M) == ["polybit_backend"]


def test_the_host_side_keeps_to_its_device_and_stream(tmp_path: Path) -> None:
    """Two devices by fake: no machine of CI has one."""
    (tmp_path / "polybit_abi.h").write_text("#define PB_ABI 1ull\n")
    flags = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off")
    includes = (f"-I{tmp_path}", f"-I{ROOT / 'core'}", f"-I{SOURCES / 'fake'}")
    sources = (SOURCES / "cuda_host.cpp", EMULATOR / "engine.cpp", EMULATOR / "fiber.cpp")
    program = tmp_path / "cuda_host"
    made = execute(require_tool("g++", "c++", "clang++"), *flags, *includes, *sources, "-o", program)
    assert made.returncode == 0, made.stderr
    done = execute(program)
    assert (done.returncode, done.stdout) == (0, "0 wrong\n")


def test_the_library_is_looked_for_when_a_tensor_of_its_device_comes(tmp_path: Path) -> None:
    """Not before: an import must not wake a driver."""
    done = run_python("""
import polybit, torch
from polybit.backends import discovery
tried = []
discovery.catalogue.discover = lambda families: tried.extend(families)
polybit.backends.resolve("quantize_kbit")
print(tried)
polybit.backends.resolve("quantize_kbit", "cuda")
torch.version.hip = "7.1"
polybit.backends.resolve("dequantize_kbit", "cuda")
print(tried)
""")
    assert done.stdout.splitlines() == ["['cpu', 'cpu']", "['cpu', 'cpu', 'cuda', 'hip']"], done.stdout
