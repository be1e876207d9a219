"""Quantized weights that accelerate keeps away from the device: on the CPU as they are, on a disk part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polybit import checkpoint
from polybit.nn.module import QuantizedModule
from polybit.qtensor import QTensor


def offloaded(model: nn.Module) -> dict[str, Mapping[str, Tensor]]:
    """The quantized modules whose weight comes when they run, by name: what holds it under "weight"."""
    return {name: hook.weights_map for name, module in _quantized(model) for hook in _hooks(module)}


def read_back(model: Any) -> None:
    """Make the hooks of accelerate read whole weights where transformers has written their parts to a disk."""
    for name, module in _quantized(model):
        for hook in _hooks(module):
            files, tied = hook.weights_map.dataset, model.all_tied_weights_keys
            sources = {last: tied.get(f"{name}.{last}", f"{name}.{last}") for last in module.quantized}
            if all(f"{source}.q" in files for source in sources.values()):
                readers = {
                    last: partial(_from_parts, files, source, getattr(module, last)) for last, source in sources.items()
                }
                hook.weights_map = WholeWeights(hook.weights_map, readers)


def whole_weights(weights: Mapping[str, Tensor], quantized: Mapping[str, QTensor]) -> Mapping[str, Tensor]:
    """`weights` of a hook of accelerate, with those of `quantized` (by name, on any device) put together.

    accelerate makes such a map of a state dict, in which a quantized weight has the entries of a checkpoint.
    """
    entries, prefix = getattr(weights, "dataset", weights), getattr(weights, "prefix", "")
    in_memory = getattr(entries, "state_dict", entries)  # of an OffloadedWeightsLoader, which reads the rest of a disk
    whole: dict[str, QTensor | Callable[[], QTensor]] = {}
    for name, layout in quantized.items():
        key = prefix + name
        owned = checkpoint.owned_keys(entries, key)
        if len(owned) > 1 and f"{key}.q" not in owned:  # else it is whole, or read_back knows its parts
            read = partial(_from_entries, entries, owned, key, layout.dtype, layout.search)
            whole[name] = read() if key in in_memory else read
    return WholeWeights(weights, whole) if whole else weights


class WholeWeights(Mapping[str, Tensor]):
    """What a hook asks by name: quantized weights, or what reads them, are in `whole`; the rest is handed on."""

    def __init__(self, weights: Mapping[str, Tensor], whole: Mapping[str, QTensor | Callable[[], QTensor]]) -> None:
        self.weights, self.whole = weights, whole

    def __getitem__(self, key: str) -> Tensor:
        found = self.whole.get(key)
        if found is None:
            return self.weights[key]
        return found if isinstance(found, QTensor) else found()

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def _from_parts(files: Mapping[str, Tensor], source: str, layout: QTensor) -> QTensor:
    parts = {name: files[f"{source}.{name}"] for name in layout.inner_tensors()}
    return QTensor(**parts, shape=layout.shape, dtype=layout.dtype, **layout.form)


def _from_entries(
    entries: Mapping[str, Tensor], keys: list[str], key: str, dtype: torch.dtype, search: bool
) -> QTensor:
    weight = checkpoint.from_tensors({key: entries[key] for key in keys}, key, dtype=dtype)
    weight.search = search  # not recorded
    return weight


def _quantized(model: nn.Module) -> Iterator[tuple[str, QuantizedModule]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedModule):
            yield name, module


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of accelerate that bring the weights of a module and take them away again."""
    hook = getattr(module, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", [hook]) if getattr(one, "offload", False)]
