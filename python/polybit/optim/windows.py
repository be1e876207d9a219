"""Paged states of parameters on a GPU: in pinned host memory, brought to the device a window at a time.

While the op works on one window, a second stream writes the one before back and fetches the next, so the device holds
two windows whatever the size of the model. Nothing relies on managed memory, which thrashes when it is oversubscribed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polybit.distributed import local
from polybit.optim.state import State

Batch = list[tuple[Tensor, State]]

# The states of one window, in bytes; a parameter is never cut, so the largest one may be more.
WINDOW_BYTES = 256 << 20


class Fetched(NamedTuple):
    """A window whose states are on the device, once `ready` has passed."""

    batch: Batch
    pairs: list[tuple[Tensor, Tensor]]  # in host memory, on the device
    ready: Any


def staged(batch: Batch, device: torch.device) -> Iterator[Batch]:
    """The windows of a batch, their states on `device`; what the caller changes there is written back.

    A batch that has no state elsewhere comes as it is. When the iterator ends, so have all copies.
    """
    if not any(away(state, device) for _, state in batch):
        yield batch
        return
    module = torch.get_device_module(device)
    compute, copies = module.current_stream(device), module.Stream(device=device)

    def fetch(part: Batch) -> Fetched:
        pairs: list[tuple[Tensor, Tensor]] = []
        there: Batch = []
        with module.stream(copies):
            for param, state in part:
                moved = {name: torch.empty_like(state[name], device=device) for name in away(state, device)}
                for name, x in moved.items():
                    x.copy_(state[name], non_blocking=True)
                    pairs.append((state[name], x))
                there.append((param, {**state, **moved}))
            return Fetched(there, pairs, copies.record_event())

    def write_back(window: Fetched) -> None:  # a function, so that no variable keeps the last state alive
        with module.stream(copies):
            copies.wait_event(compute.record_event())
            for here, x in window.pairs:
                here.copy_(x, non_blocking=True)

    parts = list(cut(batch, WINDOW_BYTES, device))
    current = fetch(parts[0])
    for i in range(len(parts)):
        # The buffers of a window belong to the stream of the copies, which waits for the op before it writes back:
        # none is used again too early.
        coming = fetch(parts[i + 1]) if i + 1 < len(parts) else None
        compute.wait_event(current.ready)
        yield current.batch
        write_back(current)
        if coming is not None:
            current = coming
    copies.synchronize()


def away(state: State, device: torch.device) -> list[str]:
    """The entries of a state that are not on the device."""
    return [name for name, x in state.items() if isinstance(x, Tensor) and local(x).device != device]


def cut(batch: Batch, limit: int, device: torch.device) -> Iterator[Batch]:
    """Runs of the batch whose states away from the device have at most `limit` bytes, or are of one parameter."""
    part: Batch = []
    size = 0
    for param, state in batch:
        added = sum(state[name].nbytes for name in away(state, device))
        if part and size + added > limit:
            yield part
            part, size = [], 0
        part.append((param, state))
        size += added
    if part:
        yield part
