"""QTensor: a quantized tensor that has the shape and dtype of the tensor it stands for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map

from polybit.formats import Format, get_format

aten = torch.ops.aten

# The dtypes that kernels read and write; any other floating dtype goes through fp32.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NESTED_BLOCK = 256

_INNER = ("q", "absmax", "code", "nested_absmax", "nested_code", "nested_offset")

# torch functions that read a QTensor without restoring all of it; functional.py fills this.
TORCH_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {}


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def check_block_size(block_size: int) -> None:
    """Raise ValueError unless `block_size` is a power of two, 16...4096."""
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise TypeError(f"block_size must be an int, got {type(block_size).__name__}")
    if not 16 <= block_size <= 4096 or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of two, 16...4096, got {block_size}")


class QTensor(Tensor):
    """A quantized tensor: a traceable wrapper with the logical shape and dtype, made of plain inner tensors.

    q              packed codes, uint8 [ceil(n * bits / 8)]; 8 bits: uint8, int8 format: int8, both of the logical shape
    absmax         one scale per block, fp32 [blocks], or uint8 codes of them (double quantization); int8: fp32 [rows]
    code           the value of each code, fp32; None for int8
    nested_absmax, nested_code, nested_offset   what restores a uint8 absmax, else None

    Operations that do not know it see the restored value; operations in place change that value and quantize it again.
    A view (`w[0]`, `w.t()`) is therefore a plain copy: what is written to it does not reach the QTensor.
    A change of floating dtype changes the logical dtype and nothing stored.
    """

    q: Tensor
    absmax: Tensor
    code: Tensor | None
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    nested_offset: Tensor | None
    format_name: str
    block_size: int
    search: bool

    @staticmethod
    def __new__(
        cls: type[QTensor],
        q: Tensor,
        absmax: Tensor,
        code: Tensor | None = None,
        nested_absmax: Tensor | None = None,
        nested_code: Tensor | None = None,
        nested_offset: Tensor | None = None,
        *,
        shape: torch.Size | tuple[int, ...],
        dtype: torch.dtype,
        format: str,
        block_size: int,
        search: bool = False,
    ) -> QTensor:
        out = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=q.device)
        out.q, out.absmax, out.code = q, absmax, code
        out.nested_absmax, out.nested_code, out.nested_offset = nested_absmax, nested_code, nested_offset
        out.format_name, out.block_size, out.search = format, block_size, search
        return out

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is left to do after __new__; the arguments are documented with the class."""

    @property
    def format(self) -> Format:
        """The format, looked up by name."""
        return get_format(self.format_name)

    @property
    def bits(self) -> int:
        """Bits per code."""
        return self.format.bits

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantized themselves."""
        return self.nested_absmax is not None

    @property
    def stored_bytes(self) -> int:
        """Bytes of all inner tensors."""
        return sum(inner.numel() * inner.element_size() for inner in self.inner_tensors().values())

    def inner_tensors(self) -> dict[str, Tensor]:
        """The inner tensors that are there, by name."""
        return {name: value for name in _INNER if (value := getattr(self, name)) is not None}

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The run of operands that ops on k-bit weights take: q absmax code nested_absmax nested_code nested_offset."""
        code = self.code
        if code is None:
            raise TypeError(f"operands: {self.format_name} has no codebook")
        return self.q, self.absmax, code, self.nested_absmax, self.nested_code, self.nested_offset

    def dequantize(self) -> Tensor:
        """The value as a plain tensor of the logical shape and dtype."""
        dtype = self.dtype if self.dtype in KERNEL_DTYPES else torch.float32
        ops = torch.ops.polybit
        kind = self.format.kind
        if kind == "kbit":
            y = ops.dequantize_kbit(*self.operands(), self.block_size, self.bits, 0, 0, dtype, list(self.shape))
        elif kind == "int8":
            y = ops.dequantize_int8(self.q, self.absmax, dtype)
        else:
            absmax = self.absmax
            if self.double_quant:
                absmax = ops.dequantize_absmax(
                    absmax, self.nested_absmax, self.nested_code, self.nested_offset, 0, 0, 0
                )
            y = ops.dequantize_blockwise(self.q, absmax, self.code, self.block_size, dtype)
        return cast(Tensor, y.to(self.dtype))

    def requantize(self, x: Tensor) -> QTensor:
        """`x` quantized the way this tensor is. x: the same shape, any floating dtype."""
        x = x.to(self.device, self.dtype if self.dtype in KERNEL_DTYPES else torch.float32).expand(self.shape)
        return quantize(
            x, self.format, block_size=self.block_size, double_quant=self.double_quant, search=self.search
        )._map(lambda inner: inner, self.dtype)

    def same_layout(self, other: Tensor) -> bool:
        """Whether the inner tensors of `other` fit this tensor one by one."""
        return (
            isinstance(other, QTensor)
            and (self.shape, self.format_name, self.block_size) == (other.shape, other.format_name, other.block_size)
            and self.double_quant == other.double_quant
        )

    def _map(self, f: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> QTensor:
        parts = {name: f(inner) for name, inner in self.inner_tensors().items()}
        return QTensor(**parts, shape=self.shape, dtype=dtype or self.dtype, **self._layout())

    def _layout(self) -> dict[str, Any]:
        return {"format": self.format_name, "block_size": self.block_size, "search": self.search}

    def _assign(self, other: QTensor) -> None:
        theirs = other.inner_tensors()
        for name, inner in self.inner_tensors().items():
            inner.copy_(theirs[name])

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return list(self.inner_tensors()), (self.dtype, self.format_name, self.block_size, self.search)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], meta: tuple[Any, ...], shape: Any, stride: Any) -> QTensor:
        dtype, format, block_size, search = meta
        return QTensor(**parts, shape=shape, dtype=dtype, format=format, block_size=block_size, search=search)

    def share_memory_(self) -> QTensor:
        """Move the inner tensors to shared memory. The wrapper itself has no storage that could be shared."""
        for inner in self.inner_tensors().values():
            inner.share_memory_()  # type: ignore[no-untyped-call]
        return self

    def is_shared(self) -> bool:
        """Whether the inner tensors are in shared memory."""
        return all(bool(inner.is_shared()) for inner in self.inner_tensors().values())  # type: ignore[no-untyped-call]

    def _stable_hash_for_caching(self) -> str:
        """What torch.compile keys its disk cache by: everything that a trace may depend on, no stored value."""
        inner = [(n, tuple(t.shape), t.stride(), t.dtype, t.device) for n, t in self.inner_tensors().items()]
        description = (self.__tensor_flatten__()[1], self.bits, tuple(self.shape), self.requires_grad, inner)
        return hashlib.sha256(repr(description).encode()).hexdigest()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        nested = ", double_quant" if self.double_quant else ""
        block = "" if self.format.kind == "int8" else f", block_size={self.block_size}"
        return f"QTensor({self.format_name}, {list(self.shape)}, {self.dtype}, device={self.device}{block}{nested})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = TORCH_FUNCTIONS.get(func)
        if handler is not None:
            result = handler(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and isinstance(args[0], QTensor):
            result = handler(func, args, kwargs)
            if result is not NotImplemented:
                return result
        return _on_values(func, args, kwargs)


def _on_values(func: Any, args: Any, kwargs: Any) -> Any:
    """Run `func` on restored values; quantize what it wrote to back into the tensors it was given."""
    written: list[tuple[QTensor, Tensor]] = []
    names = [argument.name for argument in func._schema.arguments]
    writes = {a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}

    def restore(value: Any, write: bool) -> Any:
        if not isinstance(value, QTensor):
            return value
        dense = value.dequantize()
        if write:
            written.append((value, dense))
        return dense

    dense_args = [tree_map(lambda v, w=n in writes: restore(v, w), a) for n, a in zip(names, args, strict=False)]
    dense_kwargs = {n: tree_map(lambda v, w=n in writes: restore(v, w), a) for n, a in kwargs.items()}
    result = func(*dense_args, **dense_kwargs)
    for target, dense in written:
        target._assign(target.requantize(dense))
    return tree_map(lambda value: next((t for t, dense in written if value is dense), value), result)


def _alias(func: Any, args: Any, kwargs: Any) -> Any:
    return return_and_correct_aliasing(func, args, kwargs, args[0]._map(func))  # type: ignore[no-untyped-call]


def _clone(func: Any, args: Any, kwargs: Any) -> Any:
    return args[0]._map(torch.clone)


def _to_copy(func: Any, args: Any, kwargs: Any) -> Any:
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented
    non_blocking = bool(kwargs.get("non_blocking", False))
    return args[0]._map(lambda t: t.to(device or t.device, non_blocking=non_blocking, copy=True), dtype)


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


def _copy(func: Any, args: Any, kwargs: Any) -> Any:
    if not args[0].same_layout(args[1]):
        return NotImplemented
    args[0]._assign(args[1])
    return args[0]


_HANDLERS: dict[Any, Callable[[Any, Any, Any], Any]] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.empty_like.default: _empty_like,
    aten.copy_.default: _copy,
}


def quantize(
    x: Tensor, format: str | Format, *, block_size: int = 64, double_quant: bool = True, search: bool = False
) -> QTensor:
    """Quantize `x`.

    x: fp32, fp16 or bf16, any shape, any device that is a backend's or the reference's. `format`: a name or a Format.
    `block_size`: elements per scale, a power of two, 16...4096 (int8 has one scale per row, of the last dimension, and
    ignores it and `double_quant`). `double_quant`: quantize the scales to 8 bits as well. `search`: choose each k-bit
    scale by least squared error; formats made for it (lloyd2, lloyd3) always do.

    Raises TypeError for another dtype, ValueError for an unknown format, a wrong block size, or a search that the
    format does not have.
    """
    format = get_format(format)
    check_block_size(block_size)
    if not isinstance(x, Tensor) or x.dtype not in KERNEL_DTYPES:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"quantize: x must be a tensor of fp32, fp16 or bf16, got {got}")
    if search and format.kind != "kbit":
        raise ValueError(f"quantize: the scale search is for k-bit formats, {format.name} has none")
    if isinstance(x, QTensor):
        x = x.dequantize()
    x = x.detach()
    search = search or format.search
    layout: dict[str, Any] = {"shape": x.shape, "dtype": x.dtype, "format": format.name, "search": search}
    if format.kind == "int8":
        if x.dim() == 0:
            raise ValueError("quantize: int8 needs at least one dimension")
        q, absmax, _ = torch.ops.polybit.quantize_int8(x, 0.0)
        return QTensor(q, absmax, block_size=block_size, **layout)
    code, thresholds, order = format.on(x.device)
    if format.kind == "kbit":
        q, absmax = torch.ops.polybit.quantize_kbit(x, code, thresholds, order, block_size, format.bits, int(search))
    else:
        q, absmax = torch.ops.polybit.quantize_blockwise(x, code, block_size)
    nested: tuple[Tensor, ...] = ()
    if double_quant:
        nested_code = get_format("dynamic8").on(x.device).code.clone()
        absmax, nested_absmax, nested_offset = torch.ops.polybit.quantize_absmax(absmax, nested_code)
        nested = (nested_absmax, nested_code, nested_offset)
    # The tables are shared between all users of the format, a tensor owns its copy.
    return QTensor(q, absmax, code.clone(), *nested, block_size=block_size, **layout)
