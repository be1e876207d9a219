"""QLoRA from end to end: train a small decoder, quantize it, train adapters through the 4-bit weights.

Run by `make qlora`, and by `make qlora-long` for hours on 40 MB of text. Prints the perplexity of the decoder in every
format on held-out text, and the loss of the adapters as they train with a paged 8-bit optimizer on text of another
kind; checks the merged and the reloaded model.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_llama import (
    batches,
    decoder,
    documentation,
    encode,
    licences,
    loss_of,
    perplexity,
    split,
    texts_below,
    train_tokenizer,
)
from tokenizers import Tokenizer
from torch import Tensor, nn

import polybit
from polybit.backends import last_backend
from polybit.nn import Linear4bit

FORMATS = {
    "int8 (LLM.int8())": "int8",
    "NF4 + double quantization": "nf4",
    "FP4": "fp4",
    "3 bits (lloyd3)": "lloyd3",
    "2 bits (lloyd2)": "lloyd2",
}
NOTE = """A model trained for minutes is too rough to show what NF4 costs a real one (the literature: 1 to 3 percent of
perplexity). The table shows the order of the formats, and that nothing is broken."""


class Lora(nn.Module):
    """y = layer(x) + scale * B A x, with A and B trained and the layer frozen (Hu et al., 2021)."""

    def __init__(self, layer: Linear4bit, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__()
        self.layer, self.scale = layer, alpha / rank
        device = layer.weight.device
        self.a = nn.Parameter(torch.randn(rank, layer.in_features).to(device) / layer.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.layer(x) + self.scale * (x @ self.a.t() @ self.b.t()))

    def merged(self) -> nn.Linear:
        """A dense layer that computes the same."""
        bias = self.layer.bias is not None
        linear = nn.Linear(self.layer.in_features, self.layer.out_features, bias, device=self.layer.weight.device)
        linear.weight = nn.Parameter(self.layer.weight.dequantize() + self.scale * self.b.detach() @ self.a.detach())
        if self.layer.bias is not None:
            linear.bias = self.layer.bias
        return linear


def replace(model: nn.Module, kind: type[nn.Module], make: object) -> nn.Module:
    """Put make(module) in the place of every module of a kind; return the model."""
    assert callable(make)
    for name, module in list(model.named_modules()):
        if isinstance(module, kind):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, make(module))
    return model


@dataclass(frozen=True)
class Length:
    """How long to train: a number of steps, which gives the same numbers every time, or else seconds."""

    seconds: float
    steps: int | None

    def half(self) -> Length:
        return Length(self.seconds / 2, self.steps and self.steps // 2)

    def left(self, start: float, steps: int) -> float:
        """The share that is left, after so many steps since `start`."""
        return 1 - (steps / self.steps if self.steps else (time.monotonic() - start) / self.seconds)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterator[Tensor], length: Length, what: str, bf16: bool
) -> list[float]:
    """Train with a learning rate that falls to zero, at least 20 steps; the losses."""
    model.train()
    losses: list[float] = []
    start, peak = time.monotonic(), optimizer.defaults["lr"]
    device = next(model.parameters()).device.type
    for batch in data:
        left = length.left(start, len(losses))
        if left <= 0 and len(losses) >= 20:
            break
        for group in optimizer.param_groups:
            group["lr"] = peak * max(left, 0.01)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    first, last = (sum(part) / len(part) for part in (losses[:10], losses[-10:]))
    print(f"{what}: {len(losses)} steps, loss {first:.3f} -> {last:.3f}", flush=True)
    return losses


def tokenizer_of(checkpoint: Path) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with, from its metadata."""
    with safe_open(checkpoint, "pt") as file:
        return Tokenizer.from_str(file.metadata()["tokenizer"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=4.0, help="time for the first training; the adapters get half")
    parser.add_argument("--steps", type=int, help="of the first training, instead of --minutes; the adapters get half")
    parser.add_argument("--batch", type=int, default=16, help="windows of 128 tokens in a step")
    parser.add_argument("--windows", type=int, default=200, help="of held-out text for a perplexity, at most")
    parser.add_argument("--device", default="cpu", help="a device of torch")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--text", type=Path, help="train on the .txt and .rst files below this folder as well")
    parser.add_argument("--bf16", action="store_true", help="train in bf16 autocast")
    parser.add_argument("--checkpoint", type=Path, help="the trained decoder: read if it is there, else written")
    arguments = parser.parse_args()
    length = Length(arguments.minutes * 60, arguments.steps)
    measure = partial(perplexity, most=arguments.windows)

    text, other = documentation(), licences()
    if arguments.text is not None:
        text += "\n\n" + texts_below(arguments.text)
    saved = arguments.checkpoint is not None and arguments.checkpoint.exists()
    tokenizer = tokenizer_of(arguments.checkpoint) if saved else train_tokenizer(text + other, 2048)
    train_tokens, held_out = split(encode(tokenizer, text))
    adapter_tokens, adapter_held_out = split(encode(tokenizer, other))
    print(f"{len(train_tokens):,} tokens of documentation, {len(adapter_tokens):,} of licences", flush=True)

    model = decoder(2048, arguments.hidden, arguments.layers, seed=0).to(arguments.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters in fp32", flush=True)
    if saved:
        model.load_state_dict(load_file(arguments.checkpoint))
    else:
        optimizer = polybit.optim.AdamW(model.parameters(), lr=2e-3)
        train(model, optimizer, batches(train_tokens, arguments.batch, seed=0), length, "fp32", arguments.bf16)
        if arguments.checkpoint is not None:
            save_file(model.state_dict(), arguments.checkpoint, {"tokenizer": tokenizer.to_str()})

    base = measure(model, held_out)
    table = Table("weights", "perplexity", "to fp32", title="held-out documentation")
    table.add_row("fp32", f"{base:.3f}", "1.0000")
    for label, format in FORMATS.items():
        found = measure(polybit.nn.quantize_(copy.deepcopy(model), format), held_out)
        table.add_row(label, f"{found:.3f}", f"{found / base:.4f}")
    Console(width=100).print(table)
    print(NOTE)

    model.requires_grad_(False)
    polybit.nn.quantize_(model, "nf4", double_quant=True)
    before = measure(model, adapter_held_out)
    replace(model, Linear4bit, Lora)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = polybit.optim.PagedAdamW8bit(adapters.values(), lr=2e-3, min_8bit_size=0)
    data = batches(adapter_tokens, arguments.batch, seed=0)
    losses = train(model, optimizer, data, length.half(), "LoRA over NF4, PagedAdamW8bit", bf16=False)
    after = measure(model, adapter_held_out)
    print(f"held-out licences: perplexity {before:.2f} -> {after:.2f}")
    if not (after < before and sum(losses[-10:]) < sum(losses[:10])):
        raise SystemExit("the adapters did not learn")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save_file({name: p.detach() for name, p in adapters.items()}, path)
        for p in adapters.values():
            p.data.zero_()
        untrained = measure(model, adapter_held_out)
        model.load_state_dict(load_file(path), strict=False)
    reloaded = measure(model, adapter_held_out)
    merged = measure(replace(model, Lora, Lora.merged), adapter_held_out)
    print(f"the last operation ran on {last_backend()}")
    print(f"adapters off {untrained:.2f}, reloaded {reloaded:.2f}, merged {merged:.2f}")
    if reloaded != after or abs(merged / after - 1) > 1e-3:
        raise SystemExit("the reloaded or the merged model is another one")


if __name__ == "__main__":
    main()
