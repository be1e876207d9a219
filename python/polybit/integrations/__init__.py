"""Where polybit meets other libraries; each module imports its library, and nothing else imports these."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_REGISTRY = "transformers.quantizers.auto"
TRANSFORMERS = (5, 20)  # the oldest that it was seen to work with; pyproject.toml wants the same


def register_with_transformers() -> None:
    """Make transformers know checkpoints of polybit as soon as it is imported, without importing it.

    transformers looks for no plug-ins, so this waits for the module with its registry.
    """
    if _REGISTRY in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    version: str = importlib.import_module("transformers").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < TRANSFORMERS:
        wanted = ".".join(str(part) for part in TRANSFORMERS)
        warnings.warn(
            f"polybit: PolybitConfig needs transformers {wanted} or newer, found {version}: "
            "pip install --upgrade 'polybit[eval]'",
            stacklevel=2,
        )
        return
    importlib.import_module("polybit.integrations.transformers")


class _Finder(MetaPathFinder):
    """Finds the registry once, with whatever finds it otherwise."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Registers when the registry has been loaded."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        assert module.__spec__ is not None
        module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _register()
