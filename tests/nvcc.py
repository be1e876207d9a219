"""Every kernel of core/kernels compiled by nvcc for every architecture of the CUDA backend, and what ptxas says of it.

``python tests/nvcc.py`` writes tests/simt/registers.json anew, to be read and committed with a change of a kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

from tools import kernel_names, require_tool

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests" / "simt" / "registers.json"
ARCHITECTURES = tuple(re.findall(r"\bsm_(\d+)", (ROOT / "backends/cuda/CMakeLists.txt").read_text()))


def release() -> str:
    """The version of nvcc."""
    said = subprocess.run([require_tool("nvcc"), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", said)
    assert found is not None, said
    return found[1]


def build(folder: Path) -> tuple[Path, str]:
    """The CUDA backend, built in the folder for all architectures, and what ptxas said."""
    off = [f"-DPOLYBIT_{part}=OFF" for part in ("PYTHON", "CPU", "EMULATOR", "HIP")]
    flags = (f"-DCMAKE_CUDA_COMPILER={require_tool('nvcc')}", "-DCMAKE_CUDA_FLAGS=-Xptxas=-v", "-DPOLYBIT_CUDA=ON")
    run("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), *off, *flags)
    said = run("cmake", "--build", str(folder))
    return folder / "backends" / "cuda" / "libpolybit_cuda.so", said


def run(*command: str) -> str:
    """The output of a command, which must succeed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def registers(said: str) -> dict[str, dict[str, int]]:
    """Registers of each kernel by architecture; a spill or a stack frame is an AssertionError."""
    entry = (
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    found = re.findall(entry, said, re.S)
    names = kernel_names(row[0] for row in found)
    table: dict[str, dict[str, int]] = {}
    for mangled, architecture, *spills, used in found:
        name = names[mangled]
        assert spills == ["0", "0", "0"], f"{name} on sm_{architecture}: stack, spill stores, spill loads: {spills}"
        table.setdefault(name, {})[architecture] = int(used)
    return {name: dict(sorted(row.items(), key=lambda item: int(item[0]))) for name, row in sorted(table.items())}


def main() -> None:
    """Write the table."""
    with tempfile.TemporaryDirectory() as folder:
        table = registers(build(Path(folder))[1])
    rows = ",\n".join(f'    "{name}": {json.dumps(table[name])}' for name in table)
    TABLE.write_text(f'{{\n  "nvcc": "{release()}",\n  "registers": {{\n{rows}\n  }}\n}}\n')
    print(f"{len(table)} kernels for {len(ARCHITECTURES)} architectures")


if __name__ == "__main__":
    main()
