"""Helpers: a dictionary as a tensor, linear layers replaced, outliers found."""

from __future__ import annotations

import json
import logging
import shlex
import subprocess
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {
    number: name for name, number in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items()
}


def pack_dict_to_tensor(source_dict: dict[str, Any]) -> Tensor:
    """The bytes of the JSON of a dictionary: uint8 [bytes]."""
    return torch.tensor(list(json.dumps(source_dict).encode()), dtype=torch.uint8)


def unpack_tensor_to_dict(tensor_data: Tensor) -> dict[str, Any]:
    """The dictionary that `pack_dict_to_tensor` packed."""
    found: dict[str, Any] = json.loads(bytes(tensor_data.tolist()).decode())
    return found


def replace_linear(
    model: nn.Module,
    linear_replacement: Callable[..., nn.Module],
    skip_modules: Sequence[str] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> nn.Module:
    """Replace every nn.Linear below `model`, but for names in `skip_modules`; returns `model`.

    linear_replacement(in_features, out_features, bias) makes a layer; it gets the old parameters if `copy_weights`.
    `post_processing_function`: the name of a method of the old layer that is called afterwards, if it has one.
    """
    for name, module in list(model.named_children()):
        if next(module.children(), None) is not None:
            replace_linear(module, linear_replacement, skip_modules, copy_weights, post_processing_function)
        if not isinstance(module, nn.Linear) or name in skip_modules:
            continue
        new = linear_replacement(module.in_features, module.out_features, module.bias is not None)
        setattr(model, name, new)
        if copy_weights:
            new.weight, new.bias = module.weight, module.bias
        process = getattr(module, post_processing_function, None) if post_processing_function else None
        if process is not None:
            process(module)
    return model


def find_outlier_dims(
    weight: Tensor, reduction_dim: int = 0, zscore: float = 4.0, topk: int | None = None, rdm: bool = False
) -> Tensor:
    """Columns (reduction_dim 0) whose standard deviation is beyond `zscore` deviations of all, or the `topk` largest.

    rdm: `topk` random ones instead (TypeError without a topk). int64 [found].
    """
    if rdm:
        if topk is None:
            raise TypeError("find_outlier_dims: rdm needs topk, the number of columns")
        return torch.randint(0, weight.shape[1], (topk,), device=weight.device)
    deviation = weight.std(reduction_dim)
    if topk is not None:
        return deviation.topk(topk).indices
    return torch.where((deviation - deviation.mean()) / deviation.std() > zscore)[0]


_S = TypeVar("_S", bound="Singleton")


class Singleton:
    """What get_instance makes once."""

    _instance: ClassVar[Any] = None

    def __init__(self) -> None:
        raise RuntimeError(f"{type(self).__name__}: call get_instance() instead")

    @classmethod
    def get_instance(cls: type[_S]) -> _S:
        """The only one."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance._begin()
        instance: _S = cls._instance
        return instance

    def _begin(self) -> None:
        """What it starts with."""


class OutlierTracer(Singleton):
    """Which inputs of each nn.Linear are outliers, found in the first pass after `initialize(model)`."""

    def initialize(self, model: nn.Module) -> None:
        """Watch all linear layers of a model."""
        self.outliers: list[Tensor] = []
        self.hvalues: list[int] = []
        self.hvalue2outlier_idx: dict[int, Tensor] = {}
        self.initialized = True
        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self.hooks = [module.register_forward_pre_hook(outlier_hook) for module in linear]

    def is_initialized(self) -> bool:
        """Whether it watches a model."""
        return getattr(self, "initialized", False)

    def get_hvalue(self, weight: Tensor) -> int:
        """What identifies a weight: the address of its storage."""
        return weight.untyped_storage().data_ptr()

    def get_outliers(self, weight: Tensor) -> Tensor | None:
        """The outlier columns of a weight, int64; None if it has not been seen."""
        if not self.is_initialized():
            logger.warning("OutlierTracer: not initialized, call initialize(model)")
            return None
        return self.hvalue2outlier_idx.get(self.get_hvalue(weight))


def outlier_hook(module: nn.Module, input: tuple[Tensor, ...]) -> None:
    """Record the outliers of a linear layer: the first one's by its input, the others' by their weight."""
    assert isinstance(module, nn.Linear)
    tracer = OutlierTracer.get_instance()
    key = tracer.get_hvalue(module.weight)
    if key in tracer.hvalue2outlier_idx:  # the second pass has begun
        for hook in tracer.hooks:
            hook.remove()
        return
    tracer.outliers.append(find_outlier_dims(module.weight))
    tracer.hvalues.append(key)
    found = tracer.outliers[-1]
    if len(tracer.outliers) == 1:
        rows = input[0].reshape(-1, input[0].shape[-1])
        large = torch.where((rows.abs() > 6).any(0))[0]
        # Over the features of each row, as bitsandbytes has it.
        found = torch.unique(torch.cat([find_outlier_dims(rows, reduction_dim=1, zscore=3), large]))
    tracer.hvalue2outlier_idx[key] = found


def execute_and_return(command_string: str) -> tuple[str, str]:
    """Run a command; its standard output and standard error, stripped."""
    done = subprocess.run(shlex.split(command_string), capture_output=True, text=True, check=False)
    return done.stdout.strip(), done.stderr.strip()


def sync_gpu(t: Tensor) -> None:
    """Wait for the device of a tensor, if it is a GPU."""
    if t.device.type == "cuda":
        torch.cuda.synchronize()
    elif t.device.type == "xpu":
        torch.xpu.synchronize()
