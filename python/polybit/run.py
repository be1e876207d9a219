"""``python -m polybit.run script.py ...`` or ``-m module ...``: run a program with bitsandbytes replaced by polybit.

`import bitsandbytes` gives polybit.compat.bitsandbytes, in this process and in every Python process that it starts: the
folder polybit/compat/site is put on PYTHONPATH for them.
"""

from __future__ import annotations

import builtins
import os
import runpy
import sys
import zipfile
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from polybit.compat import install

USAGE = "usage: python -m polybit.run script.py [argument ...]\n       python -m polybit.run -m module [argument ...]\n"


def _stop(problem: str) -> NoReturn:
    sys.stderr.write(f"python -m polybit.run: {problem}\n")
    raise SystemExit(2)


def main(arguments: list[str]) -> None:
    """Run what the arguments name as `python` would, as __main__: a script, a folder or archive with one, or -m module.

    Exits with 2 if they name none or it does not exist.
    """
    as_module = arguments[:1] == ["-m"]
    program = arguments[as_module:]
    if not program or program[0].startswith("-"):
        sys.stderr.write(USAGE)
        raise SystemExit(2)
    install()
    folder = str(Path(__file__).parent / "compat" / "site")
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    path = os.path.abspath(program[0])
    if as_module and find_spec(program[0].partition(".")[0]) is None:
        _stop(f"no module named {program[0]}")
    if not as_module and not os.path.exists(path):
        _stop(f"{program[0]}: no such file")
    sys.argv = program
    # Not runpy's public functions: they run it in a module beside the one where multiprocessing, which torch has
    # imported by now, looks for the names of __main__.
    sys.modules["__main__"].__dict__.clear()
    if as_module:
        runpy._run_module_as_main(program[0])  # type: ignore[attr-defined]
    else:
        _run_path(path)


def _run_path(path: str) -> None:
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # the working directory
    if os.path.isdir(path) or zipfile.is_zipfile(path):
        sys.path.insert(0, path)
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
        return
    if not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    loader = SourceFileLoader("__main__", path)
    code = loader.source_to_code(loader.get_data(path), path)
    names = {"__name__": "__main__", "__file__": path, "__loader__": loader, "__builtins__": builtins}
    nothing = dict.fromkeys(("__doc__", "__package__", "__spec__", "__cached__"))
    sys.modules["__main__"].__dict__.update(names, **nothing)
    exec(code, sys.modules["__main__"].__dict__)


if __name__ == "__main__":
    from polybit.run import main as run  # in a module of its own name: __main__ becomes the program's

    run(sys.argv[1:])
