"""Embeddings whose table is a QTensor, and the one for stable training."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polybit import functional
from polybit.distributed import local
from polybit.formats import Format
from polybit.nn.module import QuantizedModule, check_sizes, check_weight, kbit_format
from polybit.optim.overrides import override
from polybit.qtensor import QTensor, check_block_size, quantize

Kbit = TypeVar("Kbit", bound="EmbeddingKbit")
Int8 = TypeVar("Int8", bound="Embedding8bit")


class QuantizedEmbedding(QuantizedModule):
    """What the quantized embeddings share: a table [num_embeddings, embedding_dim] whose rows are restored one by one.

    `padding_idx` (negative: from the end) says, as in nn.Embedding, which row starts as zeros and is not trained. The
    table is frozen, so that only its first half is left: a new table has zeros there (in lloyd2 and lloyd3, which have
    no zero, the nearest to it), a table that is given keeps its row.
    """

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    def _setup(self, weight: QTensor, padding_idx: int | None) -> None:
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = _row(padding_idx, self.num_embeddings)
        self._adopt(weight)

    def forward(self, index: Tensor) -> Tensor:
        """index int64 or int32 [...] -> [..., embedding_dim] in the weight's dtype.

        Raises IndexError for an index outside [0, num_embeddings) on the CPU; elsewhere its row is NaN.
        """
        return functional.embedding(index, self.weight)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"


def _row(padding_idx: int | None, rows: int) -> int | None:
    if padding_idx is None:
        return None
    if not -rows <= padding_idx < rows:
        raise ValueError(f"padding_idx must be in [{-rows}, {rows}), got {padding_idx}")
    return padding_idx % rows


def _dense(rows: int, columns: int, padding_idx: int | None, device: object, dtype: torch.dtype | None) -> Tensor:
    check_sizes(num_embeddings=rows, embedding_dim=columns)
    weight: Tensor = nn.Embedding(rows, columns, _row(padding_idx, rows), device=device, dtype=dtype).weight
    return weight


def check_embedding(embedding: nn.Embedding, name: str = "embedding") -> None:
    """Raise TypeError if it is none, ValueError for an option that a frozen table cannot honour: max_norm, ..."""
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(f"{name}: expected a torch.nn.Embedding, got {type(embedding).__name__}")
    for option, off in (("max_norm", None), ("scale_grad_by_freq", False), ("sparse", False)):
        value = getattr(embedding, option)
        if value != off:
            raise ValueError(f"{name}: a quantized table is frozen and has no {option}, got {option}={value}")


class EmbeddingKbit(QuantizedEmbedding):
    """A table of rows in a k-bit format; a lookup restores only the rows it needs.

    weight: QTensor [num_embeddings, embedding_dim]. `format`, `block_size`, `double_quant`, `search`: as in
    polybit.quantize. A new table is initialised as nn.Embedding is, then quantized; `from_embedding` quantizes a
    trained one. Raises ValueError for a format that is not k-bit, a wrong block size, size or padding_idx.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        format: str | Format = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        search: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        format = kbit_format(format, type(self).__name__, "Embedding8bit")
        check_block_size(block_size)
        dense = _dense(num_embeddings, embedding_dim, padding_idx, device, dtype)
        weight = quantize(dense, format, block_size=block_size, double_quant=double_quant, search=search)
        self._setup(weight, padding_idx)

    @classmethod
    def from_weight(cls: type[Kbit], weight: QTensor, padding_idx: int | None = None) -> Kbit:
        """A table of a k-bit QTensor; a Parameter is shared, not copied. Raises TypeError or ValueError."""
        check_weight(cls.__name__, weight, "kbit")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._setup(weight, padding_idx)
        return self

    @classmethod
    def from_embedding(
        cls: type[Kbit],
        embedding: nn.Embedding,
        format: str | Format = "nf4",
        *,
        block_size: int = 64,
        double_quant: bool = True,
        search: bool = False,
    ) -> Kbit:
        """The quantized table of `embedding`, on its device.

        Raises ValueError if it has max_norm, scale_grad_by_freq or sparse, which a frozen table cannot honour.
        """
        check_embedding(embedding, "from_embedding")
        dense, format = embedding.weight, kbit_format(format, cls.__name__, "Embedding8bit")
        weight = quantize(dense, format, block_size=block_size, double_quant=double_quant, search=search)
        return cls.from_weight(weight, embedding.padding_idx).train(embedding.training)

    def extra_repr(self) -> str:
        weight = local(self.weight)
        layout = f"format={weight.format_name}, block_size={weight.block_size}, double_quant={weight.double_quant}"
        return f"{super().extra_repr()}, {layout}"


class Embedding4bit(EmbeddingKbit):
    """EmbeddingKbit under the name that 4-bit users look for; the format defaults to nf4."""


class Embedding8bit(QuantizedEmbedding):
    """A table of int8 rows, one scale each; a lookup restores only the rows it needs.

    weight: QTensor "int8" [num_embeddings, embedding_dim]. A new table is initialised as nn.Embedding is, then
    quantized; `from_embedding` quantizes a trained one. Raises ValueError for a wrong size or padding_idx.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        weight = quantize(_dense(num_embeddings, embedding_dim, padding_idx, device, dtype), "int8")
        self._setup(weight, padding_idx)

    @classmethod
    def from_weight(cls: type[Int8], weight: QTensor, padding_idx: int | None = None) -> Int8:
        """A table of an int8 QTensor; a Parameter is shared, not copied. Raises TypeError or ValueError."""
        check_weight(cls.__name__, weight, "int8")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._setup(weight, padding_idx)
        return self

    @classmethod
    def from_embedding(cls: type[Int8], embedding: nn.Embedding) -> Int8:
        """The quantized table of `embedding`, on its device.

        Raises ValueError if it has max_norm, scale_grad_by_freq or sparse, which a frozen table cannot honour.
        """
        check_embedding(embedding, "from_embedding")
        weight = quantize(embedding.weight, "int8")
        return cls.from_weight(weight, embedding.padding_idx).train(embedding.training)


class StableEmbedding(nn.Embedding):
    """A trainable nn.Embedding for training with quantized optimizers: y = LayerNorm(table[index]).

    The table starts Xavier-uniform (Glorot and Bengio, 2010); the norm, with parameters `norm.weight` and `norm.bias`,
    is computed in fp32 (fp64 for an fp64 table) and rounded to the table's dtype. polybit.optim keeps the table's state
    in 32 bits (see optim.override). nn.quantize_ leaves it alone. Arguments: those of nn.Embedding.
    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022, section 2.3.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.norm = nn.LayerNorm(embedding_dim, device=device)
        override(self.weight, optim_bits=32)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        override(self.weight, optim_bits=32)  # a copy has a parameter of its own

    def reset_parameters(self) -> None:
        """Xavier-uniform, and zeros at padding_idx."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, index: Tensor) -> Tensor:
        """index int64 or int32 [...] -> [..., embedding_dim] in the weight's dtype."""
        rows, norm = super().forward(index), self.norm
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        y = F.layer_norm(rows.to(wide), norm.normalized_shape, norm.weight.to(wide), norm.bias.to(wide), norm.eps)
        return y.to(self.weight.dtype)
