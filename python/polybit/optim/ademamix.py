"""AdEMAMix (Pagliardini, Ablin and Grangier, "The AdEMAMix Optimizer: Better, Faster, Older", 2024)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from polybit.optim.adam import adam_numbers
from polybit.optim.base import Optimizer
from polybit.spec.optim import Hyper


class AdEMAMix(Optimizer):
    """Adam with a second, slow first moment: p -= lr ((m1' + alpha m2) / (sqrt(v') + eps) + weight_decay p).

    m1 and m2 are means of the gradient with betas[0] and betas[2], v of its square with betas[1]; m1' and v' are bias
    corrected, m2 is not. `t_alpha`, `t_beta3`: over so many steps alpha rises from 0 and betas[2] from betas[0], as in
    section 3 of the paper; None: at once. Further keyword arguments: see Optimizer.
    """

    _betas_wanted = 3

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3, "eps": eps,
            "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(params, defaults, **options)

    def rule(self, group: dict[str, Any]) -> str:
        return "ademamix"

    def hyper(self, group: dict[str, Any], step: int) -> Hyper:
        lr, alpha, (beta1, _, beta3) = float(group["lr"]), group["alpha"], group["betas"]
        if group["t_alpha"]:
            alpha = min(step * alpha / group["t_alpha"], alpha)
        if group["t_beta3"]:
            beta3 = slow_beta(beta1, beta3, step / group["t_beta3"])
        keep = 1 - lr * group["weight_decay"]
        return Hyper(lr=lr, keep=keep, alpha=alpha, rest3=1 - beta3, **adam_numbers(group, step))


def slow_beta(start: float, end: float, part: float) -> float:
    """The paper's schedule of beta3: as `part` goes from 0 to 1, its half-life grows from `start`'s to `end`'s."""
    if part >= 1 or start <= 0:
        return end
    return min(math.exp(math.log(start) * math.log(end) / ((1 - part) * math.log(end) + part * math.log(start))), end)


class AdEMAMix32bit(AdEMAMix):
    """AdEMAMix with 32-bit states."""


class AdEMAMix8bit(AdEMAMix):
    """AdEMAMix with 8-bit states."""

    _bits = 8


class PagedAdEMAMix(AdEMAMix):
    """AdEMAMix with paged states."""

    _paged = True


class PagedAdEMAMix32bit(PagedAdEMAMix):
    """AdEMAMix with paged 32-bit states."""


class PagedAdEMAMix8bit(PagedAdEMAMix):
    """AdEMAMix with paged 8-bit states."""

    _bits = 8
