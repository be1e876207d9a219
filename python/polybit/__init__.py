"""polybit: a multi-backend quantization runtime for PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polybit import autograd as autograd  # and the derivatives of its products
from polybit import batching as batching  # torch.func.vmap over its ops
from polybit import nn as nn
from polybit import ops as ops  # registers torch.ops.polybit
from polybit import optim as optim
from polybit import tensor_ops as tensor_ops  # what torch's operations do with a QTensor
from polybit.backends import BackendError, backend, load_backend
from polybit.formats import Format, get_format, register_format
from polybit.integrations import register as _register
from polybit.qtensor import QTensor, quantize

if TYPE_CHECKING:
    from polybit.integrations.transformers import PolybitConfig as PolybitConfig

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Format",
    "QTensor",
    "__version__",
    "backend",
    "get_format",
    "load_backend",
    "nn",
    "quantize",
    "register_format",
]

_register()


def __getattr__(name: str) -> Any:
    if name == "PolybitConfig":  # needs transformers, which is optional
        from polybit.integrations.transformers import PolybitConfig

        return PolybitConfig
    raise AttributeError(f"module 'polybit' has no attribute {name!r}")
