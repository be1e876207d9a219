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
_PRIVATE_USE = 12  # kDLExtDev: the device that a package adds to torch, and gives its name


def _empty_bytes(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, device=like.device)


def bind_torch(*, exchange_api: bool = True) -> None:
    """Tell the binder how to read tensors: DLPack's exchange API where torch has it (2.10 on), else capsules."""
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None) if exchange_api else None
    _C.set_torch(api, torch._C._to_dlpack, _empty_bytes)


bind_torch()


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
        private = torch._C._get_privateuse1_backend_name() if device == _PRIVATE_USE else None
        device_type = private or _DEVICE_TYPES.get(device)
        if device_type is None:
            raise RuntimeError(f"{path}: backend {name} is for the unknown DLPack device type {device}")
        backends.append(NativeBackend(name, device_type, "" if usable else reason, str(path), kernels))
    return backends
