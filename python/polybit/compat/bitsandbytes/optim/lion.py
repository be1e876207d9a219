"""Lion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from polybit.compat.bitsandbytes.optim.optimizer import Optimizer1State


class Lion(Optimizer1State):
    """Lion; see polybit.optim.Lion."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        super().__init__(
            "lion", params, lr, betas, 0.0, weight_decay, optim_bits, args, min_8bit_size, is_paged=is_paged
        )


class Lion8bit(Lion):
    """Lion with 8-bit states."""

    _width = 8

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, 32, args, min_8bit_size, is_paged)


class Lion32bit(Lion):
    """Lion with 32-bit states."""

    _width = 32

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, 32, args, min_8bit_size, is_paged)


class PagedLion(Lion):
    """Lion with paged states."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, optim_bits, args, min_8bit_size, True)


class PagedLion8bit(Lion):
    """Lion with paged 8-bit states."""

    _width = 8

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, 32, args, min_8bit_size, True)


class PagedLion32bit(Lion):
    """Lion with paged 32-bit states."""

    _width = 32

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 0,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, 32, args, min_8bit_size, True)
