"""Quantized modules."""

from polybit.nn.convert import quantize_
from polybit.nn.linear import Linear4bit, Linear8bit, LinearKbit

__all__ = ["Linear4bit", "Linear8bit", "LinearKbit", "quantize_"]
