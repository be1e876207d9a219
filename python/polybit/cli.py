"""The command line: polybit info | check | quantize | eval."""

from __future__ import annotations

import dataclasses
import json
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import polybit
from polybit import backends, spec
from polybit.model_folder import DEFAULT_SKIP, quantize_folder

app = typer.Typer(no_args_is_help=True, add_completion=True, help="Quantize PyTorch models; see what runs where.")
console = Console()
NATIVE_COUNTS = Path(__file__).parent / "native_counts.json"


def support() -> dict[str, dict[str, str]]:
    """{backend: {op: native | inherited | reference}} of the usable backends."""
    table: dict[str, dict[str, str]] = {}
    for info in backends.list_backends():
        if info.usable:
            with polybit.backend(info.name, fallback="silent"):
                found = {op: backends.resolve(op, info.device_type) for op in spec.OPS}
            table[info.name] = {op: route.kind for op, route in found.items()}
    return table


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the support table as Markdown.")] = False,
) -> None:
    """Versions, the backends with the reason why one is not usable, and who runs each op."""
    found, table = backends.list_backends(), support()
    if as_json:
        versions = {"polybit": polybit.__version__, "torch": torch.__version__, "python": platform.python_version()}
        rows = [dataclasses.asdict(item) for item in found]
        typer.echo(json.dumps({"versions": versions, "backends": rows, "support": table}, indent=2))
        return
    if markdown:
        typer.echo("| op | " + " | ".join(table) + " |\n| --- |" + " --- |" * len(table))
        for op in spec.OPS:
            typer.echo(f"| {op} | " + " | ".join(table[name][op] for name in table) + " |")
        return
    typer.echo(f"polybit {polybit.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    for item in found:
        typer.echo(f"  {item.name}: {'usable' if item.usable else 'not usable: ' + item.reason}")
    view = Table("op", *table)
    for op in spec.OPS:
        view.add_row(op, *(table[name][op] for name in table))
    console.print(view)


@app.command()
def check(
    backend: Annotated[str | None, typer.Option(help="Only this backend, as in POLYBIT_BACKEND.")] = None,
) -> None:
    """Run the conformance samples of every op; fail if one is wrong or fewer ops are native than committed."""
    from polybit.testing import check as check_op  # samples are built only here

    wanted = json.loads(NATIVE_COUNTS.read_text(encoding="utf-8"))
    names = [item.name for item in backends.list_backends() if item.usable and backend in (None, item.name)]
    if not names:
        known = ", ".join(item.name for item in backends.list_backends())
        raise typer.BadParameter(f"no usable backend {backend!r}; known: {known}")
    bad = False
    for name in names:
        counts = {"native": 0, "inherited": 0, "reference": 0}
        samples, failures = 0, list[str]()
        for op in spec.OPS:
            result = check_op(op, name)
            counts[result.kind] += 1
            samples += result.samples
            failures += result.failures
        short = counts["native"] < wanted.get(name, 0)
        bad = bad or short or bool(failures)
        text = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        typer.echo(f"{name}: {text}; {samples} samples, {len(failures)} failures")
        if short:
            typer.echo(f"  native ops fell below the committed {wanted[name]}")
        for failure in failures[:5]:
            typer.echo(f"  {failure}")
    raise typer.Exit(1 if bad else 0)


@app.command()
def quantize(
    source: Annotated[Path, typer.Argument(help="A Hugging Face model folder (safetensors).")],
    target: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    format: Annotated[str, typer.Option(help="nf4, fp4, int8, lloyd3, ...")] = "nf4",
    block_size: Annotated[int, typer.Option(help="Elements that share one scale.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Quantize the scales, too.")] = True,
    search: Annotated[bool, typer.Option(help="Search the best scale of each block.")] = False,
    threshold: Annotated[float, typer.Option(help="int8: activations from here on keep their precision.")] = 6.0,
    skip: Annotated[list[str] | None, typer.Option(help="Patterns of modules to leave alone.")] = None,
) -> None:
    """Quantize the linear weights of a model folder, tensor by tensor; the target appears only when it is whole."""
    try:
        counts = quantize_folder(
            source,
            target,
            format,
            block_size=block_size,
            double_quant=double_quant,
            search=search,
            threshold=threshold,
            skip=tuple(skip) if skip else DEFAULT_SKIP,
        )
    except ValueError as problem:
        typer.echo(f"polybit quantize: {problem}", err=True)
        raise typer.Exit(2) from None
    before, after = counts["bytes_before"], counts["bytes_after"]
    typer.echo(
        f"{target}: {counts['quantized']} of {counts['tensors']} tensors in {format}, {before} -> {after} bytes "
        f"({after / before:.3f})"
    )


@app.command("eval")
def evaluate(
    source: Annotated[Path, typer.Argument(help="The original model folder.")],
    target: Annotated[Path, typer.Argument(help="The quantized one.")],
    sentences: Annotated[Path, typer.Option(help="A text file, one sentence a line.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Embed sentences with both models: mean and worst cosine, agreement of the 10 nearest neighbours."""
    from polybit.integrations.encoders import compare, embed, load_model

    try:
        lines = [line.strip() for line in sentences.read_text(encoding="utf-8").splitlines() if line.strip()]
        original, other = (embed(load_model(folder), folder, lines) for folder in (source, target))
        result = compare(original, other)
    except (ValueError, OSError) as problem:
        typer.echo(f"polybit eval: {problem}", err=True)
        raise typer.Exit(2) from None
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result)))
    else:
        typer.echo(
            f"mean cosine {result.cosine_mean:.5f}, worst {result.cosine_worst:.5f}, "
            f"retrieval agreement@10 {result.retrieval_at_10:.4f}"
        )


def main() -> None:
    """Entry point of the `polybit` script."""
    app()
