"""Encoders of transformers: load a folder, quantized or not, embed sentences, compare embeddings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from polybit import checkpoint
from polybit.model_folder import FolderError, read_state_dict
from polybit.nn import Linear4bit, Linear8bit, LinearKbit
from polybit.qtensor import QTensor


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
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and checkpoint.is_quantized(tensors, f"{name}.weight"):
            quantized = checkpoint.from_tensors(tensors, f"{name}.weight")
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _empty_like(module, quantized, settings.get("threshold", 6.0)))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    unexpected = [name for name in unexpected if not name.endswith("position_ids")]
    if missing or unexpected:
        raise FolderError(f"{folder}: does not fit its model class: missing {missing[:3]}, unexpected {unexpected[:3]}")
    return model.eval()


def _empty_like(linear: nn.Linear, weight: QTensor, threshold: float) -> nn.Module:
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    if weight.format.kind == "int8":
        return Linear8bit(*sizes, threshold=threshold, dtype=weight.dtype)
    layer = Linear4bit if weight.format.bits == 4 else LinearKbit
    return layer(
        *sizes,
        format=weight.format,
        block_size=weight.block_size,
        double_quant=weight.double_quant,
        dtype=weight.dtype,
    )


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
