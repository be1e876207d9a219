"""Building the presets of CMakePresets.json and running the conformance program."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tools import require_tool

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Build:
    """One built preset; `launcher` stands in front of its programs."""

    folder: Path
    launcher: tuple[str, ...] = ()

    @property
    def cpu(self) -> Path:
        """The CPU backend."""
        return self.folder / "backends" / "cpu" / "libpolybit_cpu.so"

    @property
    def emulator(self) -> Path:
        """The emulator, where the preset has it."""
        return self.folder / "backends" / "emulator" / "libpolybit_emulator.so"

    @property
    def faulty(self) -> Path:
        """The backend with deliberate faults."""
        return self.folder / "tests" / "conformance" / "libfaulty.so"

    @property
    def program(self) -> Path:
        """The conformance program."""
        return self.folder / "tests" / "conformance" / "conformance"

    def run(self, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        """The conformance program with these arguments, and these variables in its environment."""
        command = [*self.launcher, str(self.program), *map(str, arguments)]
        env = {**os.environ, **env}
        return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=env)


def build(preset: str, folder: Path, launcher: tuple[str, ...] = (), *, flags: str = "") -> Build:
    """Configure a preset, with more compiler flags, and build its targets outside the source tree."""
    cmake, ninja = require_tool("cmake"), require_tool("ninja")
    configure = [cmake, "--preset", preset, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-B", str(folder)]
    configure += [f"-DCMAKE_CXX_FLAGS={flags}"] if flags else []
    for command in (configure, [cmake, "--build", str(folder)]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return Build(folder, launcher)


def counts(output: str) -> dict[str, dict[str, tuple[int, int, int]]]:
    """{backend: {op: (samples, unsupported, failures)}} of what the program printed."""
    result: dict[str, dict[str, tuple[int, int, int]]] = {}
    pattern = r"^(\S+) (\w+): (\d+) samples, (\d+) unsupported, (\d+) failures$"
    for name, op, *numbers in re.findall(pattern, output, flags=re.MULTILINE):
        samples, unsupported, failures = map(int, numbers)
        result.setdefault(name, {})[op] = (samples, unsupported, failures)
    return result
