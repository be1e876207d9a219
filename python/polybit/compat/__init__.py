"""Code written for bitsandbytes runs on polybit: ``install()``, or ``python -m polybit.run``.

docs/bitsandbytes.md says what runs, what differs and why. ``import polybit`` does nothing of it.
"""

from __future__ import annotations

from polybit.compat._finder import install

__all__ = ["install"]
