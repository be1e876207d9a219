"""Adagrad."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from polybit.compat.bitsandbytes.optim.optimizer import Optimizer1State


class Adagrad(Optimizer1State):
    """Adagrad. Raises ValueError for lr_decay or an initial_accumulator_value."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        if lr_decay or initial_accumulator_value:
            raise ValueError(f"{type(self).__name__}: lr_decay and initial_accumulator_value must be 0")
        super().__init__("adagrad", params, lr, (0.0, 0.0), eps, weight_decay, optim_bits, args, min_8bit_size)


class Adagrad8bit(Adagrad):
    """Adagrad with 8-bit states."""

    _width = 8
    _default_bits = 8

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 8,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        super().__init__(
            params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, optim_bits, args, min_8bit_size
        )


class Adagrad32bit(Adagrad):
    """Adagrad with 32-bit states."""

    _width = 32
