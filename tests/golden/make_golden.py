"""Writes the golden vectors next to itself, from the published formulas and numpy alone.

It knows neither polybit nor any library that quantizes: what it writes is a second opinion. Run it to see whether the
committed files come out again; docs/numerics.md names every rule.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

F = np.float32
HERE = Path(__file__).parent
NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
    -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""
FP4_LIMITS = (0x3B2AAAB9, 0x3DB00000, 0x3E555555, 0x3E955555, 0x3ED55556, 0x3F155550, 0x3F555555)
Array = Any


def values(count: int, seed: int) -> Array:
    """Reproducible fp32 values of roughly normal shape from a 32-bit linear congruence: no library's generator."""
    state, out = seed * 2654435761 % 2**32, []
    for _ in range(count):
        total = 0
        for _ in range(4):
            state = (1664525 * state + 1013904223) % 2**32
            total += state >> 16
        out.append((total - 2 * 65535) / 32768.0)
    return np.array(out, dtype=F)


def ascending(levels: Any) -> tuple[Array, Any]:
    """A code and the rule that picks a level: midpoints in fp32, ties to the lower one."""
    code = np.asarray(levels, dtype=F)
    limits = (code[:-1] + code[1:]) * F(0.5)
    return code, lambda s: (s[..., None] > limits).sum(-1)


def fp4() -> tuple[Array, Any]:
    """Sign and three bits; the rule compares |s|, and a value that is not below zero has no sign."""
    magnitudes = [0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12]
    code = np.array(magnitudes + [-m for m in magnitudes], dtype=F)
    limits = np.array(FP4_LIMITS, dtype=np.uint32).view(F)
    by_size = np.array([0, 1, 6, 7, 4, 5, 2, 3])

    def pick(s: Array) -> Array:
        return by_size[(np.abs(s)[..., None] > limits).sum(-1)] + 8 * (s < 0)

    return code, pick


def normal_float(bits: int) -> list[float]:
    """Quantiles of the normal distribution over the largest, one more above zero than below."""
    half = 2 ** (bits - 1)
    outermost = 1 - 0.5 * (1 / (2 * (2**bits - 1)) + 1 / (2 * 2**bits))

    def side(count: int) -> list[float]:
        step = (outermost - 0.5) / count
        quantiles = [NormalDist().inv_cdf(outermost - i * step) for i in range(count)]
        return [v / quantiles[0] for v in quantiles]

    return sorted([-v for v in side(half - 1)] + [0.0] + side(half))


def dynamic() -> Array:
    """The signed dynamic map: seven decades of 1, 2, 4 ... 64 means of neighbours of points spaced over [0.1, 1]."""
    levels = [F(0), F(1)]
    for decade in range(7):
        count = 2**decade
        low, step = np.float64(F(0.1)), np.float64(F(F(F(1) - F(0.1)) / F(count)))
        points = [F(low + step * i) if i < (count + 1) // 2 else F(1.0 - step * (count - i)) for i in range(count + 1)]
        for a, b in itertools.pairwise(points):
            level = F(F(10.0 ** (decade - 6)) * F(F(a + b) / F(2)))
            levels += [level, -level]
    return np.array(sorted(levels), dtype=F)


def blocks(x: Array, block: int) -> list[Array]:
    """The blocks, the last one as short as it is."""
    return [x[i : i + block] for i in range(0, len(x), block)]


def tree(x: Array) -> Any:
    """The sum by neighbours."""
    x = np.concatenate([x, np.zeros((1 << (len(x) - 1).bit_length()) - len(x), dtype=F)])
    while len(x) > 1:
        x = x[0::2] + x[1::2]
    return x[0]


def quantize(x: Array, pick: Any, block: int) -> tuple[Array, Array]:
    """(codes, absmax)."""
    codes, scales = [], []
    for part in blocks(x, block):
        absmax = np.abs(part).max()
        s = part * (F(1) / absmax) if absmax >= F(2.0**-126) else np.zeros_like(part)
        scales.append(absmax if absmax >= F(2.0**-126) else F(0))
        codes.append(pick(s))
    return np.concatenate(codes), np.array(scales, dtype=F)


def search(x: Array, code: Array, pick: Any, block: int) -> tuple[Array, Array]:
    """The scale search: 32 candidates a block, the one that explains most of the block wins."""
    codes, scales = [], []
    for part in blocks(x, block):
        absmax = np.abs(part).max()
        u, best, scale = part * (F(1) / absmax), F(0), absmax
        for j in range(32):
            c = code[pick(u * (F(1) / F((j + 13) / 32)))]
            num, den = tree(u * c), tree(c * c)
            gain = (num * num) / den if den > 0 and num > 0 else F(0)
            if gain > best:
                best, scale = gain, absmax * (num / den)
        codes.append(pick(part * (F(1) / scale)))
        scales.append(scale)
    return np.concatenate(codes), np.array(scales, dtype=F)


def pack(codes: Array, bits: int, zero: int) -> Array:
    """4 bits: the first of two is high. Else a stream, low bits first. The rest of the last byte: the code of zero."""
    count = len(codes)
    codes = np.concatenate([codes, np.full(-count % 8, zero)]).astype(np.uint8)
    if bits == 4:
        packed = codes[0::2] * 16 + codes[1::2]
    else:
        stream = [(int(c) >> j) & 1 for c in codes for j in range(bits)]
        packed = np.packbits(np.array(stream, dtype=np.uint8), bitorder="little")
    return packed[: (count * bits + 7) // 8].astype(np.uint8)


def kbit(levels: tuple[Array, Any], bits: int, x: Array, block: int, searched: bool = False) -> dict[str, Array]:
    """One k-bit vector."""
    code, pick = levels
    codes, absmax = search(x, code, pick, block) if searched else quantize(x, pick, block)
    zero = int(pick(np.zeros(1, dtype=F))[0])
    y = code[codes] * np.repeat(absmax, block)[: len(x)]
    return {"x": x, "code": code, "q": pack(codes, bits, zero), "absmax": absmax, "y": y, "block": np.int64(block)}


def int8(x: Array, threshold: float) -> dict[str, Array]:
    """Rows to int8; columns with an outlier are left out."""
    outliers = np.abs(x) >= F(threshold) if threshold else np.zeros(x.shape, dtype=bool)
    absmax = np.where(outliers, F(0), np.abs(x)).max(1)
    columns = outliers.any(0)
    q = np.where(columns, F(0), np.rint(x * (F(127) / absmax)[:, None])).astype(np.int8)
    y = (q.astype(F) * absmax[:, None]) * F(0.007874015718698502)
    return {"x": x, "q": q, "absmax": absmax, "outlier": columns.astype(np.uint8), "y": y, "threshold": F(threshold)}


def double_quant() -> dict[str, Array]:
    """Scales, less their mean, in blocks of 256 with the dynamic map."""
    absmax, code = np.abs(values(700, 7)) + F(1), dynamic()
    offset = tree(absmax) / F(len(absmax))
    q, nested = quantize(absmax - offset, ascending(code)[1], 256)
    y = code[q] * np.repeat(nested, 256)[: len(q)] + offset
    return {"x": absmax, "code": code, "q": q.astype(np.uint8), "absmax": nested, "offset": offset, "y": y}


def blockwise() -> dict[str, Array]:
    """8 bits with the dynamic map."""
    x, code = values(1000, 6), dynamic()
    q, absmax = quantize(x, ascending(code)[1], 256)
    y = code[q] * np.repeat(absmax, 256)[: len(q)]
    return {"x": x, "code": code, "q": q.astype(np.uint8), "absmax": absmax, "y": y, "block": np.int64(256)}


def with_zero_block(x: Array) -> Array:
    """The second block of 64 is all zeros."""
    x = x.copy()
    x[64:128] = 0
    return x


def vectors() -> dict[str, dict[str, Array]]:
    """Every file's content."""
    nf4 = ascending([float(v) for v in NF4.split()])
    outlying = values(12 * 100, 8).reshape(12, 100)
    outlying[3, 17] = 6.5
    outlying[9, 40] = -6.0
    return {
        "nf4": kbit(nf4, 4, with_zero_block(values(1003, 1)), 64),
        "fp4": kbit(fp4(), 4, with_zero_block(values(1003, 2)), 64),
        "int4": kbit(ascending([(j - 8) / 7 for j in range(16)]), 4, values(999, 3), 32),
        "nf3": kbit(ascending(normal_float(3)), 3, values(1003, 4), 64),
        "nf2": kbit(ascending(normal_float(2)), 2, values(1001, 5), 128),
        "nf4_search": kbit(nf4, 4, values(1003, 9), 64, searched=True),
        "nf3_search": kbit(ascending(normal_float(3)), 3, values(517, 10), 32, searched=True),
        "fp4_search": kbit(fp4(), 4, values(517, 11), 64, searched=True),
        "dynamic": blockwise(),
        "double_quant": double_quant(),
        "int8": int8(values(12 * 100, 8).reshape(12, 100), 0.0),
        "int8_outliers": int8(outlying, 6.0),
    }


def main(folder: Path) -> None:
    """Write all files."""
    for name, arrays in vectors().items():
        np.savez_compressed(folder / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
