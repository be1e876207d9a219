"""Properties that hold for every input, searched by hypothesis (derandomised: the same cases every time)."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from polybit.formats import get_format

settings.register_profile("polybit", derandomize=True, deadline=None, max_examples=60, print_blob=True)
settings.load_profile("polybit")

ops = torch.ops.polybit
LINEAR = torch.linspace(-1, 1, 256)
FORMATS = ("nf4", "fp4", "nf3", "nf2")
TINY = 2.0**-100

# fp32 numbers away from subnormals, which are outside the bit-exact promise.
finite = st.floats(-(2.0**50), 2.0**50, width=32, allow_nan=False, allow_subnormal=False)
numbers = finite.map(lambda value: 0.0 if abs(value) < TINY else value)
vectors = hnp.arrays("float32", st.integers(1, 700), elements=numbers).map(torch.from_numpy)
blocks = st.sampled_from([16, 32, 64, 128, 256])
formats = st.sampled_from(FORMATS)


def quantize(x: torch.Tensor, name: str, block: int, search: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    f = get_format(name)
    q, absmax = ops.quantize_kbit(x, f.code, f.thresholds, f.order, block, f.bits, search)
    return q, absmax


def restore(q: torch.Tensor, absmax: torch.Tensor, name: str, block: int, count: int) -> torch.Tensor:
    f = get_format(name)
    y: torch.Tensor = ops.dequantize_kbit(
        q, absmax, f.code, None, None, None, block, f.bits, 0, 0, torch.float32, [count]
    )
    return y


def per_element(absmax: torch.Tensor, block: int, count: int) -> torch.Tensor:
    return absmax.flatten().repeat_interleave(block)[:count]


def widest_gap(code: torch.Tensor) -> float:
    """Between neighbours, the ends of [-1, 1] counted as halves of a gap."""
    ordered = code.sort().values
    ends = 2 * torch.stack([ordered[0] + 1, 1 - ordered[-1]])
    return float(torch.cat([ordered.diff(), ends]).max())


@given(vectors, blocks, formats)
def test_kbit_error_is_at_most_half_the_widest_gap(x: torch.Tensor, block: int, name: str) -> None:
    q, absmax = quantize(x, name, block)
    y = restore(q, absmax, name, block, x.numel())
    # FP4 cuts between its two smallest magnitudes where bitsandbytes does, not exactly midway.
    slack = 1.02 if name == "fp4" else 1.0 + 1e-5
    bound = per_element(absmax, block, x.numel()) * (0.5 * widest_gap(get_format(name).code) * slack)
    assert bool(((y - x).abs() <= bound).all())


@given(vectors, blocks)
def test_blockwise_error_is_at_most_half_the_widest_gap(x: torch.Tensor, block: int) -> None:
    q, absmax = ops.quantize_blockwise(x, LINEAR, block)
    y = ops.dequantize_blockwise(q, absmax, LINEAR, block, torch.float32)
    bound = per_element(absmax, block, x.numel()) * (0.5 * widest_gap(LINEAR) * (1 + 1e-4))
    assert bool(((y - x).abs() <= bound).all())


@given(vectors, blocks)
def test_absmax_is_the_largest_magnitude(x: torch.Tensor, block: int) -> None:
    want = torch.stack([part.abs().max() for part in x.split(block)])
    assert torch.equal(quantize(x, "nf4", block)[1].flatten(), want)
    assert torch.equal(ops.quantize_blockwise(x, LINEAR, block)[1].flatten(), want)


@given(vectors, blocks, st.sampled_from(["nf4", "fp4"]))
def test_kbit_is_idempotent(x: torch.Tensor, block: int, name: str) -> None:
    """Their codebooks hold 1, and FP4 its mirror image: what was restored quantizes to itself."""
    q, absmax = quantize(x, name, block)
    y = restore(q, absmax, name, block, x.numel())
    q2, absmax2 = quantize(y, name, block)
    assert torch.equal(absmax, absmax2)
    assert torch.equal(restore(q2, absmax2, name, block, x.numel()), y)


@given(vectors, blocks)
def test_blockwise_is_idempotent(x: torch.Tensor, block: int) -> None:
    q, absmax = ops.quantize_blockwise(x, LINEAR, block)
    y = ops.dequantize_blockwise(q, absmax, LINEAR, block, torch.float32)
    q2, absmax2 = ops.quantize_blockwise(y, LINEAR, block)
    assert torch.equal(q, q2) and torch.equal(absmax, absmax2)


@given(vectors, blocks, formats, st.integers(-20, 20), st.sampled_from([0, 1]))
def test_a_power_of_two_changes_the_scale_only(x: torch.Tensor, block: int, name: str, power: int, search: int) -> None:
    q, absmax = quantize(x, name, block, search)
    q2, absmax2 = quantize(x * 2.0**power, name, block, search)
    assert torch.equal(q, q2)
    assert torch.equal(absmax * 2.0**power, absmax2)


@given(st.integers(1, 6), blocks, formats, st.integers(0, 2**31), st.sampled_from([0, 1]))
def test_blocks_do_not_know_each_other(count: int, block: int, name: str, seed: int, search: int) -> None:
    """Permuting whole blocks permutes bytes and scales (every block is a whole number of bytes)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, block, generator=generator)
    order = torch.randperm(count, generator=generator)
    q, absmax = quantize(x, name, block, search)
    q2, absmax2 = quantize(x[order], name, block, search)
    assert torch.equal(q.flatten().view(count, -1)[order], q2.flatten().view(count, -1))
    assert torch.equal(absmax.flatten()[order], absmax2.flatten())


@given(vectors, blocks, formats)
def test_search_never_increases_the_error(x: torch.Tensor, block: int, name: str) -> None:
    plain, searched = (
        restore(*quantize(x, name, block, search), name, block, x.numel()).double() - x.double() for search in (0, 1)
    )
    for a, b, part in zip(plain.split(block), searched.split(block), x.double().split(block), strict=True):
        assert float((b * b).sum()) <= float((a * a).sum()) + 1e-5 * float((part * part).sum())


@given(hnp.arrays("float32", st.tuples(st.integers(1, 9), st.integers(1, 200)), elements=numbers).map(torch.from_numpy))
def test_int8_rows(x: torch.Tensor) -> None:
    q, absmax, outlier = ops.quantize_int8(x, 0.0)
    y = ops.dequantize_int8(q, absmax, torch.float32)
    assert torch.equal(absmax.flatten(), x.abs().amax(1))
    assert not outlier.any()
    assert int(q.min()) >= -127
    assert bool(((y - x).abs() <= absmax.view(-1, 1) * (0.5 / 127 * (1 + 1e-4))).all())
    assert torch.equal(ops.quantize_int8(-x, 0.0)[0], -q)


@given(vectors, blocks, formats)
def test_packed_weights_unpack_to_the_same_bytes(x: torch.Tensor, block: int, name: str) -> None:
    f = get_format(name)
    n, k = 5, 2 * block
    w = x.repeat(n * k // x.numel() + 1)[: n * k].view(n, k)
    q, _ = quantize(w, name, block)
    size = int(ops.pack_size_kbit(q, n, k, block, f.bits))
    packed = ops.pack_kbit(q, n, k, block, f.bits, size)
    assert torch.equal(ops.unpack_kbit(packed, n, k, block, f.bits).flatten(), q.flatten())
