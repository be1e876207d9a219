"""polybit eval."""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from polybit.cli.common import Json, input_errors, print_json, stop
from polybit.devices import usable_device
from polybit.model_folder import read_config


def evaluate(
    source: Annotated[Path, typer.Argument(help="The original model folder.")],
    target: Annotated[Path, typer.Argument(help="The quantized one.")],
    text: Annotated[Path, typer.Option(help="A text file; for an encoder one sentence a line.")],
    window: Annotated[int | None, typer.Option(help="Decoder: tokens seen at once. Default: 2048 or less.")] = None,
    stride: Annotated[int | None, typer.Option(help="Decoder: tokens that a window moves by. Default: half.")] = None,
    device: Annotated[str, typer.Option(help="Where to run the models.")] = "cpu",
    plot: Annotated[Path | None, typer.Option(help="A picture to write, as .png or .svg. Needs matplotlib.")] = None,
    as_json: Json = False,
) -> None:
    """Hold a quantized model against its original.

    Encoders (and encoder-decoders, both sides of which read the line) embed the lines of the text: mean and worst
    cosine, agreement of the 10 nearest neighbours. Decoders (causal language models) predict it: perplexity of both,
    and their ratio. Needs transformers.
    """
    if find_spec("transformers") is None:
        stop("eval", "needs transformers: pip install 'polybit[eval]'")
    if plot is not None and find_spec("matplotlib") is None:
        stop("eval", "--plot needs matplotlib: pip install matplotlib")
    from polybit.integrations.models import is_causal

    with input_errors("eval"):
        content = _read(text)
        _check_pair(source, target)
        usable_device(device)
        if plot is not None:
            _check_plot(plot)
        if is_causal(read_config(source)):
            result, line = _decoder(source, target, content, window, stride, device, plot)
        elif window is None and stride is None:
            result, line = _encoder(source, target, content, device, plot)
        else:
            raise ValueError(f"window and stride are for decoders, and {source} is an encoder")
    if as_json:
        print_json(result)
    else:
        typer.echo(line)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise ValueError(f"{path}: no text in UTF-8: {problem.reason} at byte {problem.start}") from None


def _check_pair(source: Path, target: Path) -> None:
    kinds = [read_config(folder).get("model_type") for folder in (source, target)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{target} was not made from {source}: their model types are {kinds[1]} and {kinds[0]}")


def _check_plot(path: Path) -> None:
    """Before the models have run."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:] not in known:
        raise ValueError(f"--plot {path}: its name must end in one of .{', .'.join(known)}")
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path}: {path.parent} is no folder")


def _encoder(source: Path, target: Path, text: str, device: str, plot: Path | None) -> tuple[dict[str, Any], str]:
    from polybit.integrations.evaluate import compare, embed, plot_encoder
    from polybit.integrations.models import load_model

    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) < 2:
        raise ValueError(f"the text must have at least 2 lines, got {len(lines)}")
    original, other = (embed(load_model(folder).to(device), folder, lines) for folder in (source, target))
    result = compare(original, other)
    if plot is not None:
        plot_encoder(plot, original, other)
    line = (
        f"mean cosine {result.cosine_mean:.5f}, worst {result.cosine_worst:.5f}, "
        f"retrieval agreement@10 {result.retrieval_at_10:.4f}"
    )
    return {"kind": "encoder", "sentences": len(lines), **asdict(result)}, line


def _decoder(
    source: Path, target: Path, text: str, window: int | None, stride: int | None, device: str, plot: Path | None
) -> tuple[dict[str, Any], str]:
    from polybit.integrations.evaluate import perplexity, plot_decoder, tokenize
    from polybit.integrations.models import load_model

    tokens = tokenize(source, text)
    original, other = (
        perplexity(load_model(folder).to(device), tokens, window=window, stride=stride) for folder in (source, target)
    )
    if plot is not None:
        plot_decoder(plot, original, other)
    ratio = other.perplexity / original.perplexity
    result = {
        "kind": "decoder",
        "tokens": original.tokens,
        "perplexity_original": original.perplexity,
        "perplexity": other.perplexity,
        "ratio": ratio,
    }
    line = f"perplexity {original.perplexity:.4f} -> {other.perplexity:.4f} ({ratio:.4f}) on {original.tokens} tokens"
    return result, line
