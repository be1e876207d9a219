"""The command line on real folders, and on wrong ones."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tools import cpu_variants, run_python
from typer.testing import CliRunner

import polybit.testing
from polybit import checkpoint, spec
from polybit.backends import Backend, BackendInfo
from polybit.backends.discovery import LIBRARY_FOLDER, catalogue
from polybit.backends.native import NativeBackend
from polybit.cli import app, doctor
from polybit.cli.bench import cases, medians
from polybit.cli.support import RUNGS, build_table, native_ops, support
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
    refused(tmp_path / "absent", tmp_path / "out", "absent: no such folder", "has to be downloaded first")


def test_a_folder_without_weights_that_can_be_quantized(single: Path, tmp_path: Path) -> None:
    refused(single / "config.json", tmp_path / "out", "config.json: is a file, the folder of a model is wanted")
    refused(single, tmp_path / "out", "nothing to quantize", "all of them are skipped", options=("--skip", "*"))
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    refused(single, tmp_path / "out", "neither model.safetensors nor", "save it as safetensors first")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there(device: str, single: Path, tmp_path: Path) -> None:
    refused(
        single,
        tmp_path / "out",
        f"device '{device}' cannot be used here",
        "torch has cpu",
        options=("--device", device),
    )


def test_existing_target(single: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    refused(single, tmp_path / "out", "not an empty folder; remove it or choose another")
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
    assert text.startswith("| op | cuda | hip |")


def info_beside_ipex(folder: Path, version: str) -> tuple[dict[str, object] | None, str, str]:
    """What info says as JSON, in words, and the doctor, in an interpreter that finds metadata of that version."""
    metadata = folder / f"intel_extension_for_pytorch-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: intel_extension_for_pytorch\nVersion: {version}\n")
    # An import of it would be seen: as on a torch that it does not fit, it ends the interpreter.
    (folder / "intel_extension_for_pytorch.py").write_text("import os\nos._exit(127)\n")
    code = """
import sys
from typer.testing import CliRunner
from polybit.cli import app, doctor
for words in (["info", "--json"], ["info"]):
    print(CliRunner().invoke(app, words).output, end="\\0")
print([finding.what for finding in doctor._ipex()])
"""
    as_json, words, findings = run_python(code, PYTHONPATH=str(folder)).stdout.split("\0")
    return json.loads(as_json)["ipex"], words.splitlines()[1], findings.strip()


def test_info_warns_of_an_ipex_that_does_not_match_torch(tmp_path: Path) -> None:
    own = torch.__version__
    major, minor = own.split(".")[:2]
    end = "it has reached its end of life, the way to Intel's GPUs is torch.xpu"
    for i, version in enumerate((f"{major}.{minor}.10+xpu", f"{major}.{int(minor) + 1}.0", f"{major}.{minor}1.0")):
        about, line, findings = info_beside_ipex(tmp_path / str(i), version)
        note = f"{'does not match' if i else 'matches'} torch {own}; {end}"
        assert about == {"version": version, "matches_torch": i == 0, "note": note}
        said = f"intel-extension-for-pytorch {version} {note}"
        assert line == ("warning: " if i else "") + said
        assert findings == str([said] if i else [])


def test_info_without_ipex_is_silent_about_it() -> None:
    assert json.loads(run("info", "--json")[1])["ipex"] is None
    assert "intel-extension" not in run("info")[1]


@pytest.fixture
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polybit.testing.check", functools.partial(polybit.testing.check, limit=2))


@pytest.mark.usefixtures("few_samples")
def test_check_one_backend() -> None:
    code, text = run("check", "--backend", "emulator:32")
    assert code == 0, text
    assert f"emulator:32: {len(spec.OPS)} native" in text
    assert "0 failures" in text
    code, text = run("check", "--backend", "abacus")
    assert code == 2 and "backend 'abacus' is unknown. Known:" in text and "cpu:scalar: usable" in text


def test_check_asks_each_backend_for_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = {}

    def check(op: str, backend: str, device: str) -> polybit.testing.CheckResult:
        devices[backend] = device
        return polybit.testing.CheckResult(op, backend, backend, "native", samples=1)

    monkeypatch.setattr("polybit.testing.check", check)
    gpus = [NativeBackend(name, "xpu", "", "/x.so", {}) for name in ("mine:a", "mine:b")]
    monkeypatch.setattr(catalogue, "backends", [*catalogue.backends, *gpus])
    monkeypatch.setattr(catalogue, "version", catalogue.version + 1)
    code, text = run("check", "--backend", "mine")
    assert code == 0 and devices == {"mine:a": "xpu", "mine:b": "xpu"}, text


def best_whole() -> Backend:
    """The best CPU variant that inherits nothing."""
    return next(item for item in catalogue.backends if item.name in cpu_variants() and set(item.ops) == set(spec.OPS))


@pytest.mark.usefixtures("few_samples")
def test_check_fails_when_native_ops_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = best_whole()
    mine = NativeBackend("mine", "cpu", "", best.origin, {"quantize_kbit": best.ops["quantize_kbit"]})
    monkeypatch.setattr(catalogue, "backends", [*catalogue.backends, mine])
    monkeypatch.setattr(catalogue, "version", catalogue.version + 1)
    (tmp_path / "ops.json").write_text('{"mine": ["quantize_kbit", "dequantize_kbit"]}')
    monkeypatch.setattr("polybit.cli.support.NATIVE_OPS", tmp_path / "ops.json")
    code, text = run("check", "--backend", "mine")
    assert code == 1
    assert "fell below the committed 2" in text


@pytest.mark.parametrize(
    ("name", "value", "command", "words"),
    [
        ("POLYBIT_DETERMINISTIC", "yes", "info", "polybit: POLYBIT_DETERMINISTIC: wanted 0 or 1, got 'yes'\n"),
        ("POLYBIT_BACKEND", "cpux", "quantize", "polybit quantize: backend 'cpux' is unknown. Known:\n  cpu:"),
        ("POLYBIT_FALLBACK", "loud", "quantize", "POLYBIT_FALLBACK: wanted one of warn, error, silent, got 'loud'\n"),
    ],
)
def test_a_wrong_variable_is_no_traceback(
    name: str, value: str, command: str, words: str, single: Path, tmp_path: Path
) -> None:
    folders = [str(single), str(tmp_path / "out")] if command == "quantize" else []
    code = f"import sys; from polybit.cli import main; sys.argv = {['polybit', command, *folders]!r}; main()"
    done = run_python(code, check=False, **{name: value})
    assert (done.returncode, done.stdout) == (2, "") and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


README = Path(__file__).parent.parent / "README.md"
VERIFIED = Path(__file__).parent.parent / "docs" / "verified.md"


def test_the_table_of_the_readme_is_the_one_of_this_build() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("the README has the table of the x86-64 Linux build")
    code, text = run("info", "--markdown")
    assert code == 0
    readme = README.read_text(encoding="utf-8")
    table = readme.partition("<!-- support -->\n")[2].partition("<!-- /support -->")[0]
    assert table == text, "paste the output of `polybit info --markdown` into README.md"


def test_the_table_says_what_is_there() -> None:
    """The committed lists of native ops are exact, and so is the table that is made of them."""
    table = build_table()
    seen = {name: kinds for name, kinds in support().items() if name in table}  # the others are plug-ins of tests
    assert {"cpu:scalar", "emulator:16", "emulator:32", "emulator:64"} <= set(seen)
    for name, kinds in seen.items():
        assert table[name] == kinds, name
    assert all(set(ops) <= set(spec.OPS) for ops in native_ops().values())


def test_rung_4_is_what_verified_md_records() -> None:
    rows = [line.split("|") for line in VERIFIED.read_text(encoding="utf-8").splitlines() if line.startswith("| 20")]
    assert all(len(row) == 9 for row in rows)
    passed = {row[2].strip() for row in rows if row[7].strip().startswith("pass")}
    assert passed == {name for name, rung in json.loads(RUNGS.read_text(encoding="utf-8")).items() if rung == 4}
    assert {len(row[5].strip()) for row in rows} == {10}, "the commit, in 10 digits"


def test_an_inherited_op_names_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A better variant with one op of its own in front of the real ones, as AVX512 BF16 is in front of AVX512."""
    best = best_whole()
    mine = NativeBackend("cpu:mine", "cpu", "", best.origin, {"quantize_kbit": best.ops["quantize_kbit"]})
    monkeypatch.setattr(catalogue, "backends", [mine, *catalogue.backends[catalogue.backends.index(best) :]])
    monkeypatch.setattr(catalogue, "version", catalogue.version + 1)
    table = json.loads(run("info", "--json")[1])["support"]["cpu:mine"]
    assert table["quantize_kbit"] == "native"
    assert table["matmul_kbit"] == f"inherited from {best.name}"
    text = run("info")[1]
    assert f"cpu:mine: inherited from {best.name}: all but quantize_kbit" in text


@pytest.mark.usefixtures("few_samples")
def test_json_is_all_that_is_on_stdout(single: Path, tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["quantize", str(single), str(tmp_path / "out"), "--json"])
    data = json.loads(result.stdout)
    assert (data["tensors"], data["quantized"]) == (5, 2)
    assert data["ratio"] == data["bytes_after"] / data["bytes_before"] < 1
    assert data["bytes_after"] == sum(tensor.nbytes for tensor in read_state_dict(tmp_path / "out").values())
    result = RUNNER.invoke(app, ["quantize", str(single), str(tmp_path / "out"), "--json"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "not an empty folder" in result.stderr
    result = RUNNER.invoke(app, ["check", "--backend", "emulator:32", "--json"])
    data = json.loads(result.stdout)["emulator:32"]
    assert (data["native"], data["failures"]) == (len(spec.OPS), [])
    assert data["samples"] > len(spec.OPS)


def test_wrong_usage_exits_with_2() -> None:
    assert run("quantize")[0] == 2
    assert run("no-such-command")[0] == 2
    assert run("info", "--no-such-option")[0] == 2
    assert "Exit codes" in run("--help")[1]


SHOW_COMPLETION = """
import polybit.cli, sys
for shell in ("bash", "zsh", "fish"):
    sys.argv = ["polybit", "--show-completion", shell]
    try:
        polybit.cli.main()
    except SystemExit as end:
        assert not end.code
    print("---")
"""


def test_shell_completion() -> None:
    # Otherwise the shell that started the tests would be asked for.
    bash, zsh, fish, _ = run_python(SHOW_COMPLETION, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").stdout.split(
        "---"
    )
    assert "complete -o default -F _polybit_completion polybit" in bash
    assert "compdef _polybit_completion polybit" in zsh
    assert "complete --command polybit" in fish


def test_completion_knows_the_commands() -> None:
    env = {"_POLYBIT_COMPLETE": "complete_bash", "COMP_WORDS": "polybit qua", "COMP_CWORD": "1"}
    assert run_python("import polybit.cli; polybit.cli.main()", **env).stdout.split() == ["quantize"]


def test_bench_measures_the_backend_that_it_names() -> None:
    code, text = run("bench", "--op", "dequantize_kbit", "--backend", "cpu:scalar", "--seconds", "0.01", "--json")
    assert code == 0, text
    data = json.loads(text)
    assert data["backend"] == "cpu:scalar"
    (timing,) = data["timings"]
    assert (timing["op"], timing["backend"], timing["beside"]) == ("dequantize_kbit", "cpu:scalar", "torch reference")
    assert 0.01 < timing["ms"] < 1e4
    assert timing["speedup"] == timing["other_ms"] / timing["ms"]
    assert run("bench", "--backend", "abacus")[0] == 2
    code, text = run("bench", "--op", "abacus", "--seconds", "0.01")
    assert code == 2
    assert "op must be one of quantize_kbit" in text


def test_the_median_is_one() -> None:
    delays = iter([0.0] * 2 + [0.03, 0.0, 0.01, 0.0, 0.02, 0.0])
    first, second = medians(lambda: time.sleep(next(delays)), lambda: time.sleep(next(delays)), 0.0)
    assert 20 <= first < 30
    assert second < 10


def test_bench_computes_the_same_as_what_it_stands_beside() -> None:
    """A case of bench is only worth something if both sides give the same."""
    with polybit.backend("cpu", fallback="error"):
        for case in cases("cpu"):
            ours, theirs = case.run(), case.other()
            limit = {"matmul_kbit": 0.02, "linear_int8": 1e-3, "gather_kbit": 0.02}.get(case.op, 1e-12)
            pairs = zip(ours, theirs) if isinstance(ours, tuple) else [(ours, theirs)]
            for got, want in pairs:
                want = want[0] if isinstance(want, tuple) else want
                assert got.shape == want.shape
                total = want.double().square().sum().clamp(min=1e-30)
                assert (got.double() - want.double()).square().sum() / total <= limit, case


def test_doctor_on_this_machine() -> None:
    """In a fresh interpreter: other tests load plug-ins that fail on purpose."""
    code = "import polybit.cli.doctor as d; d.QUICK_SAMPLES = 1; from polybit.cli import app; "
    done = run_python(code + "app(['doctor', '--quick', '--json'])", check=False)
    data = json.loads(done.stdout)
    assert (done.returncode, data["ok"]) == (0, True), data
    assert "broken" not in [finding["level"] for finding in data["findings"]]
    for name in cpu_variants():
        assert data["self_test"][name] == {"samples": len(spec.OPS), "failures": []}


def found(words: str) -> dict[str, str]:
    """The finding of the doctor with these words; the exit code says whether something is broken."""
    code, text = run("doctor", "--quick", "--json")
    findings = json.loads(text)["findings"]
    assert code == int(any(finding["level"] == "broken" for finding in findings))
    (finding,) = [finding for finding in findings if words in finding["what"]]
    assert finding["remedy"]
    return finding


@pytest.fixture
def no_self_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "self_test", lambda samples: [])


@pytest.mark.parametrize(
    "name, value, level, words",
    [
        ("POLYBIT_BACKEND", "abacus", "broken", "abacus is unknown"),
        ("POLYBIT_FALLBACK", "maybe", "broken", "POLYBIT_FALLBACK=maybe is unknown"),
        ("POLYBIT_BACKEND", "cpu,emulator:32", "note", "emulator:32, a test vehicle"),
        ("POLYBIT_BACKEND", "sycl:cpu:8", "note", "sycl:cpu:8, a test vehicle"),
        ("POLYBIT_BACKEND", " ,", "note", "names nothing"),
        ("POLYBIT_BACKEND", "cpu:scalar", "note", "forces cpu:scalar"),
    ],
)
@pytest.mark.usefixtures("no_self_test")
def test_doctor_on_the_environment(
    name: str, value: str, level: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert found(words)["level"] == level


@pytest.mark.usefixtures("no_self_test")
def test_doctor_on_a_backend_without_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = NativeBackend("mine:gpu", "cuda", "no such device", "/x.so", {})
    monkeypatch.setattr(catalogue, "backends", [*catalogue.backends, absent])
    monkeypatch.setenv("POLYBIT_BACKEND", "mine")
    assert found("mine is not usable here: no such device")["level"] == "broken"


@pytest.mark.parametrize(
    "name, value, level, words",
    [
        ("torch.__version__", "2.5.1", "broken", "torch 2.5.1 is too old"),
        ("_C.openmp_library", lambda: "", "note", "no OpenMP pool"),
        ("_C.thread_count", lambda: 1, "note", "run on 1 thread"),
    ],
)
@pytest.mark.usefixtures("no_self_test")
def test_doctor_on_the_installation(
    name: str, value: object, level: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_cores", lambda: 4)
    monkeypatch.setattr(f"polybit.cli.doctor.{name}", value)
    assert found(words)["level"] == level


@pytest.mark.parametrize(
    "origin, reason, remedy",
    [
        ("entry point bad", "ModuleNotFoundError: No module named 'bad'", "repair or uninstall the plug-in"),
        ("/there/libmine.so", "built for op table 1, but this polybit has 2", "rebuild the plug-in"),
        (str(LIBRARY_FOLDER / "libpolybit_x.so"), "built for op table 1", "reinstall polybit"),
    ],
)
@pytest.mark.usefixtures("no_self_test")
def test_doctor_on_a_source_that_failed(origin: str, reason: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "failures", [BackendInfo(origin, "", False, reason, origin)])
    finding = found(f"{origin} failed: {reason}")
    assert finding["level"] == "broken"
    assert remedy in finding["remedy"]


def test_doctor_on_lost_libraries_and_wrong_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    scalar = next(item for item in catalogue.backends if item.name == "cpu:scalar")
    broken = dataclasses.replace(scalar, ops={**scalar.ops, "matmul_int8": lambda stream, args, outs: None})
    monkeypatch.setattr(doctor, "QUICK_SAMPLES", 1)
    monkeypatch.setattr(catalogue, "backends", [broken])
    monkeypatch.setattr(catalogue, "version", catalogue.version + 1)
    finding = found("cpu:scalar: 1 of 23 samples are wrong, first: matmul_int8".replace("23", str(len(spec.OPS))))
    assert finding["level"] == "broken"
    monkeypatch.setattr(catalogue, "backends", [])
    monkeypatch.setattr(catalogue, "version", catalogue.version + 1)
    assert found("no CPU backend is usable")["level"] == "broken"
