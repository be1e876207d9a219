"""``torch.ops.polybit.*``: read the op table, define the schemas, and register one implementation for every device.

The implementation allocates the outputs with the spec's ``alloc`` (which is also the fake kernel), then runs the chosen
backend's kernel or, where there is none, the spec's ``reference``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polybit import spec
from polybit.backends import selection
from polybit.backends.base import Unsupported

TABLE = Path(__file__).parent / "include" / "ops.def"

_SCHEMA_TYPES = {
    "IN": "Tensor {}",
    "OPT": "Tensor? {}",
    "MUT": "Tensor({alias}!) {}",
    "INS": "Tensor[] {}",
    "MUTS": "Tensor({alias}!)[] {}",
    "INT": "SymInt {}",
    "FLOAT": "float {}",
    "DTYPE": "ScalarType {}",
    "SHAPE": "SymInt[] {}",
}


@dataclass(frozen=True)
class OpRow:
    """One line of the op table."""

    name: str
    arguments: tuple[tuple[str, str], ...]

    @property
    def inputs(self) -> tuple[tuple[str, str], ...]:
        """(kind, name) of the arguments of the torch schema: all but the outputs."""
        return tuple(argument for argument in self.arguments if argument[0] != "OUT")

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs."""
        return tuple(name for kind, name in self.arguments if kind == "OUT")

    @property
    def schema(self) -> str:
        """The torch schema."""
        aliases = iter("abcdefgh")
        parts = [
            _SCHEMA_TYPES[kind].format(name, alias=next(aliases) if kind in ("MUT", "MUTS") else "")
            for kind, name in self.inputs
        ]
        count = len(self.outputs)
        result = "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"
        return f"{self.name}({', '.join(parts)}) -> {result}"


def parse_table(text: str) -> list[OpRow]:
    """The rows of an op table (``core/ops.def``)."""
    rows = re.findall(r"^PB_OP\((\w+), (.*)\)$", text, flags=re.MULTILINE)
    return [OpRow(name, tuple(re.findall(r"PB_(\w+)\((\w+)\)", arguments))) for name, arguments in rows]


ROWS = {row.name: row for row in parse_table(TABLE.read_text(encoding="utf-8"))}

LIB = torch.library.Library("polybit", "DEF")  # type: ignore[no-untyped-call]


def _result(outs: tuple[torch.Tensor, ...]) -> Any:
    if not outs:
        return None
    return outs[0] if len(outs) == 1 else outs


def _stream(device: torch.device) -> int:
    """The raw handle of torch's current stream; 0 where the device has none."""
    if device.type == "cuda":
        return int(torch.cuda.current_stream(device).cuda_stream)
    if device.type == "xpu":
        return int(torch.xpu.current_stream(device).sycl_queue)
    return 0


def _implementation(row: OpRow, op: spec.Op) -> Callable[..., Any]:
    name, alloc, reference = row.name, op.alloc, op.reference
    first = next(i for i, (kind, _) in enumerate(row.inputs) if kind in ("IN", "MUT", "INS", "MUTS"))
    of_list = row.inputs[first][0] in ("INS", "MUTS")

    def run(*args: Any) -> Any:
        tensor = args[first]
        if of_list:
            if not tensor:
                return _result(alloc(*args))
            tensor = tensor[0]
        outs = alloc(*args)
        on_cpu = tensor.is_cpu  # device.type costs six times as much
        current = selection.current()
        route = current.route(name, "cpu" if on_cpu else tensor.device.type)
        reason = route.reason
        if route.kernel is not None:
            try:
                route.kernel(0 if on_cpu else _stream(tensor.device), args, outs)
            except Unsupported as problem:
                reason = str(problem)
            else:
                selection.record(route.owner)
                return _result(outs)
        current.report_fallback(name, route.owner, reason)
        _check_devices(name, args)
        selection.record("reference")
        return _result(reference(*args))

    return run


def _check_devices(op: str, args: tuple[Any, ...]) -> None:
    """The binder's check, for the paths that do not pass through it."""
    lists = [arg if isinstance(arg, (list, tuple)) else [arg] for arg in args]
    devices = {str(item.device): None for items in lists for item in items if isinstance(item, torch.Tensor)}
    if len(devices) > 1:
        raise ValueError(f"{op}: all tensors must be on one device, got {', '.join(devices)}")


def _fake(op: spec.Op) -> Callable[..., Any]:
    def fake(*args: Any) -> Any:
        _check_devices(op.name, args)
        return _result(op.alloc(*args))

    return fake


def _register() -> None:
    if set(ROWS) != set(spec.OPS):
        raise RuntimeError(f"the op table and the spec disagree about {sorted(set(ROWS) ^ set(spec.OPS))}")
    for name, row in ROWS.items():
        op = spec.OPS[name]
        LIB.define(row.schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        LIB.impl(name, _implementation(row, op), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"polybit::{name}", _fake(op), lib=LIB)


_register()
