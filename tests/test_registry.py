"""Selection: environment, context manager, fallback policy, and who ran."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from tools import cpu_variants, run_python

import polybit
from polybit import backends
from polybit.backends import BackendError, last_backend, list_backends, resolve
from polybit.ops import ROWS

CODE = torch.linspace(-1, 1, 256)
VARIANTS = cpu_variants()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """POLYBIT_* as the test sets them; forgotten afterwards."""
    monkeypatch.delenv("POLYBIT_BACKEND", raising=False)
    monkeypatch.delenv("POLYBIT_FALLBACK", raising=False)
    backends.reset()
    yield monkeypatch
    monkeypatch.undo()
    backends.reset()


def quantize() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(300, generator=torch.Generator().manual_seed(0))
    q, absmax = torch.ops.polybit.quantize_blockwise(x, CODE, 64)
    return q, absmax


def test_scalar_is_always_there() -> None:
    assert "cpu:scalar" in VARIANTS
    assert VARIANTS[-1] == "cpu:scalar", "the best comes first"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("how", ["context", "environment"])
def test_the_forced_variant_ran(variant: str, how: str, environment: pytest.MonkeyPatch) -> None:
    chosen = resolve_owner(variant)
    if how == "context":
        with polybit.backend(variant, fallback="error"):
            q, _ = quantize()
    else:
        environment.setenv("POLYBIT_BACKEND", variant)
        environment.setenv("POLYBIT_FALLBACK", "error")
        backends.reset()
        q, _ = quantize()
    assert last_backend() == chosen
    with polybit.backend("cpu:scalar"):
        assert torch.equal(q, quantize()[0])
        assert last_backend() == "cpu:scalar"


def resolve_owner(variant: str) -> str:
    with polybit.backend(variant, fallback="error"):
        return resolve("quantize_blockwise").owner


def test_family_name_means_its_best(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("POLYBIT_BACKEND", "cpu")
    backends.reset()
    best = {op: resolve(op).owner for op in ROWS}
    environment.delenv("POLYBIT_BACKEND")
    backends.reset()
    assert best == {op: resolve(op).owner for op in ROWS}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resolution_names_the_owner(variant: str) -> None:
    """Native in the forced variant, or inherited from one that comes later: never from a better one."""
    later = VARIANTS[VARIANTS.index(variant) :]
    with polybit.backend(variant):
        for op in ROWS:
            found = resolve(op)
            assert found.owner in later, f"{op}: {found}"
            assert found.kind == ("native" if found.owner == variant else "inherited")


def test_an_overlay_inherits(environment: pytest.MonkeyPatch) -> None:
    overlays = [name for name in VARIANTS if name.startswith("cpu:avx512_")]
    if not overlays:
        pytest.skip("needs a processor with AVX512-VBMI, AVX512-VNNI or AVX512-BF16")
    for name in overlays:
        with polybit.backend(name, fallback="error"):
            kinds = {op: resolve(op).kind for op in ROWS}
            assert "native" in kinds.values(), f"{name} does nothing better than its base"
            assert kinds["quantize_blockwise"] == "inherited"
            quantize()
            assert last_backend() == "cpu:avx512"


@pytest.mark.parametrize("name", ["nonsense", "cpu:mmx", "cpu,nonsense"])
def test_unknown_name_raises_and_lists_what_exists(name: str, environment: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError) as by_context, polybit.backend(name):
        pass
    environment.setenv("POLYBIT_BACKEND", name)
    backends.reset()
    with pytest.raises(BackendError) as by_environment:
        quantize()
    for problem in (by_context, by_environment):
        text = str(problem.value)
        assert name.split(",")[-1] in text and "unknown" in text
        for info in list_backends():
            assert info.name in text
            assert info.usable or info.reason in text


def test_unusable_variants_say_why() -> None:
    for info in list_backends():
        assert info.usable != bool(info.reason), info
        if not info.usable and info.name.startswith("cpu:"):
            with pytest.raises(BackendError, match="not usable"), polybit.backend(info.name):
                pass


def test_empty_name_is_refused() -> None:
    with pytest.raises(BackendError, match="at least one"), polybit.backend(" , "):
        pass


def test_the_context_ends(environment: pytest.MonkeyPatch) -> None:
    before = resolve("quantize_blockwise")
    with pytest.raises(ZeroDivisionError), polybit.backend("cpu:scalar"):
        assert resolve("quantize_blockwise").owner == "cpu:scalar"
        with polybit.backend(VARIANTS[0]):
            assert resolve("quantize_blockwise") == before
        assert resolve("quantize_blockwise").owner == "cpu:scalar"
        raise ZeroDivisionError
    assert resolve("quantize_blockwise") == before


def test_bad_policy_raises(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("POLYBIT_FALLBACK", "perhaps")
    backends.reset()
    with pytest.raises(BackendError, match=r"warn, error, silent.*perhaps"):
        quantize()


FALLBACK = """
import warnings, torch, polybit
from polybit.backends import last_backend
from polybit.backends.discovery import catalogue
from polybit.backends.native import NativeBackend
code = torch.linspace(-1, 1, 256)
q = torch.arange(256, dtype=torch.uint8)
absmax = torch.ones(4)
def op(dtype=torch.float32):
    return torch.ops.polybit.dequantize_blockwise(q, absmax, code, 64, dtype)
catalogue.add([NativeBackend("mine", "cpu", "", "a test", {})])  # it implements nothing
"""


def test_error_policy_forbids_the_reference() -> None:
    code = FALLBACK + "try:\n    op()\nexcept polybit.BackendError as problem:\n    print(problem)\n"
    done = run_python(code, POLYBIT_BACKEND="mine", POLYBIT_FALLBACK="error")
    assert "dequantize_blockwise" in done.stdout
    assert "mine" in done.stdout and "POLYBIT_FALLBACK=error" in done.stdout


def test_warn_policy_warns_once_and_silent_never() -> None:
    code = FALLBACK + (
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    y = [op(), op(), op(torch.float16)]\n"
        "assert torch.equal(y[0], code[q.long()]), y\n"
        "assert last_backend() == 'reference'\n"
        "print(len(seen), *[w.message for w in seen])\n"
    )
    warned = run_python(code, POLYBIT_BACKEND="mine").stdout
    assert warned.startswith("1 ") and "dequantize_blockwise" in warned and "mine" in warned
    assert run_python(code, POLYBIT_BACKEND="mine", POLYBIT_FALLBACK="silent").stdout.startswith("0")


def test_import_is_quiet() -> None:
    done = run_python("import polybit", PYTHONWARNINGS="error")
    assert done.stdout == "" and done.stderr == ""


def test_import_leaves_the_compiler_alone() -> None:
    """torch._dynamo takes as long to import as torch itself."""
    done = run_python("import sys, torch, polybit; print('torch._dynamo' in sys.modules)")
    assert done.stdout == "False\n"


def test_no_warning_where_a_kernel_runs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with polybit.backend("cpu"):
            quantize()
