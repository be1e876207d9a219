"""Derivatives of the products against those of the dense computation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from polybit.functional import linear, linear_int8
from polybit.qtensor import QTensor, quantize

KBIT = ["nf4", "fp4", "nf3", "lloyd2"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leaves(k: int, n: int) -> tuple[Tensor, Tensor]:
    return randn(2, 5, k, seed=1).requires_grad_(), randn(n, seed=2).requires_grad_()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", KBIT)
@pytest.mark.parametrize(("n", "k"), [(32, 64), (13, 72)])
def test_linear(format: str, double_quant: bool, n: int, k: int) -> None:
    weight = quantize(randn(n, k), format, double_quant=double_quant)
    dy = randn(2, 5, n, seed=3)
    x, bias = leaves(k, n)
    linear(x, weight, bias).backward(dy)
    xd, biasd = leaves(k, n)
    F.linear(xd, weight.dequantize(), biasd).backward(dy)
    torch.testing.assert_close(x.grad, xd.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, biasd.grad, rtol=1e-5, atol=1e-5)


def test_second_derivative_of_linear() -> None:
    weight = quantize(randn(16, 64), "nf4")

    def twice(product: torch.nn.Module | object) -> Tensor:
        x = randn(3, 64, seed=1).requires_grad_()
        (dx,) = torch.autograd.grad(product(x).square().sum(), x, create_graph=True)  # type: ignore[operator]
        (ddx,) = torch.autograd.grad(dx.square().sum(), x)
        return ddx

    got = twice(lambda x: linear(x, weight))
    wanted = twice(lambda x: F.linear(x, weight.dequantize()))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_linear_int8(threshold: float) -> None:
    weight = quantize(randn(24, 64), "int8")
    dy = randn(2, 5, 24, seed=3)
    x, bias = leaves(64, 24)
    linear_int8(x, weight, bias, threshold=threshold).backward(dy)
    torch.testing.assert_close(x.grad, dy @ weight.dequantize(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, dy.sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_grouped() -> None:
    experts, n, k = 3, 16, 64
    weight = quantize(randn(experts, n, k), "nf4")
    ends = torch.tensor([4, 4, 9], dtype=torch.int32)
    x = randn(11, k, seed=1).requires_grad_()
    y = torch.ops.polybit.matmul_kbit_grouped(x, ends, *weight.operands(), n, weight.block_size, 4, 0, 0)
    dy = randn(11, n, seed=2)
    y.backward(dy)
    dense = weight.dequantize()
    expected = torch.cat([dy[:4] @ dense[0], dy[4:9] @ dense[2], torch.zeros(2, k)])
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_their_input(dtype: torch.dtype) -> None:
    weight = quantize(randn(16, 64).to(dtype), "nf4")
    x, bias = randn(3, 64, seed=1).to(dtype).requires_grad_(), randn(16, seed=2).requires_grad_()
    linear(x, weight, bias).sum().backward()
    assert x.grad is not None and bias.grad is not None
    assert (x.grad.dtype, bias.grad.dtype) == (dtype, torch.float32)
    expected = torch.ones(3, 16) @ weight.dequantize().float()
    torch.testing.assert_close(x.grad.float(), expected, rtol=2e-2, atol=5e-2)


def test_bias_alone_and_frozen_bias() -> None:
    weight = quantize(randn(16, 64), "nf4")
    x, bias = leaves(64, 16)
    linear(x.detach(), weight, bias).sum().backward()
    assert x.grad is None and torch.equal(bias.grad, torch.full((16,), 10.0))
    linear(x, weight, bias.detach()).sum().backward()
    assert x.grad is not None


def test_checkpointing_gives_the_same_gradient() -> None:
    from torch.utils.checkpoint import checkpoint

    weight = quantize(randn(16, 64), "nf4")
    x, _ = leaves(64, 16)
    linear(x, weight).square().sum().backward()
    again, _ = leaves(64, 16)
    checkpoint(lambda x: linear(x, weight), again, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, again.grad)


def test_functional_linear_of_a_qtensor_differentiates() -> None:
    weight = quantize(randn(16, 64), "nf4")
    assert isinstance(weight, QTensor)
    x, bias = leaves(64, 16)
    F.linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(2, 5, 16) @ weight.dequantize(), rtol=1e-5, atol=1e-5)
