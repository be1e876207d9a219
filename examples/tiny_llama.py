"""A small Llama-type decoder on real text: what the QLoRA example and the convergence test share."""

from __future__ import annotations

import gzip
import math
import pydoc_data.topics
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 128


def documentation() -> str:
    """The language reference that every Python carries, 0.7 to 1.5 MB of English."""
    return "\n\n".join(pydoc_data.topics.topics.values())


def licences() -> str:
    """Licence texts: of Debian, where it is Debian, of Python and of the installed packages; each text once."""
    packages = Path(sysconfig.get_path("purelib"))
    places = [Path("/usr/share/common-licenses").glob("*"), packages.glob("*.dist-info/**/*LICEN*")]
    texts = {
        path.read_text(encoding="utf-8", errors="ignore")
        for paths in places
        for path in paths
        if path.is_file() and path.stat().st_size < 200_000
    }
    return "\n\n".join([sys.copyright, *sorted(texts)])


def texts_below(folder: Path) -> str:
    """All .txt and .rst files of a folder and those below it, gzipped ones too; each text once."""
    paths = sorted(
        path for kind in ("txt", "rst") for ending in ("", ".gz") for path in folder.rglob(f"*.{kind}{ending}")
    )
    contents = dict.fromkeys(
        gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes() for path in paths
    )
    if not contents:
        raise SystemExit(f"no .txt or .rst files in {folder}")
    return "\n\n".join(content.decode(errors="ignore") for content in contents)


def train_tokenizer(text: str, vocabulary: int) -> Tokenizer:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, part: int = 1 << 20) -> Tensor:
    """The tokens of a text, int64; part by part, since the tokenizer needs hundreds of bytes for a token."""
    starts = range(0, len(text), part)
    return torch.cat([torch.tensor(tokenizer.encode(text[start : start + part]).ids) for start in starts])


def split(tokens: Tensor, held_out: float = 0.05) -> tuple[Tensor, Tensor]:
    """(training, held out): whole stretches of 2,000 tokens, every so many of them held out."""
    parts = tokens.split(2000)
    every = round(1 / held_out)
    return torch.cat([p for i, p in enumerate(parts) if i % every]), torch.cat(list(parts[::every]))


def decoder(vocabulary: int, hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    """A Llama with random weights, fp32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 1),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def batches(tokens: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Endless random windows, int64 [size, CONTEXT]."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(tokens) - CONTEXT, (size,), generator=generator)
        yield torch.stack([tokens[start : start + CONTEXT] for start in starts.tolist()])


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, nats; on the model's device."""
    batch = batch.to(next(model.parameters()).device)
    loss: Tensor = model(input_ids=batch, labels=batch).loss
    return loss


def perplexity(model: nn.Module, tokens: Tensor, most: int = 200) -> float:
    """exp of the mean loss over up to `most` windows that do not overlap."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:most]
    model.eval()
    with torch.no_grad():
        losses = [float(loss_of(model, part)) * len(part) for part in windows.split(16)]
    return math.exp(sum(losses) / len(windows))
