"""Devices that users name: there, or an error that says what is."""

from __future__ import annotations

import torch


def usable_device(device: torch.device | str) -> torch.device:
    """`device`, after a look whether torch can make tensors there. Raises ValueError, naming what is there, if not."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ImportError, TypeError) as problem:  # torch has one for each kind of device
        reason = next(iter(str(problem).splitlines()), "")
        there = ", ".join(["cpu", *_accelerators()])
        raise ValueError(f"device {str(device)!r} cannot be used here (torch: {reason}); torch has {there}") from None
    return found


def _accelerators() -> list[str]:
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return [] if kind is None else [f"{kind.type}:{index}" for index in range(torch.accelerator.device_count())]
