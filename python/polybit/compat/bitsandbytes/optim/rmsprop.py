"""RMSprop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from polybit.compat.bitsandbytes.optim.optimizer import Optimizer1State


class RMSprop(Optimizer1State):
    """RMSprop; momentum counts, as in polybit.optim.RMSprop. Raises NotImplementedError for alpha 0 and centered."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        if alpha == 0 or centered:
            raise NotImplementedError(f"{type(self).__name__}: alpha must not be 0, centered must be False")
        super().__init__("rmsprop", params, lr, (alpha, momentum), eps, weight_decay, optim_bits, args, min_8bit_size)


class RMSprop8bit(RMSprop):
    """RMSprop with 8-bit states."""

    _width = 8

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        super().__init__(params, lr, alpha, eps, weight_decay, momentum, centered, 32, args, min_8bit_size)


class RMSprop32bit(RMSprop):
    """RMSprop with 32-bit states."""

    _width = 32

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        super().__init__(params, lr, alpha, eps, weight_decay, momentum, centered, 32, args, min_8bit_size)
