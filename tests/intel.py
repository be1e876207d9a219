"""Compile SYCL for Intel's devices with the DPC++ compiler in Intel's runtime libraries.

``python tests/intel.py`` writes tests/simt/intel.json anew, to be read and committed with a change of a kernel.
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from tools import missing, require_tool

from polybit.backends import list_backends

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "tests" / "simt"
FOLDER = ROOT / "build" / "sycl"  # what requirements-sycl.txt names
FOLDER_2025 = ROOT / "build" / "sycl-2025"  # what requirements-sycl-2025.txt names
OCLOC = ROOT / "build" / "ocloc"
GPUS = {"pvc": 16, "dg2": 8}  # lanes of a sub-group, as the backend chooses them: what a register holds
KERNELS = SOURCES / "intel.json"
# Not contracted, and correctly rounded, as core/simt/sycl.h asks for.
OPTIONS = (f"-I{ROOT}", "-ffp-contract=off", "-foffload-fp32-prec-div", "-foffload-fp32-prec-sqrt", "-Wall", "-Werror")


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


def build_program(name: str, folder: Path, *options: str) -> Path:
    """The program of tests/simt/<name>.cpp, by the host's compiler."""
    root, program = require_sycl(), folder / name
    flags = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-DSYCL_DISABLE_FSYCL_SYCLHPP_WARNING", *options)
    where = ("-isystem", root / "include", "-L", root / "lib", f"-Wl,-rpath,{root / 'lib'}")
    done = execute(require_tool("g++", "c++"), *flags, SOURCES / f"{name}.cpp", *where, "-lsycl", "-ldl", "-o", program)
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


def compile_sycl(program: Path, source: Path, sub_group: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Compile every entry point of a source file to SPIR-V."""
    return execute(program, source, *OPTIONS, f"-DPB_SUB_GROUP={sub_group}", *options)


def require_ocloc() -> Path:
    """The folder with usr/bin/ocloc."""
    if not (OCLOC / "usr/bin/ocloc").exists():
        missing(f"no ocloc in {OCLOC}: make build/ocloc/made, which needs Debian's or Ubuntu's apt and the network")
    return OCLOC


def entries() -> dict[str, str]:
    """The type of every kernel of core/kernels/entries.def, by the name of its entry point."""
    macros = ("-DPB_ENTRY(name, ...)=@name|__VA_ARGS__@", "-DPB_TILES=pb::SyclTiles", "-DPB_WIDE_TILES")
    source = ROOT / "core" / "kernels" / "entries.def"
    done = execute(require_tool("g++", "c++"), "-E", "-P", "-x", "c++", *macros, source)
    assert done.returncode == 0, done.stdout
    return dict(re.findall(r"@\s*(\w+)\s*\|\s*(.*?)\s*@", done.stdout))


def to_spirv(program: Path, entry: str, type: str, folder: Path, device: str) -> tuple[Path, str]:
    """SPIR-V of one kernel for a GPU, in a module of its own as the backend compiles it, and the options that libsycl
    hands to the device's compiler."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    source = folder / "kernel.cpp"
    source.write_text(f'#include "core/kernels/sycl.h"\nPB_SYCL_ENTRY({entry}, {type})\n')
    command = (program, source, *OPTIONS, f"-DPB_SUB_GROUP={GPUS[device]}", "-DPB_LARGE_REGISTER_FILE", "-DPB_XMX")
    done = execute(*command, cwd=folder, SYCL_DUMP_IMAGES="1", SYCL_UR_TRACE="2")
    options = set(re.findall(r"<--- urProgramCompile\(.*\.pOptions = \w+ \((.*?)\)\)", done.stdout))
    said = re.sub(r"^ *(--->|<---) ur.*\n", "", done.stdout, flags=re.MULTILINE)
    assert len(options) == 1, said
    (given,) = options
    # The CPU, which is the device here, refuses what it does not know: after that has been written.
    assert done.returncode == 0 or f"Unrecognized build options: {given}" in said, said
    (made,) = [path for path in folder.glob("sycl_spir64*.spv") if b"__sycl_kernel" in path.read_bytes()]
    return made, given  # the other file has no entry point


def lower(spirv: Path, options: str, device: str) -> tuple[dict[str, Any], str]:
    """What Intel's compiler notes of the only kernel in a module, and its assembly, on one of its GPUs."""
    root, out = require_ocloc(), spirv.with_suffix(f".{device}")
    dump = out.with_name(f"assembly.{device}")
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
    kernels = entries()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        program = build_program("sycl_compile", folder)

        def use_on_gpus(entry: str) -> dict[str, dict[str, int]]:
            made = {device: to_spirv(program, entry, kernels[entry], folder, device) for device in GPUS}
            return {device: use_of(lower(*made[device], device)[0]) for device in GPUS}

        table = dict(zip(kernels, pool.map(use_on_gpus, kernels), strict=True))
    rows = ",\n".join(f"  {json.dumps(entry)}: {json.dumps(use)}" for entry, use in table.items())
    KERNELS.write_text(f"{{\n{rows}\n}}\n")
    print(f"{len(table)} kernels for {len(GPUS)} devices")


if __name__ == "__main__":
    main()
