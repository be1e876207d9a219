"""Settings of single parameters, whatever optimizer trains them: an embedding in 32 bits, say."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

SETTINGS = ("optim_bits", "min_8bit_size", "is_paged", "page_folder", "stochastic_rounding", "skip_nonfinite")

_overrides: MutableMapping[Tensor, dict[str, Any]] = WeakTensorKeyDictionary()


def override(target: Tensor | nn.Module, **settings: Any) -> None:
    """Let every optimizer treat a parameter, or all parameters of a module, by these settings instead of its own.

    settings: any of optim_bits, min_8bit_size, is_paged, page_folder, stochastic_rounding, skip_nonfinite. They hold
    for the parameter object, as long as it lives (a copy has none), and those of the state take effect where there is
    none yet; a later call adds to an earlier one. Raises TypeError for an unknown setting or target, ValueError for a
    value that a setting does not have.
    """
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise TypeError(f"override: unknown setting {unknown[0]!r}; known: {', '.join(SETTINGS)}")
    if not isinstance(target, (Tensor, nn.Module)):
        raise TypeError(f"override: target must be a parameter or a module, got {type(target).__name__}")
    check_settings("override", settings)
    for param in target.parameters() if isinstance(target, nn.Module) else (target,):
        _overrides[param] = {**_overrides.get(param, {}), **settings}


def check_settings(owner: str, settings: dict[str, Any]) -> None:
    """Raise ValueError for a value that a setting does not have; names that are no settings are passed over."""
    if settings.get("optim_bits", 32) not in (8, 32):
        raise ValueError(f"{owner}: optim_bits must be 8 or 32, got {settings['optim_bits']!r}")
    size = settings.get("min_8bit_size", 0)
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"{owner}: min_8bit_size must be an integer of 0 or more, got {size!r}")
    folder = settings.get("page_folder")
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"{owner}: page_folder must be a folder, got {folder}")


def settings_of(param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """The settings that hold for a parameter of a group."""
    own = _overrides.get(param, {}) if _overrides else {}
    return {name: own.get(name, group[name]) for name in SETTINGS}
