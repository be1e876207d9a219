"""DTensors, and quantized weights under FSDP2: a weight that is a DTensor of row shards, each of them a QTensor.

Bytes and scales are sharded with their rows; codebooks and scales of scales are on every rank. In a state dict the
sharded tensors are DTensors [rows, bytes of a row] and [rows, blocks of a row], everything else is plain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from polybit.qtensor import QTensor, assemble, packed_bytes

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["gather"]

AnyTensor = TypeVar("AnyTensor", bound=Tensor)

# torch.distributed.tensor is imported where it is needed: it takes a while, and few programs shard anything.


def is_distributed(x: Tensor) -> bool:
    """Whether x is a DTensor."""
    return hasattr(x, "device_mesh") and hasattr(x, "to_local")


def is_sharded(x: Tensor) -> bool:
    """Whether this rank holds only a part of x."""
    return is_distributed(x) and any(placement.is_shard() for placement in cast("DTensor", x).placements)


def local(x: AnyTensor) -> AnyTensor:
    """The part of a DTensor that lies on this rank; any other tensor itself."""
    return cast("DTensor", x).to_local() if is_distributed(x) else x  # type: ignore[return-value]


def full(x: Tensor) -> Tensor:
    """The whole of a DTensor of plain tensors, for which all ranks must ask; any other tensor itself."""
    return cast("DTensor", x).full_tensor() if is_distributed(x) else x


def cut_like(whole: AnyTensor, like: Tensor) -> AnyTensor:
    """What this rank would hold of `whole`, were it distributed as `like`, which has the same shape; a view."""
    if not is_distributed(like):
        return whole
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded = cast("DTensor", like)
    shape, offset = compute_local_shape_and_global_offset(whole.shape, sharded.device_mesh, sharded.placements)
    for dim, (start, length) in enumerate(zip(offset, shape)):
        if length != whole.shape[dim]:
            whole = cast(AnyTensor, whole.narrow(dim, min(start, whole.shape[dim]), length))
    return whole


def _distribute(rows: Tensor, like: DTensor) -> DTensor:
    """A DTensor of `rows`, this rank's rows of a tensor that has as many rows as `like` and is sharded the same."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((like.shape[0], *rows.shape[1:]))
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(rows, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def shards(weight: QTensor) -> tuple[DTensor, DTensor]:
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


def gather(weight: QTensor) -> QTensor:
    """The whole of a DTensor of QTensors, on every rank: all of its mesh must call it. A QTensor is returned as is."""
    if not is_distributed(weight):
        return weight
    shard = local(weight)
    q, absmax = (part.full_tensor().contiguous() for part in shards(weight))
    tables = {name: table.clone() for name, table in shard.tables.items()}
    layout = shard.form | {"block_offset": 0, "cut_from": None}
    return assemble(q, absmax, **tables, shape=weight.shape, dtype=shard.dtype, **layout)


def gather_entries(tensors: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """Those entries of a state dict as plain tensors; DTensors are gathered, which all ranks must do together."""
    return {key: full(tensors[key]) for key in keys}


def shard_like(whole: QTensor, weight: QTensor) -> QTensor:
    """A copy of this rank's rows of `whole` as a DTensor, if `weight` is one; else `whole` itself."""
    if not is_distributed(weight):
        return whole
    rows = cut_like(whole, weight)
    shard = rows.new_zeros(rows.shape).copy_(rows)
    return cast(QTensor, _distribute(shard, cast("DTensor", weight)))


def show_parts(weight: QTensor) -> None:
    """Give a sharded weight the attributes by which torch.distributed.checkpoint looks for the owner of each entry.

    A QTensor has them itself. That function walks from the module along the key: "weight", "absmax".
    """
    shard = local(weight)
    parts: dict[str, Any] = {"absmax": shard.absmax, "quant_map": shard.quant_map, "quant_state": shard.quant_state}
    if shard.double_quant:
        parts |= {"nested_absmax": shard.nested_absmax, "nested_quant_map": shard.nested_quant_map}
    weight.__dict__.update(parts)
