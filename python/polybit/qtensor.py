"""QTensor: a quantized tensor that has the shape and dtype of the tensor it stands for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from polybit.formats import Format, get_format

# The dtypes that kernels read and write; any other floating dtype goes through fp32.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NESTED_BLOCK = 256

# What the rows of a tensor share: the codebooks and the scales of scales.
TABLES = ("code", "nested_absmax", "nested_code", "nested_offset")
_INNER = ("q", "absmax", *TABLES)

# torch functions on a QTensor: handler(*args, **kwargs), NotImplemented for what torch does; functional.py and
# tensor_ops.py fill this.
TORCH_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {}
# aten operations on the stored form: handler(func, args, kwargs), NotImplemented for the restored value instead;
# tensor_ops.py fills this.
ATEN_FUNCTIONS: dict[Any, Callable[[Any, Any, Any], Any]] = {}


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def check_block_size(block_size: int) -> None:
    """Raise ValueError unless `block_size` is a power of two, 16...4096."""
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise TypeError(f"block_size must be an int, got {type(block_size).__name__}")
    if not 16 <= block_size <= 4096 or block_size & (block_size - 1):
        raise ValueError(f"block_size must be a power of two, 16...4096, got {block_size}")


def check_flags(**flags: bool) -> None:
    """Raise TypeError unless every option is True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {flag!r}")


def state_name(format: str) -> str:
    """<owner>__<format>: what a checkpoint calls the description of a tensor of this format."""
    owner = "bitsandbytes" if format in ("nf4", "fp4") else "polybit"
    return f"{owner}__{format}"


class QTensor(Tensor):
    """A quantized tensor: a traceable wrapper with the logical shape and dtype, made of plain inner tensors.

    q
        packed codes, uint8 [*shape[:-1], bytes of a row] where rows hold whole blocks, else [bytes]; 8 bits: uint8,
        int8 format: int8, both of the logical shape
    absmax
        one scale per block, fp32 [*shape[:-1], blocks of a row] or [blocks], or uint8 codes of them (double
        quantization); int8: one per row, fp32 shape[:-1]
    code
        the value of each code, fp32; None for int8
    nested_absmax, nested_code, nested_offset
        what restores a uint8 absmax, else None
    block_offset
        the place of the first block among those that were quantized together, which a doubly quantized tensor needs to
        be read; None: not known (a shard, what new_zeros gives)
    cut_from
        elements of the tensor that this one is a part of; None: it is whole

    Row cuts (`w[3:7]`, narrow, split, chunk, unbind, `w[0]`) and reshapes are views: they share q and absmax. A cut
    inside a block raises ValueError. Operations that do not know a QTensor see the restored value; operations in place
    change that value and quantize it again, and so do `w[...] = x` and `w.data = x`. Any other view (`w.t()`,
    `w[:, 2:]`) is therefore a plain copy: what is written to it does not reach the QTensor. A change of floating dtype
    changes the logical dtype and nothing stored. A part of a doubly quantized tensor shares scales of scales with the
    rest, so it takes bytes (copy_ of the same part) but no new values.
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
    block_offset: int | None
    cut_from: int | None

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
        block_offset: int | None = 0,
        cut_from: int | None = None,
    ) -> QTensor:
        out = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=q.device)
        out.q, out.absmax, out.code = q, absmax, code
        out.nested_absmax, out.nested_code, out.nested_offset = nested_absmax, nested_code, nested_offset
        out.format_name, out.block_size, out.search = format, block_size, search
        out.block_offset, out.cut_from = block_offset, cut_from
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

    @property
    def tables(self) -> dict[str, Any]:
        """What all rows share, by name: the codebook and the scales of scales, as far as there are any."""
        return {name: value for name in TABLES if (value := getattr(self, name)) is not None}

    @property
    def block_length(self) -> int:
        """Elements per scale: the block size; int8: the length of a row."""
        if self.format.kind != "int8":
            return self.block_size
        count, rows = self.numel(), self.absmax.numel()
        return count // rows if count and rows else max(self.shape[-1], 1)

    # The names of a checkpoint, by which torch.distributed.checkpoint looks for the owner of each entry.
    @property
    def quant_map(self) -> Tensor | None:
        """`code`, under the name that it has in a checkpoint."""
        return self.code

    @property
    def nested_quant_map(self) -> Tensor | None:
        """`nested_code`, under the name that it has in a checkpoint."""
        return self.nested_code

    @property
    def quant_state(self) -> SimpleNamespace:
        """Has the one attribute `<owner>__<format>` of a checkpoint: this tensor."""
        return SimpleNamespace(**{state_name(self.format_name): self})

    @property
    def place(self) -> int:
        """`block_offset`, for an op. Raises ValueError if it is not known."""
        if self.block_offset is None:
            raise ValueError(
                "QTensor: this shard of a doubly quantized tensor does not know its place in the whole; gather it "
                "first: FSDPModule.unshard() or polybit.distributed.gather(weight)"
            )
        return self.block_offset

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The run of operands that ops on k-bit weights take: q absmax code nested_absmax nested_code nested_offset."""
        code = self.code
        if code is None:
            raise TypeError(f"operands: {self.format_name} has no codebook")
        return self.q, self.absmax, code, self.nested_absmax, self.nested_code, self.nested_offset

    def dequantize(self) -> Tensor:
        """The value as a plain tensor of the logical shape and dtype. Raises ValueError for a shard without place."""
        dtype = self.dtype if self.dtype in KERNEL_DTYPES else torch.float32
        ops, kind, place, shape = torch.ops.polybit, self.format.kind, self.place, self.shape
        if kind == "kbit":
            y = ops.dequantize_kbit(*self.operands(), self.block_size, self.bits, place, 0, dtype, list(shape))
        elif kind == "int8":
            rows = self.q.view(-1, self.block_length) if self.numel() else self.q
            y = ops.dequantize_int8(rows, self.absmax, dtype).view(shape)
        else:
            absmax = self.absmax
            if self.double_quant:
                nested = self.nested_absmax, self.nested_code, self.nested_offset
                absmax = ops.dequantize_absmax(absmax, *nested, place, 0, 0)
            y = ops.dequantize_blockwise(self.q, absmax, self.code, self.block_size, dtype)
        return cast(Tensor, y.to(self.dtype))

    def requantize(self, x: Tensor) -> QTensor:
        """`x` quantized the way this tensor is. x: the same shape, any floating dtype.

        Raises ValueError for a part of a doubly quantized tensor.
        """
        if self.double_quant and not self.is_whole:
            raise ValueError(
                "QTensor: a part of a doubly quantized tensor takes no new values, its scales of scales belong to "
                "other rows, too; dequantize() the whole, change that, and copy_ it back"
            )
        x = x.to(self.device, self.dtype if self.dtype in KERNEL_DTYPES else torch.float32).expand(self.shape)
        new = quantize(x, self.format, block_size=self.block_size, double_quant=self.double_quant, search=self.search)
        return new._map(lambda inner: inner, self.dtype)

    @property
    def is_whole(self) -> bool:
        """Whether this is all that was quantized together, rather than a row view, a piece or a shard of it."""
        return self.cut_from is None and self.block_offset == 0

    def same_layout(self, other: Tensor) -> bool:
        """Whether the inner tensors of `other` fit this tensor one by one."""
        return (
            isinstance(other, QTensor)
            and (self.shape, self.format_name, self.block_size) == (other.shape, other.format_name, other.block_size)
            and self.double_quant == other.double_quant
        )

    def cut(self, start: int, stop: int) -> QTensor:
        """Rows start...stop (of the first dimension) as a view. Raises ValueError if that cuts a block."""
        rows, block = self.shape[0], self.block_length
        if (start, stop) == (0, rows):
            return self._map(lambda inner: inner)
        row = math.prod(self.shape[1:])
        vector = self.dim() == 1  # its "rows" are elements
        if start * row % block or (stop * row % block and stop != rows) or (row % block and not vector):
            raise ValueError(
                f"QTensor: rows {start}:{stop} of {list(self.shape)} cut inside a block of {block} elements; "
                f"dequantize() first, or choose a block size that divides the row"
            )
        first, last = start * row // block, -(-stop * row // block)
        q = self.q.view(-1)[start * row * self.bits // 8 : packed_bytes(stop * row, self.bits)]
        absmax = self.absmax.view(-1)[first:last]
        layout = self.form
        if self.double_quant and self.block_offset is not None:
            layout["block_offset"] = self.block_offset + first
        layout["cut_from"] = self.numel() if self.cut_from is None else self.cut_from
        return assemble(q, absmax, **self.tables, shape=(stop - start, *self.shape[1:]), dtype=self.dtype, **layout)

    def reshaped(self, shape: tuple[int, ...]) -> QTensor:
        """A view of another shape. The blocks stay where they are, in row-major order."""
        return assemble(self.q, self.absmax, **self.tables, shape=shape, dtype=self.dtype, **self.form)

    def _map(self, f: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> QTensor:
        parts = {name: f(inner) for name, inner in self.inner_tensors().items()}
        return QTensor(**parts, shape=self.shape, dtype=dtype or self.dtype, **self.form)

    @property
    def form(self) -> dict[str, Any]:
        """How the stored parts are to be read, as keyword arguments of the class; without shape and dtype."""
        return {
            "format": self.format_name,
            "block_size": self.block_size,
            "search": self.search,
            "block_offset": self.block_offset,
            "cut_from": self.cut_from,
        }

    def assign(self, other: QTensor, *, tables: bool = True) -> None:
        """Copy the stored bytes of `other`, which has the same layout; with or without what all rows share."""
        theirs = other.inner_tensors()
        for name, inner in self.inner_tensors().items():
            if tables or name not in TABLES:
                inner.copy_(theirs[name])

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Any, ...]]:
        return list(self.inner_tensors()), (self.dtype, *self.form.values())

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], meta: tuple[Any, ...], shape: Any, stride: Any) -> QTensor:
        dtype, format, block_size, search, block_offset, cut_from = meta
        return QTensor(
            **parts, shape=shape, dtype=dtype, format=format, block_size=block_size, search=search,
            block_offset=block_offset, cut_from=cut_from,
        )  # fmt: skip

    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, Tensor], QTensor]:
        """FSDP2: what the ranks exchange, bytes and scales, padded to the rows of the first rank; and this shard.

        It has the signature with the mesh alone because FSDP2 wants the padded logical shape of the other one.
        """
        count = self.numel() if self.cut_from is None else self.cut_from
        q, absmax = self.q.view(-1), self.absmax.view(-1)
        missing = packed_bytes(count, self.bits) - q.numel()
        if missing:
            q = torch.nn.functional.pad(q, (0, missing))
            absmax = torch.nn.functional.pad(absmax, (0, count // self.block_length - absmax.numel()))
        return (q, absmax), self

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], shard: QTensor, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[QTensor, tuple[Tensor, ...]] | None:
        """FSDP2: the whole weight, on the storage of `outputs`. `out`: the one made before, whose storage is refilled.

        FSDP2 frees that storage between uses and cuts off the rows of the padding. A mesh of one rank exchanges
        nothing: torch then copies the first of what fsdp_pre_all_gather gave, and the shard is the whole.
        """
        q, absmax = outputs if len(outputs) == 2 else (*outputs, shard.absmax)
        if out is not None:
            gathered = out if isinstance(out, QTensor) else out.to_local()  # type: ignore[attr-defined]
            # The shard's may be others since then: it was loaded or moved.
            for name in TABLES if len(outputs) == 2 else ("absmax", *TABLES):
                setattr(gathered, name, getattr(shard, name))
            return None
        rows = q.numel() * 8 // shard.bits // max(math.prod(shard.shape[1:]), 1)
        layout = shard.form | {"block_offset": 0, "cut_from": None}
        shape = (rows, *shard.shape[1:])
        return assemble(q, absmax, **shard.tables, shape=shape, dtype=param_dtype, **layout), ()

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
        return _dispatch(func, args, kwargs or {})


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    handler = ATEN_FUNCTIONS.get(func)
    result = NotImplemented
    if handler is not None and args and isinstance(args[0], QTensor):
        if torch.is_inference_mode_enabled():
            # A view of a normal tensor is a normal tensor, in that mode, too.
            with torch.inference_mode(args[0].is_inference()):
                result = handler(func, args, kwargs)
        else:
            result = handler(func, args, kwargs)
    elif handler is not None and args and isinstance(args[0], (list, tuple)):
        result = handler(func, args, kwargs)
    elif torch.is_inference_mode_enabled():
        # Operations made of others (reshape, chunk) come in one piece here; elsewhere torch takes them apart itself.
        result = func.decompose(*args, **kwargs)
    return _on_values(func, args, kwargs) if result is NotImplemented else result


def _on_values(func: Any, args: Any, kwargs: Any) -> Any:
    """Run `func` on restored values; quantize what it wrote to back into the tensors it was given."""
    if func.namespace == "c10d":  # these write without saying so
        raise NotImplementedError(f"QTensor: {func} is not supported; use a collective on its inner_tensors()")
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
        target.assign(target.requantize(dense))
    return tree_map(lambda value: next((t for t, dense in written if value is dense), value), result)


def assemble(
    q: Tensor,
    absmax: Tensor,
    code: Tensor | None = None,
    nested_absmax: Tensor | None = None,
    nested_code: Tensor | None = None,
    nested_offset: Tensor | None = None,
    *,
    shape: torch.Size | tuple[int, ...],
    format: str,
    block_size: int,
    **layout: Any,
) -> QTensor:
    """A QTensor of stored parts, where q and absmax may have any shape: they are viewed in the one that belongs."""
    kind, bits = get_format(format).kind, get_format(format).bits
    *rows, last = shape or (1,)
    aligned = len(shape) > 0 and last > 0 and last % block_size == 0
    if kind == "kbit":
        q = q.view(*rows, last * bits // 8) if aligned else q.view(-1)
    else:
        q = q.view(shape)
    if kind == "int8":
        absmax = absmax.view(rows) if absmax.numel() == math.prod(rows) else absmax.view(-1)
    else:
        absmax = absmax.view(*rows, last // block_size) if aligned else absmax.view(-1)
    return QTensor(
        q, absmax, code, nested_absmax, nested_code, nested_offset,
        shape=shape, format=format, block_size=block_size, **layout,
    )  # fmt: skip


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
    if x.layout != torch.strided:
        raise TypeError(f"quantize: x must be dense, got {x.layout}: use x.to_dense()")
    check_flags(double_quant=double_quant, search=search)
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
        return assemble(q, absmax, block_size=block_size, **layout)
    code, thresholds, order = format.on(x.device)
    if format.kind == "kbit":
        q, absmax = torch.ops.polybit.quantize_kbit(x, code, thresholds, order, block_size, format.bits, int(search))
    else:
        q, absmax = torch.ops.polybit.quantize_blockwise(x, code, block_size)
    # The tables are shared between all users of the format, a tensor owns its copy.
    out = assemble(q, absmax, code.clone(), block_size=block_size, **layout)
    return quantize_scales(out) if double_quant else out


def quantize_scales(weight: QTensor) -> QTensor:
    """Double quantization of a tensor without it: the same codes, the scales [blocks] in 8 bits."""
    nested_code = get_format("dynamic8").on(weight.q.device).code.clone()
    absmax, nested_absmax, nested_offset = torch.ops.polybit.quantize_absmax(weight.absmax.view(-1), nested_code)
    return assemble(
        weight.q, absmax, weight.code, nested_absmax, nested_code, nested_offset,
        shape=weight.shape, dtype=weight.dtype, **weight.form,
    )  # fmt: skip


# torch.load(weights_only=True) may make QTensors: they hold tensors, numbers and a format's name.
torch.serialization.add_safe_globals([QTensor])
