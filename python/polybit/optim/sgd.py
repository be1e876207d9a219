"""SGD, with momentum as torch.optim.SGD has it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from polybit.optim.base import Optimizer
from polybit.spec.optim import Hyper


class SGD(Optimizer):
    """g += weight_decay p; m = momentum m + (1 - dampening) g (m = g in the first step); p -= lr m.

    nesterov: p -= lr (g + momentum m). momentum 0: p -= lr g, and there is no state. Further keyword arguments: see
    Optimizer. Raises ValueError for nesterov without momentum or with dampening.
    """

    _betas = ("momentum",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
        }  # fmt: skip
        super().__init__(params, defaults, **options)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(f"{type(self).__name__}: nesterov needs a momentum and a dampening of 0")

    def rule(self, group: dict[str, Any]) -> str:
        return "momentum" if group["momentum"] else "sgd"

    def hyper(self, group: dict[str, Any], step: int) -> Hyper:
        momentum, nesterov = group["momentum"], group["nesterov"]
        return Hyper(
            lr=float(group["lr"]),
            coupled_decay=group["weight_decay"],
            beta1=momentum,
            rest1=1.0 if step == 1 else 1 - group["dampening"],
            look_grad=float(nesterov),
            look_state=momentum if nesterov else 1.0,
        )


class SGD32bit(SGD):
    """SGD with 32-bit states."""


class SGD8bit(SGD):
    """SGD with 8-bit states."""

    _bits = 8


class PagedSGD(SGD):
    """SGD with paged states."""

    _paged = True


class PagedSGD32bit(PagedSGD):
    """SGD with paged 32-bit states."""


class PagedSGD8bit(PagedSGD):
    """SGD with paged 8-bit states."""

    _bits = 8
