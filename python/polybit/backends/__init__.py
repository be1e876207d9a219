"""Backends: discovery, selection and fallback. The one place that decides which code runs an op."""

from __future__ import annotations

from polybit.backends.base import Backend, BackendError, BackendInfo, Resolution, Unsupported
from polybit.backends.discovery import load_backend
from polybit.backends.selection import backend, deterministic, last_backend, list_backends, reset, resolve

__all__ = [
    "Backend",
    "BackendError",
    "BackendInfo",
    "Resolution",
    "Unsupported",
    "backend",
    "deterministic",
    "last_backend",
    "list_backends",
    "load_backend",
    "reset",
    "resolve",
]
