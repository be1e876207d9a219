"""Paged states of a GPU's parameters, with a stand-in for torch's device module: order of copies, bounds, results.

The stand-in copies at once and writes down who waited for whom. It shows the order in which work is handed over; that a
real GPU keeps to it, only one can show.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from optimizers import assert_same, make, parameter, tensors, train
from torch import Tensor
from torch._subclasses import FakeTensorMode

from polybit.optim import state as optim_state
from polybit.optim import windows
from polybit.optim.state import State


class Stream:
    """A stream that writes down what it is told."""

    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name, self.events = log, name, 0

    def record_event(self) -> str:
        self.events += 1
        self.log.append(f"{self.name} records {self.name}-{self.events}")
        return f"{self.name}-{self.events}"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def synchronize(self) -> None:
        self.log.append(f"host waits for {self.name}")


class Module:
    """In the place of torch.cuda."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.compute = Stream(self.log, "compute")

    def current_stream(self, device: torch.device) -> Stream:
        return self.compute

    def Stream(self, device: torch.device) -> Stream:
        return Stream(self.log, "copies")

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.log.append(f"on {stream.name}")
        yield


def large(state: State, device: torch.device) -> list[str]:
    """What would be in host memory."""
    return [name for name, x in state.items() if isinstance(x, Tensor) and x.numel() >= 1000]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Module:
    module = Module()
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(windows, "away", large)
    monkeypatch.setattr(windows, "WINDOW_BYTES", 40_000)
    return module


SIZES = (3000, 2000, 9000, 1000, 100, 4000)


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "AdEMAMix", "LAMB8bit", "LARS", "SGD"])
def test_windows_do_not_change_a_step(name: str, module: Module) -> None:
    params, others = ([parameter(n, seed=i) for i, n in enumerate(SIZES)] for _ in range(2))
    train(make(name, params, min_8bit_size=0), 0, 3)
    assert module.log.count("host waits for copies") == 3
    log = len(module.log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows, "away", lambda state, device: [])
        train(make(name, others, min_8bit_size=0), 0, 3)
    assert len(module.log) == log
    for one, other in zip(params, others):
        assert torch.equal(one, other)


def test_the_states_are_written_back_before_the_step_ends(module: Module) -> None:
    params, others = ([parameter(n, seed=i) for i, n in enumerate(SIZES)] for _ in range(2))
    optimizer, other = make("AdamW8bit", params), make("AdamW8bit", others)
    train(optimizer, 0, 2)
    module_free = pytest.MonkeyPatch()
    module_free.setattr(windows, "away", lambda state, device: [])
    train(other, 0, 2)
    module_free.undo()
    assert_same(tensors(optimizer), tensors(other))


def test_the_order_of_copies_and_ops(module: Module) -> None:
    """Window 2 is on its way while the op works on window 1; nothing is written back before its op is done."""
    batch: windows.Batch = [(parameter(10_000), {"step": 0, "state1": torch.zeros(10_000)}) for _ in range(3)]
    for part in windows.staged(batch, torch.device("cpu")):
        assert len(part) == 1
        module.log.append("op")
    fetch, back = ["on copies"], ["on copies"]
    assert module.log == [
        *fetch, "copies records copies-1",
        *fetch, "copies records copies-2",
        "compute waits for copies-1", "op", *back, "compute records compute-1", "copies waits for compute-1",
        *fetch, "copies records copies-3",
        "compute waits for copies-2", "op", *back, "compute records compute-2", "copies waits for compute-2",
        "compute waits for copies-3", "op", *back, "compute records compute-3", "copies waits for compute-3",
        "host waits for copies",
    ]  # fmt: skip


def test_the_device_holds_two_windows(module: Module) -> None:
    batch: windows.Batch = [
        (parameter(10_000), {"step": 0, "state1": torch.full((10_000,), float(i))}) for i in range(8)
    ]
    alive: list[Any] = []
    for i, part in enumerate(windows.staged(batch, torch.device("cpu"))):
        (_, state), *none = part
        assert not none and float(state["state1"][0]) == i
        state["state1"].add_(100)
        alive.append(weakref.ref(state["state1"]))
        del part, state
        gc.collect()
        assert sum(ref() is not None for ref in alive) == 1  # and one that is on its way
    assert [float(state["state1"][-1]) for _, state in batch] == [100.0 + i for i in range(8)]


def test_windows_are_cut_between_parameters(module: Module) -> None:
    batch: windows.Batch = [(parameter(n), {"step": 0, "state1": torch.zeros(n)}) for n in SIZES]
    parts = windows.cut(batch, 40_000, torch.device("cpu"))
    assert [[param.numel() for param, _ in part] for part in parts] == [[3000, 2000], [9000, 1000, 100], [4000]]


@pytest.mark.parametrize("bits", (32, 8))
def test_on_an_apple_gpu_there_is_nothing_to_page(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paged or not, states are on the device, and no window is opened. The tensors are fake: no such device is here."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch, "get_device_module", None)  # where windows begin
    monkeypatch.setattr(optim_state, "state_map", lambda _, device: torch.zeros(256, device=device))
    with FakeTensorMode():
        param = torch.ones(1000, 1000, device="mps")
        paged, plain = (
            optim_state.new_state("adam", param, bits=bits, paged=paged, folder=None) for paged in (True, False)
        )
        assert paged.keys() == plain.keys()
        for name, x in plain.items():
            mine = paged[name]
            if isinstance(x, Tensor):
                assert isinstance(mine, Tensor) and mine.device == x.device == param.device
                assert (mine.dtype, mine.shape, mine.stride()) == (x.dtype, x.shape, x.stride())
        batch = [(param, paged)]
        (window,) = windows.staged(batch, param.device)
        assert window is batch
