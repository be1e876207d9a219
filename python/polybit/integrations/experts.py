"""Experts of transformers: 3-D parameters are quantized, and multiplied as they are stored, those that are hit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from polybit import functional
from polybit.integrations.loading import joined_at
from polybit.integrations.models import make_model
from polybit.model_folder import Layout, Stack
from polybit.nn import Settings, is_quantizable
from polybit.nn.convert import matches, read_override
from polybit.nn.experts import QuantizedExperts, quantize_experts_
from polybit.qtensor import KERNEL_DTYPES, QTensor

IMPLEMENTATION = "polybit"
_STACKS = ("gate_up_proj", "up_proj", "down_proj")


def stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name of the module, the module, name of the parameter) of each stack of experts, quantized or not.

    They are those of classes that let transformers choose how experts are run (@use_experts_implementation).
    """
    for name, module in model.named_modules():
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
            for last in _STACKS:
                parameter = getattr(module, last, None)
                if isinstance(parameter, nn.Parameter) and parameter.dim() == 3:
                    yield name, module, last


def is_stack(model: nn.Module, pattern: str) -> bool:
    """Whether a pattern matches a stack of experts of the model, or the module that has it."""
    return any(_matches(name, last, pattern) for name, _, last in stacks(model))


def _matches(name: str, last: str, pattern: str) -> bool:
    return matches(name, pattern) or matches(f"{name}.{last}", pattern)


def read_layout(raw: Mapping[str, Any], keys: Iterable[str]) -> Layout:
    """What the model of a config.json makes of a checkpoint with these keys, as transformers would load it.

    Nothing, if transformers does not know the model. Raises ValueError if experts are not complete.
    """
    if raw.get("model_type") not in CONFIG_MAPPING:
        return Layout()
    with torch.device("meta"):
        model = make_model(raw)
    parameters = {f"{name}.{last}": module for name, module, last in stacks(model)}
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()

    def rename(key: str) -> tuple[str, str | None]:
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:  # as the loader does
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        return name, pattern

    names, others = dict[str, str](), set[str]()
    found: dict[str, dict[str | None, list[str]]] = {}
    for key in sorted(keys, key=dot_natural_key):
        names[key], pattern = rename(key)
        if names[key] in parameters:
            found.setdefault(names[key], {}).setdefault(pattern, []).append(key)
        elif names[key] in state and not is_quantizable(model.get_submodule(names[key].rpartition(".")[0])):
            others.add(key)
    made = []
    for name, parts in found.items():
        patterns = [pattern for pattern in by_pattern if pattern in parts] if None not in parts else [None]
        converter = by_pattern.get(patterns[0]) if patterns[0] else None
        one, *_ = parts[patterns[0]]
        if len({len(parts[pattern]) for pattern in patterns}) > 1:
            raise ValueError(f"{name} cannot be made: parts of its experts are missing")
        # As save_pretrained would call it, if that leads here.
        key = f"{one.partition('.experts.')[0]}.experts.{name.rpartition('.')[2]}" if converter else one
        made.append(
            Stack(
                name,
                key if rename(key)[0] == name else name,
                tuple(zip(*(parts[pattern] for pattern in patterns), strict=True)),
                0 if converter is None else joined_at(converter),
                cast(Any, parameters[name]).is_transposed,
            )
        )
    return Layout(names, frozenset(others), tuple(made))


def prepare(model: nn.Module, config: Any) -> None:
    """Replace the stacks of `model`, on the meta device, by quantized ones without content, as a PolybitConfig says.

    Raises ValueError for int8 where stacks are stored [experts, in, out]: it has a scale for each output.
    """
    base = Settings(config.format, config.block_size, config.double_quant, config.search, config.threshold)
    rules = {
        pattern: read_override(f"overrides[{pattern!r}]", override, base)
        for pattern, override in config.overrides.items()
    }
    chosen: dict[nn.Module, dict[str, QTensor]] = {}
    thresholds: dict[nn.Module, dict[str, float]] = {}
    for name, module, last in stacks(model):
        wishes = [settings for pattern, settings in rules.items() if _matches(name, last, pattern)]
        skipped = any(_matches(name, last, pattern) for pattern in config.skip or ())
        settings = wishes[0] if wishes else None if skipped else base
        if not settings:
            continue
        if settings.format == "int8" and cast(Any, module).is_transposed:
            raise ValueError(
                f"PolybitConfig: {name}.{last} is a stack of experts stored [experts, in, out], and int8 has a scale "
                "for each output: give it a k-bit format, overrides={'*.experts': 'nf4'}, or skip=['experts']"
            )
        parameter = getattr(module, last)
        empty = torch.empty_like(settings.quantize(parameter.detach().to("meta")), device=parameter.device)
        chosen.setdefault(module, {})[last] = cast(QTensor, empty)
        if settings.format == "int8":
            thresholds.setdefault(module, {})[last] = settings.threshold
    for module, weights in chosen.items():
        quantize_experts_(module, weights, thresholds.get(module, {}))
        cast(Any, module.config)._experts_implementation = IMPLEMENTATION


def restore(model: Any) -> None:
    """After its experts have become dense: as transformers runs and saves them."""
    found = {id(module): module for _, module, _ in stacks(model)}
    for module in found.values():
        cast(Any, module.config)._experts_implementation = model.get_correct_experts_implementation(None)
    if found:
        converters = [c for c in get_model_conversion_mapping(model, add_legacy=False) if makes_stack(c)]
        model._weight_conversions = [*(model._weight_conversions or []), *converters]


def makes_stack(conversion: Any) -> bool:
    """Whether a conversion of transformers makes a stack of experts of what a checkpoint has for each expert."""
    targets = conversion.target_patterns if isinstance(conversion, WeightConverter) else ()
    return any(target.rpartition(".")[2] in _STACKS for target in targets)


def has_quantized(model: nn.Module) -> bool:
    """Whether any stack of the model is quantized."""
    return any(isinstance(module, QuantizedExperts) for module in model.modules())


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the forward of an experts module does, by a product with groups for each stack; int8: one for each expert.

    hidden_states [tokens, hidden]; top_k_index: int64 [tokens, k], experts from `num_experts` up give nothing;
    top_k_weights [tokens, k]. Returns [tokens, hidden] in the dtype of hidden_states. A stack that is not quantized is
    multiplied by transformers.
    """
    tokens, k = top_k_index.shape
    order = top_k_index.reshape(-1).argsort(stable=True)
    experts = top_k_index.reshape(-1)[order]
    last = torch.arange(self.num_experts, device=experts.device, dtype=experts.dtype)
    ends = torch.searchsorted(experts, last, right=True, out_int32=True)

    def product(x: Tensor, name: str) -> Tensor:
        weight = getattr(self, name)
        bias = getattr(self, f"{name}_bias")[experts.clamp(max=self.num_experts - 1)] if self.has_bias else None
        if not isinstance(weight, QTensor):
            from transformers.integrations.moe import _grouped_linear  # no public name

            return cast(Tensor, _grouped_linear(x, weight, ends, bias, self.is_transposed))
        x = x if x.dtype in KERNEL_DTYPES else x.to(weight.dtype)
        if weight.format_name == "int8":
            y = functional.linear_int8_grouped(x, weight, ends, threshold=self.thresholds[name])
        else:
            y = functional.linear_grouped(x, weight, ends, transposed=self.is_transposed)
        return y if bias is None else y + bias

    x = product(hidden_states[order // k], "gate_up_proj" if self.has_gate else "up_proj")
    y = product(self._apply_gate(x) if self.has_gate else self.act_fn(x), "down_proj")
    if self.has_post_expert_norm:
        y = self.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * k, device=order.device))
    return y[back].view(tokens, k, -1).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = experts_forward
