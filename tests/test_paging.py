"""Paged states: files without a name, more state than memory, no litter, a full disk."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from optimizers import assert_same, make, parameter, set_grad, tensors, train
from tools import PACKAGE, run_python

from polybit import optim
from polybit.optim import paging

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux' /proc")

MB = 1 << 20


def mapped(folder: Path, pid: int | str = "self") -> int:
    """Bytes that a process maps of files which are, or were, in a folder."""
    total = 0
    for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines():
        if f" {folder}/" in line:
            first, last = (int(x, 16) for x in line.split()[0].split("-"))
            total += last - first
    return total


@pytest.mark.parametrize("name", ["PagedAdamW", "PagedAdamW8bit", "PagedAdEMAMix8bit", "PagedLion", "PagedAdagrad8bit"])
def test_paged_states_are_in_the_folder_and_give_the_same_steps(name: str, tmp_path: Path) -> None:
    paged, plain = parameter(600, 700), parameter(600, 700)
    optimizer, other = make(name, [paged], page_folder=tmp_path), make(name.removeprefix("Paged"), [plain])
    for each in (optimizer, other):
        train(each, 0, 2)
    assert_same(tensors(optimizer), tensors(other))
    states = sum(x.nbytes for x in optimizer.state[paged].values() if torch.is_tensor(x) and x.numel() >= 100_000)
    assert states <= mapped(tmp_path) < states + 4 * 4096 and not os.listdir(tmp_path)
    again = make(name, [parameter(600, 700)], page_folder=tmp_path)
    again.load_state_dict(other.state_dict())  # a loaded state is paged as well
    assert mapped(tmp_path) >= 2 * states
    assert_same(tensors(again)[1:], tensors(other)[1:])
    del optimizer, again
    gc.collect()
    assert mapped(tmp_path) == 0


def test_a_parameter_and_a_group_may_be_paged_by_themselves(tmp_path: Path) -> None:
    params = [parameter(400, 300, seed=i) for i in range(3)]
    optim.override(params[0], is_paged=True, page_folder=str(tmp_path))
    optimizer = optim.Lion([{"params": params[:2]}, {"params": params[2:], "is_paged": True, "page_folder": tmp_path}])
    train(optimizer, 0, 1)
    assert 2 * 480_000 <= mapped(tmp_path) < 2 * 480_000 + 4 * 4096


def test_small_states_are_not_paged(tmp_path: Path) -> None:
    optimizer = optim.PagedLion([parameter(99_999)], page_folder=tmp_path)
    train(optimizer, 0, 1)
    assert mapped(tmp_path) == 0


def test_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    assert paging.default_folder() == "/var/tmp"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert paging.default_folder() == str(tmp_path)
    optimizer = optim.PagedLion([parameter(400, 300)])
    train(optimizer, 0, 1)
    assert mapped(tmp_path) >= 480_000
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    other = optim.PagedLion([parameter(400, 300)])
    with pytest.raises(OSError, match="gone"):
        train(other, 0, 1)
    assert not other.state


def test_another_device_says_so() -> None:
    with pytest.raises(
        NotImplementedError, match="paged optimizer states are for the CPU and the accelerator, not for meta"
    ):
        paging.paged_zeros((10,), torch.float32, torch.device("meta"), None)


def test_the_room_on_disk_returns(tmp_path: Path) -> None:
    """128 MB of states: free again when the optimizer is gone. (Others write to the disk, too: the best of 5.)"""

    def free() -> int:
        info = os.statvfs(tmp_path)
        return info.f_bavail * info.f_frsize

    for _ in range(5):
        param = parameter(16, 1 << 20)
        param.grad = torch.zeros_like(param)
        optimizer = optim.PagedAdamW([param], page_folder=tmp_path)
        before = free()
        optimizer.step()
        during = free()
        del optimizer
        gc.collect()
        taken, returned = before - during, free() - during
        if min(taken, returned) >= 120 * MB:
            return
        time.sleep(0.5)
    pytest.fail(f"{taken / MB:.0f} MB taken, {returned / MB:.0f} MB returned")


# The limit is on private memory (the heap, anonymous and private mappings), which the system could not give back
# without swap space; shared mappings of files do not count, because it can always write them out and drop them.
LIMITED = """
import resource, re, torch
from polybit import optim

def memory(what):
    return int(re.search(what + r":\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024

param = torch.nn.Parameter(torch.ones(24_000_000, dtype=torch.bfloat16))
param.grad = torch.full_like(param, 0.01)
small = torch.nn.Parameter(torch.ones(5000)); small.grad = torch.ones(5000)
optim.AdamW8bit([small]).step()  # threads and their stacks
optimizer = optim.{name}([param], lr=0.1{options})
resource.setrlimit(resource.RLIMIT_DATA, (memory("VmData") + {room}, -1))
before = memory("RssAnon")
for _ in range(3):
    optimizer.step()
states = sum(x.nbytes for x in optimizer.state[param].values() if torch.is_tensor(x))
print(f"{{states}} {{memory('RssAnon') - before}} {{float(param[0])}}")
"""


@pytest.mark.parametrize(
    ("name", "states"), [pytest.param("AdamW", 192_000_000, marks=pytest.mark.slow), ("AdamW8bit", 48_752_048)]
)
def test_states_larger_than_the_memory(name: str, states: int, tmp_path: Path) -> None:
    """With room for an eighth of the states: paged it trains, otherwise it does not."""
    options = f", page_folder={str(tmp_path)!r}"
    room = states // 8
    done = run_python(LIMITED.format(name="Paged" + name, options=options, room=room))
    total, private, value = done.stdout.split()
    print(f"Paged{name}: {int(total) / MB:.0f} MB of states, {int(private) / MB:.1f} MB more of private memory")
    assert int(total) == states and int(private) < room and float(value) < 1
    assert not os.listdir(tmp_path)
    failed = run_python(LIMITED.format(name=name, options="", room=room), check=False)
    assert failed.returncode != 0 and "can't allocate memory" in failed.stderr, failed.stderr


def resident() -> int:
    """Bytes of mapped files that are in memory."""
    found = re.search(r"RssFile:\s*(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found
    return int(found[1]) * 1024


def test_the_system_can_drop_the_states_and_reads_them_again(tmp_path: Path) -> None:
    """MADV_PAGEOUT (21, Linux 5.4) reclaims pages as a lack of memory would; the next step is as if they had stayed."""
    paged, plain = parameter(1000, 8000), parameter(1000, 8000)
    optimizer, other = optim.PagedAdamW([paged], page_folder=tmp_path), optim.AdamW([plain])
    for each in (optimizer, other):
        train(each, 0, 1)
    before = resident()
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    for key in ("state1", "state2"):
        state = optimizer.state[paged][key]
        assert madvise(ctypes.c_void_p(state.data_ptr()), ctypes.c_size_t(state.nbytes), 21) == 0
    dropped = before - resident()
    print(f"{dropped / MB:.0f} of 61 MB were dropped")
    assert dropped > 50 * MB
    for each in (optimizer, other):
        train(each, 1, 2)
    assert_same(tensors(optimizer), tensors(other))


KILLED = """
import torch
from polybit import optim

param = torch.nn.Parameter(torch.ones(20_000_000))
param.grad = torch.ones_like(param)
optimizer = optim.PagedAdamW8bit([param], page_folder={folder!r})
print("ready", flush=True)
while True:
    optimizer.step()
    print("step", flush=True)
"""


def kill_after(folder: Path, when: Callable[[subprocess.Popen[str]], None]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(folder=str(folder))],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )  # fmt: skip
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        when(process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    assert process.returncode == -signal.SIGKILL


def test_kill_leaves_no_file(tmp_path: Path) -> None:
    """Killed in the middle of a later step, and while its files are being made: nothing has a name at any time."""

    def in_a_step(process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None and process.stdout.readline() == "step\n"
        assert mapped(tmp_path, process.pid) >= 40_000_000 and not os.listdir(tmp_path)

    def in_the_first(process: subprocess.Popen[str]) -> None:
        while not mapped(tmp_path, process.pid):
            assert process.poll() is None and not os.listdir(tmp_path)

    for when in (in_a_step, in_the_first):
        kill_after(tmp_path, when)
        assert not os.listdir(tmp_path)


FULL = """
import resource, signal, torch
from polybit import optim

params = [torch.nn.Parameter(torch.ones(numel)) for numel in (200_000, 5, 2_000_000)]
for param in params:
    param.grad = torch.ones_like(param)
optimizer = optim.PagedAdamW(params, page_folder={folder!r})
before = [param.detach().clone() for param in params]
resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, -1))  # room for the first state, not for the last
try:
    optimizer.step()
except OSError as problem:
    print(problem)
assert not optimizer.state and all(torch.equal(param, old) for param, old in zip(params, before))
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
optimizer.step()
assert all((param < 1).all() for param in params) and optimizer.state[params[2]]["step"] == 1
"""


def test_no_room_is_an_error_and_nothing_has_changed(tmp_path: Path) -> None:
    done = run_python(FULL.format(folder=str(tmp_path)))
    assert re.search(r"no room for 8000000 bytes of optimizer state: File too large: '.*'\n$", done.stdout)
    assert str(tmp_path) in done.stdout and not os.listdir(tmp_path)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC of the second state: the first is given back, loading and stepping leave everything as it was."""
    param = parameter(400, 300)
    plain = optim.AdamW([param])
    train(plain, 0, 2)
    paged = optim.PagedAdamW([param], page_folder=tmp_path)
    calls = []

    def full(handle: int, offset: int, size: int) -> None:
        calls.append(size)
        if len(calls) % 2 == 0:
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = tensors(plain)
    set_grad(param, 7)
    for attempt in (paged.step, lambda: paged.load_state_dict(plain.state_dict())):
        with pytest.raises(OSError, match="no room for 480000 bytes of optimizer state: No space left on device"):
            attempt()
        assert not paged.state and mapped(tmp_path) == 0
    assert_same(tensors(plain), before) and len(calls) == 4
