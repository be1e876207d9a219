"""tools/mutate.py: what it mutates, that it tells a mutant that counts from one that does not, and its score."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest
from tools import require_tool

ROOT = Path(__file__).parent.parent
KBIT = Path("core/kernels/kbit.h")


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("polybit_mutate", ROOT / "tools" / "mutate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


mutate = load()

SOURCE = """\
#if PB_N < 3  // a < b
template <class T>  /* a < b */
void f(const T &x, Wave w) {
  for (u32 k = 0; k < n; k++) v = max(v, w.shuffle_xor(g(v, 1), mask));
  w.barrier();  // meet
  if (x->a[i] >= b && (tid & ~(lanes -
                              1u)) == 0) y = data<float>(x) << 2;
  static_assert(N < 3, "checked by the compiler");
}
"""
SWITCHED = """\
#if PB_N < 3  // a < b
template <class T>  /* a < b */
void f(const T &x, Wave w) {
  for (u32 k = 0; k < PB_BOUND(1, 2) < n; k++) v = max(v, (PB_ON(3) ? (g(v, 1)) : w.shuffle_xor(g(v, 1), mask)));
  (PB_ON(4) ? void() : w.barrier());  // meet
  if (x->a[i] >= PB_BOUND(5, 6) >= b && (tid & PB_MASK(7) & ~(lanes -
                              1u)) == PB_BOUND(8, 8) == 0) y = data<float>(x) << 2;
  static_assert(N < 3, "checked by the compiler");
}
"""
CHANGES = [
    (4, "bound", "for (u32 k = 0; k <= n; k++) v = max(v, w.shuffle_xor(g(v, 1), mask));"),
    (4, "bound", "for (u32 k = 0; k + 1 < n; k++) v = max(v, w.shuffle_xor(g(v, 1), mask));"),
    (4, "shuffle", "for (u32 k = 0; k < n; k++) v = max(v, (g(v, 1)));"),
    (5, "barrier", "; // meet"),
    (6, "bound", "if (x->a[i] > b && (tid & ~(lanes -"),
    (6, "bound", "if (x->a[i] + 1 >= b && (tid & ~(lanes -"),
    (6, "mask", "if (x->a[i] >= b && (tid) == 0) y = data<float>(x) << 2;"),
    (7, "bound", "1u)) != 0) y = data<float>(x) << 2;"),
]


def test_each_kind_of_mutant() -> None:
    found = mutate.mutants(KBIT, SOURCE)
    assert [(mutant.line, mutant.kind, mutant.after) for mutant in found] == CHANGES
    for mutant in found:
        assert "".join(mutant.after.split()) in "".join(mutant.apply(SOURCE).split())


def test_all_mutants_behind_switches() -> None:
    numbered = {mutant: number for number, mutant in enumerate(mutate.mutants(KBIT, SOURCE), 1)}
    assert mutate.switched(SOURCE, numbered) == SWITCHED


def test_operators_of_the_switches(tmp_path: Path) -> None:
    """Every comparison and the mask, off and as each of their mutants, of integers and of floats."""
    require_tool("g++", "c++", "clang++")
    (tmp_path / "switches.h").write_text(mutate.switches(2), encoding="utf-8")
    expected, lines = [], []
    for operator, replacements in mutate.BOUNDS.items():
        for left, right in product((1, 2, 3), repeat=2):
            for suffix in ("", ".0f"):
                switched = f"{left}{suffix} {operator} PB_BOUND(1, 2) {operator} {right}{suffix}"
                lines.append(f'printf("%d", {switched});')
                texts = (operator, replacements[0], replacements[-1])
                expected.append([int(eval(f"{left} {text} {right}")) for text in texts])
    lines.append('printf("%d", 13u & PB_MASK(2) & 6u);')
    expected.append([4, 4, 13])
    (tmp_path / "main.cpp").write_text(
        f'#include "switches.h"\n#include <stdio.h>\nint main() {{\n{"".join(lines)}\n}}\n'
    )
    subprocess.run([mutate.compiler(), "-std=c++17", "main.cpp", "-o", "main"], check=True, cwd=tmp_path)
    for mutant in (0, 1, 2):
        env = {**os.environ, "POLYBIT_MUTANT": str(mutant)}
        done = subprocess.run([str(tmp_path / "main")], check=True, capture_output=True, text=True, env=env)
        assert done.stdout == "".join(str(values[mutant]) for values in expected), mutant


def test_every_barrier_and_shuffle_of_the_kernels_is_mutated() -> None:
    for path in sorted((ROOT / "core" / "kernels").glob("*.h")):
        text = path.read_text(encoding="utf-8")
        found = mutate.mutants(path.relative_to(ROOT), text)
        code = mutate.blanked(text)
        for kind, word in (("barrier", ".barrier("), ("shuffle", ".shuffle")):
            assert sum(mutant.kind == kind for mutant in found) == code.count(word), (path.name, kind)
        assert not found or mutate.ops_of(path.relative_to(ROOT)), path.name


def test_what_samples_notice(tmp_path: Path) -> None:
    """Mutants of one build and the same ones built apart; one that only AddressSanitizer sees, one that is none."""
    require_tool("g++", "c++", "clang++")
    text = (ROOT / KBIT).read_text(encoding="utf-8")
    begin = text.index("struct DequantizeKbit")
    found = [mutant for mutant in mutate.mutants(KBIT, text) if mutant.begin > begin]
    barrier = next(mutant for mutant in found if mutant.kind == "barrier")
    behind, before = (next(m for m in found if m.after == f"if (first {o} a.n) {{") for o in ("<=", "+ 1 <"))
    at = text.index("first < a.n", begin)
    broken = mutate.Mutant(KBIT, "bound", at, at + 11, "first < nothing", 0, "first < a.n", "first < nothing")
    apart = [replace(barrier, line=0), broken]
    bench = mutate.Bench(
        tmp_path,
        {"dequantize_kbit"},
        [barrier, behind, before, *apart],
        every=3,
        builds=["plain"],
        backends=["emulator:32", "emulator:16"],
        apart=set(apart),
    )
    results = {result.mutant: result for result in mutate.run(bench, bench.mutants, 2)}
    shared, survived, killed, alone, failed = (results[mutant] for mutant in bench.mutants)
    for result in (shared, alone):  # which sample is the first to notice depends on how long each took
        assert re.match(r"emulator:(32|16) \w+, plain: dequantize_kbit, sample ", result.killed_by)
    assert survived == mutate.Result(behind)  # reads behind an input
    assert "dequantize_kbit" in killed.killed_by
    assert failed == mutate.Result(broken, not_compiled=True)
    assert bench.op_of and set(bench.op_of.values()) == {"dequantize_kbit"}
    # A mutant is held to the samples that have an end in the middle of eight, and no others.
    assert 0 < len(bench.telling[before]) < len(bench.seconds)


def test_score_and_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    def of(number: int, killed: bool) -> object:
        mutant = mutate.Mutant(KBIT, "mask", 0, 0, "", number, f"line {number}", f"mutated {number}")
        return mutate.Result(mutant, "a sample" if killed else None)

    results = [of(number, number > 2) for number in range(1, 41)]
    reason = {(KBIT.as_posix(), "line 1", "mutated 1"): ["it cannot matter"]}
    assert mutate.report(results, {}) == 0
    assert (
        "38/40 killed (mask 38/40), 0 explained, 2 survived, 0 did not compile; score 95.0%" in capsys.readouterr().out
    )
    assert mutate.report(results[:-1], {}) == 1
    assert "score 94.9%" in capsys.readouterr().out
    assert mutate.report(results[:-1], reason) == 0
    printed = capsys.readouterr().out
    assert (
        "explained  core/kernels/kbit.h:1  mask\n    line 1\n    mutated 1\n    because it cannot matter\n" in printed
    )
    assert "survived  core/kernels/kbit.h:2" in printed and "score 97.4%" in printed
    assert mutate.report(results[2:], reason) == 1
    assert "an explanation that explains nothing: core/kernels/kbit.h\n    line 1" in capsys.readouterr().out


def test_explanations_are_of_lines_that_exist() -> None:
    entries = json.loads((ROOT / "tools" / "mutate.json").read_text(encoding="utf-8"))
    for entry in entries:
        assert set(entry) == {"file", "line", "becomes", "reason"}
        text = (ROOT / entry["file"]).read_text(encoding="utf-8")
        known = {(mutant.before, mutant.after) for mutant in mutate.mutants(Path(entry["file"]), text)}
        assert (entry["line"], entry["becomes"]) in known, entry
        assert len(entry["reason"]) > 20, entry
