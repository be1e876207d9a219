"""LLM.int8() with a trained weight: against the dense layer in numbers, loss and state dict."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.func import grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from polybit.functional import linear_int8, linear_int8_trained
from polybit.nn import Linear8bit, Linear8bitTraining
from polybit.qtensor import quantize


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(got: Tensor | None, wanted: Tensor) -> float:
    assert got is not None
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_forward_is_linear_int8_of_the_quantized_weight(
    dtype: torch.dtype, weight_dtype: torch.dtype, threshold: float
) -> None:
    x, weight, bias = randn(2, 5, 64, seed=1).to(dtype), randn(16, 64).to(weight_dtype), randn(16, seed=2)
    got = linear_int8_trained(x, weight, bias, threshold=threshold)
    assert got.dtype == dtype
    assert torch.equal(got, linear_int8(x, quantize(weight, "int8"), bias, threshold=threshold))


@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)])
def test_gradients(dtype: torch.dtype, error: float, threshold: float) -> None:
    """dx = dy W with the quantized W, dW = dy^T x, dbias = the sum of dy; each in the dtype of its tensor."""
    x, weight, bias = randn(2, 5, 64, seed=1).to(dtype), randn(16, 64), randn(16, seed=2)
    dy = randn(2, 5, 16, seed=3).to(dtype)
    for leaf in (x, weight, bias):
        leaf.requires_grad_()
    linear_int8_trained(x, weight, bias, threshold=threshold).backward(dy)
    rows, dense = dy.double().reshape(-1, 16), quantize(weight, "int8").dequantize()
    assert relative(x.grad, dy.double() @ dense.double()) < error
    assert relative(weight.grad, rows.t() @ x.detach().double().reshape(-1, 64)) < error
    assert relative(bias.grad, rows.sum(0)) < error
    assert (x.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (dtype, torch.float32, torch.float32)


def test_gradients_are_near_those_of_the_dense_layer() -> None:
    dense = nn.Linear(64, 16)
    layer = Linear8bitTraining.from_linear(nn.Linear(64, 16))
    layer.load_state_dict(dense.state_dict())
    x = randn(32, 64, seed=1)
    for module in (dense, layer):
        F.mse_loss(module(x), randn(32, 16, seed=2)).backward()
    assert relative(layer.weight.grad, dense.weight.grad) < 0.01
    assert relative(layer.bias.grad, dense.bias.grad) < 0.01


def test_only_what_is_asked_for_is_computed() -> None:
    x, weight = randn(5, 64, seed=1), randn(16, 64)
    linear_int8_trained(x.requires_grad_(), weight).sum().backward()
    assert x.grad is not None and weight.grad is None
    linear_int8_trained(x.detach(), weight.requires_grad_()).sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(16, 64))


def test_second_derivatives_are_straight_through() -> None:
    """With x in high precision and W on the int8 grid, all derivatives are those of the dense product."""
    weight = quantize(randn(16, 64), "int8").dequantize()
    weight = quantize(weight, "int8").dequantize()  # a fixed point but for the last bit
    x = randn(3, 64, seed=1)

    def twice(product: object) -> tuple[Tensor, ...]:
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        first = torch.autograd.grad(product(a, w).pow(3).sum(), (a, w), create_graph=True)  # type: ignore[operator]
        return torch.autograd.grad(sum(g.sin().sum() for g in first), (a, w))

    got = twice(lambda x, w: linear_int8_trained(x, w, threshold=1e-6) * 0.01)
    wanted = twice(lambda x, w: F.linear(x, w) * 0.01)
    for one, other in zip(got, wanted, strict=True):
        assert relative(one, other) < 1e-4


def test_torch_func() -> None:
    x, weight = randn(3, 64, seed=1), quantize(randn(16, 64), "int8").dequantize()
    mine = lambda x, w: linear_int8_trained(x, w, threshold=1e-6).square()  # noqa: E731
    theirs = lambda x, w: F.linear(x, w).square()  # noqa: E731
    for transform in (
        lambda f: jacrev(f, argnums=(0, 1))(x, weight),
        lambda f: vmap(grad(lambda x, w: f(x, w).sum(), argnums=(0, 1)), (0, None))(x, weight),
        lambda f: vmap(f, (None, 0))(x, torch.stack([weight, weight * 2])),
    ):
        torch.testing.assert_close(transform(mine), transform(theirs), rtol=1e-4, atol=1e-3)


def gradients(call: Callable[[Tensor], Tensor], layer: nn.Module) -> list[Tensor | None]:
    x = (randn(5, 64, seed=1) * 4).requires_grad_()  # some beyond the threshold
    layer.zero_grad()
    call(x).square().sum().backward()
    return [x.grad, *(p.grad for p in layer.parameters())]


def test_activation_checkpointing_and_saved_tensor_hooks_give_the_same_gradients() -> None:
    layer = Linear8bitTraining(64, 16)

    def offloaded(x: Tensor) -> Tensor:
        with save_on_cpu():
            y: Tensor = layer(x)
        return y

    wanted = [tensor.clone() for tensor in gradients(layer, layer) if tensor is not None]
    assert [tensor.shape for tensor in wanted] == [(5, 64), (16, 64), (16,)]
    for call in (
        lambda x: checkpoint(layer, x, use_reentrant=False),
        lambda x: checkpoint(layer, x, use_reentrant=True),
        offloaded,
    ):
        got = gradients(call, layer)
        assert all(one is not None and torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def train(layer: nn.Module, steps: int) -> float:
    """Regression onto a fixed linear map with a large input column; the last loss."""
    teacher, generator = randn(8, 32, seed=1), torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    loss = torch.empty(())
    for _ in range(steps):
        x = torch.randn(64, 32, generator=generator)
        x[:, 3] *= 8
        noise = torch.randn(64, 8, generator=generator)
        loss = F.mse_loss(layer(x), x @ teacher.t() + noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_a_regression_learns_as_well_as_in_fp32() -> None:
    torch.manual_seed(0)
    dense = nn.Linear(32, 8)
    layer = Linear8bitTraining(32, 8)
    layer.load_state_dict(dense.state_dict())
    start = train(Linear8bitTraining.from_linear(nn.Linear(32, 8)), 1)
    wanted, got = train(dense, 300), train(layer, 300)
    assert wanted < 1.3 and start > 20  # the noise has variance 1
    assert abs(got - wanted) < 0.05 * wanted, f"int8 {got:.4f}, fp32 {wanted:.4f}"


def test_bf16_weights_under_autocast_learn_too() -> None:
    torch.manual_seed(0)
    layer = Linear8bitTraining(32, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(randn(3, 32)).dtype == torch.bfloat16
    with torch.no_grad():
        before = float(F.mse_loss(layer(randn(64, 32)), randn(64, 32) @ randn(8, 32, seed=1).t()))
    half = Linear8bitTraining.from_linear(layer.to(torch.bfloat16))
    optimizer = torch.optim.SGD(half.parameters(), lr=0.5)
    for _ in range(60):
        loss = F.mse_loss(half(randn(64, 32).bfloat16()).float(), randn(64, 32) @ randn(8, 32, seed=1).t())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert half.weight.dtype == torch.bfloat16 and float(loss.detach()) < 0.05 * before


def test_the_state_dict_is_that_of_a_linear() -> None:
    dense, layer = nn.Linear(64, 16), Linear8bitTraining(64, 16, threshold=0.0)
    assert list(layer.state_dict()) == ["weight", "bias"]
    layer.load_state_dict(dense.state_dict(), strict=True)
    nn.Linear(64, 16).load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(layer.weight, dense.weight) and type(layer.weight) is nn.Parameter
    shared = Linear8bitTraining.from_linear(dense.eval(), threshold=3.0)
    assert shared.weight is dense.weight and shared.bias is dense.bias
    assert shared.threshold == 3.0 and not shared.training and "threshold=3.0" in repr(shared)


def test_the_trained_layer_quantizes_to_the_same_outputs() -> None:
    layer, x = Linear8bitTraining(64, 16), randn(5, 64) * 4
    frozen = layer.quantized()
    assert isinstance(frozen, Linear8bit) and torch.equal(frozen(x), layer(x))


def test_bad_arguments() -> None:
    x, weight = randn(5, 64), randn(16, 64)
    with pytest.raises(TypeError, match="linear_int8_trained: weight must be a plain tensor, got a QTensor"):
        linear_int8_trained(x, quantize(weight, "int8"))
    with pytest.raises(TypeError, match="weight must be fp32, fp16 or bf16, got torch.float64"):
        linear_int8_trained(x, weight.double())
    with pytest.raises(ValueError, match="the last dimension of x must be 64"):
        linear_int8_trained(x[:, :32], weight)
    with pytest.raises(ValueError, match="weight must have 2 dimensions"):
        linear_int8_trained(x, weight[None])
    with pytest.raises(ValueError, match="threshold must be 0 or positive, got -1"):
        Linear8bitTraining(64, 16, threshold=-1)
