"""Modules that hold their experts as 3-D parameters, one stack of weights for each product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn

from polybit.nn.counterpart import Settings
from polybit.nn.module import QuantizedModule
from polybit.qtensor import QTensor, quantize_scales


class QuantizedExperts(QuantizedModule):
    """What a module becomes of which parameters [experts, rows, columns] are quantized: the same module, of a subclass.

    Its forward is its own; what it calls has to take QTensors, as polybit.functional.linear_grouped does.
    `thresholds`: those of LLM.int8() by the names of the parameters.
    """

    thresholds: dict[str, float]

    def _applied(self, weight: QTensor, fn: Callable[[Tensor], Tensor]) -> QTensor:
        # No two modules share a stack. A record of what it became would forbid torch to swap it, as PEFT has it done.
        return cast(QTensor, nn.Parameter(fn(weight.detach()), requires_grad=False))


@cache
def _subclass(dense: type[nn.Module]) -> type[QuantizedExperts]:
    return type(f"Quantized{dense.__name__}", (QuantizedExperts, dense), {"__module__": dense.__module__})


def quantize_experts_(module: nn.Module, weights: Mapping[str, QTensor], thresholds: Mapping[str, float]) -> None:
    """Put quantized stacks in the place of parameters of `module`; `thresholds`: of those in int8."""
    module.__class__ = _subclass(type(module))  # type: ignore[arg-type]
    module.quantized = tuple(weights)  # type: ignore[assignment]
    module.thresholds = dict(thresholds)  # type: ignore[assignment]
    for name, weight in weights.items():
        module.register_parameter(name, nn.Parameter(weight, requires_grad=False))


def dequantize_experts_(module: QuantizedExperts, dtype: torch.dtype | None = None) -> None:
    """Make `module` what it was, with trainable parameters of the values that the quantized ones have."""
    weights = module.quantized_weights()
    module.__class__ = type(module).__bases__[1]
    del module.quantized, module.thresholds
    for name, weight in weights.items():
        module.register_parameter(name, nn.Parameter(weight.dequantize().to(dtype or weight.dtype)))


def fits_experts(shape: torch.Size, settings: Settings) -> bool:
    """Whether each expert of a stack of this shape [experts, rows, columns] holds whole blocks."""
    return settings.format == "int8" or shape[1:].numel() % settings.block_size == 0


def quantize_stack(experts: Iterable[Tensor], shape: torch.Size, settings: Settings) -> QTensor:
    """What settings.quantize makes of a dense stack of this shape, of which only one expert need be in memory.

    experts: shape[0] tensors [rows, columns], each of which holds whole blocks (`fits_experts`).
    """
    plain = replace(settings, double_quant=False)
    stack: QTensor | None = None
    for i, dense in enumerate(experts):
        if stack is None:
            meta = torch.empty(shape, dtype=dense.dtype, device="meta")
            stack = cast(QTensor, torch.empty_like(plain.quantize(meta), device=dense.device))
        cast(QTensor, stack[i]).assign(plain.quantize(dense))
    assert stack is not None
    return quantize_scales(stack) if settings.double_quant and settings.format != "int8" else stack
