"""What the tests of the optimizers share: the classes, parameters, and the spec in place of a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from polybit import optim
from polybit.spec.optim import OPS

# Every rule by the name of its class, with options that switch on all of its terms.
RULES: dict[str, dict[str, Any]] = {
    "Adam": {"weight_decay": 0.1},
    "AdamW": {"weight_decay": 0.1},
    "AdEMAMix": {"weight_decay": 0.1, "t_alpha": 3, "t_beta3": 3},
    "Lion": {"weight_decay": 0.1},
    "SGD": {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    "RMSprop": {"momentum": 0.9, "centered": True, "weight_decay": 0.1},
    "Adagrad": {"lr_decay": 0.1, "initial_accumulator_value": 0.1, "weight_decay": 0.1},
    "LAMB": {"weight_decay": 0.1},
    "LARS": {"weight_decay": 0.1},
}
FORMS = ("{}", "{}32bit", "{}8bit", "Paged{}", "Paged{}32bit", "Paged{}8bit")
# (class, its rule)
CLASSES = [(form.format(rule), rule) for rule in RULES for form in FORMS]


def make(name: str, params: Iterable[Any], **options: Any) -> optim.Optimizer:
    """The optimizer of that name; SGD with momentum, so that it has a state."""
    if "SGD" in name:
        options = {"momentum": 0.9, **options}
    optimizer = getattr(optim, name)(params, **options)
    assert isinstance(optimizer, optim.Optimizer)
    return optimizer


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """Standard normal, the same for every call with that seed."""
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def set_grad(param: nn.Parameter, seed: int, scale: float | Tensor = 0.1, dtype: torch.dtype | None = None) -> None:
    """A normal gradient of that scale; `dtype` may be another than the parameter's."""
    generator = torch.Generator().manual_seed(1000 + seed)
    assign_grad(param, (torch.randn(param.shape, generator=generator) * scale).to(dtype or param.dtype))


def assign_grad(param: nn.Parameter, grad: Tensor) -> None:
    """param.grad = grad, whatever its dtype: torch compares the two dtypes only when it is assigned."""
    data = param.data
    param.data = data.to(grad.dtype)
    param.grad = grad
    param.data = data


def train(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps first...last-1, each with gradients that only the step and the parameter's place decide."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(first, last):
        for place, param in enumerate(params):
            set_grad(param, 100 * step + place)
        optimizer.step()


def tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all parameters and all tensors of their states, in a fixed order."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    found = []
    for param in params:
        state = optimizer.state[param]
        found += [param.detach(), *(state[key] for key in sorted(state) if torch.is_tensor(state[key]))]
    return [x.clone() for x in found]


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    """Equal to the bit, NaN included."""
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)), f"tensor {i} differs"


class Calls(TorchDispatchMode):
    """Counts the calls of the optimizers' ops by name; `by_spec`: the spec runs them instead of a backend."""

    SPEC: ClassVar[dict[str, Callable[..., Any]]] = {f"polybit::{op.name}": op.reference for op in OPS}

    def __init__(self, *, by_spec: bool = False) -> None:
        super().__init__()
        self.by_spec, self.names = by_spec, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name not in self.SPEC:
            return func(*args, **(kwargs or {}))
        self.names.append(name.removeprefix("polybit::"))
        if not self.by_spec:
            return func(*args, **(kwargs or {}))
        self.SPEC[name](*args)
        return None
