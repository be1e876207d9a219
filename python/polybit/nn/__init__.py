"""Quantized modules."""

from polybit.nn.convert import dequantize_, make_empty_, quantize_
from polybit.nn.counterpart import Settings, empty_counterpart, is_quantizable
from polybit.nn.embedding import Embedding4bit, Embedding8bit, EmbeddingKbit, StableEmbedding
from polybit.nn.linear import Linear4bit, Linear8bit, LinearKbit
from polybit.nn.training import Linear8bitTraining

__all__ = [
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingKbit",
    "Linear4bit",
    "Linear8bit",
    "Linear8bitTraining",
    "LinearKbit",
    "Settings",
    "StableEmbedding",
    "dequantize_",
    "empty_counterpart",
    "is_quantizable",
    "make_empty_",
    "quantize_",
]
