"""intel-extension-for-pytorch, for those who still have it: whether it fits torch. Nothing imports it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

NAME = "intel-extension-for-pytorch"


@dataclass(frozen=True)
class Ipex:
    """What is installed, by its metadata."""

    version: str
    matches_torch: bool
    note: str


def ipex() -> Ipex | None:
    """The installed extension, or None. It refuses to be imported beside a torch of another minor version."""
    try:
        found = version(NAME)
    except PackageNotFoundError:
        return None
    matches = _minor(found) == _minor(torch.__version__)
    end = "it has reached its end of life, the way to Intel's GPUs is torch.xpu"
    return Ipex(found, matches, f"{'matches' if matches else 'does not match'} torch {torch.__version__}; {end}")


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]
