"""The specification itself: its op table, codebooks, error figures, and the arguments it refuses."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import polybit
from polybit import spec
from polybit.spec import codebooks
from polybit.spec.base import tree_sum
from polybit.spec.kbit import pack, unpack
from polybit.testing import relative_error

TABLE = Path(polybit.__file__).parent / "include" / "ops.def"


def test_every_op_of_the_table_has_a_meaning() -> None:
    names = re.findall(r"^PB_OP\((\w+)", TABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(names) >= 23
    assert set(names) == set(spec.OPS)


def tensors(args: Sequence[object]) -> list[torch.Tensor]:
    flat = [x for arg in args for x in (arg if isinstance(arg, list) else [arg])]
    return [x for x in flat if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("name", spec.OPS)
def test_samples_repeat_and_alloc_fits_the_reference(name: str) -> None:
    op = spec.OPS[name]
    ids = [sample.id for sample in op.samples("cpu")]
    assert len(ids) == len(set(ids)) >= 5
    # A list of them first: no sample may change the tensors of the one before.
    for sample, again in zip(list(op.samples("cpu")), op.samples("cpu")):
        for a, b in zip(tensors(sample.args), tensors(again.args), strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), sample.id
        outs, want = op.alloc(*sample.args), op.reference(*sample.args)
        assert [(o.shape, o.dtype) for o in outs] == [(w.shape, w.dtype) for w in want], sample.id


# The figures are issue gates: relative squared error on Gaussian weights, block 64.
@pytest.mark.parametrize(
    ("name", "search", "limit"), [("nf4", 0, 0.0086), ("nf4", 1, 0.0074), ("lloyd3", 1, 0.030), ("lloyd2", 1, 0.115)]
)
def test_error_on_gaussian_weights(name: str, search: int, limit: float) -> None:
    x = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))
    code, thresholds, order = codebooks.kbit()[name]
    bits = int(name[-1])
    q, absmax = spec.OPS["quantize_kbit"].reference(x, code, thresholds, order, 64, bits, search)
    args = (q, absmax, code, None, None, None, 64, bits, 0, 0, torch.float32, [x.numel()])
    (y,) = spec.OPS["dequantize_kbit"].reference(*args)
    assert 0.5 * limit < relative_error(y, x) <= limit


@pytest.mark.parametrize("name", codebooks.kbit())
def test_codebooks_are_consistent(name: str) -> None:
    code, thresholds, order = codebooks.kbit()[name]
    levels = 1 << int(name[-1])
    assert len(code) == len(order) == levels == len(thresholds) + 1
    assert sorted(order.tolist()) == list(range(levels))
    assert bool((thresholds[1:] > thresholds[:-1]).all())
    ranked = code[order.long()]
    assert bool((ranked[1:] >= ranked[:-1]).all())
    # Each threshold lies between its two levels.
    assert bool(((ranked[:-1] <= thresholds) | (ranked[:-1] == 0)).all()) and bool((thresholds <= ranked[1:]).all())


def test_nf4_thresholds_are_those_of_existing_checkpoints() -> None:
    want = (
        "bf591cd8 bf1c5270 beeb8480 beadea76 be703cec be0d38bc bd3a7871 3d22faff "
        "3df64862 3e5067e0 3e9582d4 3ec753f9 3f006d04 3f248daf 3f5c89da"
    )
    assert " ".join(f"{v & 0xFFFFFFFF:08x}" for v in codebooks.nf4().thresholds.view(torch.int32).tolist()) == want


def test_normal_float_4_is_nf4() -> None:
    """The construction of NF3 and NF2 gives, for 4 bits, the published NF4 (which was rounded on the way)."""
    assert (codebooks.normal_float(4).code - codebooks.nf4().code).abs().max() < 2e-7


@pytest.mark.parametrize("bits", [2, 3])
def test_lloyd_levels_are_a_fixed_point(bits: int) -> None:
    def density(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def tail(x: float) -> float:
        return 0.5 * math.erfc(x / math.sqrt(2))

    half = {2: codebooks.LLOYD2, 3: codebooks.LLOYD3}[bits]
    largest = {2: 1.5104176084990943, 3: 2.1519457045369923}[bits]
    levels = [v * largest for v in half]
    edges = [0.0] + [(a + b) / 2 for a, b in itertools.pairwise(levels)] + [math.inf]
    means = [(density(a) - density(b)) / (tail(a) - tail(b)) for a, b in itertools.pairwise(edges)]
    assert means == pytest.approx(levels, abs=1e-12)


@pytest.mark.parametrize("make", [codebooks.dynamic, codebooks.linear])
@pytest.mark.parametrize("signed", [True, False])
def test_8_bit_maps(make: Any, signed: bool) -> None:
    code = make(signed).code
    assert len(code) == 256 and code.max() == 1.0 and bool((code == 0).any())
    assert bool((code[1:] >= code[:-1]).all())
    assert (code.min() < -0.99) == signed


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 1001])
def test_pack_and_back(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (count,), generator=torch.Generator().manual_seed(count)).to(torch.uint8)
    q = pack(codes, bits, torch.ones(1))
    assert q.numel() == (count * bits + 7) // 8
    assert torch.equal(unpack(q, count, bits), codes.long())


def test_packing_by_hand() -> None:
    one = torch.ones(1, dtype=torch.uint8)
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4, one).tolist() == [0x12, 0x31]
    # 3 bits, little end first: 101, 010, 11|1, ... = 0b11010101; then 1 and twice the fill 001, cut to the byte.
    assert pack(torch.tensor([5, 2, 7], dtype=torch.uint8), 3, one).tolist() == [0b11010101, 0b10010011]
    assert pack(torch.tensor([0, 1, 2, 3, 1], dtype=torch.uint8), 2, one).tolist() == [0b11100100, 0b01010101]


def test_tree_sum() -> None:
    x = torch.tensor([1.0, 2.0**-24, 2.0**-24, 2.0**-24])
    # Neighbours first: (1 + e) rounds to 1, (e + e) is kept.
    assert tree_sum(x).item() == 1.0 + 2.0**-23
    assert tree_sum(torch.empty(3, 0)).tolist() == [0.0, 0.0, 0.0]


def call(name: str, **changes: object) -> None:
    """The first full-sized sample of the op with some arguments replaced, through torch.ops."""
    overload = getattr(torch.ops.polybit, name).default
    names = [argument.name for argument in overload._schema.arguments]
    sample = list(spec.OPS[name].samples("cpu"))[1]
    args = dict(zip(names, sample.args))
    assert set(changes) <= set(names)
    overload(*{**args, **changes}.values())


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("quantize_kbit", {"block": 48}, ValueError, "quantize_kbit: block must be a power of two"),
        ("quantize_kbit", {"block": 0}, ValueError, "got 0"),
        ("quantize_kbit", {"block": -64}, ValueError, "got -64"),
        ("quantize_kbit", {"block": 8192}, ValueError, "got 8192"),
        ("quantize_kbit", {"bits": 5}, ValueError, "bits must be 2, 3 or 4, got 5"),
        ("quantize_kbit", {"search": 2}, ValueError, "search must be 0 or 1"),
        ("quantize_kbit", {"x": torch.ones(3, dtype=torch.int32)}, TypeError, "x must be float32, float16 or bfloat16"),
        ("quantize_kbit", {"code": torch.ones(15)}, ValueError, "code must be a tensor of 16 elements"),
        ("quantize_kbit", {"order": torch.ones(16)}, TypeError, "order must be torch.uint8"),
        ("quantize_blockwise", {"code": torch.ones(16)}, ValueError, "code must be a tensor of 256 elements"),
        ("dequantize_kbit", {"q": torch.ones(3, dtype=torch.uint8)}, ValueError, "q must be a tensor of"),
        ("dequantize_kbit", {"nested_code": torch.ones(256)}, ValueError, "all given or all None"),
        ("dequantize_kbit", {"dtype": torch.float64}, TypeError, "dtype must be"),
        ("matmul_kbit", {"bias": torch.ones(3, dtype=torch.float16)}, ValueError, "bias must be a tensor of"),
        ("matmul_kbit", {"n": 4}, ValueError, "q must be a tensor of"),
        ("quantize_int8", {"threshold": -1.0}, ValueError, "threshold must be at least 0"),
        ("matmul_int8", {"b": torch.ones(3, 3, dtype=torch.int8)}, ValueError, "b must be of shape"),
        ("gather_kbit", {"index": torch.ones(3)}, TypeError, "index must be int64 or int32"),
        ("dequantize_absmax", {"block_offset": 1 << 20}, ValueError, "nested_absmax must be at least"),
        ("scale_multi", {"factor": torch.ones(2)}, ValueError, "factor must be a tensor of 1"),
    ],
)
def test_bad_arguments(name: str, changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(name, **changes)
