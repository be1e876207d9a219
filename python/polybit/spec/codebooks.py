"""Codebooks: (code by stored index, ascending thresholds between ranks, stored index of each rank), CPU tensors."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Codebook(NamedTuple):
    """code fp32 [2^k]; thresholds fp32 [2^k - 1], ascending; order uint8 [2^k]."""

    code: Tensor
    thresholds: Tensor
    order: Tensor


def ascending(values: Sequence[float] | Tensor) -> Codebook:
    """A codebook stored in ascending order, decided at the fp32 midpoints."""
    code = torch.as_tensor(values, dtype=torch.float32)
    return Codebook(code, (code[:-1] + code[1:]) * 0.5, torch.arange(len(code), dtype=torch.int32).to(torch.uint8))


# Dettmers et al. 2023, QLoRA, appendix E: the values every NF4 checkpoint was made with.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

# Yoshida 2023, NF4 Isn't Information Theoretically Optimal (and that's Good), arXiv:2306.06965: AbnormalFloat, for
# blocks of 64.
AF4 = (
    -1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0,
    0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0,
)  # fmt: skip

# Magnitudes by the three low bits of an FP4 index; the fourth is the sign.
FP4_MAGNITUDES = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
# Between neighbouring magnitudes. Five are not the fp32 midpoints, but existing checkpoints were made with these.
FP4_THRESHOLD_BITS = (0x3B2AAAB9, 0x3DB00000, 0x3E555555, 0x3E955555, 0x3ED55556, 0x3F155550, 0x3F555555)
FP4_BY_MAGNITUDE = (0, 1, 6, 7, 4, 5, 2, 3)

# Max 1960, Quantizing for minimum distortion: the MSE-optimal levels of a Gaussian, over the largest; the fixed point
# of Lloyd's iteration, to which tests/test_spec.py holds them.
LLOYD2 = (0.2997714222137677, 1.0)
LLOYD3 = (0.11389422067084973, 0.35131243302838927, 0.6245089156625161, 1.0)


def nf4() -> Codebook:
    """NormalFloat4."""
    return ascending(NF4)


def gaussian_quantiles(outermost: float, count: int) -> list[float]:
    """`count` quantiles over the largest, downwards: evenly spaced from the probability `outermost` on, towards 0.5."""
    step = (outermost - 0.5) / count
    probabilities = torch.tensor([outermost - i * step for i in range(count)], dtype=torch.float64)
    values: list[float] = torch.special.ndtri(probabilities).tolist()
    return [value / values[0] for value in values]


def normal_float(bits: int) -> Codebook:
    """NormalFloat of 2 or 3 bits as NF4 is made: 2^(k-1) positive, 2^(k-1) - 1 negative Gaussian quantiles, and 0.

    The outermost probability is 1 - (1 / (2 (2^k - 1)) + 1 / 2^(k+1)) / 2, for k = 4 the 0.9677083 of QLoRA.
    """
    half = 1 << (bits - 1)
    outermost = 1.0 - 0.5 * (1.0 / (2 * (2 * half - 1)) + 1.0 / (4 * half))
    negative, positive = (gaussian_quantiles(outermost, count) for count in (half - 1, half))
    return ascending([-v for v in negative] + [0.0] + positive[::-1])


def fp4() -> Codebook:
    """The e2m1-like type of bitsandbytes. Stored index 8 is -0."""
    code = torch.tensor(FP4_MAGNITUDES + tuple(-m for m in FP4_MAGNITUDES), dtype=torch.float64).to(torch.float32)
    positive = torch.tensor([struct.unpack("<f", struct.pack("<I", bits))[0] for bits in FP4_THRESHOLD_BITS])
    # A tie takes the smaller magnitude on both sides, so on the negative side -t itself must lie above its threshold.
    negative = torch.nextafter(-positive, torch.tensor(-math.inf)).flip(0)
    thresholds = torch.cat([negative, torch.tensor([-(2.0**-126)]), positive])
    order = [8 + i for i in reversed(FP4_BY_MAGNITUDE)] + list(FP4_BY_MAGNITUDE)
    return Codebook(code, thresholds, torch.tensor(order, dtype=torch.uint8))


def integer(bits: int) -> Codebook:
    """Symmetric integer grid: (j - 2^(k-1)) / (2^(k-1) - 1)."""
    half = 1 << (bits - 1)
    return ascending([(j - half) / (half - 1) for j in range(2 * half)])


def lloyd(bits: int) -> Codebook:
    """MSE-optimal levels of a Gaussian, 2 or 3 bits. Meant for the scale search: their largest is no maximum."""
    half = {2: LLOYD2, 3: LLOYD3}[bits]
    return ascending([-v for v in reversed(half)] + list(half))


def dynamic(signed: bool = True) -> Codebook:
    """Dynamic tree quantization (Dettmers 2016): 0, 1, and seven decades, each of twice the levels of the one below."""
    values = [0.0, 1.0]
    for i in range(7):
        count = 1 << (i if signed else i + 1)
        means = decade_means(count)
        decade = [float(v) for v in means * torch.tensor(10.0 ** (i - 6), dtype=torch.float32)]
        values += decade + ([-v for v in decade] if signed else [])
    return ascending(sorted(values))


def decade_means(count: int) -> Tensor:
    """Means of neighbours of `count` + 1 evenly spaced points, 0.1 to 1, in fp32 as in existing checkpoints.

    Point i is fma(step, i, low), in the upper half fma(-step, count - i, high); fp64 holds the product exactly.
    """
    low, high = torch.tensor(0.1), torch.tensor(1.0)
    step = ((high - low) / count).double()
    i = torch.arange(count + 1, dtype=torch.float64)
    points = torch.where(i < (count + 1) // 2, low.double() + step * i, high.double() - step * (count - i)).float()
    return (points[:-1] + points[1:]) / 2.0


def linear(signed: bool = True) -> Codebook:
    """j / 127 for -127...127 with 0 twice, to make 256; unsigned j / 255."""
    if signed:
        return ascending([j / 127 for j in range(-127, 1)] + [j / 127 for j in range(128)])
    return ascending([j / 255 for j in range(256)])


def fp8(exponent_bits: int, mantissa_bits: int) -> Codebook:
    """All values of a float of 1 + exponent_bits + mantissa_bits = 8 bits, none infinite, over the largest; 0 twice."""
    bias = 1 << (exponent_bits - 1)
    fractions = [m / (1 << mantissa_bits) for m in range(1 << mantissa_bits)]
    positive = [math.ldexp(f, 1 - bias) for f in fractions]
    positive += [math.ldexp(1.0 + f, e - bias) for e in range(1, 1 << exponent_bits) for f in fractions]
    return ascending([-v / positive[-1] for v in reversed(positive)] + [v / positive[-1] for v in positive])


def kbit() -> dict[str, Codebook]:
    """Every k-bit codebook by the name of its format."""
    return {
        "nf4": nf4(),
        "fp4": fp4(),
        "int4": integer(4),
        "nf3": normal_float(3),
        "int3": integer(3),
        "lloyd3": lloyd(3),
        "nf2": normal_float(2),
        "int2": integer(2),
        "lloyd2": lloyd(2),
    }
