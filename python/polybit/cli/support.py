"""polybit info and polybit check: what runs where, and whether it does what the specification says."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

import polybit
from polybit import backends, spec
from polybit.backends.discovery import answers, family
from polybit.cli import ipex
from polybit.cli.common import WRONG, Json, console, print_json, stop

# The native ops of every backend, "all" or a list: what a build must hold, and what the README shows.
NATIVE_OPS = Path(__file__).parent.parent / "native_ops.json"
# The highest rung of a backend that was seen; 4 needs a line in docs/verified.md, which a test compares.
RUNGS = Path(__file__).parent.parent / "rungs.json"
RUNG_NAMES = {
    0: "none",
    1: "compiles",
    2: "its kernels run in the emulator",
    3: "runs on a CPU implementation of its language",
    4: "verified on the device",
}


def native_ops() -> dict[str, list[str]]:
    """The native ops that each backend of this package must have; variants of a family best first."""
    rows: dict[str, str | list[str]] = json.loads(NATIVE_OPS.read_text(encoding="utf-8"))
    return {name: list(spec.OPS) if ops == "all" else list(ops) for name, ops in rows.items()}


def rung(name: str) -> int:
    """The highest rung of a backend, 0...4."""
    rungs = json.loads(RUNGS.read_text(encoding="utf-8"))
    return int(rungs.get(name, rungs.get(family(name), 0)))


def support() -> dict[str, dict[str, str]]:
    """{backend: {op: "native", "inherited from <backend>" or "reference"}} of the usable backends."""
    table: dict[str, dict[str, str]] = {}
    for info in backends.list_backends():
        if info.usable:
            with polybit.backend(info.name, fallback="silent"):
                found = {op: backends.resolve(op, info.device_type) for op in spec.OPS}
            table[info.name] = {
                op: f"inherited from {route.owner}" if route.kind == "inherited" else route.kind
                for op, route in found.items()
            }
    return table


def count(kinds: dict[str, str]) -> dict[str, int]:
    """Numbers of native, inherited and reference ops."""
    counts = Counter(kind.partition(" ")[0] for kind in kinds.values())
    return {kind: counts[kind] for kind in ("native", "inherited", "reference")}


def build_table() -> dict[str, dict[str, str]]:
    """As `support`, of all backends of this package, whether they are built and usable here or not."""
    rows = native_ops()
    names = list(rows)
    table: dict[str, dict[str, str]] = {}
    for i, name in enumerate(names):
        variants = [other for other in names[i:] if family(other) == family(name)]
        owners = {op: next((other for other in variants if op in rows[other]), "") for op in spec.OPS}
        kinds = {"": "reference", name: "native"}
        table[name] = {op: kinds.get(owner, f"inherited from {owner}") for op, owner in owners.items()}
    return table


def markdown() -> str:
    """The table of the README: who runs each op, and the highest rung at which that was seen."""
    table = build_table()

    def cell(name: str, kind: str) -> str:
        if kind == "native":
            return f"native, {rung(name)}"
        owner = kind.removeprefix("inherited from ")
        return f"{owner.partition(':')[2]}, {rung(owner)}" if owner != kind else "torch"

    lines = ["| " + " | ".join(["op", *table]) + " |", "| " + " | ".join(["---"] * (len(table) + 1)) + " |"]
    lines += [
        "| " + " | ".join([op, *(cell(name, kinds[op]) for name, kinds in table.items())]) + " |" for op in spec.OPS
    ]
    return "\n".join(lines)


def info(
    as_json: Json = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the support table of the README.")] = False,
) -> None:
    """Versions, the backends with the reason why one is not usable, and who runs each op."""
    if as_markdown:
        typer.echo(markdown())
        return
    found, table = backends.list_backends(), support()
    versions = {"polybit": polybit.__version__, "torch": torch.__version__, "python": platform.python_version()}
    extension = ipex.ipex()
    if as_json:
        rows = [dataclasses.asdict(item) | {"rung": rung(item.name)} for item in found]
        about = extension and dataclasses.asdict(extension)
        print_json({"versions": versions, "ipex": about, "backends": rows, "support": table})
        return
    out = console()
    out.print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if extension:
        warning = "" if extension.matches_torch else "warning: "
        out.print(f"{warning}{ipex.NAME} {extension.version} {extension.note}", soft_wrap=True)
    view = Table("backend", "device", "native", "inherited", "reference", "rung", box=None)
    for item in found:
        if item.usable:
            numbers = [str(number) for number in count(table[item.name]).values()]
            view.add_row(item.name, item.device_type, *numbers, f"{rung(item.name)}: {RUNG_NAMES[rung(item.name)]}")
    out.print(view)
    for item in found:
        if not item.usable:
            out.print(f"{item.name}: not usable: {item.reason}")
    for name, kinds in table.items():
        for kind in sorted(set(kinds.values()) - {"native"}):
            ops = [op for op in kinds if kinds[op] == kind]
            rest = [op for op in kinds if kinds[op] != kind]
            text = ", ".join(ops) if len(ops) <= len(rest) else "all but " + (", ".join(rest) or "none")
            out.print(f"{name}: {kind}: {text}")


def check(
    backend: Annotated[str | None, typer.Option(help="Only this backend, or the variants of this family.")] = None,
    as_json: Json = False,
) -> None:
    """Run the conformance samples of every op; fail if one is wrong or fewer ops are native than committed."""
    from polybit.testing import check as check_op  # samples are built only here

    wanted = native_ops()
    if backend is not None:
        try:
            with polybit.backend(backend, fallback="silent"):
                pass
        except backends.BackendError as problem:
            stop("check", problem)
    found = [item for item in backends.list_backends() if item.usable]
    report: dict[str, Any] = {}
    for item in found:
        name = item.name
        if backend is not None and not answers(name, backend):
            continue
        results = [check_op(op, name, item.device_type) for op in spec.OPS]
        counts = Counter(result.kind for result in results)
        row: dict[str, Any] = {
            "native": counts["native"],
            "inherited": counts["inherited"],
            "reference": counts["reference"],
            "samples": sum(result.samples for result in results),
            "failures": [failure for result in results for failure in result.failures],
            "native_expected": len(wanted.get(name, ())),
        }
        report[name] = row
        if as_json:
            continue
        failures = row["failures"]
        typer.echo(
            f"{name}: {row['native']} native, {row['inherited']} inherited, {row['reference']} reference; "
            f"{row['samples']} samples, {len(failures)} failures"
        )
        if row["native"] < row["native_expected"]:
            typer.echo(f"  native ops fell below the committed {row['native_expected']}")
        for failure in failures[:5]:
            typer.echo(f"  {failure}")
    if as_json:
        print_json(report)
    if any(row["failures"] or row["native"] < row["native_expected"] for row in report.values()):
        raise typer.Exit(WRONG)
