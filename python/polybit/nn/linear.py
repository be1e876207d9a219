"""Linear layers whose weight is a QTensor."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from polybit import functional
from polybit.distributed import local
from polybit.formats import Format
from polybit.nn.module import QuantizedModule, check_sizes, check_weight, kbit_format
from polybit.qtensor import KERNEL_DTYPES, QTensor, check_block_size, quantize

Kbit = TypeVar("Kbit", bound="LinearKbit")
Int8 = TypeVar("Int8", bound="Linear8bit")


class QuantizedLinear(QuantizedModule, nn.Linear):
    """What the quantized linear layers share: a weight [out_features, in_features] and an optional bias.

    It is an nn.Linear, so that what looks for those (adapters of PEFT) finds it.
    """

    weight: QTensor
    bias: nn.Parameter | None  # type: ignore[assignment]

    def _setup(
        self, weight: QTensor, bias: nn.Parameter | None, compute_dtype: torch.dtype | None, activations: str | None
    ) -> None:
        self.out_features, self.in_features = weight.shape
        self._adopt(weight)
        self.register_parameter("bias", bias)
        self._compute_dtype = compute_dtype if compute_dtype is None else as_compute_dtype(compute_dtype)
        functional.check_activations(activations)
        self.activations = activations

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that x is converted to before the product, and y back from; not asked for: that of the weight."""
        return self._compute_dtype or self.weight.dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        self._compute_dtype = dtype if dtype is None else as_compute_dtype(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype."""
        wanted = self._compute_dtype
        if wanted is None or functional.autocast_is_on(x):
            return self._product(x)
        return self._product(x.to(wanted)).to(x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        options = [f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"]
        if self._compute_dtype is not None:
            options.append(f"compute_dtype={self._compute_dtype}")
        if self.activations is not None:
            options.append(f"activations={self.activations!r}")
        return ", ".join(options)


def check_linear(linear: nn.Module) -> None:
    """Raise TypeError unless it is an nn.Linear."""
    if not isinstance(linear, nn.Linear):
        hint = "; from_conv1d takes that of GPT-2" if type(linear).__name__ == "Conv1D" else ""
        raise TypeError(f"from_linear: expected a torch.nn.Linear, got {type(linear).__name__}{hint}")


def check_threshold(threshold: float) -> None:
    """Raise TypeError or ValueError unless `threshold` is a number, 0 or positive."""
    if not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold must be a number, 0 or positive, got {threshold!r}")
    if not threshold >= 0:
        raise ValueError(f"threshold must be 0 or positive, got {threshold}")


def as_compute_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype that layers can compute in, also by its name. Raises ValueError for any other."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in KERNEL_DTYPES:
        raise ValueError(f"compute_dtype must be float32, float16 or bfloat16, got {dtype!r}")
    return cast(torch.dtype, found)


class LinearKbit(QuantizedLinear):
    """y = x W^T + b with W in a k-bit format.

    weight: QTensor [out_features, in_features]; bias: [out_features] or None, trainable. `format`, `block_size`,
    `double_quant`, `search`: as in polybit.quantize. A new layer is initialised as nn.Linear is, then quantized;
    `from_linear` quantizes a trained one. x: fp32, fp16 or bf16 [..., in_features]; y in x's dtype. Gradients reach x
    and the bias. `compute_dtype`: the product is computed in it (None: in x's dtype; under autocast, in autocast's), x
    may then have any floating dtype. `activations`: as in polybit.functional.linear. Raises ValueError for a format
    that is not k-bit, a wrong block size or size, another compute_dtype or other activations.
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
        compute_dtype: torch.dtype | None = None,
        activations: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        format = kbit_format(format, type(self).__name__, "Linear8bit")
        check_block_size(block_size)
        check_sizes(in_features=in_features, out_features=out_features)
        dense = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        weight = quantize(dense.weight, format, block_size=block_size, double_quant=double_quant, search=search)
        self._setup(weight, dense.bias, compute_dtype, activations)

    @classmethod
    def from_weight(
        cls: type[Kbit],
        weight: QTensor,
        bias: nn.Parameter | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
        activations: str | None = None,
    ) -> Kbit:
        """A layer of a k-bit QTensor [out, in]; a Parameter is shared, not copied. Raises TypeError or ValueError."""
        check_weight(cls.__name__, weight, "kbit")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._setup(weight, bias, compute_dtype, activations)
        return self

    @classmethod
    def from_linear(
        cls: type[Kbit],
        linear: nn.Linear,
        format: str | Format = "nf4",
        *,
        block_size: int = 64,
        double_quant: bool = True,
        search: bool = False,
        compute_dtype: torch.dtype | None = None,
        activations: str | None = None,
    ) -> Kbit:
        """A layer with the quantized weight of `linear`, on its device; the bias parameter is shared, not copied.

        Raises TypeError if `linear` is no nn.Linear.
        """
        check_linear(linear)
        dense, format = linear.weight, kbit_format(format, cls.__name__, "Linear8bit")
        weight = quantize(dense, format, block_size=block_size, double_quant=double_quant, search=search)
        options: Any = {"compute_dtype": compute_dtype, "activations": activations}
        return cls.from_weight(weight, linear.bias, **options).train(linear.training)

    @classmethod
    def from_conv1d(
        cls: type[Kbit],
        conv1d: nn.Module,
        format: str | Format = "nf4",
        *,
        block_size: int = 64,
        double_quant: bool = True,
        search: bool = False,
        compute_dtype: torch.dtype | None = None,
        activations: str | None = None,
    ) -> Kbit:
        """A layer that does what the Conv1D of GPT-2 does: its weight [in, out], transposed, is quantized."""
        dense, format = transposed_weight(conv1d), kbit_format(format, cls.__name__, "Linear8bit")
        weight = quantize(dense, format, block_size=block_size, double_quant=double_quant, search=search)
        options: Any = {"compute_dtype": compute_dtype, "activations": activations}
        return cls.from_weight(weight, conv1d.bias, **options).train(conv1d.training)  # type: ignore[arg-type]

    def _product(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias, activations=self.activations)

    def extra_repr(self) -> str:
        weight = local(self.weight)
        return (
            f"{super().extra_repr()}, format={weight.format_name}, block_size={weight.block_size}, "
            f"double_quant={weight.double_quant}"
        )


class Linear4bit(LinearKbit):
    """LinearKbit under the name that 4-bit users look for; the format defaults to nf4."""


class Linear8bit(QuantizedLinear):
    """y = x W^T + b by LLM.int8(): W int8 by rows, x quantized to int8 by rows on the fly.

    `threshold`: columns of x that hold an |x| >= threshold are multiplied in high precision; 0: none, plain int8.
    weight: QTensor "int8" [out_features, in_features]. x: fp32, fp16 or bf16; y in x's dtype. Gradients reach x (the
    rounding taken as the identity) and the bias. `compute_dtype`: as in LinearKbit. Raises ValueError for a negative
    threshold, a wrong size or another compute_dtype.
    """

    threshold: float

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        threshold: float = 6.0,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        check_threshold(threshold)
        check_sizes(in_features=in_features, out_features=out_features)
        dense = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.threshold = float(threshold)
        self._setup(quantize(dense.weight, "int8"), dense.bias, compute_dtype, "int8")

    @classmethod
    def from_weight(
        cls: type[Int8],
        weight: QTensor,
        bias: nn.Parameter | None = None,
        *,
        threshold: float = 6.0,
        compute_dtype: torch.dtype | None = None,
    ) -> Int8:
        """A layer of an int8 QTensor [out, in]; a Parameter is shared, not copied. Raises TypeError or ValueError."""
        check_weight(cls.__name__, weight, "int8")
        check_threshold(threshold)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.threshold = float(threshold)
        self._setup(weight, bias, compute_dtype, "int8")
        return self

    @classmethod
    def from_linear(
        cls: type[Int8], linear: nn.Linear, *, threshold: float = 6.0, compute_dtype: torch.dtype | None = None
    ) -> Int8:
        """A layer with the quantized weight of `linear`, on its device; the bias parameter is shared, not copied.

        Raises TypeError if `linear` is no nn.Linear.
        """
        check_linear(linear)
        weight = quantize(linear.weight, "int8")
        options: Any = {"threshold": threshold, "compute_dtype": compute_dtype}
        return cls.from_weight(weight, linear.bias, **options).train(linear.training)

    @classmethod
    def from_conv1d(
        cls: type[Int8], conv1d: nn.Module, *, threshold: float = 6.0, compute_dtype: torch.dtype | None = None
    ) -> Int8:
        """A layer that does what the Conv1D of GPT-2 does: its weight [in, out], transposed, is quantized."""
        weight = quantize(transposed_weight(conv1d), "int8")
        options: Any = {"threshold": threshold, "compute_dtype": compute_dtype}
        return cls.from_weight(weight, conv1d.bias, **options).train(conv1d.training)  # type: ignore[arg-type]

    def _product(self, x: Tensor) -> Tensor:
        return functional.linear_int8(x, self.weight, self.bias, threshold=self.threshold)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold}"


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is the Conv1D of GPT-2 (transformers.pytorch_utils): y = x W + b with W [in, out = nf].

    Known by its name and attributes, so that transformers need not be installed.
    """
    if type(module).__name__ != "Conv1D":
        return False
    weight, nf = getattr(module, "weight", None), getattr(module, "nf", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[1] == nf


def transposed_weight(conv1d: nn.Module) -> Tensor:
    """The weight of a Conv1D as that of a Linear, [out, in]. Raises TypeError if it is no Conv1D."""
    if not is_conv1d(conv1d):
        raise TypeError(f"from_conv1d: expected the Conv1D of GPT-2 (weight [in, nf]), got {type(conv1d).__name__}")
    assert isinstance(conv1d.weight, Tensor)
    return conv1d.weight.detach().t()
