"""polybit bench: a quick look at the speed of the main ops on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.table import Table
from torch import Tensor

import polybit
from polybit import backends, functional, spec
from polybit.cli.common import Json, console, input_errors, print_json, stop
from polybit.formats import get_format

Call = Callable[[], object]
SIZE = 2048
BLOCK = 64


@dataclass(frozen=True)
class Case:
    """One call of an op, and what it stands beside: the same product or lookup on dense weights, or the reference."""

    op: str
    case: str
    run: Call
    beside: str
    other: Call


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds, and who ran the op. speedup: other_ms / ms."""

    op: str
    case: str
    backend: str
    ms: float
    beside: str
    other_ms: float
    speedup: float


def cases(device: str) -> Iterator[Case]:
    """The main ops on a weight of 2048 x 2048, fp32."""
    ops = torch.ops.polybit
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    def beside_reference(op: str, case: str, *args: Any) -> Case:
        run, reference = partial(getattr(ops, op), *args), partial(spec.OPS[op].reference, *args)
        return Case(op, case, run, "torch reference", reference)

    weight = randn(SIZE, SIZE)
    code, thresholds, order = get_format("nf4").on(device)
    dynamic = get_format("dynamic8").on(device).code
    shape = f"[{SIZE}, {SIZE}]"
    q, absmax = ops.quantize_kbit(weight, code, thresholds, order, BLOCK, 4, 0)
    nf4 = (q, absmax, code, None, None, None)
    yield beside_reference("quantize_kbit", f"nf4 {shape}", weight, code, thresholds, order, BLOCK, 4, 0)
    yield beside_reference("dequantize_kbit", f"nf4 {shape}", *nf4, BLOCK, 4, 0, 0, torch.float32, [SIZE, SIZE])
    q8, absmax8 = ops.quantize_blockwise(weight, dynamic, BLOCK)
    yield beside_reference("quantize_blockwise", f"dynamic8 {shape}", weight, dynamic, BLOCK)
    yield beside_reference("dequantize_blockwise", f"dynamic8 {shape}", q8, absmax8, dynamic, BLOCK, torch.float32)
    yield beside_reference("quantize_absmax", f"[{absmax.numel()}]", absmax, dynamic)
    yield beside_reference("quantize_int8", shape, weight, 0.0)
    rows, scale, _ = ops.quantize_int8(weight, 0.0)
    yield beside_reference("dequantize_int8", shape, rows, scale, torch.float32)
    index = torch.randint(0, SIZE, (1024,), generator=generator).to(device)
    yield Case(
        "gather_kbit",
        f"1024 of {shape}",
        partial(ops.gather_kbit, index, *nf4, SIZE, SIZE, BLOCK, 4, 0, 0, torch.float32),
        "dense embedding",
        partial(F.embedding, index, weight),
    )
    kbit = polybit.quantize(weight, "nf4", block_size=BLOCK, double_quant=False)
    int8 = polybit.quantize(weight, "int8")
    for m in (1, 16, 128):
        x = randn(m, SIZE)
        yield Case(
            "matmul_kbit",
            f"nf4 {shape} M={m}",
            partial(functional.linear, x, kbit),
            "dense linear",
            partial(F.linear, x, weight),
        )
        yield Case(
            "linear_int8",
            f"{shape} M={m}",
            partial(functional.linear_int8, x, int8),
            "dense linear",
            partial(F.linear, x, weight),
        )


def medians(first: Call, second: Call, seconds: float) -> tuple[float, float]:
    """Median milliseconds of two calls, taken by turns for about `seconds` in all, at least three times each."""
    times: tuple[list[float], list[float]] = ([], [])
    for call in (first, second):
        call()
    end = time.perf_counter() + seconds
    while len(times[0]) < 3 or time.perf_counter() < end:
        for call, taken in zip((first, second), times):
            start = time.perf_counter()
            call()
            _wait()
            taken.append(time.perf_counter() - start)
    return statistics.median(times[0]) * 1e3, statistics.median(times[1]) * 1e3


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def bench(
    op: Annotated[str | None, typer.Option(help="Only this op.")] = None,
    backend: Annotated[str | None, typer.Option(help="Only this backend, as in POLYBIT_BACKEND.")] = None,
    seconds: Annotated[float, typer.Option(help="Time per case.")] = 0.5,
    as_json: Json = False,
) -> None:
    """Median times of the main ops beside torch on dense weights, or beside the torch reference of the op."""
    usable = {info.name: info for info in backends.list_backends() if info.usable}
    name = backend or next(iter(usable), None)
    if name not in usable:
        stop("bench", f"no usable backend {backend!r}; usable: {', '.join(usable)}")
    assert name is not None
    timings = []
    with input_errors("bench"), polybit.backend(name, fallback="silent"):
        for case in cases(usable[name].device_type):
            if op in (None, case.op):
                ms, other = medians(case.run, case.other, seconds)
                case.run()
                ran = backends.last_backend() or "reference"
                timings.append(Timing(case.op, case.case, ran, ms, case.beside, other, other / ms))
    if not timings:
        known = ", ".join(dict.fromkeys(case.op for case in cases("cpu")))
        stop("bench", f"op must be one of {known}, got {op!r}")
    machine = {"backend": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if as_json:
        print_json(machine | {"timings": [asdict(timing) for timing in timings]})
        return
    view = Table("op", "case", "ran on", "ms", "beside", "ms", "speedup", box=None)
    for timing in timings:
        numbers = f"{timing.ms:.3f}", timing.beside, f"{timing.other_ms:.3f}", f"{timing.speedup:.2f}"
        view.add_row(timing.op, timing.case, timing.backend, *numbers)
    out = console()
    out.print(", ".join(f"{key} {value}" for key, value in machine.items()), highlight=False)
    out.print(view)
