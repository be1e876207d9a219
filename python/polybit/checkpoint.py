"""QTensor to plain tensors and back: the layout of a checkpoint.

bitsandbytes' keys, generalised. For a parameter called P (as in "layer.weight"):

    P                    packed codes, uint8 [bytes, 1]
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
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from polybit.formats import Format, get_format
from polybit.qtensor import NESTED_BLOCK, QTensor, check_block_size, packed_bytes

_BITSANDBYTES = ("nf4", "fp4")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def _state_key(prefix: str, format: str) -> str:
    owner = "bitsandbytes" if format in _BITSANDBYTES else "polybit"
    return f"{prefix}.quant_state.{owner}__{format}"


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


def to_tensors(qtensor: QTensor, prefix: str) -> dict[str, Tensor]:
    """The plain tensors of a checkpoint, by key. They share storage with `qtensor`, the JSON apart."""
    format = qtensor.format
    q, absmax = qtensor.q.detach(), qtensor.absmax.detach()
    if format.kind == "int8":
        scalar = torch.zeros((), dtype=torch.uint8, device=q.device)
        return {prefix: q, _int8_key(prefix, "SCB"): absmax, _int8_key(prefix, "weight_format"): scalar}
    assert qtensor.code is not None
    out = {prefix: q.reshape(-1, 1), f"{prefix}.absmax": absmax, f"{prefix}.quant_map": qtensor.code.detach()}
    state: dict[str, Any] = {
        "quant_type": format.name,
        "blocksize": qtensor.block_size,
        "dtype": str(qtensor.dtype).removeprefix("torch."),
        "shape": list(qtensor.shape),
    }
    if qtensor.nested_absmax is not None and qtensor.nested_code is not None and qtensor.nested_offset is not None:
        out[f"{prefix}.nested_absmax"] = qtensor.nested_absmax.detach()
        out[f"{prefix}.nested_quant_map"] = qtensor.nested_code.detach()
        offset = 0.0 if q.is_meta else qtensor.nested_offset.item()
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    text = json.dumps(state).encode()
    device = "meta" if q.is_meta else "cpu"
    out[_state_key(prefix, format.name)] = torch.tensor(list(text), dtype=torch.uint8, device=device)
    return out


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
    entry is missing, surplus, or does not fit.
    """
    if prefix not in tensors:
        raise ValueError(f"checkpoint: {prefix} is missing")
    if _int8_key(prefix, "SCB") in tensors:
        return _int8(tensors, prefix, device, dtype)
    key, format = _find_state(tensors, prefix)
    state = _read_json(tensors[key], key)
    shape, count = _shape(state, key)
    block_size = state.get("blocksize")
    try:
        check_block_size(block_size)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(f"checkpoint: {key}: {error}") from None
    if state.get("quant_type") != format.name:
        raise ValueError(f"checkpoint: {key}: quant_type is {state.get('quant_type')!r}, the key says {format.name!r}")
    if state.get("dtype") not in _DTYPES:
        raise ValueError(f"checkpoint: {key}: dtype must be one of {', '.join(_DTYPES)}, got {state.get('dtype')!r}")

    assert isinstance(block_size, int)
    blocks = -(-count // block_size)
    nested = any(name.startswith("nested_") for name in state)
    device = tensors[prefix].device if device is None else device
    q = _codes(tensors[prefix], prefix, packed_bytes(count, format.bits)).to(device)
    if format.kind == "blockwise":
        q = q.reshape(shape)
    absmax = _entry(tensors, f"{prefix}.absmax", torch.uint8 if nested else torch.float32, blocks).to(device)
    code = _codebook(tensors, f"{prefix}.quant_map", format).to(device)
    expected = {prefix, key, f"{prefix}.absmax", f"{prefix}.quant_map"}
    extra: tuple[Tensor, ...] = ()
    if nested:
        extra = _nested(tensors, prefix, state, key, blocks, device)
        expected |= {f"{prefix}.nested_absmax", f"{prefix}.nested_quant_map"}
    if surplus := [name for name in owned_keys(tensors, prefix) if name not in expected]:
        raise ValueError(f"checkpoint: {prefix}: unexpected entry {surplus[0]}")
    return QTensor(
        q, absmax, code, *extra, shape=shape, dtype=dtype or _DTYPES[state["dtype"]], format=format.name,
        block_size=block_size, search=format.search,
    )  # fmt: skip


def _find_state(tensors: Mapping[str, Tensor], prefix: str) -> tuple[str, Format]:
    head = f"{prefix}.quant_state."
    keys = [key for key in tensors if key.startswith(head)]
    if len(keys) != 1:
        what = "is missing" if not keys else f"appears {len(keys)} times"
        raise ValueError(f"checkpoint: {head}<owner>__<format> {what}")
    name = keys[0].removeprefix(head).partition("__")[2]
    try:
        format = get_format(name)
    except ValueError as error:
        raise ValueError(f"checkpoint: {keys[0]}: {error}") from None
    if format.kind == "int8" or keys[0] != _state_key(prefix, name):
        raise ValueError(f"checkpoint: {keys[0]} is not a key that polybit or bitsandbytes writes")
    return keys[0], format


def _read_json(entry: Tensor, key: str) -> dict[str, Any]:
    if entry.is_meta:
        raise ValueError(f"checkpoint: {key} is on the meta device, its content is needed")
    if entry.dtype != torch.uint8 or entry.dim() != 1:
        raise ValueError(f"checkpoint: {key} must be uint8 with 1 dimension, got {entry.dtype} {list(entry.shape)}")
    try:
        state = json.loads(bytes(entry.tolist()))
    except ValueError as error:
        raise ValueError(f"checkpoint: {key} is not JSON: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint: {key} must hold a JSON object, got {type(state).__name__}")
    return state


def _shape(state: dict[str, Any], key: str) -> tuple[tuple[int, ...], int]:
    shape = state.get("shape")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"checkpoint: {key}: shape must be a list of sizes, got {shape!r}")
    count = 1
    for size in shape:
        count *= size
    return tuple(shape), count


def _codes(entry: Tensor, key: str, size: int) -> Tensor:
    # bitsandbytes' quant_storage may have viewed the bytes as another dtype.
    data = entry.detach().contiguous().reshape(-1).view(torch.uint8)
    if data.numel() != size:
        raise ValueError(f"checkpoint: {key} must hold {size} bytes, got {data.numel()}")
    return data


def _entry(tensors: Mapping[str, Tensor], key: str, dtype: torch.dtype, count: int) -> Tensor:
    if key not in tensors:
        raise ValueError(f"checkpoint: {key} is missing")
    entry = tensors[key].detach()
    if entry.dtype != dtype or entry.numel() != count:
        raise ValueError(f"checkpoint: {key} must be {dtype} [{count}], got {entry.dtype} {list(entry.shape)}")
    return entry.contiguous().reshape(-1)


def _codebook(tensors: Mapping[str, Tensor], key: str, format: Format) -> Tensor:
    code = _entry(tensors, key, torch.float32, format.code.numel())
    # A last-bit difference may come from another writer's arithmetic; anything else is damage.
    if not code.is_meta and not torch.allclose(code.cpu(), format.code, rtol=1e-5, atol=1e-7):
        raise ValueError(f"checkpoint: {key} is not the codebook of {format.name}")
    return code


def _nested(
    tensors: Mapping[str, Tensor], prefix: str, state: dict[str, Any], key: str, blocks: int,
    device: torch.device | str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    offset = state.get("nested_offset")
    if state.get("nested_blocksize") != NESTED_BLOCK or state.get("nested_dtype") != "float32":
        raise ValueError(f"checkpoint: {key}: nested_blocksize must be {NESTED_BLOCK} and nested_dtype float32")
    if isinstance(offset, bool) or not isinstance(offset, (int, float)):
        raise ValueError(f"checkpoint: {key}: nested_offset must be a number, got {offset!r}")
    absmax = _entry(tensors, f"{prefix}.nested_absmax", torch.float32, -(-blocks // NESTED_BLOCK))
    code = _codebook(tensors, f"{prefix}.nested_quant_map", get_format("dynamic8"))
    return absmax.to(device), code.to(device), torch.tensor(offset, dtype=torch.float32, device=device)


def _int8(
    tensors: Mapping[str, Tensor], prefix: str, device: torch.device | str | None, dtype: torch.dtype | None
) -> QTensor:
    q = tensors[prefix].detach()
    if q.dtype != torch.int8 or q.dim() == 0:
        raise ValueError(f"checkpoint: {prefix} must be int8 with rows, got {q.dtype} {list(q.shape)}")
    rows = q.numel() // q.shape[-1] if q.shape[-1] else 0
    absmax = _entry(tensors, _int8_key(prefix, "SCB"), torch.float32, rows)
    layout = tensors.get(_int8_key(prefix, "weight_format"))
    if layout is not None and (layout.numel() != 1 or (not layout.is_meta and int(layout) != 0)):
        raise ValueError(f"checkpoint: {_int8_key(prefix, 'weight_format')} must be 0 (rows)")
    expected = (prefix, _int8_key(prefix, "SCB"), _int8_key(prefix, "weight_format"))
    if surplus := [key for key in owned_keys(tensors, prefix) if key not in expected]:
        raise ValueError(f"checkpoint: {prefix}: unexpected entry {surplus[0]}")
    device = q.device if device is None else device
    # int8 has no blocks; the field keeps the default so that two int8 tensors compare as the same layout.
    return QTensor(
        q.contiguous().to(device), absmax.to(device), shape=q.shape, dtype=dtype or torch.float32, format="int8",
        block_size=64,
    )  # fmt: skip
