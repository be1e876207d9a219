"""QTensor to plain tensors and back: the layout of a checkpoint.

bitsandbytes' keys, generalised; docs/formats.md draws them. For a parameter called P (as in "layer.weight"):

    P                    packed codes, uint8 [bytes, 1], or the same bytes viewed as another dtype (quant_storage)
    P.absmax             fp32 [blocks], or uint8 [blocks] with double quantization
    P.quant_map          fp32 [2**bits]
    P.nested_absmax      fp32 [groups]     with double quantization
    P.nested_quant_map   fp32 [256]        with double quantization
    P.quant_state.<owner>__<format>   uint8, the bytes of a JSON object; owner: bitsandbytes (nf4, fp4) or polybit

int8: P int8 [N, K], SCB fp32 [N] and weight_format uint8 scalar 0; beside a P called weight (as in "layer.SCB"), below
any other (as in "experts.up.SCB").
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polybit import distributed
from polybit.formats import Format, get_format
from polybit.qtensor import NESTED_BLOCK, QTensor, assemble, check_block_size, packed_bytes, state_name

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_FIELDS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")
_JSON_BYTES = 1 << 16  # a real one has less than 300
_WEIGHT_FORMATS = {1: "col32", 2: "col_turing", 3: "col_ampere"}  # of older bitsandbytes, tiled for its kernels


def _state_key(prefix: str, format: str) -> str:
    return f"{prefix}.quant_state.{state_name(format)}"


def _int8_key(prefix: str, name: str) -> str:
    # bitsandbytes puts the scales of "layer.weight" beside it; a parameter of another name may have siblings.
    head, dot, last = prefix.rpartition(".")
    return f"{head}{dot}{name}" if last == "weight" else f"{prefix}.{name}"


def owned_keys(keys: Mapping[str, Any], prefix: str) -> list[str]:
    """Those of `keys` that belong to the quantized parameter `prefix`."""
    others = (_int8_key(prefix, "SCB"), _int8_key(prefix, "weight_format"))
    return [key for key in keys if key == prefix or key.startswith(prefix + ".") or key in others]


def is_quantized(tensors: Mapping[str, Any], prefix: str) -> bool:
    """Whether `tensors` holds the parameter `prefix` in quantized form."""
    return any(key != prefix for key in owned_keys(tensors, prefix))


def to_tensors(weight: QTensor, prefix: str, *, quant_storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """The plain tensors of a checkpoint, by key. They share storage with `weight` where they can, the JSON apart.

    weight: a QTensor, or a DTensor of QTensors: then P [rows, bytes of a row] and its absmax [rows, blocks of a row]
    (SCB) are DTensors with the rows of `weight`. `quant_storage`: the dtype that the packed codes are viewed as,
    floating or integer (int8 codes are int8, shards uint8; they have no choice). Raises ValueError if it does not
    divide the bytes, if the logical dtype is none that can be recorded, or for a part of a doubly quantized tensor;
    TypeError if `weight` is not quantized.
    """
    qtensor, sharded = distributed.local(weight), distributed.is_distributed(weight)
    if not isinstance(qtensor, QTensor):
        raise TypeError(f"checkpoint: {prefix} must be a QTensor, got {type(qtensor).__name__}")
    format = qtensor.format
    q, absmax = qtensor.q.detach(), qtensor.absmax.detach().view(-1)
    if sharded:
        q, absmax = distributed.shards(weight)
        if quant_storage != torch.uint8:
            raise ValueError(f"checkpoint: {prefix}: a sharded weight has no quant_storage, got {quant_storage}")
    elif qtensor.double_quant and not qtensor.is_whole:
        raise ValueError(f"checkpoint: {prefix} is a part of a doubly quantized tensor; dequantize() and quantize it")
    if format.kind == "int8":
        if quant_storage != torch.uint8:
            raise ValueError(f"checkpoint: {prefix}: int8 has no quant_storage, got {quant_storage}")
        scalar = torch.zeros((), dtype=torch.uint8, device=q.device)
        return {prefix: q, _int8_key(prefix, "SCB"): absmax, _int8_key(prefix, "weight_format"): scalar}
    dtype = str(qtensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"checkpoint: {prefix}: dtype must be one of {', '.join(_DTYPES)}, got {dtype}")
    assert qtensor.code is not None
    codes = q if sharded else _store(q.view(-1), prefix, quant_storage)
    out = {prefix: codes, f"{prefix}.absmax": absmax, f"{prefix}.quant_map": qtensor.code.detach()}
    state: dict[str, Any] = {
        "quant_type": format.name,
        "blocksize": qtensor.block_size,
        "dtype": dtype,
        "shape": list(weight.shape),
    }
    if qtensor.nested_absmax is not None and qtensor.nested_code is not None and qtensor.nested_offset is not None:
        out[f"{prefix}.nested_absmax"] = qtensor.nested_absmax.detach()
        out[f"{prefix}.nested_quant_map"] = qtensor.nested_code.detach()
        offset = 0.0 if q.is_meta else qtensor.nested_offset.item()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    text = json.dumps(state).encode()
    if sharded:
        # torch.distributed.checkpoint loads into entries of the same size, and the digits of the offset vary.
        text = text.ljust(-(-len(text) // 256) * 256)
    device = "meta" if q.is_meta else "cpu"
    out[_state_key(prefix, format.name)] = torch.tensor(list(text), dtype=torch.uint8, device=device)
    return out


def _store(data: Tensor, key: str, dtype: torch.dtype) -> Tensor:
    if not _is_storage(dtype):
        raise ValueError(f"checkpoint: {key}: quant_storage must be a floating or integer dtype, got {dtype}")
    if data.numel() % dtype.itemsize:
        raise ValueError(f"checkpoint: {key}: its {data.numel()} bytes cannot be viewed as {dtype}")
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).reshape(-1, 1)


def _is_storage(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype in _INTEGERS


def from_tensors(
    tensors: Mapping[str, Tensor],
    prefix: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> QTensor:
    """The QTensor that `to_tensors` (or, for nf4, fp4 and int8, bitsandbytes) wrote under `prefix`.

    It shares storage with `tensors` where it can. `device`: where to put it (default: where the codes are). `dtype`:
    the logical dtype (default: the recorded one; int8 records none: fp32). Raises ValueError, naming the key, when an
    entry is missing, surplus, or does not fit. Scales may be NaN or infinite, as those of such weights are.
    """
    codes = _plain(tensors, prefix)
    device = codes.device if device is None else torch.device(device)
    if codes.is_meta and device.type != "meta":
        raise ValueError(f"checkpoint: {prefix} is on the meta device, its content is needed")
    if _int8_key(prefix, "SCB") in tensors:
        return _int8(tensors, prefix, device, dtype)
    key, format = _find_state(tensors, prefix)
    state = _read_state(tensors, key, format)
    nested = state.offset is not None
    names = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else [])]
    _refuse_surplus(tensors, prefix, {prefix, key, *(f"{prefix}.{name}" for name in names)})

    blocks = -(-state.count // state.block_size)
    q = _codes(codes, prefix, packed_bytes(state.count, format.bits))
    extra: tuple[Tensor, ...] = ()
    if nested:
        absmax = _entry(tensors, prefix, "absmax", torch.uint8, blocks)
        scales = _scales(tensors, prefix, "nested_absmax", -(-blocks // NESTED_BLOCK))
        map8 = _codebook(tensors, prefix, "nested_quant_map", get_format("dynamic8"))
        offset = torch.tensor(state.offset, dtype=torch.float32, device=device)
        extra = (scales.to(device), map8.to(device), offset)
    else:
        absmax = _scales(tensors, prefix, "absmax", blocks)
    code = _codebook(tensors, prefix, "quant_map", format)
    return assemble(
        q.to(device), absmax.to(device), code.to(device), *extra, shape=state.shape, dtype=dtype or state.dtype,
        format=format.name, block_size=state.block_size, search=format.search,
    )  # fmt: skip


def _refuse_surplus(tensors: Mapping[str, Any], prefix: str, expected: set[str]) -> None:
    surplus = [name for name in owned_keys(tensors, prefix) if name not in expected]
    if surplus:
        raise ValueError(f"checkpoint: {prefix}: unexpected entry {surplus[0]}")


def _find_state(tensors: Mapping[str, Tensor], prefix: str) -> tuple[str, Format]:
    head = f"{prefix}.quant_state."
    keys = [key for key in tensors if key.startswith(head)]
    if len(keys) != 1:
        dense = not any(key.startswith(f"{prefix}.") for key in tensors)
        hint = f": {prefix} is not quantized; load a dense state dict before the model is quantized" if dense else ""
        what = f"is missing{hint}" if not keys else f"appears {len(keys)} times: {', '.join(sorted(keys))}"
        raise ValueError(f"checkpoint: {head}<owner>__<format> {what}")
    name = keys[0].removeprefix(head).partition("__")[2]
    try:
        format = get_format(name)
    except ValueError as error:
        raise ValueError(f"checkpoint: {keys[0]}: {error}") from None
    if format.kind == "int8" or keys[0] != _state_key(prefix, name):
        raise ValueError(f"checkpoint: {keys[0]} is not a key that polybit or bitsandbytes writes")
    return keys[0], format


@dataclass(frozen=True)
class _State:
    """What the JSON says. `offset` is None without double quantization."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int
    offset: float | None

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def _read_state(tensors: Mapping[str, Tensor], key: str, format: Format) -> _State:
    state = _read_json(_plain(tensors, key), key)
    nested = any(name in state for name in _NESTED_FIELDS)
    for name in state:  # a field we do not know may change what the bytes mean
        if name not in _FIELDS and name not in _NESTED_FIELDS:
            raise ValueError(f"checkpoint: {key}: unknown field {reprlib.repr(name)}")
    shape = state.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"checkpoint: {key}: shape must be a list of sizes, got {reprlib.repr(shape)}")
    if math.prod(size or 1 for size in shape) >= 2**63:
        raise ValueError(f"checkpoint: {key}: shape is too large, got {reprlib.repr(shape)}")
    block_size = state.get("blocksize")
    try:
        check_block_size(block_size)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: {key}: {str(error)[:100]}") from None
    assert isinstance(block_size, int)
    if state.get("quant_type") != format.name:
        got = reprlib.repr(state.get("quant_type"))
        raise ValueError(f"checkpoint: {key}: quant_type is {got}, the key says {format.name!r}")
    dtype = state.get("dtype")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"checkpoint: {key}: dtype must be one of {', '.join(_DTYPES)}, got {reprlib.repr(dtype)}")
    return _State(tuple(shape), _DTYPES[dtype], block_size, _offset(state, key) if nested else None)


def _offset(state: dict[str, Any], key: str) -> float:
    block, dtype, offset = (state.get(name) for name in _NESTED_FIELDS)
    if type(block) is not int or block != NESTED_BLOCK or dtype != "float32":
        raise ValueError(f"checkpoint: {key}: nested_blocksize must be {NESTED_BLOCK} and nested_dtype float32")
    if isinstance(offset, bool) or not isinstance(offset, (int, float)):
        raise ValueError(f"checkpoint: {key}: nested_offset must be a number, got {reprlib.repr(offset)}")
    # NaN and infinity are what the scales of such weights have as their mean.
    if torch.finfo(torch.float32).max < abs(offset) != math.inf:
        raise ValueError(f"checkpoint: {key}: nested_offset must be an fp32 number, got {reprlib.repr(offset)}")
    return float(offset)


def _read_json(entry: Tensor, key: str) -> dict[str, Any]:
    if entry.is_meta:
        raise ValueError(f"checkpoint: {key} is on the meta device, its content is needed")
    if entry.dtype != torch.uint8 or entry.dim() != 1 or entry.numel() > _JSON_BYTES:
        raise ValueError(
            f"checkpoint: {key} must be uint8 with 1 dimension of at most {_JSON_BYTES}, "
            f"got {entry.dtype} {list(entry.shape)}"
        )
    try:
        state = json.loads(bytes(entry.tolist()).decode(), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint: {key} is not JSON: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint: {key} must hold a JSON object, got {type(state).__name__}")
    return state


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in pairs:
        if name in out:
            raise ValueError(f"{reprlib.repr(name)} appears twice")
        out[name] = value
    return out


def _plain(tensors: Mapping[str, Any], key: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"checkpoint: {key} is missing")
    entry = tensors[key]
    if not isinstance(entry, Tensor) or entry.layout != torch.strided:
        got = entry.layout if isinstance(entry, Tensor) else type(entry).__name__
        raise ValueError(f"checkpoint: {key} must be a dense tensor, got {got}")
    # A copy of it would need memory that the checkpoint never held.
    if not entry.is_contiguous() and entry.untyped_storage().nbytes() < entry.numel() * entry.element_size():
        raise ValueError(f"checkpoint: {key} {list(entry.shape)} is expanded from fewer elements")
    return entry.detach()


def _beside(tensors: Mapping[str, Any], prefix: str, key: str) -> Tensor:
    entry = _plain(tensors, key)
    if entry.is_meta != tensors[prefix].is_meta:
        raise ValueError(f"checkpoint: {key} is on device {entry.device}, {prefix} on {tensors[prefix].device}")
    return entry


def _flat(entry: Tensor) -> Tensor:
    data = entry.reshape(-1)
    # One element counts as contiguous whatever its stride, but cannot be viewed as another dtype.
    return data if data.stride() == (1,) else data.clone(memory_format=torch.contiguous_format)


def _codes(entry: Tensor, key: str, size: int) -> Tensor:
    if not _is_storage(entry.dtype):
        raise ValueError(f"checkpoint: {key} must be of a floating or integer dtype, got {entry.dtype}")
    if entry.numel() * entry.element_size() != size:
        raise ValueError(f"checkpoint: {key} must hold {size} bytes, got {entry.numel() * entry.element_size()}")
    return _flat(entry).view(torch.uint8)


def _entry(tensors: Mapping[str, Tensor], prefix: str, name: str, dtype: torch.dtype, count: int) -> Tensor:
    key = f"{prefix}.{name}" if name != "SCB" else _int8_key(prefix, name)
    entry = _beside(tensors, prefix, key)
    if entry.dtype != dtype or entry.numel() != count:
        raise ValueError(f"checkpoint: {key} must be {dtype} [{count}], got {entry.dtype} {list(entry.shape)}")
    return _flat(entry)


def _scales(tensors: Mapping[str, Tensor], prefix: str, name: str, count: int) -> Tensor:
    scales = _entry(tensors, prefix, name, torch.float32, count)
    if not scales.is_meta and bool((scales < 0).any()):
        raise ValueError(f"checkpoint: the {name} of {prefix} must not be negative, got {float(scales.min())}")
    return scales


def _codebook(tensors: Mapping[str, Tensor], prefix: str, name: str, format: Format) -> Tensor:
    code = _entry(tensors, prefix, name, torch.float32, format.code.numel())
    # A last-bit difference may come from another writer's arithmetic; anything else is damage.
    if not code.is_meta and not torch.allclose(code.cpu(), format.code, rtol=1e-5, atol=1e-7):
        raise ValueError(f"checkpoint: {prefix}.{name} is not the codebook of {format.name}")
    return code


def _int8(tensors: Mapping[str, Tensor], prefix: str, device: torch.device, dtype: torch.dtype | None) -> QTensor:
    scale_key, layout_key = _int8_key(prefix, "SCB"), _int8_key(prefix, "weight_format")
    _refuse_surplus(tensors, prefix, {prefix, scale_key, layout_key})
    q = _plain(tensors, prefix)
    if q.dtype != torch.int8 or q.dim() == 0:
        raise ValueError(f"checkpoint: {prefix} must be int8 with rows, got {q.dtype} {list(q.shape)}")
    absmax = _scales(tensors, prefix, "SCB", math.prod(q.shape[:-1]))
    if layout_key in tensors:
        _check_weight_format(_beside(tensors, prefix, layout_key), layout_key)
    # int8 has no blocks; the field keeps the default so that two int8 tensors compare as the same layout.
    return assemble(
        q.contiguous().to(device), absmax.to(device), shape=q.shape, dtype=dtype or torch.float32, format="int8",
        block_size=64,
    )  # fmt: skip


def _check_weight_format(entry: Tensor, key: str) -> None:
    if entry.dtype != torch.uint8 or entry.numel() != 1:
        raise ValueError(f"checkpoint: {key} must be a uint8 scalar, got {entry.dtype} {list(entry.shape)}")
    if entry.is_meta:
        return
    number = int(entry)
    if number != 0:
        name = _WEIGHT_FORMATS.get(number, "unknown")
        raise ValueError(f"checkpoint: {key} must be 0 (rows), got {number} ({name}): save it again with bitsandbytes")
