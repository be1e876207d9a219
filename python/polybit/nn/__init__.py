"""Quantized modules."""

from polybit.nn.convert import quantize_
from polybit.nn.embedding import Embedding4bit, Embedding8bit, EmbeddingKbit, StableEmbedding
from polybit.nn.linear import Linear4bit, Linear8bit, LinearKbit

__all__ = [
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingKbit",
    "Linear4bit",
    "Linear8bit",
    "LinearKbit",
    "StableEmbedding",
    "quantize_",
]
