"""Which module becomes which: the dense modules that have a quantized counterpart, and how it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from polybit.formats import Format, get_format
from polybit.functional import check_activations
from polybit.nn.embedding import Embedding4bit, Embedding8bit, EmbeddingKbit, check_embedding
from polybit.nn.linear import (
    Linear4bit,
    Linear8bit,
    LinearKbit,
    QuantizedLinear,
    as_compute_dtype,
    check_threshold,
    is_conv1d,
    transposed_weight,
)
from polybit.nn.module import QuantizedModule
from polybit.qtensor import QTensor, check_block_size, check_flags, quantize


@dataclass(frozen=True)
class Settings:
    """How a module is quantized.

    format: a k-bit format or "int8", kept by name. block_size, double_quant, search: as in polybit.quantize, for k-bit
    formats. threshold: as in Linear8bit. compute_dtype (kept by name), activations: as in LinearKbit, of linear layers
    (those of int8 are int8 in any case). Raises TypeError or ValueError for what no module can have.
    """

    format: str | Format
    block_size: int = 64
    double_quant: bool = True
    search: bool = False
    threshold: float = 6.0
    compute_dtype: torch.dtype | str | None = None
    activations: str | None = None

    def __post_init__(self) -> None:
        format = get_format(self.format)
        if format.kind == "blockwise":
            raise ValueError(f"{format.name} has no linear layer and no embedding; choose a k-bit format or int8")
        check_block_size(self.block_size)
        check_flags(double_quant=self.double_quant, search=self.search)
        if self.search and format.kind == "int8":
            raise ValueError("the scale search is for k-bit formats, int8 has none")
        check_threshold(self.threshold)
        check_activations(self.activations)
        if self.compute_dtype is not None:
            name = str(as_compute_dtype(self.compute_dtype)).removeprefix("torch.")
            object.__setattr__(self, "compute_dtype", name)
        object.__setattr__(self, "format", format.name)

    @classmethod
    def of(cls, weight: QTensor, **behaviour: Any) -> Settings:
        """The settings that lead to the layout of `weight`. behaviour: those that it does not show."""
        if weight.format.kind == "int8":
            return cls(weight.format, **behaviour)
        return cls(weight.format, weight.block_size, weight.double_quant, weight.search, **behaviour)

    def quantize(self, weight: Tensor) -> QTensor:
        """`weight` [rows, columns] quantized so."""
        if get_format(self.format).kind == "int8":
            return quantize(weight, "int8")
        options = {"double_quant": self.double_quant, "search": self.search}
        return quantize(weight, self.format, block_size=self.block_size, **options)


def is_quantizable(module: nn.Module) -> bool:
    """Whether `module` has a counterpart: an nn.Linear, an nn.Embedding or the Conv1D of GPT-2.

    Subclasses have none: their forward may be another.
    """
    return type(module) in (nn.Linear, nn.Embedding) or is_conv1d(module)


def check_quantizable(module: nn.Module, name: str) -> None:
    """Raise ValueError if `module`, one that is_quantizable, has an option that its counterpart cannot honour."""
    if isinstance(module, nn.Embedding):
        check_embedding(module, name)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a quantizable module as its counterpart holds it: a row for each output or index."""
    return transposed_weight(module) if is_conv1d(module) else cast(Tensor, module.weight).detach()


def counterpart(module: nn.Module, settings: Settings, weight: QTensor) -> nn.Module:
    """What `module` becomes: the quantized module around `weight` (a Parameter is shared), with the same bias."""
    format = get_format(settings.format)
    new: nn.Module
    if isinstance(module, nn.Embedding):
        table = Embedding8bit if format.kind == "int8" else Embedding4bit if format.bits == 4 else EmbeddingKbit
        new = table.from_weight(weight, module.padding_idx)
    else:
        bias = cast("nn.Parameter | None", module.bias)
        dtype = None if settings.compute_dtype is None else as_compute_dtype(settings.compute_dtype)
        if format.kind == "int8":
            new = Linear8bit.from_weight(weight, bias, threshold=settings.threshold, compute_dtype=dtype)
        else:
            layer = Linear4bit if format.bits == 4 else LinearKbit
            new = layer.from_weight(weight, bias, compute_dtype=dtype, activations=settings.activations)
    return new.train(module.training)


def dense_counterpart(module: QuantizedModule, weight: nn.Parameter) -> nn.Module:
    """What a quantized module stands for: an nn.Linear or nn.Embedding around `weight`, with the same bias."""
    rows, columns = weight.shape
    new: nn.Linear | nn.Embedding
    if isinstance(module, QuantizedLinear):
        new = nn.Linear(columns, rows, bias=False, device="meta")
        new.register_parameter("bias", module.bias)
    else:
        new = nn.Embedding(rows, columns, cast("int | None", module.padding_idx), device="meta")
    new.weight = weight
    return new.train(module.training)


def empty_weight(module: nn.Module, settings: Settings) -> QTensor:
    """The weight of the counterpart with codes and scales that are not filled yet, on the device of `module`."""
    dense = dense_weight(module)
    return cast(QTensor, torch.empty_like(settings.quantize(dense.to("meta")), device=dense.device))


def empty_counterpart(module: nn.Module, settings: Settings) -> nn.Module:
    """What `module` becomes, to be filled by load_state_dict. Raises TypeError if it has no counterpart."""
    if not is_quantizable(module):
        raise TypeError(f"empty_counterpart: {type(module).__name__} has no quantized counterpart")
    return counterpart(module, settings, empty_weight(module, settings))
