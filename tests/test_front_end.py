"""The examples as they are, on one backend after another: POLYBIT_BACKEND alone says which."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from intel import require_backend
from tools import PACKAGE, backend_param

EXAMPLES = Path(__file__).parent.parent / "examples"
SENTENCES = EXAMPLES / "sentences.txt"
BACKENDS = [backend_param(name) for name in ("cpu", "emulator:32", "sycl:cpu")]
APPLE = pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs an Apple GPU")
DEMO_BACKENDS = [*BACKENDS, pytest.param("mps", marks=APPLE)]

Run = Callable[[str], str]


def example(name: str, *options: str, backend: str, cwd: Path) -> str:
    """What an example prints. Where the backend lacks an op, or declines a case, it ends with an error."""
    if backend == "sycl:cpu":
        require_backend()
    named = backend
    if backend == "mps":  # for tensors of another device than the CPU; those of the CPU need a backend, too
        named, options = "mps,cpu", (*options, "--device=mps")
    env = {key: value for key, value in os.environ.items() if not key.startswith("POLYBIT_")}
    env |= {"POLYBIT_BACKEND": named, "POLYBIT_FALLBACK": "error", "PYTHONPATH": str(PACKAGE.parent)}
    env |= {"OMP_NUM_THREADS": "1"}  # sums in torch's own products depend on it
    command = [sys.executable, str(EXAMPLES / name), *options]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (ran,) = re.findall(r"^the last operation ran on (\S+)$", done.stdout, re.M)
    assert ran == backend or ran.startswith(f"{backend}:"), f"{backend} was named, {ran} ran"
    return done.stdout


def runner(tmp_path_factory: pytest.TempPathFactory, name: str, *options: str) -> Run:
    """An example as a function of the backend; it runs once for each."""
    return functools.cache(lambda backend: example(name, *options, backend=backend, cwd=tmp_path_factory.mktemp("run")))


def rows(output: str) -> dict[str, list[str]]:
    """The cells of the table that an example prints, by the first one, without its head."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    return {name: cells for name, *cells in lines}


def numbers(pattern: str, output: str) -> list[float]:
    """The groups of the one match."""
    (found,) = re.findall(pattern, output)
    return [float(value) for value in found]


@pytest.fixture(scope="module")
def qlora(tmp_path_factory: pytest.TempPathFactory) -> Run:
    small = ("--hidden=64", "--layers=1", "--steps=100", "--batch=4", "--windows=8")
    return runner(tmp_path_factory, "qlora_cpu.py", *small)


@pytest.mark.parametrize("backend", BACKENDS)
def test_qlora(qlora: Run, backend: str) -> None:
    """Every optimizer step is the same to the bit; products are so up to their rounding."""
    got, want = qlora(backend), qlora("cpu")
    first, last = numbers(r"fp32: 100 steps, loss ([\d.]+) -> ([\d.]+)", got)
    assert last < first - 1
    first, last = numbers(r"PagedAdamW8bit: 50 steps, loss ([\d.]+) -> ([\d.]+)", got)
    assert last < first  # how far depends on the licences that this machine has
    table = rows(got)
    assert len(table) == 6 and table["fp32"] == rows(want)["fp32"]
    for name, cells in rows(want).items():
        assert [float(cell) for cell in table[name]] == pytest.approx([float(cell) for cell in cells], rel=2e-4), name
    for pattern in (
        r"PagedAdamW8bit: 50 steps, loss ([\d.]+) -> ([\d.]+)",
        r"held-out licences: perplexity ([\d.]+) -> ([\d.]+)",
        r"adapters off ([\d.]+), reloaded ([\d.]+), merged ([\d.]+)",
    ):
        assert numbers(pattern, got) == pytest.approx(numbers(pattern, want), rel=2e-3), pattern


def assert_the_same_quality(got: str, want: str) -> None:
    """Sizes alike; cosines and neighbours up to the rounding of products."""
    table = rows(got)
    assert len(table) == 5
    for name, cells in rows(want).items():
        assert table[name][:2] == cells[:2], name
        assert [float(cell) for cell in table[name][2:4]] == pytest.approx(
            [float(cell) for cell in cells[2:4]], abs=1e-4
        )
        assert float(table[name][4]) == pytest.approx(float(cells[4]), abs=0.01), name


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small BERT of random weights and its tokenizer."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    pieces = BertWordPieceTokenizer()
    pieces.train([str(SENTENCES)], vocab_size=400, show_progress=False)
    pieces.save_model(str(folder))
    BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=400, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Run:
    return runner(tmp_path_factory, "demo.py", f"--model={encoder}", "--sentences=40")


@pytest.mark.parametrize("backend", DEMO_BACKENDS)
def test_demo(demo: Run, backend: str) -> None:
    assert_the_same_quality(demo(backend), demo("cpu"))
    table = rows(demo(backend))
    assert float(table["LLM.int8()"][2]) > 0.999
    assert 0.9 < float(table["FP4"][3]) < 0.9999, "nothing was quantized, or what it was is lost"


@pytest.fixture(scope="module")
def real_demo(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return runner(tmp_path_factory, "demo.py", "--sentences=32")


@pytest.mark.slow
@pytest.mark.parametrize("backend", DEMO_BACKENDS)
def test_demo_with_a_real_model(real_demo: Run, backend: str) -> None:
    assert_the_same_quality(real_demo(backend), real_demo("cpu"))
    assert float(rows(real_demo(backend))["NF4 + double quantization"][2]) > 0.97
