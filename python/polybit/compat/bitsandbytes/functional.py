"""Quantization by functions: packed codes and a QuantState, as bitsandbytes lays them out, by polybit's ops."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from polybit.compat.bitsandbytes.optim.optimizer import update_parameter
from polybit.compat.bitsandbytes.utils import Singleton, pack_dict_to_tensor, unpack_tensor_to_dict
from polybit.formats import get_format
from polybit.qtensor import KERNEL_DTYPES, NESTED_BLOCK
from polybit.spec import codebooks
from polybit.spec.int8 import INVERSE

ops = torch.ops.polybit

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
name2qmap: dict[str, Tensor] = {}
FIRST_CUDA_DEVICE = torch.device("cuda", index=0)


class QuantState:
    """How packed codes are to be read.

    absmax: one scale per block, fp32 [blocks], or uint8 codes of them if `nested`; code: fp32 [16] or [256]; blocksize:
    elements per scale; quant_type: "nf4", "fp4" or None (8 bits); shape, dtype: of the tensor that was quantized;
    offset (fp32 scalar) and state2 (a QuantState): what restores uint8 scales.
    """

    valid_quant_types = ("fp4", "nf4")
    valid_qs_type_keys: ClassVar = ["bitsandbytes__fp4", "bitsandbytes__nf4"]
    valid_qs_keys: ClassVar = [
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "quant_state",
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    ]

    def __init__(
        self,
        absmax: Tensor,
        shape: Sequence[int] | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax: Any = absmax
        self.shape: Any = shape
        self.code: Any = code
        self.dtype: Any = dtype
        self.blocksize: Any = blocksize
        self.quant_type: Any = quant_type
        self.offset: Any = offset
        self.state2: Any = state2
        self.nested = state2 is not None

    def __getattr__(self, name: str) -> Any:
        # FSDP follows the keys of a state dict by attributes: weight.quant_state.bitsandbytes__nf4.
        if name in self.valid_qs_type_keys and name.endswith(f"__{self.quant_type}"):
            return self.as_dict(packed=True)[f"quant_state.{name}"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, idx: Any) -> Any:
        """The list that older versions had: absmax, shape, dtype, blocksize, [offset, state2] or None, quant_type."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][idx]

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: torch.device | str) -> QuantState:
        """The state that `as_dict` described, packed or not; keys may have a prefix with dots.

        Raises ValueError if the description is missing or there are several, or for an unknown key.
        """
        packed = [key for key, value in qs_dict.items() if "quant_state" in key and isinstance(value, Tensor)]
        if "quant_type" not in qs_dict:
            if not packed:
                raise ValueError("QuantState.from_dict: found neither quant_type nor an entry of quant_state")
            if len(packed) > 1 or packed[0].rpartition(".")[2] not in cls.valid_qs_type_keys:
                raise ValueError(
                    f"QuantState.from_dict: expected one entry of quant_state, called {cls.valid_qs_type_keys}, "
                    f"got {packed}"
                )
        entries = {key.rpartition(".")[2]: value for key, value in qs_dict.items() if key not in packed}
        for key in packed:
            entries |= unpack_tensor_to_dict(qs_dict[key])
        if unknown := sorted(entries.keys() - set(cls.valid_qs_keys)):
            raise ValueError(f"QuantState.from_dict: unknown entry {unknown[0]}")
        offset = state2 = None
        if "nested_absmax" in entries:
            offset = torch.tensor(float(entries["nested_offset"]), dtype=torch.float32, device=device)
            state2 = cls(
                absmax=entries["nested_absmax"].to(device),
                blocksize=entries["nested_blocksize"],
                code=entries["nested_quant_map"].to(device),
                dtype=getattr(torch, entries["nested_dtype"]),
            )
        return cls(
            absmax=entries["absmax"].to(device),
            shape=None if entries["shape"] is None else torch.Size(entries["shape"]),
            code=entries["quant_map"].to(device),
            blocksize=entries["blocksize"],
            quant_type=entries["quant_type"],
            dtype=getattr(torch, entries["dtype"]),
            offset=offset,
            state2=state2,
        )

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The entries of a state dict. packed: only tensors, all that is none as the JSON of one of them."""
        tensors = {"absmax": self.absmax, "quant_map": self.code}
        described: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.nested:
            tensors["nested_absmax"] = self.state2.absmax
            # Of its own: safetensors leaves out what shares storage with another entry.
            tensors["nested_quant_map"] = self.state2.code.clone()
            described["nested_blocksize"] = self.state2.blocksize
            described["nested_dtype"] = str(self.state2.dtype).removeprefix("torch.")
            described["nested_offset"] = self.offset.item()
        if not packed or self.quant_type is None:
            return tensors | described
        return tensors | {f"quant_state.bitsandbytes__{self.quant_type}": pack_dict_to_tensor(described)}

    def to(self, device: torch.device | str | None) -> None:
        """Move the tensors, in place."""
        self.code = self.code.to(device)
        self.absmax = self.absmax.to(device)
        if self.nested:
            self.offset = self.offset.to(device)
            self.state2.to(device)

    def __eq__(self, other: object) -> bool:
        """Whether they read alike, scales and codes within 1e-6."""
        if not isinstance(other, QuantState):
            return False
        mine = (self.shape, self.dtype, self.blocksize, self.quant_type, self.offset, self.state2)
        theirs = (other.shape, other.dtype, other.blocksize, other.quant_type, other.offset, other.state2)
        tables = ((self.absmax, other.absmax), (self.code, other.code))
        return mine == theirs and all(a.shape == b.shape and torch.allclose(a, b, atol=1e-6) for a, b in tables)

    __hash__ = None  # type: ignore[assignment]


def operands(A: Tensor, quant_state: QuantState) -> tuple[Tensor | None, ...]:
    """What polybit's ops take for a 4-bit tensor: q absmax code nested_absmax nested_code nested_offset, all views."""
    absmax, nested = quant_state.absmax, quant_state.state2
    run: tuple[Tensor | None, ...] = (None, None, None)
    if nested is not None and nested.blocksize == NESTED_BLOCK:
        run = nested.absmax, nested.code, quant_state.offset
    elif nested is not None:
        absmax = _scales(quant_state)
    code = quant_state.code
    if code is None:
        code = get_4bit_type(quant_state.quant_type, device=A.device)
    return _bytes(A), absmax, code, *run


def get_ptr(A: Tensor | None) -> ctypes.c_void_p | None:
    """The address of a tensor's first element; of None: None."""
    return None if A is None else ctypes.c_void_p(A.data_ptr())


def _bytes(A: Tensor) -> Tensor:
    q = A.detach()
    return q if q.dtype == torch.uint8 else q.reshape(-1).view(torch.uint8)


def _scales(quant_state: QuantState) -> Tensor:
    """fp32 scales."""
    absmax: Tensor = quant_state.absmax
    if quant_state.nested:
        absmax = dequantize_blockwise(absmax, quant_state.state2) + quant_state.offset
    return absmax.float()


def _out(value: Tensor, out: Tensor | None) -> Tensor:
    return value if out is None else out.copy_(value)


def _check_float(dtype: torch.dtype) -> None:
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"blockwise quantization is of fp32, fp16 or bf16, got {dtype}")


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Packed codes [(n + 1) // 2, 1] of A (fp32, fp16 or bf16, n elements), and how to read them.

    absmax, out: where to copy scales and codes to. blocksize: elements per scale, 32...4096 (default 64).
    compress_statistics: double quantization. quant_storage: the dtype that the bytes are viewed as. Raises ValueError
    for another quant_type than nf4 and fp4, a wrong blocksize or dtype.
    """
    blocksize = 64 if blocksize is None else blocksize
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize}")
    if quant_type not in QuantState.valid_quant_types:
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    _check_float(A.dtype)
    tables = get_format(quant_type).on(A.device)
    q, scales = ops.quantize_kbit(A.detach(), *tables, blocksize, 4, 0)
    state = QuantState(scales, A.shape, tables.code.clone(), blocksize, quant_type, A.dtype)
    if compress_statistics:
        map8 = _dynamic_map(A.device).clone()
        state.absmax, nested_absmax, state.offset = ops.quantize_absmax(scales, map8)
        state.state2 = QuantState(nested_absmax, code=map8, blocksize=NESTED_BLOCK, dtype=torch.float32)
        state.nested = True
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return _out(q.view(quant_storage).view(-1, 1), out), state


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """quantize_4bit to fp4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """quantize_4bit to nf4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """The values of packed codes, in the shape and dtype of the state.

    Without a state, `absmax` (fp32) and `out` give them. The result is transposed if A is (a row of bytes). Raises
    ValueError if neither is given, or for a wrong quant_type, blocksize or dtype.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit: needs a quant_state, or absmax and out")
        blocksize = 64 if blocksize is None else blocksize
        quant_state = QuantState(absmax, out.shape, None, blocksize, quant_type, out.dtype)
    if quant_state.blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {quant_state.blocksize}")
    if quant_state.quant_type not in QuantState.valid_quant_types:
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', got {quant_state.quant_type!r}")
    _check_float(quant_state.dtype)
    y = _dequantize_4bit(A, quant_state)
    y = _out(y, out)
    return y.t() if A.dim() == 2 and A.shape[0] == 1 and A.shape[1] > 1 else y


def _dequantize_4bit(A: Tensor, state: QuantState) -> Tensor:
    y: Tensor = ops.dequantize_kbit(*operands(A, state), state.blocksize, 4, 0, 0, state.dtype, list(state.shape))
    return y


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """dequantize_4bit of fp4."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """dequantize_4bit of nf4."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def _dynamic_map(device: torch.device) -> Tensor:
    return get_format("dynamic8").on(device).code


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """8-bit codes of A (fp32, fp16 or bf16), uint8 like A, and how to read them.

    code: fp32 [256], ascending (default: the signed dynamic map). absmax, out: where to copy scales and codes to.
    blocksize: a power of two, 16...4096. nested: quantize the scales, too. Raises ValueError for a wrong blocksize or
    dtype.
    """
    _check_float(A.dtype)
    code = _dynamic_map(A.device) if code is None else code.to(A.device)
    q, scales = ops.quantize_blockwise(A.detach(), code, blocksize)
    state = QuantState(scales, code=code.clone(), blocksize=blocksize, dtype=A.dtype)
    if nested:
        state.offset = scales.mean()
        state.absmax, state.state2 = quantize_blockwise(scales - state.offset, blocksize=blocksize)
        state.nested = True
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return _out(q, out), state


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """The values of 8-bit codes, like A, in the dtype of the state.

    Without a state, `absmax` [blocks], `code` (default: the signed dynamic map) and `blocksize`: in fp32. Raises
    ValueError if neither is given, or if A is not uint8.
    """
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise: needs a quant_state or absmax")
        code = _dynamic_map(A.device) if code is None else code
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    if A.dtype != torch.uint8:
        raise ValueError(f"dequantize_blockwise: A must be uint8, got {A.dtype}")
    code = quant_state.code.to(A.device)
    return _out(ops.dequantize_blockwise(A, _scales(quant_state), code, quant_state.blocksize, quant_state.dtype), out)


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """A [..., K] times a 4-bit weight [N, K], transposed: [..., N]. Raises ValueError without a state."""
    if state is None:
        raise ValueError("gemv_4bit: needs the state that quantize_4bit gave")
    return _out(matmul_packed(A, B, state, None), out)


def matmul_packed(A: Tensor, B: Tensor, state: QuantState, bias: Tensor | None) -> Tensor:
    """A [..., K] times a 4-bit weight of state.shape [N, K], plus bias [N] of A's dtype: [..., N]. Differentiable."""
    y: Tensor = ops.matmul_kbit(A, *operands(B, state), bias, None, state.shape[0], state.blocksize, 4, 0, 0)
    return y


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8 codes of the rows of A [..., K], fp32 scales [rows], outlier columns (int64, None for threshold 0).

    Columns with an |a| >= threshold get codes of 0 and do not count in the scales.
    """
    q, absmax, outlier = ops.quantize_int8(A, float(threshold))
    return q, absmax, outlier.nonzero().view(-1) if threshold > 0.0 else None


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """The fp32 values of int8 rows A [..., K] with the scales [rows]: A stats / 127."""
    y: Tensor = ops.dequantize_int8(A, stats.reshape(-1).float(), torch.float32)
    return y


def int8_double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """A [rows, columns] quantized by rows and by columns: codes, codes by columns, both scales, outlier columns.

    Raises ValueError if one of the arguments that only hold a place is given.
    """
    given = {"col_stats": col_stats, "row_stats": row_stats, "out_col": out_col, "out_row": out_row}
    if names := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"int8_double_quant: {names[0]} must be None, results are always new tensors")
    by_row, row_absmax, outliers = int8_vectorwise_quant(A, threshold)
    inner = A.masked_fill(A.abs() >= threshold, 0.0) if threshold > 0.0 else A
    by_column, column_absmax, _ = int8_vectorwise_quant(inner.t().contiguous())
    return by_row, by_column.t().contiguous(), row_absmax, column_absmax, outliers


double_quant = int8_double_quant


def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32) -> Tensor:
    """A int8 [..., K] times B int8 [N, K], transposed: exact int32 [..., N]. Raises ValueError if `out` is not that."""
    if out is not None and out.dtype != torch.int32:
        raise ValueError(f"int8_linear_matmul: out must be int32, got {out.dtype}")
    return _out(ops.matmul_int8(A, B), out)


def _warn_that_it_is_old(name: str) -> None:
    warnings.warn(f"{name} is deprecated; use int8_linear_matmul", FutureWarning, stacklevel=3)


def check_matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    expected_type: torch.dtype = torch.int8,
) -> Sequence[int]:
    """The shape of op(A) op(B), of [M, K] and [K, N] or of batches; op transposes the last two dimensions.

    With `out` [i, o] also of the sum over b and s of A [b, s, i] and B [b, s, o]. Raises TypeError for other dtypes,
    ValueError for shapes that do not fit.
    """
    _warn_that_it_is_old("check_matmul")
    return _product_shape(A, B, out, transposed_A, transposed_B, expected_type)


def _product_shape(
    A: Tensor, B: Tensor, out: Tensor | None, transposed_A: bool, transposed_B: bool, dtype: torch.dtype = torch.int8
) -> Sequence[int]:
    if A.dtype != dtype or B.dtype != dtype:
        raise TypeError(f"A and B must be {dtype}, got {A.dtype} and {B.dtype}")
    a, b = _turned(A, transposed_A), _turned(B, transposed_B)
    fit = (a.dim(), b.dim()) in ((2, 2), (3, 2), (3, 3)) and a.shape[-1] == b.shape[-2]
    if not fit and not _contracts(A, B, out):
        raise ValueError(f"shapes of A and B do not fit: {list(a.shape)} and {list(b.shape)}, transposed as asked")
    shape = A.shape[2:] + B.shape[2:] if _contracts(A, B, out) else a.shape[:-1] + b.shape[-1:]
    if out is not None and out.shape != shape:
        raise ValueError(f"out must have shape {list(shape)}, got {list(out.shape)}")
    return shape


def _turned(x: Tensor, transposed: bool) -> Tensor:
    return x.transpose(-1, -2) if transposed else x


def _contracts(A: Tensor, B: Tensor, out: Tensor | None) -> bool:
    """Whether it is the sum over batch and sequence of a backward pass: A [b, s, i], B [b, s, o] to out [i, o]."""
    if A.dim() != 3 or B.dim() != 3 or out is None:
        return False
    return A.shape[:2] == B.shape[:2] and tuple(out.shape) == (A.shape[2], B.shape[2])


def igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """The int32 product op(A) op(B) of int8 [M, K] or [b, M, K], and [K, N] or, for each batch, [b, K, N].

    With `out` [i, o] also the sum over b and s of A [b, s, i] and B [b, s, o]. Raises as check_matmul does.
    """
    _warn_that_it_is_old("igemm")
    _product_shape(A, B, out, transposed_A, transposed_B)
    if _contracts(A, B, out):
        return int8_linear_matmul(A.flatten(0, 1).t().contiguous(), B.flatten(0, 1).t().contiguous(), out)
    return _igemm(A, B, out, transposed_A, transposed_B)


def batched_igemm(
    A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False
) -> Tensor:
    """The int32 products op(A) op(B) of int8 [b, M, K] and [b, K, N]. Raises as check_matmul does."""
    _warn_that_it_is_old("batched_igemm")
    if A.dim() != 3 or B.dim() != 3:
        raise ValueError(f"batched_igemm: A and B must have 3 dimensions, got {list(A.shape)} and {list(B.shape)}")
    _product_shape(A, B, out, transposed_A, transposed_B)
    return _igemm(A, B, out, transposed_A, transposed_B)


def _igemm(A: Tensor, B: Tensor, out: Tensor | None, transposed_A: bool, transposed_B: bool) -> Tensor:
    a, b = _turned(A, transposed_A), _turned(B, not transposed_B)  # int8_linear_matmul takes [N, K]
    if b.dim() == 2:
        return int8_linear_matmul(a.contiguous(), b.contiguous(), out)
    products = [int8_linear_matmul(x.contiguous(), y.contiguous()) for x, y in zip(a, b)]
    return _out(torch.stack(products), out)


def int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """fp16 values of an int32 product A [..., N]: A row_stats col_stats / 127^2 + bias.

    Raises ValueError if A is not int32, or a scale not fp32.
    """
    return _out(int8_product_values(A, row_stats, col_stats, bias, torch.float16), out)


def int8_product_values(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """An int32 product A [..., N] with the fp32 scales of its rows and columns, plus bias, rounded to the dtype.

    Raises ValueError for other dtypes.
    """
    wanted = ("A", A, torch.int32), ("row_stats", row_stats, torch.float32), ("col_stats", col_stats, torch.float32)
    for name, value, want in wanted:
        if value.dtype != want:
            raise ValueError(f"int8_mm_dequant: {name} must be {want}, got {value.dtype}")
    rows = row_stats.view(*A.shape[:-1], 1)
    y = A.float() * ((rows * INVERSE) * (col_stats * INVERSE))
    return (y if bias is None else y + bias.float()).to(dtype)


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """The 16 values of "nf4", "fp4", "int4" or "af4", fp32, on `device` (default: the CPU).

    Raises NotImplementedError for another name, and for af4 with another blocksize than 64.
    """
    if typename == "af4":
        if blocksize != 64:
            raise NotImplementedError(f"get_4bit_type: af4 is for blocks of 64, got {blocksize}")
        return torch.tensor(codebooks.AF4[::-1], device=device)
    if typename not in ("nf4", "fp4", "int4"):
        raise NotImplementedError(f"get_4bit_type: {typename!r} is not supported")
    return get_format(typename).on("cpu" if device is None else device).code.clone()


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> Tensor:
    """Quantiles of the normal distribution over the largest one, and zeros, fp32 [256], ascending.

    As many on both sides of zero, or one more of the positive ones. Source: Dettmers et al., "QLoRA", 2023, section 3.
    """
    positive, negative = (codebooks.gaussian_quantiles(offset, count) for count in (8 if use_extra_value else 7, 7))
    zeros = [0.0] * (256 - len(positive) - len(negative))
    return torch.tensor([-v for v in negative] + zeros + positive[::-1])


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """The dynamic map of 8 bits, fp32 [256], ascending; unsigned: that of second moments.

    Raises NotImplementedError for other numbers of bits.
    """
    if (max_exponent_bits, total_bits) != (7, 8):
        raise NotImplementedError("create_dynamic_map: only max_exponent_bits=7 with total_bits=8")
    return codebooks.dynamic(signed).code


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> Tensor:
    """Evenly spaced values of [-1, 1] with zero twice, or of [0, 1]: fp32 [256], ascending.

    Raises NotImplementedError for another number of bits, or without zero.
    """
    if total_bits != 8 or not add_zero:
        raise NotImplementedError("create_linear_map: only total_bits=8 with add_zero=True")
    return codebooks.linear(signed).code


def create_fp8_map(signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8) -> Tensor:
    """All values of a signed float of 8 bits over the largest, fp32 [256], ascending.

    Raises NotImplementedError for another number of bits, or without a sign; ValueError if the bits do not add up.
    """
    if not signed or total_bits != 8:
        raise NotImplementedError("create_fp8_map: only signed=True with total_bits=8")
    if exponent_bits + precision_bits != 7:
        raise ValueError(f"create_fp8_map: {exponent_bits} and {precision_bits} bits and the sign do not make 8")
    return codebooks.fp8(exponent_bits, precision_bits).code


def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """Step `step` (from 1) of a parameter p with the gradient g, in place, states in fp32.

    optimizer_name: "adam", "ademamix" (state1 [2, *p.shape]), "lion", "momentum", "rmsprop", "adagrad", "lamb" or
    "lars". gnorm_scale multiplies g; unorm_vec is left alone. Raises ValueError for another name or impossible numbers,
    NotImplementedError for skip_zeros and clipped updates.
    """
    state = {"state1": state1, "state2": state2}
    betas = beta1, beta2, beta3
    update_parameter(
        optimizer_name, p, g, state, step, gnorm_scale, lr=lr, betas=betas, eps=eps, alpha=alpha,
        weight_decay=weight_decay, max_unorm=max_unorm, skip_zeros=skip_zeros,
    )  # fmt: skip


def optimizer_update_8bit_blockwise(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """The same with states of uint8 codes, absmax fp32 [blocks of 256] and maps fp32 [256]."""
    state = {
        "state1": state1, "state2": state2, "qmap1": qmap1, "qmap2": qmap2, "absmax1": absmax1, "absmax2": absmax2
    }  # fmt: skip
    betas = beta1, beta2, beta3
    update_parameter(
        optimizer_name, p, g, state, step, gnorm_scale, lr=lr, betas=betas, eps=eps, alpha=alpha,
        weight_decay=weight_decay, skip_zeros=skip_zeros,
    )  # fmt: skip


# Paged memory by hand. Optimizers have their own (polybit.optim, "Paging"); this is memory of the host, which the
# operating system pages.


class GlobalPageManager(Singleton):
    """The tensors that were registered as paged."""

    def _begin(self) -> None:
        self.initialize()

    def initialize(self) -> None:
        """Forget all tensors."""
        self.paged_tensors: list[Tensor] = []

    def prefetch_all(self, to_cpu: bool = False) -> None:
        """prefetch_tensor of each, the first one last."""
        for tensor in reversed(self.paged_tensors):
            prefetch_tensor(tensor, to_cpu)


def get_paged(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device = FIRST_CUDA_DEVICE) -> Tensor:
    """Zeros in host memory, a CPU tensor with the attributes is_paged and page_deviceid (of `device`)."""
    tensor: Any = torch.zeros(shape, dtype=dtype)
    tensor.is_paged, tensor.page_deviceid = True, device.index
    return tensor  # type: ignore[no-any-return]


def prefetch_tensor(A: Tensor, to_cpu: bool = False) -> None:
    """Nothing, as host memory is where it is used. Raises ValueError for a tensor that get_paged did not make."""
    if not getattr(A, "is_paged", False):
        raise ValueError("prefetch_tensor: only tensors of get_paged can be prefetched")


def elementwise_func(func_name: str, A: Tensor, B: Tensor | None, value: float, prefetch: bool = True) -> None:
    """Change A: "fill" with the value, "arange" from 0 on, "_mul" by B. Raises NotImplementedError for others."""
    if func_name == "fill":
        A.fill_(value)
    elif func_name == "arange":
        A.copy_(torch.arange(A.numel(), device=A.device).view_as(A))
    elif func_name == "_mul" and B is not None:
        A.mul_(B)
    else:
        raise NotImplementedError(f"elementwise_func: {func_name!r} is not supported")


def fill(A: Tensor, value: float, device: torch.device | None = None, prefetch: bool = True) -> None:
    """A filled with the value."""
    elementwise_func("fill", A, None, value, prefetch)
