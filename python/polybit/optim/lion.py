"""Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from polybit.optim.base import Optimizer
from polybit.spec.optim import Hyper


class Lion(Optimizer):
    """p = p (1 - lr weight_decay) - lr sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g.

    Further keyword arguments: see Optimizer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, **options)

    def rule(self, group: dict[str, Any]) -> str:
        return "lion"

    def hyper(self, group: dict[str, Any], step: int) -> Hyper:
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        keep = 1 - lr * group["weight_decay"]
        return Hyper(lr=lr, keep=keep, beta1=beta1, rest1=1 - beta1, beta2=beta2, rest2=1 - beta2)


class Lion32bit(Lion):
    """Lion with 32-bit states."""


class Lion8bit(Lion):
    """Lion with 8-bit states."""

    _bits = 8


class PagedLion(Lion):
    """Lion with paged states."""

    _paged = True


class PagedLion32bit(PagedLion):
    """Lion with paged 32-bit states."""


class PagedLion8bit(PagedLion):
    """Lion with paged 8-bit states."""

    _bits = 8
