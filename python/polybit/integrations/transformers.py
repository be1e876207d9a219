"""transformers: ``from_pretrained(folder, quantization_config=PolybitConfig("nf4"))``, and from such a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import AutoHfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from polybit import checkpoint
from polybit.formats import Format, list_formats
from polybit.integrations.offload import offloaded, read_back
from polybit.nn import Settings, dequantize_, is_quantizable, make_empty_, quantize_
from polybit.nn.convert import Override, check_rules, matches, read_override
from polybit.nn.linear import is_conv1d
from polybit.nn.module import QuantizedModule
from polybit.qtensor import QTensor, state_name

__all__ = ["PolybitConfig"]

METHOD = "polybit"


@register_quantization_config(METHOD)
class PolybitConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How `from_pretrained` quantizes a model; what a checkpoint's config.json records.

    format, block_size, double_quant, search, threshold, compute_dtype, activations, skip, embeddings, overrides: as in
    polybit.nn.quantize_, which replaces the layers. Formats are recorded by name: one of your own must be registered
    before the checkpoint is loaded. Raises ValueError or TypeError for a setting that no layer can have, or an unknown
    one.
    """

    def __init__(
        self,
        format: str | Format = "nf4",
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
        quant_method: str = METHOD,
    ) -> None:
        if quant_method != METHOD:
            raise ValueError(f"PolybitConfig: quant_method must be {METHOD!r}, got {quant_method!r}")
        check_rules("PolybitConfig", skip, overrides)
        base = Settings(format, block_size, double_quant, search, threshold, compute_dtype, activations)
        rules = {pattern: read_override(f"overrides[{pattern!r}]", o, base) for pattern, o in (overrides or {}).items()}
        self.quant_method = METHOD
        self.format, self.block_size, self.double_quant = base.format, base.block_size, base.double_quant
        self.search, self.threshold = base.search, base.threshold
        self.compute_dtype, self.activations = base.compute_dtype, base.activations
        self.skip = None if skip is None else list(skip)
        self.embeddings = bool(embeddings)
        self.overrides = {pattern: asdict(settings) if settings else None for pattern, settings in rules.items()}

    def prepare(self, model: nn.Module, dense: Iterable[str] = (), stacks: bool = True) -> None:
        """Replace the layers of `model`, on the meta device, by quantized ones without content.

        dense: layers that share their weight with an embedding that the checkpoint has not quantized. stacks: whether
        stacks of experts are quantized, too.
        """
        settings = {name: value for name, value in self.to_dict().items() if name != "quant_method"}
        if self.skip is not None:  # by default they follow the embedding
            settings["skip"] = [*self.skip, *dense]
        from polybit.integrations import experts

        layers = [name for name, module in model.named_modules() if is_quantizable(module)]
        settings["overrides"] = {
            pattern: override
            for pattern, override in self.overrides.items()
            if any(matches(name, pattern) for name in layers) or not experts.is_stack(model, pattern)
        }
        quantize_(model, **settings)
        if stacks:
            experts.prepare(model, self)


class BitsandbytesCheckpoint(PolybitConfig):
    """How a checkpoint of bitsandbytes was quantized, by what its config.json records. It is saved as one, too."""

    def __init__(self, recorded: Mapping[str, Any]) -> None:
        if recorded.get("load_in_8bit"):
            super().__init__("int8", threshold=recorded.get("llm_int8_threshold", 6.0))
        else:
            format, double_quant = recorded.get("bnb_4bit_quant_type"), recorded.get("bnb_4bit_use_double_quant")
            compute_dtype = recorded.get("bnb_4bit_compute_dtype")
            super().__init__(format or "fp4", double_quant=bool(double_quant), compute_dtype=compute_dtype)
        self.recorded = dict(recorded)

    def to_dict(self) -> dict[str, Any]:
        """What the checkpoint recorded."""
        return dict(self.recorded)

    def prepare(self, model: Any, dense: Iterable[str] = (), stacks: bool = True) -> None:
        """As transformers chooses layers for bitsandbytes, which is not how polybit does."""
        skip = self.recorded.get("llm_int8_skip_modules")
        kept = HfQuantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
        options: Any = {"threshold": self.threshold, "compute_dtype": self.compute_dtype}
        settings = Settings(self.format, self.block_size, self.double_quant, **options)
        linear = [name for name, module in model.named_modules() if type(module) is nn.Linear or is_conv1d(module)]
        make_empty_(model, {name: settings for name in linear if should_convert_module(name, kept)})


@register_quantizer(METHOD)
class PolybitQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers asks while it loads, saves, compiles or trains a model that a PolybitConfig describes."""

    quantization_config: PolybitConfig

    def __init__(self, quantization_config: PolybitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.conv1d: set[str] = set()  # layers whose dense weight is stored [in, out]
        self.stacks: set[str] = set()  # the last two parts of the names of quantized stacks of experts
        self.device_map: Mapping[str, Any] = {"": "cpu"}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Remember which layers go to a disk. Called again with what "auto" has become."""
        self.device_map = device_map if isinstance(device_map, Mapping) else {"": "cpu"}

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes of an element, for maps of devices: of a quantized weight its share of codes and scales."""
        return param.stored_bytes / param.numel() if isinstance(param, QTensor) else param.element_size()

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is the weight of a quantized layer, or a stack of experts."""
        name, _, last = param_name.rpartition(".")
        module = model.get_submodule(name)
        return isinstance(module, QuantizedModule) and last in module.quantized

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        """Put the quantized layers in, still without content."""
        from polybit.integrations import experts

        # transformers ties them later: until then it would seem that each layer has a weight of its own.
        for tied, source in model.all_tied_weights_keys.items():
            layer, _, last = tied.rpartition(".")
            setattr(model.get_submodule(layer), last, model.get_parameter(source))
        before = {name for name, module in model.named_modules() if is_conv1d(module)}
        keys = _keys(checkpoint_files or []) if self.pre_quantized else set()
        stored = _stored_dense(keys)
        dense = [tied for tied, source in model.all_tied_weights_keys.items() if _is_among(source, stored)]
        self.stacks = {f"{name.rpartition('.')[2]}.{last}" for name, _, last in experts.stacks(model)}
        # In a quantized checkpoint without a quantized stack all experts are dense, as they were left alone.
        stacked = not self.pre_quantized or any(
            f".{stack}.{part}" in key for stack in self.stacks for part in ("absmax", "SCB") for key in keys
        )
        self.quantization_config.prepare(model, [name.removesuffix(".weight") for name in dense], stacked)
        self.conv1d = {name for name in before if isinstance(model.get_submodule(name), QuantizedModule)}
        self.loading = model.register_state_dict_post_hook(_whole_weights)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Save as the state dict is: it has the layout of a checkpoint already. Count quantized weights as they are."""
        from polybit.integrations import experts

        self.loading.remove()
        del self.loading
        # Of a quantized stack of experts nothing can be made for each expert.
        whole = experts.has_quantized(model)
        model._weight_conversions = [
            c for c in model._weight_conversions or [] if not _is_ours(c) and not (whole and experts.makes_stack(c))
        ]
        model.get_memory_footprint = partial(_memory_footprint, model)
        read_back(model)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What save_pretrained writes where layers are offloaded: transformers finds whole weights there, no parts."""
        away = offloaded(model)
        if not away:
            return None, {}
        state = model.state_dict()
        for name, weights in away.items():
            for last in cast(QuantizedModule, model.get_submodule(name)).quantized:
                state |= checkpoint.to_tensors(cast(QTensor, weights[last]), f"{name}.{last}")
        return state, {}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        from polybit.integrations import experts

        if any(isinstance(parameter, QTensor) and parameter.is_meta for parameter in model.parameters()):
            raise ValueError(
                "dequantize: layers are offloaded; load the model without cpu or disk in device_map, or take the hooks "
                "away: accelerate.hooks.remove_hook_from_submodules(model)"
            )
        whole = experts.has_quantized(model)
        dequantize_(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        if whole:
            experts.restore(model)
        for name in self.conv1d:
            _restore_conv1d(model, name)
        return model

    def get_quantize_ops(self) -> Any:
        """The operation for a weight that comes dense."""
        from polybit.integrations.loading import Quantize

        return Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        """The conversions of the model and those of ours. Experts are quantized one by one where they come as such."""
        from polybit.integrations.loading import expert_by_expert

        conversions = super().update_weight_conversions(weight_conversions, *model)  # 5.20 comes without a model
        return conversions if self.pre_quantized else [expert_by_expert(conversion) for conversion in conversions]

    def get_weight_conversions(self) -> list[Any]:
        """What makes a weight of its entries in a checkpoint (polybit.checkpoint has them).

        Every one is a "weight", or a stack of experts.
        """
        from transformers.core_model_loading import WeightConverter

        from polybit.integrations.loading import Deserialize

        if not self.pre_quantized:
            return []
        parts = ["absmax", "quant_map", "nested_absmax", "nested_quant_map"]
        parts += [f"quant_state.{state_name(format)}" for format in list_formats() if format != "int8"]
        # The first name that fits counts, for transformers 5.20 also one that the key goes on behind.
        int8 = ["SCB", "weight_format"]
        converters = []
        for stack in sorted(self.stacks):
            pattern = re.escape(f".{stack}")  # no part of ".shared_experts.down_proj.weight"
            names = [*(f"{pattern}.{part}" for part in (*parts, *int8)), pattern]
            converters.append(WeightConverter(names, f".{stack}", [Deserialize(self)]))
        names = [*(f"weight.{part}" for part in parts), *int8, "weight"]
        converters.append(WeightConverter(names, "weight", [Deserialize(self)]))
        return converters

    def is_serializable(self) -> bool:
        """save_pretrained works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The layers are traced without a graph break."""
        return True


def _stored_dense(keys: set[str]) -> set[str]:
    """The weights that a checkpoint holds as they are."""
    weights = {key for key in keys if key.endswith(".weight")}
    parts = {key.rpartition(".weight.")[0] + ".weight" for key in keys - weights}
    return {key for key in weights - parts if key.removesuffix("weight") + "SCB" not in keys}


def _keys(files: Iterable[str]) -> set[str]:
    """The names of what a checkpoint holds."""
    keys: set[str] = set()
    for file in files:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                keys.update(opened.keys())
    return keys


def _is_among(name: str, stored: set[str]) -> bool:
    """Whether a parameter is there; the body alone was saved without its prefix."""
    return any(name == key or name.endswith(f".{key}") for key in stored)


def _whole_weights(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """While transformers loads, a state dict has the weights themselves: their parts have no parameter of their own."""
    for name, module in model.named_modules(prefix=prefix.removesuffix("."), remove_duplicate=False):
        if isinstance(module, QuantizedModule):
            for last, weight in module.quantized_weights().items():
                key = f"{name}.{last}"
                for part in checkpoint.to_tensors(weight, key):
                    del state[part]
                state[key] = weight


def _memory_footprint(model: Any, return_buffers: bool = True) -> int:
    """Bytes of all parameters and buffers, quantized weights as they are stored."""
    weights = [parameter for parameter in model.parameters() if isinstance(parameter, QTensor)]
    dense = sum(weight.numel() * weight.element_size() for weight in weights)
    counted: int = type(model).get_memory_footprint(model, return_buffers)
    return counted - dense + sum(weight.stored_bytes for weight in weights)


def _is_ours(conversion: Any) -> bool:
    return any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))


def _restore_conv1d(model: nn.Module, name: str) -> None:
    from transformers.pytorch_utils import Conv1D

    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    with torch.device("meta"):
        conv1d = Conv1D(linear.out_features, linear.in_features)
    conv1d.weight = nn.Parameter(linear.weight.detach().t().contiguous())
    conv1d.bias = linear.bias
    model.set_submodule(name, conv1d.train(linear.training))


_merge = AutoHfQuantizer.merge_quantization_configs


def _merge_quantization_configs(recorded: Any, asked: Any) -> Any:
    """Let a PolybitConfig open a checkpoint of bitsandbytes, which transformers refuses as another class of config."""
    entries = recorded if isinstance(recorded, Mapping) else recorded.to_dict()
    if isinstance(asked, PolybitConfig) and (entries.get("load_in_4bit") or entries.get("load_in_8bit")):
        return BitsandbytesCheckpoint(entries)
    return _merge(recorded, asked)


AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge_quantization_configs)
