"""Derivatives of the products, to every order. Stored weights get none; their bytes are not differentiable.

Every product is linear in its first argument (plus a bias), so a rule is two products: `vjp` takes the gradient of the
output back, `jvp` takes a tangent forward. docs/numerics.md, Derivatives, has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

ops = torch.ops.polybit


class Rule(NamedTuple):
    """The derivative of an op(x, weight ..., bias, ..., sizes ...).

    `weight`: how many tensors follow x; `bias`: its position, 0 without one; `sizes`: where the rest begins.
    `vjp(dy, k, weight, sizes)`: the gradient of x, whose last dimension is k.
    `jvp(dx, dbias, weight, sizes)`: the tangent of the output.
    """

    weight: int
    bias: int
    sizes: int
    vjp: Callable[[Tensor, int, Sequence[Any], Sequence[Any]], Tensor]
    jvp: Callable[[Tensor, Tensor | None, Sequence[Any], Sequence[Any]], Tensor]


def _dense(dx: Tensor, weight: Sequence[Any], bias: Tensor | None = None) -> Tensor:
    return F.linear(dx, ops.dequantize_int8(*weight, dx.dtype), bias)


# The rounding of x to int8 is taken as the identity (straight-through), as LLM.int8() does.
RULES = {
    "matmul_kbit": Rule(
        weight=6,
        bias=7,
        sizes=9,
        vjp=lambda dy, k, w, sizes: ops.matmul_kbit_transposed(dy, *w, k, *sizes[1:]),
        jvp=lambda dx, dbias, w, sizes: ops.matmul_kbit(dx, *w, dbias, None, *sizes),
    ),
    "matmul_kbit_transposed": Rule(
        weight=6,
        bias=0,
        sizes=7,
        vjp=lambda dy, k, w, sizes: ops.matmul_kbit(dy, *w, None, None, k, *sizes[1:]),
        jvp=lambda dx, dbias, w, sizes: ops.matmul_kbit_transposed(dx, *w, *sizes),
    ),
    "matmul_kbit_grouped": Rule(
        weight=7,
        bias=0,
        sizes=8,
        vjp=lambda dy, k, w, sizes: ops.matmul_kbit_grouped_transposed(dy, *w, k, *sizes[1:]),
        jvp=lambda dx, dbias, w, sizes: ops.matmul_kbit_grouped(dx, *w, *sizes),
    ),
    "matmul_kbit_grouped_transposed": Rule(
        weight=7,
        bias=0,
        sizes=8,
        vjp=lambda dy, k, w, sizes: ops.matmul_kbit_grouped(dy, *w, k, *sizes[1:]),
        jvp=lambda dx, dbias, w, sizes: ops.matmul_kbit_grouped_transposed(dx, *w, *sizes),
    ),
    "linear_int8": Rule(
        weight=2,
        bias=3,
        sizes=4,
        vjp=lambda dy, k, w, sizes: ops.linear_int8_transposed(dy, *w),
        jvp=lambda dx, dbias, w, sizes: _dense(dx, w, dbias),
    ),
    "linear_int8_transposed": Rule(
        weight=2,
        bias=0,
        sizes=3,
        vjp=lambda dy, k, w, sizes: _dense(dy, w),
        jvp=lambda dx, dbias, w, sizes: ops.linear_int8_transposed(dx, *w),
    ),
}


def sum_rows(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a bias: dy [..., N] summed over its rows."""
    return dy.reshape(-1, dy.shape[-1]).sum(0).to(dtype)


def _outer(dy: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a weight: dy^T x over all rows, computed in the dtype of x."""
    return (dy.reshape(-1, dy.shape[-1]).t() @ x.reshape(-1, x.shape[-1])).to(dtype)


def _function(name: str, rule: Rule) -> Any:
    """The node of the graph. Its last argument is the set of dispatch keys that the op was called with."""
    redispatch = getattr(ops, name).default.redispatch

    def forward(ctx: Any, *args: Any) -> Tensor:
        *inputs, keys = args
        # Grad modes are on again for the levels of torch.func below this one.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            output = redispatch(keys & torch._C._after_autograd_keyset, *inputs)
        weight = inputs[1 : 1 + rule.weight]
        ctx.save_for_backward(*weight)
        ctx.save_for_forward(*weight)
        ctx.k, ctx.sizes, ctx.arguments = inputs[0].shape[-1], inputs[rule.sizes :], len(args)
        bias = inputs[rule.bias] if rule.bias else None
        ctx.bias_dtype = None if bias is None else bias.dtype
        return cast(Tensor, output)

    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * ctx.arguments
        if ctx.needs_input_grad[0]:
            grads[0] = rule.vjp(dy, ctx.k, ctx.saved_tensors, ctx.sizes)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[rule.bias]:
            grads[rule.bias] = sum_rows(dy, ctx.bias_dtype)
        return tuple(grads)

    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        dbias = tangents[rule.bias] if rule.bias else None
        return rule.jvp(tangents[0], dbias, ctx.saved_tensors, ctx.sizes)

    parts: tuple[Callable[..., Any], ...] = (forward, backward, jvp)
    return type(name, (_SingleLevelFunction,), {part.__name__: staticmethod(part) for part in parts})


def _kernel(name: str, rule: Rule) -> Callable[..., Tensor]:
    """What runs under the Autograd key: a node where a derivative is wanted, else the op itself.

    torch.library.register_autograd would do, but for torch.func.grad and jvp, which it refuses.
    """
    apply = _function(name, rule).apply
    redispatch = getattr(ops, name).default.redispatch
    differentiable = (0, rule.bias) if rule.bias else (0,)

    def kernel(keys: torch._C.DispatchKeySet, *args: Any) -> Tensor:
        inputs = [args[i] for i in differentiable if args[i] is not None]
        reverse = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        if not reverse and forward_ad._current_level < 0:
            with torch._C._AutoDispatchBelowAutograd():
                return cast(Tensor, redispatch(keys & torch._C._after_autograd_keyset, *args))
        if not torch._C._are_functorch_transforms_active():
            return cast(Tensor, apply(*args, keys))
        # One level of torch.func, the innermost, is being differentiated here; the op's call goes on to the next.
        with enable_single_level_autograd_function():
            return cast(Tensor, apply(*args, keys))

    return kernel


class LinearKbitInt8(torch.autograd.Function):
    """x W^T + bias with x quantized to int8 by rows and W k-bit: (x, bias, operands of W ..., sizes).

    The roundings of x and of the codebook are taken as the identity: dx = dy W. No forward mode, see below.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, *weight: Any) -> Tensor:
        *run, sizes = weight
        codes, x_absmax, _ = ops.quantize_int8(x, 0.0)
        return cast(Tensor, ops.matmul_kbit_int8(codes, x_absmax, *run, bias, *sizes, x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, *run, ctx.sizes = inputs
        ctx.save_for_backward(*run)
        ctx.k, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dbias = None
        compiling = torch.compiler.is_compiling()  # dynamo denies what only torch.func asks for
        if compiling or ctx.needs_input_grad[0]:
            dx = ops.matmul_kbit_transposed(dy, *ctx.saved_tensors, ctx.k, *ctx.sizes[1:])
        if ctx.bias_dtype is not None and (compiling or ctx.needs_input_grad[1]):
            dbias = sum_rows(dy, ctx.bias_dtype)
        return dx, dbias, *([None] * 7)


class LinearInt8Trained(torch.autograd.Function):
    """linear_int8 of a dense weight that is quantized by rows on the way: (x, weight, bias, threshold, row_outliers).

    Both roundings are taken as the identity, so that dx = dy W and dW = dy^T x, with the W that the product has seen
    (its int8 codes, which are made again instead of kept) and with x as it came. No forward mode: torch.compile refuses
    a Function that has one.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, threshold: float, row_outliers: int) -> Tensor:
        q, absmax, _ = ops.quantize_int8(weight, 0.0)
        return cast(Tensor, ops.linear_int8(x, q, absmax, bias, threshold, row_outliers))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, _, _ = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        # dynamo denies that an input needs a gradient which only torch.func asks for; it drops what nobody uses.
        compiling = torch.compiler.is_compiling()
        if compiling or ctx.needs_input_grad[0]:
            dx = _LinearInt8TrainedTransposed.apply(dy, weight)  # type: ignore[no-untyped-call]
        if compiling or ctx.needs_input_grad[1]:
            dweight = _outer(dy, x, weight.dtype)
        if ctx.bias_dtype is not None and (compiling or ctx.needs_input_grad[2]):
            dbias = sum_rows(dy, ctx.bias_dtype)
        return dx, dweight, dbias, None, None


class _LinearInt8TrainedTransposed(torch.autograd.Function):
    """dx = dy W of LinearInt8Trained, so that it has derivatives, too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dy: Tensor, weight: Tensor) -> Tensor:
        q, absmax, _ = ops.quantize_int8(weight, 0.0)
        return cast(Tensor, ops.linear_int8_transposed(dy, q, absmax))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
        dy, weight = ctx.saved_tensors
        q, absmax, _ = ops.quantize_int8(weight, 0.0)
        return _dense(ddx, (q, absmax)), _outer(dy, ddx, weight.dtype)


def register() -> None:
    """Register the derivatives with torch; called once, at import of the package, when the ops are defined."""
    from polybit.ops import LIB

    for name, rule in RULES.items():
        LIB.impl(name, _kernel(name, rule), "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]


register()
