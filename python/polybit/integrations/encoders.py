"""Encoders of transformers: load a folder, quantized or not, embed sentences, compare embeddings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from polybit import checkpoint
from polybit.model_folder import FolderError, read_state_dict
from polybit.nn import Settings, is_quantizable, make_empty_


def load_model(folder: Path) -> nn.Module:
    """The model of a folder in eval mode; layers that the folder holds in quantized form become quantized layers.

    Raises FolderError if weights are missing or do not fit the model, ValueError if a quantized entry is damaged.
    """
    from transformers import AutoConfig, AutoModel  # an optional dependency

    tensors = read_state_dict(folder)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = raw.pop("quantization_config", None) or {}
    config = AutoConfig.for_model(**raw)
    model: nn.Module = AutoModel.from_config(config)
    quantized = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if is_quantizable(module) and checkpoint.is_quantized(tensors, f"{name}.weight"):
            weight = checkpoint.from_tensors(tensors, f"{name}.weight")
            quantized[name] = Settings.of(weight, threshold=settings.get("threshold", 6.0))
    make_empty_(model, quantized)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    unexpected = [name for name in unexpected if not name.endswith("position_ids")]
    if missing or unexpected:
        raise FolderError(f"{folder}: does not fit its model class: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return model.eval()


def embed(model: nn.Module, folder: Path, sentences: list[str], batch: int = 32) -> Tensor:
    """Mean-pooled, normalised embeddings [sentences, hidden], fp32, with the folder's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = []
    with torch.no_grad():
        for start in range(0, len(sentences), batch):
            inputs = tokenizer(sentences[start : start + batch], padding=True, truncation=True, return_tensors="pt")
            hidden = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            parts.append((hidden * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(parts).float(), dim=-1)


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
