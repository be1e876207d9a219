"""polybit eval."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from polybit.cli.common import Json, input_errors, print_json


def evaluate(
    source: Annotated[Path, typer.Argument(help="The original model folder.")],
    target: Annotated[Path, typer.Argument(help="The quantized one.")],
    sentences: Annotated[Path, typer.Option(help="A text file, one sentence a line.")],
    as_json: Json = False,
) -> None:
    """Embed sentences with both models: mean and worst cosine, agreement of the 10 nearest neighbours."""
    from polybit.integrations.encoders import compare, embed, load_model

    with input_errors("eval"):
        lines = [line.strip() for line in sentences.read_text(encoding="utf-8").splitlines() if line.strip()]
        original, other = (embed(load_model(folder), folder, lines) for folder in (source, target))
        result = compare(original, other)
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    typer.echo(
        f"mean cosine {result.cosine_mean:.5f}, worst {result.cosine_worst:.5f}, "
        f"retrieval agreement@10 {result.retrieval_at_10:.4f}"
    )
