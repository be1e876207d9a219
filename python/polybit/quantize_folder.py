"""Quantize a model folder: tensor by tensor, into a folder that appears when it is whole."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from torch import Tensor

from polybit import checkpoint
from polybit.devices import usable_device
from polybit.model_folder import INDEX, FolderError, conv1d_layers, is_embedding, read_config, weight_files
from polybit.nn import Settings
from polybit.nn.convert import Override, matches, read_override
from polybit.qtensor import KERNEL_DTYPES
from polybit.safetensors_file import DTYPES, Entry, Reader, Writer
from polybit.work_folder import TakenError, work_folder

DEFAULT_SKIP = ("lm_head",)
# Weights in other forms, and what version control and download tools keep.
_LEFT_BEHIND = shutil.ignore_patterns(
    ".*", "*.bin", "*.bin.index.json", "*.safetensors", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.pth"
)


@dataclass
class Summary:
    """What quantize_folder did: bytes of all tensors, numbers of tensors."""

    bytes_before: int = 0
    bytes_after: int = 0
    quantized: int = 0
    tensors: int = 0


def quantize_folder(
    source: Path,
    target: Path,
    format: str = "nf4",
    *,
    block_size: int = 64,
    double_quant: bool = True,
    search: bool = False,
    threshold: float = 6.0,
    compute_dtype: torch.dtype | str | None = None,
    activations: str | None = None,
    skip: tuple[str, ...] = DEFAULT_SKIP,
    overrides: Mapping[str, Override] = {},
    embeddings: bool = False,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Write `source` to the new folder `target` with its linear weights quantized.

    A weight is taken for linear if it is a matrix called `*.weight` and no embedding by its name; `embeddings` takes
    those, too. `skip`: patterns (fnmatch) of modules to leave alone, matched with the full name and with its last
    component. `overrides`: {pattern: settings} as in nn.quantize_: the first that matches wins, also over `skip` and
    `embeddings`. `compute_dtype` and `activations` are recorded for the layers. Weights of GPT-2's Conv1D (by
    config.json) are stored transposed, one row per output. `device`: where to quantize. `progress(done, total)` is told
    bytes of `source`. Memory: about twice the largest tensor.

    The folder is written beside the target and renamed when it is complete and on disk. A run that was killed leaves a
    hidden folder behind, which the next run on this target removes.

    Raises ValueError for an unknown format, a wrong option, a device that is not there or an override that matches
    nothing, FolderError for a wrong source, one without anything to quantize, or an unusable target.
    """
    device = usable_device(device)
    base = Settings(format, block_size, double_quant, search, threshold, compute_dtype, activations)
    rules = _Rules(base, skip, overrides, embeddings)
    config, files = read_config(source), weight_files(source)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        hint = ", or open it as it is: from_pretrained(folder, quantization_config=PolybitConfig())"
        raise FolderError(
            f"{source}: is quantized already (quant_method {method}): quantize the model that it was made from"
            f"{hint if method == 'bitsandbytes' else ''}"
        )
    rules.check(source, files)
    transposed = conv1d_layers(config)
    total = sum(path.stat().st_size for path in files)
    summary = Summary()
    try:
        with work_folder(target) as work:
            index: dict[str, str] = {}
            for path in files:
                names = _quantize_file(
                    path, work / path.name, rules, transposed, device, summary, lambda done: progress(done, total)
                )
                index |= dict.fromkeys(names, path.name)
            _copy_rest(source, work, files)
            if (source / INDEX).is_file():
                text = {"metadata": {"total_size": summary.bytes_after}, "weight_map": index}
                _write_json(work / INDEX, text)
            recorded = {"quant_method": "polybit", **asdict(base), "embeddings": embeddings}
            # By default a head that shares its weight with an embedding follows that, here and in nn.quantize_.
            recorded["skip"] = None if tuple(skip) == DEFAULT_SKIP else list(skip)
            recorded["overrides"] = {pattern: asdict(s) if s else None for pattern, s in rules.overrides.items()}
            # Last: without it nothing takes the folder for a model.
            _write_json(work / "config.json", config | {"quantization_config": recorded})
    except TakenError as problem:
        raise FolderError(f"{target}: {problem}") from None
    except OSError as problem:
        full = problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "; what was written has been removed" if full else ""
        raise FolderError(f"{target}: cannot be written: {problem.strerror or problem}{hint}") from None
    return summary


class _Rules:
    """Which settings a tensor is quantized with; the same as those of nn.quantize_ for the module it belongs to."""

    def __init__(
        self, base: Settings, skip: tuple[str, ...], overrides: Mapping[str, Override], embeddings: bool
    ) -> None:
        self.base, self.skip, self.embeddings = base, skip, embeddings
        self.overrides = {
            pattern: read_override(f"override of {pattern!r}", value, base) for pattern, value in overrides.items()
        }

    def find(self, name: str, entry: Entry) -> Settings | None:
        """The settings for a tensor; None: it is copied as it is."""
        module = name.removesuffix(".weight")
        if module == name or len(entry.shape) != 2 or not entry.dtype.startswith(("F", "BF")):
            return None
        settings: Settings | Literal[False] = self.base
        if any(matches(module, pattern) for pattern in self.skip) or (is_embedding(module) and not self.embeddings):
            settings = False
        settings = next((value for pattern, value in self.overrides.items() if matches(module, pattern)), settings)
        if settings and DTYPES.get(entry.dtype) not in KERNEL_DTYPES:
            raise FolderError(f"{name} is {entry.dtype}; only F32, F16 and BF16 can be quantized (or skip {module})")
        return settings or None

    def check(self, source: Path, files: list[Path]) -> None:
        """Raise if nothing is to be quantized, an override matches nothing or a file is damaged; nothing is written."""
        chosen, unused = False, set(self.overrides)
        for path in files:
            with _open(path) as reader:
                for name, entry in reader.entries.items():
                    chosen |= self.find(name, entry) is not None
                    module = name.removesuffix(".weight")
                    if module != name and len(entry.shape) == 2:
                        unused -= {pattern for pattern in unused if matches(module, pattern)}
        if unused:
            raise ValueError(f"override of {min(unused)!r} matches no linear layer and no embedding of {source}")
        if not chosen:
            raise FolderError(f"{source}: nothing to quantize: it has no linear weights, or all of them are skipped")


def _open(path: Path) -> Reader:
    try:
        reader = Reader(path)
    except (safetensors.SafetensorError, OSError) as problem:
        raise FolderError(f"{path}: damaged or truncated: {problem}") from None
    if not reader.entries:
        raise FolderError(f"{path}: holds no tensors")
    return reader


def _quantize_file(
    path: Path,
    out: Path,
    rules: _Rules,
    transposed: tuple[str, ...],
    device: torch.device | str,
    summary: Summary,
    progress: Callable[[int], None],
) -> list[str]:
    """Write one file of weights; return the names in it."""

    def result(name: str, settings: Settings, weight: Tensor) -> dict[str, Tensor]:
        if name.split(".")[-2] in transposed:
            weight = weight.t().contiguous()
        return checkpoint.to_tensors(settings.quantize(weight), name)

    with _open(path) as reader:
        chosen = {name: rules.find(name, entry) for name, entry in reader.entries.items()}
        plan: dict[str, Entry] = {}
        for name, entry in reader.entries.items():
            settings = chosen[name]
            if settings is None:
                plan[name] = entry
                continue
            meta = torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")
            plan |= {key: Entry.of(tensor) for key, tensor in result(name, settings, meta).items()}
        # The JSON of a k-bit weight holds a number (nested_offset), so that its size is known only in the end.
        tail = [name for name in plan if ".quant_state." in name]
        metadata = reader.metadata | {"format": "pt"}
        with Writer(out, plan, tail=tail, metadata=metadata) as writer:
            for name, entry in reader.entries.items():
                settings = chosen[name]
                summary.tensors += 1
                summary.bytes_before += entry.size
                if settings is None:
                    writer.write_bytes(name, reader.chunks(name))
                else:
                    summary.quantized += 1
                    for key, tensor in result(name, settings, reader.read(name).to(device)).items():
                        writer.write(key, tensor)
                progress(summary.bytes_before)
        summary.bytes_after += writer.size
    return list(plan)


def _copy_rest(source: Path, work: Path, files: list[Path]) -> None:
    """Everything of the folder that is neither weights nor config.json: tokenizer, other settings."""
    done = {path.name for path in files} | {INDEX, "config.json"}
    entries = [item.name for item in source.iterdir()]
    for name in sorted(set(entries) - done - _LEFT_BEHIND(str(source), entries)):
        if (source / name).is_dir():
            shutil.copytree(source / name, work / name, ignore=_LEFT_BEHIND)
        else:
            shutil.copyfile(source / name, work / name)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
