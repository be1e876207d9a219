"""What every test file shares: torch's threads as the machine has them, and the usable backends as parameters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# A thread that waits gives its core away at once. By default it keeps it busy for a while, and thousands of tiny
# products then wait for each other as soon as something else runs on the machine. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Intel's OpenCL for the CPU compiles a kernel at its first launch. These spare a third to a half of that time: they
# skip careful allocation of registers and the moving of instructions. Read when sycl:cpu is first used.
os.environ.setdefault(
    "CL_CONFIG_LLVM_OPTIONS",
    "-optimize-regalloc=false -disable-machine-sink -disable-machine-licm -disable-machine-cse",
)

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from conformance.samples import write
from tools import backend_param

from polybit.backends import list_backends


def usable_backends() -> list[ParameterSet]:
    """Every backend that can run CPU tensors here, best first; the emulator included, SYCL slow."""
    return [backend_param(info.name) for info in list_backends() if info.usable and info.device_type == "cpu"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`usable_backend` becomes one test per usable backend, so that a skip never hides one."""
    if "usable_backend" in metafunc.fixturenames:
        metafunc.parametrize("usable_backend", usable_backends())


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def in_ci() -> bool:
    """Under CI=true what is missing is a failure."""
    return os.environ.get("CI") == "true"


@pytest.fixture(
    scope="session", params=[5, pytest.param(1, marks=pytest.mark.slow)], ids=["every_fifth_sample", "every_sample"]
)
def samples(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """Samples of every op for the conformance program, and how many of each there are."""
    path = tmp_path_factory.mktemp("samples") / "samples"
    return path, write(path, every=request.param)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The samples of matmul_int8 alone, for the backend with deliberate faults, and how many there are."""
    path = tmp_path_factory.mktemp("small") / "samples"
    return path, write(path, ["matmul_int8"])["matmul_int8"]
