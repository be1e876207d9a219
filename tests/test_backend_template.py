"""docs/writing_a_backend.md, followed word by word, and examples/backend_template, which it tells to copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tools import PACKAGE, compile_library, require_tool, run_python

ROOT = Path(__file__).parent.parent
TEMPLATE = ROOT / "examples" / "backend_template"
GUIDE = (ROOT / "docs" / "writing_a_backend.md").read_text(encoding="utf-8")
# The commands of this environment; installed is what is built, without its dependencies.
COMMANDS = f"""python() {{ {sys.executable} "$@"; }}
pip() {{ python -m pip "$@"; }}
polybit() {{ python -m polybit "$@"; }}
"""


def blocks(language: str) -> list[str]:
    """The guide's code in a language."""
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.S)


def follow(commands: str, folder: Path) -> tuple[str, Path]:
    """Run commands in a folder; (what they printed, where pip installed to)."""
    site = folder / "site"
    path = {"PYTHONPATH": f"{PACKAGE.parent}{os.pathsep}{site}", "PIP_TARGET": str(site)}
    done = subprocess.run(
        ["bash", "-ec", COMMANDS + commands],
        cwd=folder,
        env={**os.environ, **path, "PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, site


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(what the guide's commands for C printed, where pip installed to)."""
    require_tool("cc", "gcc", "clang")
    folder = tmp_path_factory.mktemp("template")
    shutil.copytree(TEMPLATE, folder / "examples" / TEMPLATE.name, ignore=shutil.ignore_patterns("__pycache__"))
    return follow(blocks("sh")[0], folder)


def test_the_guide_in_c(installed: tuple[str, Path]) -> None:
    """It is installed, listed, right on every sample, and passes its own tests."""
    printed, _ = installed
    assert re.search(r"^ *template +cpu +1 +0 +24 +0: none", printed, re.M), printed
    assert re.search(r"^template: 1 native, 0 inherited, 24 reference; \d\d samples, 0 failures$", printed, re.M), (
        printed
    )
    assert "4 passed" in printed


def test_the_guide_in_python(tmp_path: Path) -> None:
    (tmp_path / "polybit_mine.py").write_text(blocks("python")[0])
    (tmp_path / "pyproject.toml").write_text(blocks("toml")[0])
    printed, site = follow(blocks("sh")[1], tmp_path)
    assert "25 samples, 8 of them declined\nran by mine\n" in printed
    assert re.search(r"^ *mine +cpu +1 +0 +24 +0: none", printed, re.M), printed
    assert "mine: 1 native, 0 inherited, 24 reference; 25 samples, 0 failures\n" in printed
    assert "Resolution(owner='mine', kind='native', reason='')" in printed
    assert (site / "polybit_mine.py").exists()


def test_the_environment_alone_chooses_it(installed: tuple[str, Path]) -> None:
    """Named, it runs and nothing else does; not named, the CPU's own backend does."""
    code = """
import torch, polybit
from polybit.backends import last_backend, list_backends
got = torch.ops.polybit.quantize_int8(torch.tensor([[1.0, -2.0, 0.5, 7.0]]), 6.0)
print(last_backend(), [out.tolist() for out in got])
print(*(info.origin for info in list_backends() if info.name == "template"))
"""
    result = "[[[64, -127, 32, 0]], [2.0], [0, 0, 0, 1]]"
    _, site = installed
    named = run_python(code, PYTHONPATH=str(site), POLYBIT_BACKEND="template", POLYBIT_FALLBACK="error")
    runner, origin = named.stdout.splitlines()
    assert runner == f"template {result}"
    assert Path(origin).is_relative_to(site)
    unnamed = run_python(code, PYTHONPATH=str(site)).stdout
    assert unnamed.startswith("cpu:") and unnamed.splitlines()[0].endswith(result)


FAULTS = {
    "rintf(j->read": "truncf(j->read",  # another rounding
    "fabsf(value) >= j->threshold": "fabsf(value) > j->threshold",
    "0x1p112f": "0x1p111f",  # fp16 alone
    "if (isnan(value)) absmax": "if (false) absmax",
    "(size_t)(end - begin)": "(size_t)(end - begin) + 1",  # a byte behind an output
}


def test_a_wrong_result_is_noticed(tmp_path: Path) -> None:
    """Each fault in the source, and none, by polybit.testing.check."""
    text = (TEMPLATE / "backend.c").read_text(encoding="utf-8")
    libraries = []
    for i, (right, wrong) in enumerate({"": "", **FAULTS}.items()):
        assert not right or text.count(right) == 1, right
        source = tmp_path / f"fault{i}.c"
        faulty = text.replace(right, wrong) if right else text
        source.write_text(faulty.replace('"template"', f'"fault{i}"'), encoding="utf-8")
        libraries.append(str(compile_library(tmp_path, str(source), f"fault{i}", "-ffp-contract=off")))
    done = run_python(f"""
import polybit
from polybit.testing import check
for library in {libraries!r}:
    (name,) = polybit.load_backend(library)
    result = check("quantize_int8", name)
    assert result.kind == "native" and result.unsupported == 0
    print(result.samples, len(result.failures), result.failures[:1], sep=" | ")
""")
    good, *bad = done.stdout.splitlines()
    assert good == f"{good.split()[0]} | 0 | []" and int(good.split()[0]) > 70
    assert len(bad) == len(FAULTS)
    for line, fault in zip(bad, FAULTS):
        assert int(line.split(" | ")[1]) > 0, fault
    assert "bytes outside it were written" in bad[-1]
