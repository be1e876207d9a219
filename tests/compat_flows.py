# ruff: noqa: E402
"""Programs written for bitsandbytes, run by test_compat.py in processes of their own, with polybit or the real one.

python compat_flows.py polybit|bitsandbytes FLOW FOLDER: writes the tensors that FLOW names to FOLDER/<who>.pt. With
polybit, the real package cannot be found, and the program proves that first.
"""

from __future__ import annotations

import importlib.machinery
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"


class Block:
    """Finds nothing of bitsandbytes where it is installed."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
        return None


def block_and_install() -> None:
    sys.meta_path.insert(0, Block())  # type: ignore[arg-type]
    try:
        import bitsandbytes  # noqa: F401
    except ModuleNotFoundError as problem:
        if "blocked" not in str(problem):
            raise
    else:
        raise AssertionError("the real bitsandbytes is not blocked")
    import polybit.compat

    polybit.compat.install()
    import bitsandbytes as ours

    from polybit.compat import bitsandbytes as same

    assert ours is same and ours.__file__ == str(Path(polybit.compat.__file__).parent / "bitsandbytes" / "__init__.py")
    assert isinstance(ours.__spec__, importlib.machinery.ModuleSpec)


WHO, FLOW, FOLDER = sys.argv[1], sys.argv[2], Path(sys.argv[3])
if WHO == "polybit":
    block_and_install()

import tokenizers
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

torch.set_num_threads(1)
TOKENS = torch.arange(18).view(2, 9) * 11 % 200
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4 double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 6.0},
    "int8 plain": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}
UNMERGEABLE: tuple[str, ...] = ("adalora", "ia3")  # PEFT has no merge of these on layers of bitsandbytes
out: dict[str, Any] = {}


def models() -> dict[str, Any]:
    torch.manual_seed(3)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=200, **SIZES))
    config = transformers.GPT2Config(vocab_size=200, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return {"llama": llama.eval(), "gpt2": transformers.GPT2LMHeadModel(config).eval()}


def load(folder: Path, kind: str, **options: Any) -> Any:
    config = transformers.BitsAndBytesConfig(**CONFIGS[kind])
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **options)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


def compared(model: Any) -> Tensor:
    """Logits, of the real one in training: the same in dequantized weights, where evaluation is in bf16."""
    if WHO == "bitsandbytes":
        model.train()
        model.config.use_cache = False
        for module in model.modules():
            module.p = 0.0 if isinstance(module, torch.nn.Dropout) else getattr(module, "p", None)
    return logits(model)


def word_tokenizer(**special: str) -> Any:
    words = tokenizers.models.WordLevel({f"w{k}": k for k in range(200)}, unk_token="w0")
    raw = tokenizers.Tokenizer(words)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w0", **special)


def pretrained() -> None:
    """from_pretrained, forward, generate, save, reload, pipeline, dequantize."""
    for name, model in models().items():
        model.save_pretrained(FOLDER / name)
        out[f"{name} dense"] = logits(model)
        for kind in CONFIGS:
            quantized = load(FOLDER / name, kind)
            key = f"{name} {kind}"
            saved = FOLDER / WHO / key
            quantized.save_pretrained(saved)  # before a forward pass: there the real one changes its weights
            out[key] = compared(quantized)
            if WHO == "bitsandbytes":
                continue
            other = transformers.AutoModelForCausalLM.from_pretrained(saved)
            assert torch.equal(logits(other), out[key]), key
            eaten = quantized.generate(TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0)
            assert eaten.shape == (2, 13)
            pipe = transformers.pipeline("text-generation", model=quantized, tokenizer=word_tokenizer())
            (said,) = pipe("w3 w14 w25", max_new_tokens=4, do_sample=False)
            assert len(re.findall(r"w\d+", said["generated_text"])) == 7, said
            again = load(FOLDER / name, kind)
            restored = again.dequantize()
            assert not any("bit" in type(module).__name__ for module in restored.modules())
            torch.testing.assert_close(logits(restored), out[key], rtol=0.05, atol=0.01)
            # What the real one has written, opened here.
            theirs = FOLDER / "bitsandbytes" / key
            if theirs.exists():
                opened = transformers.AutoModelForCausalLM.from_pretrained(theirs)
                out[f"{key} theirs"] = logits(opened)
                with safe_open(theirs / "model.safetensors", "pt") as file:
                    written = {name: file.get_tensor(name) for name in list(file.keys())}
                held = opened.state_dict()
                for entry, value in written.items():
                    assert held[entry].dtype == value.dtype and torch.equal(held[entry], value), (key, entry)


def opened() -> None:
    """What the other one has saved."""
    for folder in sorted((FOLDER / {"polybit": "bitsandbytes", "bitsandbytes": "polybit"}[WHO]).iterdir()):
        out[folder.name] = compared(transformers.AutoModelForCausalLM.from_pretrained(folder))


def sft() -> None:
    """TRL's SFTTrainer, with LoRA on 4 and 8 bits and a paged optimizer by name."""
    import datasets
    import peft
    import trl

    torch.manual_seed(3)
    config = transformers.LlamaConfig(vocab_size=200, **SIZES, initializer_range=0.2)
    transformers.LlamaForCausalLM(config).save_pretrained(FOLDER / "llama")
    texts = [" ".join(f"w{(row + k) % 8 + 5}" for k in range(12)) for row in range(32)]
    # With a fingerprint, because the pins of datasets, dill and pyarrow cannot hash a table: they fail to pickle it.
    data = datasets.Dataset(datasets.table.InMemoryTable.from_pydict({"text": texts}), fingerprint="texts")
    for kind in ("nf4 double", "int8"):
        arguments = trl.SFTConfig(
            str(FOLDER / kind), max_steps=20, per_device_train_batch_size=8, learning_rate=2e-2, logging_steps=1,
            save_strategy="no", use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, seed=1,
            dataset_text_field="text", optim="paged_adamw_8bit",
        )  # fmt: skip
        run = trl.SFTTrainer(
            load(FOLDER / "llama", kind, dtype=torch.float32),
            args=arguments,
            train_dataset=data,
            processing_class=word_tokenizer(eos_token="w1"),
            peft_config=peft.LoraConfig(r=4, target_modules="all-linear"),
        )
        run.train()
        assert "bitsandbytes" in str(type(run.optimizer.optimizer))
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        assert len(losses) == 20 and losses[-1] < 0.8 * losses[0], losses
        out[kind] = torch.tensor(losses)


def adapters() -> None:
    """Methods of PEFT: a step, save, reload, merge, unmerge, merge_and_unload."""
    import peft

    models()["llama"].save_pretrained(FOLDER / "llama")
    targets = ["q_proj", "v_proj"]
    methods: dict[str, Any] = {
        "lora": peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"),
        "dora": peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", use_dora=True),
        "olora": peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights="olora"),
        "adalora": peft.AdaLoraConfig(target_modules=targets, task_type="CAUSAL_LM", total_step=10),
        "ia3": peft.IA3Config(target_modules=targets, feedforward_modules=[], task_type="CAUSAL_LM"),
        "vera": peft.VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "oft": peft.OFTConfig(oft_block_size=4, target_modules=targets, task_type="CAUSAL_LM"),
        "randlora": peft.RandLoraConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        "road": peft.RoadConfig(target_modules=targets, task_type="CAUSAL_LM"),
    }
    for kind in ("nf4", "int8"):
        for name, config in methods.items():
            torch.manual_seed(0)
            key = f"{kind} {name}"
            base = peft.prepare_model_for_kbit_training(load(FOLDER / "llama", kind), use_gradient_checkpointing=False)
            model = peft.get_peft_model(base, config)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            losses = []
            for _ in range(2):
                loss = model(TOKENS, labels=TOKENS).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss))
            out[key] = torch.tensor(losses)
            assert all(torch.isfinite(out[key])), key
            model.eval()
            trained = logits(model)
            model.save_pretrained(FOLDER / WHO / key)
            again = peft.PeftModel.from_pretrained(load(FOLDER / "llama", kind), FOLDER / WHO / key).eval()
            if name != "olora":  # it has changed its base
                torch.testing.assert_close(logits(again), trained, rtol=1e-3, atol=1e-3)
            if name in UNMERGEABLE:
                continue
            model.merge_adapter()
            model.unmerge_adapter()
            change = (logits(model) - trained).norm() / trained.norm()
            assert change < 0.25, (key, float(change))
            merged = model.merge_and_unload()
            change = (logits(merged) - trained).norm() / trained.norm()
            assert change < 0.25, (key, float(change))


def trainer() -> None:
    """Optimizers of Trainer by name; what they have learned."""
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    names = [
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "lion_8bit",
        "rmsprop_bnb_8bit",
        "ademamix_8bit",
    ]
    for name in names:
        model = models()["llama"]
        start = model.lm_head.weight.detach().clone()
        arguments = transformers.TrainingArguments(
            output_dir=str(FOLDER / name), optim=name, max_steps=3, learning_rate=1e-3, report_to=[], use_cpu=True,
            per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        run = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        out[f"{name} loss"] = torch.tensor(run.train().training_loss)
        out[name] = model.lm_head.weight.detach() - start
        assert "bitsandbytes" in str(type(run.optimizer.optimizer))


{"pretrained": pretrained, "opened": opened, "adapters": adapters, "trainer": trainer, "sft": sft}[FLOW]()
torch.save(out, FOLDER / f"{WHO}.pt")
