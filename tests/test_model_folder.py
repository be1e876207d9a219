"""Model folders: what is quantized in them, how much memory that takes, and what is left when a run dies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tools import PACKAGE, run_python

import polybit
from polybit import checkpoint
from polybit.model_folder import FolderError, read_state_dict
from polybit.quantize_folder import quantize_folder
from polybit.safetensors_file import Entry, Reader, Writer
from polybit.work_folder import work_folder

LINUX = sys.platform == "linux"


def make(folder: Path, *shards: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    """A model folder with a tokenizer file, one file of weights or several with an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    (folder / "tokenizer.json").write_text("{}")
    names = [f"model-{i}.safetensors" for i in range(len(shards))] if len(shards) > 1 else ["model.safetensors"]
    for name, tensors in zip(names, shards):
        save_file(tensors, folder / name)
    if len(shards) > 1:
        index = {key: name for name, tensors in zip(names, shards) for key in tensors}
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    return folder


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- which tensors, and how


def test_embeddings_and_lm_head_stay_unless_asked_for(tmp_path: Path) -> None:
    names = ("model.embed_tokens", "transformer.wte", "shared", "lm_head", "layers.0.up_proj")
    source = make(tmp_path / "source", {f"{name}.weight": randn(16, 32, seed=i) for i, name in enumerate(names)})
    quantize_folder(source, tmp_path / "plain")
    tensors = read_state_dict(tmp_path / "plain")
    assert [name for name in names if checkpoint.is_quantized(tensors, f"{name}.weight")] == ["layers.0.up_proj"]
    quantize_folder(source, tmp_path / "all", embeddings=True, skip=())
    tensors = read_state_dict(tmp_path / "all")
    for i, name in enumerate(names):
        want = polybit.quantize(randn(16, 32, seed=i), "nf4").dequantize()
        assert torch.equal(checkpoint.from_tensors(tensors, f"{name}.weight").dequantize(), want)


def test_overrides_first_match_wins(tmp_path: Path) -> None:
    weights = {f"layers.{i}.{n}.weight": randn(16, 256) for i in range(2) for n in ("up", "down", "skipped")}
    source = make(tmp_path / "source", weights | {"lm_head.weight": randn(4, 64), "embed.weight": randn(4, 64)})
    overrides = {
        "lm_head": "fp4",
        "embed": "int8",
        "layers.1.skipped": None,
        "layers.0.*": "int8",
        "down": {"format": "lloyd3", "block_size": 128},
    }
    quantize_folder(source, tmp_path / "out", overrides=overrides)
    tensors = read_state_dict(tmp_path / "out")
    layouts = {}
    assert torch.equal(tensors["layers.1.skipped.weight"], weights["layers.1.skipped.weight"])
    for name in ("layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "lm_head", "embed"):
        weight = checkpoint.from_tensors(tensors, f"{name}.weight")
        layouts[name] = weight.format_name, weight.block_size
    assert layouts == {
        "layers.0.up": ("int8", 64),
        "layers.0.down": ("int8", 64),
        "layers.1.up": ("nf4", 64),
        "layers.1.down": ("lloyd3", 128),
        "lm_head": ("fp4", 64),
        "embed": ("int8", 64),
    }
    recorded = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert list(recorded["overrides"]) == list(overrides)
    assert recorded["overrides"]["down"]["block_size"] == 128


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"nothing.*": {"format": "int8"}}, "'nothing.\\*' matches no linear layer"),
        ({"norm": {"format": "int8"}}, "'norm' matches no linear layer"),
        ({"*up": {"bits": 4}}, "settings are format, .* got 'bits'"),
        ({"*up": {"format": "nf5"}}, "unknown format 'nf5'"),
        ({"*up": {"format": "nf4", "block_size": 48}}, "power of two"),
    ],
)
def test_wrong_overrides(overrides: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", {"up.weight": randn(4, 64), "norm.weight": randn(64)})
    with pytest.raises(ValueError, match=words):
        quantize_folder(source, tmp_path / "out", overrides=overrides)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("config", [{"model_type": "gpt2"}, {"model_type": "x", "decoder": {"model_type": "gpt2"}}])
def test_conv1d_weights_are_turned(config: dict[str, Any], tmp_path: Path) -> None:
    weights = {"h.0.attn.c_attn.weight": randn(32, 96), "score.weight": randn(5, 32), "wpe.weight": randn(8, 32)}
    source = make(tmp_path / "source", weights, config=config)
    quantize_folder(source, tmp_path / "out")
    tensors = read_state_dict(tmp_path / "out")
    want = polybit.quantize(weights["h.0.attn.c_attn.weight"].t().contiguous(), "nf4")
    got = checkpoint.from_tensors(tensors, "h.0.attn.c_attn.weight")
    assert torch.equal(got.dequantize(), want.dequantize())
    assert checkpoint.from_tensors(tensors, "score.weight").shape == (5, 32)
    assert torch.equal(tensors["wpe.weight"], weights["wpe.weight"])


def test_every_other_tensor_keeps_its_bytes(tmp_path: Path) -> None:
    weights = {
        "a.weight": randn(7, 9),
        "half.weight": randn(3, 5).half(),
        "brain.weight": randn(3, 5).bfloat16(),
        "a.bias": randn(7).to(torch.float64),
        "mask": torch.tensor([True, False, True]),
        "index": torch.arange(5),
        "scale.eighth": randn(3, 3).to(torch.float8_e4m3fn),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
    }
    source = make(tmp_path / "source", weights)
    (source / "pytorch_model.bin").write_bytes(b"x")
    (source / ".git").mkdir()
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    summary = quantize_folder(source, tmp_path / "out")
    assert (summary.tensors, summary.quantized) == (9, 3)
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert summary.bytes_after == sum(tensor.nbytes for tensor in got.values())
    for name in ("a.bias", "mask", "index", "scale.eighth", "empty", "scalar"):
        assert got[name].dtype == weights[name].dtype
        assert got[name].shape == weights[name].shape
        assert got[name].reshape(-1).view(torch.uint8).tolist() == weights[name].reshape(-1).view(torch.uint8).tolist()
    for name in ("a.weight", "half.weight", "brain.weight"):
        for key, tensor in checkpoint.to_tensors(polybit.quantize(weights[name], "nf4"), name).items():
            assert torch.equal(got[key], tensor)
    assert set(content(tmp_path / "out")) == {
        "config.json", "model.safetensors", "tokenizer.json", str(Path("1_Pooling", "config.json"))
    }  # fmt: skip


def test_refuses_what_it_cannot_quantize(tmp_path: Path) -> None:
    source = make(tmp_path / "double", {"a.weight": randn(4, 64).double()})
    with pytest.raises(FolderError, match="a.weight is F64; only F32, F16 and BF16"):
        quantize_folder(source, tmp_path / "out")
    source = make(
        tmp_path / "again", {"a.weight": randn(4, 64)}, config={"quantization_config": {"quant_method": "gptq"}}
    )
    with pytest.raises(FolderError, match="is quantized already .quant_method gptq.*the model that it was made from$"):
        quantize_folder(source, tmp_path / "out")
    recorded = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    source = make(tmp_path / "bnb", {"a.weight": randn(4, 64)}, config={"quantization_config": recorded})
    with pytest.raises(FolderError, match=r"quant_method bitsandbytes.*quantization_config=PolybitConfig\(\)"):
        quantize_folder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the file format


def test_the_writer_makes_files_that_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "wide": randn(3, 3).double(),
        "half": randn(5).half(),
        "json": torch.tensor(list(b'{"a": 1}'), dtype=torch.uint8),
        "single": randn(2, 3),
    }
    plan = {name: Entry.of(tensor) for name, tensor in tensors.items()}
    path = tmp_path / "x.safetensors"
    with Writer(path, plan, tail=["json"], metadata={"format": "pt"}) as writer:
        tensors["json"] = torch.tensor(list(b'{"a": 1.2345678}'), dtype=torch.uint8)
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    got = load_file(path)
    assert set(got) == set(tensors)
    assert all(torch.equal(got[name], tensors[name]) for name in tensors)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, item in header.items():
        assert (8 + length + item["data_offsets"][0]) % tensors[name].element_size() == 0, name
    with Reader(path) as reader:
        assert all(torch.equal(reader.read(name), tensors[name]) for name in tensors)


def test_the_writer_holds_to_its_plan(tmp_path: Path) -> None:
    plan = {"a": Entry.of(torch.zeros(3)), "b": Entry.of(torch.zeros(2))}
    with pytest.raises(ValueError, match="b: planned, but not written"), Writer(tmp_path / "x", plan) as writer:
        writer.write("a", torch.zeros(3))
    with pytest.raises(ValueError, match="a: planned"), Writer(tmp_path / "x", plan) as writer:
        writer.write("a", torch.zeros(4))


# --- memory


def peak_mb(code: str) -> float:
    """Peak resident memory of a fresh interpreter that has run `code`, in MB.

    With a fixed threshold, because glibc raises its own after the first tensor of up to 32 MB is freed and then keeps
    freed tensors, more or fewer of them in each run.
    """
    report = "import re; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    return int(run_python(f"{code}\n{report}", MALLOC_MMAP_THRESHOLD_="1000000").stdout.split()[-1]) / 1024


def memory_above_idle(source: Path, target: Path, *options: str) -> float:
    """What `polybit quantize` takes more than a process that has imported polybit and done nothing, in MB."""
    arguments = ["quantize", str(source), str(target), *options]
    used = peak_mb(f"from polybit.cli import app; app({arguments!r}, standalone_mode=False)")
    return used - peak_mb("import polybit")


def make_large(folder: Path, shards: int, per_shard: int, weight: torch.Tensor) -> Path:
    """Shards of `per_shard` weights each; one of them is an embedding, which is copied."""
    source = make(folder, {"a.weight": weight[:1].clone()})
    (source / "model.safetensors").unlink()
    index = {}
    for i in range(shards):
        names = [f"layers.{i}.{j}.weight" for j in range(per_shard)]
        names[0] = "embed_tokens.weight" if i == 0 else names[0]
        save_file({name: weight * (1 + j) for j, name in enumerate(names)}, source / f"model-{i}.safetensors")
        index |= dict.fromkeys(names, f"model-{i}.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return source


@pytest.mark.skipif(not LINUX, reason="reads /proc")
@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_memory_of_a_300_mb_model_with_16_mb_tensors(format: str, tmp_path: Path) -> None:
    source = make_large(tmp_path / "source", 2, 9, randn(2048, 2048))
    above = memory_above_idle(source, tmp_path / "out", "--format", format)
    print(f"{format}: {above:.0f} MB above idle")
    assert above <= 45  # two tensors and what the command line imports; a third would not fit


@pytest.mark.slow
@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_memory_of_a_3_gb_model_with_128_mb_tensors(tmp_path: Path) -> None:
    source = make_large(tmp_path / "source", 3, 8, randn(8192, 8192).bfloat16())
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert total >= 3 << 30
    above = memory_above_idle(source, tmp_path / "out")
    print(f"{total / 2**30:.2f} GiB in 3 shards: {above:.0f} MB above idle")
    shutil.rmtree(source)
    assert above <= 400
    assert len(read_state_dict(tmp_path / "out")) == 23 * 6 + 1


# --- runs that die

KILL = """
import os, random, shutil, signal, sys
from pathlib import Path
import polybit
from polybit import quantize_folder as module, safetensors_file, work_folder
SOURCE, ROOT = Path(sys.argv[1]), Path(sys.argv[2])
FILES = {item.__file__ for item in (module, safetensors_file, work_folder)}
HIDDEN = (".out.partial", ".out.lock")

def child(action):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, str(action()).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    return os.waitpid(pid, 0)[1], text

def run(kill_at=0):
    "Quantize; die before the line of that number. How many lines there were."
    lines = 0
    def trace(frame, event, arg):
        nonlocal lines
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            lines += 1
            if lines == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    module.quantize_folder(SOURCE, ROOT / "out")
    sys.settrace(None)
    return lines

def die_at_rename(before):
    rename = os.rename
    def dying(a, b):
        if not before:
            rename(a, b)
        os.kill(os.getpid(), signal.SIGKILL)
    os.rename = dying
    module.quantize_folder(SOURCE, ROOT / "out")

def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

status, text = child(run)
assert status == 0
whole, lines = content(ROOT / "out"), int(text)
assert not any((ROOT / name).exists() for name in HIDDEN)
points = sorted(random.Random(20).sample(range(1, lines), 20))
deaths = [lambda at=at: run(at) for at in points] + [lambda: die_at_rename(True), lambda: die_at_rename(False)]
outcomes = {"absent": 0, "partial": 0, "whole": 0}
for death in deaths:
    shutil.rmtree(ROOT / "out", ignore_errors=True)
    status, _ = child(death)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    left = {path.name for path in ROOT.iterdir()}
    assert left <= {"source", "out", *HIDDEN}, left
    if "out" in left:
        assert content(ROOT / "out") == whole
        assert ".out.partial" not in left
        outcomes["whole"] += 1
        shutil.rmtree(ROOT / "out")
    else:
        partial = ".out.partial" in left
        outcomes["partial" if partial else "absent"] += 1
        if partial and (ROOT / ".out.partial" / "config.json").exists():
            # Everything else was there before config.json was begun.
            found = content(ROOT / ".out.partial")
            assert {k: v for k, v in found.items() if k != "config.json"} == {
                k: v for k, v in whole.items() if k != "config.json"}
    assert child(run)[0] == 0
    assert content(ROOT / "out") == whole
    assert {path.name for path in ROOT.iterdir()} == {"source", "out"}
print(lines, outcomes)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_at_20_seeded_points_and_around_the_rename(tmp_path: Path) -> None:
    source = make(tmp_path / "source", *({f"l.{i}.{j}.weight": randn(8, 64) for j in range(3)} for i in range(3)))
    done = subprocess.run(
        [sys.executable, "-c", KILL, str(source), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    outcomes = json.loads(done.stdout.split(" ", 1)[1].replace("'", '"'))
    assert sum(outcomes.values()) == 22
    assert outcomes["partial"] >= 10
    assert outcomes["whole"] >= 1


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_everything_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path / "source", {"a.weight": randn(8, 64)}, {"b.weight": randn(8, 64)})
    (source / "sub").mkdir()
    (source / "sub" / "x.txt").write_text("x")
    synced: list[str] = []
    at_rename: list[str] = []
    fsync, rename = os.fsync, os.rename

    def spy_fsync(handle: int) -> None:
        fsync(handle)
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))

    def spy_rename(a: Path, b: Path) -> None:
        at_rename.extend(synced)
        rename(a, b)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "rename", spy_rename)
    quantize_folder(source, tmp_path / "out")
    work = tmp_path / ".out.partial"
    names = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")]
    assert len(names) == 7
    assert {str(work / name) for name in names} | {str(work)} <= set(at_rename)
    assert synced[-1] == str(tmp_path)


def test_two_runs_at_once(tmp_path: Path) -> None:
    source = make(tmp_path / "source", {"a.weight": randn(8, 64)})
    with work_folder(tmp_path / "out") as work:
        (work / "first").write_text("1")
        with pytest.raises(FolderError, match="another process is writing it"):
            quantize_folder(source, tmp_path / "out")
        quantize_folder(source, tmp_path / "other")
        assert (work / "first").read_text() == "1"
    assert content(tmp_path / "out") == {"first": b"1"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "source"]


def test_a_failed_run_removes_the_parents_that_it_made(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no"), work_folder(tmp_path / "a" / "b" / "out") as work:
        (work / "x").write_text("x")
        raise RuntimeError("no")
    assert list(tmp_path.iterdir()) == []


def large_output(tmp_path: Path) -> Path:
    return make(tmp_path / "source", {f"l.{i}.weight": randn(1024, 1024, seed=i) for i in range(4)})


IN_SMALL_DISK = """
mount -t tmpfs -o size=1m none "$1" || exit 77
"$2" -m polybit quantize "$3" "$1/new/out"
code=$?
echo "left:$(ls -A "$1")"
exit $code
"""


@pytest.mark.skipif(not LINUX, reason="mounts a tmpfs")
def test_full_disk(tmp_path: Path) -> None:
    """A real ENOSPC on a disk of 1 MB, or, where no disk can be mounted, files that may not grow beyond 1 MB."""
    import resource  # not on Windows

    source, place = large_output(tmp_path), tmp_path / "disk"
    place.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    command = [*unshare, "sh", "-c", IN_SMALL_DISK, "sh", str(place), sys.executable, str(source)]
    done = None
    if shutil.which("unshare"):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done is not None and done.returncode != 77 and "unshare:" not in done.stderr:
        assert done.returncode == 2, done.stderr
        assert "No space left on device; what was written has been removed" in done.stderr
        assert done.stdout.strip() == "left:"
        return
    done = subprocess.run(
        [sys.executable, "-m", "polybit", "quantize", str(source), str(place / "new" / "out")],
        env=environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "File too large; what was written has been removed" in done.stderr
    assert list(place.iterdir()) == []
