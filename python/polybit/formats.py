"""Formats: a name for a codebook and the way its codes are stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from polybit.spec import codebooks

Kind = Literal["kbit", "blockwise", "int8"]


class Tables(NamedTuple):
    """The tables of a format on one device: `code` fp32, `thresholds` fp32 (ascending), `order` uint8."""

    code: Tensor
    thresholds: Tensor
    order: Tensor


@dataclass(frozen=True, eq=False)
class Format:
    """How a value becomes a code.

    kind "kbit": 2, 3 or 4 bits, packed, one scale per block. "blockwise": 8 bits, a 256-entry codebook, one scale per
    block. "int8": symmetric integers, one scale per row, no codebook (its tables are empty).
    `search` says that the scale search belongs to the format: its codebook is not scaled to reach the largest value.
    """

    name: str
    bits: int
    kind: Kind
    tables: Tables = field(repr=False)
    search: bool = False
    _cache: dict[torch.device, Tables] = field(default_factory=dict, repr=False)

    @property
    def code(self) -> Tensor:
        """The value of each stored code, fp32 [2**bits], on the CPU."""
        return self.tables.code

    @property
    def thresholds(self) -> Tensor:
        """Ascending decision thresholds, fp32 [2**bits - 1], on the CPU."""
        return self.tables.thresholds

    @property
    def order(self) -> Tensor:
        """The stored code of each rank, uint8 [2**bits], on the CPU."""
        return self.tables.order

    def on(self, device: torch.device | str) -> Tables:
        """The tables on `device`, copied there once. They are shared: clone before you change or keep one."""
        device = torch.device(device)
        if device.type == "cpu":
            return self.tables
        if device in self._cache:
            return self._cache[device]
        # An inference tensor could not be saved for a later backward, so the cache is made outside that mode.
        with torch.inference_mode(False):
            tables = Tables(*(table.to(device) for table in self.tables))
        if all(type(table) is Tensor for table in tables):  # a tracer's fake tensors must not outlive the trace
            self._cache[device] = tables
        return tables


_FORMATS: dict[str, Format] = {}


def get_format(name: str | Format) -> Format:
    """The format of that name. Raises ValueError, listing the known names, if there is none."""
    if isinstance(name, Format):
        return name
    if name not in _FORMATS:
        raise ValueError(f"unknown format {name!r}; known formats: {', '.join(sorted(_FORMATS))}")
    return _FORMATS[name]


def list_formats() -> list[str]:
    """The names of all registered formats."""
    return sorted(_FORMATS)


def register_format(
    name: str,
    code: Tensor | Sequence[float],
    thresholds: Tensor | None = None,
    order: Tensor | None = None,
    *,
    search: bool = False,
) -> Format:
    """Register a codebook as a format, under a new name.

    `code` holds 4, 8, 16 (packed k-bit) or 256 (8-bit blockwise, ascending) finite fp32 values by stored code, all
    different. `thresholds` default to the fp32 midpoints of neighbours, `order` to the ascending order of the values.
    A checkpoint names the format: register it before loading. Raises ValueError if the name is taken or a table is
    wrong.
    """
    if not name or not name.replace("_", "").isalnum():
        raise ValueError(f"register_format: a name is made of letters, digits and _, got {name!r}")
    if name in _FORMATS:
        raise ValueError(f"register_format: {name!r} is registered already")
    code = torch.as_tensor(code, dtype=torch.float32, device="cpu").detach().clone()
    if code.dim() != 1 or code.numel() not in (4, 8, 16, 256):
        raise ValueError(f"register_format: code must hold 4, 8, 16 or 256 values, got shape {list(code.shape)}")
    ranked, default_order = torch.sort(code, stable=True)
    order = default_order.to(torch.uint8) if order is None else order.detach().cpu().clone()
    thresholds = (ranked[:-1] + ranked[1:]) * 0.5 if thresholds is None else thresholds.detach().cpu().clone()
    if not bool(torch.isfinite(code).all()) or not bool((ranked[1:] > ranked[:-1]).all()):
        raise ValueError("register_format: code must hold finite values, all different")
    if order.dtype != torch.uint8 or sorted(order.tolist()) != list(range(code.numel())):
        raise ValueError(f"register_format: order must be a uint8 permutation of 0...{code.numel() - 1}")
    if thresholds.dtype != torch.float32 or thresholds.shape != (code.numel() - 1,):
        raise ValueError(f"register_format: thresholds must be fp32 [{code.numel() - 1}], got {list(thresholds.shape)}")
    if not bool((thresholds[1:] >= thresholds[:-1]).all()):
        raise ValueError("register_format: thresholds must ascend")
    kind: Kind = "blockwise" if code.numel() == 256 else "kbit"
    if kind == "blockwise" and order.tolist() != list(range(256)):
        raise ValueError("register_format: the 256 values of an 8-bit code must ascend")
    if kind == "blockwise" and search:
        raise ValueError("register_format: the scale search is for k-bit formats")
    bits = code.numel().bit_length() - 1
    return _add(Format(name, bits, kind, Tables(code, thresholds, order), search))


def _add(format: Format) -> Format:
    _FORMATS[format.name] = format
    return format


def _builtin(name: str, make: Callable[[], codebooks.Codebook], *, search: bool = False) -> None:
    with torch.device("cpu"):  # whatever default device the importing program has set
        tables = Tables(*make())
    bits = tables.code.numel().bit_length() - 1
    _add(Format(name, bits, "blockwise" if bits == 8 else "kbit", tables, search))


def _register_builtins() -> None:
    for name, make in _BUILTINS.items():
        _builtin(name, make, search=name.startswith("lloyd"))
    empty = torch.empty(0, device="cpu")
    _add(Format("int8", 8, "int8", Tables(empty, empty.clone(), empty.to(torch.uint8))))


_BUILTINS: dict[str, Callable[[], codebooks.Codebook]] = {
    "nf4": codebooks.nf4,
    "fp4": codebooks.fp4,
    "int4": lambda: codebooks.integer(4),
    "nf3": lambda: codebooks.normal_float(3),
    "int3": lambda: codebooks.integer(3),
    "lloyd3": lambda: codebooks.lloyd(3),
    "nf2": lambda: codebooks.normal_float(2),
    "int2": lambda: codebooks.integer(2),
    "lloyd2": lambda: codebooks.lloyd(2),
    "dynamic8": codebooks.dynamic,
}
_register_builtins()
