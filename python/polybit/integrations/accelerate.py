"""accelerate: models that are offloaded when they are loaded already (cpu_offload, disk_offload, dispatch_model).

Its hooks take the state dict of the model for the weights, in which a quantized one is several plain tensors.
"""

from __future__ import annotations

from typing import Any

from accelerate.hooks import AlignDevicesHook
from accelerate.utils import named_module_tensors
from torch import nn

from polybit.integrations.offload import whole_weights
from polybit.qtensor import QTensor

_init_hook = AlignDevicesHook.init_hook


def _init_hook_with_whole_weights(hook: Any, module: nn.Module) -> nn.Module:
    if hook.offload and hook.weights_map is not None:
        tensors = named_module_tensors(module, recurse=hook.place_submodules)
        quantized = {name: tensor for name, tensor in tensors if isinstance(tensor, QTensor)}
        hook.weights_map = whole_weights(hook.weights_map, quantized)
    made: nn.Module = _init_hook(hook, module)
    return made


AlignDevicesHook.init_hook = _init_hook_with_whole_weights
