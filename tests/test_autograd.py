"""Derivatives of the products against those of the dense computation in fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from polybit.formats import get_format, list_formats
from polybit.functional import linear, linear_int8
from polybit.nn import Linear4bit, Linear8bit, LinearKbit
from polybit.qtensor import QTensor, quantize

KBIT = [name for name in list_formats() if get_format(name).kind == "kbit"]
# torch says this of the decompositions that it loads for its own forward mode.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

Product = Callable[[Tensor, "Tensor | None"], Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def leaves(k: int, n: int) -> tuple[Tensor, Tensor]:
    return randn(2, 5, k, seed=1).requires_grad_(), randn(n, seed=2).requires_grad_()


def assert_near(got: Tensor | None, wanted: Tensor, size: Tensor) -> None:
    """`wanted`: the sum in fp64; `size`: the sum of its terms' magnitudes, which the rounding in fp32 scales with."""
    assert got is not None and got.dtype == torch.float32
    error = (got.double() - wanted).abs()
    assert (error <= 2.0**-21 * size).all(), f"{(error / size).max():.3g} of the size"


def grouped(weight: QTensor, ends: Tensor) -> Callable[[Tensor], Tensor]:
    _, n, _ = weight.shape
    sizes = (n, weight.block_size, weight.bits, 0, 0)
    return lambda x: torch.ops.polybit.matmul_kbit_grouped(x, ends, *weight.operands(), *sizes)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", KBIT)
@pytest.mark.parametrize(("n", "k"), [(32, 64), (13, 72)])
def test_linear(format: str, double_quant: bool, n: int, k: int) -> None:
    weight = quantize(randn(n, k), format, double_quant=double_quant)
    dy = randn(2, 5, n, seed=3)
    x, bias = leaves(k, n)
    linear(x, weight, bias).backward(dy)
    dense = weight.dequantize().double()
    assert_near(x.grad, dy.double() @ dense, dy.double().abs() @ dense.abs())
    assert_near(bias.grad, dy.double().sum((0, 1)), dy.double().abs().sum((0, 1)))


@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_linear_int8(threshold: float) -> None:
    weight = quantize(randn(24, 64), "int8")
    dy = randn(2, 5, 24, seed=3)
    x, bias = leaves(64, 24)
    linear_int8(x, weight, bias, threshold=threshold).backward(dy)
    dense = weight.dequantize().double()
    assert_near(x.grad, dy.double() @ dense, dy.double().abs() @ dense.abs())
    assert_near(bias.grad, dy.double().sum((0, 1)), dy.double().abs().sum((0, 1)))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", KBIT)
def test_grouped(format: str, double_quant: bool) -> None:
    experts, n, k = 3, 16, 64
    weight = quantize(randn(experts, n, k), format, double_quant=double_quant)
    ends = torch.tensor([4, 4, 9], dtype=torch.int32)
    x = randn(11, k, seed=1).requires_grad_()
    dy = randn(11, n, seed=2)
    grouped(weight, ends)(x).backward(dy)
    dense = weight.dequantize().double()

    def product(a: Tensor, w: Tensor) -> Tensor:
        return torch.cat([a[:4] @ w[0], a[4:9] @ w[2], torch.zeros(2, k).double()])

    assert_near(x.grad, product(dy.double(), dense), product(dy.double().abs(), dense.abs()))


def checked_products() -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Every differentiable op as a function of its tensors with a derivative. int8: all columns in high precision."""
    weight, experts = quantize(randn(5, 16), "nf4"), quantize(randn(3, 4, 16), "nf3", block_size=16)
    int8, ends = quantize(randn(5, 16), "int8"), torch.tensor([1, 1, 3], dtype=torch.int32)
    sizes, stack = (64, 4, 0, 0), (16, 3, 0, 0)
    ops = torch.ops.polybit
    x, dy, bias = randn(2, 16, seed=1), randn(2, 5, seed=2), randn(5, seed=3)
    return {
        "matmul_kbit": (lambda x, b: linear(x, weight, b), (x, bias)),
        "matmul_kbit_transposed": (
            lambda dy: ops.matmul_kbit_transposed(dy, *weight.operands(), 16, *sizes),
            (dy,),
        ),
        "matmul_kbit_grouped": (grouped(experts, ends), (randn(4, 16, seed=4),)),
        "matmul_kbit_grouped_transposed": (
            lambda dy: ops.matmul_kbit_grouped_transposed(dy, ends, *experts.operands(), 16, *stack),
            (randn(4, 4, seed=5),),
        ),
        "linear_int8": (lambda x, b: linear_int8(x, int8, b, threshold=1e-6), (x, bias)),
        "linear_int8_transposed": (lambda dy: ops.linear_int8_transposed(dy, int8.q, int8.absmax), (dy,)),
    }


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Thousands of tiny products: on a busy machine each would wait for a thread that is not scheduled."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@forward_mode
@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*is not a double precision floating point:UserWarning")
@pytest.mark.filterwarnings("ignore:Please use `torch.vmap` instead:FutureWarning")  # torch 2.6's own gradcheck
@pytest.mark.parametrize("op", checked_products())
def test_gradcheck(op: str) -> None:
    """Finite differences of any width are exact for a linear function, so that fp32 will do."""
    f, inputs = checked_products()[op]
    inputs = tuple(x.requires_grad_() for x in inputs)
    limits: dict[str, Any] = {"eps": 0.5, "atol": 1e-3, "rtol": 1e-4}
    assert torch.autograd.gradcheck(f, inputs, **limits, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, inputs, **limits, check_fwd_over_rev=True)


def test_a_derivative_is_registered_for_every_product() -> None:
    from polybit.autograd import RULES

    assert set(RULES) == set(checked_products())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_second_derivative(kind: str) -> None:
    """dx is linear in dy; of int8 it is that of the product with x taken unrounded."""
    weight = quantize(randn(16, 64), kind)

    def twice(product: Callable[[Tensor], Tensor]) -> Tensor:
        x = randn(3, 64, seed=1).requires_grad_()
        (dx,) = torch.autograd.grad(product(x).square().sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.square().sum(), x)
        return ddx

    dense = weight.dequantize()
    if kind == "nf4":
        got = twice(lambda x: linear(x, weight))
        wanted = twice(lambda x: F.linear(x, dense))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)
    else:
        got = twice(lambda x: linear_int8(x, weight, threshold=0.0))
        y = linear_int8(randn(3, 64, seed=1), weight, threshold=0.0)
        gram = dense.t() @ dense
        torch.testing.assert_close(got, 8 * y @ dense @ gram, rtol=1e-4, atol=1e-1)


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


class Adapter(torch.nn.Module):
    """A frozen quantized layer and a trained low-rank one beside it."""

    def __init__(self, base: torch.nn.Module, k: int, n: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = torch.nn.Parameter(randn(4, k, seed=5) * 0.1)
        self.up = torch.nn.Parameter(randn(n, 4, seed=6) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + x @ self.down.t() @ self.up.t()
        return y


def adapters(layer: torch.nn.Module, dense: torch.nn.Linear) -> tuple[torch.nn.Sequential, torch.nn.Sequential]:
    """Two adapters one behind the other, so that the first's gradient passes through the second's frozen weight."""
    return tuple(  # type: ignore[return-value]
        torch.nn.Sequential(Adapter(base, 32, 32), torch.nn.Tanh(), Adapter(base, 32, 32)) for base in (layer, dense)
    )


@pytest.mark.parametrize("kind", ["nf4", "lloyd2", "int8"])
def test_adapters(kind: str) -> None:
    source = torch.nn.Linear(32, 32)
    layer = Linear8bit.from_linear(source, threshold=1e-6) if kind == "int8" else LinearKbit.from_linear(source, kind)
    dense = torch.nn.Linear(32, 32)
    dense.load_state_dict({"weight": layer.weight.dequantize(), "bias": source.bias.detach()})
    mine, theirs = adapters(layer, dense)
    for model in (mine, theirs):
        model(randn(7, 32, seed=1)).square().sum().backward()
    got = {name: p.grad for name, p in mine.named_parameters() if p.requires_grad}
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert list(got) == list(wanted) == ["0.down", "0.up", "2.down", "2.up"]
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-4)


LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "nf4": lambda: Linear4bit(64, 16),
    "lloyd3": lambda: LinearKbit(64, 16, format="lloyd3", double_quant=False),
    "int8": lambda: Linear8bit(64, 16),
}


def gradient(layer: torch.nn.Module, call: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    x, _ = leaves(64, 16)
    layer.zero_grad()
    call(x).square().sum().backward()
    assert x.grad is not None
    return x.grad, layer.bias.grad.clone()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_activation_checkpointing_gives_the_same_gradient(layer: str, use_reentrant: bool) -> None:
    module = LAYERS[layer]()
    wanted = gradient(module, module)
    got = gradient(module, lambda x: checkpoint(module, x, use_reentrant=use_reentrant))
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_saved_goes_through_the_hooks(layer: str) -> None:
    module = LAYERS[layer]()
    wanted = gradient(module, module)
    saved: list[Tensor] = []

    def pack(x: Tensor) -> int:
        saved.append(x.clone())
        return len(saved) - 1

    def call(x: Tensor) -> Tensor:
        with saved_tensors_hooks(pack, lambda i: saved[i]):
            y: Tensor = module(x)
        return y

    got = gradient(module, call)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    inner = list(module.weight.inner_tensors().values())
    assert sum(any(torch.equal(s, t) for s in saved if s.dtype == t.dtype) for t in inner) == len(inner)


@pytest.mark.parametrize("layer", LAYERS)
def test_save_on_cpu(layer: str) -> None:
    module = LAYERS[layer]()
    wanted = gradient(module, module)

    def call(x: Tensor) -> Tensor:
        with save_on_cpu():
            y: Tensor = module(x)
        return y

    got = gradient(module, call)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_a_weight_changed_between_forward_and_backward_is_an_error() -> None:
    weight = quantize(randn(16, 64), "nf4")
    x, _ = leaves(64, 16)
    y = linear(x, weight)
    weight.q.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_functional_linear_of_a_qtensor_differentiates() -> None:
    weight = quantize(randn(16, 64), "nf4")
    assert isinstance(weight, QTensor)
    x, bias = leaves(64, 16)
    F.linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(2, 5, 16) @ weight.dequantize(), rtol=1e-5, atol=1e-5)


TRANSFORMS: dict[str, Callable[[Product, Tensor, Tensor], Any]] = {
    "grad": lambda f, x, b: grad(lambda x, b: f(x, b).sum(), argnums=(0, 1))(x, b),
    "vjp": lambda f, x, b: vjp(f, x, b)[1](randn(3, 16, seed=4)),
    "vmap": lambda f, x, b: vmap(f, (0, None))(x, b),
    "vmap of dimension 1": lambda f, x, b: vmap(lambda c: f(c.repeat(32), b), 1)(x[:2, :7]),
    "vmap over biases": lambda f, x, b: vmap(f, (None, 0))(x, torch.stack([b, b + 1])),
    "vmap of vmap": lambda f, x, b: vmap(vmap(f, (0, None)), (None, 0))(x, torch.stack([b, b + 1])),
    "vmap of grad": lambda f, x, b: vmap(grad(lambda x: f(x, b).sum()))(x),
    "grad of vmap": lambda f, x, b: grad(lambda x: vmap(f, (0, None))(x, b).sum())(x),
    "jacrev": lambda f, x, b: jacrev(f, argnums=(0, 1))(x, b),
    "jacrev of jacrev": lambda f, x, b: jacrev(jacrev(lambda x: f(x, b).sum()))(x),
    "jvp": lambda f, x, b: jvp(f, (x, b), (x + 1, b - 1)),
    "jvp of x alone": lambda f, x, b: jvp(lambda x: f(x, b), (x,), (x + 1,)),
    "jvp of the bias alone": lambda f, x, b: jvp(lambda b: f(x, b), (b,), (b - 1,)),
    "jacfwd": lambda f, x, b: jacfwd(f, argnums=(0, 1))(x, b),
    "hessian": lambda f, x, b: hessian(lambda x: f(x, b).sum())(x),
    "grad of jvp": lambda f, x, b: grad(lambda x: jvp(lambda z: f(z, b), (x,), (x.detach(),))[1].sum())(x),
}


@forward_mode
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func(transform: str, kind: str) -> None:
    weight = quantize(randn(16, 64), kind)
    dense = weight.dequantize()

    def mine(x: Tensor, b: Tensor | None) -> Tensor:
        y = linear_int8(x, weight, b, threshold=1e-6) if kind == "int8" else linear(x, weight, b)
        return y.square()

    def theirs(x: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, dense, b).square()

    x, b = randn(3, 64, seed=1), randn(16, seed=2)
    got, wanted = TRANSFORMS[transform](mine, x, b), TRANSFORMS[transform](theirs, x, b)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-4)


def test_autograd_over_torch_func() -> None:
    weight = quantize(randn(16, 64), "nf4")
    dense = weight.dequantize()

    def twice(product: Callable[[Tensor], Tensor]) -> Tensor:
        x = randn(3, 64, seed=1).requires_grad_()
        return torch.autograd.grad(grad(lambda x: product(x).pow(3).sum())(x).sum(), x)[0]

    got, wanted = twice(lambda x: linear(x, weight)), twice(lambda x: F.linear(x, dense))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("layer", LAYERS)
def test_functional_call(layer: str) -> None:
    """jacrev of a layer, and the gradient of its bias sample by sample."""
    module = LAYERS[layer]()
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x, dense = randn(3, 64, seed=1), module.weight.dequantize()
    jacobian = jacrev(lambda x: functional_call(module, parameters, (x,)))(x)
    assert jacobian.shape == (3, 16, 3, 64)
    torch.testing.assert_close(jacobian, torch.einsum("ij,nk->injk", torch.eye(3), dense))

    def loss(bias: Tensor, x: Tensor) -> Tensor:
        y: Tensor = functional_call(module, {**parameters, "bias": bias}, (x,))
        return y.square().sum()

    each = vmap(grad(loss), (None, 0))(parameters["bias"], x)
    rows = torch.stack([module(row).detach() for row in x])
    torch.testing.assert_close(each, 2 * rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_vmap_does_not_mix_the_outliers_of_samples(threshold: float) -> None:
    weight, x = quantize(randn(16, 64), "int8"), randn(3, 4, 64, seed=1)
    got = vmap(lambda x: linear_int8(x, weight, threshold=threshold))(x)
    assert torch.equal(got, torch.stack([linear_int8(sample, weight, threshold=threshold) for sample in x]))


def test_vmap_over_weights() -> None:
    weights = [quantize(randn(16, 64, seed=i), "nf4", double_quant=False) for i in range(3)]
    x, (code, sizes) = randn(5, 64, seed=7), (weights[0].code, (16, 64, 4, 0, 0))
    q, absmax = (torch.stack([getattr(w, name) for w in weights]) for name in ("q", "absmax"))

    def product(q: Tensor, absmax: Tensor) -> Tensor:
        y: Tensor = torch.ops.polybit.matmul_kbit(x, q, absmax, code, None, None, None, None, None, *sizes)
        return y

    assert torch.equal(vmap(product)(q, absmax), torch.stack([linear(x, weight) for weight in weights]))


def test_vmap_of_quantization_has_two_results() -> None:
    x = randn(3, 4, 64, seed=1)
    tables = get_format("nf4").tables
    q, absmax = vmap(lambda x: torch.ops.polybit.quantize_kbit(x, *tables, 64, 4, 0))(x)
    for i in range(3):
        one = torch.ops.polybit.quantize_kbit(x[i], *tables, 64, 4, 0)
        assert torch.equal(q[i], one[0]) and torch.equal(absmax[i], one[1])


def test_vmap_over_an_empty_batch() -> None:
    weight = quantize(randn(16, 64), "int8")
    with pytest.raises(ValueError, match="linear_int8: vmap over an empty batch"):
        vmap(lambda x: linear_int8(x, weight))(torch.empty(0, 3, 64))
    assert vmap(lambda x: linear_int8(x, weight, threshold=0.0))(torch.empty(0, 3, 64)).shape == (0, 3, 16)


@forward_mode
def test_dual_numbers() -> None:
    weight = quantize(randn(16, 64), "nf4")
    x, b, dx, db = randn(3, 64, seed=1), randn(16, seed=2), randn(3, 64, seed=3), randn(16, seed=4)
    with forward_ad.dual_level():
        y, dy = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, dx), weight, forward_ad.make_dual(b, db)))
    assert torch.equal(y, linear(x, weight, b))
    torch.testing.assert_close(dy, F.linear(dx, weight.dequantize(), db), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16])
def test_autocast(layer: str, x_dtype: torch.dtype) -> None:
    """Output and gradients have the dtypes and, to bf16's precision, the numbers of nn.Linear."""
    module = LAYERS[layer]()
    dense = torch.nn.Linear(64, 16)
    dense.load_state_dict({"weight": module.weight.dequantize(), "bias": module.bias.detach()})
    results = []
    for one in (module, dense):
        x = randn(9, 64, seed=1).to(x_dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = one(x)
        y.float().square().sum().backward()
        results.append((y.detach(), x.grad, one.bias.grad))
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == wanted.dtype
        error = (got.float() - wanted.float()).norm() / wanted.float().norm()
        assert error < (0.02 if layer == "int8" else 0.01), error
    assert results[0][0].dtype == torch.bfloat16


def test_autocast_leaves_fp64_alone() -> None:
    module = Linear4bit(64, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="x must be fp32, fp16 or bf16"):
        module(randn(3, 64).double())
