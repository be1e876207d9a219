"""The command line on real folders, and on wrong ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from polybit import checkpoint
from polybit.cli import app
from polybit.model_folder import INDEX, read_state_dict

RUNNER = CliRunner()


def run(*args: object) -> tuple[int, str]:
    """Exit code and all output of one call."""
    result = RUNNER.invoke(app, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "embed_tokens.weight": torch.randn(50, 32, generator=generator),
        "layers.0.proj.weight": torch.randn(24, 40, generator=generator),
        "layers.0.proj.bias": torch.randn(24, generator=generator),
        "layers.1.proj.weight": torch.randn(33, 24, generator=generator),
        "norm.weight": torch.randn(24, generator=generator),
    }


@pytest.fixture
def single(tmp_path: Path) -> Path:
    folder = tmp_path / "single"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(weights(), folder / "model.safetensors")
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    index = {}
    for i, (name, tensor) in enumerate(weights().items()):
        file = f"model-{i % 2}.safetensors"
        index.setdefault(file, {})[name] = tensor
    for file, tensors in index.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in index.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("format", ["nf4", "fp4", "lloyd3", "int2", "int8"])
@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_quantizes_the_linear_weights_and_nothing_else(kind: str, format: str, tmp_path: Path, request) -> None:
    target = tmp_path / "out"
    code, text = run("quantize", request.getfixturevalue(kind), target, "--format", format)
    assert code == 0, text
    assert "2 of 5 tensors" in text
    before, after = weights(), read_state_dict(target)
    for name in ("embed_tokens.weight", "layers.0.proj.bias", "norm.weight"):
        assert torch.equal(before[name], after[name])
    for name in ("layers.0.proj.weight", "layers.1.proj.weight"):
        error = checkpoint.from_tensors(after, name).dequantize() - before[name]
        limit = {"nf4": 0.012, "fp4": 0.02, "lloyd3": 0.04, "int2": 0.7, "int8": 1e-4}[format]
        assert error.square().sum() / before[name].square().sum() < limit
    assert json.loads((target / "config.json").read_text())["quantization_config"]["quant_method"] == "polybit"
    if kind == "sharded":
        index = json.loads((target / INDEX).read_text())["weight_map"]
        assert set(index) == set(after)


def test_both_layouts_give_the_same_bytes(single: Path, sharded: Path, tmp_path: Path) -> None:
    for source in (single, sharded):
        assert run("quantize", source, tmp_path / f"{source.name}-q")[0] == 0
    a, b = read_state_dict(tmp_path / "single-q"), read_state_dict(tmp_path / "sharded-q")
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def refused(source: Path, target: Path, *words: str, options: tuple[str, ...] = ()) -> None:
    """The call fails with code 2 and these words, and leaves nothing at or beside the target."""
    before = sorted(target.parent.iterdir()) if target.parent.exists() else []
    code, text = run("quantize", source, target, *options)
    assert code == 2, text
    assert all(word in text for word in words), text
    assert (sorted(target.parent.iterdir()) if target.parent.exists() else []) == before


def test_wrong_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", "config.json is missing")
    refused(tmp_path / "absent", tmp_path / "out", "config.json is missing")


def test_existing_target(single: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    refused(single, tmp_path / "out", "not an empty folder")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_truncated_and_tampered_weights(single: Path, tmp_path: Path) -> None:
    file = single / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-100], whole[:7], b"", b"\xff" * 8 + whole[8:]):
        file.write_bytes(damaged)
        refused(single, tmp_path / "out", "damaged or truncated")


def test_missing_shard_and_damaged_index(sharded: Path, tmp_path: Path) -> None:
    (sharded / "model-1.safetensors").unlink()
    refused(sharded, tmp_path / "out", "shard model-1.safetensors is missing")
    (sharded / INDEX).write_text("{")
    refused(sharded, tmp_path / "out", "damaged index")


def test_wrong_format_and_block_size(single: Path, tmp_path: Path) -> None:
    refused(single, tmp_path / "out", "nf5", options=("--format", "nf5"))
    refused(single, tmp_path / "out", "48", options=("--block-size", "48"))


def test_target_that_cannot_be_written(single: Path, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("no folder")
    code, text = run("quantize", single, blocker / "out")
    assert code == 2
    assert "cannot be written" in text
    if os.geteuid():  # root writes everywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o555)
        refused(single, locked / "out", "cannot be written")


def test_a_killed_run_leaves_no_target(tmp_path: Path) -> None:
    source = tmp_path / "large"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file({f"layers.{i}.weight": torch.randn(1024, 1024) for i in range(24)}, source / "model.safetensors")
    command = [sys.executable, "-m", "polybit", "quantize", str(source), str(tmp_path / "out"), "--search"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(".out.*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert run("quantize", source, tmp_path / "out")[0] == 0  # the first is not in its way
    assert not list(tmp_path.glob(".out.*"))


def test_info_prints_json_and_markdown() -> None:
    code, text = run("info", "--json")
    assert code == 0
    data = json.loads(text)
    assert data["support"]["cpu:scalar"]["quantize_kbit"] == "native"
    assert {row["name"] for row in data["backends"]} >= {"cpu:scalar", "emulator:32"}
    code, text = run("info", "--markdown")
    assert code == 0
    assert text.startswith("| backend |")


def test_check_one_backend() -> None:
    code, text = run("check", "--backend", "emulator:32")
    assert code == 0, text
    assert "emulator:32: 1 native" in text
    assert "0 failures" in text
    assert run("check", "--backend", "abacus")[0] == 2


def test_check_fails_when_native_ops_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = tmp_path / "counts.json"
    counts.write_text('{"emulator:32": 2}')
    monkeypatch.setattr("polybit.cli.support.NATIVE_COUNTS", counts)
    code, text = run("check", "--backend", "emulator:32")
    assert code == 1
    assert "fell below the committed 2" in text
