"""Functions on quantized weights: products and gathers that never restore the whole of a weight."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from polybit import autograd as autograd  # registers the derivatives
from polybit.backends import deterministic
from polybit.backends.selection import constant_in_traces
from polybit.qtensor import KERNEL_DTYPES, TORCH_FUNCTIONS, QTensor, quantize

__all__ = [
    "embedding",
    "linear",
    "linear_grouped",
    "linear_int8",
    "linear_int8_grouped",
    "linear_int8_trained",
    "quantize",
]


@constant_in_traces  # torch 2.6 cannot trace it
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocast_is_on(x: Tensor) -> bool:
    """Whether autocast decides the dtype of a product with x."""
    return _has_autocast(x.device.type) and torch.is_autocast_enabled(x.device.type)


def _compute_dtype(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a tensor, got {type(x).__name__}")
    # Autocast does not know the ops of other libraries; a linear layer is one of those it runs in the lower precision.
    if not autocast_is_on(x) or x.dtype not in KERNEL_DTYPES:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _check_quantized(name: str, weight: Tensor, kind: str | None = None, words: str = "") -> None:
    if not isinstance(weight, QTensor):
        raise TypeError(f"{name}: weight must be a QTensor, as polybit.quantize makes it, got {_described(weight)}")
    if kind is not None and weight.format.kind != kind:
        raise ValueError(f"{name}: weight must be {words}, got {weight.format_name}")


def _described(value: object) -> str:
    return f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__


def _check(name: str, x: Tensor, shape: torch.Size, device: torch.device, bias: Tensor | None) -> int:
    # Every attribute that torch looks up on a QTensor costs about 1 us, those of its inner tensors almost nothing.
    if len(shape) != 2:
        raise ValueError(f"{name}: weight must have 2 dimensions, got {list(shape)}")
    n, k = shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{name}: the last dimension of x must be {k}, got {list(x.shape)}")
    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(f"{name}: x must be fp32, fp16 or bf16, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}: x is on {x.device}, the weight on {device}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"{name}: bias must have shape {[n]}, got {list(bias.shape)}")
    if bias is not None and bias.device != device:
        raise ValueError(f"{name}: bias is on {bias.device}, the weight on {device}")
    return n


def check_activations(activations: str | None) -> None:
    """Raise ValueError unless it is a way to take x: None, as it is, or "int8"."""
    if activations not in (None, "int8"):
        raise ValueError(f'activations must be None or "int8", got {activations!r}')


def linear(x: Tensor, weight: QTensor, bias: Tensor | None = None, *, activations: str | None = None) -> Tensor:
    """y = x W^T + bias, with W read as it is stored.

    x: fp32, fp16 or bf16 [..., K]; weight: a k-bit QTensor [N, K] (any format without a product of its own is restored
    first); bias [N] or None, rounded to x's dtype. Returns y [..., N] in x's dtype (autocast's, where it is on).
    `activations`: None, or "int8": x is quantized to int8 by rows and the codebook of a k-bit weight is rounded to
    int8, so that the product sums integers inside a block.
    Differentiable in x and bias ("int8": its roundings taken as the identity; no forward mode). Raises TypeError or
    ValueError when dtypes, shapes or devices do not fit, or for other `activations`.
    """
    check_activations(activations)
    _check_quantized("linear", weight)
    x = _compute_dtype("linear", x)
    n = _check("linear", x, weight.shape, weight.q.device, bias)
    if bias is not None:
        bias = bias.to(x.dtype)
    format = weight.format
    if format.kind != "kbit":
        if activations is not None:
            raise ValueError(f"linear: activations are quantized for k-bit weights, got {format.name}")
        return F.linear(x, weight.dequantize().to(x.dtype), bias)
    sizes = n, weight.block_size, format.bits, weight.place, 0
    if activations == "int8":
        function: Any = autograd.LinearKbitInt8
        call = function.apply if torch.is_grad_enabled() else function.forward  # dynamo traces no node without gradient
        return cast(Tensor, call(x, bias, *weight.operands(), sizes))
    return cast(Tensor, torch.ops.polybit.matmul_kbit(x, *weight.operands(), bias, None, *sizes))


def _check_grouped(name: str, x: Tensor, weight: QTensor, group_end: Tensor, transposed: bool) -> int:
    shape, device = weight.shape, weight.q.device
    if len(shape) != 3:
        raise ValueError(f"{name}: weight must have 3 dimensions, got {list(shape)}")
    experts, n, k = shape[0], *(shape[:0:-1] if transposed else shape[1:])
    if x.dim() != 2 or x.shape[1] != k:
        raise ValueError(f"{name}: x must be [T, {k}], got {list(x.shape)}")
    if x.dtype not in KERNEL_DTYPES:
        raise TypeError(f"{name}: x must be fp32, fp16 or bf16, got {x.dtype}")
    if group_end.dtype != torch.int32:
        raise TypeError(f"{name}: group_end must be int32, got {group_end.dtype}")
    if group_end.shape != (experts,):
        raise ValueError(f"{name}: group_end must have shape {[experts]}, got {list(group_end.shape)}")
    if x.device != device or group_end.device != device:
        raise ValueError(f"{name}: x is on {x.device}, group_end on {group_end.device}, the weight on {device}")
    return n


def linear_grouped(x: Tensor, weight: QTensor, group_end: Tensor, *, transposed: bool = False) -> Tensor:
    """y[i] = x[i] W[e]^T for the rows i of group e: each expert of a mixture on the tokens that chose it.

    x: fp32, fp16 or bf16 [T, K], the rows of a group together, groups in the order of experts; weight: a k-bit QTensor
    [E, N, K], `transposed`: [E, K, N], for y[i] = x[i] W[e]; group_end: int32 [E], never falling, the row behind the
    last of each group: group e is rows group_end[e - 1] ... group_end[e]. Returns y [T, N] in x's dtype (autocast's,
    where it is on); rows behind the last group are zero. Only experts that have rows are read. Differentiable in x.
    Raises TypeError or ValueError when dtypes, shapes or devices do not fit, or for a format that is not k-bit.
    """
    _check_quantized("linear_grouped", weight, "kbit", "k-bit")
    x = _compute_dtype("linear_grouped", x)
    n = _check_grouped("linear_grouped", x, weight, group_end, transposed)
    ops = torch.ops.polybit
    product = ops.matmul_kbit_grouped_transposed if transposed else ops.matmul_kbit_grouped
    sizes = n, weight.block_size, weight.bits, weight.place, 0
    return cast(Tensor, product(x, group_end, *weight.operands(), *sizes))


def linear_int8(x: Tensor, weight: QTensor, bias: Tensor | None = None, *, threshold: float = 6.0) -> Tensor:
    """LLM.int8(): x is quantized to int8 by rows, columns with an |x| >= threshold are multiplied in high precision.

    x: fp32, fp16 or bf16 [..., K]; weight: an int8 QTensor [N, K]; bias [N] or None, rounded to x's dtype; threshold
    0: nothing is an outlier. Returns y [..., N] in x's dtype. Differentiable in x (its rounding taken as the identity)
    and bias. Outlier columns are found over all rows of x; with POLYBIT_DETERMINISTIC=1 by each row for itself, so that
    it does not matter which rows come together.
    Source: Dettmers et al., "LLM.int8()", 2022, section 3. Raises TypeError or ValueError when arguments do not fit.
    """
    _check_quantized("linear_int8", weight, "int8", "int8")
    x = _compute_dtype("linear_int8", x)
    _check("linear_int8", x, weight.shape, weight.q.device, bias)
    if bias is not None:
        bias = bias.to(x.dtype)
    by_row = int(deterministic())
    return cast(Tensor, torch.ops.polybit.linear_int8(x, weight.q, weight.absmax, bias, float(threshold), by_row))


def linear_int8_grouped(x: Tensor, weight: QTensor, group_end: Tensor, *, threshold: float = 6.0) -> Tensor:
    """y[i] = x[i] W[e]^T for the rows i of group e, as linear_int8 has it: one product for each expert that has rows.

    x, group_end: as in linear_grouped; weight: an int8 QTensor [E, N, K]; threshold: as in linear_int8, each group with
    outlier columns of its own. Returns y [T, N] in x's dtype (autocast's, where it is on); rows behind the last
    group are zero. Differentiable in x. The host reads group_end: it waits for the device, and torch.compile breaks the
    graph here. Raises TypeError or ValueError when dtypes, shapes or devices do not fit, or for another format.
    """
    _check_quantized("linear_int8_grouped", weight, "int8", "int8")
    x = _compute_dtype("linear_int8_grouped", x)
    n = _check_grouped("linear_int8_grouped", x, weight, group_end, False)
    q, absmax, by_row = weight.q, weight.absmax, int(deterministic())
    ends = [0, *group_end.tolist()]
    products = [
        torch.ops.polybit.linear_int8(x[start:end], q[expert], absmax[expert], None, float(threshold), by_row)
        for expert, (start, end) in enumerate(pairwise(ends))
        if start < end
    ]
    return torch.cat([*products, x.new_zeros(len(x) - ends[-1], n)])


def linear_int8_trained(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, threshold: float = 6.0) -> Tensor:
    """LLM.int8() with a weight that is trained: `weight` is quantized to int8 by rows on the way, then as linear_int8.

    x: fp32, fp16 or bf16 [..., K]; weight: a plain tensor of one of these dtypes [N, K]; bias [N] or None, rounded to
    x's dtype. Returns y [..., N] in x's dtype (autocast's, where it is on). Differentiable in x, weight and bias, both
    roundings taken as the identity: dx = dy W with the quantized W, the derivative of what was computed; dW = dy^T x
    in x's dtype, with x as it came, then rounded to weight's dtype. Forward mode (torch.func.jvp) raises.
    Source: Dettmers et al., "LLM.int8()", 2022, section 3 and appendix E. Raises TypeError or ValueError when arguments
    do not fit.
    """
    if isinstance(weight, QTensor):
        raise TypeError(f"linear_int8_trained: weight must be a plain tensor, got a QTensor ({weight.format_name})")
    if weight.dtype not in KERNEL_DTYPES:
        raise TypeError(f"linear_int8_trained: weight must be fp32, fp16 or bf16, got {weight.dtype}")
    x = _compute_dtype("linear_int8_trained", x)
    _check("linear_int8_trained", x, weight.shape, weight.device, bias)
    if bias is not None:
        bias = bias.to(x.dtype)
    function: Any = autograd.LinearInt8Trained
    return cast(Tensor, function.apply(x, weight, bias, float(threshold), int(deterministic())))


def embedding(index: Tensor, weight: QTensor) -> Tensor:
    """Rows `index` (int64 or int32, any shape) of a k-bit or int8 table [n, k]: a tensor [..., k] of weight's dtype."""
    _check_quantized("embedding", weight)
    if not isinstance(index, Tensor):
        raise TypeError(f"embedding: index must be a tensor of int64 or int32, got {type(index).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"embedding: weight must have 2 dimensions, got {list(weight.shape)}")
    if index.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"embedding: index must be int64 or int32, got {index.dtype}")
    if index.device != weight.device:
        raise ValueError(f"embedding: index is on {index.device}, the weight on {weight.device}")
    format, (n, k) = weight.format, weight.shape
    if format.kind == "kbit":
        sizes = n, k, weight.block_size, format.bits, weight.place, 0
        y = torch.ops.polybit.gather_kbit(index, *weight.operands(), *sizes, weight.dtype)
    elif format.kind == "int8":
        y = torch.ops.polybit.gather_int8(index, weight.q, weight.absmax, weight.dtype)
    else:
        y = weight.dequantize()[index]
    return cast(Tensor, y)


def _is_frozen(weight: Any) -> bool:
    return type(weight) is QTensor and not (weight.requires_grad and torch.is_grad_enabled())


# Only the plain case: everything else takes torch's own path, on the restored value.
def _torch_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not _is_frozen(weight) or isinstance(input, QTensor) or isinstance(bias, QTensor):
        return NotImplemented
    weight = cast(QTensor, weight)
    if (
        weight.dim() != 2
        or weight.format.kind != "kbit"
        or input.dtype not in (weight.dtype, _compute_dtype("linear", input).dtype)
    ):
        return NotImplemented
    if weight.dtype not in KERNEL_DTYPES:
        return NotImplemented
    return linear(input, weight, bias)


def _torch_embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: Any = None, **_: Any
) -> Any:
    if not _is_frozen(weight) or isinstance(input, QTensor) or weight.dim() != 2 or max_norm is not None:
        return NotImplemented
    return embedding(input, cast(QTensor, weight)) if weight.dtype in KERNEL_DTYPES else NotImplemented


TORCH_FUNCTIONS[F.linear] = _torch_linear
TORCH_FUNCTIONS[F.embedding] = _torch_embedding
