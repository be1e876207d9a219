"""SFTTrainer of TRL on a quantized model with LoRA and an optimizer of ours. Tiny random model; no network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

if sys.version_info < (3, 11):
    pytest.skip("constraints.txt has no TRL for this Python", allow_module_level=True)
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import peft
import tokenizers
import transformers
import trl

import polybit
from polybit import PolybitConfig
from polybit.nn.module import QuantizedModule

pytestmark = [
    pytest.mark.usefixtures("one_thread"),  # the model is tiny
    pytest.mark.filterwarnings("ignore:Cannot (locate|pickle)"),  # dill, where datasets hashes
]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated", "ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("format", ("nf4", "int8"))
def test_sft_trainer(tmp_path: Path, format: str) -> None:
    """The loss falls, is the same with and without evaluation, and the base model does not change."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.2,  # of a frozen head: smaller weights could not tell tokens apart
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{k}": k for k in range(200)}, unk_token="w0"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", eos_token="w1")
    texts = [" ".join(f"w{(row + k) % 8 + 5}" for k in range(12)) for row in range(32)]
    # With a fingerprint, because the pins of datasets, dill and pyarrow cannot hash a table: they fail to pickle it.
    table = datasets.table.InMemoryTable.from_pydict({"text": texts})
    data = datasets.Dataset(table, fingerprint="texts")
    losses = {}
    for strategy in ("no", "steps"):
        model = transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / "dense", quantization_config=PolybitConfig(format), dtype=torch.float32
        )
        before = {name: value.clone() for name, value in model.state_dict().items()}
        arguments = trl.SFTConfig(
            str(tmp_path / strategy), max_steps=20, per_device_train_batch_size=8, learning_rate=2e-2, logging_steps=1,
            eval_strategy=strategy, eval_steps=5, save_strategy="no", use_cpu=True, bf16=False, report_to=[],
            disable_tqdm=True, seed=1, dataset_text_field="text", gradient_checkpointing=True,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model,
            args=arguments,
            train_dataset=data,
            eval_dataset=data.select(range(8)),
            processing_class=tokenizer,
            peft_config=peft.LoraConfig(r=4, target_modules="all-linear"),
            optimizer_cls_and_kwargs=(polybit.optim.PagedAdamW8bit, {"lr": 2e-2}),
        )
        trainer.train()
        assert isinstance(trainer.optimizer.optimizer, polybit.optim.PagedAdamW8bit)
        losses[strategy] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        layers = {name: m for name, m in trainer.model.named_modules() if isinstance(m, QuantizedModule)}
        assert len(layers) == 14
        for name, layer in layers.items():
            key = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            assert torch.equal(layer.weight.q.reshape(-1), before[f"{key}.weight"].reshape(-1))
    assert losses["no"] == losses["steps"] and len(losses["no"]) == 20
    assert losses["no"][-1] < 0.8 * losses["no"][0], losses
