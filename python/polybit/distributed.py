"""Quantized weights under FSDP2: a weight that is a DTensor of row shards, each of them a QTensor.

Bytes and scales are sharded with their rows; codebooks and scales of scales are on every rank. In a state dict the
sharded tensors are DTensors [rows, bytes of a row] and [rows, blocks of a row], everything else is plain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from polybit.qtensor import QTensor, assemble, packed_bytes

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# torch.distributed.tensor is imported where it is needed: it takes a while, and few programs shard anything.


def is_sharded(weight: Tensor) -> bool:
    """Whether this is a DTensor rather than a tensor of this process alone."""
    return hasattr(weight, "device_mesh")


def local(weight: Tensor) -> QTensor:
    """The QTensor itself, or this rank's shard of a sharded one."""
    return cast(QTensor, cast("DTensor", weight).to_local() if is_sharded(weight) else weight)


def _distribute(rows: Tensor, like: DTensor) -> DTensor:
    """A DTensor of `rows`, this rank's rows of a tensor that has as many rows as `like` and is sharded the same."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((like.shape[0], *rows.shape[1:]))
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(rows, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def shards(weight: Tensor) -> tuple[DTensor, DTensor]:
    """q and absmax of a sharded weight as DTensors of plain rows, sharing storage with it."""
    shard, sharded = local(weight), cast("DTensor", weight)
    rows, row = shard.shape[0], math.prod(shard.shape[1:])
    q, absmax = shard.q.detach(), shard.absmax.detach()
    if shard.dim() < 2 or row % shard.block_length:
        raise ValueError(
            f"distributed: rows of {row} elements hold no whole blocks of {shard.block_length}, so a weight "
            f"{list(weight.shape)} cannot be sharded; choose a block size that divides the row"
        )
    if q.dim() == 1:
        q = q.view(rows, packed_bytes(row, shard.bits))
    if absmax.dim() == 1 and shard.format.kind != "int8":
        absmax = absmax.view(rows, row // shard.block_length)
    return _distribute(q, sharded), _distribute(absmax, sharded)


def gather(weight: Tensor) -> QTensor:
    """The whole of a sharded weight, on every rank. All ranks of its mesh must call it. Others are returned as is."""
    if not is_sharded(weight):
        return cast(QTensor, weight)
    shard = local(weight)
    q, absmax = (part.full_tensor().contiguous() for part in shards(weight))
    tables = {name: table.clone() for name, table in shard.tables.items()}
    layout = shard.form | {"block_offset": 0, "cut_from": None}
    return assemble(q, absmax, **tables, shape=weight.shape, dtype=shard.dtype, **layout)


def gather_entries(tensors: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """Those entries of a state dict as plain tensors; sharded ones are gathered, which all ranks must do together."""
    entries = {key: tensors[key] for key in keys}
    return {key: cast("DTensor", t).full_tensor() if is_sharded(t) else t for key, t in entries.items()}


def shard_like(whole: QTensor, weight: Tensor) -> Tensor:
    """A copy of this rank's rows of `whole`, wrapped as `weight` is."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded = cast("DTensor", weight)
    shape, offset = compute_local_shape_and_global_offset(whole.shape, sharded.device_mesh, sharded.placements)
    rows = whole.cut(offset[0], offset[0] + shape[0])
    return _distribute(rows.new_zeros(shape).copy_(rows), sharded)


def show_parts(weight: Tensor) -> None:
    """Give a sharded weight the attributes by which torch.distributed.checkpoint looks for the owner of each entry.

    A QTensor has them itself. That function walks from the module along the key: "weight", "absmax".
    """
    shard = local(weight)
    parts: dict[str, Any] = {"absmax": shard.absmax, "quant_map": shard.quant_map, "quant_state": shard.quant_state}
    if shard.double_quant:
        parts |= {"nested_absmax": shard.nested_absmax, "nested_quant_map": shard.nested_quant_map}
    weight.__dict__.update(parts)
