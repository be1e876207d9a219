"""Hugging Face model folders: quantize one, tensor by tensor and atomically; read one back."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file

from polybit import checkpoint
from polybit.formats import get_format
from polybit.qtensor import check_block_size, quantize

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DEFAULT_SKIP = ("*embed*", "*norm*", "lm_head*", "*.lm_head*")


class FolderError(ValueError):
    """The folder is no model folder, is damaged, or cannot be written."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, one or the shards of its index.

    Raises FolderError if the folder has no config.json, no weights, or lacks a shard.
    """
    if not (folder / "config.json").is_file():
        raise FolderError(f"{folder}: no model folder (config.json is missing)")
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as problem:
            raise FolderError(f"{folder / INDEX}: damaged index: {problem!r}") from None
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        raise FolderError(f"{folder}: neither {SINGLE} nor {INDEX}")
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


def is_linear_weight(name: str, tensor: torch.Tensor, skip: tuple[str, ...]) -> bool:
    """Whether a tensor is taken for the weight of a linear layer: a 2-D float `*.weight` that `skip` does not name."""
    module = name.removesuffix(".weight")
    return (
        name.endswith(".weight")
        and tensor.dim() == 2
        and tensor.is_floating_point()
        and not any(fnmatchcase(module.lower(), pattern.lower()) for pattern in skip)
    )


def quantize_folder(
    source: Path,
    target: Path,
    format: str,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    search: bool = False,
    threshold: float = 6.0,
    skip: tuple[str, ...] = DEFAULT_SKIP,
) -> dict[str, int]:
    """Write `source` to the new folder `target` with its linear weights quantized.

    The folder is written beside the target and renamed when it is complete: `target` is never seen half written.
    Returns {"bytes_before", "bytes_after", "quantized", "tensors"} (bytes and counts of tensors).

    Raises ValueError for an unknown format or block size, FolderError for a wrong source or an unusable target.
    """
    if get_format(format).kind == "blockwise":
        raise ValueError(f"{format} has no linear layer; choose a k-bit format or int8")
    check_block_size(block_size)
    files = weight_files(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FolderError(f"{target}: exists and is not an empty folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as problem:
        raise FolderError(f"{target}: cannot be written: {problem.strerror}") from None
    counts = {"bytes_before": 0, "bytes_after": 0, "quantized": 0, "tensors": 0}
    try:
        index: dict[str, str] = {}
        for path in files:
            out: dict[str, torch.Tensor] = {}
            for name, tensor in read_tensors(path):
                counts["tensors"] += 1
                counts["bytes_before"] += tensor.nbytes
                if not is_linear_weight(name, tensor, skip):
                    out[name] = tensor
                    continue
                counts["quantized"] += 1
                quantized = quantize(tensor, format, block_size=block_size, double_quant=double_quant, search=search)
                out |= checkpoint.to_tensors(quantized, name)
            if not out:
                raise FolderError(f"{path}: holds no tensors")
            index |= dict.fromkeys(out, path.name)
            counts["bytes_after"] += sum(tensor.nbytes for tensor in out.values())
            save_file(
                {name: tensor.contiguous() for name, tensor in out.items()}, scratch / path.name, {"format": "pt"}
            )
        settings = {"format": format, "block_size": block_size, "double_quant": double_quant, "threshold": threshold}
        _write_rest(source, scratch, files, index, counts["bytes_after"], settings)
        scratch.chmod(0o755)
        os.replace(scratch, target)
    except OSError as problem:
        raise FolderError(f"{target}: cannot be written: {problem.strerror or problem}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return counts


def _write_rest(
    source: Path, scratch: Path, files: list[Path], index: dict[str, str], total: int, settings: dict[str, Any]
) -> None:
    written = {path.name for path in files} | {INDEX, "config.json"}
    for item in source.iterdir():
        if item.name in written or item.suffix in (".bin", ".safetensors", ".h5", ".onnx"):
            continue
        if item.is_dir():
            shutil.copytree(item, scratch / item.name)
        else:
            shutil.copyfile(item, scratch / item.name)
    if (source / INDEX).is_file():
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2, sort_keys=True)
        (scratch / INDEX).write_text(text, encoding="utf-8")
    try:
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = {"quant_method": "polybit"} | settings
    except (ValueError, TypeError) as problem:
        raise FolderError(f"{source / 'config.json'}: damaged: {problem}") from None
    (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
