"""Wrong arguments of the front end: a clear exception, and nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import polybit
from polybit import PolybitConfig, checkpoint, functional, optim
from polybit.backends import resolve
from polybit.nn import Embedding4bit, Linear4bit, Linear8bit, LinearKbit, dequantize_, quantize_
from polybit.qtensor import quantize
from polybit.testing import check

X = torch.linspace(-1, 1, 256).view(4, 64)


@pytest.mark.parametrize("block_size", [0, 48, -64, 8, 8192])
def test_block_size(block_size: int) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    before = model[0]
    for call in (
        lambda: quantize(X, "nf4", block_size=block_size),
        lambda: quantize(X, "dynamic8", block_size=block_size),
        lambda: LinearKbit(64, 64, block_size=block_size),
        lambda: quantize_(model, "nf4", block_size=block_size),
    ):
        with pytest.raises(ValueError, match=f"block_size must be a power of two, 16...4096, got {block_size}"):
            call()
    assert model[0] is before


@pytest.mark.parametrize("block_size", [64.0, "64", None, True])
def test_block_size_type(block_size: Any) -> None:
    with pytest.raises(TypeError, match="block_size must be an int"):
        quantize(X, "nf4", block_size=block_size)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.bool, torch.complex64])
def test_dtype_of_the_tensor(dtype: torch.dtype) -> None:
    for format in ("nf4", "dynamic8", "int8"):
        with pytest.raises(TypeError, match="x must be a tensor of fp32, fp16 or bf16"):
            quantize(X.to(dtype), format)
    with pytest.raises(TypeError, match="got list"):
        quantize([1.0], "nf4")  # type: ignore[arg-type]


def test_format() -> None:
    for call in (lambda: quantize(X, "q4_0"), lambda: LinearKbit(64, 64, format="q4_0")):
        with pytest.raises(ValueError, match="unknown format 'q4_0'; known formats: dynamic8"):
            call()
    with pytest.raises(ValueError, match="not a k-bit format; use Linear8bit"):
        LinearKbit(64, 64, format="int8")
    for format in ("int8", "dynamic8"):
        with pytest.raises(ValueError, match="search is for k-bit formats"):
            quantize(X, format, search=True)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"format": "q4_0"}, ValueError, "unknown format"),
        ({"format": "dynamic8"}, ValueError, "has no linear layer"),
        ({"format": "int8", "search": True}, ValueError, "search is for k-bit"),
        ({"format": "int8", "threshold": -1.0}, ValueError, "threshold must be 0 or positive"),
        ({"format": "int8", "threshold": float("nan")}, ValueError, "threshold must be 0 or positive"),
        ({"format": "nf4", "skip": "lm_head"}, TypeError, "skip must be several patterns"),
        ({"format": "nf4"}, TypeError, "1.weight must be fp32, fp16 or bf16, got torch.float64"),
    ],
)
def test_quantize_model_changes_nothing(kwargs: Any, error: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, dtype=torch.float64))
    before = list(model)
    with pytest.raises(error, match=message):
        quantize_(model, **kwargs)
    assert all(a is b for a, b in zip(model, before, strict=True))


def test_a_linear_itself_cannot_be_replaced() -> None:
    with pytest.raises(ValueError, match="use from_linear"):
        quantize_(nn.Linear(64, 64), "nf4")


@pytest.mark.parametrize("layer", [Linear4bit(64, 32), Linear8bit(64, 32)], ids=["4bit", "8bit"])
def test_forward(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"last dimension of x must be 64, got \[3, 63\]"):
        layer(torch.zeros(3, 63))
    with pytest.raises(ValueError, match="last dimension of x must be 64"):
        layer(torch.zeros(()))
    with pytest.raises(TypeError, match="x must be fp32, fp16 or bf16, got torch"):
        layer(torch.zeros(3, 64, dtype=torch.int64))
    with pytest.raises(ValueError, match="x is on meta, the weight on cpu"):
        layer(torch.zeros(3, 64, device="meta"))


def test_bias() -> None:
    weight = quantize(X, "nf4")
    with pytest.raises(ValueError, match=r"bias must have shape \[4\], got \[5\]"):
        functional.linear(X, weight, torch.zeros(5))
    with pytest.raises(ValueError, match="bias is on meta"):
        functional.linear(X, weight, torch.zeros(4, device="meta"))
    with pytest.raises(ValueError, match="weight must be int8, got nf4"):
        functional.linear_int8(X, weight)
    with pytest.raises(ValueError, match="weight must have 2 dimensions"):
        functional.linear(X, quantize(X.view(-1), "nf4"))


def test_sizes_of_a_layer() -> None:
    for size in (0, -3):
        with pytest.raises(ValueError, match=f"in_features must be positive, got {size}"):
            Linear4bit(size, 8)
        with pytest.raises(ValueError, match=f"out_features must be positive, got {size}"):
            Linear8bit(8, size)


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize(X.to_sparse(), "nf4"), TypeError, "x must be dense, got torch.sparse_coo: use x.to_dense"),
        (lambda: quantize(X, "nf4", double_quant="yes"), TypeError, "double_quant must be True or False, got 'yes'"),
        (lambda: quantize(X, "nf4").numpy(), TypeError, "dequantize"),
        (lambda: quantize_({"weight": X}, "nf4"), TypeError, "must be a torch.nn.Module, got dict; load a state dict"),
        (lambda: quantize_(None, "nf4"), TypeError, "must be a torch.nn.Module, got NoneType$"),
        (lambda: dequantize_([layers()]), TypeError, "must be a torch.nn.Module, got list"),
        (lambda: quantize_(layers(), "nf4", overrides=["0"]), TypeError, "overrides must be a dict .*got list"),
        (lambda: quantize_(layers(), "nf4", overrides={"down": "int8"}), ValueError, "Embedding of the model: 0, 1$"),
        (
            lambda: PolybitConfig("nf4", overrides=["0"]),
            TypeError,
            "PolybitConfig: overrides must be a dict .*got list",
        ),
        (lambda: quantize_(quantize_(layers(), "nf4"), "int8"), ValueError, "0 and 1 more are quantized already; deq"),
        (lambda: checkpoint.to_tensors(X, "a.weight"), TypeError, "a.weight must be a QTensor, got Tensor"),
        (lambda: quantize_(layers(), "nf4", device="gpu"), ValueError, "device 'gpu' cannot be used here .*has cpu"),
        (lambda: quantize_(layers(), "nf4", device="cuda:99"), ValueError, "device 'cuda:99' cannot be used here"),
        (lambda: quantize_(layers(), "int8", threshold="6"), TypeError, "threshold must be a number, .*got '6'"),
        (lambda: Linear4bit("64", 64), TypeError, "in_features must be an int, got '64'"),
        (lambda: Linear4bit.from_linear(nn.ReLU()), TypeError, "expected a torch.nn.Linear, got ReLU"),
        (lambda: Linear8bit.from_linear(nn.Conv2d(1, 1, 1)), TypeError, "expected a torch.nn.Linear, got Conv2d"),
        (lambda: Embedding4bit.from_embedding(nn.ReLU()), TypeError, "expected a torch.nn.Embedding, got ReLU"),
        (lambda: Linear4bit(64, 8)([1.0] * 64), TypeError, "linear: x must be a tensor, got list"),
        (lambda: Embedding4bit(9, 64)([1]), TypeError, "embedding: index must be a tensor .*got list"),
        (lambda: functional.linear(X, X), TypeError, "weight must be a QTensor, .*got a torch.float32 tensor"),
        (lambda: functional.linear_int8(X, X), TypeError, "linear_int8: weight must be a QTensor"),
        (lambda: functional.embedding(torch.tensor([1]), X), TypeError, "embedding: weight must be a QTensor"),
        (lambda: functional.linear_grouped(X, X, X), TypeError, "linear_grouped: weight must be a QTensor"),
        (lambda: polybit.backend(["cpu"]).__enter__(), TypeError, "names must be one string, .*got \\['cpu'\\]"),
        (lambda: polybit.backend("no_gpu").__enter__(), polybit.BackendError, "'no_gpu' is unknown. Known:\n  cpu:"),
        (lambda: resolve("matmul"), ValueError, "no op is called 'matmul'; ops: quantize_blockwise, "),
        (lambda: check("matmul", "cpu"), ValueError, "no op is called 'matmul'; ops: quantize_blockwise, "),
        (lambda: optim.AdamW8bit([X], lr="1e-3"), TypeError, "AdamW8bit: lr must be a number, got '1e-3'"),
    ],
)
def test_what_was_wrong_and_what_is_right(call: Any, error: type[Exception], message: str) -> None:
    """Instead of an AttributeError or a message of torch's insides."""
    with pytest.raises(error, match=message):
        call()


def test_dense_weights_do_not_load_into_a_quantized_model() -> None:
    model = quantize_(layers(), "nf4")
    with pytest.raises(ValueError, match=r"0.weight is not quantized; load a dense state dict before the model is"):
        model.load_state_dict(layers().state_dict())
    damaged = {key: value for key, value in model.state_dict().items() if "quant_state" not in key}
    with pytest.raises(ValueError, match=r"quant_state.<owner>__<format> is missing$"):
        model.load_state_dict(damaged)


def trained(kind: Any) -> Any:
    optimizer = kind([nn.Parameter(torch.zeros(4096)), nn.Parameter(torch.zeros(4096))], lr=1e-3)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones(4096)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("state", "kind", "message"),
    [
        (lambda: layers().state_dict(), optim.AdamW8bit, "state_dict.. of an optimizer, .*got 0.weight, 0.bias, 1.wei"),
        (
            lambda: trained(torch.optim.AdamW).state_dict(),
            optim.AdamW8bit,
            "There are step, exp_avg, exp_avg_sq .param",
        ),
        (lambda: trained(optim.Lion8bit).state_dict(), optim.AdamW8bit, "state2 is missing: .*another .*parameter 0"),
        (lambda: trained(optim.AdamW8bit).state_dict(), optim.Lion8bit, "state2 is not of this optimizer.*parameter 0"),
        (lambda: optim.Lion([X, X + 1, X + 2], lr=1).state_dict(), optim.Lion8bit, r"parameters .*\[3\], wanted \[2\]"),
    ],
)
def test_states_of_something_else(state: Any, kind: Any, message: str) -> None:
    """Nothing of them is taken over."""
    optimizer = trained(kind)
    before = {name: value.clone() for name, value in optimizer.state_dict()["state"][0].items() if name != "step"}
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state())
    assert all(
        torch.equal(value, before[name]) for name, value in optimizer.state_dict()["state"][0].items() if name != "step"
    )


OPS = torch.ops.polybit


def test_the_ops_check_what_reaches_them() -> None:
    weight = quantize(X, "nf4", double_quant=False)
    q, absmax, code = weight.operands()[:3]
    nested = (None, None, None)
    tail = (0, 0, torch.float32, [4, 64])
    cases: list[tuple[Any, type[Exception]]] = [
        (lambda: OPS.dequantize_kbit(q[:-1], absmax, code, *nested, 64, 4, *tail), ValueError),
        (lambda: OPS.dequantize_kbit(q, absmax[:-1], code, *nested, 64, 4, *tail), ValueError),
        (lambda: OPS.dequantize_kbit(q, absmax, code[:8], *nested, 64, 4, *tail), ValueError),
        (lambda: OPS.dequantize_kbit(q, absmax, code, *nested, 48, 4, *tail), ValueError),
        (lambda: OPS.dequantize_kbit(q, absmax, code, *nested, 64, 5, *tail), ValueError),
        (lambda: OPS.dequantize_kbit(q.float(), absmax, code, *nested, 64, 4, *tail), TypeError),
        (lambda: OPS.dequantize_kbit(q, absmax.to("meta"), code, *nested, 64, 4, *tail), ValueError),
        (lambda: OPS.matmul_kbit(X, q[:-1], absmax, code, *nested, None, None, 4, 64, 4, 0, 0), ValueError),
        (lambda: OPS.quantize_blockwise(X, code, 64), ValueError),
        (lambda: OPS.quantize_blockwise(X, torch.zeros(256), 0), ValueError),
        (lambda: OPS.quantize_int8(X.long(), 0.0), TypeError),
    ]
    before = {name: inner.clone() for name, inner in weight.inner_tensors().items()}
    for i, (call, error) in enumerate(cases):
        with pytest.raises(error, match="must be"):
            call()
            pytest.fail(f"case {i} did not raise")
    assert all(torch.equal(before[name], inner) for name, inner in weight.inner_tensors().items())
