"""polybit quantize."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from polybit.cli.common import Json, input_errors, print_json
from polybit.nn.convert import Override
from polybit.quantize_folder import DEFAULT_SKIP, quantize_folder

_SKIP_HELP = (
    "Pattern of modules to leave alone, by full name or last component; repeatable. "
    f"Default: {', '.join(DEFAULT_SKIP)}."
)
_OVERRIDE_HELP = (
    "PATTERN=FORMAT[,block_size=N][,double_quant=BOOL][,search=BOOL][,threshold=X][,compute_dtype=D]"
    "[,activations=int8] for the modules that the pattern matches, or PATTERN=none to leave them alone; repeatable, "
    "the first match wins, also over --skip."
)


def quantize(
    source: Annotated[Path, typer.Argument(help="A Hugging Face model folder (safetensors).")],
    target: Annotated[Path, typer.Argument(help="The folder to write; must not exist.")],
    format: Annotated[str, typer.Option(help="nf4, fp4, int8, lloyd3, ...")] = "nf4",
    block_size: Annotated[int, typer.Option(help="Elements that share one scale.")] = 64,
    double_quant: Annotated[bool, typer.Option(help="Quantize the scales, too.")] = True,
    search: Annotated[bool, typer.Option(help="Search the best scale of each block.")] = False,
    threshold: Annotated[float, typer.Option(help="int8: activations from here on keep their precision.")] = 6.0,
    compute_dtype: Annotated[
        str | None, typer.Option(help="What layers compute in: float32, float16, bfloat16.")
    ] = None,
    activations: Annotated[str | None, typer.Option(help="int8: k-bit layers quantize their input, too.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help=_SKIP_HELP)] = None,
    override: Annotated[list[str] | None, typer.Option(help=_OVERRIDE_HELP)] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Quantize embedding tables, too.")] = False,
    device: Annotated[str, typer.Option(help="Where to quantize: cpu, cuda, xpu, mps.")] = "cpu",
    as_json: Json = False,
) -> None:
    """Quantize the linear weights of a model folder, tensor by tensor; the target appears only when it is whole.

    A run that was killed can simply be started again.
    """
    with input_errors("quantize"), _progress() as progress:
        overrides: dict[str, Override] = {}
        for text in override or []:
            pattern, fields = parse_override(text)
            overrides.setdefault(pattern, fields)
        summary = quantize_folder(
            source,
            target,
            format,
            block_size=block_size,
            double_quant=double_quant,
            search=search,
            threshold=threshold,
            compute_dtype=compute_dtype,
            activations=activations,
            skip=tuple(skip) if skip else DEFAULT_SKIP,
            overrides=overrides,
            embeddings=embeddings,
            device=device,
            progress=progress,
        )
    before, after = summary.bytes_before, summary.bytes_after
    if as_json:
        print_json({"target": str(target), "format": format, **dataclasses.asdict(summary), "ratio": after / before})
        return
    typer.echo(
        f"{target}: {summary.quantized} of {summary.tensors} tensors in {format}, {before} -> {after} bytes "
        f"({after / before:.3f})"
    )


def parse_override(text: str) -> tuple[str, Override]:
    """("*.down_proj", {"format": "int8", "block_size": 128}) of "*.down_proj=int8,block_size=128"."""
    pattern, equals, rest = text.partition("=")
    format, *options = rest.split(",")
    if not (pattern and equals and format) or "=" in format:
        raise ValueError(f"override must be PATTERN=FORMAT[,block_size=N...], got {text!r}")
    if format == "none" and not options:
        return pattern, None
    fields: dict[str, Any] = {"format": format}
    for option in options:
        key, _, value = option.partition("=")
        if key not in _OPTIONS:
            raise ValueError(f"override: option must be one of {', '.join(_OPTIONS)}, got {option!r}")
        try:
            fields[key] = _OPTIONS[key](value)
        except ValueError as problem:
            raise ValueError(f"override: {key}: {problem}") from None
    return pattern, fields


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"must be true or false, got {text!r}")
    return text == "true"


_OPTIONS: dict[str, Callable[[str], Any]] = {
    "block_size": int, "double_quant": _truth, "search": _truth, "threshold": float,
    "compute_dtype": str, "activations": str,
}  # fmt: skip


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, if that is a terminal."""
    columns = TextColumn("quantizing"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("quantize", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
