"""Compile SYCL for Intel's devices and run it on a CPU, with the DPC++ compiler in Intel's runtime libraries."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools import missing, require_tool

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "tests" / "simt"
FOLDER = ROOT / "build" / "sycl"  # what requirements-sycl.txt names
# Not contracted, and correctly rounded, as core/simt/sycl.h asks for.
OPTIONS = (f"-I{ROOT}", "-ffp-contract=off", "-foffload-fp32-prec-div", "-foffload-fp32-prec-sqrt", "-Wall", "-Werror")


def require_sycl() -> Path:
    """The folder with include/sycl and lib/libsycl.so."""
    if not (FOLDER / "lib/libsycl.so").exists():
        missing(f"no SYCL runtime in {FOLDER}: make build/sycl/made, on x86-64 Linux with the network")
    return FOLDER


def build_sycl_compile(folder: Path) -> Path:
    """The program of tests/simt/sycl_compile.cpp, by the host's compiler."""
    root, program = require_sycl(), folder / "sycl_compile"
    flags = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-DSYCL_DISABLE_FSYCL_SYCLHPP_WARNING")
    where = ("-isystem", root / "include", "-L", root / "lib", f"-Wl,-rpath,{root / 'lib'}")
    source = SOURCES / "sycl_compile.cpp"
    done = execute(require_tool("g++", "c++"), *flags, source, *where, "-lsycl", "-o", program)
    assert done.returncode == 0, done.stdout
    return program


def execute(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command with Intel's libraries, its stderr in its stdout."""
    lib = require_sycl() / "lib"
    # The wheel's own list of OpenCL devices names another folder.
    env = {"LD_LIBRARY_PATH": str(lib), "OCL_ICD_FILENAMES": str(lib / "libintelocl.so")}
    return subprocess.run(
        [str(word) for word in command],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


def compile_sycl(program: Path, source: Path, sub_group: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Compile every entry point of a source file to SPIR-V."""
    return execute(program, source, *OPTIONS, f"-DPB_SUB_GROUP={sub_group}", *options)


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel; its arguments in the order of Args, a file for a pointer: its bytes go in and come back."""

    groups: int
    threads: int
    arguments: Sequence[int | Path]


def run_kernel(program: Path, folder: Path, kernel: str, sub_group: int, launches: Sequence[Launch]) -> None:
    """Compile one kernel type, named as in C++, and launch it on the CPU."""
    source = folder / "one.cpp"
    includes = "".join(f'#include "{name}"\n' for name in ("core/simt/sycl.h", "core/kernels/kernels.h"))
    source.write_text(f"{includes}PB_SYCL_ENTRY(one, {kernel})\n")
    files = [folder / f"{i}.launch" for i in range(len(launches))]
    for file, launch in zip(files, launches):
        lines = [f"one {launch.groups} {launch.threads}"]
        lines += [f"buffer {a}" if isinstance(a, Path) else f"integer {a}" for a in launch.arguments]
        file.write_text("".join(f"{line}\n" for line in lines))
    done = execute(program, source, *files, *OPTIONS, f"-DPB_SUB_GROUP={sub_group}")
    assert (done.returncode, done.stdout) == (0, "")
