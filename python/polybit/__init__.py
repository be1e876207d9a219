"""polybit: a multi-backend quantization runtime for PyTorch."""

from __future__ import annotations

from polybit import ops as ops  # registers torch.ops.polybit
from polybit.backends import BackendError, backend, load_backend

__version__ = "0.1.0"

__all__ = ["BackendError", "__version__", "backend", "load_backend"]
