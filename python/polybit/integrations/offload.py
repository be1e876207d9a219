"""Quantized weights that accelerate keeps away from the device: on the CPU as they are, on a disk part by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from polybit.nn.module import QuantizedModule
from polybit.qtensor import QTensor


def offloaded(model: nn.Module) -> dict[str, Mapping[str, Tensor]]:
    """The quantized modules whose weight comes when they run, by name: what holds it under "weight"."""
    return {name: hook.weights_map for name, module in _quantized(model) for hook in _hooks(module)}


def read_back(model: Any) -> None:
    """Make the hooks of accelerate read whole weights where transformers has written their parts to a disk."""
    for name, module in _quantized(model):
        for hook in _hooks(module):
            source = model.all_tied_weights_keys.get(f"{name}.weight", f"{name}.weight")
            files = hook.weights_map.dataset
            if f"{source}.q" in files:
                hook.weights_map = _FromDisk(hook.weights_map, files, source, module.weight)


class _FromDisk(Mapping[str, Tensor]):
    """What a hook asks by name: the quantized weight is put together of its parts, the rest is handed on."""

    def __init__(
        self, weights: Mapping[str, Tensor], files: Mapping[str, Tensor], source: str, layout: QTensor
    ) -> None:
        self.weights, self.files, self.source, self.layout = weights, files, source, layout

    def __getitem__(self, key: str) -> Tensor:
        if key != "weight":
            return self.weights[key]
        parts = {name: self.files[f"{self.source}.{name}"] for name in self.layout.inner_tensors()}
        return QTensor(**parts, shape=self.layout.shape, dtype=self.layout.dtype, **self.layout.form)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def _quantized(model: nn.Module) -> Iterator[tuple[str, QuantizedModule]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedModule):
            yield name, module


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of accelerate that bring the weights of a module and take them away again."""
    hook = getattr(module, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", [hook]) if getattr(one, "offload", False)]
