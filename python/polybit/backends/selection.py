"""Who runs an op and how: ``POLYBIT_BACKEND``, ``POLYBIT_FALLBACK``, ``POLYBIT_DETERMINISTIC``, ``polybit.backend()``.

Selection is per torch device type: the first usable backend that the allow-list admits wins. An op that it does not
implement is inherited from the next usable backend of its family, else the torch reference runs it.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from polybit import _C, spec
from polybit.backends.base import Backend, BackendError, BackendInfo, Kernel, Resolution
from polybit.backends.discovery import answers, automatic_families, catalogue, family, is_test_vehicle

P = ParamSpec("P")
R = TypeVar("R")
POLICIES = ("warn", "error", "silent")


@dataclass(frozen=True)
class Route:
    """The way of one op on one device type."""

    kernel: Kernel | None
    owner: str
    chosen: str
    reason: str


class Selection:
    """An allow-list and a fallback policy, with the routes that follow from them."""

    def __init__(self, allow: tuple[str, ...] | None, fallback: str) -> None:
        if fallback not in POLICIES:
            raise BackendError(f"POLYBIT_FALLBACK: wanted one of {', '.join(POLICIES)}, got {fallback!r}")
        deterministic()
        self.allow = allow
        self.fallback = fallback
        self._routes: dict[tuple[str, str], Route] = {}
        self._version = -1
        self._warned: set[tuple[str, str]] = set()
        named = () if allow is None else tuple(family(name) for name in allow)
        catalogue.discover(automatic_families("cpu") + named)
        for name in allow or ():
            self._check(name)

    def route(self, op: str, device_type: str) -> Route:
        """The route of ``op`` for tensors of ``device_type``."""
        if self._version != catalogue.version:
            self._routes, self._version = {}, catalogue.version
        route = self._routes.get((op, device_type))
        if route is None:
            route = self._routes[op, device_type] = self._find(op, device_type)
        return route

    def report_fallback(self, op: str, owner: str, reason: str) -> None:
        """Say, once per backend and op, that the torch reference runs; raise if that is not allowed."""
        if self.fallback == "error":
            raise BackendError(f"{op}: {reason}, and POLYBIT_FALLBACK=error forbids the torch reference")
        if self.fallback == "warn" and (owner, op) not in self._warned:
            self._warned.add((owner, op))
            warnings.warn(f"polybit.{op} runs as its slow torch reference: {reason}", RuntimeWarning, stacklevel=4)

    def _check(self, name: str) -> None:
        matches = [backend for backend in catalogue.backends if answers(backend.name, name)]
        if not any(not backend.reason for backend in matches):
            built = family(name) in ("cuda", "hip", "sycl", "mps") and not matches
            what = "is not usable here" if matches else "is not in this build" if built else "is unknown"
            raise BackendError(
                f"backend {name!r} {what}. Known:\n" + "\n".join(_describe(info) for info in list_backends())
            )

    def _candidates(self, device_type: str) -> Iterator[Backend]:
        if self.allow is None:
            catalogue.discover(automatic_families(device_type))
        usable = [
            backend for backend in catalogue.backends if backend.device_type == device_type and not backend.reason
        ]
        if self.allow is None:
            yield from (backend for backend in usable if not is_test_vehicle(backend.name))
            return
        for name in self.allow:
            yield from (backend for backend in usable if answers(backend.name, name))

    def _find(self, op: str, device_type: str) -> Route:
        chosen = next(self._candidates(device_type), None)
        if chosen is None:
            allowed = "" if self.allow is None else f" in POLYBIT_BACKEND={','.join(self.allow)}"
            return Route(None, "reference", "none", f"no backend for {device_type} tensors{allowed}")
        start = catalogue.backends.index(chosen)
        for backend in catalogue.backends[start:]:
            same = family(backend.name) == family(chosen.name) and backend.device_type == device_type
            if same and not backend.reason and op in backend.ops:
                return Route(backend.ops[op], backend.name, chosen.name, "")
        return Route(None, "reference", chosen.name, f"{chosen.name} does not implement it")


_lock = threading.Lock()
_default: Selection | None = None
_deterministic: bool | None = None
_forced: ContextVar[Selection | None] = ContextVar("polybit_selection", default=None)
_ran = threading.local()


def _parse(names: str) -> tuple[str, ...]:
    if not isinstance(names, str):
        raise TypeError(f"backend: names must be one string, as in POLYBIT_BACKEND, got {names!r}")
    return tuple(part for part in (name.strip() for name in names.split(",")) if part)


def current() -> Selection:
    """The selection in force on this thread."""
    return _forced.get() or _default or _read_environment()


def _read_environment() -> Selection:
    global _default
    with _lock:
        if _default is None:
            allow = _parse(os.environ.get("POLYBIT_BACKEND", ""))
            _default = Selection(allow or None, os.environ.get("POLYBIT_FALLBACK", "warn"))
        return _default


def constant_in_traces(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.assume_constant_result``, which would import all of ``torch._dynamo`` with the package."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_traces  # read once: a trace may rely on it
def deterministic() -> bool:
    """Whether ``POLYBIT_DETERMINISTIC=1`` is set: a row of a result then depends on that row of the input alone.

    Not on how many rows come together, on the number of threads, nor on which kernel or CPU variant runs.
    Raises BackendError if the variable is neither 0 nor 1.
    """
    global _deterministic
    if _deterministic is None:
        flag = os.environ.get("POLYBIT_DETERMINISTIC") or "0"
        if flag not in ("0", "1"):
            raise BackendError(f"POLYBIT_DETERMINISTIC: wanted 0 or 1, got {flag!r}")
        _deterministic = flag == "1"
        _C.set_deterministic(_deterministic)
    return _deterministic


def reset() -> None:
    """Forget what was read of the environment variables; the next op reads them again."""
    global _default, _deterministic
    with _lock:
        _default = _deterministic = None


@contextmanager
def backend(names: str, *, fallback: str | None = None) -> Iterator[None]:
    """Use only these backends inside the block, on this thread.

    Args:
        names: an ordered, comma-separated allow-list as in ``POLYBIT_BACKEND``: ``"cpu:avx2"``, ``"cuda,cpu"``.
        fallback: ``"warn"``, ``"error"`` or ``"silent"``; by default as outside.

    Raises:
        BackendError: a name is unknown or not usable; the message lists what exists and why each one is not usable.
    """
    allow = _parse(names)
    if not allow:
        raise BackendError("polybit.backend: wanted at least one backend name, got an empty string")
    policy = fallback or (os.environ.get("POLYBIT_FALLBACK", "warn") if _forced.get() is None else current().fallback)
    token = _forced.set(Selection(allow, policy))
    try:
        yield
    finally:
        _forced.reset(token)


def check_op(op: str) -> None:
    """Raise ValueError unless there is an op of that name."""
    if op not in spec.OPS:
        raise ValueError(f"no op is called {op!r}; ops: {', '.join(spec.OPS)}")


def record(name: str) -> None:
    """Note who ran the op (for :func:`last_backend`)."""
    _ran.name = name


def last_backend() -> str | None:
    """The backend that ran the last op on this thread (``"reference"`` for the torch reference), or None."""
    return getattr(_ran, "name", None)


def resolve(op: str, device_type: str = "cpu") -> Resolution:
    """Who would run ``op`` on tensors of ``device_type`` now. Raises ValueError for an op that does not exist."""
    check_op(op)
    route = current().route(op, device_type)
    if route.kernel is None:
        return Resolution("reference", "reference", route.reason)
    return Resolution(route.owner, "native" if route.owner == route.chosen else "inherited", "")


def list_backends() -> list[BackendInfo]:
    """Every backend that was found, best first, then every source that could not be loaded, each with its reason."""
    catalogue.discover(catalogue.families())
    found = [
        BackendInfo(backend.name, backend.device_type, not backend.reason, backend.reason, backend.origin)
        for backend in catalogue.backends
    ]
    return found + catalogue.failures


def _describe(info: BackendInfo) -> str:
    return f"  {info.name}: {'usable' if info.usable else info.reason}"
