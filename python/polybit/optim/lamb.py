"""LAMB (You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", 2020)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from polybit.optim.adam import adam_numbers
from polybit.optim.base import Optimizer
from polybit.spec.optim import Hyper


class LAMB(Optimizer):
    """r = m' / (sqrt(v') + eps) + weight_decay p; p -= lr |p| / |r| r, layer by layer (algorithm 2 of the paper).

    m and v are Adam's moments, ' their bias correction (bias_correction=False: none); where a norm is 0 the ratio is 1.
    bitsandbytes' LAMB only clips |r|: another rule. Further keyword arguments: see Optimizer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": bias_correction,
        }  # fmt: skip
        super().__init__(params, defaults, **options)

    def rule(self, group: dict[str, Any]) -> str:
        return "lamb"

    def hyper(self, group: dict[str, Any], step: int) -> Hyper:
        h = Hyper(lr=float(group["lr"]), decay=group["weight_decay"], **adam_numbers(group, step))
        return h if group["bias_correction"] else h._replace(correction1=1.0, correction2=1.0)


class LAMB32bit(LAMB):
    """LAMB with 32-bit states."""


class LAMB8bit(LAMB):
    """LAMB with 8-bit states."""

    _bits = 8


class PagedLAMB(LAMB):
    """LAMB with paged states."""

    _paged = True


class PagedLAMB32bit(PagedLAMB):
    """LAMB with paged 32-bit states."""


class PagedLAMB8bit(PagedLAMB):
    """LAMB with paged 8-bit states."""

    _bits = 8
