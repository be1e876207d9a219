"""What several test files need: external tools, fresh interpreters, compiled plug-ins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import pytest
from _pytest.mark.structures import ParameterSet

import polybit
from polybit.backends import list_backends

HERE = Path(__file__).parent
PACKAGE = Path(polybit.__file__).parent
INCLUDE = PACKAGE / "include"
LIB = PACKAGE / "lib"


def missing(what: str) -> NoReturn:
    """Skip the test, or fail it where CI=true."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


def require_tool(*names: str) -> str:
    """The path of the first tool that exists; without one the test is skipped, or fails where CI=true."""
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    missing(f"needs one of: {', '.join(names)}")


def cpu_variants() -> list[str]:
    """The CPU variants usable on this machine, best first."""
    return [info.name for info in list_backends() if info.usable and info.name.startswith("cpu:")]


def backend_param(name: str) -> ParameterSet:
    """A parameter of a test; slow where each kernel takes a second or more to compile first, in each process."""
    return pytest.param(name, marks=[pytest.mark.slow] if name.startswith("sycl:") else [])


def run_python(code: str, *, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds the same polybit."""
    path = os.pathsep.join([str(PACKAGE.parent), env.pop("PYTHONPATH", "")]).rstrip(os.pathsep)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("POLYBIT_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **env, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if check and done.returncode != 0:
        pytest.fail(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def compile_library(folder: Path, source: str, name: str, *flags: str) -> Path:
    """Compile tests/abi/<source>, or an absolute path, against the installed headers into a shared library."""
    cxx = source.endswith(".cpp")
    compiler = require_tool("c++", "g++", "clang++") if cxx else require_tool("cc", "gcc", "clang")
    standard = "-std=c++17" if cxx else "-std=c11"
    library = folder / f"{name}.so"
    command = [compiler, standard, "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", f"-I{INCLUDE}", *flags]
    done = subprocess.run(
        [*command, str(HERE / "abi" / source), "-o", str(library)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return library


def kernel_names(mangled: Iterable[str]) -> dict[str, str]:
    """Of each symbol of an entry<Kernel>, the kernel: ``QuantizeKbit<Fp16, 4u, false>``; another stays as it is."""
    symbols = sorted(set(mangled))
    command = [require_tool("c++filt"), *symbols]
    plain = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names: dict[str, str] = {}
    for symbol, text in zip(symbols, plain):
        match = re.match(r"void pb::entry<(.*?) ?>\(", text)
        names[symbol] = re.sub(r"\bpb::(?:launch::)?", "", match[1]) if match else symbol
    return names
