"""Replace the modules of a model by their quantized counterparts, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from polybit.devices import usable_device
from polybit.formats import Format, get_format
from polybit.nn.counterpart import (
    Settings,
    check_quantizable,
    counterpart,
    dense_counterpart,
    dense_weight,
    empty_weight,
    is_quantizable,
)
from polybit.nn.experts import QuantizedExperts, dequantize_experts_
from polybit.nn.linear import is_conv1d
from polybit.nn.module import QuantizedModule
from polybit.qtensor import KERNEL_DTYPES, QTensor

M = TypeVar("M", bound=nn.Module)
Override = str | Format | Mapping[str, Any] | Literal[False] | None
Progress = Callable[[int, int, str], None]

# What is wanted for one module: these settings, to be left alone, or nothing in particular (None).
_Wish = Settings | Literal[False] | None


def quantize_(
    model: M,
    format: str | Format,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    search: bool = False,
    threshold: float = 6.0,
    compute_dtype: torch.dtype | str | None = None,
    activations: str | None = None,
    skip: Iterable[str] | None = None,
    embeddings: bool = False,
    overrides: Mapping[str, Override] | None = None,
    device: torch.device | str | None = None,
    offload: bool = False,
    progress: bool | Progress = False,
) -> M:
    """Replace every nn.Linear and GPT-2 Conv1D inside `model` by its quantized counterpart; return `model`.

    A k-bit format makes Linear4bit or LinearKbit layers, "int8" Linear8bit layers with `threshold`; `embeddings=True`
    makes an Embedding4bit, EmbeddingKbit or Embedding8bit of every nn.Embedding, too. `compute_dtype` and `activations`
    are those of LinearKbit, for all linear layers; a lookup takes no notice. Subclasses of these modules are left
    alone: their forward may be another. A model on the meta device becomes a quantized one on the meta device, to be
    filled by load_state_dict(assign=True).

    Patterns (fnmatch) match a module's full name or its last component:
    `skip`: modules to leave alone. By default those called lm_head, and every linear layer whose weight an embedding
    shares: it follows `embeddings`. `skip=()` skips nothing.
    `overrides`: {pattern: settings}, the first that matches wins, also over `skip` and `embeddings`. Settings are a
    dict with some of format, block_size, double_quant, search, threshold, compute_dtype and activations (the rest as
    above), a format, or None or False: leave alone.

    A weight that several modules share is quantized once and stays shared: an embedding tied to a linear layer that is
    quantized goes with it.

    `device`: one weight after the other is moved there, quantized there, and stays there, so that the device holds one
    dense weight at a time; the rest of the model follows in the end. With `offload=True` the quantized weights return
    to where they were and the rest stays. `progress`: True shows a bar on stderr, a callable is called as
    progress(weights done, weights in all, name) after each weight.

    Raises, before anything is replaced: ValueError (unknown format, one without a linear layer, wrong option, an
    override that matches no module, a shared weight of which one module is skipped, an embedding with max_norm,
    scale_grad_by_freq or sparse, `model` itself a Linear or quantized already, a device that is not there) or TypeError
    (a weight that is not fp32, fp16 or bf16, `model` no module).
    """
    _check_model("quantize_", model)
    with _blame("quantize_"):
        base = Settings(format, block_size, double_quant, search, threshold, compute_dtype, activations)
    check_rules("quantize_", skip, overrides)
    if offload and device is None:
        raise ValueError("quantize_: offload=True needs the device to quantize on")
    if is_quantizable(model):
        raise ValueError(
            f"quantize_: the model is a {type(model).__name__} itself and cannot be replaced in place; "
            "use from_linear, from_conv1d or from_embedding"
        )
    skipped = None if skip is None else tuple(skip)
    rules = {
        pattern: read_override(f"quantize_: overrides[{pattern!r}]", value, base)
        for pattern, value in (overrides or {}).items()
    }
    places = _places(model)
    for pattern in rules:
        if not any(matches(name, pattern) for place in places for name, _ in place.uses):
            raise ValueError(
                f"quantize_: overrides[{pattern!r}] matches no Linear, Conv1D or Embedding of the model{_names(places)}"
            )

    def wish(name: str, module: nn.Module, place: _Place) -> _Wish:
        for pattern, settings in rules.items():
            if matches(name, pattern):
                return settings
        if skipped is not None and any(matches(name, pattern) for pattern in skipped):
            return False
        if isinstance(module, nn.Embedding):
            return base if embeddings else None
        sharing = [other for _, other in (*place.uses, *place.others)]
        is_head = matches(name, "lm_head") or any(isinstance(other, nn.Embedding) for other in sharing)
        return None if skipped is None and is_head else base

    chosen = _choose("quantize_", places, wish)
    _check(chosen)
    if not chosen:
        _check_dense(model)
    if device is not None:
        with _blame("quantize_"):
            device = usable_device(device)
        if device.type != "meta":
            _check_movable(model, device)
    del places  # it would keep every dense weight alive

    total = len(chosen)
    with _reporter(progress) as report:
        while chosen:
            place, settings = chosen.pop(0)
            name = place.uses[0][0]
            _replace(model, place, settings, _quantized(place, settings, device, offload))
            del place  # the last reference to the dense weight
            report(total - len(chosen), total, name)
    return model if device is None or offload else model.to(device)


def make_empty_(model: M, settings: Mapping[str, Settings]) -> M:
    """Replace the modules named in `settings` by their counterparts, to be filled by load_state_dict; return `model`.

    Modules that share a weight with one that is named go with it and share the new one. Raises ValueError for a name
    that is no Linear, Conv1D or Embedding, and for a shared weight with two settings, before anything is replaced.
    """
    places = _places(model)
    if unknown := settings.keys() - {name for place in places for name, _ in place.uses}:
        raise ValueError(f"make_empty_: the model has no Linear, Conv1D or Embedding called {min(unknown)}")
    for place, wanted in _choose("make_empty_", places, lambda name, module, place: settings.get(name)):
        _replace(model, place, wanted, empty_weight(place.uses[0][1], wanted))
    return model


def dequantize_(model: M, dtype: torch.dtype | None = None) -> M:
    """Replace every quantized module inside `model` by an nn.Linear or nn.Embedding of its value; return `model`.

    dtype: of the weights; None: what each stands for. The weights are trainable, as those of any dense module, and one
    that several modules share stays shared. The Conv1D of GPT-2 becomes an nn.Linear, stacks of
    experts become parameters again. Raises ValueError if `model`
    itself is a quantized module.
    """
    _check_model("dequantize_", model)
    if isinstance(model, QuantizedModule):
        raise ValueError(
            f"dequantize_: the model is a {type(model).__name__} itself and cannot be replaced in place; "
            "use nn.Linear or nn.Embedding with .weight.dequantize()"
        )
    done: dict[int, nn.Parameter] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, QuantizedExperts):
            dequantize_experts_(module, dtype)
        elif isinstance(module, QuantizedModule):
            weight = module.weight
            if id(weight) not in done:
                done[id(weight)] = nn.Parameter(weight.dequantize().to(dtype or weight.dtype))
            model.set_submodule(name, dense_counterpart(module, done[id(weight)]))
    return model


def _check_model(what: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        hint = "; load a state dict into a model first" if isinstance(model, Mapping) else ""
        raise TypeError(f"{what}: the model must be a torch.nn.Module, got {type(model).__name__}{hint}")


@dataclass
class _Place:
    """A dense weight and who holds it: quantizable modules, and parameters (by name) of modules that are not."""

    weight: Tensor
    uses: list[tuple[str, nn.Module]] = field(default_factory=list)
    others: list[tuple[str, nn.Module]] = field(default_factory=list)


def _places(model: nn.Module) -> list[_Place]:
    places: dict[int, _Place] = {}
    modules = list(model.named_modules(remove_duplicate=False))
    for name, module in modules:
        if is_quantizable(module):
            weight = cast(Tensor, module.weight)
            places.setdefault(id(weight), _Place(weight)).uses.append((name, module))
    for name, module in modules:
        if not is_quantizable(module):
            for last, parameter in module.named_parameters(recurse=False):
                if id(parameter) in places:
                    places[id(parameter)].others.append((f"{name}.{last}" if name else last, module))
    return list(places.values())


def _names(places: list[_Place], most: int = 4) -> str:
    names = [name for place in places for name, _ in place.uses]
    return f": {', '.join(names[:most])}{', ...' if len(names) > most else ''}" if names else ""


def _choose(
    what: str, places: list[_Place], wish: Callable[[str, nn.Module, _Place], _Wish]
) -> list[tuple[_Place, Settings]]:
    chosen = []
    for place in places:
        wishes = {name: wish(name, module, place) for name, module in place.uses}
        wanted = {name: settings for name, settings in wishes.items() if isinstance(settings, Settings)}
        if not wanted:
            continue
        name, settings = next(iter(wanted.items()))
        against = [other for other, asked in wishes.items() if asked is False] + [other for other, _ in place.others]
        if against:
            raise ValueError(
                f"{what}: {name} shares its weight with {against[0]}, which is to be left alone or has no quantized "
                "counterpart: skip both or none"
            )
        for other, asked in wanted.items():
            if asked != settings:
                raise ValueError(f"{what}: {name} and {other} share one weight and must have the same settings")
        if len({is_conv1d(module) for _, module in place.uses}) > 1:
            raise ValueError(f"{what}: {', '.join(wishes)} share one weight, which only some of them use transposed")
        chosen.append((place, settings))
    return chosen


def _quantized(place: _Place, settings: Settings, device: torch.device | str | None, offload: bool) -> QTensor:
    weight = dense_weight(place.uses[0][1])
    quantized = settings.quantize(weight if device is None else weight.to(device))
    return cast(QTensor, quantized.to(weight.device)) if offload else quantized


def _replace(model: nn.Module, place: _Place, settings: Settings, weight: QTensor) -> None:
    shared = cast(QTensor, nn.Parameter(weight, requires_grad=False))
    done: dict[nn.Module, nn.Module] = {}
    for name, module in place.uses:
        if module not in done:
            done[module] = counterpart(module, settings, shared)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, done[module])


def _check(chosen: list[tuple[_Place, Settings]]) -> None:
    for place, _ in chosen:
        for name, module in place.uses:
            check_quantizable(module, f"quantize_: {name}")
            if place.weight.dtype not in KERNEL_DTYPES:
                raise TypeError(f"quantize_: {name}.weight must be fp32, fp16 or bf16, got {place.weight.dtype}")


def _check_dense(model: nn.Module) -> None:
    done = [name for name, module in model.named_modules() if isinstance(module, QuantizedModule)]
    if done:
        raise ValueError(
            f"quantize_: {done[0]} and {len(done) - 1} more are quantized already; dequantize_ the model first"
        )


def _check_movable(model: nn.Module, device: torch.device | str) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"quantize_: {name} is on the meta device and cannot be moved to {device}")


@contextmanager
def _blame(where: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None


def check_rules(where: str, skip: object, overrides: object) -> None:
    """Raise TypeError for patterns that are one string, or overrides that are no dict."""
    if isinstance(skip, str):
        raise TypeError(f"{where}: skip must be several patterns, got the string {skip!r}")
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TypeError(f"{where}: overrides must be a dict {{pattern: settings}}, got {type(overrides).__name__}")


def read_override(where: str, value: Override, base: Settings) -> Settings | Literal[False]:
    """The settings that an override stands for; False: leave alone. `where` begins the message of an error."""
    if value is None or value is False:
        return False
    if isinstance(value, str | Format):
        value = {"format": value}
    if not isinstance(value, Mapping):
        raise TypeError(f"{where} must be a dict of settings, a format, None or False, got {value!r}")
    known = [f.name for f in fields(Settings)]
    if unknown := [key for key in value if key not in known]:
        raise ValueError(f"{where}: settings are {', '.join(known)}, got {unknown[0]!r}")
    with _blame(where):
        int8 = "format" in value and get_format(value["format"]).kind == "int8"
        return replace(base, **({"search": False} if int8 else {}) | dict(value))  # the general search is for k-bit


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern (fnmatch) matches a module's full name or its last component."""
    return fnmatchcase(name, pattern) or fnmatchcase(name.rpartition(".")[2], pattern)


@contextmanager
def _reporter(progress: bool | Progress) -> Iterator[Progress]:
    if progress is True:
        from rich.console import Console  # slow to import, and rarely needed
        from rich.progress import Progress as Bar

        with Bar(console=Console(stderr=True)) as bar:
            task = bar.add_task("quantize")
            yield lambda done, total, name: bar.update(task, completed=done, total=total, description=name)
    else:
        yield progress or (lambda done, total, name: None)
