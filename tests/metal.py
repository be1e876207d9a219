"""A stand-in for ``torch.mps.compile_shader``: what it compiles runs on the emulated machine, on tensors of the CPU.

No Apple GPU and no Metal compiler takes part. It has torch's rules for arguments (torch/csrc/mps/Module.cpp): the place
of an argument is its buffer; a tensor is bound where its elements begin; a list of integers is an array of 64 bits each
unless cast; ``threads`` counts all of them. It is stricter where Metal has a limit or leaves something undefined.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tools import require_tool

ROOT = Path(__file__).parent.parent
ENTRIES = ROOT / "core" / "kernels" / "entries.def"
TYPES = {"": ctypes.c_int64, "int32": ctypes.c_int32, "int16": ctypes.c_int16, "uint8": ctypes.c_uint8}
BUFFERS, BY_VALUE, THREADS = 31, 4096, 1024
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-pedantic-errors", "-Wno-unknown-attributes", "-Wno-unused-function")


def require_clang() -> str:
    return require_tool("clang++", *(f"clang++-{version}" for version in range(22, 13, -1)))


def execute(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300, check=False)


def amalgamate(folder: Path, source: Path = ROOT / "backends" / "mps" / "polybit.metal") -> Path:
    """The text that the package would have, as CMake makes it."""
    target = folder / "amalgamated.metal"
    done = execute(sys.executable, ROOT / "backends" / "mps" / "amalgamate.py", source, target)
    assert done.returncode == 0, done.stderr
    return target


def check_types(text: Path) -> subprocess.CompletedProcess[str]:
    """Clang's opinion, with Metal's address spaces."""
    shim = ROOT / "tests" / "simt" / "shim"
    return execute(require_clang(), "-x", "c++", "-std=c++14", "-fsyntax-only", *WARNINGS, f"-I{shim}", text)


def entry_points(text: Path) -> dict[str, dict[str, str]]:
    """Of every kernel of a text its parameters by attribute, as in ``buffer(0)``."""
    shim = ROOT / "tests" / "simt" / "shim"
    done = execute(require_clang(), "-x", "c++", "-std=c++14", "-E", "-P", f"-I{shim}", text)
    assert done.returncode == 0, done.stderr
    found = {}
    for name, parameters in re.findall(r"\bvoid (\w+)\(((?:[^{;]*?\[\[[^{;]*?)+)\)\s*\{", done.stdout):
        pairs = re.findall(r"\s*(.+?)\s*\[\[(.+?)\]\](?:,|$)", parameters, re.S)
        found[name] = {attribute.replace(" ", ""): declaration for declaration, attribute in pairs}
        assert len(found[name]) == len(pairs) == parameters.count("[["), (name, parameters)
    return found


class Shaders:
    """What ``compile_shader`` returns for a text with these entries. ``calls`` counts the kernels that ran, by name."""

    def __init__(self, text: str, folder: Path, entries: Path = ENTRIES) -> None:
        source, library = folder / "compiled.metal", folder / "compiled.so"
        source.write_text(text, encoding="utf-8")
        done = execute(
            require_clang(),
            *("-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fno-strict-aliasing"),
            *("-Wno-unknown-attributes", "-DPB_METAL_RUNS", f'-DPB_METAL_TEXT="{source}"'),
            f'-DPB_METAL_ENTRIES="{entries}"',
            *(f"-I{ROOT}", f"-I{ROOT / 'tests' / 'simt' / 'shim'}", ROOT / "tests" / "simt" / "metal_run.cpp"),
            *(ROOT / "backends" / "emulator" / f"{name}.cpp" for name in ("engine", "fiber")),
            *("-o", library),
        )
        assert done.returncode == 0, done.stderr
        self._run = ctypes.CDLL(str(library)).metal_run
        self._run.restype = ctypes.c_char_p
        self._entries = entry_points(source)
        self.calls: dict[str, int] = {}

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name not in self._entries:
            raise AttributeError(name)
        return functools.partial(self._call, name)

    def _call(
        self, name: str, *args: Any, threads: int, group_size: int, arg_casts: dict[int, str] | None = None
    ) -> None:
        declared = self._entries[name]
        assert len(args) <= BUFFERS and 0 < group_size <= THREADS
        assert threads > 0 and threads % group_size == 0 and group_size % 32 == 0, "partial groups are not emulated"
        kept, pointers = [], []
        for place, arg in enumerate(args):
            space = declared.get(f"buffer({place})", "device")
            if isinstance(arg, torch.Tensor):
                assert arg.is_cpu and arg.is_contiguous() and arg.numel()
                pointers.append(arg.data_ptr())
                continue
            element = TYPES[(arg_casts or {}).get(place, "")]
            assert f"buffer({place})" in declared and "address_space(2)" in space, f"{name}: {place} is no constant"
            assert {ctypes.c_int64: "long", ctypes.c_uint8: "uchar"}[element] in space.split(), (name, place, space)
            array = (element * len(arg))(*arg)
            assert 0 < ctypes.sizeof(array) <= BY_VALUE and list(array) == list(arg), f"{name}: {place} does not fit"
            kept.append(array)
            pointers.append(ctypes.addressof(array))
        missing = [b for b in declared if b.startswith("buffer(") and int(b[7:-1]) >= len(args)]
        assert not missing, f"{name}: nothing is bound to {missing}"
        problem = self._run(
            name.encode(),
            (ctypes.c_void_p * len(pointers))(*pointers),
            ctypes.c_int64(threads // group_size),
            ctypes.c_uint32(group_size),
            os.environ.get("POLYBIT_EMULATOR_ORDER", "").encode(),
        )
        if problem:
            raise RuntimeError(f"{name}: {problem.decode()}")
        self.calls[name] = self.calls.get(name, 0) + 1
