#!/usr/bin/env python3
"""Mutate the kernels of core/kernels one place at a time and count how many mutants the emulator's samples kill.

``python tools/mutate.py [FILE ...] [--jobs N]``

Kinds of mutants:

- barrier: a ``barrier()`` is removed;
- shuffle: a shuffle gives every lane its own value back;
- bound: a comparison is weakened, and strengthened, by one; ``==`` and ``!=`` are exchanged;
- mask: ``x & m`` becomes ``x``.

One build of the emulator holds all mutants, and POLYBIT_MUTANT says which of them is on: ``a < b`` is compiled as
``a < PB_BOUND(7, 8) < b``, whose operators compare as mutant 7 or 8 does where that one is on. What must be a constant
cannot be chosen at run time, so such mutants are built apart, one by one.

First every sample runs once on each backend with all mutants off, while the library notes where a mutant would have
computed anything else (a barrier or a shuffle: where it was reached). No other sample can tell the mutant from the
original. Those are what the mutant is held to, on every backend, each with one schedule (barriers and shuffles: with
all), until one fails: the quickest of each op first, then the quickest built with AddressSanitizer and
UndefinedBehaviorSanitizer, then, unless it is explained, the rest. A crash or a hang kills, too. A mutant that does not
compile is none.

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
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = Path("core/kernels")
EMULATOR = Path("backends/emulator")
LAUNCHERS = Path("core/launch")
EXPLANATIONS = ROOT / "tools" / "mutate.json"
LEAST = 95.0  # percent
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-w"]
FLAGS += ["-ftrivial-auto-var-init=pattern"]  # what a mutant leaves without a value has a strange one
BUILDS = {
    "plain": ["-fsanitize=bounds,shift", "-fsanitize-undefined-trap-on-error"],
    "sanitized": ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
ORDERS, WIDTHS = ("ascending", "descending", "shuffled"), ("emulator:32", "emulator:16", "emulator:64")
# Each backend with the schedule that every mutant is run under.
SCHEDULES = {**dict(zip(WIDTHS, ORDERS)), "emulator:mma": "shuffled"}
QUICK = 20  # the samples that are tried first, on every backend
SANITIZED = 60  # the samples that are tried under sanitizers, on every backend
# A run of samples may take this many times what the original takes, and at least so many seconds.
PATIENCE = {"plain": (20.0, 5.0), "sanitized": (100.0, 20.0)}

# Included before the sources of the build that holds all mutants. All operators here have the precedence of those that
# they stand in for; `left` is the left operand, which has met the place of the mutants already.
SWITCHES = """\
#pragma once
#include <stddef.h>
#include <stdlib.h>

namespace polybit_mutants {
enum : int { tracing = -1 };
inline const int chosen = getenv("POLYBIT_MUTANT") ? atoi(getenv("POLYBIT_MUTANT")) : 0;
inline unsigned char seen[@COUNT@];  // by mutant: it would have computed something else

#define PB_INLINE inline __attribute__((always_inline))
#define PB_APART __attribute__((noinline))

// Whether a place is as it is in the source.
PB_INLINE bool plain(int weak, int strong) {
  return __builtin_expect(chosen != weak && chosen != strong && chosen != tracing, 1);
}
PB_INLINE bool on(int mutant) {
  if (plain(mutant, mutant)) return false;
  seen[mutant] = 1;
  return chosen == mutant;
}
inline bool choose(bool original, int weak, bool weaker, int strong, bool stronger) {
  if (chosen == tracing) {
    if (weaker != original) seen[weak] = 1;
    if (stronger != original) seen[strong] = 1;
  }
  return chosen == weak ? weaker : chosen == strong ? stronger : original;
}

template <int WEAK, int STRONG>
struct Bound {};
@BOUNDS@
template <int MUTANT>
struct Mask {};
template <class L, int MUTANT>
struct Masked {
  L left;
};
template <class L, int MUTANT>
PB_INLINE Masked<L, MUTANT> operator&(L left, Mask<MUTANT>) {
  return {left};
}
template <class L, int MUTANT, class R>
PB_APART auto unmasked(L left, R right) -> decltype(left & right) {
  const auto original = left & right;
  if (chosen == tracing && original != left) seen[MUTANT] = 1;
  return chosen == MUTANT ? left : original;
}
template <class L, int MUTANT, class R>
PB_INLINE auto operator&(Masked<L, MUTANT> x, R right) -> decltype(x.left & right) {
  return plain(MUTANT, MUTANT) ? x.left & right : unmasked<L, MUTANT, R>(x.left, right);
}
}  // namespace polybit_mutants

extern "C" __attribute__((visibility("default"), used)) inline unsigned char *polybit_mutants_trace(size_t *count) {
  *count = sizeof polybit_mutants::seen;
  return polybit_mutants::seen;
}

#define PB_BOUND(weak, strong) ::polybit_mutants::Bound<weak, strong>()
#define PB_MASK(mutant) ::polybit_mutants::Mask<mutant>()
#define PB_ON(mutant) ::polybit_mutants::on(mutant)
"""
SWITCHED_BOUND = """\
template <class L, int WEAK, int STRONG>
struct @NAME@ {
  L left;
};
template <class L, int WEAK, int STRONG>
PB_INLINE @NAME@<L, WEAK, STRONG> operator@OP@(L left, Bound<WEAK, STRONG>) {
  return {left};
}
template <class L, int WEAK, int STRONG, class R>
PB_APART bool moved(@NAME@<L, WEAK, STRONG> x, R right) {
  return choose(x.left @OP@ right, WEAK, x.left @WEAKER@ right, STRONG, x.left @STRONGER@ right);
}
template <class L, int WEAK, int STRONG, class R>
PB_INLINE bool operator@OP@(@NAME@<L, WEAK, STRONG> x, R right) {
  return plain(WEAK, STRONG) ? x.left @OP@ right : moved(x, right);
}
"""


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
    """The source with what never runs as blanks, and every place at its offset.

    That is comments, strings, preprocessor lines and static assertions.
    """
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*|\bstatic_assert\([^;]*;'
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


def switches(count: int) -> str:
    """The header of the build that holds `count` mutants."""
    bounds = ""
    for number, (operator, replacements) in enumerate(BOUNDS.items()):
        weaker, stronger = replacements[0], replacements[-1]
        text = SWITCHED_BOUND.replace("@NAME@", f"Left{number}").replace("@OP@", operator)
        bounds += text.replace("@WEAKER@", weaker).replace("@STRONGER@", stronger)
    return SWITCHES.replace("@BOUNDS@", bounds).replace("@COUNT@", str(count + 1))


def switched(source: str, numbered: Mapping[Mutant, int]) -> str:
    """A file with its mutants behind switches: each by its number."""
    inserted: dict[int, str] = defaultdict(str)
    places: dict[tuple[int, int], list[int]] = defaultdict(list)
    for mutant, number in numbered.items():
        if mutant.kind == "bound":
            places[mutant.begin, mutant.end].append(number)
        elif mutant.kind == "mask":
            inserted[source.index("&", mutant.begin)] += f"& PB_MASK({number}) "
        else:
            inserted[mutant.begin] += f"(PB_ON({number}) ? {mutant.text or 'void()'} : "
            inserted[mutant.end] += ")"
    for (begin, end), (weak, *strong) in places.items():
        inserted[begin] += f"{source[begin:end]} PB_BOUND({weak}, {strong[0] if strong else weak}) "
    for at in sorted(inserted, reverse=True):
        source = source[:at] + inserted[at] + source[at:]
    return source


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
    for header in (ROOT / LAUNCHERS).glob("*.h"):
        path = header.relative_to(ROOT)
        if path != LAUNCHERS / "table.h" and file in included(path):
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


@dataclass(frozen=True)
class Turn:
    """Samples that run in one process."""

    build: str
    backend: str
    order: str
    samples: Sequence[int]


@dataclass
class Bench:
    """Builds mutants of the kernels of some ops in `folder` and runs samples on them: every n-th of these ops."""

    folder: Path
    ops: Collection[str]
    mutants: Sequence[Mutant]
    every: int = 1
    builds: Sequence[str] = tuple(BUILDS)
    backends: Sequence[str] = tuple(SCHEDULES)
    apart: set[Mutant] = field(default_factory=set)  # those that cannot be chosen at run time
    explained: Collection[Mutant] = ()  # no sample is expected to kill these: the quickest alone are tried
    seconds: dict[tuple[str, int], float] = field(default_factory=dict)  # of the original, by backend and sample
    telling: dict[Mutant, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))
    op_of: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Copy the sources, so that they may change meanwhile; write the samples; build; trace."""
        import polybit

        for tree in (Path("core"), EMULATOR):
            shutil.copytree(ROOT / tree, self.original / tree)
        self.include = Path(polybit.__file__).parent / "include"
        script = ROOT / "tests" / "conformance" / "samples.py"
        options = [str(self.samples), "--every", str(self.every), "--ops", *sorted(self.ops)]
        subprocess.run([sys.executable, str(script), *options], check=True, stdout=subprocess.DEVNULL)
        self.numbers = {mutant: number for number, mutant in enumerate(self.mutants, 1)}
        self._build_program(self.builds[0])
        self._build_switched()
        pool = ThreadPoolExecutor(os.cpu_count())
        self._building = {build: pool.submit(self._build_again, build) for build in self.builds[1:]}
        list(pool.map(self._trace, self.backends))
        pool.shutdown(wait=False)  # the first build has enough to do meanwhile

    @property
    def original(self) -> Path:
        """The sources as they are."""
        return self.folder / "original"

    @property
    def samples(self) -> Path:
        """The file of samples."""
        return self.folder / "samples"

    def _compile(self, build: str, *arguments: str | Path) -> None:
        command = [compiler(), *FLAGS, *BUILDS[build], f"-I{self.include}", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(done.stderr)

    def _build_program(self, build: str) -> None:
        """The program of tests/conformance/mutants.cpp, and the sources of the emulator that no mutant changes."""
        sources = [ROOT / f"tests/conformance/{name}.cpp" for name in ("mutants", "check", "call", "samples")]
        sources.append(self.original / "core/registry.cpp")
        self._compile(build, *sources, "-I", self.original / "core", "-ldl", "-o", self._program(build))
        for source in self._sources(kernels=False):
            self._compile(build, "-c", self.original / source, "-o", self._object(build, source))

    def _program(self, build: str) -> Path:
        return self.folder / f"{build}-mutants"

    def _object(self, build: str, source: Path) -> Path:
        return self.folder / f"{build}-{source.stem}.o"

    def _sources(self, kernels: bool) -> list[Path]:
        """The emulator's sources that include kernels, or the others."""
        sources = [path.relative_to(self.original) for path in sorted((self.original / EMULATOR).glob("*.cpp"))]
        return [s for s in sources if kernels == any(f.is_relative_to(KERNELS) for f in included(s, self.original))]

    def _link(self, build: str, tree: Path, library: Path, *options: str | Path) -> None:
        """The emulator from the kernels in `tree`, with the wanted ops."""
        wanted = tree / "wanted.def"
        wanted.write_text("".join(f"PB_OP({op}, )\n" for op in sorted(self.ops)), encoding="utf-8")
        objects = [self._object(build, source) for source in self._sources(kernels=False)]
        sources = [tree / source for source in self._sources(kernels=True)]
        self._compile(build, f'-DPB_TABLE_OPS="{wanted}"', *options, "-shared", *sources, *objects, "-o", library)

    @property
    def _header(self) -> Path:
        return self.folder / "switched" / "switches.h"

    def _switched(self, build: str) -> Path:
        return self.folder / f"{build}-switched.so"

    def _build_switched(self) -> None:
        """The first of the builds that hold all mutants, but for those that the compiler wants constant."""
        tree = self.folder / "switched"
        shutil.copytree(self.original, tree)
        self._header.write_text(switches(len(self.mutants)), encoding="utf-8")
        while True:
            for file in {mutant.file for mutant in self.mutants}:
                numbered = {m: n for m, n in self.numbers.items() if m.file == file and m not in self.apart}
                text = switched((self.original / file).read_text(encoding="utf-8"), numbered)
                (tree / file).write_text(text, encoding="utf-8")
            try:
                self._link(self.builds[0], tree, self._switched(self.builds[0]), "-include", self._header)
                return
            except CompileError as error:
                places = set(re.findall(r"/(\w+\.h):(\d+):\d+: error", str(error)))
                found = {m for m in self.mutants if (m.file.name, str(m.line)) in places}
                if found <= self.apart:
                    raise
                self.apart |= found

    def _build_again(self, build: str) -> None:
        """The same for another build."""
        self._build_program(build)
        self._link(build, self.folder / "switched", self._switched(build), "-include", self._header)

    def _run(self, turn: Turn, library: Path, mutant: int, timeout: float | None) -> subprocess.CompletedProcess[str]:
        command = [str(self._program(turn.build)), str(self.samples), str(library), turn.backend]
        command += [str(sample) for sample in turn.samples]
        env = {**os.environ, "POLYBIT_EMULATOR_ORDER": turn.order, "POLYBIT_MUTANT": str(mutant)}
        return subprocess.run(
            command, env=env, capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )

    def _trace(self, backend: str) -> None:
        """Which samples can tell a mutant from the original, and how long they take."""
        build = self.builds[0]
        done = self._run(Turn(build, backend, SCHEDULES[backend], ()), self._switched(build), -1, None)
        if done.returncode:
            raise SystemExit(f"the sources as they are fail on {backend}: {done.stderr}")
        for line in done.stdout.splitlines():
            sample, op, seconds, *seen = line.split()
            self.op_of[int(sample)] = op
            self.seconds[backend, int(sample)] = float(seconds)
            for number in seen:
                self.telling[self.mutants[int(number) - 1]].append((backend, int(sample)))

    def turns(self, mutant: Mutant) -> Iterator[Turn]:
        """What a mutant must survive, the quickest first."""
        if mutant in self.apart:
            ops = ops_of(mutant.file)
            places = [place for place in self.seconds if self.op_of[place[1]] in ops]
        else:
            places = self.telling[mutant]
        samples: dict[str, list[int]] = defaultdict(list)
        for place in sorted(places, key=self.seconds.__getitem__):
            samples[place[0]].append(place[1])
        for of in samples.values():
            turn: Counter[str] = Counter()  # the quickest of each op, then the second of each
            of.sort(key=lambda sample: turn.update([self.op_of[sample]]) or turn[self.op_of[sample]])
        plain, *sanitized = self.builds
        parts: list[tuple[str, int, int | None]] = [(plain, 0, QUICK), *((build, 0, SANITIZED) for build in sanitized)]
        if mutant not in self.explained:
            parts.append((plain, QUICK, None))
        for (build, begin, end), (backend, of) in product(parts, samples.items()):
            if of[begin:end]:
                yield Turn(build, backend, SCHEDULES[backend], of[begin:end])
        if mutant.kind in ("barrier", "shuffle"):
            for (backend, of), order in product(samples.items(), ORDERS):
                if order != SCHEDULES[backend]:
                    yield Turn(plain, backend, order, of)

    def killed_by(self, mutant: Mutant) -> str | None:
        """What killed a mutant; None if nothing did."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            tree, libraries = Path(name), {build: self._switched(build) for build in self.builds}
            if mutant in self.apart:
                libraries = {build: tree / f"{build}.so" for build in self.builds}
                shutil.copytree(self.original, tree, dirs_exist_ok=True)
                source = (tree / mutant.file).read_text(encoding="utf-8")
                (tree / mutant.file).write_text(mutant.apply(source), encoding="utf-8")
            for turn in self.turns(mutant):
                library = libraries[turn.build]
                if turn.build in self._building:
                    self._building[turn.build].result()
                if not library.exists():
                    self._link(turn.build, tree, library)
                factor, least = PATIENCE[turn.build]
                timeout = least + factor * sum(self.seconds[turn.backend, sample] for sample in turn.samples)
                where = f"{turn.backend} {turn.order}, {turn.build}"
                try:
                    done = self._run(turn, library, self.numbers[mutant], timeout)
                except subprocess.TimeoutExpired:
                    return f"{where}: no end after {timeout:.0f} s"
                if done.returncode:
                    said = next((line for line in done.stderr.splitlines() if line.strip("= ")), "")
                    return f"{where}: {said or f'exit status {done.returncode}'}"
        return None


@dataclass(frozen=True)
class Result:
    """What became of a mutant. killed_by: None if it survived; not_compiled: it is no mutant."""

    mutant: Mutant
    killed_by: str | None = None
    not_compiled: bool = False


def run(bench: Bench, todo: Iterable[Mutant], jobs: int) -> Iterator[Result]:
    """Try mutants, `jobs` at a time; results come as they are found."""

    def one(mutant: Mutant) -> Result:
        try:
            return Result(mutant, bench.killed_by(mutant))
        except CompileError:
            return Result(mutant, not_compiled=True)

    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed([pool.submit(one, mutant) for mutant in todo]):
            yield done.result()


def explanations(path: Path = EXPLANATIONS) -> dict[tuple[str, str, str], list[str]]:
    """Reasons by file, source line and mutated line: one for each mutant with these texts that is explained."""
    found: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for entry in json.loads(path.read_text(encoding="utf-8")):
        found[entry["file"], entry["line"], entry["becomes"]].append(entry["reason"])
    return found


def report(results: Sequence[Result], explained: Mapping[tuple[str, str, str], Sequence[str]]) -> int:
    """Print the score and the survivors; returns the exit status."""
    files = {result.mutant.file.as_posix() for result in results}
    left = {key: list(reasons) for key, reasons in explained.items() if key[0] in files}
    real = [result for result in results if not result.not_compiled]
    survivors = [result for result in real if result.killed_by is None]
    unexplained = 0
    for result in survivors:
        mutant = result.mutant
        reasons = left.get((mutant.file.as_posix(), mutant.before, mutant.after))
        reason = reasons.pop() if reasons else None
        unexplained += reason is None
        print(f"{'survived' if reason is None else 'explained'}  {mutant.file}:{mutant.line}  {mutant.kind}")
        print(f"    {mutant.before}\n    {mutant.after}")
        print(f"    because {reason}" if reason else "", end="\n" if reason else "")
    idle = [key for key, reasons in left.items() for _ in reasons]
    for file, line, becomes in idle:
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
    return int(score < LEAST or bool(idle))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="of core/kernels; all if none is named")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants at a time (default: one per core)")
    options = parser.parse_args()
    files = [path.resolve().relative_to(ROOT) for path in options.files or sorted((ROOT / KERNELS).glob("*.h"))]
    todo = [mutant for file in files for mutant in mutants(file, (ROOT / file).read_text(encoding="utf-8"))]
    start = time.monotonic()
    explained = explanations()
    equivalent = {m for m in todo if (m.file.as_posix(), m.before, m.after) in explained}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), set().union(*map(ops_of, files)), todo, explained=equivalent)
        told = f"{len(todo)} mutants, {len(bench.apart)} of them built apart, {len(bench.op_of)} samples"
        print(f"{time.monotonic() - start:6.0f} s  {told}", flush=True)
        for result in run(bench, todo, options.jobs):
            results.append(result)
            fate = "does not compile" if result.not_compiled else result.killed_by or "SURVIVES"
            where = f"{result.mutant.file.name}:{result.mutant.line} {result.mutant.kind}"
            print(f"{time.monotonic() - start:6.0f} s  {where}  {result.mutant.after}  --  {fate}", flush=True)
    results.sort(key=lambda result: bench.numbers[result.mutant])
    return report(results, explained)


if __name__ == "__main__":
    sys.exit(main())
