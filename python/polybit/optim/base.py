"""What every optimizer shares: groups, states in 32 or 8 bits, paging, and one call of an op for many parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable would import all of torch._dynamo with us

from polybit.optim.overrides import SETTINGS, settings_of
from polybit.optim.state import (
    State,
    bits_of,
    copy_state,
    fits_8bit,
    is_permuted,
    local,
    memory_order,
    moments,
    new_state,
)  # fmt: skip
from polybit.spec.optim import NUMBERS, SKIP_NONFINITE, STOCHASTIC, Hyper

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# bitsandbytes hides the tensors of a state in a dictionary of this name when it saves.
WRAPPED = "__bnb_optimizer_quant_state__"


class Optimizer(torch.optim.Optimizer):
    """The base of all optimizers; a subclass gives the rule of a group and the numbers of a step.

    Keyword arguments that all of them take:
        optim_bits: 32 or 8, the width of the states. 8 bits: blocks of 256, dynamic maps.
        min_8bit_size: parameters with fewer elements keep 32-bit states.
        is_paged: keep large states in memory-mapped files, so that they may be larger than the memory.
        page_folder: where these files are; default: the system's folder for temporary files.
        stochastic_rounding: round new bf16 parameters up or down at random, with the right mean.
        seed: of that rounding; the same seed gives the same parameters.
        skip_nonfinite: elements whose gradient is NaN or infinite are left as they are.
        maximize: step along the gradient instead of against it.

    Parameters and gradients: fp32, fp16 or bf16, also mixed; states and arithmetic: fp32. A state dict of bitsandbytes
    loads, and ours loads there. A sharded parameter (DTensor) has a state that is sharded like it; in 8 bits if shards
    end between rows of a multiple of 256 elements, else in 32.
    """

    _bits: ClassVar[int] = 32
    _paged: ClassVar[bool] = False
    # torch.amp.GradScaler then leaves the division by its scale, and the skipping of a step, to step().
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        optim_bits: int | None = None,
        min_8bit_size: int = 4096,
        is_paged: bool | None = None,
        page_folder: str | Path | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        skip_nonfinite: bool = False,
        maximize: bool = False,
    ) -> None:
        bits = self._bits if optim_bits is None else optim_bits
        if bits not in (8, 32):
            raise ValueError(f"{type(self).__name__}: optim_bits must be 8 or 32, got {bits}")
        if not isinstance(min_8bit_size, int) or min_8bit_size < 0:
            raise ValueError(f"{type(self).__name__}: min_8bit_size must be 0 or more, got {min_8bit_size}")
        for name, value in defaults.items():
            _check_number(type(self).__name__, name, value)
        if page_folder is not None and not Path(page_folder).is_dir():
            raise ValueError(f"{type(self).__name__}: page_folder must be a folder, got {page_folder}")
        self.page_folder, self.seed = page_folder, seed
        settings = {
            "optim_bits": bits,
            "min_8bit_size": min_8bit_size,
            "is_paged": self._paged if is_paged is None else is_paged,
            "stochastic_rounding": stochastic_rounding,
            "skip_nonfinite": skip_nonfinite,
            "maximize": maximize,
        }
        super().__init__(params, {**defaults, **settings})

    def rule(self, group: dict[str, Any]) -> str:
        """The name of the update rule, a key of polybit.spec.optim.RULES, that the options of a group ask for."""
        raise NotImplementedError

    def hyper(self, group: dict[str, Any], step: int) -> Hyper:
        """The numbers of step `step` (from 1), without grad_scale."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient; returns what `closure` does, if one is given.

        Raises TypeError for a dtype that is not fp32, fp16 or bf16 and RuntimeError for a sparse gradient, before
        anything is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = self._amp_scale()
        if scale is not None:
            self._update(scale)
        return loss

    def _amp_scale(self) -> float | None:
        """What gradients are multiplied by; None if a GradScaler found infinities and the step is to be left out."""
        found = getattr(self, "found_inf", None)
        if found is not None and float(found):
            return None
        scale = getattr(self, "grad_scale", None)
        return 1.0 if scale is None else 1.0 / float(scale)

    @_disable_dynamo  # Python bookkeeping around one opaque op
    def _update(self, scale: float) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    _check_param(type(self).__name__, param)
        for group in self.param_groups:
            batches: dict[tuple[Any, ...], list[tuple[Tensor, State]]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is None:
                    continue
                settings = settings_of(param, group)
                state = self._state_of(param, group, settings)
                options = STOCHASTIC * settings["stochastic_rounding"] + SKIP_NONFINITE * settings["skip_nonfinite"]
                key = (param.dtype, param.grad.dtype, local(param).device, bits_of(state), state["step"] + 1, options)
                batches[key].append((param, state))
            rule = self.rule(group)
            for key, batch in batches.items():
                step, options = key[-2:]
                hyper = self.hyper(group, step)._replace(grad_scale=-scale if group["maximize"] else scale)
                _launch(rule, batch, hyper, options, self.seed * 0x10001 + step)
                for _, state in batch:
                    state["step"] = step

    def _state_of(self, param: Tensor, group: dict[str, Any], settings: dict[str, Any]) -> State:
        state: State = self.state[param]
        if not state:
            self.state[param] = state = self._fresh(param, group, settings)
        return state

    def _fresh(self, param: Tensor, group: dict[str, Any], settings: dict[str, Any]) -> State:
        small = param.numel() < settings["min_8bit_size"]
        bits = 8 if settings["optim_bits"] == 8 and not small and fits_8bit(param) else 32
        paged = settings["is_paged"]
        return new_state(self.rule(group), param, bits=bits, paged=paged, folder=self.page_folder)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the options and states of `state_dict`: of this class, or of bitsandbytes' class of the same name.

        Width, paging and rounding stay as this optimizer has them, and a state of the other width is converted. Raises
        ValueError if groups, entries or sizes do not fit; nothing is changed then.
        """
        saved = state_dict["param_groups"]
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError("load_state_dict: the groups have other numbers of parameters than the optimizer's")
        groups = [self._merge(theirs, ours) for theirs, ours in zip(saved, self.param_groups)]
        fresh: dict[Tensor, State] = {}
        for group, ours in zip(groups, self.param_groups):
            for key, param in zip(group["params"], ours["params"]):
                entry = state_dict["state"].get(key)
                if entry:
                    entry = {**entry, **entry.get(WRAPPED, {})}
                    fresh[param] = self._fresh(param, group, settings_of(param, group))
                    copy_state(self.rule(group), entry, fresh[param])
        super().load_state_dict({**state_dict, "state": {}, "param_groups": groups})
        self.state.update(fresh)

    def _merge(self, saved: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
        known = {k: v for k, v in saved.items() if k in ours and k not in SETTINGS and k != "params"}
        return {**ours, **known, "params": saved["params"]}


def _check_number(owner: str, name: str, value: Any) -> None:
    values = value if isinstance(value, (tuple, list)) else [value]
    for number in values:
        if isinstance(number, (int, float)) and not isinstance(number, bool) and not number >= 0:
            raise ValueError(f"{owner}: {name} must be 0 or more, got {value}")
    if name == "betas" and not all(0 <= beta < 1 for beta in values):
        raise ValueError(f"{owner}: betas must be from 0 up to, not including, 1, got {value}")


def _check_param(owner: str, param: Tensor) -> None:
    assert param.grad is not None
    if param.grad.is_sparse:
        raise RuntimeError(f"{owner}: sparse gradients are not supported")
    for what, x in (("parameter", param), ("gradient", param.grad)):
        if x.dtype not in DTYPES:
            raise TypeError(f"{owner}: a {what} must be fp32, fp16 or bf16, got {x.dtype}")


def _launch(rule: str, batch: list[tuple[Tensor, State]], hyper: Hyper, options: int, seed: int) -> None:
    """One op call for parameters of one dtype, one device and one step."""
    params = [local(param) for param, _ in batch]
    grads = [local(cast(Tensor, param.grad)) for param, _ in batch]
    rows = [_in_a_row(param, param) for param in params]
    flat_grads = [_in_a_row(grad, param) for grad, param in zip(grads, params)]
    device = params[0].device
    numbers = torch.tensor(hyper, dtype=torch.float32, device=device)
    settings = (numbers, NUMBERS[rule], options, seed & 0x7FFFFFFF)

    def lists(part: str) -> list[list[Tensor]]:
        by_param = [moments(rule, state, part) for _, state in batch]
        found = [list(column) for column in zip(*by_param)]
        return found + [[] for _ in range(3 - len(found))]

    states = [[_in_a_row(x, x) for x in column] for column in lists("state")]
    if bits_of(batch[0][1]) == 32:
        torch.ops.polybit.optimizer_32bit(rows, flat_grads, *states, *settings)
    else:
        codes = [column[0] if column else None for column in lists("qmap")]
        torch.ops.polybit.optimizer_8bit(rows, flat_grads, *states, *lists("absmax"), *codes, *settings)
    for param, row in zip(params, rows):
        if row.data_ptr() != param.data_ptr():
            param.copy_(row.view(param.shape))


def _in_a_row(x: Tensor, like: Tensor) -> Tensor:
    """The elements of x, flat, in the order in which those of `like` lie in memory; a copy where x's lie otherwise."""
    x = x.detach()
    return (x.permute(memory_order(like)) if is_permuted(like) else x).reshape(-1)
