"""The Metal backend without Apple hardware: its text type-checked, and its dispatch run by a stand-in (metal.py)."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import metal
import pytest
import torch
from tools import require_tool, run_python

import polybit
from polybit import _C
from polybit.backends import discovery
from polybit.backends import metal as metal_backend
from polybit.backends.discovery import catalogue
from polybit.backends.metal import MetalBackend, Recorder, load_metal
from polybit.spec import OPS
from polybit.spec.blockwise import noise
from polybit.spec.kbit import weight
from polybit.testing import check

NAME = "metal-stand-in"
ORDERS = (
    "shuffled:5",
    pytest.param("ascending", marks=pytest.mark.slow),
    pytest.param("descending", marks=pytest.mark.slow),
)
REFUSED = {
    "kernel void m(device float *x [[buffer(0)]]) { threadgroup float *p = x; *p = 0.0f; }": "'threadgroup float \\*'",
    "kernel void m(constant float *x [[buffer(0)]]) { *x = 0.0f; }": "read-only variable is not assignable",
    "kernel void m(threadgroup float *x [[threadgroup(0)]]) { pb::load1(x); }": "no matching function",
}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What CMake installs with POLYBIT_MPS=ON."""
    folder = tmp_path_factory.mktemp("mps")
    cmake = require_tool("cmake", str(Path(sys.executable).parent / "cmake"))
    off = [f"-DPOLYBIT_{name}=OFF" for name in ("CPU", "CUDA", "HIP", "SYCL", "EMULATOR", "PYTHON")]
    tools = (f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=Release", "-DPOLYBIT_MPS=ON")
    for command in (
        (cmake, "-S", metal.ROOT, "-B", folder / "build", *off, *tools),
        (cmake, "--build", folder / "build"),
        (cmake, "--install", folder / "build", "--prefix", folder),
    ):
        done = metal.execute(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "polybit" / "lib"


@pytest.fixture(scope="module")
def backend(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[metal.Shaders]:
    """The backend on tensors of the CPU, by the stand-in; its shaders."""
    text = (package / "polybit.metal").read_text(encoding="utf-8")
    shaders = metal.Shaders(text, tmp_path_factory.mktemp("shaders"))
    (library,) = package.glob("libpolybit_mps.*")
    stand_in = MetalBackend(Recorder(library), lambda: shaders, name=NAME, device_type="cpu", origin="tests/metal.py")
    catalogue.add([stand_in])
    yield shaders
    catalogue.backends.remove(stand_in)
    catalogue.version += 1


def test_the_text_passes_the_type_check(package: Path) -> None:
    done = metal.check_types(package / "polybit.metal")
    assert done.returncode == 0, done.stderr


def test_the_text_asks_for_no_fast_math(package: Path) -> None:
    text = (package / "polybit.metal").read_text(encoding="utf-8")
    for pragma in ("METAL fp math_mode(safe)", "METAL fp contract(off)", "clang fp contract(off)"):
        assert 0 < text.index(f"#pragma {pragma}\n") < text.index("namespace pb")
    library = set(re.findall(r"\bmetal::((?:\w+::)?\w+)", text)) - {"threadgroup_barrier", "mem_flags::mem_device"}
    exact = {"as_type", "fma", "rint", "precise::sqrt", "simd_shuffle", "simd_shuffle_xor"}
    assert library - {"mem_flags::mem_threadgroup", "simdgroup_float8x8", "simdgroup_multiply_accumulate"} == exact


@pytest.mark.parametrize("planted", REFUSED)
def test_the_type_check_refuses(planted: str, tmp_path: Path) -> None:
    text = metal.amalgamate(tmp_path)
    with text.open("a", encoding="utf-8") as file:
        file.write(planted + "\n")
    done = metal.check_types(text)
    assert done.returncode != 0 and re.search(REFUSED[planted], done.stderr), done.stderr


def test_the_type_check_refuses_the_wrong_memory_in_a_kernel(tmp_path: Path) -> None:
    text = metal.amalgamate(tmp_path)
    source = text.read_text(encoding="utf-8")
    changed = source.replace(
        "PB_FN void run(Wave w, PB_LOCAL Local *local,", "PB_FN void run(Wave w, PB_GLOBAL Local *local,"
    )
    assert changed != source
    text.write_text(changed, encoding="utf-8")
    assert (
        "no matching function for call to 'run'" in metal.check_types(text).stderr or metal.check_types(text).returncode
    )


def test_entry_points_keep_to_the_limits(tmp_path: Path) -> None:
    found = metal.entry_points(metal.amalgamate(tmp_path))
    names = run_entries()
    assert set(found) == {*names, "bind_arguments"} and len(names) == 115
    for name, parameters in found.items():
        buffers = [attribute for attribute in parameters if attribute.startswith("buffer(")]
        assert buffers == [f"buffer({place})" for place in range(len(buffers))] and len(buffers) <= metal.BUFFERS, name
    assert len([a for a in found["bind_arguments"] if a.startswith("buffer")]) == metal.BUFFERS


def run_entries() -> list[str]:
    """The names in entries.def, by the preprocessor."""
    done = metal.execute(metal.require_clang(), "-x", "c++", "-E", "-P", "-DPB_ENTRY(name,...)=@name", metal.ENTRIES)
    assert done.returncode == 0, done.stderr
    return re.findall(r"@\s*(\w+)", done.stdout)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("order", ORDERS)
def test_samples(backend: metal.Shaders, op: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYBIT_EMULATOR_ORDER", order)
    result = check(op, NAME)
    assert result.kind == "native" and result.samples > 0 and result.unsupported == 0
    result.raise_failures()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("rows", (1, 5, 40))
def test_products_are_those_of_the_emulator(backend: metal.Shaders, rows: int, dtype: torch.dtype) -> None:
    """To the bit: 32 lanes, no contraction, and the shim's simdgroup_multiply_accumulate adds up in the order of k, as
    LaneTile does. Also of dtypes and rows that no sample has."""
    run = weight(noise((33, 256), 1), "nf4", 64, True)
    x, x_absmax = noise((rows, 256), 2), noise((rows,), 3).abs()
    codes = (x * 40).clamp(-127, 127).to(torch.int8)
    got = []
    for name in (NAME, "emulator:32"):
        with polybit.backend(name, fallback="error"):
            y = torch.ops.polybit.matmul_kbit(x.to(dtype), *run, None, None, 33, 64, 4, 0, 0)
            got.append((y, torch.ops.polybit.matmul_kbit_int8(codes, x_absmax, *run, None, 33, 64, 4, 0, 0, dtype)))
    for mine, other in zip(*got):
        assert mine.dtype == dtype and torch.equal(mine, other) and bool(mine.float().abs().sum() > 1)


# A product of each tile of core/simt/tile_simdgroup.h.
FEW_ENTRIES = """
PB_ENTRY(matmul_kbit_fp32, pb::MatmulKbit<float, pb::SimdgroupTiles>)
PB_ENTRY(matmul_int8, pb::MatmulInt8<pb::SimdgroupTiles>)
#undef PB_ENTRY
"""
WRONG_PLACES = {
    "none": ("", "", False, False),
    "row": ("w.lane() / 16u * 4u + w.lane() / 2u % 4u", "w.lane() / 4u", True, True),
    "column": ("w.lane() / 8u % 2u * 4u + w.lane() % 2u * 2u + i", "w.lane() % 4u * 2u + i", True, True),
    "row of B": ("as_float(p[pitch])", "as_float(p[1])", True, False),
    "byte of B": ("row(w, 0) % 2u * 8u", "row(w, 0) % 2u * 16u", False, True),
}


@pytest.mark.parametrize("planted", WRONG_PLACES)
def test_a_wrong_place_of_a_lane_in_a_matrix_is_noticed(planted: str, package: Path, tmp_path: Path) -> None:
    right, wrong, *noticed = WRONG_PLACES[planted]
    entries, source = tmp_path / "few.def", tmp_path / "few.metal"
    entries.write_text(FEW_ENTRIES, encoding="utf-8")
    backend = metal.ROOT / "backends" / "mps" / "polybit.metal"
    text = backend.read_text(encoding="utf-8").replace("../../core/kernels/entries.def", str(entries))
    source.write_text(text.replace("../..", str(metal.ROOT)), encoding="utf-8")
    text = metal.amalgamate(tmp_path, source).read_text(encoding="utf-8")
    assert not right or text.count(right) == 1
    shaders = metal.Shaders(text.replace(right, wrong) if right else text, tmp_path, entries)
    (library,) = package.glob("libpolybit_mps.*")
    mine = MetalBackend(Recorder(library), lambda: shaders, name=NAME, device_type="cpu", origin="tests/metal.py")

    x, run = noise((40, 256), 2), weight(noise((33, 256), 1), "nf4", 64, True)
    a, b = ((noise((rows, 256), 3) * 40).clamp(-127, 127).to(torch.int8) for rows in (40, 33))
    y, products = torch.empty(40, 33), torch.empty(40, 33, dtype=torch.int32)
    mine.ops["matmul_kbit"](0, (x, *run, None, None, 33, 64, 4, 0, 0), (y,))
    mine.ops["matmul_int8"](0, (a, b), (products,))
    with polybit.backend("emulator:32", fallback="error"):
        want = torch.ops.polybit.matmul_kbit(x, *run, None, None, 33, 64, 4, 0, 0)
        assert [not torch.equal(y, want), not torch.equal(products, torch.ops.polybit.matmul_int8(a, b))] == noticed
    assert shaders.calls == {"bind_arguments": 2, "matmul_kbit_fp32": 1, "matmul_int8": 1}


def test_packing_copies(backend: metal.Shaders) -> None:
    q = (torch.arange(33 * 128) % 251).to(torch.uint8)
    with polybit.backend(NAME, fallback="error"):
        packed = torch.ops.polybit.pack_kbit(q, 33, 256, 64, 4, len(q))
        assert torch.equal(packed, q)
        assert torch.equal(torch.ops.polybit.unpack_kbit(packed, 33, 256, 64, 4), q)


def test_every_kernel_ran(backend: metal.Shaders) -> None:
    """In the tests above."""
    assert set(run_entries()) - set(backend.calls) == set()
    kernels = sum(count for name, count in backend.calls.items() if name != "bind_arguments")
    assert backend.calls["bind_arguments"] == kernels


def test_a_list_of_many_tensors_is_cut(backend: metal.Shaders) -> None:
    xs = [torch.full((n,), 0.5) for n in range(1, 70)]
    before = backend.calls.get("scale_multi", 0)
    with polybit.backend(NAME, fallback="error"):
        torch.ops.polybit.scale_multi(xs, torch.tensor(3.0))
    assert backend.calls["scale_multi"] - before == 4  # 22 tensors each
    assert all(bool((x == 1.5).all()) for x in xs)


def test_a_tensor_changed_in_place_must_be_contiguous(backend: metal.Shaders) -> None:
    with polybit.backend(NAME, fallback="error"), pytest.raises(polybit.BackendError, match="must be contiguous"):
        torch.ops.polybit.scale_multi([torch.ones(4, 4).t()[:, :2]], torch.tensor(3.0))


def test_where_there_is_no_apple_gpu_the_backend_says_so(package: Path) -> None:
    (library,) = package.glob("libpolybit_mps.*")
    if not torch.backends.mps.is_available():
        assert "torch sees no Apple GPU" in load_metal(library).reason


def test_a_recorder_for_another_op_table_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "polybit_abi.h").write_text("#define PB_ABI 0x1234ull\n", encoding="utf-8")
    source, library = metal.ROOT / "backends" / "mps" / "record.cpp", tmp_path / "libpolybit_mps.so"
    flags = ("-std=c++17", "-fPIC", "-shared", f"-I{tmp_path}", source, "-o", library)
    done = metal.execute(metal.require_clang(), *flags)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(discovery, "LIBRARY_FOLDER", tmp_path)
    found = discovery.Catalogue()
    found.discover(("mps",))
    assert "mps" not in [backend.name for backend in found.backends]
    (reason,) = [info.reason for info in found.failures if "libpolybit_mps" in info.origin]
    assert "op table 0000000000001234" in reason and f"{_C.abi:016x}" in reason and str(tmp_path) in reason


@pytest.mark.parametrize("name", ("_DLTensor", "_TensorList", "_Context", "_Op", "_Launch"))
def test_structures_that_are_not_those_of_the_header_are_refused(
    name: str, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two fields of one size that changed places."""
    (library,) = package.glob("libpolybit_mps.*")
    assert len(Recorder(library).ops) == len(OPS)
    fields = list(getattr(metal_backend, name)._fields_)
    pairs = zip(range(len(fields) - 1), fields, fields[1:])
    at = next(at for at, one, other in pairs if ctypes.sizeof(one[1]) == ctypes.sizeof(other[1]))
    fields[at], fields[at + 1] = fields[at + 1], fields[at]
    monkeypatch.setattr(metal_backend, name, type(name, (ctypes.Structure,), {"_fields_": tuple(fields)}))
    with pytest.raises(RuntimeError, match="its structures are not those of"):
        Recorder(library)


def test_nothing_of_metal_is_loaded_without_its_tensors() -> None:
    code = "import polybit; print([info.name for info in polybit.backends.list_backends()])"
    assert "mps" not in run_python(code).stdout
