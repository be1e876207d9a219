"""SGD."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from polybit.compat.bitsandbytes.optim.optimizer import Optimizer1State


class SGD(Optimizer1State):
    """SGD with momentum; dampening and nesterov count, as in polybit.optim.SGD.

    Raises NotImplementedError without momentum, ValueError for nesterov with dampening.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        if momentum == 0:
            raise NotImplementedError(f"{type(self).__name__}: momentum must not be 0")
        if nesterov and dampening:
            raise ValueError(f"{type(self).__name__}: nesterov needs a dampening of 0")
        super().__init__(
            "momentum", params, lr, (momentum, dampening), 0.0, weight_decay, optim_bits, args, min_8bit_size
        )
        for group in self.param_groups:
            group["nesterov"] = nesterov


class SGD8bit(SGD):
    """SGD with 8-bit states."""

    _width = 8

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, 32, args, min_8bit_size)


class SGD32bit(SGD):
    """SGD with 32-bit states."""

    _width = 32

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, 32, args, min_8bit_size)
