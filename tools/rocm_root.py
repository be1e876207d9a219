#!/usr/bin/env python3
"""Make a folder with which HIP compiles, as /opt/rocm does, without ROCm and without root.

``python tools/rocm_root.py [FOLDER]`` (default: build/rocm)

clang, lld and LLVM's tools are packages of the distribution (Debian or Ubuntu; downloaded and unpacked by apt, not
installed). The HIP headers and the device libraries come out of the wheel of requirements-rocm.txt. What the wheel
lacks is written here: the device libraries' constants, one bitcode file each, and CMake's package for the HIP language.
With it::

    cmake -DCMAKE_HIP_COMPILER=$PWD/build/rocm/llvm/bin/clang++ -DCMAKE_HIP_ARCHITECTURES="gfx90a;gfx1100" ...

It compiles and links, and that is all: libamdhip64.so is an empty stub, to link against where there is no AMD GPU. A
program that is to run needs the real one, and the stub must never be shipped.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements-rocm.txt"
LLVM_VERSIONS = (22, 21, 20)  # the first that the distribution has; older ones do not know gfx950
PACKAGES = (
    "clang-{}",
    "clang-tools-{}",  # clang-offload-bundler
    "libclang-common-{}-dev",
    "libclang-cpp{}",
    "libllvm{}",
    "lld-{}",
    "llvm-{}",
)
# gfx906 is the compiler's default, for which CMake compiles to find out what compiler it is.
TARGETS = ("gfx906", "gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1201")
CMAKE_PACKAGE = """\
get_filename_component(_root "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT TARGET hip-lang::device)
  add_library(hip-lang::amdhip64 SHARED IMPORTED)
  set_target_properties(hip-lang::amdhip64 PROPERTIES
    IMPORTED_LOCATION "${_root}/lib/libamdhip64.so" IMPORTED_SONAME "@soname@")
  add_library(hip-lang::device INTERFACE IMPORTED)
  set_target_properties(hip-lang::device PROPERTIES INTERFACE_LINK_LIBRARIES hip-lang::amdhip64)
endif()
set(_CMAKE_HIP_DEVICE_RUNTIME_TARGET hip-lang::device)
"""


class ToolchainError(RuntimeError):
    """Something that the folder is made of cannot be had here."""


def call(*command: str | Path, cwd: Path | None = None, text: str | None = None) -> str:
    """What a command prints; raises ToolchainError if it fails."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, cwd=cwd, input=text, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ToolchainError(f"{words[0]}: {error.strerror}") from None
    if done.returncode != 0:
        raise ToolchainError(f"{' '.join(words[:4])} ...: exit status {done.returncode}\n{done.stderr.strip()}")
    return done.stdout


def unpack_llvm(into: Path, scratch: Path) -> int:
    """Put the newest LLVM that apt can download at ``into``; returns its major version."""
    problems = []
    for version in LLVM_VERSIONS:
        packages = [name.format(version) for name in PACKAGES]
        try:
            call("apt-get", "-qq", "-oAPT::Sandbox::User=root", "download", *packages, cwd=scratch)
        except ToolchainError as problem:
            problems.append(str(problem))
            continue
        for package in sorted(scratch.glob("*.deb")):
            call("dpkg-deb", "--extract", package, scratch / "system")
        libraries = scratch / "system/usr/lib"
        (libraries / f"llvm-{version}").rename(into)
        # The programs look for libraries in ../lib alone, as in ROCm, where the distribution has links to elsewhere.
        for library in libraries.glob("*-linux-gnu/*.so*"):
            library.replace(into / "lib" / library.name)
        return version
    raise ToolchainError("no clang of 20 or newer:\n" + "\n".join(problems))


def unpack_hip(root: Path, scratch: Path) -> None:
    """Put the headers at include/ and ocml.bc and ockl.bc at amdgcn/bitcode/."""
    # One wheel for every Python: nothing of it is run.
    which = ("--only-binary=:all:", "--python-version=3.12", "--platform=manylinux_2_28_x86_64")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps")
    call(*pip, *which, "--dest", scratch, "-r", REQUIREMENTS)
    (wheel,) = scratch.glob("*.whl")
    prefix = "triton/backends/amd/"
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith(f"{prefix}include/") or re.search(r"/o[cm]\w+\.bc$", n)]
        archive.extractall(scratch, [name for name in names if name.startswith(prefix)])
    (scratch / prefix / "include").rename(root / "include")
    (scratch / prefix / "lib").rename(root / "amdgcn/bitcode")


def constants() -> Iterator[tuple[str, tuple[tuple[str, str, int], ...]]]:
    """The name of each file of constants, and what it defines: name, type, value."""
    for name, symbol in (
        ("unsafe_math", "unsafe_math_opt"),
        ("finite_only", "finite_only_opt"),
        ("correctly_rounded_sqrt", "correctly_rounded_sqrt32"),
        ("daz_opt", "daz_opt"),
    ):
        for suffix, value in (("on", 1), ("off", 0)):
            yield f"{name}_{suffix}", ((symbol, "i8", value),)
    for suffix, wide, log2 in (("on", 1, 6), ("off", 0, 5)):
        yield f"wavefrontsize64_{suffix}", (("wavefrontsize64", "i8", wide), ("wavefrontsize_log2", "i32", log2))
    for version in (400, 500, 600):
        yield f"abi_version_{version}", (("ABI_version", "i32", version),)
    for target in TARGETS:
        yield f"isa_version_{target.removeprefix('gfx')}", (("ISA_version", "i32", isa_number(target)),)


def isa_number(target: str) -> int:
    """gfx90a is 9010: the major version, one decimal digit of the minor, and the stepping, a hexadecimal digit."""
    digits = target.removeprefix("gfx")
    return 1000 * int(digits[:-2]) + 100 * int(digits[-2]) + int(digits[-1], 16)


def write_constants(root: Path) -> None:
    """Assemble the oclc_*.bc that ocml.bc and ockl.bc read their options from."""
    llvm = root / "llvm/bin"
    empty = call(
        llvm / "clang", "--target=amdgcn-amd-amdhsa", "-nogpulib", "-S", "-emit-llvm", "-xc", "-", "-o-", text=""
    )
    header = "".join(line + "\n" for line in empty.splitlines() if line.startswith("target "))
    call(llvm / "llvm-as", "-", "-o", root / "amdgcn/bitcode/opencl.bc", text=header)  # clang wants to see one
    for name, symbols in constants():
        lines = [
            f"@__oclc_{symbol} = linkonce_odr protected local_unnamed_addr addrspace(4) constant {kind} {value}\n"
            for symbol, kind, value in symbols
        ]
        file = root / f"amdgcn/bitcode/oclc_{name}.bc"
        call(llvm / "llvm-as", "-", "-o", file, text=header + "".join(lines))


def write_package(root: Path) -> str:
    """The version file, CMake's package and the stub of the runtime; returns the version of the headers."""
    header = (root / "include/hip/hip_version.h").read_text(encoding="utf-8")
    version = dict(re.findall(r"#define HIP_VERSION_(MAJOR|MINOR|PATCH) (\d+)", header))
    (root / "share/hip").mkdir(parents=True)
    lines = [f"HIP_VERSION_{part}={number}\n" for part, number in version.items()]
    (root / "share/hip/version").write_text("".join(lines), encoding="utf-8")

    soname = f"libamdhip64.so.{version['MAJOR']}"
    package = root / "lib/cmake/hip-lang/hip-lang-config.cmake"
    package.parent.mkdir(parents=True)
    package.write_text(CMAKE_PACKAGE.replace("@soname@", soname), encoding="utf-8")
    link = ("-shared", "-nostdlib", f"-Wl,-soname,{soname}", "-xc", "-", "-o", root / "lib/libamdhip64.so")
    call(root / "llvm/bin/clang", *link, text="")
    return ".".join(version.values())


def make_root(root: Path) -> str:
    """Make the folder, in the place of an older one; returns what it holds."""
    part = root.with_name(f"{root.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "amdgcn").mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=part) as scratch:
        llvm = unpack_llvm(part / "llvm", Path(scratch))
        unpack_hip(part, Path(scratch))
    write_constants(part)
    said = f"LLVM {llvm}, HIP {write_package(part)}"
    (part / "made").write_text(f"{said}\n", encoding="utf-8")
    shutil.rmtree(root, ignore_errors=True)
    part.rename(root)
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 with the reason if something cannot be had here."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build/rocm", help="default: build/rocm")
    options = parser.parse_args(arguments)
    try:
        print(f"{options.folder}: {make_root(options.folder.absolute())}")
    except ToolchainError as problem:
        print(f"rocm_root.py: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
