"""The committed golden vectors: byte for byte on every usable backend, and again from the script that made them."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import torch

import polybit
from polybit.spec import codebooks

GOLDEN = Path(__file__).parent / "golden"
KBIT = ("nf4", "fp4", "int4", "nf3", "nf2", "nf4_search", "nf3_search", "fp4_search")
ALL = (*KBIT, "dynamic", "double_quant", "int8", "int8_outliers")


def load(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.array(file[key])) for key in file.files}


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal bits."""
    return got.dtype == want.dtype and got.numpy().tobytes() == want.numpy().tobytes()


def forced(backend: str) -> AbstractContextManager[None]:
    """The backend, with an error in place of the reference."""
    return polybit.backend(backend, fallback="error")


def test_the_script_makes_the_files_again(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(GOLDEN / "make_golden.py"), str(tmp_path)], check=True, timeout=120)
    names = sorted(path.name for path in GOLDEN.glob("*.npz"))
    assert names == sorted(path.name for path in tmp_path.glob("*.npz")) == sorted(f"{name}.npz" for name in ALL)
    for name in names:
        with np.load(GOLDEN / name) as old, np.load(tmp_path / name) as new:
            assert old.files == new.files
            for key in old.files:
                assert old[key].dtype == new[key].dtype
                assert old[key].tobytes() == new[key].tobytes(), f"{name}: {key}"


def test_the_script_is_independent() -> None:
    source = (GOLDEN / "make_golden.py").read_text(encoding="utf-8")
    modules = set(re.findall(r"^(?:from|import) (\w+)", source, flags=re.MULTILINE))
    assert modules == {"__future__", "itertools", "sys", "pathlib", "statistics", "typing", "numpy"}


def test_the_files_are_small() -> None:
    assert 0 < sum(path.stat().st_size for path in GOLDEN.glob("*.npz")) < 300_000


@pytest.mark.parametrize("name", KBIT)
def test_kbit(name: str, usable_backend: str) -> None:
    want = load(name)
    code, thresholds, order = codebooks.kbit()[name.removesuffix("_search")]
    bits, block = len(code).bit_length() - 1, int(want["block"])
    assert same(code, want["code"])
    with forced(usable_backend):
        search = int(name.endswith("_search"))
        q, absmax = torch.ops.polybit.quantize_kbit(want["x"], code, thresholds, order, block, bits, search)
        shape = list(want["x"].shape)
        args = (q, absmax, code, None, None, None, block, bits, 0, 0, torch.float32, shape)
        y = torch.ops.polybit.dequantize_kbit(*args)
    assert same(q, want["q"])
    assert same(absmax, want["absmax"])
    assert same(y, want["y"])


def test_dynamic(usable_backend: str) -> None:
    want = load("dynamic")
    code = codebooks.dynamic().code
    assert same(code, want["code"])
    with forced(usable_backend):
        q, absmax = torch.ops.polybit.quantize_blockwise(want["x"], code, 256)
        y = torch.ops.polybit.dequantize_blockwise(q, absmax, code, 256, torch.float32)
    assert same(q, want["q"])
    assert same(absmax, want["absmax"])
    assert same(y, want["y"])


def test_double_quant(usable_backend: str) -> None:
    want = load("double_quant")
    with forced(usable_backend):
        q, nested, offset = torch.ops.polybit.quantize_absmax(want["x"], want["code"])
        y = torch.ops.polybit.dequantize_absmax(q, nested, want["code"], offset, 0, 0, 0)
    assert same(q, want["q"])
    assert same(nested, want["absmax"])
    assert same(offset, want["offset"])
    assert same(y, want["y"])


@pytest.mark.parametrize("name", ["int8", "int8_outliers"])
def test_int8(name: str, usable_backend: str) -> None:
    want = load(name)
    with forced(usable_backend):
        q, absmax, outlier = torch.ops.polybit.quantize_int8(want["x"], float(want["threshold"]))
        y = torch.ops.polybit.dequantize_int8(q, absmax, torch.float32)
    assert int(want["outlier"].sum()) == (2 if name == "int8_outliers" else 0)
    assert same(q, want["q"])
    assert same(absmax, want["absmax"])
    assert same(outlier, want["outlier"])
    assert same(y, want["y"])
