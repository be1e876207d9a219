"""Put on PYTHONPATH by polybit.run: child processes get the same bitsandbytes. The next sitecustomize runs as well."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

_here = Path(__file__).resolve().parent


def _run(name: str, spec: ModuleSpec | None) -> Any:
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


# Without `import polybit`, which would import torch into every child.
_name = "polybit.compat._finder"
_run(_name, importlib.util.spec_from_file_location(_name, _here.parent / "_finder.py")).install()

_others = [path for path in sys.path if Path(path or ".").resolve() != _here]
_next = PathFinder.find_spec("sitecustomize", _others)
if _next is not None:
    _run("sitecustomize", _next)
