"""Every op on a layer's shapes; beside it, in the same run and by turns, its bitsandbytes counterpart.

One JSON line per case: the median of ours and of the peer in milliseconds, and their ratio (below 1: ours is faster).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import bitsandbytes.functional as peer
import torch
from common import interleaved, report

import polybit
from polybit import backends
from polybit.formats import get_format

ops = torch.ops.polybit
Call = Callable[[], Any]


@dataclass
class Case:
    """One op on one shape, and what bitsandbytes calls the same (None: it has no such op on the CPU)."""

    op: str
    case: str
    ours: Call
    peer: Call | None = None
    product: bool = False


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def blockwise(w: torch.Tensor, block: int) -> Iterator[Case]:
    code = peer.create_dynamic_map()
    q, absmax = ops.quantize_blockwise(w, code, block)
    name = f"{list(w.shape)} {dtype_name(w.dtype)} block={block}"
    yield Case(
        "quantize_blockwise",
        name,
        lambda: ops.quantize_blockwise(w, code, block),
        lambda: peer.quantize_blockwise(w, code=code, blocksize=block),
    )
    _, state = peer.quantize_blockwise(w, code=code, blocksize=block)
    yield Case(
        "dequantize_blockwise",
        name,
        lambda: ops.dequantize_blockwise(q, absmax, code, block, w.dtype),
        lambda: peer.dequantize_blockwise(q, state),
    )


def kbit(w: torch.Tensor, name: str, block: int) -> Iterator[Case]:
    f = get_format(name)
    n, k = w.shape
    four = name in ("nf4", "fp4")
    case = f"{name} {[n, k]} {dtype_name(w.dtype)} block={block}"

    def quantize(search: int) -> Any:
        return ops.quantize_kbit(w, f.code, f.thresholds, f.order, block, f.bits, search)

    q, absmax = quantize(0)
    their_q, state = peer.quantize_4bit(w, blocksize=block, quant_type=name) if four else (None, None)
    yield Case(
        "quantize_kbit",
        case,
        lambda: quantize(0),
        (lambda: peer.quantize_4bit(w, blocksize=block, quant_type=name)) if four else None,
    )
    yield Case("quantize_kbit", f"{case} search", lambda: quantize(1))
    yield Case(
        "dequantize_kbit",
        case,
        lambda: ops.dequantize_kbit(q, absmax, f.code, None, None, None, block, f.bits, 0, 0, w.dtype, [n, k]),
        (lambda: peer.dequantize_4bit(their_q, state)) if four else None,
    )
    for m in (1, 8, 128):
        x = torch.randn(m, k, dtype=w.dtype)
        yield Case(
            "matmul_kbit",
            f"{case} M={m}",
            lambda x=x: ops.matmul_kbit(x, q, absmax, f.code, None, None, None, None, None, n, block, f.bits, 0, 0),
            (lambda x=x: torch.nn.functional.linear(x, peer.dequantize_4bit(their_q, state))) if four else None,
            product=True,
        )


def absmax(count: int) -> Iterator[Case]:
    code = peer.create_dynamic_map()
    scales = torch.rand(count) + 2
    q, nested, offset = ops.quantize_absmax(scales, code)
    _, state = peer.quantize_blockwise(scales - scales.mean(), code=code, blocksize=256)
    yield Case(
        "quantize_absmax",
        f"[{count}]",
        lambda: ops.quantize_absmax(scales, code),
        lambda: peer.quantize_blockwise(scales - scales.mean(), code=code, blocksize=256),
    )
    yield Case(
        "dequantize_absmax",
        f"[{count}]",
        lambda: ops.dequantize_absmax(q, nested, code, offset, 0, 0, 0),
        lambda: peer.dequantize_blockwise(q, state) + offset,
    )


def int8(w: torch.Tensor) -> Iterator[Case]:
    n, k = w.shape
    shape = f"{[n, k]} {dtype_name(w.dtype)}"
    q, scale, _ = ops.quantize_int8(w, 0.0)
    half = w.half()
    yield Case("quantize_int8", shape, lambda: ops.quantize_int8(half, 0.0), lambda: peer.int8_vectorwise_quant(half))
    yield Case(
        "dequantize_int8",
        shape,
        lambda: ops.dequantize_int8(q, scale, torch.float32),
        lambda: peer.int8_vectorwise_dequant(q, scale),
    )
    for m in (1, 8, 128):
        x = torch.randn(m, k, dtype=w.dtype)
        a = ops.quantize_int8(x, 0.0)[0]
        yield Case(
            "matmul_int8",
            f"{shape} M={m}",
            lambda a=a: ops.matmul_int8(a, q),
            lambda a=a: peer.int8_linear_matmul(a, q),
            product=True,
        )
        yield Case(
            "linear_int8", f"{shape} M={m}", lambda x=x: ops.linear_int8(x, q, scale, None, 6.0, 0), product=True
        )


def gather(n: int, k: int) -> Iterator[Case]:
    f = get_format("nf4")
    w = torch.randn(n, k)
    q, scale = ops.quantize_kbit(w, f.code, f.thresholds, f.order, 64, 4, 0)
    q8, scale8, _ = ops.quantize_int8(w, 0.0)
    index = torch.randint(0, n, (4096,))
    name = f"4096 of {[n, k]}"
    yield Case(
        "gather_kbit",
        name,
        lambda: ops.gather_kbit(index, q, scale, f.code, None, None, None, n, k, 64, 4, 0, 0, torch.bfloat16),
    )
    yield Case("gather_int8", name, lambda: ops.gather_int8(index, q8, scale8, torch.bfloat16))


def cases(quick: bool) -> Iterator[Case]:
    side = 512 if quick else 2048
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(side, side, generator=torch.Generator().manual_seed(0)).to(dtype)
        for block in (64, 4096):
            yield from blockwise(w, block)
        for name in ("nf4", "fp4", "nf3", "nf2"):
            yield from kbit(w, name, 64)
        yield from int8(w)
    yield from absmax(side * side // 64)
    yield from gather(side * 4, 384)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, few samples")
    parser.add_argument("--only", default="", help="only ops whose name contains this")
    parser.add_argument("--backend", default="cpu", help="an allow-list as in POLYBIT_BACKEND")
    arguments = parser.parse_args()
    slower = []
    with polybit.backend(arguments.backend, fallback="error"), torch.no_grad():
        for case in cases(arguments.quick):
            if arguments.only not in case.op:
                continue
            functions = {"ours": case.ours} | ({"peer": case.peer} if case.peer else {})
            times = interleaved(functions, rounds=3, budget=0.1 if arguments.quick else 0.4)
            ratio = times["ours"] / times["peer"] if "peer" in times else None
            report(
                bench="ops",
                op=case.op,
                case=case.case,
                backend=backends.resolve(case.op).owner,
                threads=torch.get_num_threads(),
                ours_ms=times["ours"] * 1e3,
                peer_ms=times["peer"] * 1e3 if "peer" in times else None,
                ratio=ratio,
            )
            if ratio is not None and ratio > 1 and not case.product:
                slower.append(f"{case.op} {case.case}: {ratio:.2f}")
    print(f"slower than bitsandbytes, matrix products aside: {len(slower)}", *slower, sep="\n  ", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
