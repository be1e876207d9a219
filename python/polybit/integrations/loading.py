"""The operations of transformers' loader on weights of quantized layers."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
)
from transformers.integrations.accelerate import get_device

from polybit import checkpoint
from polybit.nn import Settings
from polybit.nn.experts import fits_experts, quantize_stack
from polybit.nn.module import describe
from polybit.qtensor import QTensor

Tensors = dict[str, Any]  # by key: a tensor or a list of one


class _OfOurWeights(ConversionOps):  # type: ignore[misc]
    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def deliver(self, weight: QTensor, expected: QTensor, name: str, missing_keys: set[str] | None) -> Tensors:
        # What the loader puts into the model: the whole as a Parameter; or the parts that it writes to a disk.
        if weight.shape != expected.shape or not expected.same_layout(weight):
            got, wanted = (f"{describe(w)}, shape {list(w.shape)}" for w in (weight, expected))
            raise ValueError(f"{name}: the checkpoint has {got}; the model, by its config.json, {wanted}")
        if get_device(self.hf_quantizer.device_map, name) == "disk":
            if missing_keys is not None:
                missing_keys.discard(name)
            return {f"{name}.{part}": tensor for part, tensor in weight.inner_tensors().items()}
        weight.search = expected.search
        return {name: nn.Parameter(weight, requires_grad=False)}


class Quantize(_OfOurWeights):
    """Dense weights of quantized layers, one after the other as they are read."""

    def convert(
        self, input_dict: Tensors, *, model: nn.Module, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> Tensors:
        """{name of the parameter: dense weight} to {the same: quantized Parameter}, or its parts for a disk."""
        out: Tensors = {}
        for name, value in input_dict.items():
            expected = model.get_parameter(name)
            assert isinstance(expected, QTensor), name
            dense = _single(value)
            if name.removesuffix(".weight") in self.hf_quantizer.conv1d:
                dense = dense.t()
            weight = Settings.of(expected).quantize(dense)
            out |= self.deliver(weight, expected, name, missing_keys)
        return out


class MergeExperts(WeightConverter):  # type: ignore[misc]
    """Makes a quantized stack of what a checkpoint has for each expert: one is read and quantized after the other."""

    __slots__ = ()

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> Tensors:
        """{layer_name: quantized Parameter}, or its parts for a disk. What is not quantized is merged as ever."""
        operation: Quantize | None = self.quantization_operation
        expected: Any = None if operation is None else model.get_parameter(layer_name)
        settings = Settings.of(expected) if isinstance(expected, QTensor) else None
        if operation is None or settings is None or not fits_experts(expected.shape, settings):
            return super().convert(layer_name, model, config, hf_quantizer, loading_info)  # type: ignore[no-any-return]
        collected: Tensors = self.collected_tensors
        patterns, reads = list(collected), zip(*collected.values(), strict=True)

        def experts() -> Iterator[Tensor]:
            for read in reads:
                collected.update((pattern, [one]) for pattern, one in zip(patterns, read, strict=True))
                merged = super(MergeExperts, self).convert(layer_name, model, config, loading_info=loading_info)
                yield merged[layer_name][0]

        weight = quantize_stack(experts(), expected.shape, settings)
        return operation.deliver(weight, expected, layer_name, loading_info.missing_keys)


def joined_at(conversion: Any) -> int | None:
    """The dimension of an expert [rows, columns] at which its parts are joined, if that and merging experts is all."""
    if not isinstance(conversion, WeightConverter) or len(conversion.target_patterns) != 1:
        return None
    first, *rest = conversion.operations
    if not isinstance(first, MergeModulelist) or first.dim != 0 or len(rest) > 1:
        return None
    dim: int = rest[0].dim if rest and isinstance(rest[0], Concatenate) else 1
    return dim - 1 if dim > 0 and all(isinstance(operation, Concatenate) for operation in rest) else None


def expert_by_expert(conversion: Any) -> Any:
    """The same conversion as a MergeExperts, if it does no more than to join parts of experts and to merge these."""
    if joined_at(conversion) is not None:
        conversion = copy(conversion)
        conversion.__class__ = MergeExperts
    return conversion


class Deserialize(_OfOurWeights):
    """Quantized weights of a checkpoint."""

    def convert(
        self,
        input_dict: Tensors,
        *,
        model: nn.Module,
        full_layer_name: str,
        target_patterns: list[str],
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> Tensors:
        """{"weight": codes, "weight.absmax": scales, ...} to {full_layer_name: quantized Parameter}, or its parts.

        The keys are the patterns of the converter: of a stack of experts its name, with dots escaped.

        A dense weight, alone, becomes one of the dtype that the model is loaded in. Raises ValueError if layer and
        entries do not fit.
        """
        tensors = {key.replace("\\.", "."): _single(value) for key, value in input_dict.items()}
        (prefix,) = target_patterns
        module, _, last = full_layer_name.rpartition(".")
        expected = getattr(model.get_submodule(module), last)
        if not isinstance(expected, QTensor):
            if len(tensors) > 1:
                raise ValueError(f"{full_layer_name} is quantized in the checkpoint, its config.json leaves it alone")
            return {key: _cast(model, full_layer_name, tensor) for key, tensor in tensors.items()}
        loaded = checkpoint.from_tensors(tensors, prefix, dtype=expected.dtype)
        return self.deliver(loaded, expected, full_layer_name, missing_keys)


def _cast(model: Any, name: str, tensor: Tensor) -> Tensor:
    # The loader leaves the dtype to the operation, because the parts of a quantized weight have to keep theirs.
    dtype: torch.dtype = model.get_parameter_or_buffer(name).dtype
    kept = any(pattern in name for pattern in model._get_dtype_plan(dtype))  # in fp32, whatever the model is loaded in
    return tensor if kept or not tensor.is_floating_point() else tensor.to(dtype)


def _single(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor
