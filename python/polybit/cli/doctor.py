"""polybit doctor: a self-test of every op on each available backend, and what is wrong with the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

import torch
import typer

from polybit import _C, backends, spec
from polybit.backends import selection
from polybit.backends.discovery import LIBRARY_FOLDER, family, is_test_vehicle
from polybit.cli.common import WRONG, Json, print_json
from polybit.cli.ipex import NAME, ipex

OLDEST_TORCH = (2, 6)
QUICK_SAMPLES = 3


@dataclass(frozen=True)
class Finding:
    """Something that is `broken` (exit code 1) or only worth a `note`, and what to do about it."""

    level: Literal["broken", "note"]
    what: str
    remedy: str


def _torch_version() -> Iterator[Finding]:
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        yield Finding("broken", f"torch {torch.__version__} is too old", f"install torch {wanted} or newer")


def _threads() -> Iterator[Finding]:
    if not _C.openmp_library():
        yield Finding(
            "note",
            "no OpenMP pool was found in this process: CPU kernels run on one thread",
            "use a torch build with OpenMP (the wheels of pytorch.org and PyPI have it)",
        )
    elif _C.thread_count() == 1 and _cores() > 1:
        yield Finding(
            "note",
            f"CPU kernels run on 1 thread, this process may use {_cores()} cores",
            "unset OMP_NUM_THREADS, or raise it or torch.set_num_threads()",
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _environment() -> Iterator[Finding]:
    """POLYBIT_BACKEND and POLYBIT_FALLBACK: unknown values, and those that make things slow without a word."""
    named, policy = os.environ.get("POLYBIT_BACKEND", ""), os.environ.get("POLYBIT_FALLBACK", "warn")
    if policy not in selection.POLICIES:
        wanted = ", ".join(selection.POLICIES)
        yield Finding("broken", f"POLYBIT_FALLBACK={policy} is unknown", f"unset it, or set it to one of {wanted}")
    names = [name for name in (part.strip() for part in named.split(",")) if name]
    infos = backends.list_backends()
    for name in names:
        known = [info for info in infos if name in (info.name, family(info.name))]
        usable = [info.name for info in infos if info.usable]
        if not known:
            yield Finding(
                "broken", f"POLYBIT_BACKEND: {name} is unknown", f"choose from {', '.join(usable)}, or unset it"
            )
        elif not any(info.usable for info in known):
            yield Finding(
                "broken",
                f"POLYBIT_BACKEND: {name} is not usable here: {known[0].reason}",
                f"choose from {', '.join(usable)}, or unset it",
            )
    if named and not names:
        yield Finding("note", "POLYBIT_BACKEND is set and names nothing: it is ignored", "unset it")
    for name in filter(is_test_vehicle, names):
        yield Finding("note", f"POLYBIT_BACKEND names {name}, a test vehicle that is very slow", "unset it")
    best = next((info.name for info in infos if info.usable and family(info.name) == "cpu"), None)
    first = next((name for name in names if family(name) == "cpu"), None)
    if first not in (None, "cpu", best) and any(info.name == first and info.usable for info in infos):
        yield Finding("note", f"POLYBIT_BACKEND forces {first}; {best} would be faster", "unset it, or name cpu")


def _libraries() -> Iterator[Finding]:
    """Sources of backends that could not be loaded, and whether any backend is left."""
    infos = backends.list_backends()
    for info in infos:
        if info.usable or info.device_type:  # a probe that says no is no defect: the machine lacks the device
            continue
        own = info.origin.startswith(str(LIBRARY_FOLDER))
        if own:
            remedy = "reinstall polybit: its libraries and its Python code are not of one build"
        elif "built for op table" in info.reason:
            remedy = "rebuild the plug-in against the headers of this polybit (polybit/include)"
        else:
            remedy = "repair or uninstall the plug-in; polybit works without it"
        yield Finding("broken", f"backend source {info.name} failed: {info.reason}", remedy)
    if not any(info.usable and info.device_type == "cpu" and family(info.name) == "cpu" for info in infos):
        yield Finding(
            "broken",
            f"no CPU backend is usable: every op runs as its slow torch reference (looked in {LIBRARY_FOLDER})",
            "reinstall polybit",
        )


def _ipex() -> Iterator[Finding]:
    found = ipex()
    if found and not found.matches_torch:
        yield Finding("note", f"{NAME} {found.version} {found.note}", "uninstall it, or install the matching torch")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (_torch_version, _libraries, _environment, _threads, _ipex)


def self_test(samples: int | None) -> Iterator[tuple[str, int, list[str]]]:
    """(backend, samples, failures) for every usable backend but test vehicles; `samples`: at most so many per op."""
    from polybit.testing import check

    for info in backends.list_backends():
        if info.usable and not is_test_vehicle(info.name):
            results = [check(op, info.name, info.device_type, limit=samples) for op in spec.OPS]
            failures = [failure for result in results for failure in result.failures]
            yield info.name, sum(result.samples for result in results), failures


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help=f"{QUICK_SAMPLES} samples per op instead of all.")] = False,
    as_json: Json = False,
) -> None:
    """Test every op on each available backend, and look for problems of the environment. 1 if something is broken."""
    findings = [finding for find in CHECKS for finding in find()]
    tests = {}
    for name, samples, failures in self_test(QUICK_SAMPLES if quick else None):
        tests[name] = {"samples": samples, "failures": failures}
        if failures:
            what = f"{name}: {len(failures)} of {samples} samples are wrong, first: {failures[0]}"
            remedy = f"set POLYBIT_BACKEND to another backend, and report this ({name} on {torch.__version__})"
            findings.append(Finding("broken", what, remedy))
        if not as_json:
            typer.echo(f"{name}: {samples} samples, {len(failures)} failures")
    broken = any(finding.level == "broken" for finding in findings)
    if as_json:
        print_json({"ok": not broken, "findings": [asdict(finding) for finding in findings], "self_test": tests})
    else:
        for finding in findings:
            typer.echo(f"{finding.level}: {finding.what}\n  {finding.remedy}")
        typer.echo("broken" if broken else "ok")
    if broken:
        raise typer.Exit(WRONG)
