"""torch.ops.bitsandbytes.*: the schemas of bitsandbytes 0.50.2, computed by polybit's ops.

Importing this module defines them; `import bitsandbytes` after polybit.compat.install() imports it. Raises ImportError
if they are defined already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from polybit.compat.bitsandbytes import functional
from polybit.compat.bitsandbytes.functional import QuantState
from polybit.qtensor import NESTED_BLOCK

if torch._C._dispatch_has_kernel("bitsandbytes::quantize_4bit") or hasattr(torch.ops.bitsandbytes, "quantize_4bit"):
    raise ImportError(
        "polybit.compat: torch.ops.bitsandbytes is defined already, by an installed bitsandbytes that something has "
        "imported; call polybit.compat.install() before that, or use python -m polybit.run"
    )

LIB = torch.library.Library("bitsandbytes", "DEF")  # type: ignore[no-untyped-call]
Fake = Callable[..., Any]


def _op(schema: str, fake: Fake) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Define an op; the decorated function implements it on every device."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        LIB.define(schema)  # type: ignore[no-untyped-call]
        LIB.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"bitsandbytes::{name}", fake, lib=LIB)
        return function

    return register


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _like(dtype: torch.dtype) -> Fake:
    return lambda x, *args, **kwargs: torch.empty_like(x, dtype=dtype)


def _product(x: Tensor, n: Any, dtype: torch.dtype) -> Tensor:
    return x.new_empty((*x.shape[:-1], n), dtype=dtype)


def _rows(x: Tensor) -> Any:
    count: Any = 1
    for size in x.shape[:-1]:
        count = count * size
    return count


def _outliers(x: Tensor, threshold: float) -> Tensor | None:
    if threshold == 0.0:
        return None
    found: Any = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(found, dtype=torch.int64)


def _blocks(count: Any, blocksize: int) -> Any:
    return -(-count // blocksize)


# ---- 8-bit rows


def _fake_scaled(A: Tensor, B: Tensor, row_stats: Any, col_stats: Any, bias: Any = None, dtype: Any = None) -> Tensor:
    return _product(A, B.shape[0], dtype or torch.float16)


@_op(
    "int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
    "ScalarType? dtype=None) -> Tensor",
    _fake_scaled,
)
def _int8_scaled_mm(
    A: Tensor,
    B: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    product = functional.int8_linear_matmul(A, B)
    return functional.int8_product_values(product, row_stats, col_stats, bias, dtype or torch.float16)


def _fake_mixed(
    A: Tensor, CA: Tensor, CB: Tensor, SCA: Tensor, SCB: Tensor, outlier_cols: Tensor | None = None, bias: Any = None
) -> tuple[Tensor, Tensor | None]:
    count = 0 if outlier_cols is None else outlier_cols.shape[0]
    return _product(CA, CB.shape[0], A.dtype), A.new_empty((_rows(A), count))


@_op(
    "int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, "
    "Tensor? bias=None) -> (Tensor, Tensor?)",
    _fake_mixed,
)
def _int8_mixed_scaled_mm(
    A: Tensor,
    CA: Tensor,
    CB: Tensor,
    SCA: Tensor,
    SCB: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    y = functional.int8_product_values(functional.int8_linear_matmul(CA, CB), SCA, SCB, bias, A.dtype)
    columns = A.new_empty(0, dtype=torch.int64) if outlier_cols is None else outlier_cols
    outliers = A.reshape(-1, A.shape[-1])[:, columns].contiguous()
    if columns.numel():
        weight = functional.int8_vectorwise_dequant(CB[:, columns].contiguous(), SCB).to(A.dtype)
        y = y + (outliers @ weight.t()).view(y.shape)
    return y, outliers


@_op("int8_linear_matmul(Tensor A, Tensor B) -> Tensor", lambda A, B: _product(A, B.shape[0], torch.int32))
def _int8_linear_matmul(A: Tensor, B: Tensor) -> Tensor:
    return functional.int8_linear_matmul(A, B)


@_op("int8_linear_matmul.out(Tensor A, Tensor B, Tensor! out) -> ()", _nothing)
def _int8_linear_matmul_out(A: Tensor, B: Tensor, out: Tensor) -> None:
    functional.int8_linear_matmul(A, B, out=out)


def _fake_rows(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    stats = A.new_empty(_rows(A), dtype=torch.float32)
    return torch.empty_like(A, dtype=torch.int8), stats, _outliers(A, threshold)


@_op("int8_vectorwise_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor?)", _fake_rows)
def _int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    return functional.int8_vectorwise_quant(A, threshold)


@_op("int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor", _like(torch.float32))
def _int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    return functional.int8_vectorwise_dequant(A, stats)


@_op(
    "int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) "
    "-> Tensor",
    lambda A, row_stats, col_stats, dtype=None, bias=None: torch.empty_like(A, dtype=dtype or torch.float16),
)
def _int8_mm_dequant(
    A: Tensor, row_stats: Tensor, col_stats: Tensor, dtype: torch.dtype | None = None, bias: Tensor | None = None
) -> Tensor:
    return functional.int8_product_values(A, row_stats, col_stats, bias, dtype or torch.float16)


def _fake_double(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    q, rows, outliers = _fake_rows(A, threshold)
    return q, torch.empty_like(q), rows, A.new_empty(A.shape[-1], dtype=torch.float32), outliers


@_op(
    "int8_double_quant(Tensor A, float threshold=0.0) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    _fake_double,
)
def _int8_double_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    return functional.int8_double_quant(A, threshold=threshold)


# ---- 4 bits


def _fake_quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    count = A.numel()
    packed = A.new_empty(((count + 1) // (2 * quant_storage.itemsize), 1), dtype=quant_storage)
    return packed, A.new_empty(_blocks(count, blocksize), dtype=torch.float32)


@_op(
    "quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    _fake_quantize_4bit,
)
def _quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    packed, state = functional.quantize_4bit(A, blocksize=blocksize, quant_type=quant_type, quant_storage=quant_storage)
    return packed, state.absmax


def _fake_dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return A.new_empty(shape, dtype=dtype)


@_op(
    "dequantize_4bit(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor",
    _fake_dequantize_4bit,
)
def _dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    state = QuantState(absmax, shape, None, blocksize, quant_type, dtype)
    return functional.dequantize_4bit(A.reshape(-1, 1), state)


@_op(
    "dequantize_4bit.out(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype, "
    "Tensor! out) -> ()",
    _nothing,
)
def _dequantize_4bit_out(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype, out: Tensor
) -> None:
    out.copy_(_dequantize_4bit(A, absmax, blocksize, quant_type, shape, dtype))


@_op(
    "gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    lambda A, B, shapeB, *args, **kwargs: _product(A, shapeB[0], A.dtype),
)
def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    state = QuantState(absmax, shapeB, None, blocksize, quant_type, A.dtype)
    if absmax_8bit is not None:
        nested = QuantState(absmax, code=absmax_code, blocksize=NESTED_BLOCK, dtype=torch.float32)
        state = QuantState(absmax_8bit, shapeB, None, blocksize, quant_type, A.dtype, absmax_offset, nested)
    return functional.matmul_packed(A, B, state, bias)


_GEMV = "Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize"


@_op(f"gemv_4bit({_GEMV}) -> Tensor", lambda A, B, shapeB, *args: _product(A, shapeB[0], A.dtype))
def _gemv_4bit(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    return functional.matmul_packed(A, B, QuantState(absmax, shapeB, code, blocksize, None, A.dtype), None)


@_op(f"gemv_4bit.out({_GEMV}, Tensor! out) -> ()", _nothing)
def _gemv_4bit_out(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, out: Tensor
) -> None:
    out.copy_(_gemv_4bit(A, B, shapeB, absmax, code, blocksize))


# ---- 8-bit blocks


def _fake_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(A, dtype=torch.uint8), A.new_empty(_blocks(A.numel(), blocksize), dtype=torch.float32)


@_op("quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)", _fake_blockwise)
def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    q, state = functional.quantize_blockwise(A, code, blocksize=blocksize)
    return q, state.absmax


_BLOCKWISE = "Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype"


@_op(
    f"dequantize_blockwise({_BLOCKWISE}) -> Tensor",
    lambda A, absmax, code, blocksize, dtype: torch.empty_like(A, dtype=dtype),
)
def _dequantize_blockwise(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    return functional.dequantize_blockwise(A, QuantState(absmax, code=code, blocksize=blocksize, dtype=dtype))


@_op(f"dequantize_blockwise.out({_BLOCKWISE}, Tensor! out) -> ()", _nothing)
def _dequantize_blockwise_out(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor
) -> None:
    out.copy_(_dequantize_blockwise(A, absmax, code, blocksize, dtype))


# ---- optimizers


def _update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    unorm_vec: Tensor | None,
    max_unorm: float,
    param_norm: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    functional.optimizer_update_32bit(
        optimizer_name, g, p, state1, beta1, eps, step, lr, state2, beta2, beta3, alpha, weight_decay, gnorm_scale,
        unorm_vec, max_unorm, skip_zeros,
    )  # fmt: skip


_op(
    "optimizer_update_32bit(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, "
    "Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, float beta3, float alpha, "
    "float eps, float weight_decay, int step, float lr, float gnorm_scale, bool skip_zeros=False) -> ()",
    _nothing,
)(_update_32bit)
_op(
    "optimizer_update_8bit_blockwise(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, "
    "Tensor(a3!)? state2, float beta1, float beta2, float beta3, float alpha, float eps, int step, float lr, "
    "Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, "
    "float gnorm_scale, bool skip_zeros=False) -> ()",
    _nothing,
)(functional.optimizer_update_8bit_blockwise)
