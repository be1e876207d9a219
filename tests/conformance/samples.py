"""Write the specification's samples with their expected outputs, for the conformance program.

``python tests/conformance/samples.py FILE [--ops OP ...] [--every N]``

The file lets a backend be held to the specification where there is neither Python nor torch: cross-compiled, on a
device, under sanitizers. Every number is eight bytes, little-endian::

    file      "polybit1"  PB_ABI  count  sample ...
    sample    op  id  compare  rtol  atol  argument ...  expected ...
    text      length  bytes                                  (op, id)
    argument  in the order of core/ops.def, without OUT, DTYPE and SHAPE:
              INT int64, FLOAT double, else a list of tensors (an OPT that is None: none)
    expected  a list of tensors for each OUT, then for each MUTS
    list      count  tensor ...
    tensor    code  bits  ndim  size ...  length  bytes      (code, bits: those of DLDataType; row-major)

compare: 0 by the tolerances, 1 equal bits but any NaN for a NaN, 2 equal bits.
"""

from __future__ import annotations

import argparse
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polybit import _C
from polybit.ops import ROWS
from polybit.spec import OPS, Op, Sample
from polybit.testing import EXACT_NAN

# torch dtype -> (code, bits) of DLDataType.
_DTYPES = {
    torch.int8: (0, 8),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.uint8: (1, 8),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.bfloat16: (4, 16),
}


def write(path: Path, ops: Iterable[str] = OPS, *, every: int = 1) -> Counter[str]:
    """Write every n-th sample of each op, with what the reference makes of it; returns how many of each."""
    written: Counter[str] = Counter()
    records = []
    for op, sample in _select(ops, every):
        records.append(_record(OPS[op], sample))
        written[op] += 1
    path.write_bytes(b"polybit1" + struct.pack("<QQ", _C.abi, len(records)) + b"".join(records))
    return written


def _select(ops: Iterable[str], every: int) -> Iterator[tuple[str, Sample]]:
    for op in ops:
        for sample in islice(OPS[op].samples("cpu"), 0, None, every):
            yield op, sample


def _record(op: Op, sample: Sample) -> bytes:
    kinds = [kind for kind, _ in ROWS[op.name].inputs]
    # The reference changes its lists in place.
    args = [[x.clone() for x in a] if kind == "MUTS" else a for kind, a in zip(kinds, sample.args, strict=True)]
    expected = [[out] for out in op.reference(*args)]
    expected += [args[i] for i, kind in enumerate(kinds) if kind == "MUTS"]
    compare = 0 if sample.rtol is not None else 2 if op.name in EXACT_NAN else 1
    head = _text(op.name) + _text(sample.id) + struct.pack("<Qdd", compare, sample.rtol or 0.0, sample.atol)
    given = map(_argument, kinds, sample.args)
    return head + b"".join(given) + b"".join(map(_tensors, expected))


def _argument(kind: str, value: Any) -> bytes:
    if kind in ("DTYPE", "SHAPE"):
        return b""
    if kind in ("INT", "FLOAT"):
        return struct.pack("<q" if kind == "INT" else "<d", value)
    if kind in ("INS", "MUTS"):
        return _tensors(value)
    return _tensors([] if value is None else [value])


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _tensors(tensors: Sequence[Tensor]) -> bytes:
    return struct.pack("<Q", len(tensors)) + b"".join(_tensor(x) for x in tensors)


def _tensor(x: Tensor) -> bytes:
    data = x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    shape = struct.pack(f"<Q{x.dim()}q", x.dim(), *x.shape)
    return struct.pack("<QQ", *_DTYPES[x.dtype]) + shape + struct.pack("<Q", len(data)) + data


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--ops", nargs="+", choices=sorted(OPS), default=list(OPS), metavar="OP")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every N-th sample of each op")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the samples are small: a pool costs more than it gives
    count = write(options.file, options.ops, every=options.every)
    print(f"{count.total()} samples, {options.file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
