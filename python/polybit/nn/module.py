"""What the quantized modules share: a QTensor weight, ties between modules, a state dict of plain tensors."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from polybit import checkpoint, distributed
from polybit.distributed import local
from polybit.formats import Format, get_format
from polybit.qtensor import QTensor

Self = TypeVar("Self", bound="QuantizedModule")

# By weight: the function that moved or cast it (None: it was loaded) and what replaced it, as long as both exist.
# A module whose weight is shared finds here what the weight became elsewhere, and shares that.
_successors = WeakTensorKeyDictionary()


def _successor(weight: Tensor) -> tuple[Any, QTensor | None]:
    if weight not in _successors:
        return None, None
    fn, reference = _successors[weight]
    return fn, reference()


def _succeed(weight: Tensor, fn: Any, quantized: Tensor) -> QTensor:
    new = nn.Parameter(quantized, requires_grad=False)
    _successors[weight] = (fn, weakref.ref(new))
    return cast(QTensor, new)


def _entries(weight: QTensor, key: str) -> dict[str, Tensor]:
    # The description is no part of the weight. Modules that share the weight must share it all the same: safetensors
    # and transformers save once what shares storage, and would leave one of them a description of nothing. It is kept
    # with the weight: a table with weak references would forbid torch to swap the weight, as its parametrizations do.
    entries = checkpoint.to_tensors(weight, key)
    *_, last = entries
    description: Tensor | None = getattr(weight, "_description", None)
    if description is None or description.is_meta or not torch.equal(description, entries[last]):
        description = weight._description = entries[last]  # type: ignore[attr-defined]
    entries[last] = description
    return entries


class QuantizedModule(nn.Module):
    """A module with a frozen QTensor weight, or several (`quantized` names them), and a plain state dict.

    state_dict() holds plain tensors only (polybit.checkpoint has the layout). load_state_dict() takes them back, into a
    module of the same format, block size and double quantization, with `assign=True` also on the meta device; a damaged
    entry raises ValueError and leaves this module as it was.

    Modules may share one weight (a tied embedding and head): it stays shared when the model that holds them is moved,
    cast, copied or loaded. As for any shared Parameter of torch, the state dict has the entries of each module, sharing
    storage; if loading with `assign=True` finds different bytes in them, each module keeps its own.
    """

    weight: QTensor
    quantized: tuple[str, ...] = ("weight",)

    def quantized_weights(self) -> dict[str, QTensor]:
        """The quantized parameters by name."""
        return {name: cast(QTensor, getattr(self, name)) for name in self.quantized}

    def _adopt(self, weight: QTensor) -> None:
        # A Parameter is registered as it is, so that modules can share it.
        parameter = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        self.register_parameter("weight", parameter)

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # torch moves or casts a wrapper parameter by swapping it, which fails once torch.compile or torch.export has
        # seen it (they keep weak references). Nothing trains the weight, so it gets a new Parameter instead.
        weights = self.quantized_weights()
        self._parameters.update(dict.fromkeys(weights))
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for name, weight in weights.items():
                weights[name] = self._applied(weight, fn)
        finally:
            self._parameters.update(cast("dict[str, nn.Parameter | None]", weights))
        return self

    def _applied(self, weight: QTensor, fn: Callable[[Tensor], Tensor]) -> QTensor:
        mover, moved = _successor(weight)
        return moved if moved is not None and mover is fn else _succeed(weight, fn, fn(weight.detach()))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in self.quantized_weights().items():
            del destination[prefix + name]
            if distributed.is_distributed(weight):
                distributed.show_parts(weight)
            destination.update(_entries(weight, prefix + name))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        weights = self.quantized_weights()
        mine = {name: checkpoint.owned_keys(state_dict, prefix + name) for name in weights}
        loaded = {
            name: self._read(weights[name], distributed.gather_entries(state_dict, keys), prefix + name)
            for name, keys in mine.items()
            if keys
        }
        taken = {key for keys in mine.values() for key in keys}
        rest = {key: value for key, value in state_dict.items() if key not in taken}
        errors_before, missing = len(error_msgs), list[str]()
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys.extend(key for key in missing if key.removeprefix(prefix) not in weights)
        for name, weight in weights.items():
            if not mine[name]:
                missing_keys.extend(checkpoint.to_tensors(weight, prefix + name))
        if len(error_msgs) > errors_before:
            return
        assign = local_metadata.get("assign_to_params_buffers", False)
        with torch.no_grad():
            for name, new in loaded.items():
                self._take(name, new, assign, prefix + name)

    def _take(self, name: str, loaded: QTensor, assign: bool, key: str) -> None:
        weight = cast(QTensor, getattr(self, name))
        if assign:
            _, shared = _successor(weight)
            same = shared is not None and _same_bytes(local(shared), local(loaded))
            setattr(self, name, shared if shared is not None and same else _succeed(weight, None, loaded))
            return
        if weight.is_meta and not loaded.is_meta:
            warnings.warn(f"for {key}: copied to the meta device, a no-op; pass assign=True", stacklevel=2)
        local(weight).copy_(local(loaded))

    def _read(self, weight: QTensor, tensors: dict[str, Tensor], key: str) -> QTensor:
        own = local(weight)
        loaded = checkpoint.from_tensors(tensors, key, dtype=own.dtype if own.format.kind == "int8" else None)
        if loaded.shape != weight.shape:
            raise ValueError(f"load_state_dict: {key} has shape {list(loaded.shape)}, wanted {list(weight.shape)}")
        loaded.search = own.search  # not recorded: it says how to quantize again, not how to read
        mine = distributed.shard_like(loaded, weight)
        if not own.same_layout(local(mine)):
            raise ValueError(f"load_state_dict: {key} is {describe(loaded)}, the module is {describe(own)}")
        return mine

    # Where torch.distributed.checkpoint finds the entries that a layer of int8 has beside "weight".
    @property
    def SCB(self) -> Tensor:
        """The scales of an int8 weight, fp32 [rows]."""
        return self._int8_weight().absmax

    @property
    def weight_format(self) -> Tensor:
        """How the rows of an int8 weight are stored, as bitsandbytes counts it: 0, row-major."""
        return torch.zeros((), dtype=torch.uint8, device=self._int8_weight().device)

    def _int8_weight(self) -> QTensor:
        weight = local(self.weight)
        if weight.format.kind != "int8":
            raise AttributeError(f"{type(self).__name__} of {weight.format_name} has no int8 scales")
        return weight


def describe(weight: QTensor) -> str:
    """How a weight is quantized, for messages."""
    return f"{weight.format_name}, block size {weight.block_size}, double_quant={weight.double_quant}"


def _same_bytes(a: QTensor, b: QTensor) -> bool:
    if not a.same_layout(b) or a.dtype != b.dtype or a.device != b.device:
        return False
    theirs = b.inner_tensors()
    return a.is_meta or all(
        torch.equal(inner.reshape(-1).view(torch.uint8), theirs[name].reshape(-1).view(torch.uint8))
        for name, inner in a.inner_tensors().items()
    )


def check_weight(what: str, weight: Tensor, *kinds: str) -> None:
    """Raise unless `weight` is a QTensor [rows, columns] whose format is of one of `kinds`."""
    if not isinstance(weight, QTensor):
        raise TypeError(f"{what}: weight must be a QTensor, got {type(weight).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"{what}: weight must have 2 dimensions, got {list(weight.shape)}")
    if weight.format.kind not in kinds:
        raise ValueError(f"{what}: weight must be {' or '.join(kinds)}, got {weight.format_name}")


def kbit_format(format: str | Format, what: str, instead: str) -> Format:
    """The format of that name. Raises ValueError if it is unknown or not k-bit."""
    format = get_format(format)
    if format.kind != "kbit":
        raise ValueError(f"{what}: {format.name} is not a k-bit format; use {instead} for int8")
    return format


def check_sizes(**sizes: int) -> None:
    """Raise TypeError or ValueError unless every size is a positive integer."""
    for name, size in sizes.items():
        if not isinstance(size, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an int, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")
