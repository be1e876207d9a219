"""LAMB."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from polybit.compat.bitsandbytes.optim.optimizer import Optimizer2State


class LAMB(Optimizer2State):
    """LAMB of the paper; see polybit.optim.LAMB (bitsandbytes only clips the update).

    Raises ValueError for amsgrad or adam_w_mode=False, NotImplementedError for another max_unorm.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
    ) -> None:
        if amsgrad:
            raise ValueError(f"{type(self).__name__}: amsgrad is not supported")
        if not adam_w_mode:
            raise ValueError(f"{type(self).__name__}: adam_w_mode=False is not supported")
        super().__init__(
            "lamb", params, lr, betas, eps, weight_decay, optim_bits, args, min_8bit_size, max_unorm=max_unorm
        )
        for group in self.param_groups:
            group["bias_correction"] = bias_correction


class LAMB8bit(LAMB):
    """LAMB with 8-bit states. Raises ValueError for another max_unorm."""

    _width = 8

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
    ) -> None:
        if max_unorm != 1.0:
            raise ValueError(f"{type(self).__name__}: max_unorm must keep its default 1.0, got {max_unorm}")
        super().__init__(
            params,
            lr,
            bias_correction,
            betas,
            eps,
            weight_decay,
            amsgrad,
            adam_w_mode,
            32,
            args,
            min_8bit_size,
            max_unorm,
        )


class LAMB32bit(LAMB):
    """LAMB with 32-bit states."""

    _width = 32

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
    ) -> None:
        super().__init__(
            params,
            lr,
            bias_correction,
            betas,
            eps,
            weight_decay,
            amsgrad,
            adam_w_mode,
            32,
            args,
            min_8bit_size,
            max_unorm,
        )
