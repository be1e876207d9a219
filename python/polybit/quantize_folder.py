"""Quantize a model folder: tensor by tensor, into a folder that appears when it is whole."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from torch import Tensor

from polybit import checkpoint
from polybit.devices import usable_device
from polybit.model_folder import (
    INDEX,
    FolderError,
    Layout,
    Stack,
    conv1d_layers,
    is_embedding,
    read_config,
    weight_files,
)
from polybit.nn import Settings
from polybit.nn.convert import Override, matches, read_override
from polybit.nn.experts import fits_experts, quantize_stack
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

    Of a folder with experts, transformers says which weights are those of linear layers, what the model calls them, and
    which experts it merges into stacks: these are written as such, as PolybitConfig would have them quantized. Patterns
    match the names of the model there, of a stack that of the parameter or of its module. Memory: a stack as it is
    stored, and an expert.

    The folder is written beside the target and renamed when it is complete and on disk. A run that was killed leaves a
    hidden folder behind, which the next run on this target removes.

    Raises ValueError for an unknown format, a wrong option, a device that is not there or an override that matches
    nothing, FolderError for a wrong source, one without anything to quantize or with experts where transformers is not
    installed, or an unusable target.
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
    total = sum(path.stat().st_size for path in files)
    summary = Summary()
    try:
        with ExitStack() as opened:
            readers = {path: opened.enter_context(_open(path)) for path in files}
            entries = {name: entry for reader in readers.values() for name, entry in reader.entries.items()}
            rules.layout = _layout(source, config, entries)
            rules.check(source, entries)
            folder = _Folder(readers, rules, conv1d_layers(config), device)
            if not folder.stacks and not any(folder.chosen.values()):
                raise FolderError(
                    f"{source}: nothing to quantize: it has no linear weights, or all of them are skipped"
                )
            work = opened.enter_context(work_folder(target))
            index: dict[str, str] = {}
            for path in files:
                names = folder.write(path, work / path.name, summary, lambda done: progress(done, total))
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


def _layout(source: Path, config: dict[str, Any], names: Mapping[str, Entry]) -> Layout:
    """What the model makes of the files; only a model with experts is looked at."""
    if not any(".experts." in name for name in names):
        return Layout()
    if find_spec("transformers") is None:
        raise FolderError(
            f"{source}: has experts, and transformers knows what its model makes of them: pip install 'polybit[eval]'"
        )
    from polybit.integrations.experts import read_layout

    try:
        return read_layout(config, names)
    except ValueError as problem:
        raise FolderError(f"{source}: {problem}") from None


class _Rules:
    """Which settings a tensor is quantized with; the same as those of nn.quantize_ for the module it belongs to."""

    def __init__(
        self, base: Settings, skip: tuple[str, ...], overrides: Mapping[str, Override], embeddings: bool
    ) -> None:
        self.base, self.skip, self.embeddings = base, skip, embeddings
        self.overrides = {
            pattern: read_override(f"override of {pattern!r}", value, base) for pattern, value in overrides.items()
        }
        self.layout = Layout()

    def module(self, name: str, entry: Entry) -> str | None:
        """The linear layer or embedding whose weight this tensor is."""
        module, _, last = self.layout.names.get(name, name).rpartition(".")
        is_weight = last == "weight" and len(entry.shape) == 2 and name not in self.layout.others
        return module if module and is_weight else None

    def find(self, name: str, entry: Entry) -> Settings | None:
        """The settings for a tensor; None: it is copied as it is."""
        module = self.module(name, entry)
        if module is None or not entry.dtype.startswith(("F", "BF")):
            return None
        return self._choose((module,), name, entry, is_embedding(module) and not self.embeddings)

    def find_stack(self, stack: Stack, entry: Entry) -> Settings | None:
        """The settings for a stack of experts, of which `entry` is a part."""
        settings = self._choose((stack.name, stack.name.rpartition(".")[0]), stack.name, entry, False)
        if settings and stack.dim is None:
            raise FolderError(
                f"{stack.name} is made of {stack.keys[0]} in a way that is not known here: skip it, or quantize by "
                "from_pretrained(quantization_config=PolybitConfig()) and save_pretrained"
            )
        if settings and settings.format == "int8" and stack.transposed:
            raise FolderError(
                f"{stack.name} is stored [experts, in, out], and int8 has a scale for each output: skip it, or give it "
                "a k-bit format"
            )
        return settings

    def _choose(self, modules: tuple[str, ...], name: str, entry: Entry, kept: bool) -> Settings | None:
        def fits(pattern: str) -> bool:
            return any(matches(module, pattern) for module in modules)

        settings: Settings | Literal[False] = self.base
        if kept or any(fits(pattern) for pattern in self.skip):
            settings = False
        settings = next((value for pattern, value in self.overrides.items() if fits(pattern)), settings)
        if settings and DTYPES.get(entry.dtype) not in KERNEL_DTYPES:
            raise FolderError(
                f"{name} is {entry.dtype}; only F32, F16 and BF16 can be quantized (or skip {modules[0]})"
            )
        return settings or None

    def check(self, source: Path, entries: Mapping[str, Entry]) -> None:
        """Raise if an override matches nothing, before anything is written."""
        parts = {key for stack in self.layout.stacks for key in stack.keys}
        names = [name for stack in self.layout.stacks for name in (stack.name, stack.name.rpartition(".")[0])]
        names += [m for name, e in entries.items() if name not in parts and (m := self.module(name, e)) is not None]
        for pattern in self.overrides:
            if not any(matches(name, pattern) for name in names):
                raise ValueError(f"override of {pattern!r} matches no linear layer and no embedding of {source}")


def _open(path: Path) -> Reader:
    try:
        reader = Reader(path)
    except (safetensors.SafetensorError, OSError) as problem:
        raise FolderError(f"{path}: damaged or truncated: {problem}") from None
    if not reader.entries:
        raise FolderError(f"{path}: holds no tensors")
    return reader


class _Folder:
    """The tensors of a folder, in whichever file, and what becomes of them."""

    def __init__(
        self,
        readers: Mapping[Path, Reader],
        rules: _Rules,
        transposed: tuple[str, ...],
        device: torch.device | str,
    ) -> None:
        self.readers, self.transposed, self.device = readers, transposed, device
        self.reader_of = {name: reader for reader in readers.values() for name in reader.entries}
        self.stacks: dict[str, tuple[Stack, Settings]] = {}  # by the last of its parts, with which it is written
        self.merged: set[str] = set()
        order = {name: place for place, name in enumerate(self.reader_of)}
        for stack in rules.layout.stacks:
            settings = rules.find_stack(stack, self._entry(stack.keys[0]))
            if settings:
                self.stacks[max(stack.keys, key=order.__getitem__)] = stack, settings
                self.merged.update(stack.keys)
        parts = {key for stack in rules.layout.stacks for key in stack.keys}
        self.chosen = {
            name: rules.find(name, self._entry(name)) if name not in parts else None for name in self.reader_of
        }

    def _entry(self, name: str) -> Entry:
        return self.reader_of[name].entries[name]

    def _read(self, name: str) -> Tensor:
        return self.reader_of[name].read(name).to(self.device)

    def _meta(self, name: str) -> Tensor:
        entry = self._entry(name)
        return torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta")

    def _result(self, name: str, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """What is written in the place of a tensor that is quantized; nothing for a part of what comes later."""
        if name in self.stacks:
            return self._result_of_stack(*self.stacks[name], read)
        settings = self.chosen[name]
        if settings is None:
            return {}
        weight = read(name)
        if name.split(".")[-2] in self.transposed:
            weight = weight.t().contiguous()
        return checkpoint.to_tensors(settings.quantize(weight), name)

    @staticmethod
    def _result_of_stack(stack: Stack, settings: Settings, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        if stack.is_whole:
            return checkpoint.to_tensors(settings.quantize(read(stack.key)), stack.key)
        assert stack.dim is not None
        dim = stack.dim

        def experts() -> Iterator[Tensor]:
            for keys in stack.parts:
                yield torch.cat([read(key) for key in keys], dim)

        first = next(experts())
        shape = torch.Size([len(stack.parts), *first.shape])
        if first.is_meta:
            return checkpoint.to_tensors(settings.quantize(first.new_empty(shape)), stack.key)
        fits = fits_experts(shape, settings)
        weight = quantize_stack(experts(), shape, settings) if fits else settings.quantize(torch.stack([*experts()]))
        return checkpoint.to_tensors(weight, stack.key)

    def write(self, path: Path, out: Path, summary: Summary, progress: Callable[[int], None]) -> list[str]:
        """Write one file of weights; return the names in it. One whose tensors are merged elsewhere is not written."""
        reader = self.readers[path]

        def is_copied(name: str) -> bool:
            return self.chosen[name] is None and name not in self.merged

        plan: dict[str, Entry] = {}
        for name, entry in reader.entries.items():
            if is_copied(name):
                plan[name] = entry
            plan |= {key: Entry.of(tensor) for key, tensor in self._result(name, self._meta).items()}
        # The JSON of a k-bit weight holds a number (nested_offset), so that its size is known only in the end.
        tail = [name for name in plan if ".quant_state." in name]
        with ExitStack() as opened:
            writer = None
            if plan:
                metadata = reader.metadata | {"format": "pt"}
                writer = opened.enter_context(Writer(out, plan, tail=tail, metadata=metadata))
            for name, entry in reader.entries.items():
                summary.tensors += 1
                summary.bytes_before += entry.size
                summary.quantized += not is_copied(name)
                if writer is not None and is_copied(name):
                    writer.write_bytes(name, reader.chunks(name))
                for key, tensor in self._result(name, self._read).items():
                    assert writer is not None
                    writer.write(key, tensor)
                progress(summary.bytes_before)
        summary.bytes_after += writer.size if writer is not None else 0
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
