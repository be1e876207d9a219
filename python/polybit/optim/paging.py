"""Paged states: memory that the system may write to a file and read again, so that states may outgrow the memory.

On the CPU a state is a shared mapping of a file. The kernels walk through it once a step, in order, so the system reads
ahead and writes behind, and needs no more memory than it likes to give.

States of parameters on a GPU are in pinned host memory instead; polybit.optim.windows brings them to the device. An
Apple GPU shares the memory of the CPU, so its states are ordinary tensors.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

# A smaller state is not worth a mapping of its own.
PAGED_NUMEL = 100_000


def paged_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device, folder: str | Path | None) -> Tensor:
    """Zeros for a parameter on `device`, which may be the CPU or torch's accelerator.

    On the CPU they are a mapping of a file in `folder` (default: see default_folder). The file has no name: its space
    is free as soon as the tensor, or the process, is gone, however it goes. For an accelerator they are pinned, on the
    CPU; for an Apple GPU, on the device. Small states are on the device. Raises NotImplementedError for another device,
    OSError if there is no room or no such folder.
    """
    accelerator = torch.accelerator.current_accelerator()
    on_accelerator = accelerator is not None and accelerator.type == device.type
    if device.type != "cpu" and not on_accelerator:
        raise NotImplementedError(f"paged optimizer states are for the CPU and the accelerator, not for {device}")
    numel = prod(shape)
    if numel < PAGED_NUMEL or device.type == "mps":
        return torch.zeros(shape, dtype=dtype, device=device)
    if on_accelerator:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)
    folder = folder or default_folder()
    with tempfile.TemporaryFile(prefix="polybit-state-", dir=folder) as file:
        reserve(file, numel * dtype.itemsize, folder)
        return torch.from_file(f"/dev/fd/{file.fileno()}", shared=True, size=numel, dtype=dtype).view(list(shape))


def default_folder() -> str:
    """TMPDIR, else /var/tmp, because /tmp is often held in memory, else what the system has in its place."""
    return os.environ.get("TMPDIR") or ("/var/tmp" if os.path.isdir("/var/tmp") else tempfile.gettempdir())


def reserve(file: IO[bytes], size: int, folder: str | Path) -> None:
    """Let a new file have `size` bytes, all of them taken: no room is an OSError now, not a fault in mid-step."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    except OSError as problem:
        reason = f"no room for {size} bytes of optimizer state: {problem.strerror}"
        raise OSError(problem.errno, reason, str(folder)) from None
