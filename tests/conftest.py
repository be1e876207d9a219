"""What every test file shares: torch's threads as the machine has them, and the usable backends as parameters."""

from __future__ import annotations

import os

# A thread that waits gives its core away at once. By default it keeps it busy for a while, and thousands of tiny
# products then wait for each other as soon as something else runs on the machine. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest

from polybit.backends import list_backends


def usable_backends() -> list[str]:
    """Every backend that can run CPU tensors here, best first; the emulator included."""
    return [info.name for info in list_backends() if info.usable and info.device_type == "cpu"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`usable_backend` becomes one test per usable backend, so that a skip never hides one."""
    if "usable_backend" in metafunc.fixturenames:
        metafunc.parametrize("usable_backend", usable_backends())


@pytest.fixture
def in_ci() -> bool:
    """Under CI=true what is missing is a failure."""
    return os.environ.get("CI") == "true"
