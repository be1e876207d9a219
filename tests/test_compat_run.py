"""python -m polybit.run behaves as python does: arguments, packages, folders, archives, exit status, children."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tools import PACKAGE

# Printed by programs and children; what is behind "origin" must be ours.
FACTS = """
import importlib.util, os, sys

def facts(who, file=None):
    print(who, file, sys.argv, os.path.realpath(sys.path[0]), os.getcwd() in sys.path, flush=True)
    print("origin", importlib.util.find_spec("bitsandbytes").origin, flush=True)
"""
SCRIPT = """
import multiprocessing, os, subprocess, sys
from beside import facts

class Value:  # must be found again, by its name in __main__
    def __init__(self, number):
        self.number = number

def child(value):
    facts(f"spawned {value.number}")
    return Value(value.number + 1)

if __name__ == "__main__":
    facts(__name__, __file__)
    print(__spec__, sys.modules["__main__"].child is child)
    os.chdir("/")
    assert os.path.isfile(__file__)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(child, (Value(4),)).number)
    sys.stdout.flush()
    for code in ("from beside import facts; facts('child')", "import custom; print(custom.ran)"):
        env = {**os.environ, "PYTHONPATH": os.environ["PYTHONPATH"] + os.pathsep + os.path.dirname(__file__)}
        subprocess.run(["sh", "-c", f'{sys.executable} -c "{code}"'], check=True, env=env)
    print(input())
"""
MAIN = """
import sys
from {origin} import facts
facts(__name__, __file__)
print(__package__, __spec__.name)
sys.exit({status})
"""
PROGRAMS = {
    "folder/script.py": SCRIPT,
    "folder/beside.py": FACTS,
    "customs/sitecustomize.py": "import custom\ncustom.ran = True\n",
    "customs/custom.py": "ran = False\n",
    "package/__init__.py": "",
    "package/__main__.py": MAIN.format(origin=".inner.facts", status="None"),
    "package/module.py": MAIN.format(origin="package.inner.facts", status="7"),
    "package/inner/__init__.py": "",
    "package/inner/facts.py": FACTS,
    "app/__main__.py": MAIN.format(origin="beside", status="'it ends so'"),
    "app/beside.py": FACTS,
    "fails.py": "def inner():\n    raise LookupError('nothing there')\n\ninner()\n",
    "safe.py": "import sys, os\nprint(os.getcwd() in sys.path, sys.argv)\nimport fails\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("programs")
    for name, text in PROGRAMS.items():
        made.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        made.joinpath(name).write_text(text)
    with zipfile.ZipFile(made / "app.pyz", "w") as archive:
        for part in (made / "app").iterdir():
            archive.write(part, part.name)
    return made


def outcome(command: list[str], folder: Path, **env: str) -> tuple[int, list[str], str]:
    """Exit status, lines of the output, last line of the errors."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), str(folder / "customs")]), **env},
        input="a line\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr.strip().rpartition("\n")[2]


CASES = {
    "script": ("folder/script.py --flag -m x -- y", 0),
    "package": ("-m package -m --help", 0),
    "module": ("-m package.module", 7),
    "folder": ("app", 1),
    "archive": ("app.pyz 1 2", 1),
    "exception": ("fails.py", 1),
}


@pytest.mark.parametrize("case", CASES)
def test_a_program_runs_as_by_python(case: str, folder: Path) -> None:
    """The same output, input, status and last words; and bitsandbytes is ours, in children too."""
    text, want = CASES[case]
    status, lines, words = outcome(text.split(), folder)
    ours, our_lines, our_words = outcome(["-m", "polybit.run", *text.split()], folder)
    assert status == ours == want, our_words
    assert our_words.rpartition(": ")[2] == words.rpartition(": ")[2]
    plain = [line for line in our_lines if not line.startswith("origin ")]
    assert plain == [line for line in lines if not line.startswith("origin ")]
    origins = [line for line in our_lines if line.startswith("origin ")]
    assert set(origins) <= {f"origin {PACKAGE / 'compat' / 'bitsandbytes' / '__init__.py'}"}
    assert len(origins) == {"script": 3, "exception": 0}.get(case, 1)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 brought PYTHONSAFEPATH")
def test_a_safe_path_stays_safe(folder: Path) -> None:
    """Neither the folder of the script nor that of the command is searched, and nothing else is lost."""
    for command in (["safe.py"], ["-m", "polybit.run", "safe.py"]):
        status, lines, words = outcome(command, folder, PYTHONSAFEPATH="1")
        assert status == 1 and lines[0].startswith("False") and words == "ModuleNotFoundError: No module named 'fails'"
