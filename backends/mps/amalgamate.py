"""Write a Metal source with its own includes put in: ``amalgamate.py SOURCE TARGET``. Those in <> stay."""

from __future__ import annotations

import re
import sys
from pathlib import Path

INCLUDE = re.compile(r'\s*#include "(.+)"')
# What only a language with C's library has; its includes are never reached.
FOREIGN = ("#include <stdint.h>",)


def amalgamate(source: Path, seen: set[Path]) -> list[str]:
    """The lines of a file; each header once, each .def wherever it is included."""
    lines = []
    for line in source.read_text(encoding="utf-8").splitlines():
        match = INCLUDE.match(line)
        if match is None:
            if line not in FOREIGN:
                lines.append(line)
            continue
        path = (source.parent / match[1]).resolve()
        if path not in seen:
            if path.suffix == ".h":
                seen.add(path)
            lines += amalgamate(path, seen)
    return lines


if __name__ == "__main__":
    Path(sys.argv[2]).write_text("\n".join(amalgamate(Path(sys.argv[1]).resolve(), set())) + "\n", encoding="utf-8")
