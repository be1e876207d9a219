"""4-bit parameters of any module, whatever their shape: a stack of experts, say."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from polybit.compat.bitsandbytes import functional
from polybit.compat.bitsandbytes.functional import QuantState


class Bnb4bitParametrization(nn.Module):
    """Restores a parameter from its packed codes whenever it is read."""

    def __init__(self, quant_state: QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        """Codes [bytes, 1] -> the values, in shape and dtype of the state."""
        return functional.dequantize_4bit(quantized_param, self.quant_state)


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantize a parameter of a module; reading it restores the value, the state dict has the codes.

    Raises AttributeError if there is no such attribute, TypeError if it is no parameter.
    """
    param = _parameter(module, param_name)
    codes, state = functional.quantize_4bit(
        param.data, blocksize=blocksize, compress_statistics=compress_statistics, quant_type=quant_type
    )
    setattr(module, param_name, nn.Parameter(codes, requires_grad=False))
    _parametrize(module, param_name, state)


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: dict[str, Any], device: torch.device | str
) -> None:
    """As replace_parameter_4bit, of a parameter that holds the codes already; qs_dict: the entries beside them."""
    _parameter(module, param_name)
    _parametrize(module, param_name, QuantState.from_dict(qs_dict, device))


def _parameter(module: nn.Module, name: str) -> nn.Parameter:
    if not hasattr(module, name):
        raise AttributeError(f"{type(module).__name__} has no parameter {name!r}")
    param = getattr(module, name)
    if not isinstance(param, nn.Parameter):
        raise TypeError(f"{type(module).__name__}.{name} must be a parameter, got {type(param).__name__}")
    return param


def _parametrize(module: nn.Module, name: str, state: QuantState) -> None:
    parametrize.register_parametrization(module, name, Bnb4bitParametrization(state), unsafe=True)
    module.register_state_dict_post_hook(partial(_save, name=name))  # type: ignore[no-untyped-call]
    # Within a forward pass of the module the value is restored once; also if the pass ends by an exception, as the
    # recomputation of a checkpointed one does.
    module.register_forward_pre_hook(_start_cache)
    module.register_forward_hook(_end_cache, always_call=True)


def _start_cache(module: nn.Module, inputs: Any) -> None:
    parametrize._cache_enabled += 1


def _end_cache(module: nn.Module, inputs: Any, output: Any) -> None:
    parametrize._cache_enabled = max(0, parametrize._cache_enabled - 1)
    if not parametrize._cache_enabled:
        parametrize._cache = {}


def _save(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *, name: str) -> None:
    original = f"{prefix}parametrizations.{name}.original"
    if original not in state_dict:
        return
    state_dict[prefix + name] = state_dict.pop(original)
    for part in module.parametrizations[name]:
        if isinstance(part, Bnb4bitParametrization):
            for key, value in part.quant_state.as_dict(packed=True).items():
                state_dict[f"{prefix}{name}.{key}"] = value
