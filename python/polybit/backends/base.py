"""What a backend is, seen from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from polybit import _C

Kernel = Callable[[int, tuple[Any, ...], tuple[Any, ...]], None]
"""``kernel(stream, args, outs)``: args in schema order, outs as allocated. May raise Unsupported before any work."""

Unsupported: type[RuntimeError] = _C.Unsupported


class BackendError(RuntimeError):
    """No usable backend answers to a name, or an op may not fall back to the reference."""


@runtime_checkable
class Backend(Protocol):
    """One implementation of (part of) the op table. The C ABI is its main form; Metal is written in Python."""

    @property
    def name(self) -> str:
        """``family`` or ``family:variant``."""

    @property
    def device_type(self) -> str:
        """The torch device type whose tensors it takes."""

    @property
    def reason(self) -> str:
        """Why it cannot be used on this machine; empty when it can."""

    @property
    def origin(self) -> str:
        """The library or entry point that it came from."""

    @property
    def ops(self) -> Mapping[str, Kernel]:
        """Its kernels by op. An op that is missing is not implemented."""


@dataclass(frozen=True)
class BackendInfo:
    """One line of ``polybit info``. A source that could not be loaded has the name of its file or entry point."""

    name: str
    device_type: str
    usable: bool
    reason: str
    origin: str


@dataclass(frozen=True)
class Resolution:
    """Who runs an op: ``native`` in the chosen backend, ``inherited`` from a lesser variant, or the ``reference``."""

    owner: str
    kind: Literal["native", "inherited", "reference"]
    reason: str
