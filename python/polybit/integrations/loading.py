"""The operations of transformers' loader on weights of quantized layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from polybit import checkpoint
from polybit.nn import Settings
from polybit.nn.module import QuantizedModule
from polybit.qtensor import QTensor

Tensors = dict[str, Any]  # by key: a tensor or a list of one


class _OfOurWeights(ConversionOps):  # type: ignore[misc]
    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def _miss_weights_only(self, missing_keys: set[str] | None) -> None:
        # Of a quantized weight a state dict names every part; the loader hears of the whole alone.
        if missing_keys is not None:
            missing_keys -= self.hf_quantizer.parts


class Quantize(_OfOurWeights):
    """Dense weights of quantized layers, one after the other as they are read."""

    def convert(
        self, input_dict: Tensors, *, model: nn.Module, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> Tensors:
        """{name of the parameter: dense weight} to {the same: quantized Parameter}."""
        self._miss_weights_only(missing_keys)
        out = {}
        for name, value in input_dict.items():
            module = _quantized_module(model, name)
            dense = _single(value)
            if name.removesuffix(".weight") in self.hf_quantizer.conv1d:
                dense = dense.t()
            out[name] = _parameter(Settings.of(module.weight).quantize(dense), module, name)
        return out


class Deserialize(_OfOurWeights):
    """Quantized weights of a checkpoint."""

    def convert(
        self,
        input_dict: Tensors,
        *,
        model: nn.Module,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> Tensors:
        """{"weight": codes, "weight.absmax": scales, ...} to {"weight": quantized Parameter}.

        A dense weight, alone, becomes one of the dtype that the model is loaded in. Raises ValueError if layer and
        entries do not fit.
        """
        self._miss_weights_only(missing_keys)
        tensors = {key: _single(value) for key, value in input_dict.items()}
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        if not isinstance(module, QuantizedModule):
            if len(tensors) > 1:
                raise ValueError(f"{full_layer_name} is quantized in the checkpoint, its config.json leaves it alone")
            return {key: _cast(model, full_layer_name, tensor) for key, tensor in tensors.items()}
        loaded = checkpoint.from_tensors(tensors, "weight", dtype=module.weight.dtype)
        return {"weight": _parameter(loaded, module, full_layer_name)}


def _cast(model: Any, name: str, tensor: Tensor) -> Tensor:
    # The loader leaves the dtype to the operation, because the parts of a quantized weight have to keep theirs.
    dtype: torch.dtype = model.get_parameter_or_buffer(name).dtype
    kept = any(pattern in name for pattern in model._get_dtype_plan(dtype))  # in fp32, whatever the model is loaded in
    return tensor if kept or not tensor.is_floating_point() else tensor.to(dtype)


def _single(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor


def _quantized_module(model: nn.Module, name: str) -> QuantizedModule:
    module = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(module, QuantizedModule), name
    return module


def _parameter(weight: QTensor, module: QuantizedModule, name: str) -> nn.Parameter:
    expected = module.weight
    if weight.shape != expected.shape or not expected.same_layout(weight):
        raise ValueError(f"{name}: the checkpoint has {weight.format_name} {list(weight.shape)}, the model wants other")
    weight.search = expected.search
    return nn.Parameter(weight, requires_grad=False)
