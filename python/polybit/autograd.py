"""Derivatives of the matrix products. Stored weights get none; their bytes are not differentiable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Grads = tuple[Tensor | None, ...]

# Positions of the arguments in ops.def.
_KBIT_BIAS, _KBIT_SIZES = 7, 9
_GROUPED_SIZES = 8
_TRANSPOSED_SIZES = 7


def _bias_grad(dy: Tensor, dtype: torch.dtype) -> Tensor:
    return dy.reshape(-1, dy.shape[-1]).sum(0).to(dtype)


def _setup_matmul_kbit(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *weight = inputs[:_KBIT_BIAS]
    bias = inputs[_KBIT_BIAS]
    ctx.save_for_backward(*weight)
    ctx.k, ctx.sizes = x.shape[-1], inputs[_KBIT_SIZES + 1 :]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _matmul_kbit(ctx: Any, dy: Tensor) -> Grads:
    grads: list[Tensor | None] = [None] * (_KBIT_SIZES + 1 + len(ctx.sizes))
    if ctx.needs_input_grad[0]:
        grads[0] = torch.ops.polybit.matmul_kbit_transposed(dy, *ctx.saved_tensors, ctx.k, *ctx.sizes)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[_KBIT_BIAS]:
        grads[_KBIT_BIAS] = _bias_grad(dy, ctx.bias_dtype)
    return tuple(grads)


def _setup_matmul_kbit_transposed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, *weight = inputs[:_TRANSPOSED_SIZES]
    ctx.save_for_backward(*weight)
    ctx.n, ctx.sizes = dy.shape[-1], inputs[_TRANSPOSED_SIZES + 1 :]


def _matmul_kbit_transposed(ctx: Any, ddx: Tensor) -> Grads:
    dy = torch.ops.polybit.matmul_kbit(ddx, *ctx.saved_tensors, None, None, ctx.n, *ctx.sizes)
    return (dy, *[None] * (_TRANSPOSED_SIZES + len(ctx.sizes)))


def _setup_matmul_kbit_grouped(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *group_and_weight = inputs[:_GROUPED_SIZES]
    ctx.save_for_backward(*group_and_weight)
    ctx.k, ctx.sizes = x.shape[-1], inputs[_GROUPED_SIZES + 1 :]


def _matmul_kbit_grouped(ctx: Any, dy: Tensor) -> Grads:
    dx = torch.ops.polybit.matmul_kbit_grouped_transposed(dy, *ctx.saved_tensors, ctx.k, *ctx.sizes)
    return (dx, *[None] * (_GROUPED_SIZES + len(ctx.sizes)))


def _setup_linear_int8(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, weight_absmax, bias, *_ = inputs
    ctx.save_for_backward(weight, weight_absmax)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_int8(ctx: Any, dy: Tensor) -> Grads:
    dx = dbias = None
    if ctx.needs_input_grad[0]:
        # The rounding of x is taken as the identity (straight-through), as LLM.int8() does.
        dx = torch.ops.polybit.linear_int8_transposed(dy, *ctx.saved_tensors)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        dbias = _bias_grad(dy, ctx.bias_dtype)
    return dx, None, None, dbias, None, None


def register() -> None:
    """Register the derivatives with torch; called once, at import of the package, when the ops are defined."""
    from polybit.ops import LIB

    rules: dict[str, tuple[Callable[..., Grads], Callable[..., None]]] = {
        "matmul_kbit": (_matmul_kbit, _setup_matmul_kbit),
        "matmul_kbit_transposed": (_matmul_kbit_transposed, _setup_matmul_kbit_transposed),
        "matmul_kbit_grouped": (_matmul_kbit_grouped, _setup_matmul_kbit_grouped),
        "linear_int8": (_linear_int8, _setup_linear_int8),
    }
    for op, (backward, setup_context) in rules.items():
        torch.library.register_autograd(f"polybit::{op}", backward, setup_context=setup_context, lib=LIB)


register()
