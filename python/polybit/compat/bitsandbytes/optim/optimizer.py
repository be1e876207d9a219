"""The bases of the optimizers, and settings of single parameters."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from polybit import optim as native
from polybit.compat.bitsandbytes.utils import Singleton
from polybit.optim.base import WRAPPED
from polybit.optim.overrides import SETTINGS, settings_of
from polybit.spec import codebooks
from polybit.spec.optim import Hyper

# The rule behind each name, and what its options are called there: those that are kept as `betas`, then fixed ones.
_Family = tuple[type[native.Optimizer], tuple[str, ...], dict[str, Any]]
_FAMILIES: dict[str, _Family] = {
    "adam": (native.AdamW, (), {}),
    "ademamix": (native.AdEMAMix, (), {}),
    "lamb": (native.LAMB, (), {"bias_correction": True}),
    "lion": (native.Lion, (), {}),
    "momentum": (native.SGD, ("momentum", "dampening"), {"nesterov": False}),
    "lars": (native.LARS, ("momentum",), {"trust_coefficient": 0.001}),
    "rmsprop": (native.RMSprop, ("alpha", "momentum"), {"centered": False}),
    "adagrad": (native.Adagrad, (), {"lr_decay": 0.0}),
}
# Where an update is not clipped by its norm but scaled by the trust ratio of the paper.
_LAYERWISE = {"lamb": 1.0, "lars": 0.02}


class MockArgs(SimpleNamespace):
    """The settings of an optimizer: optim_bits, min_8bit_size, max_unorm, skip_zeros."""

    def __init__(self, initial_data: dict[str, Any]) -> None:
        super().__init__(**initial_data)


class GlobalOptimManager(Singleton):
    """Options of single parameters, for all optimizers of this process; a singleton."""

    def _begin(self) -> None:
        self.initialize()

    def initialize(self) -> None:
        """Forget all options."""
        self._configs = WeakTensorKeyDictionary()
        self._modules: list[tuple[weakref.ref[nn.Module], str, dict[str, Any]]] = []

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Nothing is left to do: options belong to the parameter objects."""

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: dict[str, Any] | None = None,
    ) -> None:
        """Let optimizers treat parameters by other options than their group's: lr, betas, optim_bits, ...

        The options: one key and its value, or a dictionary, not both (ValueError).
        """
        if key is not None and value is not None:
            if key_value_dict is not None:
                raise ValueError("override_config: takes key and value, or key_value_dict, not both")
            key_value_dict = {key: value}
        for param in [parameters] if isinstance(parameters, Tensor) else parameters:
            self._configs[param] = {**self._configs.get(param, {}), **(key_value_dict or {})}  # type: ignore[no-untyped-call]

    def register_module_override(self, module: nn.Module, param_name: str, config: dict[str, Any]) -> None:
        """override_config for whatever parameter the module has by that name when an optimizer makes a step.

        Raises AttributeError if it has nothing by that name now.
        """
        if not hasattr(module, param_name):
            raise AttributeError(f"register_module_override: {type(module).__name__} has no parameter {param_name!r}")
        self._modules.append((weakref.ref(module), param_name, config))

    def configs(self) -> dict[int, dict[str, Any]]:
        """The options of each parameter that has some, by its id."""
        found = {id(param): config for param, config in self._configs.items()}  # type: ignore[no-untyped-call]
        self._modules = [entry for entry in self._modules if entry[0]() is not None]
        for reference, name, config in self._modules:
            param = getattr(reference(), name, None)
            if param is not None:
                found[id(param)] = {**config, **found.get(id(param), {})}
        return found


class Optimizer8bit(native.Optimizer):
    """The base of all optimizers.

    `args`: its settings; `is_paged`: whether states are paged; `mng`: the GlobalOptimManager. Groups have the options
    lr, betas, eps and weight_decay.
    """

    _FSDP_WRAPPED_QUANT_STATE_KEY = WRAPPED
    # The width of the states that a class has whatever optim_bits says (it must keep its default then).
    _width: ClassVar[int | None] = None
    _default_bits: ClassVar[int] = 32
    _decoupled = True  # asked by the native AdamW

    optimizer_name: str
    args: Any

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        optim_bits: int = 32,
        is_paged: bool = False,
    ) -> None:
        self.mng = GlobalOptimManager.get_instance()
        self.is_paged = is_paged
        self.initialized = True
        self._betas_wanted = len(defaults["betas"]) if "betas" in defaults else 2  # type: ignore[misc]
        super().__init__(params, defaults, optim_bits=optim_bits, is_paged=is_paged)

    def _setup(
        self,
        optimizer_name: str,
        params: Iterable[Any],
        defaults: dict[str, Any],
        optim_bits: int,
        args: Any,
        min_8bit_size: int,
        max_unorm: float,
        skip_zeros: bool,
        is_paged: bool,
    ) -> None:
        owner = type(self).__name__
        if optimizer_name not in _FAMILIES:
            raise ValueError(f"{owner}: optimizer_name must be one of {', '.join(_FAMILIES)}, got {optimizer_name!r}")
        if self._width is not None:
            if optim_bits != self._default_bits:
                raise ValueError(f"{owner}: optim_bits must keep its default {self._default_bits}, got {optim_bits}")
            optim_bits = self._width
        if isinstance(defaults["betas"], str):
            defaults["betas"] = [float(number) for number in defaults["betas"].strip("() ").split(",")]
        self.args = args or MockArgs(
            {"optim_bits": optim_bits, "min_8bit_size": min_8bit_size, "max_unorm": max_unorm, "skip_zeros": skip_zeros}
        )
        self.optimizer_name = optimizer_name
        self._refuse(vars(self.args))
        Optimizer8bit.__init__(self, params, defaults, self.args.optim_bits, is_paged)
        for options in (self.defaults, *self.param_groups):
            options["min_8bit_size"] = self.args.min_8bit_size

    def _refuse(self, options: dict[str, Any]) -> None:
        owner, usual = type(self).__name__, _LAYERWISE.get(self.optimizer_name, 0.0)
        if options.get("max_unorm", usual) != usual:
            raise NotImplementedError(f"{owner}: updates are not clipped; max_unorm must be {usual}")
        if options.get("optim_bits", 32) not in (8, 32):
            raise NotImplementedError(f"{owner}: optim_bits must be 8 or 32, got {options['optim_bits']!r}")
        if options.get("skip_zeros"):
            raise NotImplementedError(f"{owner}: skip_zeros is not supported")

    def _options(self, group: dict[str, Any]) -> tuple[type[native.Optimizer], dict[str, Any]]:
        """The native class of the rule, and the group as that knows it."""
        if not hasattr(self, "optimizer_name"):
            raise NotImplementedError(f"{type(self).__name__}: needs a rule; use Optimizer1State or Optimizer2State")
        family, names, fixed = _FAMILIES[self.optimizer_name]
        return family, {**fixed, **group, **dict(zip(names, group["betas"]))}

    def rule(self, group: dict[str, Any]) -> str:
        """The name of the update rule of polybit."""
        family, options = self._options(group)
        return family.rule(self, options)

    def hyper(self, group: dict[str, Any], step: int) -> Hyper:
        """The numbers of step `step` (from 1)."""
        family, options = self._options(group)
        return family.hyper(self, options, step)

    def _update(self, scale: float) -> None:
        configs = self.mng.configs()
        groups = self.param_groups
        if configs:
            self.param_groups = [part for group in groups for part in self._split(group, configs)]
        try:
            super()._update(scale)
        finally:
            self.param_groups = groups

    def _split(self, group: dict[str, Any], configs: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
        """The group, and one of its own for each parameter that has other options."""
        others = [param for param in group["params"] if id(param) in configs]
        if not others:
            return [group]
        usual = {**group, "params": [param for param in group["params"] if id(param) not in configs]}
        parts = [{**group, **configs[id(param)], "params": [param]} for param in others]
        for part in parts:
            self._refuse(part)
        return [usual, *parts]

    def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
        """The options that hold for a parameter of a group."""
        config = {name: group.get(name) for name in ("betas", "eps", "weight_decay", "lr", "t_alpha", "t_beta3")}
        config |= {"alpha": group.get("alpha", 0.0), **vars(self.args)}
        return config | self.mng.configs().get(id(self.param_groups[gindex]["params"][pindex]), {})

    @torch.no_grad()
    def init_state(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Make the state of a parameter, before its first step."""
        part = self._split({**group, "params": [p]}, self.mng.configs())[-1]
        self.state[p] = self._fresh(p, part, settings_of(p, part))

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """The step of one parameter."""
        groups = self.param_groups
        self.param_groups = [{**group, "params": [p]}]
        try:
            self._update(1.0)
        finally:
            self.param_groups = groups

    def fill_qmap(self) -> None:
        """Put the two dynamic maps into name2qmap."""
        self.name2qmap: dict[str, Tensor] = {
            name: codebooks.dynamic(signed).code for name, signed in (("dynamic", True), ("udynamic", False))
        }

    def get_state_buffer(self, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros of a parameter's shape, on its device."""
        return torch.zeros_like(p, dtype=dtype)

    def prefetch_state(self, p: Tensor) -> None:
        """Nothing is left to do: a step fetches the paged states that it changes."""

    def check_overrides(self) -> None:
        """Nothing is left to do: options are looked up in each step."""

    def to_gpu(self) -> None:
        """Move states to where their parameters are, but for paged ones."""
        if not self.is_paged:
            for param, state in self.state.items():
                state.update({k: v.to(param.device) for k, v in state.items() if isinstance(v, Tensor)})

    def state_dict(self) -> dict[str, Any]:
        """As bitsandbytes has it: the tensors of each state below "__bnb_optimizer_quant_state__"."""
        saved = super().state_dict()
        states = {}
        for key, state in saved["state"].items():
            tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
            states[key] = {name: value for name, value in state.items() if name not in tensors}
            if tensors:
                states[key][WRAPPED] = tensors
        ours = {*SETTINGS, "seed", "maximize"}
        groups = [{name: value for name, value in group.items() if name not in ours} for group in saved["param_groups"]]
        return {**saved, "state": states, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Take over options and states, of the layout above or the flat one of older versions.

        They go to the devices of the parameters. Raises ValueError if groups, entries or sizes do not fit, or for
        move_to_device=False.
        """
        if not move_to_device:
            raise ValueError(
                "load_state_dict: states are always where their parameters are, move_to_device must be True"
            )
        super().load_state_dict(state_dict)


class Optimizer2State(Optimizer8bit):
    """An optimizer with two states: optimizer_name "adam", "ademamix" or "lamb"."""

    def __init__(
        self,
        optimizer_name: str,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
        alpha: float = 0.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "alpha": alpha, "t_alpha": t_alpha,
            "t_beta3": t_beta3,
        }  # fmt: skip
        self._setup(optimizer_name, params, defaults, optim_bits, args, min_8bit_size, max_unorm, skip_zeros, is_paged)


class Optimizer1State(Optimizer8bit):
    """An optimizer with one state: optimizer_name "lion", "momentum", "lars", "rmsprop" or "adagrad"."""

    def __init__(
        self,
        optimizer_name: str,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.0),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
        is_paged: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self._setup(optimizer_name, params, defaults, optim_bits, args, min_8bit_size, max_unorm, skip_zeros, is_paged)


@torch.no_grad()
def update_parameter(
    optimizer_name: str,
    p: Tensor,
    g: Tensor,
    state: dict[str, Tensor | None],
    step: int,
    gnorm_scale: float,
    *,
    betas: tuple[float, float, float],
    alpha: float,
    max_unorm: float | None = None,
    **options: Any,
) -> None:
    """Step `step` of one parameter, in place, with states that the caller keeps (functional.optimizer_update_*)."""
    param = p.detach()
    param.grad = g
    if max_unorm is None:
        max_unorm = _LAYERWISE.get(optimizer_name, 0.0)
    bits = 8 if "qmap1" in state else 32
    optimizer: Optimizer8bit
    if state["state2"] is None:
        optimizer = Optimizer1State(
            optimizer_name, [param], betas=betas[:2], optim_bits=bits, min_8bit_size=0, max_unorm=max_unorm, **options
        )
    else:
        optimizer = Optimizer2State(
            optimizer_name, [param], betas=betas if optimizer_name == "ademamix" else betas[:2], optim_bits=bits,
            min_8bit_size=0, max_unorm=max_unorm, alpha=alpha, **options,
        )  # fmt: skip
    optimizer.state[param] = {"step": step - 1, **{name: value for name, value in state.items() if value is not None}}
    optimizer._update(gnorm_scale)
