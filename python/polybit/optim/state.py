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
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polybit.distributed import cut_like, full, is_distributed, is_sharded, local
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


@cache
def slots(rule: str) -> tuple[Slot, ...]:
    """The entries of a rule, in order."""
    if rule == "ademamix":
        return Slot("1", True, False), Slot("2", False, True)
    second = RULES[rule].second_moment
    # The mean of a centered RMSprop is always state3, so that an entry is the same moment whatever is switched on.
    names = {"rmsprop_centered": "13", "rmsprop_centered_momentum": "132"}.get(rule, "123")
    return tuple(Slot(names[k], False, k == second) for k in range(RULES[rule].states))


@cache
def needs(rule: str) -> frozenset[str]:
    """What a state must have for a step of the rule."""
    return frozenset({"step", *(f"state{slot.name}" for slot in slots(rule))})


_maps: dict[tuple[bool, torch.device], Tensor] = {}


def state_map(second_moment: bool, device: torch.device) -> Tensor:
    """The dynamic map of a state, fp32 [256]: unsigned for second moments. Shared, never changed."""
    key = (second_moment, device)
    if key not in _maps:
        with torch.device("cpu"):
            _maps[key] = codebooks.dynamic(signed=not second_moment).code.to(device)
    return _maps[key]


def fits_8bit(param: Tensor) -> bool:
    """Whether blocks of 256 end where shards do: the parameter is cut between rows that are made of whole blocks."""
    if not is_sharded(param):
        return True
    by_rows = all(p.is_replicate() or p.is_shard(dim=0) for p in param.placements)  # type: ignore[attr-defined]
    return by_rows and param.dim() > 1 and _row(param) % STATE_BLOCK == 0 and local(param).is_contiguous()


def _row(param: Tensor) -> int:
    return param.numel() // max(param.shape[0], 1)


def memory_order(x: Tensor) -> list[int]:
    """The dimensions of x from the slowest to the fastest in memory."""
    return sorted(range(x.dim()), key=lambda d: x.stride(d), reverse=True)


def is_permuted(x: Tensor) -> bool:
    """Whether x fills its memory without gaps, but not row by row: channels_last, a transpose."""
    return not x.is_contiguous() and x.permute(memory_order(x)).is_contiguous()


def in_memory_order(x: Tensor, like: Tensor) -> Tensor:
    """x as a contiguous tensor, in the order in which the elements of `like` lie in memory; a copy where x's do not."""
    return (x.permute(memory_order(like)) if is_permuted(like) else x).contiguous()


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
    if not is_sharded(param):
        return (-(-prod(shape) // STATE_BLOCK),)
    return shape[0], _row(param) // STATE_BLOCK


def _like(param: Tensor, data: Tensor, whole: tuple[int, ...], stacked: bool) -> Tensor:
    """`data`, this rank's part of a tensor of shape `whole`, distributed like the parameter."""
    if not is_distributed(param):
        return data
    if data.device != local(param).device:  # DTensor would move it there
        raise NotImplementedError("the states of a distributed parameter on a GPU cannot be paged: set is_paged=False")
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Shard(p.dim + stacked) if p.is_shard() else Replicate() for p in param.placements]  # type: ignore[attr-defined]
    stride = torch.empty(whole, device="meta").stride()
    mesh = param.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(data, mesh, placements, shape=torch.Size(whole), stride=stride)


def bits_of(state: State) -> int:
    """8 or 32."""
    # By the codes themselves: torch.distributed.checkpoint leaves the maps of a target beside what it loads.
    return 8 if isinstance(x := state.get("state1"), Tensor) and x.dtype == torch.uint8 else 32


def has_moments(rule: str, state: State) -> bool:
    """Whether a state has the moments that the rule needs; before the first step it does not."""
    return needs(rule) <= state.keys()


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
    of_source = bits_of(source)
    parts = ("state", "absmax", "qmap") if of_source == 8 else ("state",)
    for name in ("step", *(part + slot.name for part in parts for slot in slots(rule))):
        if name not in source:
            there = ", ".join(map(str, source))
            raise ValueError(f"load_state_dict: {name} is missing: is this of another optimizer? There are {there}")
    surplus = {"state2", "state3"} & source.keys() - {"state" + slot.name for slot in slots(rule)}
    if surplus:
        raise ValueError(f"load_state_dict: {min(surplus)} is not of this optimizer: is this of another one?")
    source = _as_distributed(rule, source, target)
    parts = parts if bits_of(source) == of_source else ("state",)
    ours = [
        moments(rule, target, part) for part in ("state", "absmax", "qmap") if part == "state" or bits_of(target) == 8
    ]
    theirs = [moments(rule, source, part) for part in parts]
    target["step"] = int(source["step"])
    for k, (x, y) in enumerate(zip(zip(*theirs), zip(*ours))):
        if x[0].shape != y[0].shape:
            raise ValueError(f"load_state_dict: a state is {list(x[0].shape)}, wanted {list(y[0].shape)}")
        x = tuple(each.to(y[0].device) for each in x)
        if len(x) == 3:
            _check_scales(x[0], x[1])
        same_order = memory_order(x[0]) == memory_order(y[0])
        if len(x) == len(y) == 3 and same_order and torch.equal(x[2], y[2]):
            y[0].copy_(x[0])
            y[1].copy_(x[1].view(y[1].shape))
            continue
        values = x[0] if len(x) == 1 else _restored(*x)
        if len(y) == 1:
            y[0].copy_(values)
            continue
        flat = in_memory_order(values, y[0])
        codes, scales = quantize_state(flat.float(), y[2], RULES[rule].second_moment == k)
        in_memory_order(y[0], y[0]).copy_(codes.view_as(flat))
        y[1].copy_(scales.view(y[1].shape))


def _check_scales(codes: Tensor, absmax: Tensor) -> None:
    if absmax.numel() != -(-codes.numel() // STATE_BLOCK):
        raise ValueError(f"load_state_dict: {absmax.numel()} scales for a state of {codes.numel()} elements")


def _as_distributed(rule: str, source: State, target: State) -> State:
    """`source` cut as `target` is, if one of them is distributed: all ranks must call it together.

    What does not lie as the target's entries do is gathered first: the state of one process, or of other ranks.
    """
    bits = bits_of(source)
    names = [part + slot.name for part in (("state", "absmax") if bits == 8 else ("state",)) for slot in slots(rule)]
    if not any(is_distributed(x) for x in (*source.values(), *target.values()) if isinstance(x, Tensor)):
        return source
    if bits == bits_of(target) and all(_lie_alike(source[name], target[name]) for name in names):
        return source
    whole = {**source, **{name: full(source[name]) for name in names}}
    if bits == 8 != bits_of(target):
        for slot in slots(rule):
            codes, absmax, code = (whole[part + slot.name] for part in ("state", "absmax", "qmap"))
            values = [_restored(*pair, code) for pair in (zip(codes, absmax) if slot.stacked else [(codes, absmax)])]
            whole[f"state{slot.name}"] = torch.stack(values) if slot.stacked else values[0]
    for name in names:
        if name not in target:
            continue
        x, like = whole[name], target[name]
        if x.numel() != like.numel():
            raise ValueError(f"load_state_dict: {name} is {list(x.shape)}, wanted {list(like.shape)}")
        whole[name] = cut_like(x.reshape(like.shape), like)
    return whole


def _lie_alike(x: Tensor, y: Tensor) -> bool:
    if not (is_distributed(x) and is_distributed(y)):
        return False
    return x.shape == y.shape and (x.device_mesh, x.placements) == (y.device_mesh, y.placements)  # type: ignore[attr-defined]


def _restored(codes: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
    """The values of an 8-bit state, fp32, in the layout of its codes: blocks follow the memory."""
    _check_scales(codes, absmax)
    values = torch.empty_like(codes, dtype=torch.float32)
    flat = dequantize_values(in_memory_order(codes, codes), absmax.reshape(-1), code.float(), STATE_BLOCK)
    in_memory_order(values, values).copy_(flat)
    return values
