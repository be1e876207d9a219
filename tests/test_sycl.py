"""The kernels as SYCL at several sub-group sizes: compiled by DPC++, and run on the CPU as an OpenCL device.

The backend sycl:cpu runs every sample in tests/test_conformance.py and every golden file in tests/test_golden.py.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from intel import (
    FOLDER_2025,
    GPUS,
    KERNELS,
    ROOT,
    SOURCES,
    build_program,
    compile_sycl,
    entries,
    execute,
    lower,
    require_backend,
    require_ocloc,
    require_sycl,
    to_spirv,
    use_of,
)
from tools import INCLUDE, PACKAGE, run_python

import polybit
from polybit import ops, spec
from polybit.backends import BackendError, discovery, last_backend, list_backends, resolve
from polybit.spec.blockwise import noise
from polybit.testing import check

# What every kernel takes on each GPU by Debian 12's IGC (1.0.12504): registers, and bytes of memory where it spills.
ON_GPUS: dict[str, dict[str, dict[str, int]]] = json.loads(KERNELS.read_text())
BACKENDS = ("sycl:cpu", "sycl:cpu:8", "sycl:cpu:32")
# An op of each header of core/kernels; every kernel takes more than a second to compile.
SHARE = ("gather_int8", "quantize_absmax", "dequantize_kbit", "matmul_kbit", "linear_int8", "optimizer_8bit")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_program("sycl_compile", tmp_path_factory.mktemp("sycl"))


# What differs by the size of a sub-group is one constant.
@pytest.mark.parametrize("sub_group", [16, *(pytest.param(size, marks=pytest.mark.slow) for size in (8, 32, 64))])
def test_every_kernel_compiles_without_a_warning(program: Path, sub_group: int) -> None:
    done = compile_sycl(program, SOURCES / "kernels.sycl.cpp", sub_group)
    assert (done.returncode, done.stdout) == (0, "")


def test_an_error_is_reported_with_its_place(program: Path, tmp_path: Path) -> None:
    source = tmp_path / "broken.cpp"
    text = '#include "core/simt/sycl.h"\nPB_FN float broken(PB_GLOBAL const pb::u32 *p) { return pb::load16(p); }\n'
    source.write_text(text)
    done = compile_sycl(program, source, 16)
    assert done.returncode == 1
    assert ":2:" in done.stdout and "error: no viable conversion from returned value of type 'U4'" in done.stdout
    narrow = compile_sycl(program, source, 4)
    assert narrow.returncode == 1 and "the kernels are for waves of 8, 16, 32, 64" in narrow.stdout


LOWERED = (
    *("quantize_kbit4_fp32", "quantize_absmax", "gather_int8_fp16", "dequantize_kbit_bf16", "sum_chunks"),
    *("matmul_kbit_fp16", "gemv_kbit_1_fp16", "matmul_linear_int8_fp16", "optimizer_8bit_adam"),
)
ENGINE_OPERANDS = {"fp16": "hf", "bf16": "bf"}


def engine_operands(entry: str) -> set[str]:
    """What a kernel gives to the matrix engine: halves, bytes, or nothing."""
    kernel, _, dtype = entry.rpartition("_")
    if not entry.startswith("matmul_") or "_any_" in entry or "_narrow_" in entry or dtype == "fp32":
        return set()
    if entry == "matmul_int8" or kernel == "matmul_kbit_int8":
        return {"b"}
    return {"b", ENGINE_OPERANDS[dtype]} if kernel == "matmul_linear_int8" else {ENGINE_OPERANDS[dtype]}


def test_every_kernel_is_listed_for_intel_s_compiler() -> None:
    assert list(ON_GPUS) == list(entries())


@pytest.mark.parametrize(
    "entry", [pytest.param(name, marks=() if name in LOWERED else pytest.mark.slow) for name in ON_GPUS]
)
def test_intel_s_compiler_lowers_a_kernel(program: Path, tmp_path: Path, entry: str) -> None:
    """Each in a module of its own, as at run time, with the options that libsycl gives. Nothing is run."""
    require_ocloc()
    for device, lanes in GPUS.items():
        spirv, options = to_spirv(program, entry, entries()[entry], tmp_path, device)
        kernel, assembly = lower(spirv, options, device)
        assert kernel["name"] == f"__sycl_kernel_{entry}"
        assert kernel["execution_env"]["simd_size"] == lanes
        assert use_of(kernel) == ON_GPUS[entry][device], f"{device}: python tests/intel.py writes the table"
        multiplied = re.findall(r"dpas\.8x8 \((\d+)\|.*:(hf|bf|b) ", assembly)
        assert set(multiplied) == {(str(lanes), operand) for operand in engine_operands(entry)}


def test_no_kernel_needs_memory_beyond_the_registers() -> None:
    """Neither for what spills nor for private arrays, as recorded."""
    assert all(set(use) == {"registers"} for devices in ON_GPUS.values() for use in devices.values())


@pytest.mark.parametrize("op", SHARE)
def test_the_first_samples(op: str) -> None:
    """Of one dtype."""
    require_backend()
    result = check(op, "sycl:cpu", limit=3)
    assert (result.kind, result.owner, result.unsupported) == ("native", "sycl:cpu", 0)
    result.raise_failures()


def build(root: Path, folder: Path, *options: str, target: str = "all") -> None:
    """The SYCL backend alone, by CMake against the libsycl of `root`."""
    off = [f"-DPOLYBIT_{part}=OFF" for part in ("PYTHON", "CPU", "CUDA", "HIP", "MPS", "EMULATOR")]
    where = ("-DPOLYBIT_SYCL=ON", f"-DPOLYBIT_SYCL_ROOT={root}", *options)
    for command in (("-G", "Ninja", "-S", ROOT, "-B", folder, *off, *where), ("--build", folder, "--target", target)):
        done = execute("cmake", *command, lib=root / "lib")
        assert done.returncode == 0, done.stdout


def test_a_kernel_compiled_ahead_is_loaded(tmp_path: Path) -> None:
    require_backend()
    build(require_sycl(), tmp_path, target="polybit_sycl_ahead")
    package = tmp_path / "python" / "polybit"
    shutil.copytree(PACKAGE, package)
    ahead = package / "lib" / "sycl.9"
    shutil.rmtree(ahead, ignore_errors=True)
    program = tmp_path / "backends" / "sycl" / "polybit_sycl_ahead"
    done = execute(program, ahead, "16", "quantize_blockwise_fp32", "matmul_linear_int8_fp32", "quantize_blockwise")
    assert (done.returncode, done.stdout) == (1, "polybit_sycl_ahead: no kernel is called quantize_blockwise\n")
    (made,) = ahead.rglob("*.*")  # the other one is large
    assert made == ahead / "16" / "quantize_blockwise_fp32.syclbin"

    code = """
import torch, polybit
from polybit import spec
x, code = torch.linspace(-3, 2, 1000), torch.linspace(-1, 1, 256)
with polybit.backend("sycl:cpu", fallback="error"):
    try:
        got = torch.ops.polybit.quantize_blockwise(x, code, 64)
        want = spec.OPS["quantize_blockwise"].reference(x, code, 64)
        print([torch.equal(g, w) for g, w in zip(got, want, strict=True)])
    except RuntimeError as error:
        print(error)
"""

    def said() -> str:
        return execute(sys.executable, "-c", code, PYTHONPATH=str(package.parent)).stdout

    assert said() == "[True, True]\n"
    made.write_bytes(b"not what DPC++ wrote")
    assert f"quantize_blockwise_fp32: {made}: " in said()
    made.unlink()
    assert said() == "[True, True]\n"  # compiled now


@pytest.mark.slow
def test_every_kernel_is_compiled_ahead(tmp_path: Path) -> None:
    """But those that ask for the large register file."""
    build(require_sycl(), tmp_path, "-DPOLYBIT_SYCL_AHEAD=ON")
    large = {entry for entry, use in ON_GPUS.items() if any(gpu["registers"] == 256 for gpu in use.values())}
    made = {str(path.relative_to(tmp_path / "backends/sycl/sycl.9")) for path in tmp_path.rglob("*.syclbin")}
    assert made == {f"{lanes}/{entry}.syclbin" for lanes in (8, 16) for entry in ON_GPUS if entry not in large}


@pytest.mark.slow
def test_the_library_of_oneapi_2025(tmp_path: Path) -> None:
    """Built against libsycl.so.8, whose DPC++ compiles the kernels of the first samples, and whose OpenCL runs them."""
    root = require_sycl(FOLDER_2025)
    build(root, tmp_path)
    (library,) = tmp_path.glob("backends/sycl/libpolybit_sycl.*.so")
    assert library.name == "libpolybit_sycl.8.so"
    assert "[libsycl.so.8]" in execute("readelf", "-d", library).stdout

    package = tmp_path / "python" / "polybit"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("libpolybit_sycl.*"))
    shutil.copy(library, package / "lib")
    code = f"""
from pathlib import Path
import polybit
from polybit.testing import check
assert Path(polybit.__file__).parent == Path({str(package)!r})
for op in {SHARE}:
    result = check(op, "sycl:cpu", limit=1)
    result.raise_failures()
    print(op, result.kind, result.samples, result.unsupported)
print("libsycl.so.8" in Path("/proc/self/maps").read_text())
"""
    done = execute(sys.executable, "-c", code, lib=root / "lib", PYTHONPATH=str(package.parent))
    assert done.stdout.splitlines() == [*(f"{op} native 1 0" for op in SHARE), "True"], done.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_of_many_sub_groups(backend: str) -> None:
    """As many as a group has, at every size: 64 of 8 lanes meet in two steps."""
    require_backend()
    x = noise(3 * 4096 + 5, 1)
    code = torch.linspace(-1, 1, 256)
    with polybit.backend(backend, fallback="error"):
        for block in (16, 64, 256, 1024, 4096):
            got = torch.ops.polybit.quantize_blockwise(x, code, block)
            assert last_backend() == backend
            want = spec.OPS["quantize_blockwise"].reference(x, code, block)
            assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True)), block
        (square,) = torch.ops.polybit.sum_squares_multi([x])
    with polybit.backend("cpu:scalar"):
        assert torch.equal(square, torch.ops.polybit.sum_squares_multi([x])[0])  # the same tree of sums


def test_it_is_chosen_by_its_full_name_only() -> None:
    require_backend()
    assert resolve("quantize_kbit").owner.startswith("cpu:")
    with polybit.backend("sycl:cpu:32,cpu", fallback="error"):
        assert resolve("quantize_kbit").owner == "sycl:cpu:32"
    with pytest.raises(BackendError, match="'sycl'"):  # a GPU's name is not the CPU's
        polybit.backend("sycl").__enter__()


def test_a_compiler_that_fails_is_an_error_of_the_op() -> None:
    require_backend()
    code = """
import torch, polybit
with polybit.backend("sycl:cpu", fallback="error"):
    try:
        torch.ops.polybit.quantize_blockwise(torch.ones(64), torch.linspace(-1, 1, 256), 64)
    except RuntimeError as error:
        print(type(error).__name__, error)
"""
    said = run_python(code, SYCL_PROGRAM_COMPILE_OPTIONS="-no-such-option").stdout
    assert "quantize_blockwise_fp32: " in said and "no-such-option" in said, said


def test_without_an_opencl_device_the_probe_says_so() -> None:
    require_backend()
    code = """
from polybit.backends import list_backends
for info in list_backends():
    if info.name.startswith("sycl:"):
        print(info.name, info.usable, info.reason)
"""
    said = run_python(code, OCL_ICD_FILENAMES="/nowhere.so", OCL_ICD_VENDORS="/nowhere").stdout.splitlines()
    assert len(said) == len(BACKENDS)
    assert all("False no CPU as a SYCL device: No device of requested type" in line for line in said), said


def test_torch_s_queue_is_used_and_not_waited_for(tmp_path: Path) -> None:
    """The backend sycl on USM memory and an in-order queue from outside, of the CPU as an OpenCL device: no GPU."""
    require_backend()
    (library,) = [info.origin for info in list_backends() if info.name == "sycl"]
    done = execute(build_program("sycl_queue", tmp_path, f"-I{INCLUDE}"), library)
    assert (done.returncode, done.stdout) == (0, "0 wrong\n")


def test_the_queue_is_that_of_torch_s_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch.xpu, which only a torch that was built for it has."""
    queues = {torch.device("xpu", i): SimpleNamespace(sycl_queue=0x1000 + i) for i in range(2)}
    monkeypatch.setattr("torch.xpu.current_stream", queues.__getitem__)
    assert [ops._stream(device) for device in queues] == [0x1000, 0x1001]


@pytest.mark.skipif(torch.xpu.is_available(), reason="there is an Intel GPU")
def test_without_an_intel_gpu_the_probe_says_so() -> None:
    require_backend()
    (info,) = [info for info in list_backends() if info.name == "sycl"]
    assert (info.device_type, info.usable) == ("xpu", False)
    assert info.reason.startswith("no Intel GPU"), info.reason
    with pytest.raises(BackendError, match="no Intel GPU"):
        polybit.backend("sycl").__enter__()


@pytest.mark.parametrize(
    "version, built, chosen",
    [
        (None, "9", "9"),
        (None, "8 9", "9"),
        (None, "10 9", "10"),
        ("20250302", "8 9", "8"),
        ("20260930", "8 9", "9"),
        ("20260930", "8", "wants libsycl.so.9; this polybit was built for 8"),
        ("20240200", "8 9", "wants a libsycl that polybit does not know; this polybit was built for 8, 9"),
    ],
)
def test_the_library_is_that_of_torch_s_oneapi(
    version: str | None, built: str, chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for major in built.split():
        (tmp_path / f"libpolybit_sycl.{major}.so").write_text("no library")
    monkeypatch.setattr("torch.version.xpu", version)
    monkeypatch.setattr(discovery, "LIBRARY_FOLDER", tmp_path)
    found = discovery.Catalogue()
    found.discover(discovery.automatic_families("xpu"))
    (reason,) = [info.reason for info in found.failures if "libpolybit_sycl" in info.origin]
    assert chosen in reason if chosen.startswith("wants") else f"libpolybit_sycl.{chosen}.so" in reason
