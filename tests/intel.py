"""Compile SYCL for Intel's devices with Intel's compilers: DPC++, a library, and the one for GPUs, from SPIR-V.

``python tests/intel.py`` writes tests/simt/intel.json anew, to be read and committed with a change of a kernel.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from tools import PACKAGE, missing, require_tool

from polybit.backends import list_backends

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "tests" / "simt"
BACKEND = ROOT / "backends" / "sycl"
FOLDER = ROOT / "build" / "sycl"  # what requirements-sycl.txt names
FOLDER_2025 = ROOT / "build" / "sycl-2025"  # what requirements-sycl-2025.txt names
OCLOC = ROOT / "build" / "ocloc"
GPUS = {"pvc": "16-xmx", "dg2": "8-xmx"}  # and what the backend loads for them
KERNELS = SOURCES / "intel.json"


def require_sycl(folder: Path = FOLDER) -> Path:
    """The folder with include/sycl and lib/libsycl.so."""
    if not (folder / "lib/libsycl.so").exists():
        missing(f"no SYCL runtime in {folder}: make build/{folder.name}/made, on x86-64 Linux with the network")
    return folder


def require_backend() -> None:
    """The backend sycl:cpu, which CMake builds where it finds that folder."""
    require_sycl()
    if not any(info.name == "sycl:cpu" and info.usable for info in list_backends()):
        missing("this polybit was built without sycl:cpu: install it again now that build/sycl is there")


def build_program(folder: Path, *sources: Path, options: tuple[str, ...] = ()) -> Path:
    """A program that uses libsycl, by the host's compiler. It has the name of the first source."""
    root, program = require_sycl(), folder / sources[0].stem
    flags = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-DSYCL_DISABLE_FSYCL_SYCLHPP_WARNING", *options)
    where = (
        "-isystem",
        root / "include",
        "-L",
        root / "lib",
        f"-Wl,-rpath,{root / 'lib'}",
        "-lsycl",
        "-lOpenCL",
        "-ldl",
    )
    done = execute(require_tool("g++", "c++"), *flags, *sources, *where, "-o", program)
    assert done.returncode == 0, done.stdout
    return program


def execute(
    *command: str | Path, lib: Path = FOLDER / "lib", cwd: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run a command with Intel's libraries, its stderr in its stdout; `more`: environment."""
    # The wheel's own list of OpenCL devices names another folder.
    env = {"LD_LIBRARY_PATH": str(lib), "OCL_ICD_FILENAMES": str(lib / "libintelocl.so"), **more}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


def require_ocloc() -> Path:
    """The folder with usr/bin/ocloc."""
    if not (OCLOC / "usr/bin/ocloc").exists():
        missing(f"no ocloc in {OCLOC}: make build/ocloc/made, which needs Debian's or Ubuntu's apt and the network")
    return OCLOC


def driver_options(folder: Path) -> dict[str, str]:
    """What the backend tells a GPU's driver of every kernel, by the name of its entry point."""
    program = build_program(folder, SOURCES / "sycl_entries.cpp", BACKEND / "device.cpp")
    done = execute(program)
    assert done.returncode == 0, done.stdout
    rows = [line.partition(" ") for line in done.stdout.splitlines()]
    return {entry: options for entry, _, options in rows}


def spirv_of(entry: str, target: str) -> Path:
    """The module that the backend loads."""
    (path,) = PACKAGE.glob(f"lib/sycl.9/{target}/__sycl_kernel_{entry}.spv")
    return path


def lower(spirv: Path, options: str, device: str, folder: Path) -> tuple[dict[str, Any], str]:
    """What Intel's compiler notes of the only kernel in a module, and its assembly, on one of its GPUs."""
    root, out = require_ocloc(), folder / f"{spirv.stem}.{device}"
    dump = out.with_name(f"{out.name}.assembly")
    where = ("-output", out.name, "-out_dir", out.parent, "-output_no_suffix")
    command = (root / "usr/bin/ocloc", "compile", "-spirv_input", "-file", spirv, "-device", device, *where)
    keep = {"IGC_ShaderDumpEnable": "1", "IGC_DumpToCustomDir": str(dump)}
    lib = root / "usr/lib/x86_64-linux-gnu"
    done = execute(*command, "-options", options, "--format", "zebin", lib=lib, **keep)
    assert done.returncode == 0 and "Build succeeded." in done.stdout, done.stdout
    (kernel,) = [row for row in section(out.read_bytes(), ".ze_info")["kernels"] if row["name"].startswith("__sycl")]
    return dict(kernel), "".join(path.read_text() for path in sorted(dump.glob("*.asm")))


def use_of(kernel: dict[str, Any]) -> dict[str, int]:
    """The registers of a hardware thread, and bytes outside them by use: "single_space" for spills and private arrays
    of a hardware thread, or "spill_fill_space" for its spills and "private_space" for one of ours."""
    memory = {row["usage"]: row["size"] for row in kernel.get("per_thread_memory_buffers", ())}
    return {"registers": kernel["execution_env"]["grf_count"], **memory}


def section(elf: bytes, name: str) -> Any:
    """The YAML in a section of a 64-bit ELF file."""
    (headers,) = struct.unpack_from("<Q", elf, 40)
    count, of_names = struct.unpack_from("<HH", elf, 60)
    rows = [struct.unpack_from("<II4Q", elf, headers + 64 * i) for i in range(count)]  # name, type, flags, address ...
    names = rows[of_names][4]
    (row,) = [row for row in rows if elf[names + row[0] :].startswith(name.encode() + b"\0")]
    return yaml.safe_load(elf[row[4] : row[4] + row[5]])


def main() -> None:
    """Write what tests/test_sycl.py compares with."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        kernels = driver_options(folder)

        def use_on_gpus(entry: str) -> dict[str, dict[str, int]]:
            made = {device: lower(spirv_of(entry, GPUS[device]), kernels[entry], device, folder) for device in GPUS}
            return {device: use_of(kernel) for device, (kernel, _) in made.items()}

        table = dict(zip(kernels, pool.map(use_on_gpus, kernels), strict=True))
    rows = ",\n".join(f"  {json.dumps(entry)}: {json.dumps(use)}" for entry, use in table.items())
    KERNELS.write_text(f"{{\n{rows}\n}}\n")
    print(f"{len(table)} kernels for {len(GPUS)} devices")


if __name__ == "__main__":
    main()
