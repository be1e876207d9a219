"""A step of each optimizer beside bitsandbytes' and torch's: nanoseconds and bytes of state for a parameter.

One JSON line per case: the median of ours and of the peers, by turns in one run, and the ratio to each (above 1: ours
is faster). Peers: the optimizer of bitsandbytes of the same name, that of torch (fused where it has it).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
from common import interleaved, report

import polybit
from polybit import backends, optim

NAMES = ("Adam", "AdamW", "AdEMAMix", "Lion", "SGD", "RMSprop", "Adagrad", "LAMB", "LARS")
NEEDED = {"SGD": {"lr": 1e-3, "momentum": 0.9}, "LARS": {"lr": 1e-3, "momentum": 0.9}}
FUSED = ("Adam", "AdamW", "SGD", "Adagrad")


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors of the state; what several entries share counts once."""
    tensors = {x.data_ptr(): x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def parameter(numel: int, dtype: torch.dtype) -> torch.nn.Parameter:
    """A parameter with a gradient, random, the same for everybody."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(numel, generator=generator).to(dtype))
    param.grad = torch.randn(numel, generator=generator).mul_(1e-2).to(dtype)
    return param


def peers(name: str, suffix: str) -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    """Who else has this optimizer."""
    extra: dict[str, Any] = NEEDED.get(name, {})
    found: dict[str, Callable[[Any], torch.optim.Optimizer]] = {}
    theirs = getattr(bitsandbytes.optim, name + suffix, None)
    if theirs is not None:
        found["bitsandbytes"] = lambda params: theirs(params, **extra)
    if not suffix and hasattr(torch.optim, name):
        fused = {"fused": True} if name in FUSED else {}
        found["torch"] = lambda params: getattr(torch.optim, name)(params, **extra, **fused)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numel", type=float, default=1e7, help="parameters")
    parser.add_argument("--only", default="", help="only optimizers whose name contains this")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    numel = int(arguments.numel)
    slower = []
    for name in NAMES:
        for suffix in ("8bit", ""):
            if arguments.only not in name + suffix:
                continue
            makers = {"ours": lambda p, n=name, s=suffix: getattr(optim, n + s)(p, **NEEDED.get(n, {}))}
            optimizers: dict[str, Any] = {}
            for who, make in {**makers, **peers(name, suffix)}.items():
                optimizer = make([parameter(numel, torch.float32)])
                try:
                    optimizer.step()
                except Exception as problem:  # a peer that cannot is reported, and left out
                    print(f"{who} {name}{suffix}: {problem}", file=sys.stderr)
                    continue
                optimizers[who] = optimizer
            steps = {who: optimizer.step for who, optimizer in optimizers.items()}
            times = interleaved(steps, rounds=arguments.rounds, budget=0.0)
            ratios = {f"over_{who}": times[who] / times["ours"] for who in times if who != "ours"}
            report(
                bench="optim",
                optimizer=name + suffix,
                numel=numel,
                backend=backends.resolve("optimizer_8bit").owner,
                threads=torch.get_num_threads(),
                **{f"{who}_ns": seconds / numel * 1e9 for who, seconds in times.items()},
                **{f"{who}_bytes": state_bytes(optimizers[who]) / numel for who in times},
                **ratios,
            )
            if ratios.get("over_bitsandbytes", 2.0) < 1:
                slower.append(f"{name}{suffix}: {ratios['over_bitsandbytes']:.2f}")
    print(f"slower than bitsandbytes: {len(slower)}", *slower, sep="\n  ", file=sys.stderr)
    return int(bool(slower))


if __name__ == "__main__":
    with polybit.backend("cpu", fallback="error"):
        sys.exit(main())
