"""LARS (You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", 2017)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from polybit.optim.base import Optimizer
from polybit.spec.optim import Hyper


class LARS(Optimizer):
    """m = momentum m + lr ratio (g + weight_decay p); p -= m, with ratio = trust |p| / (|g| + weight_decay |p|).

    Norms are those of a whole parameter (algorithm 1 of the paper, `trust_coefficient` its eta); where one is 0 the
    ratio is 1. bitsandbytes' LARS only clips the update: another rule. Further keyword arguments: see Optimizer.
    """

    _betas = ("momentum",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient,
        }  # fmt: skip
        super().__init__(params, defaults, **options)

    def rule(self, group: dict[str, Any]) -> str:
        return "lars"

    def hyper(self, group: dict[str, Any], step: int) -> Hyper:
        return Hyper(
            lr=float(group["lr"]),
            decay=group["weight_decay"],
            beta1=group["momentum"],
            trust=group["trust_coefficient"],
        )


class LARS32bit(LARS):
    """LARS with 32-bit states."""


class LARS8bit(LARS):
    """LARS with 8-bit states."""

    _bits = 8


class PagedLARS(LARS):
    """LARS with paged states."""

    _paged = True


class PagedLARS32bit(PagedLARS):
    """LARS with paged 32-bit states."""


class PagedLARS8bit(PagedLARS):
    """LARS with paged 8-bit states."""

    _bits = 8
