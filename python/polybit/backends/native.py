"""Backends behind the C ABI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from polybit import _C
from polybit.backends.base import Kernel

# DLDeviceType of core/dlpack.h -> torch device type.
_DEVICE_TYPES = {1: "cpu", 2: "cuda", 8: "mps", 10: "cuda", 14: "xpu"}


def _empty_bytes(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, device=like.device)


_C.set_torch(
    getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
    torch._C._to_dlpack,
    _empty_bytes,
)


@dataclass(frozen=True)
class NativeBackend:
    """A backend of a loaded library; see :class:`polybit.backends.base.Backend`."""

    name: str
    device_type: str
    reason: str
    origin: str
    ops: Mapping[str, Kernel]


def load_library(path: str | Path) -> list[NativeBackend]:
    """Load a library that exports ``polybit_backend``; its backends best first.

    Raises:
        RuntimeError: it cannot be loaded, was built for another op table, or its entry point failed.
    """
    backends = []
    for name, device, usable, reason, kernels in _C.load(str(path)):
        device_type = _DEVICE_TYPES.get(device)
        if device_type is None:
            raise RuntimeError(f"{path}: backend {name} is for the unknown DLPack device type {device}")
        backends.append(NativeBackend(name, device_type, "" if usable else reason, str(path), kernels))
    return backends
