"""Wrong arguments of the front end: a clear exception, and nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from polybit import functional
from polybit.nn import Linear4bit, Linear8bit, LinearKbit, quantize_
from polybit.qtensor import quantize

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
