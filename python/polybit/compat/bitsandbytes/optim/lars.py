"""LARS."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from polybit import optim as native
from polybit.compat.bitsandbytes.optim.optimizer import Optimizer1State


def _refuse(owner: str, momentum: float, dampening: float, nesterov: bool) -> None:
    if momentum == 0:
        raise NotImplementedError(f"{owner}: momentum must not be 0")
    if dampening or nesterov:
        raise ValueError(f"{owner}: dampening and nesterov are not supported")


class LARS(Optimizer1State):
    """LARS of the paper; see polybit.optim.LARS (bitsandbytes only clips the update).

    Raises NotImplementedError without momentum or for another max_unorm, ValueError for dampening or nesterov.
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
        max_unorm: float = 0.02,
    ) -> None:
        _refuse(type(self).__name__, momentum, dampening, nesterov)
        super().__init__(
            "lars", params, lr, (momentum, dampening), 0.0, weight_decay, optim_bits, args, min_8bit_size, max_unorm
        )


class LARS8bit(LARS):
    """LARS with 8-bit states."""

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
        max_unorm: float = 0.02,
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, 32, args, min_8bit_size, max_unorm)


class LARS32bit(LARS):
    """LARS with 32-bit states."""

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
        max_unorm: float = 0.02,
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, 32, args, min_8bit_size, max_unorm)


class PytorchLARS(native.LARS32bit):
    """LARS of the paper, as LARS here, without its options.

    Raises NotImplementedError without momentum or for another max_unorm, ValueError for dampening or nesterov.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
    ) -> None:
        _refuse(type(self).__name__, momentum, dampening, nesterov)
        if max_unorm != 0.02:
            raise NotImplementedError(f"{type(self).__name__}: updates are not clipped; max_unorm must be 0.02")
        super().__init__(params, lr, momentum, weight_decay)
