"""``python -m polybit.run script.py ...`` or ``-m module ...``: run a program with bitsandbytes replaced by polybit.

`import bitsandbytes` gives polybit.compat.bitsandbytes, in this process and in every Python process that it starts: the
folder polybit/compat/site is put on PYTHONPATH for them.
"""

from __future__ import annotations

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from polybit.compat import install

USAGE = "usage: python -m polybit.run script.py [argument ...]\n       python -m polybit.run -m module [argument ...]\n"


def _stop(problem: str) -> NoReturn:
    sys.stderr.write(f"python -m polybit.run: {problem}\n")
    raise SystemExit(2)


def main(arguments: list[str]) -> None:
    """Run the program that the arguments name, as __main__. Exits with 2 if they name none or it does not exist."""
    as_module = arguments[:1] == ["-m"]
    program = arguments[as_module:]
    if not program or program[0].startswith("-"):
        sys.stderr.write(USAGE)
        raise SystemExit(2)
    install()
    folder = str(Path(__file__).parent / "compat" / "site")
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.argv = program
    if as_module:
        sys.path[0] = os.getcwd()
        if find_spec(program[0].partition(".")[0]) is None:
            _stop(f"no module named {program[0]}")
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
    else:
        if not Path(program[0]).exists():
            _stop(f"{program[0]}: no such file")
        sys.path[0] = str(Path(program[0]).resolve().parent)
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
