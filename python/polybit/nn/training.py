"""LLM.int8() while the weights are trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polybit import functional
from polybit.nn.linear import Linear8bit, check_threshold


class Linear8bitTraining(nn.Linear):
    """nn.Linear whose products are those of LLM.int8(): weight and x are quantized to int8 by rows in every forward.

    The weight is an ordinary Parameter [out_features, in_features], fp32, fp16 or bf16, and gets a gradient; the state
    dict is nn.Linear's own. `threshold`: as in Linear8bit, which `quantized` gives once the weight is trained.
    x: fp32, fp16 or bf16 [..., in_features]; y in x's dtype. Gradients reach x, weight and bias, the roundings taken as
    the identity (polybit.functional.linear_int8_trained). Raises ValueError for a negative threshold.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        threshold: float = 6.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        check_threshold(threshold)
        self.threshold = float(threshold)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, threshold: float = 6.0) -> Linear8bitTraining:
        """A layer with the weight and bias of `linear`; the parameters are shared, not copied."""
        with torch.device("meta"):
            self = cls(linear.in_features, linear.out_features, linear.bias is not None, threshold=threshold)
        self.weight, self.bias = linear.weight, linear.bias
        return self.train(linear.training)

    def quantized(self) -> Linear8bit:
        """The Linear8bit layer with this weight: the same outputs, no gradient of the weight."""
        return Linear8bit.from_linear(self, threshold=self.threshold)

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype."""
        return functional.linear_int8_trained(input, self.weight, self.bias, threshold=self.threshold)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold}"
