"""QTensor: shape, dtype, in-place changes, and what torch does with it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from polybit import checkpoint
from polybit.formats import _FORMATS, list_formats, register_format
from polybit.functional import embedding, linear
from polybit.nn import Linear8bit, LinearKbit
from polybit.qtensor import QTensor, packed_bytes, quantize

FORMATS = list_formats()


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype)


def same_bytes(a: QTensor, b: QTensor) -> bool:
    one, two = a.inner_tensors(), b.inner_tensors()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def value(x: Tensor) -> Tensor:
    return x.dequantize() if isinstance(x, QTensor) else x


def is_view(part: Tensor, whole: QTensor) -> bool:
    return isinstance(part, QTensor) and all(
        getattr(part, name).untyped_storage().data_ptr() == getattr(whole, name).untyped_storage().data_ptr()
        for name in ("q", "absmax")
    )


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


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_items_that_are_set_are_quantized(format: str, double_quant: bool) -> None:
    x, delta = weight(8, 64), torch.linspace(-1, 1, 64)
    positive = x > 0
    for shape in ((8, 64), (4, 128), (32, 16)):  # of 16 elements: rows end inside of blocks
        for index, new in ((2, 0.5), (slice(1, 3), -0.25), ((slice(None), 3), 1.0), (positive.view(shape), 0.125)):
            q = quantize(x.view(shape), format, double_quant=double_quant)
            dense = q.dequantize()
            by_rows = isinstance(index, (int, slice)) and not q.double_quant and shape[1] % q.block_length == 0
            expected, q[index], dense[index] = dense.clone(), new, new
            again = quantize(dense, format, double_quant=double_quant).dequantize()
            expected[index] = again[index]
            assert torch.equal(q.dequantize(), expected if by_rows else again)
    q = quantize(x, format, double_quant=double_quant)
    before = q.clone()
    q[5] = before[3]
    if not double_quant:
        assert torch.equal(q.dequantize()[[0, 1, 2, 3, 4, 6, 7]], before.dequantize()[[0, 1, 2, 3, 4, 6, 7]])
        assert torch.equal(q[5].dequantize(), before[3].dequantize())
    with pytest.raises(IndexError):
        q[8] = delta


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_data_is_replaced_not_written_to(format: str, double_quant: bool) -> None:
    parameter = nn.Parameter(quantize(weight(8, 64), format, double_quant=double_quant), requires_grad=False)
    alias, dense = parameter.detach(), parameter.dequantize()
    delta = torch.linspace(-1, 1, 8 * 64).view(8, 64)
    parameter.data = dense + delta
    assert same_bytes(parameter, quantize(dense + delta, format, double_quant=double_quant))
    assert torch.equal(alias.dequantize(), dense)
    parameter.data += delta
    assert isinstance(parameter, nn.Parameter) and parameter.format_name == format
    other = quantize(weight(3, 5, 128, dtype=torch.float16), "nf3", block_size=32)[1:]
    parameter.data = other
    assert (parameter.shape, parameter.dtype) == (other.shape, torch.float16) and is_view(parameter, other)
    assert torch.equal(parameter.dequantize(), other.dequantize())
    with pytest.raises(ValueError, match=r"data must have shape \[2, 5, 128\], got \[2\]"):
        parameter.data = torch.zeros(2)


def test_in_place_changes_leave_the_format_alone() -> None:
    before = quantize(weight(4, 64), "nf4")
    quantize(weight(4, 64), "nf4").add_(100.0)
    assert same_bytes(before, quantize(weight(4, 64), "nf4"))


def test_copy_of_the_same_layout_copies_bytes() -> None:
    source, target = quantize(weight(8, 64), "nf4"), quantize(torch.zeros(8, 64), "nf4")
    target.copy_(source)
    assert same_bytes(source, target) and source.q.data_ptr() != target.q.data_ptr()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_copy_of_its_own_value_changes_nothing(format: str, double_quant: bool) -> None:
    q = quantize(weight(8, 64), format, double_quant=double_quant)
    before = q.clone()
    q.copy_(q.dequantize())
    assert same_bytes(q, before)
    q.copy_(-q.dequantize())
    assert same_bytes(q, quantize(-before.dequantize(), format, double_quant=double_quant))


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
    for loaded in (torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(parameter))):
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
def test_embedding_reads_rows(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = quantize(weight(10, 64), format)
    index = torch.tensor([[3, 0], [9, 3]])
    wanted = q.dequantize()[index]
    assert torch.equal(embedding(index, q), wanted)
    if q.format.kind != "blockwise":
        monkeypatch.setattr(QTensor, "dequantize", None)  # not needed
    assert torch.equal(F.embedding(index, q, 3), wanted)
    with pytest.raises(TypeError, match="int64 or int32"):
        embedding(index.float(), q)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_weight_that_wants_a_gradient_gets_it(format: str) -> None:
    q, x, index = quantize(weight(24, 64), format), weight(5, 64), torch.tensor([3, 0, 3])
    for call in (lambda w: F.linear(x, w), lambda w: F.embedding(index, w), lambda w: w * 2):
        dense = q.dequantize().requires_grad_()
        tracked = q.clone().requires_grad_()
        (call(dense).square().sum()).backward()
        (call(tracked).square().sum()).backward()
        torch.testing.assert_close(tracked.grad, dense.grad, rtol=1e-5, atol=1e-5)


def test_compile_takes_it_as_an_input() -> None:
    q, x = quantize(weight(16, 64), "nf4"), weight(3, 64)

    def product(x: Tensor, q: Tensor) -> Tensor:
        return F.linear(x, q) + 1

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, q), product(x, q))


def test_repr_names_format_and_shape() -> None:
    text = repr(quantize(weight(8, 64), "nf3", block_size=32))
    assert "nf3" in text and "[8, 64]" in text and "block_size=32" in text


# 256 / 16 = 16 blocks in a row: 24 rows have scales in two double-quantization groups.
BITS = {2: "nf2", 3: "nf3", 4: "nf4", 8: "dynamic8"}


@pytest.mark.parametrize("format", FORMATS)
def test_one_row_per_output_feature_where_blocks_align(format: str) -> None:
    bits = {"int8": 8, "dynamic8": 8}.get(format) or quantize(weight(64), format).bits
    for shape in ((6, 128), (3, 5, 64), (64,)):
        q = quantize(weight(*shape), format)
        *rows, k = shape
        assert list(q.q.shape) == [*rows, k * bits // 8]
        assert list(q.absmax.shape) == (rows if format == "int8" else [*rows, k // 64])
    odd = quantize(weight(5, 80), format)
    assert list(odd.q.shape) == ([5, 80] if bits == 8 else [50 * bits])
    assert list(odd.absmax.shape) == ([5] if format == "int8" else [7])


@settings(max_examples=40, deadline=None)
@given(data=st.data(), bits=st.sampled_from([2, 3, 4, 8]), double_quant=st.booleans())
def test_pieces_of_rows_are_rows_of_the_whole(data: st.DataObject, bits: int, double_quant: bool) -> None:
    whole = quantize(weight(24, 256), BITS[bits], block_size=16, double_quant=double_quant)
    dense = whole.dequantize()
    cuts = sorted(data.draw(st.lists(st.integers(0, 24), max_size=4)))
    sizes = [stop - start for start, stop in zip([0, *cuts], [*cuts, 24], strict=True)]
    pieces = whole.split(sizes)
    for piece, wanted in zip(pieces, dense.split(sizes), strict=True):
        assert is_view(piece, whole) and torch.equal(piece.dequantize(), wanted)
        start, stop = sorted(data.draw(st.tuples(st.integers(0, len(wanted)), st.integers(0, len(wanted)))))
        assert torch.equal(piece[start:stop].dequantize(), wanted[start:stop])
    joined = torch.cat([piece for piece in pieces if len(piece)])
    assert isinstance(joined, QTensor) and same_bytes(joined, whole) and joined.is_whole


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_every_way_to_cut_rows(format: str, double_quant: bool) -> None:
    q = quantize(weight(24, 256), format, block_size=16, double_quant=double_quant)
    dense = q.dequantize()
    cuts = {
        "slice": lambda x: [x[3:7], x[-3:], x[20:99], x[7:3], x[2:22][3:9]],
        "narrow": lambda x: [x.narrow(0, 17, 5)],
        "split": lambda x: x.split(7),
        "split sizes": lambda x: x.split([1, 20, 3]),
        "chunk": lambda x: x.chunk(5),
        "tensor_split": lambda x: x.tensor_split(5),
        "unbind": lambda x: x.unbind(),
        "select": lambda x: [x[0], x[-1], x[5]],
    }
    for name, cut in cuts.items():
        for inference in (False, True):
            with torch.inference_mode(inference):
                parts, wanted = cut(q), cut(dense)
            assert len(parts) == len(wanted), name
            for part, rows in zip(parts, wanted, strict=True):
                assert is_view(part, q) and torch.equal(part.dequantize(), rows), name
    for other in (q[::2], q[:, 3:9], q.t(), q[0, 5]):
        assert type(other) is Tensor
    with pytest.raises(IndexError, match="index 24 out of range"):
        q.select(0, 24)


@pytest.mark.parametrize("format", FORMATS)
def test_reshapes_are_views(format: str) -> None:
    q = quantize(weight(4, 6, 64), format)
    dense = q.dequantize()
    reshapes = {
        "same": lambda x: x.view(x.shape),
        "flat": lambda x: x.view(-1),
        "rows": lambda x: x.reshape(24, 64),
        "longer rows": lambda x: x.view(8, -1),
        "shorter rows": lambda x: x.view(96, 16),
        "flatten": lambda x: x.flatten(0, 1),
        "strided": lambda x: torch.as_strided(x, (4, 6, 64), (384, 64, 1), 0),
        "first rows": lambda x: torch.as_strided(x, (3, 6, 64), (384, 64, 1), 0),
        "and back": lambda x: x.view(-1).view(4, 6, 64),
    }
    for name, reshape in reshapes.items():
        out = reshape(q)
        assert is_view(out, q) and torch.equal(out.dequantize(), reshape(dense)), name
    assert torch.equal(q.view(-1)[64:192].dequantize(), dense.view(-1)[64:192])
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        q.view(5, 7)


def test_a_cut_inside_a_block_names_the_remedy() -> None:
    for format, shape, cut in (("nf4", (4, 80), (1, 3)), ("dynamic8", (4, 80), (0, 2)), ("nf4", (256,), (64, 100))):
        q = quantize(weight(*shape), format)
        with pytest.raises(ValueError, match="cut inside a block of 64 .* dequantize.* block size that divides"):
            q[cut[0] : cut[1]]
    q = quantize(weight(4, 80), "nf4")
    for call in (q.unbind, lambda: q.split(2), lambda: q.new_zeros(2, 80), lambda: q[0]):
        with pytest.raises(ValueError, match="choose a block size that divides the row"):
            call()
    q = quantize(weight(4, 80), "nf4", block_size=16)
    assert torch.equal(q[1:3].dequantize(), q.dequantize()[1:3])


@pytest.mark.parametrize("double_quant", [False, True])
def test_experts_of_a_stack(double_quant: bool) -> None:
    stack = quantize(weight(20, 16, 64), "nf4", block_size=16, double_quant=double_quant)
    dense, x = stack.dequantize(), weight(3, 64)
    for expert, wanted in zip(stack.unbind(), dense.unbind(), strict=True):
        assert is_view(expert, stack) and torch.equal(expert.dequantize(), wanted)
        torch.testing.assert_close(F.linear(x, expert), x @ wanted.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("double_quant", [False, True])
def test_products_and_lookups_of_rows(double_quant: bool) -> None:
    q = quantize(weight(24, 256), "nf4", block_size=16, double_quant=double_quant)
    x, index = weight(3, 256), torch.tensor([4, 0, 3])
    assert torch.equal(linear(x, q[19:24]), linear(x, q)[:, 19:24])
    assert torch.equal(embedding(index, q[18:]), q.dequantize()[18:][index])
    x.requires_grad_()
    linear(x, q[19:24]).sum().backward()
    torch.testing.assert_close(x.grad, q.dequantize()[19:24].sum(0).expand(3, 256), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["nf4", "nf3", "dynamic8", "int8"])
def test_what_is_written_to_rows_reaches_the_whole(format: str) -> None:
    q = quantize(weight(8, 64), format, double_quant=False)
    dense = q.dequantize()
    q[2:5].mul_(-2)
    q[6].zero_()
    wanted = dense.clone()
    wanted[2:5] *= -2
    wanted[6] = 0
    expected = quantize(wanted, format, double_quant=False)
    assert torch.equal(q.dequantize()[2:5], expected.dequantize()[2:5])
    assert torch.equal(q.dequantize()[6], expected.dequantize()[6])
    assert torch.equal(q.dequantize()[[0, 1, 5, 7]], dense[[0, 1, 5, 7]])
    q.view(-1).copy_(quantize(weight(8, 64), format, double_quant=False).view(-1))
    assert torch.equal(q.dequantize(), dense)


def test_rows_of_a_doubly_quantized_tensor_take_bytes_but_no_new_values() -> None:
    q = quantize(weight(24, 256), "nf4", block_size=16)
    twin, before = q.clone(), q.clone()
    for part, change in ((q[3:7], torch.zeros(4, 256)), (q[:4], torch.zeros(4, 256)), (q[5].clone(), torch.zeros(256))):
        with pytest.raises(ValueError, match="takes no new values.*copy_ it back"):
            part.copy_(change)
    with pytest.raises(ValueError, match="takes no new values"):
        q[3:7].copy_(q[4:8])  # the scales of those rows are read in other groups
    assert same_bytes(q, before)
    q[3:7].q.zero_()
    q[3:7].copy_(twin[3:7])
    assert same_bytes(q, before)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", ["nf4", "nf3", "dynamic8", "int8"])
def test_a_shard_is_made_as_fsdp2_makes_it(format: str, double_quant: bool) -> None:
    whole = quantize(weight(23, 256), format, block_size=16, double_quant=double_quant)
    padded = []
    for chunk in torch.chunk(whole, 2):
        buffer = whole.new_zeros(12, 256)
        assert isinstance(buffer, QTensor) and buffer.shape == (12, 256)
        shard = buffer.narrow(0, 0, len(chunk))
        shard.copy_(chunk)
        padded.append(buffer.narrow(0, 0, len(chunk)))
        assert is_view(shard, buffer) and torch.equal(shard.q, chunk.q) and torch.equal(shard.absmax, chunk.absmax)
        if whole.double_quant:
            with pytest.raises(ValueError, match="does not know its place.*gather"):
                shard.dequantize()
        else:
            assert torch.equal(shard.dequantize(), chunk.dequantize())
    sent, metadata = zip(*(shard.fsdp_pre_all_gather(None) for shard in padded), strict=True)
    assert sent[0][0].numel() == sent[1][0].numel() and sent[0][1].numel() == sent[1][1].numel()
    received = tuple(torch.cat(parts) for parts in zip(*sent, strict=True))
    result = padded[1].fsdp_post_all_gather(received, metadata[1], torch.bfloat16)
    assert result is not None
    gathered = torch.as_strided(result[0], (23, 256), (256, 1), 0)
    assert is_view(gathered, result[0]) and gathered.dtype == torch.bfloat16
    assert torch.equal(gathered.dequantize(), whole.dequantize().bfloat16())


def test_new_tensors_of_other_shapes_and_dtypes_are_plain() -> None:
    q = quantize(weight(8, 64), "nf4")
    for new in (q.new_zeros(8, 32), q.new_zeros(3), q.new_zeros(2, 64, dtype=torch.int32), torch.zeros_like(q)):
        assert type(new) is Tensor and not new.any()
    assert isinstance(q.new_empty(3, 64), QTensor) and q.new_empty(3, 64, device="meta").q.is_meta
    unplaced = q.new_zeros(4, 64)
    assert torch.equal(torch.ones_like(unplaced), torch.ones(4, 64))  # nothing needs its value


@pytest.mark.parametrize("double_quant", [False, True])
def test_cat_of_pieces_that_do_not_fit_is_plain(double_quant: bool) -> None:
    q = quantize(weight(8, 64), "nf4", double_quant=double_quant)
    dense = q.dequantize()
    wrong_order = torch.cat([q[4:], q[:4]])
    assert torch.equal(value(wrong_order), torch.cat([dense[4:], dense[:4]]))
    assert isinstance(wrong_order, QTensor) != double_quant
    part = torch.cat([q[2:4], q[4:5]])
    assert isinstance(part, QTensor) and torch.equal(part.dequantize(), dense[2:5])
    assert not is_view(part, q)
    assert type(torch.cat([q, dense])) is Tensor and type(torch.cat([q, q], 1)) is Tensor
    for other in (quantize(weight(8, 64), "fp4", double_quant=double_quant), q.half()):
        assert type(torch.cat([q[:4], other[4:]])) is Tensor


@pytest.mark.parametrize("format", FORMATS)
def test_save_and_load_with_weights_only(format: str) -> None:
    q = quantize(weight(24, 256), format, block_size=16)
    module = nn.Module()
    module.weight = nn.Parameter(q, requires_grad=False)
    module.register_buffer("part", q[17:20])
    buffer = io.BytesIO()
    torch.save({"model": module.state_dict(), "parameter": module.weight}, buffer)
    for mmap_or_device in ("cpu", "meta"):
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True, map_location=mmap_or_device)
        assert isinstance(loaded["parameter"], nn.Parameter) and isinstance(loaded["parameter"], QTensor)
        assert loaded["model"]["part"].shape == (3, 256) and loaded["parameter"].device.type == mmap_or_device
        if mmap_or_device == "cpu":
            assert same_bytes(loaded["parameter"], q) and same_bytes(loaded["model"]["weight"], q)
            assert torch.equal(loaded["model"]["part"].dequantize(), q.dequantize()[17:20])


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_copies_of_a_part_decode_the_same(format: str) -> None:
    part = quantize(weight(24, 256), format, block_size=16)[17:20]
    for twin in (copy.deepcopy(part), part.clone(), part.half().float(), part.cpu(), part.detach()):
        assert isinstance(twin, QTensor) and torch.equal(twin.dequantize(), part.dequantize())
        assert not twin.is_whole


def test_a_part_of_a_doubly_quantized_tensor_is_no_checkpoint() -> None:
    q = quantize(weight(24, 256), "nf4", block_size=16)
    with pytest.raises(ValueError, match="layer.weight is a part of a doubly quantized tensor"):
        checkpoint.to_tensors(q[4:8], "layer.weight")
    plain = quantize(weight(24, 256), "nf4", double_quant=False)[4:8]
    again = checkpoint.from_tensors(checkpoint.to_tensors(plain, "w"), "w")
    assert torch.equal(again.dequantize(), plain.dequantize())


def test_parts_are_found_under_their_names_in_a_checkpoint() -> None:
    for format in FORMATS:
        q = quantize(weight(8, 64), format)
        module = Linear8bit(64, 8, bias=False) if format == "int8" else None
        for key in checkpoint.to_tensors(q, "weight"):
            owner: object = module if key in ("SCB", "weight_format") else q
            if owner is module:
                key = f"weight.{key}"
            for name in key.split(".")[1:]:
                owner = getattr(owner, name)
            assert isinstance(owner, Tensor), key


def test_compile_of_a_part_knows_its_place() -> None:
    q, x = quantize(weight(24, 256), "nf4", block_size=16), weight(3, 256)
    compiled = torch.compile(F.linear, fullgraph=True, backend="aot_eager")
    for start in (0, 9, 18):
        assert torch.equal(compiled(x, q[start : start + 6]), linear(x, q)[:, start : start + 6])
    cut = torch.compile(lambda x, q: F.linear(x, q[18:]) + q[18:].sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(cut(x, q), x @ q.dequantize()[18:].t() + q.dequantize()[18:].sum())


@pytest.mark.parametrize("levels", [4, 8, 16, 256])
def test_a_format_of_the_user_from_end_to_end(levels: int) -> None:
    name = f"mine{levels}"
    code = torch.linspace(-1, 1, levels) ** 3 + torch.linspace(-1, 1, levels) * 0.1
    format = register_format(name, code / code.abs().max())
    try:
        x = weight(8, 64)
        q = quantize(x, format)
        steps = (x.view(8, 1, 64) / x.abs().amax(1).view(8, 1, 1) - format.code.view(1, -1, 1)).abs().argmin(1)
        plain = quantize(x, name, double_quant=False)
        assert torch.equal(plain.dequantize(), format.code[steps] * x.abs().amax(1, keepdim=True))
        buffer = io.BytesIO()
        torch.save(q, buffer)
        buffer.seek(0)
        assert same_bytes(torch.load(buffer, weights_only=True), q) and same_bytes(copy.deepcopy(q), q)
        again = checkpoint.from_tensors(checkpoint.to_tensors(q, "w"), "w")
        assert again.format is format and same_bytes(again, q)
        if levels < 256:
            layer, fresh = LinearKbit(64, 8, format=format), LinearKbit(64, 8, format=name)
            state = {key: entry.clone() for key, entry in layer.state_dict().items()}
            assert f"weight.quant_state.polybit__{name}" in state
            fresh.load_state_dict(state, strict=True)
            assert torch.equal(fresh(x), layer(x))
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight.dequantize(), layer.bias))
    finally:
        del _FORMATS[name]
    buffer.seek(0)
    with pytest.raises(ValueError, match=f"unknown format '{name}'"):
        torch.load(buffer, weights_only=True).dequantize()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", ["nf4", "nf3", "dynamic8", "int8"])
def test_meta_has_the_layout_of_the_real_thing(format: str, double_quant: bool) -> None:
    steps = {
        "rows": lambda w: w[3:7],
        "row": lambda w: w[5],
        "split": lambda w: w.split(7),
        "view": lambda w: w.view(2, 12, 256),
        "cast": lambda w: w.half(),
        "clone": lambda w: w.clone(),
        "zeros": lambda w: w.new_zeros(5, 256),
        "empty": lambda w: torch.empty_like(w),
        "cat": lambda w: torch.cat([w[:4], w[4:9]]),
        "deepcopy": copy.deepcopy,
        "in place": lambda w: w.clone().add_(1),
        "item": lambda w: w.clone().__setitem__(2, 1.0) or w,
        "value": lambda w: w.dequantize(),
        "linear": lambda w: F.linear(torch.empty(3, 256, device=w.device), w),
        "embedding": lambda w: F.embedding(torch.empty(3, dtype=torch.int64, device=w.device).zero_(), w),
    }

    def layout(x: object) -> object:
        if isinstance(x, QTensor):
            return x.shape, x.dtype, x.form, {name: layout(inner) for name, inner in x.inner_tensors().items()}
        if isinstance(x, Tensor):
            return type(x), x.shape, x.dtype, x.stride()
        return [layout(part) for part in x]

    real = quantize(weight(24, 256), format, block_size=16, double_quant=double_quant)
    metas = [real.to("meta"), quantize(weight(24, 256).to("meta"), format, block_size=16, double_quant=double_quant)]
    for name, step in steps.items():
        for meta in metas:
            assert layout(step(meta)) == layout(step(real)), name
