"""examples/backend_template: a backend that is a project of its own, built and checked as its author would."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tools import PACKAGE, compile_library, require_tool, run_python

TEMPLATE = Path(__file__).parent.parent / "examples" / "backend_template"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(a copy of the folder outside the tree, where pip installed it)."""
    require_tool("cc", "gcc", "clang")
    folder = tmp_path_factory.mktemp("template")
    source, site = folder / "source", folder / "site"
    shutil.copytree(TEMPLATE, source, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*command, "--target", str(site), "."],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return source, site


def test_its_own_tests_pass(installed: tuple[Path, Path]) -> None:
    source, site = installed
    done = run_python(
        f"import sys, pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', {str(source)!r}]))",
        PYTHONPATH=str(site),
    )
    assert "4 passed" in done.stdout, done.stdout


def test_the_environment_alone_chooses_it(installed: tuple[Path, Path]) -> None:
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
