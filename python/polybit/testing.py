"""Conformance: hold a backend, in the tree or out of it, to the specification.

::

    import polybit
    from polybit.testing import check

    polybit.load_backend("libpolybit_mine.so")
    for op in polybit.spec.OPS:
        check(op, "mine").raise_failures()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from polybit.backends import Unsupported, last_backend, resolve, selection
from polybit.ops import ROWS
from polybit.spec import OPS, Op, Sample

GUARD_BYTES = 64
GUARD = 0xA5
# These store NaN as 0x7fc00000; elsewhere a NaN is a NaN.
EXACT_NAN = ("quantize_blockwise", "quantize_kbit", "quantize_int8")
# Their bytes are the backend's own: what counts is the way back.
LAYOUT = ("pack_size_kbit", "pack_kbit", "unpack_kbit")
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class CheckResult:
    """What `check` found. `kind` is native, inherited or reference; a reference op runs no samples.

    `unsupported` counts the samples that the kernel declined before any work, which is its right; `failures` has a line
    for each sample that it got wrong.
    """

    op: str
    backend: str
    owner: str
    kind: str
    samples: int = 0
    unsupported: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every sample agreed."""
        return not self.failures

    def raise_failures(self) -> None:
        """AssertionError with the first failures, if there are any."""
        if self.failures:
            shown = "\n".join(self.failures[:5])
            raise AssertionError(f"{len(self.failures)} failures in {self.samples} samples\n{shown}")


def check(op: str, backend: str, device: torch.device | str = "cpu", *, limit: int | None = None) -> CheckResult:
    """Run every sample of `op` (or the first `limit`) on `backend` and compare with the reference.

    Each sample is called twice: natively, its outputs between guard bytes and at odd addresses; and through
    torch.ops.polybit, in turn with unaligned, non-contiguous or gradient-requiring inputs. It is also asserted that
    the backend (or the one of its family that it inherits from) is the one that ran.

    Raises:
        BackendError: the backend is unknown or not usable here.
        ValueError: there is no op of that name.
    """
    selection.check_op(op)
    spec = OPS[op]
    with selection.backend(backend, fallback="error"):
        resolution = resolve(op, torch.device(device).type)
        result = CheckResult(op, backend, resolution.owner, resolution.kind)
        if resolution.kind == "reference":
            return result
        for number, sample in enumerate(islice(spec.samples(device), limit)):
            result.samples += 1
            try:
                problem = _check_sample(spec, sample, number, resolution.owner)
            except Unsupported:
                result.unsupported += 1
                continue
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            if problem:
                # Samples are seeded by their place, so that the id says all that is needed to make it again.
                result.failures.append(
                    f"{op} on {backend} ({resolution.owner}), sample {number} {sample.id}: {problem}"
                )
    return result


def _check_sample(op: Op, sample: Sample, number: int, owner: str) -> str:
    if op.name in LAYOUT:
        return _check_layout(op.name, sample, owner)
    want = _want(op, sample)
    strict = op.name in EXACT_NAN
    problem = _guarded(op, sample, want, strict)
    if problem:
        return problem
    way, change = WAYS[number % len(WAYS)]
    args = _each(sample.args, _unaligned if _mutates(op) else change)
    got = _public(op.name, args, owner) or _mutated(op, args)
    problem = compare(got, want, sample, strict)
    if problem:
        return f"{way} inputs: {problem}"
    return _check_packed(sample, got[0], owner) if op.name == "matmul_kbit" else ""


_wants: dict[tuple[str, str, str], tuple[Tensor, ...]] = {}


def _want(op: Op, sample: Sample) -> tuple[Tensor, ...]:
    """What the reference gives, once for all backends."""
    key = (op.name, sample.id, str(_device(sample.args)))
    if key not in _wants:
        args = _each(sample.args, Tensor.clone)
        _wants[key] = op.reference(*args) or _mutated(op, args)
    return _wants[key]


def _public(op: str, args: Sequence[Any], owner: str) -> tuple[Tensor, ...]:
    """The outputs by way of torch.ops.polybit; asserts who ran."""
    out = getattr(torch.ops.polybit, op)(*args)
    if last_backend() != owner:
        raise AssertionError(f"{owner} was to run {op}, but {last_backend()} ran")
    if out is None:
        return ()
    return (out,) if isinstance(out, Tensor) else tuple(out)


def _check_layout(op: str, sample: Sample, owner: str) -> str:
    """unpack(pack(q)) must be q again; guard bytes are the matter of the other ops' outputs."""
    q, n, k, block, bits = sample.args[:5]
    size = int(_public("pack_size_kbit", (q, n, k, block, bits), owner)[0])
    if op == "pack_size_kbit":
        return "" if size >= 0 else f"size {size}"
    if size == 0:
        return ""
    packed = torch.ops.polybit.pack_kbit(q, n, k, block, bits, size)
    if packed.numel() != size:
        return f"pack_kbit gave {packed.numel()} bytes, wanted {size}"
    return compare((torch.ops.polybit.unpack_kbit(packed, n, k, block, bits),), (q.reshape(-1),), sample, False)


def _check_packed(sample: Sample, plain: Tensor, owner: str) -> str:
    """The product with the packed operand is, up to the tolerance, the one without."""
    x, q = sample.args[:2]
    n, block, bits = sample.args[9:12]
    if resolve("pack_kbit", q.device.type).kind == "reference":
        return ""
    size = int(torch.ops.polybit.pack_size_kbit(q, n, x.shape[-1], block, bits))
    if size == 0:
        return ""
    packed = torch.ops.polybit.pack_kbit(q, n, x.shape[-1], block, bits, size)
    args = (*sample.args[:8], packed, *sample.args[9:])
    problem = compare(_public("matmul_kbit", args, owner), (plain,), sample, False)
    return f"with packed: {problem}" if problem else ""


def _guarded(op: Op, sample: Sample, want: tuple[Tensor, ...], strict: bool) -> str:
    """Call the kernel itself with outputs that lie between guard bytes, one element off any alignment."""
    buffers: list[tuple[Tensor, int, int]] = []

    def guard(x: Tensor) -> Tensor:
        size = x.numel() * x.element_size()
        before = GUARD_BYTES + x.element_size()
        buffer = torch.full((before + size + GUARD_BYTES,), GUARD, dtype=torch.uint8, device=x.device)
        buffers.append((buffer, before, size))
        return buffer[before : before + size].view(x.dtype).view(x.shape)

    args = sample.args
    if _mutates(op):
        args = tuple([guard(x).copy_(x) for x in a] if isinstance(a, list) else a for a in args)
    outs = tuple(guard(out) for out in op.alloc(*args))
    device = _device(args)
    kernel = selection.current().route(op.name, device.type).kernel
    assert kernel is not None
    kernel(_stream(device), args, outs)
    for i, (buffer, before, size) in enumerate(buffers):
        outside = torch.cat([buffer[:before], buffer[before + size :]])
        if bool((outside != GUARD).any()):
            return f"output {i}: bytes outside it were written"
    problem = compare(outs or _mutated(op, args), want, sample, strict)
    return f"guarded outputs: {problem}" if problem else ""


def _stream(device: torch.device) -> int:
    if device.type == "cpu":
        return 0
    from polybit import ops

    return ops._stream(device)


def compare(got: Sequence[Tensor], want: Sequence[Tensor], sample: Sample, strict: bool) -> str:
    """The first difference in words; empty if there is none. `strict` compares the bits of NaN, too."""
    if len(got) != len(want):
        return f"{len(got)} outputs, wanted {len(want)}"
    for i, (g, w) in enumerate(zip(got, want)):
        if g.shape != w.shape or g.dtype != w.dtype:
            return f"output {i}: {g.dtype} {list(g.shape)}, wanted {w.dtype} {list(w.shape)}"
        g, w = g.detach().contiguous(), w.detach().contiguous()
        wrong = _differ(g, w, sample, strict).view(-1)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            values = f"{g.view(-1)[at].item()!r}, wanted {w.view(-1)[at].item()!r}"
            return f"output {i}: {int(wrong.sum())} of {wrong.numel()} differ, first at {at}: {values}"
    return ""


def _differ(g: Tensor, w: Tensor, sample: Sample, strict: bool) -> Tensor:
    if not w.dtype.is_floating_point:
        return g != w
    if sample.rtol is None:
        as_integer = _INTEGER[w.element_size()]
        differ = g.view(as_integer) != w.view(as_integer)
        return differ if strict else differ & ~(g.isnan() & w.isnan())
    return ~torch.isclose(g.double(), w.double(), rtol=sample.rtol, atol=sample.atol, equal_nan=True)


def _mutates(op: Op) -> bool:
    return any(kind in ("MUT", "MUTS") for kind, _ in ROWS[op.name].inputs)


def _mutated(op: Op, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """The tensors that the op changes, in the order of its arguments."""
    changed = (arg for (kind, _), arg in zip(ROWS[op.name].inputs, args) if kind in ("MUT", "MUTS"))
    return tuple(x for arg in changed for x in (arg if isinstance(arg, (list, tuple)) else [arg]))


def _device(args: Sequence[Any]) -> torch.device:
    """The device of the first tensor."""
    tensors = (x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else [arg]))
    return next(x.device for x in tensors if isinstance(x, Tensor))


def _each(args: Sequence[Any], change: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """The arguments with every tensor changed."""

    def one(arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return change(arg)
        if isinstance(arg, list) and arg and isinstance(arg[0], Tensor):
            return [change(x) for x in arg]
        return arg

    return tuple(one(arg) for arg in args)


def _unaligned(x: Tensor) -> Tensor:
    buffer = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return buffer[1:].view(x.shape).copy_(x)


def _strided(x: Tensor) -> Tensor:
    if x.dim() == 0:
        return _unaligned(x)
    buffer = torch.empty((*x.shape[:-1], 2 * x.shape[-1]), dtype=x.dtype, device=x.device)
    return buffer[..., ::2].copy_(x)


def _with_grad(x: Tensor) -> Tensor:
    return x.clone().requires_grad_() if x.dtype.is_floating_point else x


WAYS: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("unaligned", _unaligned),
    ("non-contiguous", _strided),
    ("gradient-requiring", _with_grad),
)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative squared error |got - want|^2 / |want|^2."""
    got, want = got.double(), want.double()
    total = float((want * want).sum())
    return float(((got - want) ** 2).sum()) / total if total else math.nan
