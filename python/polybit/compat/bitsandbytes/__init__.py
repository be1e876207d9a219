"""The interface of bitsandbytes 0.50.2 on polybit: ``import polybit.compat.bitsandbytes as bnb``.

A thin layer over polybit's ops, optimizers and checkpoints. docs/bitsandbytes.md says what differs and why.
"""

from __future__ import annotations

from polybit.compat._finder import VERSION
from polybit.compat.bitsandbytes import autograd, functional, nn, optim, utils
from polybit.compat.bitsandbytes.autograd._functions import MatmulLtState, matmul, matmul_4bit
from polybit.compat.bitsandbytes.nn import modules
from polybit.compat.bitsandbytes.optim import adam

__version__ = VERSION

# What transformers, accelerate and diffusers ask: whether other devices than CUDA are served, and which.
features = {"multi_backend"}
supported_torch_devices = {"cpu", "cuda", "xpu", "hpu", "npu", "mps"}

__all__ = [
    "MatmulLtState",
    "adam",
    "autograd",
    "features",
    "functional",
    "matmul",
    "matmul_4bit",
    "modules",
    "nn",
    "optim",
    "supported_torch_devices",
    "utils",
]
