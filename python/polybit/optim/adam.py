"""Adam (Kingma and Ba, 2015) and AdamW (Loshchilov and Hutter, 2019)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from polybit.optim.base import Optimizer
from polybit.spec.optim import Hyper


def adam_numbers(group: dict[str, Any], step: int) -> dict[str, float]:
    """The numbers of moments and their corrections, of Adam and its relatives."""
    beta1, beta2 = group["betas"][:2]
    return {
        "rest1": 1 - beta1,
        "beta2": beta2,
        "rest2": 1 - beta2,
        "correction1": 1 / (1 - beta1**step),
        "correction2": (1 - beta2**step) ** -0.5,
        "eps": group["eps"],
    }


class Adam(Optimizer):
    """m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, p -= lr m' / (sqrt(v') + eps), ' being the bias correction.

    Weight decay is added to the gradient, as in torch.optim.Adam (bitsandbytes' Adam decays like AdamW). Further
    keyword arguments: see Optimizer. Raises ValueError for amsgrad, which is not supported.
    """

    _decoupled = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, defaults, **options)

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        if group["amsgrad"]:
            raise ValueError(f"{type(self).__name__}: amsgrad is not supported")

    def rule(self, group: dict[str, Any]) -> str:
        return "adam"

    def hyper(self, group: dict[str, Any], step: int) -> Hyper:
        lr, decay = float(group["lr"]), group["weight_decay"]
        numbers = adam_numbers(group, step)
        h = Hyper(lr=lr * numbers["correction1"], **numbers)
        return h._replace(keep=1 - lr * decay) if self._decoupled else h._replace(coupled_decay=decay)


class AdamW(Adam):
    """Adam with weight decay apart from the gradient: p *= 1 - lr * weight_decay before the step."""

    _decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, **options)


class Adam32bit(Adam):
    """Adam with 32-bit states."""


class Adam8bit(Adam):
    """Adam with 8-bit states."""

    _bits = 8


class PagedAdam(Adam):
    """Adam with paged states."""

    _paged = True


class PagedAdam32bit(PagedAdam):
    """Adam with paged 32-bit states."""


class PagedAdam8bit(PagedAdam):
    """Adam with paged 8-bit states."""

    _bits = 8


class AdamW32bit(AdamW):
    """AdamW with 32-bit states."""


class AdamW8bit(AdamW):
    """AdamW with 8-bit states."""

    _bits = 8


class PagedAdamW(AdamW):
    """AdamW with paged states."""

    _paged = True


class PagedAdamW32bit(PagedAdamW):
    """AdamW with paged 32-bit states."""


class PagedAdamW8bit(PagedAdamW):
    """AdamW with paged 8-bit states."""

    _bits = 8
