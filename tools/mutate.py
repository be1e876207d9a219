#!/usr/bin/env python3
"""Mutate the kernels of core/kernels one place at a time and count how many mutants the emulator's samples kill.

``python tools/mutate.py [FILE ...] [--jobs N]``

Kinds of mutants:

- barrier: a ``barrier()`` is removed;
- shuffle: a shuffle gives every lane its own value back;
- bound: a comparison is weakened, and strengthened, by one; ``==`` and ``!=`` are exchanged;
- mask: ``x & m`` becomes ``x``.

The emulator is built with each mutant (the ops that its file has no part in left out) and held to the samples by the
conformance program of tests/conformance until one fails: first some samples, then all of them at every width and
schedule, then, built again with AddressSanitizer and UndefinedBehaviorSanitizer, once at each width. A crash or a hang
kills, too. A mutant that does not compile is none.

tools/mutate.json explains survivors that are equivalent to the original; an explanation that explains nothing is an
error. Exit status 1: less than 95% of the mutants that are not explained were killed, or such an error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = Path("core/kernels")
EMULATOR = Path("backends/emulator")
TABLE = Path("core/launch/table.h")
EXPLANATIONS = ROOT / "tools" / "mutate.json"
LEAST = 95.0  # percent
TIMEOUT = 60.0  # seconds for one run of the program
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-w"]
BUILDS = {
    "plain": ["-fsanitize=bounds,shift", "-fsanitize-undefined-trap-on-error"],
    "sanitized": ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
ORDERS, WIDTHS = ("ascending", "descending", "shuffled"), (32, 16, 64)


@dataclass(frozen=True)
class Stage:
    """What a mutant must survive: a build, every n-th sample, and these schedules and widths."""

    build: str
    every: int
    runs: Sequence[tuple[str, int]]


# The first one is quick and kills most.
STAGES = (
    Stage("plain", 5, list(zip(ORDERS, WIDTHS))),
    Stage("plain", 1, list(product(ORDERS, WIDTHS))),
    Stage("sanitized", 1, list(zip(ORDERS, WIDTHS))),
)


@dataclass(frozen=True)
class Mutant:
    """A change of the characters [begin, end) of a file to `text`."""

    file: Path  # below the root
    kind: str
    begin: int
    end: int
    text: str
    line: int
    before: str  # the source lines that the change touches, stripped
    after: str

    def apply(self, source: str) -> str:
        """The mutated file."""
        return source[: self.begin] + self.text + source[self.end :]


def blanked(source: str) -> str:
    """The source with comments, strings and preprocessor lines as blanks: every place keeps its offset."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*'
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m[0]), source, flags=re.MULTILINE | re.DOTALL)


def closing(text: str, at: int) -> int:
    """Behind the bracket that closes the one at `at`."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if not depth:
            return i + 1
    raise ValueError(f"no bracket closes the one at {at}")


def first_argument(text: str, at: int) -> str:
    """The first argument of the call whose bracket opens at `at`."""
    i = at + 1
    while text[i] not in ",)":
        i = closing(text, i) if text[i] in "([{" else i + 1
    return text[at + 1 : i]


def operand_end(text: str, at: int) -> int:
    """Behind the operand (a primary expression with its prefixes, calls and members) that begins at `at`."""
    start = re.compile(r"[~!-]*(?=\()|[~!-]*[\w.:]+").match(text, at)
    if start is None:
        raise ValueError(f"no operand at {at}: {text[at : at + 20]}")
    i = start.end()
    while i < len(text) and (text[i] in "([" or text.startswith(("->", "."), i)):
        tail = re.compile(r"(?:->|\.)\w+").match(text, i)
        i = tail.end() if tail else closing(text, i)
    return i


# By operator: what replaces it, operator and operands being apart by blanks, as clang-format wants it.
BOUNDS = {
    "<": ("<=", "+ 1 <"),
    "<=": ("<", "<= 1 +"),
    ">": (">=", "> 1 +"),
    ">=": (">", "+ 1 >="),
    "==": ("!=",),
    "!=": ("==",),
}


def changes(text: str) -> Iterator[tuple[str, int, int, str]]:
    """Kind, begin, end and new text of every mutation of a blanked source, in its order."""
    places = r"\w+\.barrier\(\)(?=;)|\w+\.shuffle\w*\(|(?<= )(?:<=|>=|==|!=|<|>|&)(?=\s)"
    for match in re.finditer(places, text):
        begin, end = match.span()
        if match[0].endswith(".barrier()"):
            yield "barrier", begin, end, ""
        elif match[0].endswith("("):
            yield "shuffle", begin, closing(text, end - 1), f"({first_argument(text, end - 1)})"
        elif match[0] == "&":
            operand = re.compile(r"\s+").match(text, end)
            assert operand is not None
            yield "mask", len(text[:begin].rstrip()), operand_end(text, operand.end()), ""
        else:
            for replacement in BOUNDS[match[0]]:
                yield "bound", begin, end, replacement


def mutants(file: Path, source: str) -> list[Mutant]:
    """Every mutant of a file."""
    result = []
    for kind, begin, end, text in changes(blanked(source)):
        first = source.rfind("\n", 0, begin) + 1
        last = (source + "\n").index("\n", end)
        before = source[first:last]
        after = source[first:begin] + text + source[end:last]
        line = source.count("\n", 0, begin) + 1
        result.append(Mutant(file, kind, begin, end, text, line, *(" ".join(s.split()) for s in (before, after))))
    return result


def included(file: Path, root: Path = ROOT) -> set[Path]:
    """The files below the root that a file includes, itself among them, directly or not."""
    found: set[Path] = set()
    left = [file]
    while left:
        path = left.pop()
        if path in found or not (root / path).is_file():
            continue
        found.add(path)
        for name in re.findall(r'^#include "(.+?)"', (root / path).read_text(encoding="utf-8"), flags=re.MULTILINE):
            left.append(Path(os.path.normpath(path.parent / name)))
    return found


def ops_of(file: Path) -> set[str]:
    """The ops whose launchers include a kernel file."""
    known = set(re.findall(r"^PB_OP\((\w+),", (ROOT / "core" / "ops.def").read_text("utf-8"), flags=re.MULTILINE))
    found: set[str] = set()
    for header in (ROOT / TABLE).parent.glob("*.h"):
        path = header.relative_to(ROOT)
        if path != TABLE and file in included(path):
            found.update(re.findall(r"\bpb_(\w+)_args\b", header.read_text(encoding="utf-8")))
    return found & known


def compiler() -> str:
    """The C++ compiler."""
    for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise SystemExit("needs a C++ compiler")


class CompileError(Exception):
    """What the compiler said."""


def compile_cpp(*arguments: str | Path) -> None:
    """Run the compiler."""
    done = subprocess.run([compiler(), *FLAGS, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(done.stderr)


@dataclass
class Bench:
    """Builds mutants of the kernels of some ops in `folder` and runs their samples on them."""

    folder: Path
    ops: Collection[str]
    stages: Sequence[Stage] = STAGES
    sources: list[Path] = field(init=False)

    def __post_init__(self) -> None:
        """Copy the sources, so that they may change meanwhile; write the samples; build what no mutant changes."""
        import polybit

        for tree in (Path("core"), EMULATOR):
            shutil.copytree(ROOT / tree, self.original / tree)
        self.include = Path(polybit.__file__).parent / "include"
        script = ROOT / "tests" / "conformance" / "samples.py"
        for every in {stage.every for stage in self.stages}:
            options = [str(self.samples(every)), "--every", str(every), "--ops", *sorted(self.ops)]
            subprocess.run([sys.executable, str(script), *options], check=True, stdout=subprocess.DEVNULL)
        self.sources = [path.relative_to(self.original) for path in sorted((self.original / EMULATOR).glob("*.cpp"))]
        program = [ROOT / f"tests/conformance/{name}.cpp" for name in ("conformance", "call", "samples")]
        program.append(self.original / "core/registry.cpp")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            work = [
                pool.submit(
                    self._compile, build, *program, "-I", self.original / "core", "-ldl", "-o", self.program(build)
                )
                for build in self.builds
            ]
            for build, source in product(self.builds, self.sources):
                if not self._has_kernels(source):
                    work.append(
                        pool.submit(
                            self._compile, build, "-c", self.original / source, "-o", self.object(build, source)
                        )
                    )
            for one in work:
                one.result()

    @property
    def original(self) -> Path:
        """The sources as they are."""
        return self.folder / "original"

    @property
    def builds(self) -> list[str]:
        """The builds of the stages."""
        return list(dict.fromkeys(stage.build for stage in self.stages))

    def samples(self, every: int) -> Path:
        """Every n-th sample of the ops."""
        return self.folder / f"samples-{every}"

    def program(self, build: str) -> Path:
        """The conformance program."""
        return self.folder / f"{build}-conformance"

    def object(self, build: str, source: Path) -> Path:
        """What a source that includes no kernel was compiled to."""
        return self.folder / f"{build}-{source.stem}.o"

    def _compile(self, build: str, *arguments: str | Path) -> None:
        compile_cpp(*BUILDS[build], f"-I{self.include}", *arguments)

    def _has_kernels(self, source: Path) -> bool:
        return any(path.is_relative_to(KERNELS) for path in included(source, self.original))

    def killed_by(self, mutant: Mutant | None) -> str | None:
        """What killed a mutant, or the sources as they are for None; None if nothing did."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            copy = Path(name) / "mutant"
            shutil.copytree(self.original, copy)
            if mutant:
                (copy / mutant.file).write_text(mutant.apply((copy / mutant.file).read_text("utf-8")), "utf-8")
            table = (copy / TABLE).read_text(encoding="utf-8")
            (copy / TABLE).write_text(table.replace('"../ops.def"', '"wanted.def"'), encoding="utf-8")
            wanted = "".join(f"PB_OP({op}, )\n" for op in sorted(self.ops))
            (copy / TABLE).with_name("wanted.def").write_text(wanted, encoding="utf-8")
            library, built = copy / "libpolybit_emulator.so", ""
            for stage in self.stages:
                if stage.build != built:
                    self._link(stage.build, copy, library)
                    built = stage.build
                if cause := self._run(stage, library):
                    return cause
        return None

    def _link(self, build: str, copy: Path, library: Path) -> None:
        parts = [copy / s if self._has_kernels(s) else self.object(build, s) for s in self.sources]
        self._compile(build, "-shared", *parts, "-o", library)

    def _run(self, stage: Stage, library: Path) -> str | None:
        for order, width in stage.runs:
            backend = f"emulator:{width}"
            command = [str(self.program(stage.build)), str(self.samples(stage.every)), str(library), backend]
            env = {**os.environ, "POLYBIT_EMULATOR_ORDER": order}
            try:
                done = subprocess.run(
                    command, env=env, capture_output=True, text=True, errors="replace", timeout=TIMEOUT, check=False
                )
            except subprocess.TimeoutExpired:
                return f"{backend} {order}: no end after {TIMEOUT:.0f} s"
            if done.returncode:
                said = next((line for line in done.stderr.splitlines() if line.strip("= ")), "")
                return f"{backend} {order}, {stage.build}: {said or f'exit status {done.returncode}'}"
        return None


@dataclass(frozen=True)
class Result:
    """What became of a mutant. killed_by: None if it survived; not_compiled: it is no mutant."""

    mutant: Mutant
    killed_by: str | None = None
    not_compiled: bool = False


def run(bench: Bench, todo: Iterable[Mutant], jobs: int) -> Iterator[Result]:
    """Try mutants, `jobs` at a time; results come in the order of `todo`."""

    def one(mutant: Mutant) -> Result:
        try:
            return Result(mutant, bench.killed_by(mutant))
        except CompileError:
            return Result(mutant, not_compiled=True)

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, todo)


def explanations(path: Path = EXPLANATIONS) -> dict[tuple[str, str, str], str]:
    """Reasons by file, source line and mutated line."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    return {(entry["file"], entry["line"], entry["becomes"]): entry["reason"] for entry in entries}


def report(results: Sequence[Result], explained: dict[tuple[str, str, str], str]) -> int:
    """Print the score and the survivors; returns the exit status."""
    files = {result.mutant.file.as_posix() for result in results}
    left = {key: reason for key, reason in explained.items() if key[0] in files}
    real = [result for result in results if not result.not_compiled]
    survivors = [result for result in real if result.killed_by is None]
    unexplained = 0
    for result in survivors:
        mutant = result.mutant
        reason = left.pop((mutant.file.as_posix(), mutant.before, mutant.after), None)
        unexplained += reason is None
        print(f"{'survived' if reason is None else 'explained'}  {mutant.file}:{mutant.line}  {mutant.kind}")
        print(f"    {mutant.before}\n    {mutant.after}")
        print(f"    because {reason}" if reason else "", end="\n" if reason else "")
    for file, line, becomes in left:
        print(f"an explanation that explains nothing: {file}\n    {line}\n    {becomes}")
    killed = len(real) - len(survivors)
    score = 100.0 * killed / (killed + unexplained) if killed + unexplained else 100.0
    kinds = ", ".join(
        f"{kind} {sum(r.killed_by is not None for r in of)}/{len(of)}"
        for kind in ("barrier", "shuffle", "bound", "mask")
        if (of := [r for r in real if r.mutant.kind == kind])
    )
    print(
        f"{killed}/{len(real)} killed ({kinds}), {len(survivors) - unexplained} explained, {unexplained} survived, "
        f"{len(results) - len(real)} did not compile; score {score:.1f}%"
    )
    return int(score < LEAST or bool(left))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="of core/kernels; all if none is named")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time (default: one per core)")
    options = parser.parse_args()
    files = [path.resolve().relative_to(ROOT) for path in options.files or sorted((ROOT / KERNELS).glob("*.h"))]
    results: list[Result] = []
    for file in files:
        start = time.monotonic()
        ops = ops_of(file)
        if not mutants(file, (ROOT / file).read_text(encoding="utf-8")):
            continue
        if not ops:
            raise SystemExit(f"{file}: no launcher of {TABLE.parent} includes it")
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(Path(folder), ops)
            todo = mutants(file, (bench.original / file).read_text(encoding="utf-8"))
            print(f"{file}: {len(todo)} mutants, ops: {', '.join(sorted(ops))}", flush=True)
            if cause := bench.killed_by(None):
                raise SystemExit(f"the sources as they are fail: {cause}")
            for result in run(bench, todo, options.jobs):
                results.append(result)
                fate = "does not compile" if result.not_compiled else result.killed_by or "SURVIVES"
                where = f"{result.mutant.file.name}:{result.mutant.line} {result.mutant.kind}"
                print(f"{time.monotonic() - start:6.0f} s  {where}  {result.mutant.after}  --  {fate}", flush=True)
    return report(results, explanations())


if __name__ == "__main__":
    sys.exit(main())
