"""Formats: their tables, and registering one."""

from __future__ import annotations

import pytest
import torch

import polybit.formats as formats
from polybit.qtensor import quantize

KBIT = ["nf4", "fp4", "int4", "nf3", "int3", "lloyd3", "nf2", "int2", "lloyd2"]


@pytest.fixture
def scratch_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_FORMATS", dict(formats._FORMATS))


def test_names() -> None:
    assert formats.list_formats() == sorted([*KBIT, "dynamic8", "int8"])


@pytest.mark.parametrize("name", KBIT)
def test_tables_of_kbit_formats(name: str) -> None:
    format = formats.get_format(name)
    size = 1 << format.bits
    assert (format.kind, str(format.bits)) == ("kbit", name[-1])
    assert format.code.shape == (size,) and format.code.dtype == torch.float32
    assert format.thresholds.shape == (size - 1,)
    assert sorted(format.order.tolist()) == list(range(size))
    ranked = format.code[format.order.long()]
    assert bool((ranked[1:] >= ranked[:-1]).all())
    assert bool((format.thresholds[1:] > format.thresholds[:-1]).all())


def test_search_belongs_to_the_lloyd_formats() -> None:
    assert [name for name in formats.list_formats() if formats.get_format(name).search] == ["lloyd2", "lloyd3"]


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown format 'nf5'.*dynamic8, fp4.*nf4"):
        formats.get_format("nf5")


def test_tables_on_another_device_are_made_once() -> None:
    format = formats.get_format("nf4")
    assert format.on("cpu").code is format.code
    assert format.on("meta").code.is_meta
    assert format.on("meta") is format.on("meta")


def test_registered_format_quantizes_to_its_levels(scratch_registry: None) -> None:
    format = formats.register_format("mine", [0.5, -1.0, 0.0, 1.0])
    assert (format.bits, format.kind) == (2, "kbit")
    assert format.order.tolist() == [1, 2, 0, 3]
    assert format.thresholds.tolist() == [-0.5, 0.25, 0.75]
    x = torch.tensor([-2.0, 2.0, 0.4, 0.6, 1.4, 1.6]).repeat(16)
    y = quantize(x, "mine", double_quant=False).dequantize()
    assert y.tolist() == [-2.0, 2.0, 0.0, 1.0, 1.0, 2.0] * 16


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("nf4", [0.0, 1.0, 2.0, 3.0], "registered already"),
        ("a.b", [0.0, 1.0, 2.0, 3.0], "letters, digits"),
        ("new", [0.0, 1.0, 2.0], "4, 8, 16 or 256"),
        ("new", [0.0, 1.0, 1.0, 3.0], "all different"),
        ("new", [0.0, 1.0, float("nan"), 3.0], "finite"),
    ],
)
def test_register_refuses(scratch_registry: None, name: str, code: list[float], message: str) -> None:
    before = formats.list_formats()
    with pytest.raises(ValueError, match=message):
        formats.register_format(name, code)
    assert formats.list_formats() == before


def test_register_refuses_wrong_tables(scratch_registry: None) -> None:
    code = [-1.0, 0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="permutation"):
        formats.register_format("new", code, order=torch.tensor([0, 0, 1, 2], dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"thresholds must be fp32 \[3\]"):
        formats.register_format("new", code, thresholds=torch.zeros(4))
    with pytest.raises(ValueError, match="ascend"):
        formats.register_format("new", code, thresholds=torch.tensor([0.0, -1.0, 1.0]))
