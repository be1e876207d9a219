"""The kernels as SYCL at several sub-group sizes: compiled by DPC++, and run on the CPU as an OpenCL device.

The backend sycl:cpu runs every sample in tests/test_conformance.py and every golden file in tests/test_golden.py.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from intel import (
    BACKEND,
    FOLDER_2025,
    GPUS,
    KERNELS,
    ROOT,
    SOURCES,
    build_program,
    driver_options,
    execute,
    lower,
    require_backend,
    require_ocloc,
    require_sycl,
    spirv_of,
    use_of,
)
from tools import INCLUDE, LIB, PACKAGE, run_python

import polybit
from polybit import ops, spec
from polybit.backends import BackendError, discovery, last_backend, list_backends, resolve
from polybit.spec.blockwise import noise

# What every kernel takes on each GPU by Debian 12's IGC (1.0.12504): registers, and bytes of memory where it spills.
ON_GPUS: dict[str, dict[str, dict[str, int]]] = json.loads(KERNELS.read_text())
BACKENDS = ("sycl:cpu", "sycl:cpu:8", "sycl:cpu:32")
TARGETS = ("8", "16", "32", "8-xmx", "16-xmx")  # lanes of a sub-group, with or without Intel's matrix engine
# An op of each header of core/kernels.
SHARE = ("gather_int8", "quantize_absmax", "dequantize_kbit", "matmul_kbit", "linear_int8", "optimizer_8bit")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What compiles the kernels when polybit is built."""
    return build_program(tmp_path_factory.mktemp("sycl"), BACKEND / "compile.cpp", BACKEND / "device.cpp")


def compile_sycl(program: Path, source: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return execute(program, source, folder, f"-I{ROOT}", "-Wall", "-Werror", *options)


def modules(folder: Path) -> list[str]:
    """The entry points that have one."""
    return sorted(path.name.removeprefix("__sycl_kernel_").removesuffix(".spv") for path in folder.iterdir())


def assert_complete(folder: Path) -> None:
    """Of every kernel, for every target."""
    assert {path.name for path in folder.iterdir()} == set(TARGETS)
    assert all(modules(path) == sorted(ON_GPUS) for path in folder.iterdir())


# What differs by the size of a sub-group is one constant.
@pytest.mark.parametrize("lanes", [16, *(pytest.param(lanes, marks=pytest.mark.slow) for lanes in (8, 32, 64))])
def test_every_kernel_compiles_without_a_warning(program: Path, tmp_path: Path, lanes: int) -> None:
    engine = ("-DPB_XMX",) if lanes < 32 else ()
    done = compile_sycl(program, BACKEND / "kernels.cpp", tmp_path, f"-DPB_SUB_GROUP={lanes}", *engine)
    assert (done.returncode, done.stdout) == (0, "")
    assert modules(tmp_path) == sorted(ON_GPUS)


def test_an_error_is_reported_with_its_place(program: Path, tmp_path: Path) -> None:
    source = tmp_path / "broken.cpp"
    text = '#include "core/simt/sycl.h"\nPB_FN float broken(PB_GLOBAL const pb::u32 *p) { return pb::load16(p); }\n'
    source.write_text(text)
    done = compile_sycl(program, source, tmp_path / "none")
    assert done.returncode == 1 and not (tmp_path / "none").exists()
    assert ":2:" in done.stdout and "error: no viable conversion from returned value of type 'U4'" in done.stdout
    narrow = compile_sycl(program, source, tmp_path / "none", "-DPB_SUB_GROUP=4")
    assert narrow.returncode == 1 and "the kernels are for waves of 8, 16, 32, 64" in narrow.stdout


def test_every_kernel_is_installed_for_every_target() -> None:
    require_backend()
    assert_complete(LIB / "sycl.9")


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


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return driver_options(tmp_path_factory.mktemp("options"))


def test_every_kernel_is_listed_for_intel_s_compiler(options: dict[str, str]) -> None:
    assert list(ON_GPUS) == list(options)


@pytest.mark.parametrize(
    "entry", [pytest.param(name, marks=() if name in LOWERED else pytest.mark.slow) for name in ON_GPUS]
)
def test_intel_s_compiler_lowers_a_kernel(options: dict[str, str], tmp_path: Path, entry: str) -> None:
    """The installed module, with the options that the backend gives. Nothing is run."""
    require_ocloc()
    for device, target in GPUS.items():
        lanes = target.removesuffix("-xmx")
        kernel, assembly = lower(spirv_of(entry, target), options[entry], device, tmp_path)
        assert kernel["name"] == f"__sycl_kernel_{entry}"
        assert kernel["execution_env"]["simd_size"] == int(lanes)
        assert use_of(kernel) == ON_GPUS[entry][device], f"{device}: python tests/intel.py writes the table"
        multiplied = re.findall(r"dpas\.8x8 \((\d+)\|.*:(hf|bf|b) ", assembly)
        assert set(multiplied) == {(lanes, operand) for operand in engine_operands(entry)}


def test_divides_and_roots_are_correctly_rounded(options: dict[str, str], tmp_path: Path) -> None:
    """By pvc's instructions for that, and on dg2 by steps that correct an inverse root; not by default."""
    require_ocloc()
    entry = "optimizer_8bit_adam"

    def functions(device: str, options: str) -> set[str]:
        _, assembly = lower(spirv_of(entry, GPUS[device]), options, device, tmp_path)
        return set(re.findall(r"math\.(\w+)", assembly))

    assert functions("pvc", options[entry]) == {"invm", "rsqtm"}
    assert functions("dg2", options[entry]) == {"inv", "rsqt"}
    assert functions("pvc", "") == functions("dg2", "") == {"inv", "sqt"}


def test_no_kernel_needs_memory_beyond_the_registers() -> None:
    """Neither for what spills nor for private arrays, as recorded."""
    assert all(set(use) == {"registers"} for devices in ON_GPUS.values() for use in devices.values())


def test_a_launch_needs_the_module_and_no_dpcpp(tmp_path: Path) -> None:
    require_backend()
    package = tmp_path / "polybit"
    shutil.copytree(PACKAGE, package)
    module = package / "lib" / "sycl.9" / "16" / "__sycl_kernel_quantize_blockwise_fp32.spv"
    code = """
import torch, polybit
from polybit import spec
x, code = torch.linspace(-3, 2, 1000), torch.linspace(-1, 1, 256)
with polybit.backend("sycl:cpu", fallback="error"):
    try:
        got = torch.ops.polybit.quantize_blockwise(x, code, 64)
        want = spec.OPS["quantize_blockwise"].reference(x, code, 64)
        print([torch.equal(g, w) for g, w in zip(got, want, strict=True)])
        print("libsycl-jit" in open("/proc/self/maps").read())
    except RuntimeError as error:
        print(error)
"""

    def said() -> str:
        return execute(sys.executable, "-c", code, PYTHONPATH=str(tmp_path)).stdout

    assert said() == "[True, True]\nFalse\n"
    module.write_bytes(b"not SPIR-V")
    assert f"quantize_blockwise_fp32: {module}: " in said()
    module.unlink()
    assert re.search(rf"quantize_blockwise_fp32: .*No such file or directory \[{module}\]", said())


@pytest.mark.slow
def test_the_library_of_oneapi_2025(tmp_path: Path) -> None:
    """Built against libsycl.so.8, whose DPC++ compiles the kernels, and whose OpenCL runs a sample of each header."""
    root = require_sycl(FOLDER_2025)
    off = [f"-DPOLYBIT_{part}=OFF" for part in ("PYTHON", "CPU", "CUDA", "HIP", "MPS", "EMULATOR")]
    build, package = tmp_path / "build", tmp_path / "polybit"
    for command in (
        ("-G", "Ninja", "-S", ROOT, "-B", build, *off, "-DPOLYBIT_SYCL=ON", f"-DPOLYBIT_SYCL_ROOT={root}"),
        ("--build", build),
        ("--install", build, "--prefix", tmp_path),
    ):
        done = execute("cmake", *command, lib=root / "lib")
        assert done.returncode == 0, done.stdout
    (library,) = package.glob("lib/libpolybit_sycl.*.so")
    assert library.name == "libpolybit_sycl.8.so"
    assert "[libsycl.so.8]" in execute("readelf", "-d", library).stdout
    assert_complete(package / "lib" / "sycl.8")

    without = shutil.ignore_patterns("libpolybit_sycl.*", "sycl.*")
    shutil.copytree(PACKAGE, package, ignore=without, dirs_exist_ok=True)
    code = f"""
from pathlib import Path
import polybit
from polybit.testing import check
assert Path(polybit.__file__).parent == Path({str(package)!r})
for op in {SHARE}:
    result = check(op, "sycl:cpu", limit=1)
    result.raise_failures()
    print(op, result.kind, result.samples, result.unsupported)
maps = Path("/proc/self/maps").read_text()
print("libsycl.so.8" in maps, "libsycl-jit" in maps)
"""
    done = execute(sys.executable, "-c", code, lib=root / "lib", PYTHONPATH=str(tmp_path))
    assert done.stdout.splitlines() == [*(f"{op} native 1 0" for op in SHARE), "True False"], done.stdout


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
    done = execute(build_program(tmp_path, SOURCES / "sycl_queue.cpp", options=(f"-I{INCLUDE}",)), library)
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
