"""What a call of a four-tensor op costs through Python: at most 6 microseconds. Exit status 1 when it costs more.

The same call of an op that torch defines in Python and that does nothing but torch.empty shows what of it is torch's.
"""

from __future__ import annotations

import sys

import torch
from common import report, seconds

import polybit  # noqa: F401, registers torch.ops.polybit

LIMIT = 6e-6


def main() -> int:
    """q, absmax, code -> y, on 16 elements."""
    torch.set_num_threads(1)
    code = torch.linspace(-1, 1, 256)
    q = torch.arange(16, dtype=torch.uint8)
    absmax = torch.ones(1)
    op = torch.ops.polybit.dequantize_blockwise.default
    packet = torch.ops.polybit.dequantize_blockwise
    floor = torch.library.Library("overhead", "DEF")
    floor.define("nothing(Tensor q, Tensor absmax, Tensor code, SymInt block, ScalarType dtype) -> Tensor")
    floor.impl("nothing", lambda *arguments: torch.empty(16), "CompositeExplicitAutograd")
    nothing = torch.ops.overhead.nothing.default
    with torch.no_grad():
        # The least of several medians: the machine's other work is not the call's cost.
        ours = min(seconds(lambda: op(q, absmax, code, 16, torch.float32)) for _ in range(5))
        by_packet = min(seconds(lambda: packet(q, absmax, code, 16, torch.float32)) for _ in range(5))
        empty = min(seconds(lambda: torch.empty(16)) for _ in range(5))
        by_torch = min(seconds(lambda: nothing(q, absmax, code, 16, torch.float32)) for _ in range(5))
    times = {"us": ours, "packet_us": by_packet, "nothing_us": by_torch, "empty_us": empty}
    report(bench="overhead", op="dequantize_blockwise", **{name: value * 1e6 for name, value in times.items()})
    if ours > LIMIT:
        print(f"dequantize_blockwise: {ours * 1e6:.2f} us a call, wanted at most {LIMIT * 1e6:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
