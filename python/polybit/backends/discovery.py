"""Where backends come from: libraries beside the package, entry points, and paths given by the user.

A source that fails is recorded with its reason and skipped: it never breaks ``import polybit``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import torch

from polybit import spec
from polybit.backends.base import Backend, BackendError, BackendInfo
from polybit.backends.metal import load_metal
from polybit.backends.native import load_library

ENTRY_POINT_GROUP = "polybit.backends"
LIBRARY_FOLDER = Path(__file__).parent.parent / "lib"
SYCL_OF_ONEAPI = {"2025": "8", "2026": "9"}  # the major version of libsycl, by the year of oneAPI


def automatic_families(device_type: str) -> tuple[str, ...]:
    """The families that take tensors of a torch device type without being named.

    Their libraries are loaded when the first such tensor comes, so nothing is asked of a driver before.
    """
    if device_type == "cuda":  # torch gives AMD's GPUs this name, too
        return ("hip",) if torch.version.hip else ("cuda",)
    return {"cpu": ("cpu",), "xpu": ("sycl",), "mps": ("mps",)}.get(device_type, ())


def family(name: str) -> str:
    """``cpu:avx2`` -> ``cpu``."""
    return name.partition(":")[0]


def is_test_vehicle(name: str) -> bool:
    """Whether it runs a GPU's kernels on CPU tensors: only this name, in full, brings such a backend in."""
    return family(name) == "emulator" or name == "sycl:cpu" or name.startswith("sycl:cpu:")


def answers(name: str, wanted: str) -> bool:
    """Whether the backend ``name`` is ``wanted`` or a variant of it, as ``cpu:avx2`` is of ``cpu``."""
    variant = name.startswith(wanted + ":") and (is_test_vehicle(wanted) or not is_test_vehicle(name))
    return name == wanted or variant


def libraries(name: str) -> list[Path]:
    """Those of a family that lie beside the package."""
    return sorted(LIBRARY_FOLDER.glob(f"libpolybit_{name}.*"))


def sycl_library() -> Path:
    """The one for the libsycl of this torch, as a process cannot have two; for a torch without SYCL the newest.

    ``torch.version.xpu`` is the version of the compiler: ``20250302`` is of oneAPI 2025.

    Raises:
        BackendError: there is none for it.
    """
    found = {path.name.split(".")[1]: path for path in libraries("sycl")}
    version = getattr(torch.version, "xpu", None)
    if not version:
        return found[max(found, key=int)]
    wanted = SYCL_OF_ONEAPI.get(version[:4])
    if wanted not in found:
        wants = f"wants libsycl.so.{wanted}" if wanted else "wants a libsycl that polybit does not know"
        raise BackendError(f"torch (oneAPI {version}) {wants}; this polybit was built for {', '.join(sorted(found))}")
    return found[wanted]


class Catalogue:
    """All known backends, in order of preference, and what could not be loaded."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._tried: set[str] = set()
        self.backends: list[Backend] = []
        self.failures: list[BackendInfo] = []
        self.version = 0

    def discover(self, families: tuple[str, ...]) -> None:
        """Load the libraries of these families, then the entry points; each source once."""
        with self._lock:
            for name in families:
                if name == "sycl" and libraries(name):
                    self._try(str(LIBRARY_FOLDER / "libpolybit_sycl"), sycl_library)
                    continue
                for path in libraries(name):
                    self._try(str(path), path)
            for entry in entry_points(group=ENTRY_POINT_GROUP):
                self._try(f"entry point {entry.name}", entry)

    def families(self) -> tuple[str, ...]:
        """The families whose library lies beside the package."""
        return tuple(
            sorted(path.name.split(".")[0].removeprefix("libpolybit_") for path in LIBRARY_FOLDER.glob("libpolybit_*"))
        )

    def add(self, backends: list[Backend]) -> list[str]:
        """Append backends; refuses a name that is taken."""
        with self._lock:
            known = {backend.name for backend in self.backends}
            for backend in backends:
                if backend.name in known:
                    raise BackendError(f"{backend.origin}: a backend named {backend.name} is loaded already")
            self.backends.extend(backends)
            self.version += 1
            return [backend.name for backend in backends]

    def _try(self, origin: str, source: Path | EntryPoint | Callable[[], Path]) -> None:
        if origin in self._tried:
            return
        self._tried.add(origin)
        try:
            self.add(_load(source))
        except Exception as problem:  # whatever a plug-in throws is its own affair: report it and go on
            self.failures.append(BackendInfo(origin, "", False, f"{type(problem).__name__}: {problem}", origin))


def _load(source: object) -> list[Backend]:
    """A path, a backend, a list of them, or a callable or entry point that gives one of these."""
    if isinstance(source, EntryPoint):
        return _load(source.load())
    if isinstance(source, Path) and source.name.startswith("libpolybit_mps."):
        return [load_metal(source)]
    if isinstance(source, (str, Path)):
        return list(load_library(source))
    if isinstance(source, Backend):
        return [_checked(source)]
    if isinstance(source, (list, tuple)):
        return [backend for item in source for backend in _load(item)]
    if callable(source):
        return _load(source())
    lacks = [name for name in _MEMBERS if not hasattr(source, name)]
    raise TypeError(
        f"a backend is the path of a library, an object with {', '.join(_MEMBERS)}, or a function that returns one or "
        f"a list of them; got {type(source).__name__}, which lacks {', '.join(lacks)}"
    )


_MEMBERS = ("name", "device_type", "reason", "origin", "ops")


def _checked(backend: Backend) -> Backend:
    """A backend written in Python, after what would otherwise make it be passed over in silence.

    Raises:
        BackendError: it has an op that does not exist, or a device type that torch does not know.
    """
    unknown = sorted(set(backend.ops) - set(spec.OPS))
    if unknown:
        raise BackendError(f"{backend.name}: no op is called {', '.join(unknown)}; ops: {', '.join(spec.OPS)}")
    try:
        torch.device(backend.device_type)
    except RuntimeError as problem:
        raise BackendError(f"{backend.name}: device_type {backend.device_type!r}: {problem}") from None
    return backend


catalogue = Catalogue()


def load_backend(source: str | Path | Backend) -> list[str]:
    """Load a backend, by the path of its library or written in Python, and return the names that it brings.

    They are used when named (``POLYBIT_BACKEND``, :func:`polybit.backend`) or when nothing else takes their device.

    Raises:
        BackendError: the library cannot be loaded or was built for another op table; a name is taken, an op unknown.
        TypeError: the source is neither a path nor a :class:`polybit.backends.Backend`.
    """
    try:
        return catalogue.add(_load(source))
    except RuntimeError as problem:
        raise BackendError(str(problem)) from None
