"""Optimizers with states in 32 or 8 bits, paged or not: drop-in replacements for those of torch.optim.

Every rule X comes as X, X32bit, X8bit, PagedX, PagedX32bit and PagedX8bit.
"""

from __future__ import annotations

from polybit.optim.adagrad import Adagrad, Adagrad8bit, Adagrad32bit, PagedAdagrad, PagedAdagrad8bit, PagedAdagrad32bit
from polybit.optim.adam import (
    Adam,
    Adam8bit,
    Adam32bit,
    AdamW,
    AdamW8bit,
    AdamW32bit,
    PagedAdam,
    PagedAdam8bit,
    PagedAdam32bit,
    PagedAdamW,
    PagedAdamW8bit,
    PagedAdamW32bit,
)
from polybit.optim.ademamix import (
    AdEMAMix,
    AdEMAMix8bit,
    AdEMAMix32bit,
    PagedAdEMAMix,
    PagedAdEMAMix8bit,
    PagedAdEMAMix32bit,
)
from polybit.optim.base import Optimizer
from polybit.optim.lamb import LAMB, LAMB8bit, LAMB32bit, PagedLAMB, PagedLAMB8bit, PagedLAMB32bit
from polybit.optim.lars import LARS, LARS8bit, LARS32bit, PagedLARS, PagedLARS8bit, PagedLARS32bit
from polybit.optim.lion import Lion, Lion8bit, Lion32bit, PagedLion, PagedLion8bit, PagedLion32bit
from polybit.optim.overrides import override
from polybit.optim.rmsprop import PagedRMSprop, PagedRMSprop8bit, PagedRMSprop32bit, RMSprop, RMSprop8bit, RMSprop32bit
from polybit.optim.sgd import SGD, PagedSGD, PagedSGD8bit, PagedSGD32bit, SGD8bit, SGD32bit

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "Adagrad",
    "Adagrad8bit",
    "Adagrad32bit",
    "Adam",
    "Adam8bit",
    "Adam32bit",
    "AdamW",
    "AdamW8bit",
    "AdamW32bit",
    "LAMB8bit",
    "LAMB32bit",
    "LARS8bit",
    "LARS32bit",
    "Lion",
    "Lion8bit",
    "Lion32bit",
    "Optimizer",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdEMAMix32bit",
    "PagedAdagrad",
    "PagedAdagrad8bit",
    "PagedAdagrad32bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdam32bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedAdamW32bit",
    "PagedLAMB",
    "PagedLAMB8bit",
    "PagedLAMB32bit",
    "PagedLARS",
    "PagedLARS8bit",
    "PagedLARS32bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedLion32bit",
    "PagedRMSprop",
    "PagedRMSprop8bit",
    "PagedRMSprop32bit",
    "PagedSGD",
    "PagedSGD8bit",
    "PagedSGD32bit",
    "RMSprop",
    "RMSprop8bit",
    "RMSprop32bit",
    "SGD8bit",
    "SGD32bit",
    "override",
]
