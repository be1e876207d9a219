"""Paged states: memory that the system may write to a file and read again, so that states may outgrow the memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

# A smaller state is not worth a mapping of its own.
PAGED_NUMEL = 100_000


def paged_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device, folder: str | Path | None) -> Tensor:
    """Zeros in a mapping of a file in `folder` (default: the system's folder for temporary files), on the CPU.

    The file has no name any more when this returns: its space is free as soon as the tensor, or the process, is gone,
    however it goes. Raises NotImplementedError for another device, OSError if there is no room or no such folder.
    """
    if device.type != "cpu":
        raise NotImplementedError(f"paged optimizer states live on the CPU so far, the parameter is on {device}")
    numel = 1
    for size in shape:
        numel *= size
    if numel < PAGED_NUMEL:
        return torch.zeros(shape, dtype=dtype)
    handle, name = tempfile.mkstemp(prefix="polybit-state-", dir=folder)
    try:
        size = numel * dtype.itemsize
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)  # no room: an error now, rather than a fault in the middle of a step
        else:
            os.truncate(handle, size)
        return torch.from_file(name, shared=True, size=numel, dtype=dtype).view(list(shape))
    finally:
        os.close(handle)
        os.unlink(name)
