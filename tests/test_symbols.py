"""What the compiled files define and need, seen by nm."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
from tools import LIB, PACKAGE, require_tool

LIBRARIES = sorted(LIB.glob("libpolybit_*.so"))
EXTENSION = next(PACKAGE.glob("_C.*.so"))

# A backend library may use what every C and C++ program has, and nothing of Python, torch or an OpenMP runtime.
FORBIDDEN = ("Py", "_Py", "GOMP_", "omp_", "__kmpc", "_ZN2at", "_ZN3c10", "_ZN5torch", "aoti_torch")
OWN_LIBRARIES = {"libpolybit_sycl": ("libsycl.so", "libOpenCL.so")}
SYSTEM_LIBRARIES = ("libc.so", "libm.so", "libstdc++.so", "libgcc_s.so", "ld-linux", "libpthread.so", "libdl.so")


def symbols(path: Path, *flags: str, nm: str = "nm") -> list[tuple[str, str]]:
    """(letter, name) by nm."""
    lines = subprocess.run([require_tool(nm), *flags, str(path)], check=True, capture_output=True, text=True).stdout
    rows = [line.split() for line in lines.splitlines() if line.strip()]
    return [(row[-2], row[-1]) for row in rows if len(row) >= 2]


def test_there_is_a_cpu_library() -> None:
    assert LIB / "libpolybit_cpu.so" in LIBRARIES


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_one_door(library: Path) -> None:
    """polybit_backend is the only strong symbol that a backend exports."""
    exported = [name for letter, name in symbols(library, "-D", "--defined-only") if letter in "TDBR"]
    assert exported == ["polybit_backend"]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.stem)
def test_free_of_python_torch_and_openmp(library: Path) -> None:
    needed = [name for letter, name in symbols(library, "-D", "--undefined-only")]
    assert [name for name in needed if name.startswith(FORBIDDEN)] == []
    listing = subprocess.run([require_tool("readelf"), "-d", str(library)], check=True, capture_output=True, text=True)
    linked = [line.split("[")[1].rstrip("]") for line in listing.stdout.splitlines() if "(NEEDED)" in line]
    allowed = SYSTEM_LIBRARIES + OWN_LIBRARIES.get(library.name.partition(".")[0], ())
    assert [name for name in linked if not name.startswith(allowed)] == []


def test_the_extension_is_free_of_torch_and_openmp() -> None:
    needed = [name for letter, name in symbols(EXTENSION, "-D", "--undefined-only")]
    assert [name for name in needed if name.startswith(FORBIDDEN[2:])] == []


def test_the_cpu_library_has_no_weak_definition() -> None:
    """A weak function compiled for AVX512 could be the one the linker keeps for everybody.

    Only backend.cpp, compiled for the baseline, may bring inline functions of the standard library.
    """
    library = LIB / "libpolybit_cpu.so"
    weak = [name for letter, name in symbols(library) if letter in "WVuwv"]
    runtime = ("__gmon_start__", "_ITM_", "__cxa_finalize", "DW.ref.")
    own = [name for name in weak if not name.startswith(runtime) and "@" not in name]
    assert [name for name in own if not name.startswith(("_ZNSt", "_ZNKSt", "_ZSt", "_ZTISt", "_ZTSSt"))] == []


BASE = ("-mavx2", "-mfma", "-mf16c")
WIDE = (*BASE, "-mavx512f", "-mavx512bw", "-mavx512vl")
# What each isa file is compiled with, as backends/cpu/CMakeLists.txt has it, and for which processors.
ISAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "scalar": ("", ()),
    "avx2": ("x86_64", BASE),
    "avx512": ("x86_64", WIDE),
    "avx512_vbmi": ("x86_64", (*WIDE, "-mavx512vbmi")),
    "avx512_vnni": ("x86_64", (*WIDE, "-mavx512vnni")),
    "avx512_bf16": ("x86_64", (*WIDE, "-mavx512vnni", "-mavx512bf16")),
    "neon": ("aarch64", ()),
    "neon_dotprod": ("aarch64", ("-march=armv8.2-a+dotprod",)),
}


def toolchain(processor: str) -> tuple[str, str]:
    """(C++ compiler, nm) for the processor; "" is this machine's."""
    here = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    if processor in ("", here):
        return require_tool("c++", "g++", "clang++"), require_tool("nm")
    if processor == "x86_64":
        pytest.skip("needs an x86-64 compiler target")
    return require_tool(f"{processor}-linux-gnu-g++"), require_tool(f"{processor}-linux-gnu-nm")


@pytest.mark.parametrize("isa", ISAS)
def test_an_instruction_set_file_defines_its_table_only(isa: str, tmp_path: Path) -> None:
    """Compiled alone from the source tree: one global symbol, nothing weak, nothing of std."""
    root = Path(__file__).parent.parent
    processor, flags = ISAS[isa]
    compiler, nm = toolchain(processor)
    compiled = tmp_path / f"{isa}.o"
    includes = [f"-I{PACKAGE / 'include'}", f"-I{root / 'core'}", f"-I{root}"]
    source = root / "backends" / "cpu" / f"isa_{isa}.cpp"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", *flags, *includes, "-c", str(source), "-o", str(compiled)]
    subprocess.run(command, check=True)
    defined = symbols(compiled, "--defined-only", "--extern-only", nm=nm)
    assert [name for _, name in defined] == [f"pb_cpu_{isa}"]
    needed = [name for _, name in symbols(compiled, "--undefined-only", nm=nm)]
    assert [name for name in needed if name.startswith("_Z")] == [], "calls C++ code outside its own file"


def test_every_instruction_set_file_is_looked_at() -> None:
    folder = Path(__file__).parent.parent / "backends" / "cpu"
    assert {path.stem.removeprefix("isa_") for path in folder.glob("isa_*.cpp")} == set(ISAS)
