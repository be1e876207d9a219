"""The source distribution and the wheel: built, installed elsewhere, run from another directory."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
USE = """
import torch, polybit
from polybit.backends import last_backend, list_backends
code = torch.linspace(-1, 1, 256)
x = torch.randn(100)
q, absmax = torch.ops.polybit.quantize_blockwise(x, code, 64)
y = torch.ops.polybit.dequantize_blockwise(q, absmax, code, 64, torch.float32)
assert (y - x).abs().max() < absmax.max() / 250
assert last_backend().startswith("cpu:")
print(polybit.__file__)
"""


def run(*command: str, cwd: Path, **env: str) -> str:
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and not key.startswith("POLYBIT_")}
    done = subprocess.run(command, cwd=cwd, env={**clean, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel): the wheel is built from the sdist, so nothing outside it can be missed."""
    out = tmp_path_factory.mktemp("dist")
    # The tools are those of this environment; build isolation is what `make` itself exercises.
    # Without optimization, as the kernels that `make` has built are those that the other tests run.
    # CUDA is what tests/test_cuda.py builds.
    fast = [f"-Ccmake.define.{what}" for what in ("CMAKE_CXX_FLAGS_RELEASE=-O0", "POLYBIT_CUDA=OFF")]
    run(sys.executable, "-m", "build", "--no-isolation", *fast, "--outdir", str(out), str(ROOT), cwd=out)
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def test_sdist(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "CMakeLists.txt", "pyproject.toml", "core/ops.def", "core/polybit.h"}
    wanted |= {"CMakePresets.json", "cmake/aarch64-linux-gnu.cmake", "tests/conformance/CMakeLists.txt"}
    assert wanted <= names
    assert not [name for name in names if name.startswith((".venv", "build/", "report/")) or name.endswith(".so")]


def test_wheel_contents(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    for name in ("lib/libpolybit_cpu.so", "include/polybit.h", "include/polybit_abi.h", "include/ops.def", "py.typed"):
        assert f"polybit/{name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if not name.startswith("polybit")], "something lies beside the package"
    assert "Requires-Dist: torch>=2.6" in text and "Requires-Python: >=3.10" in text


def test_installed_wheel_runs_elsewhere(built: tuple[Path, Path], tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    run(*pip, str(built[1]), cwd=elsewhere)
    out = run(sys.executable, "-c", USE, cwd=elsewhere, PYTHONPATH=str(target), POLYBIT_FALLBACK="error")
    assert out.strip().splitlines()[-1].startswith(str(target))
