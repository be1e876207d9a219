"""Compile SYCL for Intel's devices with the DPC++ compiler in Intel's runtime libraries."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tools import missing, require_tool

from polybit.backends import list_backends

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


def require_backend() -> None:
    """The backend sycl:cpu, which CMake builds where it finds that folder."""
    require_sycl()
    if not any(info.name == "sycl:cpu" and info.usable for info in list_backends()):
        missing("this polybit was built without sycl:cpu: install it again now that build/sycl is there")


def build_program(name: str, folder: Path, *options: str) -> Path:
    """The program of tests/simt/<name>.cpp, by the host's compiler."""
    root, program = require_sycl(), folder / name
    flags = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-DSYCL_DISABLE_FSYCL_SYCLHPP_WARNING", *options)
    where = ("-isystem", root / "include", "-L", root / "lib", f"-Wl,-rpath,{root / 'lib'}")
    done = execute(require_tool("g++", "c++"), *flags, SOURCES / f"{name}.cpp", *where, "-lsycl", "-ldl", "-o", program)
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
