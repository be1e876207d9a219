"""Where polybit meets other libraries; each module imports its library, and nothing else imports these."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TRANSFORMERS = (5, 20)  # the oldest that it was seen to work with; pyproject.toml wants the same


def register() -> None:
    """Meet transformers and accelerate as soon as they are imported, without importing them.

    Neither looks for plug-ins, so this waits: for the registry of quantizers, and for the hooks that offload weights.
    """
    for module, meet in _MEETINGS.items():
        if module in sys.modules:
            meet()
        else:
            sys.meta_path.insert(0, _Finder(module, meet))


def _meet_accelerate() -> None:
    importlib.import_module("polybit.integrations.accelerate")


def _meet_transformers() -> None:
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


_MEETINGS = {"transformers.quantizers.auto": _meet_transformers, "accelerate.hooks": _meet_accelerate}


class _Finder(MetaPathFinder):
    """Finds a module once, with whatever finds it otherwise."""

    def __init__(self, module: str, meet: Callable[[], None]) -> None:
        self.module, self.meet = module, meet

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.meet)
        return spec


class _Loader(Loader):
    """Goes on when the module has been loaded."""

    def __init__(self, loader: Loader, meet: Callable[[], None]) -> None:
        self.loader, self.meet = loader, meet

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        assert module.__spec__ is not None
        module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.meet()
