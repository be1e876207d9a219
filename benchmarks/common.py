"""Medians of wall time, as JSON lines."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any


def seconds(function: Callable[[], Any], *, budget: float = 0.5, least: int = 7) -> float:
    """The median time of one call: at least `least` samples, about `budget` seconds in all, after a warm-up."""
    function()
    start = time.perf_counter()
    function()
    once = max(time.perf_counter() - start, 1e-7)
    inner = max(1, int(0.002 / once))  # a sample lasts 2 ms or more, so that the clock does not matter
    samples = []
    end = time.perf_counter() + budget
    while len(samples) < least or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(inner):
            function()
        samples.append((time.perf_counter() - start) / inner)
    return statistics.median(samples)


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int = 5, budget: float = 0.2) -> dict[str, float]:
    """Medians over rounds in which every function has its turn: what slows the machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds(function, budget=budget / rounds, least=3))
    return {name: statistics.median(values) for name, values in times.items()}


def report(**fields: Any) -> None:
    """Print one JSON line, floats to four digits."""
    print(json.dumps({key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in fields.items()}), flush=True)
