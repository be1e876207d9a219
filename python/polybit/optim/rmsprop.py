"""RMSprop (Hinton, 2012; centered: Graves, "Generating Sequences With Recurrent Neural Networks", 2013)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from polybit.optim.base import Optimizer
from polybit.spec.optim import Hyper


class RMSprop(Optimizer):
    """v = alpha v + (1 - alpha) g^2; p -= lr g / (sqrt(v) + eps), as torch.optim.RMSprop has it.

    centered: v less the square of the mean gradient. momentum: the step is the momentum of g / (sqrt(v) + eps). Weight
    decay is added to the gradient. Further keyword arguments: see Optimizer.
    """

    _betas = ("alpha",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum,
            "centered": centered,
        }  # fmt: skip
        super().__init__(params, defaults, **options)

    def rule(self, group: dict[str, Any]) -> str:
        return "rmsprop" + "_centered" * bool(group["centered"]) + "_momentum" * bool(group["momentum"])

    def hyper(self, group: dict[str, Any], step: int) -> Hyper:
        return Hyper(
            lr=float(group["lr"]),
            coupled_decay=group["weight_decay"],
            beta1=group["momentum"],
            beta2=group["alpha"],
            rest2=1 - group["alpha"],
            eps=group["eps"],
        )


class RMSprop32bit(RMSprop):
    """RMSprop with 32-bit states."""


class RMSprop8bit(RMSprop):
    """RMSprop with 8-bit states."""

    _bits = 8


class PagedRMSprop(RMSprop):
    """RMSprop with paged states."""

    _paged = True


class PagedRMSprop32bit(PagedRMSprop):
    """RMSprop with paged 32-bit states."""


class PagedRMSprop8bit(PagedRMSprop):
    """RMSprop with paged 8-bit states."""

    _bits = 8
