"""A pytest plugin (-p budget): seconds per test file against tests/budget.toml; three times over fails the run.

The longest files come first, so that workers (pytest-xdist) end at about the same time.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest

FACTOR = 3.0
FILE = Path(__file__).parent / "budget.toml"


def read(path: Path) -> dict[str, float]:
    """`name = seconds` lines. (tomllib would need Python 3.11.)"""
    budget = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if not text or text.startswith("["):
            continue
        match = re.fullmatch(r'"?([\w./-]+)"?\s*=\s*([\d.]+)', text)
        if not match:
            raise ValueError(f'{path.name}: wanted "suite = seconds", got {line!r}')
        budget[match[1]] = float(match[2])
    return budget


def overruns(spent: dict[str, float], budget: dict[str, float]) -> list[str]:
    """The suites above three times their budget; those without one count against `default`."""
    return [name for name, seconds in spent.items() if seconds > FACTOR * budget.get(name, budget["default"])]


class Budget:
    """Adds up the phases of every test by file."""

    def __init__(self, slow: bool) -> None:
        self.budget = read(FILE)
        self.scale = self.budget["slow_factor"] if slow else 1.0
        self.spent: dict[str, float] = defaultdict(float)

    def limit(self, name: str) -> float:
        return self.budget.get(name, self.budget["default"]) * self.scale

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.spent[Path(report.nodeid.partition("::")[0]).stem] += report.duration

    def over(self) -> list[str]:
        return overruns(self.spent, {name: seconds * self.scale for name, seconds in self.budget.items()})

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.over() and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("seconds against budget")
        for name, seconds in sorted(self.spent.items(), key=lambda item: -item[1]):
            mark = f"  MORE THAN {FACTOR:g} TIMES THE BUDGET" if name in self.over() else ""
            terminalreporter.write_line(f"{seconds:8.1f} / {self.limit(name):6.0f}  {name}{mark}")
        terminalreporter.write_line(f"{sum(self.spent.values()):8.1f}           total")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    budget = read(FILE)
    items.sort(key=lambda item: -budget.get(item.path.stem, budget["default"]))


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return  # a worker's seconds are added up where its reports arrive
    config.pluginmanager.register(Budget(slow="not slow" not in config.option.markexpr), "polybit-budget")
