"""Quantize the linear layers of a model in place."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from polybit.formats import Format, get_format
from polybit.nn.linear import Linear4bit, Linear8bit, LinearKbit
from polybit.qtensor import KERNEL_DTYPES, check_block_size

M = TypeVar("M", bound=nn.Module)


def quantize_(
    model: M,
    format: str | Format,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    search: bool = False,
    threshold: float = 6.0,
    skip: Iterable[str] = ("lm_head",),
) -> M:
    """Replace every nn.Linear inside `model` by its quantized counterpart, one after the other; return `model`.

    A k-bit format makes Linear4bit or LinearKbit layers, "int8" Linear8bit layers with `threshold`. `skip`: patterns
    (fnmatch) of modules to leave alone, matched with the full name and with its last component. Subclasses of nn.Linear
    are left alone: their forward may be another. A module used in several places stays one.

    Raises ValueError (unknown format, one without a linear layer, wrong block size, `model` itself an nn.Linear) or
    TypeError (a weight that is not fp32, fp16 or bf16) before anything is replaced.
    """
    format = get_format(format)
    if format.kind == "blockwise":
        raise ValueError(f"quantize_: {format.name} has no linear layer; choose a k-bit format or int8")
    if search and format.kind == "int8":
        raise ValueError("quantize_: the scale search is for k-bit formats, int8 has none")
    if not threshold >= 0:
        raise ValueError(f"quantize_: threshold must be 0 or positive, got {threshold}")
    check_block_size(block_size)
    if isinstance(skip, str):
        raise TypeError(f"quantize_: skip must be several patterns, got the string {skip!r}")
    if type(model) is nn.Linear:
        raise ValueError("quantize_: the model is a Linear itself and cannot be replaced in place; use from_linear")
    patterns = tuple(skip)
    places: dict[nn.Linear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear and not _matches(name, patterns):
            places.setdefault(module, []).append(name)
    for linear, (name, *_) in places.items():
        if linear.weight.dtype not in KERNEL_DTYPES:
            raise TypeError(f"quantize_: {name}.weight must be fp32, fp16 or bf16, got {linear.weight.dtype}")
    while places:
        linear, names = next(iter(places.items()))
        del places[linear]  # so that the dense weight is freed as soon as it is replaced
        new: nn.Module
        if format.kind == "int8":
            new = Linear8bit.from_linear(linear, threshold=threshold)
        else:
            cls = Linear4bit if format.bits == 4 else LinearKbit
            new = cls.from_linear(linear, format, block_size=block_size, double_quant=double_quant, search=search)
        for name in names:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, new)
    return model


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    last = name.rpartition(".")[2]
    return any(fnmatchcase(name, pattern) or fnmatchcase(last, pattern) for pattern in patterns)
