"""The CPU variants whose instructions this processor lacks, on an emulated one that has them (tests/bochs.py)."""

from __future__ import annotations

import platform
from pathlib import Path

import bochs
import pytest
from conformance.program import Build, build, counts
from tools import missing, require_tool

from polybit.backends import list_backends
from polybit.spec import OPS

# Bochs 3.0 takes a gather whose index lies in zmm16...zmm31 for an illegal instruction.
FLAGS = " ".join(f"-ffixed-xmm{i}" for i in range(16, 32))
AVX512 = ("cpu:avx512", "cpu:avx512_vbmi", "cpu:avx512_vnni", "cpu:avx512_bf16")
LACKING = [info.name for info in list_backends() if info.name in AVX512 and not info.usable]

pytestmark = [
    pytest.mark.slow,  # downloads 80 MB from Debian's archive, once
    pytest.mark.skipif(platform.machine() != "x86_64", reason="needs programs for x86-64"),
    pytest.mark.skipif(not LACKING, reason="this processor runs them itself, in test_conformance.py"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The conformance program, with an emulator to run it on."""
    for tool in ("apt-get", "dpkg-deb", "ldd"):
        require_tool(tool)
    try:
        bochs.debian()
    except bochs.EmulatorError as error:
        missing(str(error))
    return build("conformance", tmp_path_factory.mktemp("conformance"), flags=FLAGS)


def test_samples(program: Build, samples: tuple[Path, dict[str, int]], small: tuple[Path, int], tmp_path: Path) -> None:
    path, written = samples
    on_cpu = [program.program, path, program.cpu, *LACKING]
    # That a failure comes out of the machine as one, too.
    on_faulty = [program.program, small[0], program.faulty, "faulty:value"]
    result, caught = bochs.run([on_cpu, on_faulty], tmp_path)

    assert result.status == 0, result.output
    ran = counts(result.output)
    assert list(ran) == LACKING
    for backend, ops in ran.items():
        assert ops and ops == {op: (written[op], 0, 0) for op in ops}, backend
    # The others hold only what their instructions make faster.
    assert "cpu:avx512" not in LACKING or set(ran["cpu:avx512"]) == set(OPS)
    assert caught.status == 1 and " wanted " in caught.output, caught.output
