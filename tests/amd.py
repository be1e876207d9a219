"""Compile HIP for AMD's GPUs and read what came out, without a GPU: code objects, their notes and instructions."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import yaml
from tools import kernel_names, missing, require_tool

ROOT = Path(__file__).parent.parent
WAVEFRONT = {"gfx90a": 64, "gfx942": 64, "gfx950": 64, "gfx1030": 32, "gfx1100": 32, "gfx1201": 32}
GROUP_MEMORY_MAX = 65536
# How many scalar registers a kernel may keep in lanes of vector registers, by the beginning of its name.
SCALARS = {"Gemv<Dense<": 26, "Gemv<Bytes, KbitBytes": 26, "Gemm<AmdTile<": 6}


def require_rocm_root() -> Path:
    """The folder with llvm/bin/clang++ and HIP's headers: $ROCM_PATH, or what tools/rocm_root.py made."""
    root = Path(os.environ.get("ROCM_PATH", ROOT / "build" / "rocm"))
    if not (root / "llvm/bin/clang++").exists():
        missing(
            f"no HIP compiler in {root}: make build/rocm/made, which needs Debian's or Ubuntu's apt and the network"
        )
    return root


def call(*command: str | Path, cwd: Path | None = None) -> str:
    """What a command prints; the test fails with all of its output if the command does."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def llvm(tool: str, *arguments: str | Path, cwd: Path | None = None) -> str:
    """What one of the ROCm root's LLVM tools prints."""
    return call(require_rocm_root() / "llvm/bin" / tool, *arguments, cwd=cwd)


def compile_hip(build: Path, architectures: tuple[str, ...] = tuple(WAVEFRONT)) -> Path:
    """The HIP backend, configured and built in a folder, warnings of CMake as errors."""
    call(
        require_tool("cmake"),
        "-GNinja",
        *("-S", ROOT, "-B", build, "-Werror=dev"),
        *(f"-DPOLYBIT_{part}=OFF" for part in ("PYTHON", "CPU", "EMULATOR", "CUDA")),
        "-DPOLYBIT_HIP=ON",
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_MAKE_PROGRAM={require_tool('ninja')}",
        f"-DCMAKE_HIP_COMPILER={require_rocm_root() / 'llvm/bin/clang++'}",
        f"-DCMAKE_HIP_ARCHITECTURES={';'.join(architectures)}",
    )
    call(require_tool("cmake"), "--build", build)
    return build / "backends" / "hip" / "libpolybit_hip.so"


def code_objects(library: Path) -> dict[str, Path]:
    """The code object of each architecture, extracted from a library into files beside it."""
    if not [*library.parent.glob(f"{library.name}.*--gfx*")]:
        llvm("llvm-objdump", "--offloading", library, cwd=library.parent)
    return {path.name.rpartition("--")[2]: path for path in library.parent.glob(f"{library.name}.*--gfx*")}


def notes_of(code_object: Path) -> dict[str, dict[str, Any]]:
    """Of each kernel by name, what the compiler noted: ``.vgpr_count``, ``.group_segment_fixed_size`` in bytes ..."""
    text = llvm("llvm-readelf", "--notes", code_object)
    document = re.search(r"---\n(.*?)^\.\.\.", text, re.DOTALL | re.MULTILINE)
    assert document, text
    kernels = {kernel[".name"]: kernel for kernel in yaml.safe_load(document[1])["amdhsa.kernels"]}
    names = kernel_names(kernels)
    return {names[symbol]: kernel for symbol, kernel in kernels.items()}


def instructions_of(code_object: Path) -> dict[str, list[str]]:
    """The names of the instructions of each function."""
    functions: dict[str, list[str]] = {}
    for block in llvm("llvm-objdump", "--disassemble", "--no-show-raw-insn", code_object).split("\n\n"):
        name = re.search(r"^[0-9a-f]+ <(.+)>:$", block, re.MULTILINE)
        if name:
            functions[name[1]] = re.findall(r"^\s+(\w+)", block[name.end() :], re.MULTILINE)
    names = kernel_names(functions)
    return {names[symbol]: found for symbol, found in functions.items()}


def undefined_symbols(library: Path) -> set[str]:
    """What a library wants from others, without versions."""
    lines = llvm("llvm-nm", "--dynamic", "--undefined-only", library).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


def check_resources(notes: dict[str, dict[str, Any]], wavefront: int) -> None:
    """No register of a kernel is spilled, no private memory is used, and its group memory fits."""
    for name, kernel in notes.items():
        assert kernel[".wavefront_size"] == wavefront, name
        for count in (".vgpr_spill_count", ".private_segment_fixed_size"):
            assert kernel[count] == 0, f"{name}: {count} is {kernel[count]}"
        # Scalars go to lanes of a vector register, not to memory: known of products with many masks of lanes.
        most = next((most for start, most in SCALARS.items() if name.startswith(start)), 0)
        assert kernel[".sgpr_spill_count"] <= most, f"{name}: .sgpr_spill_count is {kernel['.sgpr_spill_count']}"
        assert kernel[".group_segment_fixed_size"] < GROUP_MEMORY_MAX, name
