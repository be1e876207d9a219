"""The state of one parameter, named and laid out as bitsandbytes does.

    step                           int, steps done
    state1 state2 [state3]         32 bits: fp32 like the parameter; 8 bits: uint8 codes like the parameter
    absmax1 absmax2 [absmax3]      8 bits: fp32, one scale per 256 elements of the flattened parameter
    qmap1 qmap2 [qmap3]            8 bits: fp32 [256], the value of each code

AdEMAMix keeps its two first moments in one: state1 [2, *shape], absmax1 [2, blocks].
The state of a DTensor is made of DTensors that are sharded like it; scales then lie by rows, [rows, blocks of a row].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polybit.optim.paging import paged_zeros
from polybit.spec import codebooks
from polybit.spec.blockwise import dequantize_values
from polybit.spec.optim import RULES, STATE_BLOCK, quantize_state

State = dict[str, Any]


class Slot(NamedTuple):
    """One entry `state<name>` of a rule: how many moments it stacks, and whether they are second moments."""

    name: str
    stacked: bool
    second_moment: bool


def slots(rule: str) -> list[Slot]:
    """The entries of a rule, in order."""
    if rule == "ademamix":
        return [Slot("1", True, False), Slot("2", False, True)]
    second = RULES[rule].second_moment
    return [Slot(str(k + 1), False, k == second) for k in range(RULES[rule].states)]


_maps: dict[tuple[bool, torch.device], Tensor] = {}


def state_map(second_moment: bool, device: torch.device) -> Tensor:
    """The dynamic map of a state, fp32 [256]: unsigned for second moments. Shared, never changed."""
    key = (second_moment, device)
    if key not in _maps:
        with torch.device("cpu"):
            _maps[key] = codebooks.dynamic(signed=not second_moment).code.to(device)
    return _maps[key]


def is_distributed(x: Tensor) -> bool:
    """Whether x is a DTensor."""
    return hasattr(x, "placements") and hasattr(x, "to_local")


def local(x: Tensor) -> Tensor:
    """The part of a DTensor that lies on this rank; any other tensor itself."""
    return x.to_local() if is_distributed(x) else x  # type: ignore[attr-defined]


def is_sharded(param: Tensor) -> bool:
    """Whether this rank holds only a part of it."""
    return is_distributed(param) and any(placement.is_shard() for placement in param.placements)  # type: ignore[attr-defined]


def fits_8bit(param: Tensor) -> bool:
    """Whether blocks of 256 end where shards do: the parameter is cut between rows that are made of whole blocks."""
    if not is_sharded(param):
        return True
    by_rows = all(p.is_replicate() or p.is_shard(dim=0) for p in param.placements)  # type: ignore[attr-defined]
    return by_rows and param.dim() > 1 and _row(param) % STATE_BLOCK == 0


def _row(param: Tensor) -> int:
    return param.numel() // max(param.shape[0], 1)


def memory_order(x: Tensor) -> list[int]:
    """The dimensions of x from the slowest to the fastest in memory."""
    return sorted(range(x.dim()), key=lambda d: x.stride(d), reverse=True)


def is_permuted(x: Tensor) -> bool:
    """Whether x fills its memory without gaps, but not row by row: channels_last, a transpose."""
    return not x.is_contiguous() and x.permute(memory_order(x)).is_contiguous()


def new_state(rule: str, param: Tensor, *, bits: int, paged: bool, folder: str | Path | None) -> State:
    """The state before the first step. `bits`: 32 or 8."""
    state: State = {"step": 0}
    here = local(param)

    def make(slot: Slot, dtype: torch.dtype, part: Sequence[int], whole: Sequence[int]) -> Tensor:
        shape = (2, *part) if slot.stacked else tuple(part)
        if paged:
            data = paged_zeros(shape, dtype, here.device, folder)
        else:
            data = torch.zeros(shape, dtype=dtype, device=here.device)
        if tuple(part) == tuple(here.shape) and is_permuted(here):  # element by element as the parameter lies in memory
            data = data.as_strided(shape, (here.numel(), *here.stride()) if slot.stacked else here.stride())
        return _like(param, data, (2, *whole) if slot.stacked else tuple(whole), slot.stacked)

    for slot in slots(rule):
        if bits == 32:
            state[f"state{slot.name}"] = make(slot, torch.float32, here.shape, param.shape)
            continue
        state[f"state{slot.name}"] = make(slot, torch.uint8, here.shape, param.shape)
        state[f"qmap{slot.name}"] = state_map(slot.second_moment, here.device)
        state[f"absmax{slot.name}"] = make(slot, torch.float32, _scales(param, here.shape), _scales(param, param.shape))
    return state


def _scales(param: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    numel = 1
    for size in shape:
        numel *= size
    if not is_sharded(param):
        return (-(-numel // STATE_BLOCK),)
    return shape[0], _row(param) // STATE_BLOCK


def _like(param: Tensor, data: Tensor, whole: tuple[int, ...], stacked: bool) -> Tensor:
    """`data`, this rank's part of a tensor of shape `whole`, distributed like the parameter."""
    if not is_distributed(param):
        return data
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Shard(p.dim + stacked) if p.is_shard() else Replicate() for p in param.placements]  # type: ignore[attr-defined]
    stride = torch.empty(whole, device="meta").stride()
    mesh = param.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(data, mesh, placements, shape=torch.Size(whole), stride=stride)


def bits_of(state: State) -> int:
    """8 or 32."""
    return 8 if any(name.startswith("qmap") for name in state) else 32


def moments(rule: str, state: State, part: str) -> list[Tensor]:
    """This rank's `part` ("state", "absmax" or "qmap") of every moment, in the order of the rule."""
    found: list[Tensor] = []
    for slot in slots(rule):
        x = local(state[part + slot.name])
        found += [x] * 2 if part == "qmap" and slot.stacked else x.unbind(0) if slot.stacked else [x]
    return found


def copy_state(rule: str, source: State, target: State) -> None:
    """Fill `target`, a new state, with the values of `source`, which may have the other number of bits.

    Raises ValueError, naming the entry, if one is missing or of another size.
    """
    for part in ("state", "absmax", "qmap") if bits_of(source) == 8 else ("state",):
        for slot in slots(rule):
            if part + slot.name not in source:
                raise ValueError(f"load_state_dict: {part}{slot.name} is missing")
    target["step"] = int(source["step"])
    theirs, ours = moments(rule, source, "state"), moments(rule, target, "state")
    for k, (x, y) in enumerate(zip(theirs, ours)):
        if x.numel() != y.numel():
            raise ValueError(f"load_state_dict: a state is {list(x.shape)}, wanted {list(y.shape)}")
        if bits_of(source) == bits_of(target):
            y.copy_(x.view(y.shape))
        elif bits_of(target) == 32:
            absmax, code = (moments(rule, source, part)[k].to(x.device) for part in ("absmax", "qmap"))
            y.copy_(dequantize_values(x.view(y.shape), absmax.reshape(-1), code, STATE_BLOCK))
        else:
            absmax, code = (moments(rule, target, part)[k] for part in ("absmax", "qmap"))
            codes, scales = quantize_state(x.to(y.device).view(y.shape), code, RULES[rule].second_moment == k)
            y.copy_(codes)
            absmax.copy_(scales.view(absmax.shape))
    if bits_of(source) == bits_of(target) == 8:
        for x, y in zip(moments(rule, source, "absmax"), moments(rule, target, "absmax")):
            y.copy_(x.reshape(y.shape))
        for slot in slots(rule):  # codes mean what the map that they came with says
            name = f"qmap{slot.name}"
            if not torch.equal(source[name].to(target[name].device), target[name]):
                target[name] = source[name].to(target[name].device, torch.float32, copy=True)
