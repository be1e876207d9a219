"""The kernels as HIP, through CMake's HIP language, for AMD's architectures: compiled, never run."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from amd import (
    WAVEFRONT,
    check_resources,
    code_objects,
    compile_hip,
    instructions_of,
    llvm,
    notes_of,
    require_rocm_root,
    undefined_symbols,
)

WIDE_LOAD = re.compile(r"global_load_(dwordx4|b128)")


QUICK = ("gfx942", "gfx1100")  # waves of 64 and of 32
ARCHITECTURES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in WAVEFRONT]


def quantize(dtype: str) -> str:
    """The kernel of quantize_kbit for 4 bits."""
    return f"QuantizeKbit<{dtype}, 4u, false>"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the library with the code object of an architecture: the quick ones are in one, the others in another."""

    @functools.cache
    def library(quick: bool) -> Path:
        folder = tmp_path_factory.mktemp("hip")
        names = tuple(name for name in WAVEFRONT if (name in QUICK) == quick)
        made = compile_hip(folder, names)
        assert set(code_objects(made)) == set(names)
        return made

    return lambda architecture: library(architecture in QUICK)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_spills_and_little_group_memory(build: Callable[[str], Path], architecture: str) -> None:
    notes = notes_of(code_objects(build(architecture))[architecture])
    check_resources(notes, WAVEFRONT[architecture])
    assert {quantize(dtype) for dtype in ("float", "Fp16", "Bf16")} <= set(notes)
    assert notes[quantize("Fp16")][".max_flat_workgroup_size"] == 512


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_instructions(build: Callable[[str], Path], architecture: str) -> None:
    functions = instructions_of(code_objects(build(architecture))[architecture])
    for dtype, loads in (("float", 2), ("Fp16", 1), ("Bf16", 1)):
        names = functions[quantize(dtype)]
        assert sum(bool(WIDE_LOAD.fullmatch(name)) for name in names) == loads, dtype
        assert "ds_bpermute_b32" in names  # shuffle_xor
        assert any(re.fullmatch(r"s_barrier(_signal)?", name) for name in names)
        assert "v_div_fixup_f32" in names  # the end of a correctly rounded division
        assert not any(name.startswith("scratch_") for name in names)
    products = [names for kernel, names in functions.items() if "AmdTile<" in kernel]
    matrix = {"gfx9": "v_mfma_", "gfx11": "v_wmma_", "gfx12": "v_wmma_"}.get(architecture[:-2], "")
    for names in products:
        assert any(name.startswith(matrix) for name in names), matrix
    assert len(products) >= 10


def test_the_library_wants_nothing_but_the_runtime(build: Callable[[str], Path]) -> None:
    library = build(QUICK[0])
    assert "libamdhip64.so.7" in llvm("llvm-readelf", "--needed-libs", library)
    declared = (require_rocm_root() / "include/hip/hip_runtime_api.h").read_text(encoding="utf-8")
    wanted = {name for name in undefined_symbols(library) if "hip" in name.lower()}
    assert {"hipLaunchKernel", "hipGetLastError", "__hipRegisterFatBinary"} <= wanted
    assert all(name.startswith("__hip") or f" {name}(" in declared for name in wanted), wanted


def test_spills_are_noticed(tmp_path: Path) -> None:
    """A kernel that is allowed too few registers fails the check that the others pass."""
    source = tmp_path / "spills.hip"
    source.write_text("""
extern "C" __global__ __attribute__((amdgpu_num_vgpr(12))) void spills(float *x) {
  const unsigned lane = __builtin_amdgcn_workitem_id_x();
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; i++) v[i] = x[i * 64 + lane];
  asm volatile("" ::: "memory");
#pragma unroll
  for (int i = 0; i < 64; i++) x[i * 64 + lane] = v[63 - i] * v[i];
}
""")
    device_only = ("-xhip", "--offload-arch=gfx1100", "--offload-device-only", "--no-gpu-bundle-output", "-O3")
    llvm("clang++", *device_only, source, "-o", tmp_path / "spills.co")
    with pytest.raises(AssertionError, match="spills: .*count is"):
        check_resources(notes_of(tmp_path / "spills.co"), 32)
