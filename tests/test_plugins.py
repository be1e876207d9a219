"""Out-of-tree backends: old ones, broken ones, and one that is really installed. Each in a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tools import INCLUDE, compile_library, run_python

from polybit import _C

PRELUDE = """
import sys, torch, polybit
from polybit import backends
from polybit.backends import last_backend, list_backends, resolve
code = torch.linspace(-1, 1, 256)
q = torch.arange(256, dtype=torch.uint8)
absmax = torch.tensor([1.0, 2.0, 3.0, 4.0])
want = code * absmax.repeat_interleave(64)
def op(dtype=torch.float32):
    return torch.ops.polybit.dequantize_blockwise(q, absmax, code, 64, dtype)
"""


def test_old_plugin_falls_back_behind_its_size(tmp_path: Path) -> None:
    """Its table ends before quantize_kbit: the rest reads as null, although there are pointers behind."""
    library = compile_library(tmp_path, "plugin.c", "old", "-DPLUGIN_SIZE=offsetof(pb_backend, quantize_kbit)")
    code = PRELUDE + (
        f"assert polybit.load_backend({str(library)!r}) == ['dummy']\n"
        "index = torch.tensor([1, 0]); table = torch.ones(2, 32, dtype=torch.int8); scale = torch.full((2,), 127.0)\n"
        "gather = lambda: torch.ops.polybit.gather_int8(index, table, scale, torch.float32)\n"
        "with polybit.backend('dummy', fallback='silent'):\n"
        "    assert torch.equal(op(), want) and last_backend() == 'dummy'\n"
        "    assert resolve('dequantize_blockwise').kind == 'native'\n"
        "    assert resolve('gather_int8').kind == 'reference'\n"
        "    assert torch.equal(gather(), torch.ones(2, 32)) and last_backend() == 'reference'\n"
        "with polybit.backend('dummy', fallback='error'):\n"
        "    try:\n"
        "        gather()\n"
        "    except polybit.BackendError as problem:\n"
        "        print(problem)\n"
    )
    assert "dummy does not implement it" in run_python(code).stdout


def test_new_plugin_reaches_all_its_entries(tmp_path: Path) -> None:
    """The control: with its whole size, the same library's last entry is called, and its error comes through."""
    library = compile_library(tmp_path, "plugin.c", "new")
    code = PRELUDE + (
        f"polybit.load_backend({str(library)!r})\n"
        "index = torch.tensor([1, 0]); table = torch.ones(2, 32, dtype=torch.int8); scale = torch.full((2,), 127.0)\n"
        "with polybit.backend('dummy', fallback='error'):\n"
        "    try:\n"
        "        torch.ops.polybit.gather_int8(index, table, scale, torch.float32)\n"
        "    except RuntimeError as problem:\n"
        "        print(type(problem).__name__, problem)\n"
    )
    out = run_python(code).stdout
    assert "gather_int8" in out and "this entry was not to be read" in out


def test_unsupported_goes_to_the_reference_with_its_reason(tmp_path: Path) -> None:
    library = compile_library(tmp_path, "plugin.c", "picky")
    code = PRELUDE + (
        "import warnings\n"
        f"polybit.load_backend({str(library)!r})\n"
        "with polybit.backend('dummy', fallback='warn'), warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    half = op(torch.float16)\n"
        "    op(torch.float16)\n"
        "    assert last_backend() == 'reference'\n"
        "    assert torch.equal(half, want.half())\n"
        "print(len(seen), seen[0].message)\n"
        "with polybit.backend('dummy', fallback='error'):\n"
        "    try:\n"
        "        op(torch.float16)\n"
        "    except polybit.BackendError as problem:\n"
        "        print(problem)\n"
    )
    first, second = run_python(code).stdout.splitlines()
    assert first.startswith("1 ") and "dummy writes fp32 only" in first
    assert "dummy writes fp32 only" in second and "POLYBIT_FALLBACK=error" in second


def test_a_failed_probe_is_reported(tmp_path: Path) -> None:
    library = compile_library(tmp_path, "plugin.c", "broken", "-DPLUGIN_BROKEN")
    code = PRELUDE + (
        f"polybit.load_backend({str(library)!r})\n"
        "info = next(info for info in list_backends() if info.name == 'dummy')\n"
        "assert not info.usable\n"
        "print(info.reason)\n"
        "assert torch.equal(op(), want) and last_backend().startswith('cpu:')\n"
        "try:\n"
        "    with polybit.backend('dummy'): pass\n"
        "except polybit.BackendError as problem:\n"
        "    print(str(problem).replace(chr(10), ' '))\n"
    )
    reason, problem = run_python(code).stdout.splitlines()
    assert reason == "the dummy device is out of order"
    assert "'dummy' is not usable" in problem and reason in problem and "cpu:scalar" in problem


def test_the_device_that_another_package_adds_to_torch(tmp_path: Path) -> None:
    """PrivateUse1, under the name that it was given; its tensors alone are its own."""
    library = compile_library(tmp_path, "plugin.c", "external", "-DPLUGIN_DEVICE=kDLExtDev")
    code = PRELUDE + (
        "torch.utils.rename_privateuse1_backend('abacus')\n"
        f"polybit.load_backend({str(library)!r})\n"
        "print(*(info.device_type for info in list_backends() if info.name == 'dummy'))\n"
        "print(resolve('dequantize_blockwise', 'abacus').owner, resolve('gather_kbit', 'abacus').owner)\n"
        "assert torch.equal(op(), want) and last_backend().startswith('cpu:')\n"
    )
    assert run_python(code).stdout.splitlines() == ["abacus", "dummy reference"]


def test_another_table_is_refused(tmp_path: Path) -> None:
    library = compile_library(tmp_path, "plugin.c", "foreign", "-DPLUGIN_ABI=0x1234ull")
    code = PRELUDE + (
        "try:\n"
        f"    polybit.load_backend({str(library)!r})\n"
        "except polybit.BackendError as problem:\n"
        "    print(problem)\n"
        "assert 'dummy' not in [info.name for info in list_backends()]\n"
        "assert torch.equal(op(), want)\n"
    )
    out = run_python(code).stdout
    assert "0000000000001234" in out and f"{_C.abi:016x}" in out and "rebuild" in out and str(library) in out


@pytest.mark.parametrize("flags, message", [((), "licence server"), (("-DTHROW_INT",), "no std::exception")])
def test_an_entry_point_that_throws(flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    library = compile_library(tmp_path, "throws.cpp", "throws", *flags)
    code = PRELUDE + (
        "try:\n"
        f"    polybit.load_backend({str(library)!r})\n"
        "except polybit.BackendError as problem:\n"
        "    print(problem)\n"
        "assert torch.equal(op(), want)\n"
    )
    out = run_python(code).stdout
    assert message in out and str(library) in out


def test_no_library_and_no_symbol(tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("this is no library")
    empty = tmp_path / "empty.c"
    empty.write_text("int nothing;\n")
    subprocess.run(["cc", "-shared", "-fPIC", str(empty), "-o", str(tmp_path / "empty.so")], check=True)
    code = PRELUDE + (
        f"for path in {[str(tmp_path / name) for name in ('missing.so', 'text.so', 'empty.so')]!r}:\n"
        "    try:\n"
        "        polybit.load_backend(path)\n"
        "    except polybit.BackendError as problem:\n"
        "        print(problem)\n"
    )
    missing, garbage, hollow = run_python(code).stdout.splitlines()
    assert "missing.so" in missing and "text.so" in garbage and "no symbol polybit_backend" in hollow


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    first = compile_library(tmp_path, "plugin.c", "first")
    second = compile_library(tmp_path, "plugin.c", "second")
    code = PRELUDE + (
        f"polybit.load_backend({str(first)!r})\n"
        "try:\n"
        f"    polybit.load_backend({str(second)!r})\n"
        "except polybit.BackendError as problem:\n"
        "    print(problem)\n"
    )
    assert "second.so: a backend named dummy is loaded already" in run_python(code).stdout


MINE = """
import polybit
from polybit.testing import check

class Mine:
    name, device_type, reason, origin = "mine", "cpu", "", "here"
    ops = {}

def said(source):
    try:
        polybit.load_backend(source)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
"""


def test_mistakes_of_a_backend_in_python() -> None:
    """What would make it be passed over in silence is refused when it is loaded; the rest is what the check finds."""
    code = MINE + (
        "class Nameless: ops = {}\n"
        "print(said(Nameless()))\n"
        "Mine.ops = {'quantise_int8': print}\n"
        "print(said(Mine()))\n"
        "Mine.ops, Mine.device_type = {}, 'gpu'\n"
        "print(said(Mine()))\n"
        "assert 'mine' not in [info.name for info in polybit.backends.list_backends()]\n"
        "def returned(stream, args, outs):\n"
        "    return args[0].to(args[2])\n"
        "Mine.ops, Mine.device_type = {'dequantize_int8': returned}, 'cpu'\n"
        "assert polybit.load_backend(Mine()) == ['mine']\n"
        "print(said(Mine()))\n"
        "print(check('dequantize_int8', 'mine').failures[0])\n"
    )
    nameless, misspelt, device, again, wrong = run_python(code).stdout.splitlines()
    assert nameless.startswith("TypeError: a backend is the path of a library, an object with name, device_type, ")
    assert nameless.endswith("got Nameless, which lacks name, device_type, reason, origin")
    assert misspelt.startswith("BackendError: mine: no op is called quantise_int8; ops: quantize_blockwise, ")
    assert device.startswith("BackendError: mine: device_type 'gpu': ") and "cuda" in device
    assert again == "BackendError: here: a backend named mine is loaded already"
    assert "guarded outputs: output 0: 64 of 64 differ, first at 0" in wrong


def install(folder: Path, modules: dict[str, str], library: Path) -> Path:
    """pip install a generated distribution of these modules, each with an entry point, into a folder of its own."""
    source, target = folder / "source", folder / "site"
    for name, body in modules.items():
        (source / name).mkdir(parents=True)
        (source / name / "__init__.py").write_text(body)
        (source / name / "backend.so").write_bytes(library.read_bytes())
    points = "".join(f'{name} = "{name}:backend"\n' for name in modules)
    (source / "pyproject.toml").write_text(
        f"""[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "polybit-plugins"
version = "1.0"
[project.entry-points."polybit.backends"]
{points}
[tool.setuptools]
packages = {list(modules)}
[tool.setuptools.package-data]
"*" = ["*.so"]
"""
    )
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--target", str(target), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def test_installed_entry_points(tmp_path: Path) -> None:
    """One works and brings a C library, one throws on being called, one throws on import: all in one environment."""
    library = compile_library(tmp_path, "plugin.c", "good", '-DPLUGIN_NAME="dummy:installed"')
    modules = {
        "polybit_dummy": "import pathlib\n\ndef backend():\n    return pathlib.Path(__file__).parent / 'backend.so'\n",
        "polybit_thrower": "def backend():\n    raise OSError('no dummy driver')\n",
        "polybit_unimportable": "raise ImportError('a part is missing')\n",
    }
    target = install(tmp_path, modules, library)
    code = PRELUDE + (
        "with polybit.backend('dummy', fallback='error'):\n"
        "    assert torch.equal(op(), want) and last_backend() == 'dummy:installed'\n"
        "assert torch.equal(op(), want) and last_backend().startswith('cpu:'), 'a plug-in came before the CPU'\n"
        "for info in list_backends():\n"
        "    print(info.name, info.usable, info.reason, sep=' | ')\n"
    )
    lines = run_python(code, PYTHONPATH=str(target)).stdout.splitlines()
    assert "dummy:installed | True | " in lines
    assert any("polybit_thrower | False | OSError: no dummy driver" in line for line in lines)
    assert any("polybit_unimportable | False | ImportError: a part is missing" in line for line in lines)
    forced = PRELUDE + "op(); print(last_backend())"
    done = run_python(forced, PYTHONPATH=str(target), POLYBIT_BACKEND="dummy", POLYBIT_FALLBACK="error")
    assert done.stdout.strip() == "dummy:installed"


def test_the_headers_are_installed() -> None:
    assert sorted(os.listdir(INCLUDE)) == ["dlpack.h", "ops.def", "polybit.h", "polybit_abi.h"]
