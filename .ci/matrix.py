#!/usr/bin/env python3
"""Run the rows of matrix.json that this machine can run, or print them for .github/workflows/ci.yml.

A row is a Python, pins that replace those of constraints.txt, an environment and what pytest (or make) is to run. Rows
with the same Python and pins share a virtual environment under build/matrix. What is missing here skips a row, with the
reason; with CI=true that is a failure, unless the row is optional (hosted runners have different CPUs).

The "portable" selection leaves out what the rows linux, cuda-compile, hip-compile, sycl-cpu and metal-check run. A test
that cannot pass in a row is named there with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "matrix"
DATA: dict[str, Any] = json.loads((ROOT / ".ci" / "matrix.json").read_text(encoding="utf-8"))
IN_CI = os.environ.get("CI") == "true"
MACHINES = {"AMD64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Row:
    """One line of the matrix; what it leaves out comes from "defaults"."""

    name: str
    runner: list[str]  # GitHub's labels; with "self-hosted", only where the repository has such a runner
    container: str  # an image to run in, on GitHub
    system: str
    machine: str
    apt: list[str]
    tools: list[str]  # executables it cannot do without
    python: str  # major.minor; "" is the Python that runs this script, on GitHub the "python" of the file
    pins: list[str]  # instead of those of constraints.txt
    index: str  # where GitHub's runners find torch without, or with, a GPU's libraries
    env: dict[str, str]
    tests: list[list[str]]  # one pytest command each
    without: dict[str, str]  # tests, by the beginning of their ids, that cannot pass there: why
    make: str  # a target of the Makefile, before the tests
    heavy: bool  # installs gigabytes: locally only with HEAVY=1
    optional: bool
    experimental: str  # why GitHub may go on where it fails
    minutes: int

    @property
    def self_hosted(self) -> bool:
        return "self-hosted" in self.runner


@dataclass(frozen=True)
class Result:
    name: str
    outcome: str  # passed, failed or skipped
    seconds: float
    detail: str


class Skipped(Exception):
    """The row needs what this machine lacks."""


class Failed(Exception):
    """A command of the row failed."""


def read(name: str) -> list[str]:
    """The lines of a file of the root."""
    return (ROOT / name).read_text(encoding="utf-8").splitlines()


def rows() -> list[Row]:
    """Every row, its defaults and its selection of tests filled in."""
    found = []
    for given in DATA["rows"]:
        merged = {**DATA["defaults"], **given}
        if isinstance(merged["tests"], str):
            merged["tests"] = DATA["selections"][merged["tests"]]
        backend = merged["env"].get("POLYBIT_BACKEND", "")
        without = [f"--deselect={name}" for name in merged["without"]]
        merged["tests"] = [[word.format(backend=backend) for word in command] + without for command in merged["tests"]]
        found.append(Row(**merged))
    return found


def github(labels: set[str]) -> list[dict[str, Any]]:
    """What the workflow needs of each row; rows on self-hosted runners only where `labels` has all of theirs."""
    return [
        {
            "name": row.name,
            "runner": row.runner,
            "container": row.container,
            "python": row.python or DATA["python"],
            "apt": " ".join(row.apt),
            "experimental": row.experimental,
            "minutes": row.minutes,
        }
        for row in rows()
        if not row.self_hosted or set(row.runner) - {"self-hosted", "linux"} <= labels
    ]


def find_python(version: str) -> str:
    """An interpreter of that version: this one, one of PATH, or one of pyenv's."""
    if version in ("", f"{sys.version_info.major}.{sys.version_info.minor}"):
        return sys.executable
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    path = shutil.which(f"python{version}")
    # pyenv puts a python3.x on PATH that refuses to run where that version is not chosen.
    for candidate in [*map(str, pyenv), *([path] if path else [])]:
        if subprocess.run([candidate, "-c", ""], capture_output=True, check=False).returncode == 0:
            return candidate
    raise Skipped(f"no Python {version} here")


def check_machine(row: Row) -> None:
    """Raise Skipped for what can be known before anything is installed."""
    here = platform.system(), MACHINES.get(platform.machine(), platform.machine())
    wanted = row.system, MACHINES.get(row.machine, row.machine)
    if here != wanted:
        raise Skipped(f"needs {' '.join(wanted)}, this is {' '.join(here)}")
    for tool in row.tools:
        if not shutil.which(tool) and not shutil.which(tool, path=str(ROOT / ".venv" / "bin")):
            raise Skipped(f"needs {tool}" + (f" (apt: {' '.join(row.apt)})" if row.apt else ""))
    find_python(row.python)
    if row.heavy and not IN_CI and os.environ.get("HEAVY") != "1":
        raise Skipped("heavy: installs gigabytes; HEAVY=1 runs it")


def run(command: list[str], log: Path, env: dict[str, str] | None = None) -> str:
    """Run a command from the root, add what it prints to the log (under CI to stdout, too), and return it."""
    lines = []
    with log.open("a", buffering=1, encoding="utf-8") as file:
        print("$", *command, file=file, flush=True)
        with subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            for line in process.stdout or ():
                lines.append(line)
                file.write(line)
                if IN_CI:
                    sys.stdout.write(line)
    if process.returncode != 0:
        words = " ".join([Path(command[0]).name, *command[1:4]])
        raise Failed(f"{words} ...: exit {process.returncode}: {last_line(lines)}")
    return last_line(lines)


def last_line(lines: list[str]) -> str:
    """The last line that says something, without pytest's rulers."""
    return next((text for text in (line.strip(" =\n") for line in reversed(lines)) if text), "")


@contextlib.contextmanager
def once(stamp: Path, contents: list[bytes]) -> Iterator[bool]:
    """True where `contents` differ from those of the last time that the block succeeded."""
    digest = hashlib.sha256(b"\0".join(contents)).hexdigest()
    yield not stamp.exists() or stamp.read_text() != digest
    stamp.write_text(digest)


def sources() -> list[Path]:
    """What the installed package is made of."""
    found = [ROOT / "CMakeLists.txt", ROOT / "pyproject.toml"]
    for folder in ("core", "backends", "python"):
        found += (path for path in sorted((ROOT / folder).rglob("*")) if path.is_file())
    return [path for path in found if path.suffix not in (".pyc", ".pyo", ".so")]


def prepare(row: Row, log: Path) -> Path:
    """The folder of executables of the row's environment, its packages and polybit installed where they changed."""
    python = find_python(row.python)
    version = subprocess.check_output([python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True)
    home = BUILD / "-".join([f"py{version.strip()}", *(pin.replace("==", "") for pin in row.pins)])
    folder = home / ("Scripts" if os.name == "nt" else "bin")
    if not folder.exists():
        run([python, "-m", "venv", str(home)], log)

    constraints = home / "constraints.txt"
    pip = [str(folder / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q", "-c", str(constraints)]
    if IN_CI and row.index:
        pip += ["--extra-index-url", row.index]
    replaced = {pin.partition("==")[0] for pin in row.pins}
    kept = [line for line in read("constraints.txt") if line.partition("==")[0] not in replaced]
    text = "".join(f"{line}\n" for line in kept + row.pins)
    requirements = {name: ROOT / f"requirements-{name}.txt" for name in ("dev", "docs", "no-deps")}
    with once(home / "packages", [text.encode(), *(path.read_bytes() for path in requirements.values())]) as changed:
        if changed:
            constraints.write_text(text, encoding="utf-8")
            try:
                run([*pip, "-r", str(requirements["dev"]), "-r", str(requirements["docs"])], log)
                run([*pip, "--no-deps", "-r", str(requirements["no-deps"])], log)
            except Failed as problem:  # no wheel for this Python, or no network
                raise Skipped(f"cannot install: {problem}") from None
    sycl = bytes((ROOT / "build" / "sycl" / "made").exists())  # CMake then builds its backend, too
    with once(home / "package", [sycl, *(path.read_bytes() for path in sources())]) as changed:
        if changed:
            run([*pip, "--no-deps", "--force-reinstall", str(ROOT)], log)
    return folder


def environment(row: Row, folder: Path) -> dict[str, str]:
    """The row's own variables, and no others of ours."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and not key.startswith("POLYBIT_")}
    path = os.pathsep.join([str(folder), kept.get("PATH", ""), str(ROOT / ".venv" / "bin")])
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT / "tests"), **row.env}


def check_backend(row: Row, folder: Path) -> None:
    """Raise Skipped if the backend that the row forces, the first of its list, cannot be used on this machine."""
    name = row.env.get("POLYBIT_BACKEND", "").partition(",")[0]
    if not name:
        return
    code = "from polybit.backends import list_backends as b; print(*(f'{i.name}\\t{i.reason}' for i in b()), sep='\\n')"
    family = {**environment(row, folder), "POLYBIT_BACKEND": name.partition(":")[0]}
    listed = subprocess.check_output([folder / "python", "-c", code], cwd=BUILD, env=family, text=True)
    known = dict(line.split("\t") for line in listed.splitlines())
    if name not in known:
        raise Failed(f"polybit has no backend {name}, only {', '.join(known)}")
    if known[name]:
        raise Skipped(f"{name}: {known[name]}")


def run_row(row: Row) -> Result:
    """Run one row; what it printed is in build/matrix/<name>.log."""
    BUILD.mkdir(parents=True, exist_ok=True)
    log = BUILD / f"{row.name}.log"
    log.unlink(missing_ok=True)
    start = time.monotonic()
    said = []
    try:
        check_machine(row)
        if row.make:
            said.append(
                run(
                    ["make", "--no-print-directory", f"PYTHON={find_python(row.python)}", *row.make.split()],
                    log,
                    {**os.environ, **row.env},
                )
            )
        if row.tests:
            folder = prepare(row, log)
            check_backend(row, folder)
            for command in row.tests:
                said.append(run([str(folder / "python"), "-m", "pytest", *command], log, environment(row, folder)))
        outcome, detail = "passed", "; ".join(said)
    except Skipped as reason:
        outcome, detail = "failed" if IN_CI and not row.optional else "skipped", str(reason)
    except Failed as problem:
        outcome, detail = "failed", f"{problem} (see {log.relative_to(ROOT)})"
    return Result(row.name, outcome, time.monotonic() - start, detail)


def report(results: list[Result]) -> str:
    """One line a row, and a last line with the counts."""
    width = max(len(result.name) for result in results)
    lines = [f"{r.name:{width}}  {r.outcome:7}  {r.seconds:6.0f} s  {r.detail}" for r in results]
    counts = ", ".join(f"{sum(r.outcome == kind for r in results)} {kind}" for kind in ("passed", "failed", "skipped"))
    return "\n".join([*lines, f"{len(results)} rows: {counts}"])


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 if no row failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="run these rows, or all, and print a table")
    runner.add_argument("names", nargs="*", metavar="NAME")
    emitter = commands.add_parser("github", help="print rows=[...] for $GITHUB_OUTPUT")
    emitter.add_argument("--labels", default="", help="the labels of this repository's own runners, comma-separated")
    options = parser.parse_args(arguments)

    if options.command == "github":
        print("rows=" + json.dumps(github({label.strip() for label in options.labels.split(",")})))
        return 0
    known = {row.name: row for row in rows()}
    unknown = set(options.names) - set(known)
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    results = []
    for name in options.names or known:
        print(f"{name} ...", flush=True)
        results.append(run_row(known[name]))
    print(report(results))
    return int(any(result.outcome == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
