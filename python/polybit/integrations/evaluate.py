"""How close a quantized model of transformers is to its original: embeddings of an encoder, perplexity of a decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polybit.model_folder import FolderError

DEFAULT_WINDOW = 2048


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder. Raises FolderError if it has none, or a damaged one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as problem:  # transformers has many
        reason = next(iter(str(problem).splitlines()), "")
        raise FolderError(f"{folder}: its tokenizer cannot be loaded (tokenizer.json, ...): {reason}") from None


def embed(model: nn.Module, folder: Path, sentences: list[str], batch: int = 32) -> Tensor:
    """Mean-pooled, normalised embeddings [sentences, hidden], fp32, on the CPU, with the folder's tokenizer.

    Both sides of an encoder-decoder read the sentence, so that all of its layers count.
    """
    tokenizer = _tokenizer(folder)
    two_sided = bool(getattr(model.config, "is_encoder_decoder", False))
    device = next(model.parameters()).device
    parts = []
    with torch.no_grad():
        for start in range(0, len(sentences), batch):
            inputs = tokenizer(sentences[start : start + batch], padding=True, truncation=True, return_tensors="pt")
            inputs = inputs.to(device)
            if two_sided:
                again = {f"decoder_{name}": inputs[name] for name in ("input_ids", "attention_mask")}
                hidden = model(**inputs, **again, output_hidden_states=True).decoder_hidden_states[-1]
            else:
                hidden = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            parts.append((hidden * mask).sum(1) / mask.sum(1))
    return F.normalize(torch.cat(parts).float(), dim=-1).cpu()


@dataclass(frozen=True)
class Agreement:
    """How close two sets of embeddings are: cosine per sentence, and the share of the 10 nearest neighbours kept."""

    cosine_mean: float
    cosine_worst: float
    retrieval_at_10: float


def compare(original: Tensor, other: Tensor, k: int = 10) -> Agreement:
    """Agreement of two [sentences, hidden] sets of normalised embeddings; every sentence is a query over the others."""
    cosine = (original * other).sum(-1)

    def neighbours(x: Tensor) -> Tensor:
        scores = x @ x.t()
        scores.fill_diagonal_(float("-inf"))
        return scores.topk(min(k, len(x) - 1)).indices

    a, b = neighbours(original), neighbours(other)
    kept = (a.unsqueeze(-1) == b.unsqueeze(-2)).any(-1).float().mean()
    return Agreement(float(cosine.mean()), float(cosine.min()), float(kept))


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood, the number of tokens that were predicted, and that of each [tokens]."""

    perplexity: float
    tokens: int
    losses: Tensor = field(compare=False, repr=False)


def tokenize(folder: Path, text: str) -> Tensor:
    """The tokens of a text, int64 [tokens], by the folder's tokenizer."""
    ids: Tensor = _tokenizer(folder)(text, return_tensors="pt", verbose=False)["input_ids"][0]
    return ids


def perplexity(model: Any, tokens: Tensor, *, window: int | None = None, stride: int | None = None) -> Perplexity:
    """Perplexity of a causal language model on `tokens` [count], in windows that move by `stride`.

    Every token but the first is predicted once, from what its window holds before it: at least window - stride tokens,
    but for the first window. `window` defaults to 2048, or what the model has positions for; `stride` to half of it.
    Raises ValueError for fewer than 2 tokens, window < 2, or a stride that is not in 1...window - 1.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or DEFAULT_WINDOW
    window = min(DEFAULT_WINDOW, positions) if window is None else window
    stride = max(window // 2, 1) if stride is None else stride
    if not 2 <= window <= positions:
        raise ValueError(f"perplexity: window must be 2...{positions} (the positions of the model), got {window}")
    if not 1 <= stride < window:
        raise ValueError(f"perplexity: stride must be 1...{window - 1}, got {stride}")
    if len(tokens) < 2:
        raise ValueError(f"perplexity: the text must have at least 2 tokens, got {len(tokens)}")
    tokens = tokens.to(next(model.parameters()).device)
    losses, done, begin = [], 1, 0
    while done < len(tokens):
        end = min(begin + window, len(tokens))
        with torch.no_grad():
            logits = model(tokens[begin:end].unsqueeze(0)).logits[0]
        predictions = logits[done - 1 - begin : end - 1 - begin].float()
        losses.append(F.cross_entropy(predictions, tokens[done:end], reduction="none").cpu())
        done = end
        begin += stride
    each = torch.cat(losses)
    return Perplexity(math.exp(float(each.double().mean())), len(each), each)


def plot_encoder(path: Path, original: Tensor, other: Tensor) -> None:
    """Write a picture (PNG, SVG, ... by the name): the cosine of every sentence, from the worst to the best."""
    cosine = (original * other).sum(-1).sort().values
    figure, axes = _picture("sentences, from the worst", "cosine to the original")
    axes.plot(range(1, len(cosine) + 1), cosine.tolist())
    figure.savefig(path)


def plot_decoder(path: Path, original: Perplexity, other: Perplexity) -> None:
    """Write a picture: the perplexity of both models over the tokens seen so far."""
    figure, axes = _picture("tokens", "perplexity so far")
    for name, result in (("original", original), ("quantized", other)):
        count = torch.arange(1, result.tokens + 1)
        axes.plot(count.tolist(), (result.losses.double().cumsum(0) / count).exp().tolist(), label=name)
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(path)


def _picture(x: str, y: str) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes
