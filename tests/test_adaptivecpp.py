"""The kernels on a second implementation of SYCL: every sample. By hand only, ACPP=/path/to/acpp."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from conformance.program import ROOT, Build, build, counts
from tools import INCLUDE

from polybit.spec import OPS

COMPILER = os.environ.get("ACPP", "")
SOURCES = ROOT / "tests" / "simt"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COMPILER, reason="needs AdaptiveCpp, which no registry has: ACPP=/path/to/acpp"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return build("conformance", tmp_path_factory.mktemp("conformance"))


@pytest.mark.parametrize("width", [8, 16, 32])
def test_samples(program: Build, samples: tuple[Path, dict[str, int]], tmp_path: Path, width: int) -> None:
    library, (path, written) = tmp_path / "adaptivecpp.so", samples
    command = [COMPILER, "--acpp-targets=omp", "-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off"]
    command += [f"-DPB_SUB_GROUP={width}", f'-DPB_SYCL_WAVE="{SOURCES / "adaptivecpp_wave.h"}"']
    command += [f"-I{ROOT / 'core'}", f"-I{INCLUDE}", str(SOURCES / "adaptivecpp.cpp"), "-o", str(library)]
    subprocess.run(command, check=True, timeout=900)
    done = program.run(path, library)
    assert done.returncode == 0, done.stdout + done.stderr
    assert counts(done.stdout) == {"adaptivecpp": {op: (written[op], 0, 0) for op in OPS}}
    print(f"{sum(written.values())} samples of {len(written)} ops at {width} lanes")
