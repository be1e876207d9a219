"""LAMB and LARS of sharded parameters: the norms are those of the whole, so the ranks add up their squares.

The op takes the norms of what it is given, which is this rank's part. With the ratio known beforehand, though, LAMB is
a step of Adam with decoupled weight decay, and LARS one of momentum; the states are the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from polybit.distributed import is_sharded, local
from polybit.optim.state import State, bits_of, moments
from polybit.spec.blockwise import dequantize_values
from polybit.spec.optim import SKIP_NONFINITE, STATE_BLOCK, Hyper, Values, normed, trust_ratio

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

WITHOUT_NORMS = {"lamb": "adam", "lars": "momentum"}
Batch = list[tuple[Tensor, State]]


def launches(rule: str, batch: Batch, hyper: Hyper, options: int) -> Iterator[tuple[str, Batch, Hyper]]:
    """The calls of an op, each with its rule and numbers, that make a step of `batch`: one, unless norms are summed.

    Then all ranks must call this together, and one parameter of this rank at a time is held in fp32 as a whole.
    """
    if rule not in WITHOUT_NORMS:
        yield rule, batch, hyper
        return
    whole = [(param, state) for param, state in batch if not is_sharded(param)]
    if whole:
        yield rule, whole, hyper
    meshes: dict[Any, Batch] = defaultdict(list)
    for param, state in batch:
        if is_sharded(param):
            sharded = cast("DTensor", param)
            meshes[sharded.device_mesh, sharded.placements].append((param, state))
    for (mesh, placements), part in meshes.items():
        squares = torch.stack([_squares(rule, param, state, hyper, options) for param, state in part])
        of_param, of_direction = _sum(squares, mesh, placements).sqrt().unbind(1)
        ratios = trust_ratio(rule, of_param, of_direction, _values(hyper, squares))
        for one, ratio in zip(part, ratios.tolist()):
            yield WITHOUT_NORMS[rule], [one], _known(rule, hyper, ratio)


def _values(hyper: Hyper, like: Tensor) -> Values:
    return Values(*torch.tensor(hyper, dtype=torch.float32, device=like.device).unbind())


def _squares(rule: str, param: Tensor, state: State, hyper: Hyper, options: int) -> Tensor:
    """The two sums of squares over this rank's part of a parameter, fp64 [2]."""
    assert param.grad is not None
    p, raw = local(param).detach().float(), local(param.grad).detach().float()
    h = _values(hyper, p)
    finite = raw.isfinite() if options & SKIP_NONFINITE else None
    states = moments(rule, state, "state")
    if bits_of(state) == 8:
        scales, codes = moments(rule, state, "absmax"), moments(rule, state, "qmap")
        states = [dequantize_values(x, a.reshape(-1), c, STATE_BLOCK) for x, a, c in zip(states, scales, codes)]
    terms = normed(rule, p, raw * h.grad_scale, h, finite, tuple(states))
    return torch.stack([term.double().square().sum() for term in terms])


def _sum(squares: Tensor, mesh: Any, placements: Any) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    parts = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    return DTensor.from_local(squares, mesh, parts, run_check=False).full_tensor()


def _known(rule: str, h: Hyper, ratio: float) -> Hyper:
    lr = h.lr * ratio
    if rule == "lamb":
        return h._replace(lr=lr * h.correction1, keep=1 - lr * h.decay)
    return h._replace(rest1=lr, coupled_decay=h.decay, lr=1.0, look_grad=0.0, look_state=1.0)
