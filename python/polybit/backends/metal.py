"""The backend ``mps``: core/kernels on Apple GPUs, dispatched by torch on its own stream.

``libpolybit_mps`` runs the launchers that every backend has, and writes down what they launch: a kernel's name, its
arguments, groups and threads. Here that becomes two calls of ``torch.mps``'s shaders: one writes the arguments, with
the addresses of their tensors, into a buffer; the next is the kernel.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from polybit import _C
from polybit.backends.base import Kernel, Unsupported

_TENSORS = 28  # as in backends/mps/record.cpp
_WORDS = 512
_BIND_GROUP = 32
_OK, _UNSUPPORTED, _SCRATCH = 0, 1, 2
# Their results are tensors of the host, which a launcher writes at once.
_HOST_RESULTS = ("pack_size_kbit",)
_DTYPES = {  # DLPack's code and bits
    torch.float32: (2, 32),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.uint8: (1, 8),
    torch.int8: (0, 8),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.bool: (6, 8),
}


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _TensorList(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int64), ("tensors", ctypes.c_void_p))


class _Context(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint64),
        ("stream", ctypes.c_void_p),
        ("device_index", ctypes.c_int64),
        ("error", ctypes.c_void_p),
        ("error_size", ctypes.c_uint64),
        ("scratch", ctypes.c_void_p),
        ("scratch_size", ctypes.c_uint64),
        ("scratch_needed", ctypes.c_uint64),
        ("thread_count", ctypes.c_uint64),
        ("parallel_for", ctypes.c_void_p),
        ("deterministic", ctypes.c_uint64),
    )


class _Op(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("kinds", ctypes.c_char_p))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("groups", ctypes.c_int64),
        ("group_dim", ctypes.c_int64),
        ("word_count", ctypes.c_int64),
        ("tensor_count", ctypes.c_int64),
        ("words", ctypes.c_int64 * _WORDS),
        ("slots", ctypes.c_uint8 * _WORDS),
        ("tensors", ctypes.c_int64 * _TENSORS),
    )


class _Field(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("place", ctypes.c_int64))


def _layout() -> list[tuple[str, int]]:
    """Sizes of structures and places of their fields, as polybit_metal_field() of the library has them."""
    structures: tuple[type[ctypes.Structure], ...] = (_DLTensor, _TensorList, _Context, _Op, _Launch)
    found = []
    for structure in structures:
        found.append(("", ctypes.sizeof(structure)))
        found += [(name, getattr(structure, name).offset) for name, *_ in structure._fields_]
    return found


@dataclass(frozen=True)
class Launch:
    """A kernel to be dispatched: of its arguments, numbers (slot 0), or bytes into a tensor (slot - 1)."""

    kernel: str
    groups: int
    group_dim: int
    words: list[int]
    slots: list[int]
    tensors: list[torch.Tensor]


class _Arguments:
    """The slots of an op's argument struct; keeps alive what they point to."""

    def __init__(self, kinds: str, args: Sequence[Any], outs: Sequence[torch.Tensor], host_results: bool) -> None:
        self.tensors: list[torch.Tensor] = []
        self.described: list[_DLTensor] = []
        self._kept: list[Any] = []
        self._device: torch.device | None = None
        given, results = iter(args), iter(outs)
        value: Any
        slots = []
        for kind in kinds:
            value = next(results if kind == "o" else given)
            if kind in "ds":
                continue
            if kind == "n":
                slots.append(int(value))
            elif kind == "f":
                slots.append(int.from_bytes(ctypes.c_double(value), "little", signed=True))
            elif kind in "IM":
                slots.append(self._list(value, kind))
            elif value is None:
                slots.append(0)
            elif kind == "o" and host_results:
                slots.append(ctypes.addressof(self._describe(value, value.data_ptr())))
            else:
                slots.append(ctypes.addressof(self._add(value, kind)))
        self.slots = (ctypes.c_int64 * len(slots))(*slots)
        self.pointers = (ctypes.c_void_p * len(self.described))(*map(ctypes.addressof, self.described))

    def _list(self, tensors: Sequence[torch.Tensor], kind: str) -> int:
        addresses = [ctypes.addressof(self._add(tensor, kind)) for tensor in tensors]
        array = (ctypes.c_void_p * len(addresses))(*addresses)
        described = _TensorList(len(addresses), ctypes.addressof(array))
        self._kept += (array, described)
        return ctypes.addressof(described)

    def _add(self, tensor: torch.Tensor, kind: str) -> _DLTensor:
        if self._device is None:
            self._device = tensor.device
        if tensor.device != self._device:
            raise ValueError(f"all tensors must be on one device, got {self._device}, {tensor.device}")
        if not tensor.is_contiguous():
            if kind in "mM":
                raise Unsupported("a tensor changed in place must be contiguous")
            tensor = tensor.contiguous()
        described = self._describe(tensor, 0)
        self.tensors.append(tensor)
        self.described.append(described)
        return described

    def _describe(self, tensor: torch.Tensor, data: int) -> _DLTensor:
        if tensor.dtype not in _DTYPES:
            raise Unsupported(f"the dtype {tensor.dtype}")
        code, bits = _DTYPES[tensor.dtype]
        shape = (ctypes.c_int64 * tensor.dim())(*tensor.shape)
        offset = 0 if data else tensor.storage_offset() * tensor.element_size()
        described = _DLTensor(data or None, 8, 0, tensor.dim(), code, bits, 1, shape, None, offset)
        self._kept += (shape, described)
        return described


def _listed(function: Any, structure: type[ctypes.Structure]) -> Iterator[tuple[str, Any]]:
    """What a function of the library gives for 0, 1, ...: a name and a string or number, until the name is null."""
    function.argtypes, function.restype = (ctypes.c_int64,), structure
    for index in itertools.count():
        name, value = (getattr(function(index), field) for field, *_ in structure._fields_)
        if name is None:
            return
        yield name.decode(), value.decode() if isinstance(value, bytes) else value


class Recorder:
    """``libpolybit_mps``: what the launchers would launch.

    Raises:
        OSError: the library cannot be loaded.
        RuntimeError: it was built for another op table, or from other structures than those above.
    """

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        library.polybit_metal_abi.restype = ctypes.c_uint64
        built: int = library.polybit_metal_abi()
        if built != _C.abi:
            raise RuntimeError(f"{path}: built for op table {built:016x}, but this polybit has {_C.abi:016x}")
        fields = [(name.rpartition(".")[2], place) for name, place in _listed(library.polybit_metal_field, _Field)]
        if fields != _layout():
            raise RuntimeError(f"{path}: its structures are not those of {__name__}")
        self.ops: list[tuple[str, str]] = list(_listed(library.polybit_metal_op, _Op))
        self._record = library.polybit_metal_record
        self._record.restype = ctypes.c_int32

    def launches(
        self, index: int, args: Sequence[Any], outs: Sequence[torch.Tensor], deterministic: bool
    ) -> list[Launch]:
        """The launches of op ``index`` of the table, with arguments in schema order and outputs allocated.

        Raises:
            Unsupported: this backend has no kernel for such arguments.
            RuntimeError: the op failed; ValueError: tensors on several devices.
        """
        name, kinds = self.ops[index]
        arguments = _Arguments(kinds, args, outs, name in _HOST_RESULTS)
        error = ctypes.create_string_buffer(512)
        context = _Context(ctypes.sizeof(_Context), error=ctypes.addressof(error), error_size=len(error))
        context.deterministic = deterministic
        found, count = ctypes.POINTER(_Launch)(), ctypes.c_int64()
        tensors = arguments.tensors
        while True:
            status = self._record(
                ctypes.c_int64(index),
                ctypes.byref(context),
                arguments.slots,
                arguments.pointers,
                ctypes.c_int64(len(arguments.tensors)),
                ctypes.byref(found),
                ctypes.byref(count),
            )
            if status != _SCRATCH:
                break
            if context.scratch_needed <= context.scratch_size:
                raise RuntimeError(f"{name} (mps): asked for scratch that it already had")
            context.scratch_size = context.scratch_needed
            scratch = torch.empty(context.scratch_size, dtype=torch.uint8, device=arguments.tensors[0].device)
            tensors = [*arguments.tensors, scratch]
        if status != _OK:
            problem = Unsupported if status == _UNSUPPORTED else RuntimeError
            raise problem(f"{name} (mps): {error.value.decode()}")
        return [_read(found[i], tensors) for i in range(count.value)]


def _read(launch: _Launch, tensors: Sequence[torch.Tensor]) -> Launch:
    count = -(-launch.word_count // _BIND_GROUP) * _BIND_GROUP  # those behind the end are 0
    return Launch(
        launch.kernel.decode(),
        launch.groups,
        launch.group_dim,
        launch.words[:count],
        launch.slots[:count],
        [tensors[i] for i in launch.tensors[: launch.tensor_count]],
    )


def dispatch(shaders: Any, launch: Launch, device: torch.device) -> None:
    """Enqueue one launch on torch's stream. ``shaders`` is what ``torch.mps.compile_shader`` returns."""
    words = torch.empty(len(launch.words), dtype=torch.int64, device=device)
    tensors = [tensor if tensor.numel() else words for tensor in launch.tensors]  # an empty one has no buffer
    shaders.bind_arguments(
        words,
        launch.words,
        launch.slots,
        *tensors,
        *[words] * (_TENSORS - len(tensors)),
        threads=len(launch.words),
        group_size=_BIND_GROUP,
        arg_casts={2: "uint8"},
    )
    # The kernel finds its tensors through words; they are bound for Metal to keep them in memory and in order.
    kernel = getattr(shaders, launch.kernel)
    kernel(words, *tensors, threads=launch.groups * launch.group_dim, group_size=launch.group_dim)


class MetalBackend:
    """See :class:`polybit.backends.base.Backend`. ``load`` gives the shaders when the first op comes."""

    def __init__(
        self, recorder: Recorder, load: Callable[[], Any], *, name: str, device_type: str, origin: str, reason: str = ""
    ) -> None:
        self.name, self.device_type, self.origin, self.reason = name, device_type, origin, reason
        self._recorder, self._load, self._shaders = recorder, load, None
        self.ops: dict[str, Kernel] = {op: self._kernel(index) for index, (op, _) in enumerate(recorder.ops)}

    def _kernel(self, index: int) -> Kernel:
        def run(stream: int, args: tuple[Any, ...], outs: tuple[Any, ...]) -> None:
            from polybit.backends.selection import deterministic  # which imports this module

            launches = self._recorder.launches(index, args, outs, deterministic())
            if launches and self._shaders is None:
                self._shaders = self._load()
            for launch in launches:
                dispatch(self._shaders, launch, launch.tensors[0].device)

        return run


def load_shaders(folder: Path) -> Any:
    """The kernels: ``polybit.metallib`` where the package has one that this torch can load, else compiled now."""
    library = folder / "polybit.metallib"
    if library.exists() and hasattr(torch.mps, "load_metallib"):
        return torch.mps.load_metallib(library)  # type: ignore[no-untyped-call]
    return torch.mps.compile_shader((folder / "polybit.metal").read_text(encoding="utf-8"))


def load_metal(path: Path) -> MetalBackend:
    """The backend of a ``libpolybit_mps`` and the kernels beside it."""
    reason = ""
    if not torch.backends.mps.is_available():
        reason = "torch sees no Apple GPU (torch.backends.mps.is_available() is False)"
    elif not hasattr(torch.mps, "compile_shader"):
        reason = f"torch {torch.__version__} has no torch.mps.compile_shader: 2.7 or later is wanted"
    return MetalBackend(
        Recorder(path),
        lambda: load_shaders(path.parent),
        name="mps",
        device_type="mps",
        origin=str(path),
        reason=reason,
    )
