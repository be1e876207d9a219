"""The operations of torch that work on the stored form of a QTensor; all others see the restored value."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from polybit.formats import get_format
from polybit.qtensor import ATEN_FUNCTIONS, TORCH_FUNCTIONS, QTensor, assemble, packed_bytes

aten = torch.ops.aten


def _as_view(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    return return_and_correct_aliasing(func, args, kwargs, out)  # type: ignore[no-untyped-call]


def _argument(args: Any, kwargs: Any, index: int, name: str, default: Any) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, default)


def _alias(func: Any, args: Any, kwargs: Any) -> Any:
    return _as_view(func, args, kwargs, args[0]._map(func))


def _clone(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0]._map(torch.clone)


def _to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    non_blocking = bool(kwargs.get("non_blocking", False))
    return args[0]._map(lambda t: t.to(device or t.device, non_blocking=non_blocking, copy=True), dtype)


def _pin_memory(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0]._map(lambda t: t.pin_memory())


def _is_pinned(func: Any, args: Any, kwargs: Any) -> Any:
    return all(t.is_pinned() for t in args[0].inner_tensors().values())


def _empty_like(func: Any, args: Any, kwargs: Any) -> Any:
    # The codebooks are copied rather than left empty: they are part of the layout, not of the value.
    weight, dtype, device = args[0], kwargs.get("dtype"), kwargs.get("device")
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    out = weight._map(lambda t: torch.empty_like(t, device=device or t.device), dtype)
    if out.code is not None:
        out.code.copy_(weight.format.on(out.device).code)
    if out.nested_code is not None:
        out.nested_code.copy_(get_format("dynamic8").on(out.device).code)
    return out


def _new(func: Any, args: Any, kwargs: Any) -> Any:
    """new_empty, new_zeros: with our row, room for rows of ours (a shard, whose place is not known); else plain."""
    weight, size = args[0], tuple(args[1])
    dtype, device = kwargs.get("dtype") or weight.dtype, kwargs.get("device") or weight.device
    if weight.dim() == 0 or len(size) == 0 or size[1:] != tuple(weight.shape[1:]) or dtype != weight.dtype:
        return func(torch.empty(0, dtype=dtype, device=device), size)
    row, block, count = math.prod(size[1:]), weight.block_length, math.prod(size)
    if row % block and weight.dim() > 1:
        raise ValueError(
            f"QTensor: rows of {row} elements hold no whole blocks of {block}, so they cannot be sharded; "
            f"dequantize() first, or choose a block size that divides the row"
        )
    layout = weight.form | {"cut_from": None}
    if weight.double_quant:
        layout["block_offset"] = None
    q = weight.q.new_zeros(packed_bytes(count, weight.bits), device=device)
    absmax = weight.absmax.new_zeros(-(-count // block), device=device)
    tables = {name: table.to(device, copy=True) for name, table in weight.tables.items()}
    return assemble(q, absmax, **tables, shape=size, dtype=dtype, **layout)


def _fill_like(func: Any, args: Any, kwargs: Any) -> Any:
    # The result has our shape and dtype, not our value: nothing need be restored.
    weight = args[0]
    plain = torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
    return func(plain, *args[1:], **kwargs)


def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    target, source = args[0], args[1]
    if not target.same_layout(source):
        # Its own value would not always quantize to the same bytes; DistributedDataParallel copies that to every rank.
        same = type(source) is Tensor and type(target.q) is Tensor and not target.is_meta and not source.is_meta
        return target if same and _has_value(target, source) else NotImplemented
    if not target.double_quant or (target.is_whole and source.is_whole):
        target.assign(source)
    elif target.block_offset is None:
        # Rows of an unknown place mean something only with the tables they came with.
        if target.nested_absmax.shape != source.nested_absmax.shape:
            raise ValueError("QTensor: copy_ into a shard needs a shard of a tensor of the same size")
        target.assign(source)
    elif target.block_offset == source.block_offset and _same_tables(target, source):
        target.assign(source, tables=False)
    else:
        return NotImplemented
    return target


def _has_value(weight: QTensor, x: Tensor) -> bool:
    return weight.shape == x.shape and torch.equal(weight.dequantize(), x.to(weight.device, weight.dtype))


def _same_tables(a: QTensor, b: QTensor) -> bool:
    theirs = b.tables
    return all(t is theirs[n] or torch.equal(t, theirs[n]) for n, t in a.tables.items())


def _slice(func: Any, args: Any, kwargs: Any) -> Any:
    weight, dim = args[0], _argument(args, kwargs, 1, "dim", 0)
    step = _argument(args, kwargs, 4, "step", 1)
    if dim % weight.dim() != 0 or step != 1:
        return NotImplemented
    start, stop = _argument(args, kwargs, 2, "start", None), _argument(args, kwargs, 3, "end", None)
    start, stop, _ = slice(start, stop).indices(weight.shape[0])
    return _as_view(func, args, kwargs, weight.cut(start, max(start, stop)))


def _split(func: Any, args: Any, kwargs: Any) -> Any:
    """split.Tensor (one size) and split_with_sizes (a list)."""
    weight, sizes, dim = args[0], args[1], _argument(args, kwargs, 2, "dim", 0)
    if dim % weight.dim() != 0:
        return NotImplemented
    rows = weight.shape[0]
    if isinstance(sizes, int):
        ends = list(range(sizes, rows, sizes)) if sizes else []
        ends.append(rows)
    else:
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        if ends[-1:] != [rows]:
            raise ValueError(f"QTensor: split_with_sizes must have sizes that add up to {rows}, got {list(sizes)}")
    pieces = [weight.cut(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
    return _as_view(func, args, kwargs, pieces)


def _select(func: Any, args: Any, kwargs: Any) -> Any:
    weight, dim, index = args
    if dim % weight.dim() != 0 or weight.dim() < 2:
        return NotImplemented
    rows = weight.shape[0]
    if not -rows <= index < rows:
        raise IndexError(f"select(): index {index} out of range for tensor of size {list(weight.shape)} at dimension 0")
    return _as_view(func, args, kwargs, weight.cut(index % rows, index % rows + 1).reshaped(weight.shape[1:]))


def _unbind(func: Any, args: Any, kwargs: Any) -> Any:
    weight = args[0]
    if _argument(args, kwargs, 1, "dim", 0) % weight.dim() != 0 or weight.dim() < 2:
        return NotImplemented
    rows = [weight.cut(i, i + 1).reshaped(weight.shape[1:]) for i in range(weight.shape[0])]
    return _as_view(func, args, kwargs, rows)


def _view(func: Any, args: Any, kwargs: Any) -> Any:
    weight, size = args[0], list(args[1])
    if -1 in size:
        rest = math.prod(s for s in size if s != -1)
        size[size.index(-1)] = weight.numel() // max(rest, 1)
    if math.prod(size) != weight.numel():
        raise RuntimeError(f"shape '{list(args[1])}' is invalid for input of size {weight.numel()}")
    return _as_view(func, args, kwargs, weight.reshaped(tuple(size)))


def _as_strided(func: Any, args: Any, kwargs: Any) -> Any:
    """A contiguous view from the start: the same elements, or (as FSDP2 does to drop its padding) the first rows."""
    weight, size, stride = args[0], tuple(args[1]), tuple(args[2])
    contiguous = torch.empty(size, device="meta").stride() == stride
    if not contiguous or _argument(args, kwargs, 3, "storage_offset", None):
        return NotImplemented
    if math.prod(size) == weight.numel():
        out = weight.reshaped(size)
    elif size[1:] == tuple(weight.shape[1:]) and size[0] < weight.shape[0]:
        out = weight.cut(0, size[0])
    else:
        return NotImplemented
    return _as_view(func, args, kwargs, out)


def _same_rows(a: QTensor, b: QTensor) -> bool:
    def rows(x: QTensor) -> Any:
        return x.shape[1:], x.dtype, x.device, x.format_name, x.block_size, x.block_length, x.double_quant

    return bool(rows(a) == rows(b))


def _cat(func: Any, args: Any, kwargs: Any) -> Any:
    """Pieces by rows of one tensor, in order, or rows of independent tensors without double quantization."""
    pieces, dim = args[0], _argument(args, kwargs, 1, "dim", 0)
    if not all(isinstance(p, QTensor) and p.dim() > 0 for p in pieces) or dim % pieces[0].dim() != 0:
        return NotImplemented
    first = pieces[0]
    blocks = 0
    for piece in pieces:
        if not _same_rows(first, piece):
            return NotImplemented
        if piece is not pieces[-1] and piece.numel() % piece.block_length:
            return NotImplemented
        if first.double_quant:
            place = None if first.block_offset is None else first.block_offset + blocks
            if place is None or piece.block_offset != place or not _same_tables(first, piece):
                return NotImplemented
        blocks += piece.absmax.numel()
    shape = (sum(p.shape[0] for p in pieces), *first.shape[1:])
    layout = first.form
    if not first.double_quant or first.cut_from == math.prod(shape):
        layout["cut_from"] = None
    q, absmax = (torch.cat([getattr(p, name).view(-1) for p in pieces]) for name in ("q", "absmax"))
    tables = {name: table.clone() for name, table in first.tables.items()}
    return assemble(q, absmax, **tables, shape=shape, dtype=first.dtype, **layout)


def _broadcast(func: Any, args: Any, kwargs: Any) -> Any:
    """c10d.broadcast_: the stored parts. The last of the works is handed on, so the others are waited for here."""
    from torch._C._distributed_c10d import Work

    tensors, *rest = args
    parts = [p for t in tensors for p in (t.inner_tensors().values() if isinstance(t, QTensor) else [t])]
    works = [func([part], *rest, **kwargs)[1] for part in parts]
    for work in works[:-1]:
        Work.unbox(work).wait()
    return tensors, works[-1]


def _set_data(target: QTensor, value: Tensor) -> Any:
    """`weight.data = value`: `value` itself if it is quantized, else quantized as the weight is; no copy into it."""
    if not isinstance(value, QTensor):
        if value.shape != target.shape:
            raise ValueError(f"QTensor: data must have shape {list(target.shape)}, got {list(value.shape)}")
        value = target.requantize(value)
    with torch._C.DisableTorchFunctionSubclass():
        _SET_DATA(target, value)  # shape, dtype, device
    target.__dict__.update({name: vars(value)[name] for name in QTensor.__annotations__})
    return None


def _set_item(target: Tensor, index: Any, value: Any) -> Any:
    """`weight[index] = value`: into rows, if they are a view that takes new values, else into the restored whole."""
    if not isinstance(target, QTensor):
        return NotImplemented
    rows = _rows(target, index)
    if rows is not None and not target.double_quant:
        rows.copy_(torch.as_tensor(value))
    else:
        dense = target.dequantize()
        dense[index] = value
        target.copy_(dense)
    return None


def _rows(weight: QTensor, index: Any) -> QTensor | None:
    """`weight[index]` if that is a view."""
    if not isinstance(index, (int, slice)):
        return None
    try:
        rows = weight[index]
    except ValueError:  # it would cut inside a block
        return None
    return rows if isinstance(rows, QTensor) else None


def _data_ptr(weight: QTensor) -> int:
    # The wrapper has none, and accelerate tells by it which weights are the same.
    return weight.q.data_ptr()


def _numpy(weight: QTensor, **_: Any) -> Any:
    raise TypeError("QTensor: numpy has no quantized arrays; dequantize() first")


_SET_DATA: Any = Tensor.data.__set__  # type: ignore[attr-defined]
TORCH_FUNCTIONS |= {
    _SET_DATA: _set_data,
    Tensor.__setitem__: _set_item,
    Tensor.data_ptr: _data_ptr,
    Tensor.numpy: _numpy,
}

ATEN_FUNCTIONS |= {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten._pin_memory.default: _pin_memory,
    aten.is_pinned.default: _is_pinned,
    aten.empty_like.default: _empty_like,
    aten.new_empty.default: _new,
    aten.new_zeros.default: _new,
    aten.copy_.default: _copy,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten._reshape_alias.default: _as_strided,
    aten.as_strided.default: _as_strided,
    aten.cat.default: _cat,
    **dict.fromkeys(
        (
            aten.zeros_like.default,
            aten.ones_like.default,
            aten.full_like.default,
            aten.rand_like.default,
            aten.randn_like.default,
            aten.new_ones.default,
            aten.new_full.default,
        ),
        _fill_like,
    ),
}

if torch.distributed.is_available():
    ATEN_FUNCTIONS[torch.ops.c10d.broadcast_.default] = _broadcast
