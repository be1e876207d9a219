"""matmul and matmul_4bit: the products of bitsandbytes, by the differentiable ops of polybit."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polybit.compat.bitsandbytes import functional
from polybit.compat.bitsandbytes.functional import QuantState
from polybit.functional import linear_int8_trained

_DEPRECATED = ("CxB", "CxBt", "formatB", "_tile_indices")


@dataclass
class MatmulLtState:
    """What an 8-bit layer keeps between its passes.

    CB, SCB: int8 codes [N, K] and fp32 scales [N] of a frozen weight; threshold: from where a value of the input is an
    outlier, 0: nowhere; has_fp16_weights: the weight is dense and trained; is_training: set by the layer. The other
    fields are never filled.
    """

    force_no_igemmlt: bool = False
    CB: Tensor | None = None
    SB: Tensor | None = None
    SCB: Tensor | None = None
    SBt: Tensor | None = None
    CBt: Tensor | None = None
    subB: Tensor | None = None
    outlier_pool: Any = None
    idx: Tensor | None = None

    def __post_init__(self) -> None:
        self.has_accumulated_gradients = False
        self.threshold = 0.0
        self.is_training = True
        self.has_fp16_weights = True
        self.use_pool = False

    def __getattr__(self, name: str) -> Any:
        if name in _DEPRECATED:
            warnings.warn(f"MatmulLtState.{name} is deprecated and always None", FutureWarning, stacklevel=2)
            return None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def reset_grads(self) -> None:
        """Forget the quantized weight."""
        self.CB = self.SB = self.SCB = self.SBt = self.CBt = None


def matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """A [..., K] times B [N, K], transposed, plus bias, by LLM.int8(): [..., N] in A's dtype.

    With state.has_fp16_weights B is dense and quantized in each pass, and gets a gradient; else the codes are
    state.CB and state.SCB, which are made from B if they are not there. Columns of A with a value of at least
    `threshold` (else state.threshold) in size are multiplied in high precision. Differentiable in A and bias.
    """
    state = MatmulLtState() if state is None else state
    if threshold > 0.0:
        state.threshold = threshold
    if bias is not None:
        bias = bias.to(A.dtype)
    if state.has_fp16_weights and B.dtype != torch.int8:
        return _out(linear_int8_trained(A, B, bias, threshold=state.threshold), out)
    if state.CB is None or state.SCB is None:
        state.CB, state.SCB, _ = functional.int8_vectorwise_quant(B.detach())
    y = torch.ops.polybit.linear_int8(A, state.CB, state.SCB, bias, float(state.threshold), 0)
    return _out(y, out)


def matmul_4bit(
    A: Tensor, B: Tensor, quant_state: QuantState, out: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """A [..., K] times a 4-bit weight B of quant_state.shape [N, K], transposed, plus bias: [..., N] in A's dtype.

    Differentiable in A and bias. Raises ValueError without a state or if its shape is not 2-D; warns
    (DeprecationWarning) if the weight was quantized as [K, N].
    """
    if quant_state is None:
        raise ValueError("matmul_4bit: needs a quant_state")
    if len(quant_state.shape) != 2:
        raise ValueError(f"matmul_4bit: the weight must have 2 dimensions, got {list(quant_state.shape)}")
    n, k = quant_state.shape
    if A.shape[-1] == n != k:
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"matmul_4bit: the weight was quantized as [K, N] = {[n, k]}; quantize it as [N, K] (out, in)",
                DeprecationWarning,
                stacklevel=2,
            )
        weight = functional.dequantize_4bit(B.reshape(-1, 1), quant_state).to(A.dtype)
        return _out(F.linear(A, weight.t(), bias), out)
    return _out(functional.matmul_packed(A, B, quant_state, bias), out)


def _out(y: Tensor, out: Tensor | None) -> Tensor:
    return y if out is None else out.copy_(y)
