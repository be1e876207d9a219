"""Settings of single parameters, whatever optimizer trains them: an embedding in 32 bits, say."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

SETTINGS = ("optim_bits", "min_8bit_size", "is_paged", "stochastic_rounding", "skip_nonfinite")

_overrides: MutableMapping[Tensor, dict[str, Any]] = WeakTensorKeyDictionary()


def override(target: Tensor | nn.Module, **settings: Any) -> None:
    """Let every optimizer treat a parameter, or all parameters of a module, by these settings instead of its own.

    settings: any of optim_bits, min_8bit_size, is_paged, stochastic_rounding, skip_nonfinite. They hold for the
    parameter object, as long as it lives, and take effect where its state does not exist yet; a later call adds to an
    earlier one. Raises TypeError for an unknown setting or target.
    """
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise TypeError(f"override: unknown setting {unknown[0]!r}; known: {', '.join(SETTINGS)}")
    if not isinstance(target, (Tensor, nn.Module)):
        raise TypeError(f"override: target must be a parameter or a module, got {type(target).__name__}")
    for param in target.parameters() if isinstance(target, nn.Module) else (target,):
        _overrides[param] = {**_overrides.get(param, {}), **settings}


def settings_of(param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
    """The settings that hold for a parameter of a group."""
    own = _overrides.get(param, {})
    return {name: own.get(name, group[name]) for name in SETTINGS}
