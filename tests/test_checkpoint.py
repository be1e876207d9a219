"""Checkpoints: what bitsandbytes writes, read and written again; what we write, read by it; attacks on the reader.

Every entry of a state dict is compared: key, order, dtype, shape, bytes. What differs from bitsandbytes 0.50.2:

1. The offset of double quantization: its CPU code takes torch's mean, we sum as a tree. Given its offset, and scales
   that it looks up rightly (test_bitsandbytes.py, deviation 4), the bytes are equal.
2. FP4 codes: see test_bitsandbytes.py, deviations 1 and 2. The weights here avoid both.
3. FP4 codebook: its entry 8 is +0, ours -0, which is what the CPU code of both decodes. What was read is written.
4. Block size 16 and every format but nf4 and fp4 are ours alone.
5. weight_format: an int8 checkpoint without it is read, and written with it.
6. quant_storage: it takes any dtype and fails on bytes that it does not divide; we take any floating or integer dtype.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz import fuzz_checkpoint
from safetensors import safe_open
from safetensors.torch import save_file
from tools import cpu_variants
from torch import Tensor

from polybit import checkpoint
from polybit.formats import get_format, list_formats
from polybit.nn import Linear4bit, Linear8bit
from polybit.qtensor import QTensor, quantize

if os.environ.get("CI") == "true":
    import bitsandbytes as bnb
else:
    bnb = pytest.importorskip("bitsandbytes")

State = dict[str, Tensor]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# What bitsandbytes 0.50.2 lets transformers name, and what it takes besides.
STORAGES = [torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32]
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]


def raw(entry: Tensor) -> Tensor:
    return entry.detach().reshape(-1).clone().view(torch.uint8)


def assert_same(ours: State, theirs: State) -> None:
    """Equal entry by entry: keys and their order, dtypes, shapes, bytes."""
    assert list(ours) == list(theirs)
    for key, want in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (want.dtype, want.shape), key
        assert torch.equal(raw(ours[key]), raw(want)), key


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain_levels(rows: int, columns: int, block: int, format: str) -> Tensor:
    """A weight on which both libraries agree to the bit: each value close to a level other than zero, scales whose
    mean is exact in any order of summation. Exact in fp16 and bf16 but for the last bits of the jitter."""
    generator = torch.Generator().manual_seed(block + 2)  # of some it looks up a scale wrongly
    count = rows * columns
    code = get_format(format).code
    levels = code[code.abs() > 0.01]
    x = levels[torch.randint(0, len(levels), (count,), generator=generator)]
    x = x * (1 + 0.01 * (torch.rand(count, generator=generator) - 0.5))
    x = x.clamp(-0.99, 0.99)
    x[::block] = 1.0  # the largest of each block
    scale = torch.randint(1, 128, (math.ceil(count / block),), generator=generator) / 64.0
    return (x * scale.repeat_interleave(block)[:count]).reshape(rows, columns)


def theirs(x: Tensor, format: str, block: int, nested: bool, storage: torch.dtype = torch.uint8) -> State:
    """The state dict that bitsandbytes' Linear4bit writes for the weight `x`, without a bias."""
    linear = bnb.nn.Linear4bit(x.shape[1], x.shape[0], bias=False)
    linear.weight = bnb.nn.Params4bit(
        x.clone(), requires_grad=False, blocksize=block, compress_statistics=nested, quant_type=format,
        quant_storage=storage, module=linear,
    )  # fmt: skip
    return dict(linear.to("cpu").state_dict())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_what_bitsandbytes_wrote_is_written_again(format: str, block: int, nested: bool) -> None:
    """Its state dicts of ordinary weights, for every dtype."""
    for dtype in DTYPES:
        for storage in (torch.uint8, torch.bfloat16):
            state = theirs(noise(17, 320, seed=block).to(dtype), format, block, nested, storage)
            assert state["weight"].dtype == storage
            weight = checkpoint.from_tensors(state, "weight")
            assert (weight.shape, weight.dtype, weight.block_size) == ((17, 320), dtype, block)
            assert_same(checkpoint.to_tensors(weight, "weight", quant_storage=storage), state)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_the_same_weight_gives_the_same_bytes(format: str, block: int, nested: bool) -> None:
    """Quantized by both, every dtype and storage: all entries, the JSON and its offset included."""
    for dtype in DTYPES:
        x = plain_levels(6, 4096, block, format).to(dtype)
        weight = quantize(x, format, block_size=block, double_quant=nested)
        for storage in STORAGES:
            state = theirs(x, format, block, nested, storage)
            again = checkpoint.from_tensors(state, "weight")
            assert_same(checkpoint.to_tensors(again, "weight", quant_storage=storage), state)
            if format == "fp4":  # deviation 3
                assert raw(state["weight.quant_map"][8]).tolist() == [0, 0, 0, 0]
                state["weight.quant_map"][8] = -0.0
            assert_same(checkpoint.to_tensors(weight, "weight", quant_storage=storage), state)


@pytest.mark.parametrize("block", BLOCKS)
def test_ordinary_weights_differ_by_the_offset_alone(block: int) -> None:
    """Deviation 1: with its offset, the double quantization of the same scales is the same."""
    x = noise(40, 4096, seed=block)
    state = theirs(x, "nf4", block, True)
    own = checkpoint.to_tensors(quantize(x, "nf4", block_size=block), "weight")
    scales = quantize(x, "nf4", block_size=block, double_quant=False).absmax.view(-1)
    differ = {key for key in state if not torch.equal(raw(own[key]), raw(state[key]))}
    key = "weight.quant_state.bitsandbytes__nf4"
    assert differ <= {"weight.absmax", "weight.nested_absmax", key}

    offset = json.loads(bytes(state[key].tolist()))["nested_offset"]
    assert json.loads(bytes(own[key].tolist()))["nested_offset"] == pytest.approx(offset, rel=1e-6)
    q, nested = torch.ops.polybit.quantize_blockwise(scales - offset, get_format("dynamic8").code, 256)
    assert torch.equal(nested, state["weight.nested_absmax"])
    wrong = q != state["weight.absmax"]
    assert int(wrong.sum()) <= len(q) // 200  # looked up wrongly by it, one beside the nearest
    assert bool(((q.int() - state["weight.absmax"].int()).abs() <= 1).all())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_bitsandbytes_reads_what_we_write(format: str, block: int, nested: bool) -> None:
    """Its value of our state dict is ours. On AVX-512 it has no -0, and gets rows wrong that are not whole blocks."""
    for dtype in DTYPES:
        for storage in (torch.uint8, torch.bfloat16, torch.float32):
            weight = quantize(noise(5, 4096, seed=block).to(dtype), format, block_size=block, double_quant=nested)
            state = checkpoint.to_tensors(weight, "weight", quant_storage=storage)
            data = state.pop("weight")
            parameter = bnb.nn.Params4bit.from_prequantized(data, dict(state), device="cpu")
            value = bnb.functional.dequantize_4bit(parameter.data, parameter.quant_state)
            want = weight.dequantize()
            if "cpu:avx512" in cpu_variants():
                want = want + 0.0  # turns -0 into 0
            assert value.dtype == dtype and torch.equal(raw(value), raw(want))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
def test_4_bit_layers_exchange_state_dicts(nested: bool, storage: torch.dtype) -> None:
    state = theirs(noise(24, 128), "nf4", 64, nested, storage)
    bias = {"bias": noise(24, seed=1)}
    layer = Linear4bit(128, 24, double_quant=nested)
    layer.load_state_dict(state | bias)
    assert_same(checkpoint.to_tensors(layer.weight, "weight", quant_storage=storage), state)

    written = dict(layer.state_dict())
    assert written["weight"].dtype == torch.uint8  # a module writes uint8 whatever it was loaded from
    other = bnb.nn.Linear4bit(128, 24, quant_type="nf4", compress_statistics=nested)
    other.bias.data = written.pop("bias")
    data, stats = written.pop("weight"), dict(written)
    other.weight = bnb.nn.Params4bit.from_prequantized(data, stats, device="cpu", module=other)
    assert_same(dict(other.state_dict()), {"weight": data, "bias": bias["bias"], **written})
    x = noise(3, 128, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(other.train()(x), layer(x), rtol=1e-5, atol=1e-5)


def test_8_bit_layers_exchange_state_dicts() -> None:
    other = bnb.nn.Linear8bitLt(128, 24, has_fp16_weights=False)
    state = {key: value.clone() for key, value in other.to("cpu").state_dict().items()}
    assert list(state) == ["weight", "bias", "SCB", "weight_format"]
    layer = Linear8bit(128, 24)
    layer.load_state_dict(state)
    written = dict(layer.state_dict())
    assert_same({key: written[key] for key in state}, state)
    want = torch.ops.bitsandbytes.int8_vectorwise_dequant(state["weight"], state["SCB"])
    assert torch.equal(layer.weight.dequantize(), want)

    fresh = Linear8bit.from_linear(torch.nn.Linear(128, 24))
    other.load_state_dict(dict(fresh.state_dict()))
    again = dict(other.state_dict())
    assert_same(again, {key: fresh.state_dict()[key] for key in again})
    assert not torch.equal(again["weight"], state["weight"])


def test_what_bitsandbytes_spoils_is_refused() -> None:
    """Its CPU code for AVX512-BF16 packs the weight anew and saves bf16 scales, transposed; older layouts are tiled."""
    state = theirs(noise(64, 128), "nf4", 64, False)
    state["weight.absmax"] = state["weight.absmax"].reshape(64, 2).t().to(torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"checkpoint: weight.absmax must be torch.float32 \[128\], got torch.bfloat16"
    ):
        checkpoint.from_tensors(state, "weight")
    int8 = dict(Linear8bit(64, 32).state_dict())
    for number, name in ((1, "col32"), (2, "col_turing"), (3, "col_ampere"), (7, "unknown")):
        int8["weight_format"] = torch.tensor(number, dtype=torch.uint8)
        with pytest.raises(ValueError, match=rf"checkpoint: weight_format must be 0 \(rows\), got {number} \({name}\)"):
            checkpoint.from_tensors(int8, "weight")


@pytest.mark.parametrize("format", ["nf4", "int8", "dynamic8"])
def test_embedding_tables(format: str) -> None:
    """bitsandbytes cannot save its quantized embeddings; ours have the keys of any other weight."""
    weight = quantize(noise(50, 64), format)
    state = checkpoint.to_tensors(weight, "embed.weight")
    beside = ["embed.SCB", "embed.weight_format"]
    assert [key for key in state if not key.startswith("embed.weight.")] == [
        "embed.weight", *(beside if format == "int8" else [])
    ]  # fmt: skip
    assert torch.equal(checkpoint.from_tensors(state, "embed.weight").dequantize(), weight.dequantize())


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("format", list_formats())
def test_every_format_in_a_file_opened_lazily(format: str, double_quant: bool, tmp_path: Path) -> None:
    weight = quantize(noise(24, 160), format, double_quant=double_quant)
    state = checkpoint.to_tensors(weight, "a.weight")
    save_file({**state, "a.bias": torch.zeros(3)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        mine = checkpoint.owned_keys(dict.fromkeys(file.keys()), "a.weight")
        assert sorted(mine) == sorted(state)
        loaded = checkpoint.from_tensors({key: file.get_tensor(key) for key in mine}, "a.weight")
    assert_same(checkpoint.to_tensors(loaded, "a.weight"), state)
    assert torch.equal(raw(loaded.dequantize()), raw(weight.dequantize()))


def test_quant_storage_that_does_not_fit() -> None:
    weight = quantize(noise(3, 22), "nf4")  # 33 bytes
    with pytest.raises(ValueError, match=r"checkpoint: w: its 33 bytes cannot be viewed as torch.bfloat16"):
        checkpoint.to_tensors(weight, "w", quant_storage=torch.bfloat16)
    for dtype in (torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=r"quant_storage must be a floating or integer dtype, got torch\."):
            checkpoint.to_tensors(weight, "w", quant_storage=dtype)
    with pytest.raises(ValueError, match=r"int8 has no quant_storage"):
        checkpoint.to_tensors(quantize(noise(4, 8), "int8"), "w", quant_storage=torch.bfloat16)


def test_codes_at_an_odd_address_are_copied() -> None:
    weight = quantize(noise(4, 64), "nf4")
    shifted = QTensor(
        **weight.inner_tensors() | {"q": torch.cat([torch.zeros(1, dtype=torch.uint8), weight.q.reshape(-1)])[1:]},
        shape=weight.shape, dtype=weight.dtype, format="nf4", block_size=64,
    )  # fmt: skip
    want = checkpoint.to_tensors(weight, "w", quant_storage=torch.float32)
    assert_same(checkpoint.to_tensors(shifted, "w", quant_storage=torch.float32), want)


@pytest.mark.parametrize("format", ["nf4", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_of_weights_that_are_not_finite(format: str, value: float) -> None:
    """They are no damage: quantize writes them, and the value shows them."""
    x = noise(4, 64)
    x[1, 3] = value
    for double_quant in (False, True):
        weight = quantize(x, format, double_quant=double_quant)
        state = checkpoint.to_tensors(weight, "w.weight")
        loaded = checkpoint.from_tensors(state, "w.weight")
        assert_same(checkpoint.to_tensors(loaded, "w.weight"), state)
        assert not bool(loaded.dequantize()[1].isfinite().all())


@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0,), (2, 0, 5)])
@pytest.mark.parametrize("format", ["nf4", "dynamic8", "int8"])
def test_empty_weights(format: str, shape: tuple[int, ...]) -> None:
    state = checkpoint.to_tensors(quantize(torch.empty(shape), format), "w")
    assert checkpoint.from_tensors(state, "w").dequantize().shape == shape


def test_a_dtype_that_cannot_be_recorded() -> None:
    weight = quantize(noise(4, 64), "nf4").to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"checkpoint: w: dtype must be one of float32.*got float8_e4m3fn"):
        checkpoint.to_tensors(weight, "w")


# Attacks: each a way to damage a whole state dict, and what the error says.

KEY = "a.weight.quant_state.bitsandbytes__nf4"


def text(change: Callable[[bytes], bytes]) -> Callable[[dict[str, Any]], None]:
    """Damage the bytes of the JSON."""

    def damage(state: dict[str, Any]) -> None:
        state[KEY] = torch.tensor(list(change(bytes(state[KEY].tolist()))), dtype=torch.uint8)

    return damage


def field(name: str, value: str) -> Callable[[dict[str, Any]], None]:
    """Give a field of the JSON another value, as text."""

    def change(content: bytes) -> bytes:
        fields = json.loads(content)
        fields[name] = "@"
        return json.dumps(fields).encode().replace(b'"@"', value.encode(errors="surrogatepass"))

    return text(change)


def entry(name: str, change: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    """Damage one entry."""
    return lambda state: state.update({name: change(state[name])})


ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "deep nesting": (text(lambda t: b"[" * 60_000), "bitsandbytes__nf4 is not JSON: maximum recursion depth"),
    "deep value": (field("shape", "[" * 5000 + "]" * 5000), "is not JSON: maximum recursion|shape must be a list"),
    "a long JSON": (text(lambda t: t + b" " * 70_000), "must be uint8 with 1 dimension of at most 65536"),
    "a JSON of columns": (entry(KEY, lambda t: t.reshape(-1, 1)), "must be uint8 with 1 dimension"),
    "an empty JSON": (text(lambda t: b""), "is not JSON: Expecting value"),
    "a field twice": (text(lambda t: t[:-1] + b', "blocksize": 128}'), "is not JSON: 'blocksize' appears twice"),
    "an unknown field": (field("zero_point", "0"), "unknown field 'zero_point'"),
    "a field of the entries": (field("absmax", "0"), "unknown field 'absmax'"),
    "UTF-16": (text(lambda t: t.decode().encode("utf-16")), "is not JSON: 'utf-8' codec can't decode"),
    "a byte order mark": (text(lambda t: b"\xef\xbb\xbf" + t), "is not JSON: Unexpected UTF-8 BOM"),
    "a surrogate": (field("quant_type", '"\ud800"'), "is not JSON: 'utf-8' codec can't decode"),
    "an escaped surrogate": (field("quant_type", '"\\ud800"'), r"quant_type is '\\ud800', the key says 'nf4'"),
    "latin-1": (field("dtype", '"fl\\u00f6at32"'), "dtype must be one of .* got 'flöat32'"),
    "a dtype of another type": (field("dtype", '["float32"]'), r"dtype must be one of .* got \['float32'\]"),
    "a dtype that torch has": (field("dtype", '"int8"'), "dtype must be one of"),
    "a shape of 2^60": (field("shape", "[1152921504606846976]"), "a.weight must hold 576460752303423488 bytes"),
    "a shape of 2^64": (field("shape", "[4294967296, 4294967296]"), "shape is too large"),
    "a shape of 2^120": (field("shape", "[1152921504606846976, 1152921504606846976, 0]"), "shape is too large"),
    "a shape of 10^4000": (field("shape", f"[1{'0' * 4000}]"), "shape is too large"),
    "a shape of 10^5000": (field("shape", f"[1{'0' * 5000}]"), "is not JSON: Exceeds the limit"),
    "a shape of floats": (field("shape", "[8.0, 128.0]"), r"shape must be a list of sizes, got \[8.0, 128.0\]"),
    "a shape of bools": (field("shape", "[true, 1024]"), "shape must be a list of sizes"),
    "a shape of NaN": (field("shape", "[NaN, 8]"), "shape must be a list of sizes"),
    "no shape": (field("shape", "null"), "shape must be a list of sizes, got None"),
    "a block of 10^4000": (field("blocksize", f"1{'0' * 4000}"), "power of two, 16...4096, got 1000"),
    "a block of true": (field("blocksize", "true"), "block_size must be an int, got bool"),
    "a block of 64.0": (field("blocksize", "64.0"), "block_size must be an int, got float"),
    "a block of 8": (field("blocksize", "8"), "block_size must be a power of two, 16...4096, got 8"),
    "a block of 128": (field("blocksize", "128"), r"a.weight.absmax must be torch.uint8 \[8\]"),
    "nested block of 256.0": (field("nested_blocksize", "256.0"), "nested_blocksize must be 256"),
    "nested block of 64": (field("nested_blocksize", "64"), "nested_blocksize must be 256"),
    "nested float16": (field("nested_dtype", '"float16"'), "nested_dtype float32"),
    "no offset": (field("nested_offset", "null"), "nested_offset must be a number, got None"),
    "an offset of true": (field("nested_offset", "true"), "nested_offset must be a number, got True"),
    "an offset of 1e300": (field("nested_offset", "1e300"), "nested_offset must be an fp32 number"),
    "an offset of 10^400": (field("nested_offset", f"1{'0' * 400}"), "nested_offset must be an fp32 number"),
    "no nested fields": (
        text(lambda t: t[: t.index(b', "nested')] + b"}"), "unexpected entry a.weight.nested_absmax"
    ),
    "half of the nested entries": (lambda s: s.pop("a.weight.nested_quant_map"), "nested_quant_map is missing"),
    "negative scales": (entry("a.weight.nested_absmax", lambda t: -t), "nested_absmax of a.weight must not be neg"),
    "codebook of another": (
        lambda s: s.update({"a.weight.quant_map": get_format("fp4").code.clone()}), "is not the codebook of nf4"
    ),
    "infinite codebook": (entry("a.weight.quant_map", lambda t: t * math.inf), "quant_map is not the codebook of nf4"),
    "codebook in fp64": (entry("a.weight.quant_map", Tensor.double), r"quant_map must be torch.float32 \[16\]"),
    "codes of bool": (entry("a.weight", lambda t: t.view(torch.bool)), "must be of a floating or integer dtype"),
    "codes of complex": (entry("a.weight", lambda t: t.view(-1).view(torch.complex64)), "floating or integer dtype"),
    "codes cast": (entry("a.weight", Tensor.float), "a.weight must hold 512 bytes, got 2048"),
    "codes cut": (entry("a.weight", lambda t: t[:-1]), "a.weight must hold 512 bytes, got 511"),
    "codes from one": (entry("a.weight", lambda t: t[:1].clone().expand(512, 1)), "a.weight .* is expanded"),
    "scales from one": (
        entry("a.weight.absmax", lambda t: t[:1].expand(2**40)), "a.weight.absmax .* is expanded"
    ),
    "JSON from one": (entry(KEY, lambda t: t[:1].expand(2**40)), "bitsandbytes__nf4 .* is expanded"),
    "sparse codes": (entry("a.weight", Tensor.to_sparse), "a.weight must be a dense tensor, got torch.sparse_coo"),
    "no tensor": (entry("a.weight.absmax", Tensor.tolist), "a.weight.absmax must be a dense tensor, got list"),
    "nothing": (entry("a.weight", lambda t: None), "a.weight must be a dense tensor, got NoneType"),
    "meta codes": (entry("a.weight", lambda t: t.to("meta")), "a.weight.absmax is on device cpu, a.weight on meta"),
    "meta scales": (
        entry("a.weight.nested_absmax", lambda t: t.to("meta")), "nested_absmax is on device meta, a.weight on cpu"
    ),
    "meta JSON": (entry(KEY, lambda t: t.to("meta")), "is on the meta device, its content is needed"),
    "both owners": (
        lambda s: s.update({"a.weight.quant_state.polybit__nf4": s[KEY]}), "appears 2 times: .*ytes__nf4, .*bit__nf4"
    ),
    "another owner": (lambda s: s.update({"a.weight.quant_state.x__nf4": s.pop(KEY)}), "x__nf4 is not a key that"),
    "no format": (lambda s: s.update({"a.weight.quant_state.bitsandbytes__": s.pop(KEY)}), "unknown format ''"),
    "int8 as k-bit": (lambda s: s.update({"a.weight.quant_state.polybit__int8": s.pop(KEY)}), "is not a key that"),
    "scales of int8 beside": (lambda s: s.update({"a.SCB": torch.ones(8)}), "unexpected entry a.weight.absmax"),
    "layout of int8 beside": (
        lambda s: s.update({"a.weight_format": torch.zeros(1)}), "a.weight: unexpected entry a.weight_format"
    ),
}  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused(attack: str) -> None:
    state: dict[str, Any] = checkpoint.to_tensors(quantize(noise(8, 128), "nf4"), "a.weight")
    checkpoint.from_tensors(state, "a.weight")
    damage, message = ATTACKS[attack]
    damage(state)
    with pytest.raises(ValueError, match=f"^checkpoint: .*{message}") as error:
        checkpoint.from_tensors(state, "a.weight")
    assert len(str(error.value)) < 500


ATTACKS_INT8: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "negative scales": (entry("a.SCB", lambda t: -t), "SCB of a.weight must not be negative"),
    "one scale short": (entry("a.SCB", lambda t: t[:-1]), r"a.SCB must be torch.float32 \[8\]"),
    "codes unsigned": (entry("a.weight", lambda t: t.view(torch.uint8)), "a.weight must be int8 with rows"),
    "a scalar": (entry("a.weight", lambda t: t[0, 0]), "a.weight must be int8 with rows"),
    "layout as text": (entry("a.weight_format", lambda t: "row"), "a.weight_format must be a dense tensor, got str"),
    "layout in fp32": (entry("a.weight_format", Tensor.float), "a.weight_format must be a uint8 scalar"),
    "two layouts": (entry("a.weight_format", lambda t: t.repeat(2)), "a.weight_format must be a uint8 scalar"),
    "meta layout": (entry("a.weight_format", lambda t: t.to("meta")), "a.weight_format is on device meta"),
    "meta scales": (entry("a.SCB", lambda t: t.to("meta")), "a.SCB is on device meta, a.weight on cpu"),
    "k-bit entries": (lambda s: s.update({KEY: s["a.SCB"]}), f"unexpected entry {KEY}"),
}


@pytest.mark.parametrize("attack", ATTACKS_INT8)
def test_attacks_on_int8_are_refused(attack: str) -> None:
    state: dict[str, Any] = checkpoint.to_tensors(quantize(noise(8, 128), "int8"), "a.weight")
    checkpoint.from_tensors(state, "a.weight")
    damage, message = ATTACKS_INT8[attack]
    damage(state)
    with pytest.raises(ValueError, match=f"^checkpoint: .*{message}"):
        checkpoint.from_tensors(state, "a.weight")


def test_meta_is_read_only_where_meta_is_wanted() -> None:
    state = checkpoint.to_tensors(quantize(noise(8, 128), "int8").to("meta"), "w")
    assert checkpoint.from_tensors(state, "w").is_meta
    with pytest.raises(ValueError, match=r"checkpoint: w is on the meta device, its content is needed"):
        checkpoint.from_tensors(state, "w", device="cpu")
    whole = checkpoint.to_tensors(quantize(noise(8, 128), "nf4"), "w")
    assert checkpoint.from_tensors(whole, "w", device="meta").is_meta


def test_other_orders_of_memory_are_the_same_bytes() -> None:
    """Rows of bytes instead of one column; strides; one element with a stride of two; parameters."""
    weight = quantize(noise(1, 8), "nf4", block_size=16)
    state: dict[str, Any] = checkpoint.to_tensors(weight, "w", quant_storage=torch.float32)
    assert state["w"].shape == (1, 1)
    state["w"] = torch.stack([state["w"][0], state["w"][0]], 1)[:, 0]
    state["w.quant_map"] = torch.nn.Parameter(torch.stack([state["w.quant_map"]] * 2, 1)[:, 0])
    loaded = checkpoint.from_tensors(state, "w")
    assert torch.equal(loaded.dequantize(), weight.dequantize())

    weight = quantize(noise(8, 128), "nf4")
    state = checkpoint.to_tensors(weight, "w")
    for codes in (state["w"].reshape(8, 64), state["w"].reshape(8, 64).t().contiguous().t(), state["w"].reshape(-1)):
        loaded = checkpoint.from_tensors(state | {"w": codes}, "w")
        assert_same(checkpoint.to_tensors(loaded, "w"), state)


def test_keys_of_siblings_stay_apart() -> None:
    """Names that begin with another's name, and int8 scales of parameters that are not called weight."""
    names = ["experts.up", "experts.up_scale", "experts.down", "experts.weight", "experts.weight_2"]
    formats = ["int8", "nf4", "int8", "int8", "nf3"]
    weights = {name: quantize(noise(4, 64, seed=i), formats[i]) for i, name in enumerate(names)}
    state = {key: value for name in names for key, value in checkpoint.to_tensors(weights[name], name).items()}
    assert sum(len(checkpoint.owned_keys(state, name)) for name in names) == len(state)
    for name in names:
        assert torch.equal(checkpoint.from_tensors(state, name).dequantize(), weights[name].dequantize())


def test_fuzz() -> None:
    """A short run of tests/fuzz/fuzz_checkpoint.py; its README has the long ones."""
    counts = fuzz_checkpoint.run(5000, seed=2026)
    assert counts["read"] > 500 and counts["refused"] > 3000


def test_fuzz_knows_a_wrong_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """The property fails for a reader that crashes, that names no entry, and that changes a byte."""
    read, state, prefix = checkpoint.from_tensors, fuzz_checkpoint.VALID[0], fuzz_checkpoint.PREFIXES[0]

    def crashing(tensors: Any, key: str) -> QTensor:
        raise IndexError(f"checkpoint: {key}")

    def mumbling(tensors: Any, key: str) -> QTensor:
        raise ValueError("checkpoint: something is wrong")

    def careless(tensors: Any, key: str) -> QTensor:
        weight = read({name: tensor.clone() for name, tensor in tensors.items()}, key)
        weight.absmax.reshape(-1)[0] ^= 1
        return weight

    assert fuzz_checkpoint.check(state, prefix) == "read"
    for reader, finding in ((crashing, IndexError), (mumbling, AssertionError), (careless, AssertionError)):
        monkeypatch.setattr(checkpoint, "from_tensors", reader)
        with pytest.raises(finding):
            fuzz_checkpoint.check(state, prefix)
