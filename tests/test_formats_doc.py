"""docs/formats.md says what the code does. `python tests/test_formats_doc.py` rewrites its generated parts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from polybit import checkpoint
from polybit.formats import get_format, list_formats
from polybit.qtensor import quantize

DOC = Path(__file__).parents[1] / "docs" / "formats.md"
BLOCKS = [16, 32, 64, 128, 256, 4096]


def layout(bits: int) -> str:
    """Which bit of which element lies where, found by setting one bit of one code at a time."""
    code = get_format(f"nf{bits}").code
    count = {2: 4, 3: 8, 4: 2}[bits]
    size = count * bits // 8
    cells = [[""] * 8 for _ in range(size)]
    for element in range(count):
        for bit in range(bits):
            x = torch.full((count,), float(code[0]))  # -1, stored code 0
            x[element] = code[1 << bit]
            packed = quantize(x, f"nf{bits}", block_size=16, double_quant=False).q.reshape(-1).tolist()
            (byte,) = [i for i, value in enumerate(packed) if value]
            cells[byte][7 - (packed[byte].bit_length() - 1)] = f"e{element}.{bit}"
    rows = ["byte   " + "".join(f"{f'bit {i}':>7}" for i in range(7, -1, -1))]
    rows += [f"{i:<7}" + "".join(f"{cell:>7}" for cell in row) for i, row in enumerate(cells)]
    return "```\n" + "\n".join(rows) + "\n```"


def codebooks() -> str:
    """Every k-bit codebook by stored code."""
    names = ["nf4", "fp4", "int4", "nf3", "int3", "lloyd3", "nf2", "int2", "lloyd2"]
    rows = ["| code | " + " | ".join(names) + " |", "| ---: " * (len(names) + 1) + "|"]
    for i in range(16):
        codes = [get_format(name).code for name in names]
        rows.append(f"| {i} | " + " | ".join(f"{float(c[i]):.9g}" if i < len(c) else "" for c in codes) + " |")
    return "\n".join(rows)


def dynamic() -> str:
    """dynamic8, the positive half by decades; the negative half mirrors it, but for -1."""
    code = get_format("dynamic8").code
    positive = [f"{float(v):.9g}" for v in code if float(v) > 0]
    rows, at = [], 0
    for i in range(7):
        rows.append(f"10^{i - 6}: " + " ".join(positive[at : at + (1 << i)]))
        at += 1 << i
    rows.append("1: " + " ".join(positive[at:]))
    return "```\n" + "\n".join(rows) + "\n```"


def bits_per_weight(bits: int, block: int, double_quant: bool) -> float:
    """The formula of the document; whole blocks and groups, codebooks and JSON apart."""
    return bits + (8 / block + 32 / (256 * block) if double_quant else 32 / block)


def sizes() -> str:
    """Bits per weight."""
    rows = [
        "| bits | scales | " + " | ".join(f"block {b}" for b in BLOCKS) + " |",
        "| ---: | --- " + "| ---: " * 6 + "|",
    ]
    for bits in (2, 3, 4, 8):
        for double in (False, True):
            cells = " | ".join(f"{bits_per_weight(bits, block, double):.4f}" for block in BLOCKS)
            rows.append(f"| {bits} | {'8-bit' if double else 'fp32'} | {cells} |")
    return "\n".join(rows)


def dump() -> str:
    """The entries of two small weights."""
    x = torch.arange(8 * 64, dtype=torch.float32).reshape(8, 64) / 512 - 0.5
    rows = []
    for format in ("nf4", "int8"):
        for key, entry in checkpoint.to_tensors(quantize(x, format), "layer.weight").items():
            rows.append(f"{key:<46} {str(entry.dtype).removeprefix('torch.'):<8} {list(entry.shape)}")
            if ".quant_state." in key:
                rows += ["    " + bytes(entry.tolist()).decode(), ""]
    return "```\n" + "\n".join(rows) + "\n```"


PARTS: dict[str, Callable[[], str]] = {
    "layout 4": lambda: layout(4),
    "layout 3": lambda: layout(3),
    "layout 2": lambda: layout(2),
    "codebooks": codebooks,
    "dynamic8": dynamic,
    "sizes": sizes,
    "dump": dump,
}


def bounds(text: str, part: str) -> tuple[int, int]:
    """Where the generated part lies in the document."""
    opening = f"<!-- {part}: generated -->\n"
    start = text.index(opening) + len(opening)
    return start, text.index("\n<!-- end -->", start - 1)


@pytest.mark.parametrize("part", PARTS)
def test_generated_parts_are_current(part: str) -> None:
    text = DOC.read_text(encoding="utf-8")
    start, end = bounds(text, part)
    assert text[start:end] == PARTS[part](), "run: python tests/test_formats_doc.py"


def test_every_format_is_named() -> None:
    text = DOC.read_text(encoding="utf-8")
    assert [name for name in list_formats() if f"`{name}`" not in text] == []


def test_printed_codebooks_read_back_to_the_bit() -> None:
    rows = [line.split("|")[2:-1] for line in codebooks().splitlines()]
    for column, name in enumerate(cell.strip() for cell in rows[0]):
        printed = [float(row[column]) for row in rows[2:] if row[column].strip()]
        code = torch.tensor(printed, dtype=torch.float64).float()
        assert torch.equal(code.view(torch.int32), get_format(name).code.view(torch.int32))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("format", ["nf2", "int3", "nf4", "dynamic8"])
def test_sizes_are_those_of_a_weight(format: str, block: int, double_quant: bool) -> None:
    """A weight of one whole group of 256 blocks: its stored bytes without the codebooks and the offset."""
    weight = quantize(torch.ones(256, block), format, block_size=block, double_quant=double_quant)
    inner = weight.inner_tensors()
    size = sum(inner[name].nbytes for name in ("q", "absmax", "nested_absmax") if name in inner)
    assert size * 8 / weight.numel() == bits_per_weight(weight.bits, block, double_quant)


def test_the_dump_is_json_of_the_layout() -> None:
    (line,) = [line.strip() for line in dump().splitlines() if line.startswith("    {")]
    assert list(json.loads(line)) == [
        "quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"
    ]  # fmt: skip


def rewrite() -> None:
    """Write the generated parts anew."""
    text = DOC.read_text(encoding="utf-8")
    for part, make in PARTS.items():
        start, end = bounds(text, part)
        text = text[:start] + make() + text[end:]
    DOC.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    rewrite()
