"""Tests with several processes: a test file runs itself as a script, once per rank."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

PASSED = "all checks passed"


def run_ranks(script: str, size: int, folder: Path) -> None:
    """Run `script` in `size` processes joined by gloo; all of them must get to the end of `join`."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    store = tempfile.mkdtemp(prefix="store", dir=folder)  # one for each run: an old one would be joined again
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(size), str(folder), f"file://{store}/file"],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(size)
    ]
    outputs = []
    try:
        outputs = [process.communicate(timeout=150)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    for process, output in zip(ranks, outputs, strict=True):
        assert process.returncode == 0 and PASSED in output, "\n".join(outputs)


def join(checks: Callable[[int, int, Path], None]) -> None:
    """What the script does: `checks` with the rank, the number of ranks and the folder."""
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=sys.argv[4], rank=rank, world_size=size)
    checks(rank, size, folder)
    dist.destroy_process_group()
    print(PASSED)
