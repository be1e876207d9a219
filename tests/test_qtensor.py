"""QTensor: shape, dtype, in-place changes, and what torch does with it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polybit.formats import list_formats
from polybit.qtensor import QTensor, packed_bytes, quantize

FORMATS = list_formats()


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def same_bytes(a: QTensor, b: QTensor) -> bool:
    one, two = a.inner_tensors(), b.inner_tensors()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def relative_error(x: Tensor, q: QTensor) -> float:
    return float((x - q.dequantize()).square().sum() / x.square().sum())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_shape_dtype_and_size(format: str, double_quant: bool) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = weight(48, 80, dtype=dtype)
        q = quantize(x, format, double_quant=double_quant)
        assert (q.shape, q.dtype, q.device) == (x.shape, dtype, x.device)
        assert q.q.numel() == packed_bytes(x.numel(), q.bits)
        y = q.dequantize()
        assert type(y) is Tensor and (y.shape, y.dtype) == (x.shape, dtype)
        assert relative_error(x.float(), q) < {8: 0.001, 4: 0.02, 3: 0.08, 2: 0.6}[q.bits]


@pytest.mark.parametrize(
    ("format", "search", "limit"),
    [("nf4", False, 0.0086), ("nf4", True, 0.0074), ("lloyd3", False, 0.030), ("lloyd2", False, 0.115)],
)
def test_error_on_gaussian_weights(format: str, search: bool, limit: float) -> None:
    x = weight(512, 512)
    assert relative_error(x, quantize(x, format, double_quant=False, search=search)) <= limit


@pytest.mark.parametrize("format", FORMATS)
def test_cast_touches_no_stored_byte(format: str) -> None:
    q = quantize(weight(8, 64), format)
    for cast in (q.half(), q.to(torch.bfloat16), q.double(), q.half().float()):
        assert isinstance(cast, QTensor) and same_bytes(q, cast)
    assert q.half().dequantize().dtype == torch.float16
    assert torch.equal(q.double().dequantize(), q.dequantize().double())
    assert q.to("meta").device.type == "meta" and q.to("meta").q.is_meta


def test_unknown_operations_see_the_value() -> None:
    x, q = weight(8, 64), quantize(weight(8, 64), "nf4")
    dense = q.dequantize()
    assert torch.equal(q + 1, dense + 1)
    assert torch.equal(x @ q.t(), x @ dense.t())
    assert torch.equal(q[2:5, 3], dense[2:5, 3])
    assert torch.equal(q.to(torch.int32), dense.to(torch.int32))
    assert torch.equal(torch.empty(8, 64).copy_(q), dense)
    assert q.sum().item() == dense.sum().item()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_in_place_changes_quantize_again(format: str, double_quant: bool) -> None:
    delta = torch.linspace(-1, 1, 8 * 64).view(8, 64)
    for change in ("add_", "sub_", "mul_", "copy_"):
        q = quantize(weight(8, 64), format, double_quant=double_quant)
        pointer, dense = q.q.data_ptr(), q.dequantize()
        assert getattr(q, change)(delta) is q
        expected = quantize(getattr(dense, change)(delta), format, double_quant=double_quant)
        assert same_bytes(q, expected) and q.q.data_ptr() == pointer
    q = quantize(weight(8, 64), format)
    q.zero_()
    if q.code is None or 0.0 in q.code.tolist():
        assert torch.equal(q.dequantize(), torch.zeros(8, 64))


def test_in_place_changes_leave_the_format_alone() -> None:
    before = quantize(weight(4, 64), "nf4")
    quantize(weight(4, 64), "nf4").add_(100.0)
    assert same_bytes(before, quantize(weight(4, 64), "nf4"))


def test_copy_of_the_same_layout_copies_bytes() -> None:
    source, target = quantize(weight(8, 64), "nf4"), quantize(torch.zeros(8, 64), "nf4")
    target.copy_(source)
    assert same_bytes(source, target) and source.q.data_ptr() != target.q.data_ptr()


def test_detach_aliases_and_clone_does_not() -> None:
    q = quantize(weight(8, 64), "fp4")
    assert isinstance(q.detach(), QTensor) and q.detach().q.data_ptr() == q.q.data_ptr()
    assert same_bytes(q.clone(), q) and q.clone().q.data_ptr() != q.q.data_ptr()


@pytest.mark.parametrize("format", FORMATS)
def test_deepcopy_pickle_and_parameter(format: str) -> None:
    parameter = nn.Parameter(quantize(weight(8, 64), format), requires_grad=False)
    assert isinstance(parameter, QTensor) and isinstance(parameter, nn.Parameter)
    twin = copy.deepcopy(parameter)
    assert isinstance(twin, QTensor) and same_bytes(twin, parameter)
    assert twin.q.data_ptr() != parameter.q.data_ptr()
    buffer = io.BytesIO()
    torch.save(parameter, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert isinstance(loaded, QTensor) and same_bytes(loaded, parameter) and loaded.dtype == parameter.dtype


@pytest.mark.parametrize("format", FORMATS)
def test_flatten_round_trip(format: str) -> None:
    q = quantize(weight(8, 64), format)
    names, meta = q.__tensor_flatten__()
    again = QTensor.__tensor_unflatten__({n: getattr(q, n) for n in names}, meta, q.shape, q.stride())
    assert same_bytes(q, again) and (again.format_name, again.dtype) == (q.format_name, q.dtype)


def test_functional_linear_reads_the_packed_weight() -> None:
    q, x = quantize(weight(24, 96), "nf4"), weight(5, 96)
    torch.testing.assert_close(F.linear(x, q), x @ q.dequantize().t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_embedding_reads_rows(format: str) -> None:
    from polybit.functional import embedding

    q = quantize(weight(10, 64), format)
    index = torch.tensor([[3, 0], [9, 3]])
    assert torch.equal(embedding(index, q), q.dequantize()[index])
    with pytest.raises(TypeError, match="int64 or int32"):
        embedding(index.float(), q)


def test_compile_takes_it_as_an_input() -> None:
    q, x = quantize(weight(16, 64), "nf4"), weight(3, 64)

    def product(x: Tensor, q: Tensor) -> Tensor:
        return F.linear(x, q) + 1

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, q), product(x, q))


def test_repr_names_format_and_shape() -> None:
    text = repr(quantize(weight(8, 64), "nf3", block_size=32))
    assert "nf3" in text and "[8, 64]" in text and "block_size=32" in text
