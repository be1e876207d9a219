"""Hugging Face model folders: their files, their configuration, and what a tensor in them is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors
import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# A file of weights does not say which of its matrices are looked up by row: the names do.
EMBEDDINGS = ("*embed*", "*wte", "*wpe", "shared", "*.shared", "*relative_attention_bias")
# Models whose linear layers are the Conv1D of GPT-2: their weights are stored [in, out].
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
CONV1D_LAYERS = ("c_attn", "q_attn", "c_proj", "c_fc")


@dataclass(frozen=True)
class Stack:
    """Experts that a model holds as one parameter [experts, rows, columns].

    name: of the parameter in the model; key: in a checkpoint that has it whole; parts: what this checkpoint has, for
    each expert its keys, or the one of the whole; dim: where the parts of an expert [rows, columns] are joined, None if
    the model makes something else of them. transposed: it is [experts, in, out].
    """

    name: str
    key: str
    parts: tuple[tuple[str, ...], ...]
    dim: int | None
    transposed: bool

    @property
    def keys(self) -> list[str]:
        """All keys that it is made of."""
        return [key for keys in self.parts for key in keys]

    @property
    def is_whole(self) -> bool:
        """Whether the checkpoint has it as it is."""
        return self.keys == [self.key]


@dataclass(frozen=True)
class Layout:
    """What a model makes of a checkpoint: names by key, keys of what is no linear layer or embedding, and stacks.

    Without content nothing is known but the names of a file.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    others: frozenset[str] = frozenset()
    stacks: tuple[Stack, ...] = ()


class FolderError(ValueError):
    """The folder is no model folder, is damaged, or cannot be written."""


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises FolderError if it is missing or damaged."""
    path = folder / "config.json"
    if folder.is_file():
        raise FolderError(f"{folder}: is a file, the folder of a model is wanted")
    if not folder.exists():
        raise FolderError(
            f"{folder}: no such folder; a model of the Hub has to be downloaded first, polybit fetches none"
        )
    if not path.is_file():
        raise FolderError(f"{folder}: no model folder (config.json is missing)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise FolderError(f"{path}: damaged: {problem}") from None
    if not isinstance(config, dict):
        raise FolderError(f"{path}: damaged: it holds no JSON object")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, one or the shards of its index.

    Raises FolderError if the folder has no config.json, no weights, or lacks a shard.
    """
    read_config(folder)
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as problem:
            raise FolderError(f"{folder / INDEX}: damaged index: {problem!r}") from None
        if wrong := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
            raise FolderError(f"{folder / INDEX}: damaged index: {wrong[0]!r} is no name of a file")
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        others = any(folder.glob("*.bin")) or any(folder.glob("*.pth"))
        hint = (
            ": save it as safetensors first, with from_pretrained and save_pretrained of transformers" if others else ""
        )
        raise FolderError(f"{folder}: neither {SINGLE} nor {INDEX}{hint}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FolderError(f"{folder}: shard {missing[0]} is missing")
    return [folder / name for name in names]


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a safetensors file, one at a time. Raises FolderError if the file is truncated or damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  a safe_open is no mapping
                yield name, file.get_tensor(name)
    except safetensors.SafetensorError as problem:
        raise FolderError(f"{path}: damaged or truncated: {problem}") from None


def read_state_dict(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder."""
    return {name: tensor for path in weight_files(folder) for name, tensor in read_tensors(path)}


def is_embedding(module: str) -> bool:
    """Whether the module of that name is a table that is looked up by row."""
    return any(fnmatchcase(module.lower(), pattern) for pattern in EMBEDDINGS)


def conv1d_layers(config: dict[str, Any]) -> tuple[str, ...]:
    """The last components of the names of the modules whose weights are stored [in, out]."""
    return CONV1D_LAYERS if any(kind in CONV1D_MODELS for kind in _model_types(config)) else ()


def _model_types(config: dict[str, Any]) -> Iterator[object]:
    """The model type, and those of the models that it is put together from."""
    yield config.get("model_type")
    for value in config.values():
        if isinstance(value, dict):
            yield from _model_types(value)
