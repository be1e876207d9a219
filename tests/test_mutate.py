"""tools/mutate.py: what it mutates, that it tells a mutant that counts from one that does not, and its score."""

from __future__ import annotations

import importlib.util
import json
import sys
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


def test_every_barrier_and_shuffle_of_the_kernels_is_mutated() -> None:
    for path in sorted((ROOT / "core" / "kernels").glob("*.h")):
        text = path.read_text(encoding="utf-8")
        found = mutate.mutants(path.relative_to(ROOT), text)
        code = mutate.blanked(text)
        for kind, word in (("barrier", ".barrier("), ("shuffle", ".shuffle")):
            assert sum(mutant.kind == kind for mutant in found) == code.count(word), (path.name, kind)
        assert not found or mutate.ops_of(path.relative_to(ROOT)), path.name


def test_a_removed_barrier_is_killed_and_an_equivalent_mutant_survives(tmp_path: Path) -> None:
    require_tool("g++", "c++", "clang++")
    text = (ROOT / KBIT).read_text(encoding="utf-8")
    barrier = [mutant for mutant in mutate.mutants(KBIT, text) if mutant.kind == "barrier"][-1]
    at = text.index("first < a.n")
    same = mutate.Mutant(KBIT, "bound", at, at + 11, "a.n > first", 0, "first < a.n", "a.n > first")
    broken = mutate.Mutant(KBIT, "bound", at, at + 11, "first < nothing", 0, "first < a.n", "first < nothing")
    assert mutate.ops_of(KBIT) >= {"quantize_kbit", "dequantize_kbit"}
    bench = mutate.Bench(
        tmp_path, {"dequantize_kbit"}, [mutate.Stage("plain", 3, [("ascending", 32), ("shuffled", 16)])]
    )
    killed, survived, failed = mutate.run(bench, [barrier, same, broken], 2)
    assert killed.killed_by.startswith("emulator:") and "dequantize_kbit" in killed.killed_by
    assert survived == mutate.Result(same)
    assert failed == mutate.Result(broken, not_compiled=True)


def test_score_and_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    def of(number: int, killed: bool) -> object:
        mutant = mutate.Mutant(KBIT, "mask", 0, 0, "", number, f"line {number}", f"mutated {number}")
        return mutate.Result(mutant, "a sample" if killed else None)

    results = [of(number, number > 2) for number in range(1, 41)]
    reason = {(KBIT.as_posix(), "line 1", "mutated 1"): "it cannot matter"}
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
