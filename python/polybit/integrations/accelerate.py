"""accelerate: the sizes that it counts, and models that are offloaded when they are loaded already.

Its hooks take the state dict of the model for the weights, in which a quantized one is several plain tensors. Its
estimates go by dtypes, and the dtype of a quantized weight is that of what it stands for.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from accelerate import utils
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import modeling, named_module_tensors
from torch import nn

from polybit.integrations.offload import whole_weights
from polybit.qtensor import QTensor

_init_hook = AlignDevicesHook.init_hook
_compute_module_sizes = modeling.compute_module_sizes


@wraps(_init_hook)
def _init_hook_with_whole_weights(hook: Any, module: nn.Module) -> nn.Module:
    if hook.offload and hook.weights_map is not None:
        tensors = named_module_tensors(module, recurse=hook.place_submodules)
        quantized = {name: tensor for name, tensor in tensors if isinstance(tensor, QTensor)}
        hook.weights_map = whole_weights(hook.weights_map, quantized)
    made: nn.Module = _init_hook(hook, module)
    return made


@wraps(_compute_module_sizes)
def _compute_stored_sizes(
    model: nn.Module, dtype: Any = None, special_dtypes: Any = None, buffers_only: bool = False
) -> dict[str, float]:
    sizes: dict[str, float] = _compute_module_sizes(model, dtype, special_dtypes, buffers_only)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, QTensor) and not buffers_only and name not in (special_dtypes or ()):
            difference = parameter.stored_bytes - sizes[name]
            parts = name.split(".")
            for end in range(len(parts) + 1):
                sizes[".".join(parts[:end])] += difference
    return sizes


AlignDevicesHook.init_hook = _init_hook_with_whole_weights
modeling.compute_module_sizes = utils.compute_module_sizes = _compute_stored_sizes
