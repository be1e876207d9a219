"""One pool of threads: alternating our op with torch.mm costs at most 1.15 times the sum of both alone."""

from __future__ import annotations

import sys

import torch
from common import interleaved, report

import polybit  # noqa: F401, registers torch.ops.polybit
from polybit import _C

LIMIT = 1.15


def main() -> int:
    """Several sizes, so that neither of the two hides in the other. Exit status 1 above the limit."""
    code = torch.linspace(-1, 1, 256)
    worst = 0.0
    for side, count in ((128, 1 << 16), (256, 1 << 18), (512, 1 << 20)):
        a = torch.randn(side, side)
        x = torch.randn(count)

        def mm(a: torch.Tensor = a) -> None:
            torch.mm(a, a)

        def ours(x: torch.Tensor = x) -> None:
            torch.ops.polybit.quantize_blockwise(x, code, 64)

        def both(a: torch.Tensor = a, x: torch.Tensor = x) -> None:
            torch.mm(a, a)
            torch.ops.polybit.quantize_blockwise(x, code, 64)

        times = interleaved({"mm": mm, "ours": ours, "both": both}, rounds=9, budget=1.0)
        ratio = times["both"] / (times["mm"] + times["ours"])
        worst = max(worst, ratio)
        report(
            bench="openmp",
            threads=torch.get_num_threads(),
            library=_C.openmp_library().rpartition("/")[2],
            side=side,
            count=count,
            ratio=ratio,
            **{f"{name}_us": value * 1e6 for name, value in times.items()},
        )
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
