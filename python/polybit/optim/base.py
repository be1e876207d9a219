"""What every optimizer shares: groups, states in 32 or 8 bits, paging, and one call of an op for many parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable would import all of torch._dynamo with us

from polybit.distributed import local
from polybit.optim.norms import launches
from polybit.optim.overrides import SETTINGS, check_settings, settings_of
from polybit.optim.state import (
    State,
    bits_of,
    copy_state,
    fits_8bit,
    has_moments,
    in_memory_order,
    moments,
    new_state,
)
from polybit.optim.windows import staged
from polybit.spec.optim import NUMBERS, SKIP_NONFINITE, STOCHASTIC, Hyper

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# bitsandbytes hides the tensors of a state in a dictionary of this name when it saves.
WRAPPED = "__bnb_optimizer_quant_state__"


class Optimizer(torch.optim.Optimizer):
    """The base of all optimizers; a subclass gives the rule of a group and the numbers of a step.

    Keyword arguments that all of them take:
        optim_bits: 32 or 8, the width of the states. 8 bits: blocks of 256, dynamic maps.
        min_8bit_size: parameters with fewer elements keep 32-bit states.
        is_paged: keep large states in memory-mapped files, or for parameters on a GPU in pinned host memory.
        page_folder: where these files are; default: TMPDIR, else /var/tmp, or what the system has in its place.
        stochastic_rounding: round new bf16 parameters up or down at random, with the right mean.
        seed: of that rounding, an integer; the same seed gives the same parameters.
        skip_nonfinite: elements whose gradient is NaN or infinite are left as they are.
        maximize: step along the gradient instead of against it.

    A parameter group may have its own of each. Raises ValueError for a value that an option does not have.

    Parameters and gradients: fp32, fp16 or bf16, also mixed; states and arithmetic: fp32. A state dict of bitsandbytes
    loads, and ours loads there. A sharded parameter (DTensor) has a state that is sharded like it; in 8 bits if shards
    end between rows of a multiple of 256 elements, else in 32.
    """

    _bits: ClassVar[int] = 32
    _paged: ClassVar[bool] = False
    _betas_wanted: ClassVar[int] = 2
    # The options that bitsandbytes keeps as `betas`, in a rule without any.
    _betas: ClassVar[tuple[str, ...]] = ()
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
        settings = {
            "optim_bits": self._bits if optim_bits is None else optim_bits,
            "min_8bit_size": min_8bit_size,
            "is_paged": self._paged if is_paged is None else is_paged,
            "page_folder": None if page_folder is None else str(page_folder),
            "stochastic_rounding": stochastic_rounding,
            "skip_nonfinite": skip_nonfinite,
            "seed": seed,
            "maximize": maximize,
        }
        super().__init__(params, {**defaults, **settings})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters; options that the group does not name are the optimizer's.

        Raises ValueError for a value that an option does not have.
        """
        self.check({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def check(self, group: dict[str, Any]) -> None:
        """Raise ValueError for an option of a group that has an impossible value, or one that is not supported."""
        owner = type(self).__name__
        check_settings(owner, group)
        if not isinstance(group["seed"], int):
            raise ValueError(f"{owner}: seed must be an integer, got {group['seed']!r}")
        if "betas" in self.defaults and len(group["betas"]) != self._betas_wanted:
            raise ValueError(f"{owner}: betas must be {self._betas_wanted} numbers, got {group['betas']}")
        for name in group.keys() & self.defaults.keys() - {*SETTINGS, "seed", "maximize"}:
            _check_number(owner, name, group[name])

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
        todo = [
            (k, param, settings_of(param, group))
            for k, group in enumerate(self.param_groups)
            for param in group["params"]
            if param.grad is not None
        ]
        for _, param, _ in todo:
            _check_param(type(self).__name__, param)
        rules = [self.rule(group) for group in self.param_groups]
        fresh: dict[Tensor, State] = {}
        for k, param, settings in todo:
            state = self.state.get(param, {})
            if not has_moments(rules[k], state):  # its first step, or an option was switched on that needs more of them
                bits = bits_of(state) if "state1" in state else None
                fresh[param] = {**self._fresh(param, self.param_groups[k], settings, bits), **state}
        self.state.update(fresh)  # all of them or none: there may be no room

        batches: dict[tuple[Any, ...], list[tuple[Tensor, State]]] = defaultdict(list)
        for k, param, settings in todo:
            state = self.state[param]
            options = STOCHASTIC * settings["stochastic_rounding"] + SKIP_NONFINITE * settings["skip_nonfinite"]
            key = (param.dtype, param.grad.dtype, local(param).device, bits_of(state), k, state["step"] + 1, options)
            batches[key].append((param, state))
        place = 0
        for key, batch in batches.items():
            k, step, options = key[-3:]
            group = self.param_groups[k]
            hyper = self.hyper(group, step)._replace(grad_scale=-scale if group["maximize"] else scale)
            for window in staged(batch, key[2]):
                for rule, part, numbers in launches(rules[k], window, hyper, options):
                    _launch(rule, part, numbers, options, (group["seed"] * 0x10001 + step) * 0x101 + place)
                    place += 1
            for _, state in batch:
                state["step"] = step

    def _fresh(self, param: Tensor, group: dict[str, Any], settings: dict[str, Any], bits: int | None = None) -> State:
        small = param.numel() < settings["min_8bit_size"]
        bits = bits or (8 if settings["optim_bits"] == 8 and not small and fits_8bit(param) else 32)
        paged = settings["is_paged"]
        return new_state(self.rule(group), param, bits=bits, paged=paged, folder=settings["page_folder"])

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim has it; bitsandbytes' class of the same name can load it."""
        saved = super().state_dict()
        for group in saved["param_groups"]:  # it looks for these two in every group
            numbers = [group[name] for name in self._betas]
            group.setdefault("betas", (*numbers, *[0.0] * (2 - len(numbers))))
            group.setdefault("eps", 0.0)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the options and states of `state_dict`: of this class, or of bitsandbytes' class of the same name.

        Width, paging and rounding stay as this optimizer has them, and a state of the other width is converted. Raises
        ValueError if groups, entries or sizes do not fit; nothing is changed then.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        if not {"state", "param_groups"} <= state_dict.keys():
            got = ", ".join(map(str, list(state_dict)[:3])) or "nothing"
            raise ValueError(
                f"load_state_dict: wanted the state_dict() of an optimizer, with state and param_groups, got {got}"
            )
        saved = state_dict["param_groups"]
        given, wanted = ([len(group["params"]) for group in groups] for groups in (saved, self.param_groups))
        if given != wanted:
            raise ValueError(
                "load_state_dict: the groups have other numbers of parameters than the optimizer's: "
                f"{given}, wanted {wanted}"
            )
        groups = [self._merge(theirs, ours) for theirs, ours in zip(saved, self.param_groups)]
        states: dict[Tensor, State] = {}
        for theirs, group in zip(saved, groups):
            self.check(group)
            for key, param in zip(theirs["params"], group["params"]):
                entry = state_dict["state"].get(key)
                if entry:
                    entry = {**entry, **entry.get(WRAPPED, {})}
                    states[param] = self._fresh(param, group, settings_of(param, group))
                    try:
                        copy_state(self.rule(group), entry, states[param])
                    except ValueError as problem:
                        raise ValueError(f"{problem} (parameter {key})") from None
        self.__setstate__({"state": defaultdict(dict, states), "param_groups": groups})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _merge(self, saved: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
        """Our group with the options that `saved` has; those that schedulers keep beside them come along."""
        theirs = {k: deepcopy(v) for k, v in saved.items() if k not in (*SETTINGS, "params")}
        if "betas" not in ours:
            numbers = theirs.pop("betas", ())
            theirs = {**dict(zip(self._betas, numbers)), **theirs}
        if "eps" not in ours:
            theirs.pop("eps", None)
        return {**ours, **theirs}


def _check_number(owner: str, name: str, value: Any) -> None:
    """Numbers are 0 or more; betas, below 1."""
    values = value if isinstance(value, (tuple, list)) else [value]
    if wrong := [number for number in values if isinstance(number, (str, bytes))]:
        raise TypeError(f"{owner}: {name} must be a number, got {wrong[0]!r}")
    if any(isinstance(number, (int, float, Tensor)) and not number >= 0 for number in values):
        raise ValueError(f"{owner}: {name} must be 0 or more, got {value}")
    if name == "betas" and not all(0 <= beta < 1 for beta in values):
        raise ValueError(f"{owner}: betas must be from 0 up to, not including, 1, got {value}")


def _check_param(owner: str, param: Tensor) -> None:
    assert param.grad is not None
    if param.grad.layout != torch.strided:
        raise RuntimeError(f"{owner}: sparse gradients are not supported")
    for what, x in (("parameter", param), ("gradient", param.grad)):
        if x.dtype not in DTYPES:
            raise TypeError(f"{owner}: a {what} must be fp32, fp16 or bf16, got {x.dtype}")


def _launch(rule: str, batch: list[tuple[Tensor, State]], hyper: Hyper, options: int, seed: int) -> None:
    """One op call for parameters of one dtype, one device and one step."""
    params = [local(param).detach() for param, _ in batch]
    grads = [local(cast(Tensor, param.grad)).detach() for param, _ in batch]
    rows = [in_memory_order(param, param) for param in params]
    flat_grads = [in_memory_order(grad, param) for grad, param in zip(grads, params)]
    numbers = torch.tensor(hyper, dtype=torch.float32, device=params[0].device)
    settings = (numbers, NUMBERS[rule], options, seed & 0x7FFFFFFF)

    def lists(part: str) -> list[list[Tensor]]:
        by_param = [moments(rule, state, part) for _, state in batch]
        found = [list(column) for column in zip(*by_param)]
        return found + [[] for _ in range(3 - len(found))]

    states = [[in_memory_order(x, x) for x in column] for column in lists("state")]
    if bits_of(batch[0][1]) == 32:
        torch.ops.polybit.optimizer_32bit(rows, flat_grads, *states, *settings)
    else:
        codes = [column[0] if column else None for column in lists("qmap")]  # the same for all: copy_state sees to it
        torch.ops.polybit.optimizer_8bit(rows, flat_grads, *states, *lists("absmax"), *codes, *settings)
    for param, row in zip(params, rows):
        if row.data_ptr() != param.data_ptr():  # a parameter with gaps: the row was a copy
            param.copy_(row.view(param.shape))
    torch.autograd.graph.increment_version(params)
