"""safetensors files, one tensor at a time, read and written without a whole file in memory.

The safetensors package maps a file and writes only what it is given at once. The format is small: 8 bytes (the size of
the header, little endian), a JSON header padded with spaces, {name: {dtype, shape, data_offsets}}, then the bytes of
the tensors without holes. https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 16 << 20
_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. dtype: as the format spells it, "BF16"; size: bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        """The entry of a tensor, which may be on the meta device."""
        return cls(_NAMES[tensor.dtype], tuple(tensor.shape), tensor.numel() * tensor.element_size())


class Reader:
    """A safetensors file: `entries` by name, in the order of the file; raises SafetensorError if it is damaged."""

    def __init__(self, path: Path) -> None:
        with safetensors.safe_open(path, framework="pt"):  # checks the header, and that offsets and file size fit
            pass
        self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115  closed by close()
        length = int.from_bytes(self._file.read(8), "little")
        header = json.loads(self._file.read(length))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self.entries: dict[str, Entry] = {}
        self._begin: dict[str, int] = {}
        for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
            begin, end = item["data_offsets"]
            self.entries[name] = Entry(item["dtype"], tuple(item["shape"]), end - begin)
            self._begin[name] = 8 + length + begin

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        self._file.seek(self._begin[name])
        view = _bytes(tensor)
        done = 0
        while done < entry.size:
            done += self._count(self._file.readinto(view[done : done + _CHUNK]))  # type: ignore[attr-defined]
        return tensor

    def chunks(self, name: str) -> Iterable[bytes]:
        """The bytes of the tensor, a few MB at a time."""
        self._file.seek(self._begin[name])
        left = self.entries[name].size
        while left:
            chunk = self._file.read(min(left, _CHUNK))
            left -= self._count(len(chunk))
            yield chunk

    def _count(self, count: int) -> int:
        if not count:
            raise safetensors.SafetensorError("the file became shorter while it was read")
        return count


class Writer:
    """Write a safetensors file tensor by tensor, in any order.

    `plan`: what will be written. Larger elements come first, so that every tensor is aligned. `tail`: names of `plan`
    whose size may turn out to be up to 64 bytes larger or smaller; they are small, kept in memory and come last.
    After the `with` block the file is complete and on disk, and `size` is the number of bytes of its tensors.
    """

    def __init__(
        self, path: Path, plan: Mapping[str, Entry], *, tail: Iterable[str] = (), metadata: Mapping[str, str] = {}
    ) -> None:
        self._metadata = dict(metadata)
        self._tail: dict[str, tuple[Entry, bytes] | None] = dict.fromkeys(tail)
        fixed = {name: entry for name, entry in plan.items() if name not in self._tail}
        self._entries = dict(sorted(fixed.items(), key=lambda pair: -_element_size(pair[1])))
        self._begin: dict[str, int] = {}
        self.size = 0
        for name, entry in self._entries.items():
            self._begin[name] = self.size
            self.size += entry.size
        self._left = set(fixed)
        # The header comes first in the file but is complete last: its place is reserved, with the tail at its largest.
        largest = {name: Entry("BOOL", (plan[name].size + 64,), plan[name].size + 64) for name in self._tail}
        length = len(self._header(self._entries | largest))
        self._length = length + -length % _ALIGNMENT
        self._file: BinaryIO = open(path, "wb", buffering=0)  # noqa: SIM115  closed by __exit__

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor; it must be what was planned under this name."""
        tensor = tensor.detach().cpu().contiguous()
        if name in self._tail:
            self._tail[name] = (Entry.of(tensor), bytes(_bytes(tensor)))
            return
        if Entry.of(tensor) != self._entries[name]:
            raise ValueError(f"{name}: planned {self._entries[name]}, got {Entry.of(tensor)}")
        self.write_bytes(name, [_bytes(tensor)])

    def write_bytes(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write the bytes of a tensor that has been planned."""
        self._file.seek(8 + self._length + self._begin[name])
        written = sum(self._write(chunk) for chunk in chunks)
        if written != self._entries[name].size:
            raise ValueError(f"{name}: planned {self._entries[name].size} bytes, got {written}")
        self._left.discard(name)

    def _write(self, chunk: bytes | memoryview) -> int:
        view, done = memoryview(chunk), 0
        while done < len(view):
            done += self._file.write(view[done:])
        return done

    def _finish(self) -> None:
        for name, item in self._tail.items():
            if item is None:
                self._left.add(name)
                continue
            self._entries[name], data = item
            self._begin[name] = self.size
            self._file.seek(8 + self._length + self.size)
            self.size += self._write(data)
        if self._left:
            raise ValueError(f"{sorted(self._left)[0]}: planned, but not written")
        header = self._header(self._entries)
        assert len(header) <= self._length
        self._file.seek(0)
        self._write(self._length.to_bytes(8, "little") + header.ljust(self._length))
        os.fsync(self._file.fileno())

    def _header(self, entries: Mapping[str, Entry]) -> bytes:
        header: dict[str, Any] = {"__metadata__": self._metadata} if self._metadata else {}
        offset = 0
        for name, entry in entries.items():
            end = offset + entry.size
            header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
            offset = end
        return json.dumps(header, separators=(",", ":")).encode()


def _element_size(entry: Entry) -> int:
    # For a dtype of less than a byte: 0, so that it cannot push anything off its alignment.
    return entry.size // max(math.prod(entry.shape), 1)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor. It must not outlive the tensor."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_ubyte * size).from_address(tensor.data_ptr() if size else ctypes.addressof(_NOTHING)))


_NOTHING = ctypes.c_ubyte()
