"""The matrix instructions of NVIDIA, AMD and Intel behind the tile functions: their layouts on the emulator."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_simt import EMULATOR, ROOT, SOURCES, execute
from tools import require_tool


def build(folder: Path, core: Path = ROOT / "core") -> Path:
    compiler = require_tool("g++", "c++", "clang++")
    warnings = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off")
    sources = (SOURCES / "tiles.cpp", EMULATOR / "engine.cpp", EMULATOR / "fiber.cpp")
    program = folder / "tiles"
    done = execute(compiler, *warnings, f"-I{core}", *sources, "-o", program)
    assert done.returncode == 0, done.stderr
    return program


def test_tiles_multiply(tmp_path: Path) -> None:
    done = execute(build(tmp_path))
    assert (done.returncode, done.stdout) == (0, "0 wrong\n")


@pytest.mark.parametrize(
    ("header", "right", "wrong"),
    [
        ("tile_mma.h", "w.lane() / 4u + i / 2u * 8u", "w.lane() / 4u + i % 2u * 8u"),
        ("tile_mma.h", "A{{p[0], p[8u * pitch], p[4]", "A{{p[0], p[4], p[8u * pitch]"),
        ("tile_amd.h", "w.lane() / 16u * 4u + i", "w.lane() / 16u + i * 4u"),
        ("tile_amd.h", "? 2u * i + w.lane() / 16u :", "? w.lane() / 16u * 8u + i :"),
        ("tile_xmx.h", "row(Wave, u32 i) { return i; }", "row(Wave, u32 i) { return 7u - i; }"),
        ("tile_xmx.h", "w.lane() % parts_of_word * 16u", "w.lane() % parts_of_word * 8u"),
    ],
)
def test_another_layout_is_noticed(tmp_path: Path, header: str, right: str, wrong: str) -> None:
    """A mutation of where a lane's words or sums belong makes sums wrong."""
    text = (ROOT / "core" / "simt" / header).read_text()
    assert text.count(right) == 1
    for folder in ("simt", "math"):
        (tmp_path / "core" / folder).mkdir(parents=True)
        for path in (ROOT / "core" / folder).iterdir():
            (tmp_path / "core" / folder / path.name).write_text(path.read_text())
    (tmp_path / "core" / "simt" / header).write_text(text.replace(right, wrong))
    done = execute(build(tmp_path, tmp_path / "core"))
    assert done.returncode == 1, done.stdout
