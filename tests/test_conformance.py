"""Every op on every usable backend against the specification."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator

import pytest
import torch

import polybit
from polybit import autograd, spec
from polybit.backends import list_backends, resolve
from polybit.spec import Sample
from polybit.testing import check, compare

BACKENDS = [info.name for info in list_backends() if info.usable and info.device_type == "cpu"]
# Variants whose table is whole; the others hold what they do better and inherit the rest.
WHOLE = ("cpu:scalar", "cpu:avx2", "cpu:avx512", "cpu:neon")
# The layout of a packed weight is a variant's own affair; to have none is allowed.
OPTIONAL = ("pack_size_kbit", "pack_kbit", "unpack_kbit")


def turns() -> Iterator[tuple[str, str]]:
    """Every op of every backend; what a matrix instruction's emulator inherits has its turn with the width."""
    for backend in BACKENDS:
        with polybit.backend(backend):
            for op in spec.OPS:
                if not (backend.startswith("emulator:") and resolve(op).kind == "inherited"):
                    yield backend, op


@pytest.mark.parametrize(("backend", "op"), list(turns()))
def test_samples(backend: str, op: str) -> None:
    result = check(op, backend)

    if backend in WHOLE and op not in OPTIONAL:
        assert result.kind == "native"
    assert result.samples > 0 and result.unsupported == 0
    result.raise_failures()


# The schedule in which a GPU's threads come is its own affair. tests/test_sanitizers.py runs other pairs.
SCHEDULES = [
    pytest.param(width, order, marks=() if (width, order) == (64, "shuffled:3") else pytest.mark.slow)
    for width in (16, 32, 64)
    for order in ("descending", "shuffled:3")
]


@pytest.mark.parametrize("op", spec.OPS)
@pytest.mark.parametrize(("width", "order"), SCHEDULES)
def test_other_schedules(op: str, width: int, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYBIT_EMULATOR_ORDER", order)
    result = check(op, f"emulator:{width}")
    assert result.samples > 0 and result.unsupported == 0
    result.raise_failures()


def test_there_is_a_scalar_backend() -> None:
    assert "cpu:scalar" in BACKENDS


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch 2.15's own opcheck
@pytest.mark.parametrize("op", spec.OPS)
def test_opcheck(op: str) -> None:
    """torch's own checks, on a few samples: schema, derivatives, fake kernel, tracing with dynamic shapes."""
    # Its comparison takes a NaN for a difference.
    odd = ("nan", "inf", "special")
    samples = [sample for sample in spec.OPS[op].samples("cpu") if not any(word in sample.id for word in odd)]
    overload = getattr(torch.ops.polybit, op).default
    differentiable = op in autograd.RULES
    for sample in samples[:: max(1, len(samples) // 3)]:
        first, *rest = sample.args
        args = (first.clone().requires_grad_(), *rest) if differentiable else sample.args
        results = torch.library.opcheck(overload, args)
        assert set(results) == {
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
            "test_aot_dispatch_dynamic",
        }
        assert set(results.values()) == {"SUCCESS"}


@functools.cache
def some_answers(op: str) -> list[tuple[Sample, tuple[torch.Tensor, ...]]]:
    """A few samples with what the reference gives."""
    return [(sample, spec.OPS[op].reference(*sample.args)) for sample in list(spec.OPS[op].samples("cpu"))[::7]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads(backend: str) -> None:
    """Several Python threads at once, each with its own backend forced, get the answers of one."""
    answers = {op: some_answers(op) for op in ("quantize_kbit", "matmul_kbit", "linear_int8", "gather_kbit")}
    failures: list[str] = []

    def work(op: str) -> None:
        try:
            with polybit.backend(backend, fallback="error"):
                if resolve(op).kind == "reference":
                    return
                for sample, want in answers[op]:
                    try:
                        out = getattr(torch.ops.polybit, op)(*sample.args)
                    except polybit.BackendError:
                        assert backend.startswith("emulator")
                        continue
                    outs = (out,) if isinstance(out, torch.Tensor) else out
                    problem = compare(outs, want, sample, False)
                    if problem:
                        failures.append(f"{op} {sample.id}: {problem}")
        except Exception as error:
            failures.append(f"{op}: {error!r}")

    threads = [threading.Thread(target=work, args=(op,)) for op in (*answers, *answers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("op", ["gather_kbit", "gather_int8"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [-1, 1 << 40, 10])
def test_index_out_of_range(op: str, backend: str, bad: int) -> None:
    sample = next(iter(spec.OPS[op].samples("cpu")))
    index = torch.tensor([0, bad, 1])
    with polybit.backend(backend, fallback="error"), pytest.raises(IndexError, match=op):
        getattr(torch.ops.polybit, op)(index, *sample.args[1:])


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name.startswith("cpu:")])
def test_results_do_not_depend_on_the_number_of_threads(backend: str) -> None:
    x = torch.randn(37, 1024, generator=torch.Generator().manual_seed(1))
    w = torch.randn(301, 1024, generator=torch.Generator().manual_seed(2))
    code, thresholds, order = spec.codebooks.nf4()
    before = torch.get_num_threads()
    results = []
    try:
        with polybit.backend(backend, fallback="error"):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                q, absmax = torch.ops.polybit.quantize_kbit(w, code, thresholds, order, 64, 4, 1)
                y = torch.ops.polybit.matmul_kbit(x, q, absmax, code, None, None, None, None, None, 301, 64, 4, 0, 0)
                dx = torch.ops.polybit.matmul_kbit_transposed(y, q, absmax, code, None, None, None, 1024, 64, 4, 0, 0)
                (norm,) = torch.ops.polybit.sum_squares_multi([w])
                results.append((q, absmax, y, dx, norm))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)
