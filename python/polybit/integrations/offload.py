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
            files, tied = hook.weights_map.dataset, model.all_tied_weights_keys
            sources = {last: tied.get(f"{name}.{last}", f"{name}.{last}") for last in module.quantized}
            if all(f"{source}.q" in files for source in sources.values()):
                hook.weights_map = _FromDisk(hook.weights_map, files, sources, module.quantized_weights())


class _FromDisk(Mapping[str, Tensor]):
    """What a hook asks by name: the quantized weight is put together of its parts, the rest is handed on."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        files: Mapping[str, Tensor],
        sources: Mapping[str, str],
        layouts: Mapping[str, QTensor],
    ) -> None:
        self.weights, self.files, self.sources, self.layouts = weights, files, sources, layouts

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.layouts:
            return self.weights[key]
        layout = self.layouts[key]
        parts = {name: self.files[f"{self.sources[key]}.{name}"] for name in layout.inner_tensors()}
        return QTensor(**parts, shape=layout.shape, dtype=layout.dtype, **layout.form)

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
