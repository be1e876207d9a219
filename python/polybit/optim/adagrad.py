"""Adagrad (Duchi, Hazan and Singer, 2011)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from polybit.optim.base import Optimizer
from polybit.optim.state import State, bits_of
from polybit.spec.optim import Hyper


class Adagrad(Optimizer):
    """v += g^2; p -= lr / (1 + (step - 1) lr_decay) g / (sqrt(v) + eps), as torch.optim.Adagrad has it.

    v starts as initial_accumulator_value. Weight decay is added to the gradient. Further keyword arguments: see
    Optimizer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value, "eps": eps,
        }  # fmt: skip
        super().__init__(params, defaults, **options)

    def rule(self, group: dict[str, Any]) -> str:
        return "adagrad"

    def hyper(self, group: dict[str, Any], step: int) -> Hyper:
        lr = float(group["lr"]) / (1 + (step - 1) * group["lr_decay"])
        return Hyper(lr=lr, coupled_decay=group["weight_decay"], eps=group["eps"])

    def _fresh(self, param: Tensor, group: dict[str, Any], settings: dict[str, Any], bits: int | None = None) -> State:
        state, start = super()._fresh(param, group, settings, bits), group["initial_accumulator_value"]
        if start and bits_of(state) == 8:
            state["state1"].fill_(255)  # the code of 1
            state["absmax1"].fill_(start)
        elif start:
            state["state1"].fill_(start)
        return state


class Adagrad32bit(Adagrad):
    """Adagrad with 32-bit states."""


class Adagrad8bit(Adagrad):
    """Adagrad with 8-bit states."""

    _bits = 8


class PagedAdagrad(Adagrad):
    """Adagrad with paged states."""

    _paged = True


class PagedAdagrad32bit(PagedAdagrad):
    """Adagrad with paged 32-bit states."""


class PagedAdagrad8bit(PagedAdagrad):
    """Adagrad with paged 8-bit states."""

    _bits = 8
