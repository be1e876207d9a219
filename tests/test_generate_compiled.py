"""Compiled generation: inductor, one graph, a static cache; and that transformers compiles it by itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers

from polybit import PolybitConfig

pytestmark = [
    pytest.mark.slow,  # inductor compiles C++, half a minute each
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script.*` is deprecated"),
]
TOKENS = torch.arange(18).view(2, 9) * 11 % 200
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize(
    "options", ({}, {"format": "int8"}, {"activations": "int8"}), ids=("nf4", "int8", "activations")
)
def test_generate_compiled_by_inductor(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=200, **sizes)).save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=PolybitConfig(**options))
    mask = torch.ones_like(TOKENS)
    want = model.generate(TOKENS, attention_mask=mask, **OPTIONS)
    torch.compiler.reset()
    counters.clear()
    config = transformers.CompileConfig(fullgraph=True, dynamic=None, mode="default")
    config._compile_all_devices = True  # transformers compiles on accelerators alone, but for its own tests
    got = model.generate(TOKENS, attention_mask=mask, cache_implementation="static", compile_config=config, **OPTIONS)
    assert torch.equal(got, want)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    assert counters["inductor"]
