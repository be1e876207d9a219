"""What polybit.compat says of mistakes in code written for bitsandbytes: the errors and warnings of the real one.

The cases are in compat_errors.py. What differs on purpose is listed here; docs/bitsandbytes.md says the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fnmatch import fnmatchcase

import pytest
from tools import HERE, PACKAGE

if os.environ.get("CI") != "true":
    pytest.importorskip("bitsandbytes")

# Names of cases (patterns), what the real one does, and what ours does: "" is nothing at all.
DIFFERENT = [
    # Assertions there, which python -O leaves out.
    ("fp8 map, bits do not add up", "AssertionError", "ValueError"),
    ("state, unknown entry", "AssertionError", "ValueError"),
    ("override_config, both ways", "AssertionError", "ValueError"),
    ("register_module_override, None", "AssertionError", ""),  # a layer without a bias
    # Arguments that do not fit, which torch's products find out there; ours names the argument.
    ("*, other width", "RuntimeError", "ValueError"),
    ("int8_vectorwise_dequant, too few scales", "RuntimeError", "ValueError"),
    ("int8_linear_matmul of floats", "RuntimeError", "TypeError"),
    ("int8_vectorwise_quant of int32", "", "TypeError"),
    ("Embedding8bit, not quantized", "AttributeError", "RuntimeError"),  # the error it means to raise never comes
    # Refused there, done here.
    ("type without a device", "AssertionError", ""),  # "cuda" there
    ("type int4", "RuntimeError", ""),
    ("dequantize_blockwise into out", "NotImplementedError", ""),
    ("int8_double_quant", "NotImplementedError", ""),
    ("matmul_4bit, nested by 128*", "NotImplementedError", ""),
    ("trained 8-bit layer in evaluation", "NotImplementedError log", ""),
    ("Embedding?bit, saved", "NotImplementedError", ""),
    ("Linear*, loaded", "RuntimeError", ""),
    ("AdEMAMix32bit", "RuntimeError", ""),
    ("*AdEMAMix32bit, is_paged=True", "RuntimeError UserWarning", ""),
    ("PagedAdEMAMix32bit", "RuntimeError UserWarning", ""),
    ("register_parameters of nothing", "IndexError", ""),
    # No reason to warn: states are paged, nothing is cast to fp16, any width is looked up by rows.
    ("Paged*", "UserWarning", ""),
    ("*, is_paged=True", "UserWarning", ""),
    ("Linear8bitLt, evaluation of fp32", "log", ""),
    ("Embedding4bit, width 40", "log", ""),
    # Ignored there.
    ("Adam*, amsgrad=True", "", "ValueError"),
    ("LAMB*, amsgrad=True", "", "ValueError"),
    ("Paged*, amsgrad=True", "UserWarning", "ValueError"),
    ("LAMB*, adam_w_mode=False", "", "ValueError"),
    ("LARS*, nesterov=True", "", "ValueError"),
    ("LARS*, dampening=0.1", "", "ValueError"),
    ("*32bit, optim_bits=8", "", "ValueError"),
    ("Paged*32bit, optim_bits=8", "UserWarning", "ValueError"),
    ("update of * bits, skip_zeros", "", "NotImplementedError"),
    ("skip_zeros", "", "NotImplementedError"),
    ("loading onto another device", "", "ValueError"),  # states are where their parameters are
    ("OutlierAwareLinear, weight alone", "log", "NotImplementedError log"),  # forward gives None there
    # Not offered: updates that are only clipped, maps of 4 bits, other blocks of 8-bit codes.
    ("LAMB*, max_unorm=0.5", "", "NotImplementedError"),
    ("LARS*, max_unorm=0.5", "", "NotImplementedError"),
    ("* map of 4 bits", "", "NotImplementedError"),
    ("linear map without zero", "", "NotImplementedError"),
    ("quantize_blockwise, blocksize 100", "", "ValueError"),
    ("quantize_blockwise, blocksize 8192", "", "ValueError"),
]


def outcomes(who: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, str(HERE / "compat_errors.py"), who],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_errors_and_warnings_are_those_of_bitsandbytes() -> None:
    theirs, ours = outcomes("bitsandbytes"), outcomes("polybit")
    assert theirs.keys() == ours.keys() and len(theirs) > 400
    different = {case: (theirs[case], ours[case]) for case in theirs if theirs[case] != ours[case]}
    same = [outcome for case, outcome in theirs.items() if outcome and case not in different]
    print(f"{len(theirs)} cases; {len(same)} raise or warn alike, {len(different)} differ")
    unused, unexplained = set(DIFFERENT), []
    for case, pair in different.items():
        reasons = {entry for entry in DIFFERENT if fnmatchcase(case, entry[0]) and pair == entry[1:]}
        unused -= reasons
        if not reasons:
            unexplained.append((case, *pair))
    assert not unexplained and not unused
