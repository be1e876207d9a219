"""Linear layers whose weight is a QTensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from polybit import checkpoint, functional
from polybit.formats import Format, get_format
from polybit.qtensor import QTensor, check_block_size, quantize

Self = TypeVar("Self", bound="QuantizedLinear")


class QuantizedLinear(nn.Module):
    """What the quantized linear layers share: a QTensor weight [out, in], an optional bias, and a plain state dict.

    state_dict() holds plain tensors only (polybit.checkpoint has the layout). load_state_dict() takes them back, into a
    module of the same format, block size and double quantization, with `assign=True` also on the meta device; a damaged
    entry raises ValueError and leaves this module as it was.
    """

    in_features: int
    out_features: int
    weight: QTensor
    bias: nn.Parameter | None

    def _setup(self, weight: Tensor, bias: nn.Parameter | None, quantized: QTensor) -> None:
        self.out_features, self.in_features = weight.shape
        self.register_parameter("weight", nn.Parameter(quantized, requires_grad=False))
        self.register_parameter("bias", bias)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # torch moves or casts a wrapper parameter by swapping it, which fails once torch.compile or torch.export has
        # seen it (they keep weak references). Nothing trains the weight, so it gets a new Parameter instead.
        weight = self.weight
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            weight = cast(QTensor, nn.Parameter(fn(weight.detach()), requires_grad=False))
        finally:
            self._parameters["weight"] = cast(nn.Parameter, weight)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "weight"]
        destination.update(checkpoint.to_tensors(self.weight, prefix + "weight"))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        mine = checkpoint.owned_keys(state_dict, key)
        loaded = self._read(state_dict, key) if mine else None
        rest = {name: value for name, value in state_dict.items() if name not in mine}
        errors_before, missing = len(error_msgs), list[str]()
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys.extend(name for name in missing if loaded is None or name != key)
        if loaded is None or len(error_msgs) > errors_before:
            return
        with torch.no_grad():
            if local_metadata.get("assign_to_params_buffers", False):
                self.weight = cast(QTensor, nn.Parameter(loaded, requires_grad=False))
            else:
                self.weight.copy_(loaded)

    def _read(self, state_dict: dict[str, Any], key: str) -> QTensor:
        own = self.weight
        loaded = checkpoint.from_tensors(state_dict, key, dtype=own.dtype if own.format.kind == "int8" else None)
        if loaded.shape != own.shape:
            raise ValueError(f"load_state_dict: {key} has shape {list(loaded.shape)}, wanted {list(own.shape)}")
        if not own.same_layout(loaded):
            raise ValueError(f"load_state_dict: {key} is {_describe(loaded)}, the module is {_describe(own)}")
        loaded.search = own.search  # not recorded: it says how to quantize again, not how to read
        return loaded


def _describe(weight: QTensor) -> str:
    return f"{weight.format_name}, block size {weight.block_size}, double_quant={weight.double_quant}"


def _new_linear(
    in_features: int, out_features: int, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Linear:
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")
    return nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)


def _linear_format(format: str | Format) -> Format:
    format = get_format(format)
    if format.kind != "kbit":
        raise ValueError(f"LinearKbit: {format.name} is not a k-bit format; use Linear8bit for int8")
    return format


class LinearKbit(QuantizedLinear):
    """y = x W^T + b with W in a k-bit format.

    weight: QTensor [out_features, in_features]; bias: [out_features] or None, trainable. `format`, `block_size`,
    `double_quant`, `search`: as in polybit.quantize. A new layer is initialised as nn.Linear is, then quantized;
    `from_linear` quantizes a trained one. x: fp32, fp16 or bf16 [..., in_features]; y in x's dtype. Gradients reach x
    and the bias. Raises ValueError for a format that is not k-bit, a wrong block size or size.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str | Format = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        search: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        format = _linear_format(format)
        check_block_size(block_size)
        linear = _new_linear(in_features, out_features, bias, device, dtype)
        self._from(linear, format, block_size, double_quant, search)

    def _from(self, linear: nn.Linear, format: Format, block_size: int, double_quant: bool, search: bool) -> None:
        quantized = quantize(
            linear.weight.detach(), format, block_size=block_size, double_quant=double_quant, search=search
        )
        self._setup(linear.weight, linear.bias, quantized)

    @classmethod
    def from_linear(
        cls: type[Self],
        linear: nn.Linear,
        format: str | Format = "nf4",
        *,
        block_size: int = 64,
        double_quant: bool = True,
        search: bool = False,
    ) -> Self:
        """A layer with the quantized weight of `linear`, on its device; the bias parameter is shared, not copied."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        assert isinstance(self, LinearKbit)
        self._from(linear, _linear_format(format), block_size, double_quant, search)
        return self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype."""
        return functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        weight = self.weight
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={weight.format_name}, block_size={weight.block_size}, double_quant={weight.double_quant}"
        )


class Linear4bit(LinearKbit):
    """LinearKbit under the name that 4-bit users look for; the format defaults to nf4."""


class Linear8bit(QuantizedLinear):
    """y = x W^T + b by LLM.int8(): W int8 by rows, x quantized to int8 by rows on the fly.

    `threshold`: columns of x that hold an |x| >= threshold are multiplied in high precision; 0: none, plain int8.
    weight: QTensor "int8" [out_features, in_features]. x: fp32, fp16 or bf16; y in x's dtype. Gradients reach x (the
    rounding taken as the identity) and the bias. Raises ValueError for a negative threshold or a wrong size.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        threshold: float = 6.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._from(_new_linear(in_features, out_features, bias, device, dtype), threshold)

    def _from(self, linear: nn.Linear, threshold: float) -> None:
        if not threshold >= 0:
            raise ValueError(f"Linear8bit: threshold must be 0 or positive, got {threshold}")
        self.threshold = float(threshold)
        self._setup(linear.weight, linear.bias, quantize(linear.weight.detach(), "int8"))

    @classmethod
    def from_linear(cls: type[Self], linear: nn.Linear, *, threshold: float = 6.0) -> Self:
        """A layer with the quantized weight of `linear`, on its device; the bias parameter is shared, not copied."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        assert isinstance(self, Linear8bit)
        self._from(linear, threshold)
        return self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype."""
        return functional.linear_int8(x, self.weight, self.bias, threshold=self.threshold)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"threshold={self.threshold}"
        )
