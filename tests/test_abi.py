"""The C side of the op table, and what the binder makes of torch tensors."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from tools import HERE, INCLUDE, cpu_variants, require_tool

import polybit
from polybit import _C
from polybit.backends import last_backend
from polybit.ops import ROWS

CODE = torch.linspace(-1, 1, 256)


def test_layout_in_c(tmp_path: Path) -> None:
    program = tmp_path / "layout"
    compiler = require_tool("cc", "gcc", "clang")
    flags = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{INCLUDE}"]
    subprocess.run([compiler, *flags, str(HERE / "abi" / "layout.c"), "-o", str(program)], check=True)
    first, *lines = subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.splitlines()
    assert int(first.split()[1], 16) == _C.abi
    expected = [
        f"{row.name} {sum(kind not in ('DTYPE', 'SHAPE') for kind, _ in row.arguments)} {40 + 8 * i}"
        for i, row in enumerate(ROWS.values())
    ]
    assert lines == expected


def test_header_is_also_cxx(tmp_path: Path) -> None:
    source = tmp_path / "header.cpp"
    source.write_text('#include "polybit.h"\nstatic_assert(sizeof(pb_backend) > 40, "");\n')
    compiler = require_tool("c++", "g++", "clang++")
    for standard in ("c++14", "c++17", "c++20"):
        flags = [f"-std={standard}", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{INCLUDE}"]
        subprocess.run([compiler, *flags, str(source)], check=True)


def test_table_grammar() -> None:
    lines = [line for line in (INCLUDE / "ops.def").read_text().splitlines() if line.startswith("PB_OP(")]
    assert len(lines) == len(ROWS)
    for line, row in zip(lines, ROWS.values(), strict=True):
        rebuilt = " ".join(f"PB_{kind}({name})" for kind, name in row.arguments)
        assert line == f"PB_OP({row.name}, {rebuilt})"
        assert len({name for _, name in row.arguments}) == len(row.arguments)


def test_schemas_follow_the_table() -> None:
    for row in ROWS.values():
        schema = getattr(torch.ops.polybit, row.name).default._schema
        assert [argument.name for argument in schema.arguments] == [name for _, name in row.inputs]
        for argument, (kind, _) in zip(schema.arguments, row.inputs, strict=True):
            changed = argument.alias_info is not None and argument.alias_info.is_write
            assert changed == (kind in ("MUT", "MUTS")), f"{row.name}: {argument.name}"
        assert len(schema.returns) == len(row.outputs)


def quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, absmax = torch.ops.polybit.quantize_blockwise(x, CODE, 64)
    return q, absmax


@pytest.fixture(params=cpu_variants())
def variant(request: pytest.FixtureRequest) -> object:
    with polybit.backend(request.param, fallback="error"):
        yield request.param


def test_storage_offset(variant: str) -> None:
    whole = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    for offset in (1, 3, 7, 64):
        view = whole[offset : offset + 300]
        assert view.storage_offset() == offset
        for got, want in zip(quantized(view), quantized(view.clone()), strict=True):
            assert torch.equal(got, want)
    assert last_backend() is not None and last_backend().startswith("cpu:")


def test_non_contiguous(variant: str) -> None:
    x = torch.randn(48, 80, generator=torch.Generator().manual_seed(2))
    for view in (x.t(), x[:, ::2], x[::3], x.t()[5:], x.unsqueeze(0).expand(2, 48, 80)):
        for got, want in zip(
            quantized(view), quantized(view.clone(memory_format=torch.contiguous_format)), strict=True
        ):
            assert torch.equal(got, want)


def test_requires_grad(variant: str) -> None:
    x = torch.randn(256, generator=torch.Generator().manual_seed(3))
    leaf = x.clone().requires_grad_()
    for tensor in (leaf, leaf * 1.0):
        for got, want in zip(quantized(tensor), quantized(x), strict=True):
            assert torch.equal(got, want)
    assert leaf.grad is None


def test_lists(variant: str) -> None:
    xs = [torch.arange(n, dtype=torch.float32)[1:] for n in (1, 5, 100)]
    sums = torch.ops.polybit.sum_squares_multi(xs)
    assert torch.equal(sums, torch.tensor([float((x.double() ** 2).sum()) for x in xs]))
    torch.ops.polybit.scale_multi(xs, torch.tensor([2.0]))
    assert xs[1].tolist() == [2.0, 4.0, 6.0, 8.0]
    assert last_backend() != "reference"


def test_strided_views_are_changed_in_place(variant: str) -> None:
    """A kernel never sees them: the reference changes them, and nothing beside them."""
    base = torch.ones(4, 6)
    with polybit.backend(variant, fallback="silent"):
        torch.ops.polybit.scale_multi([base[:, ::2]], torch.tensor([3.0]))
    assert base.tolist() == [[3.0, 1.0, 3.0, 1.0, 3.0, 1.0]] * 4


def test_the_wrong_device_is_refused() -> None:
    x = torch.randn(64)
    with pytest.raises((RuntimeError, ValueError), match="all tensors must be on one device, got cpu, meta"):
        torch.ops.polybit.quantize_blockwise(x, CODE.to("meta"), 64)
