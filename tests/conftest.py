"""What every test file shares: torch's threads as the machine has them, and the usable backends as parameters."""

from __future__ import annotations

import os

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
