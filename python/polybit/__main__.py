"""`python -m polybit`: the command line."""

from __future__ import annotations

from polybit.cli import main

main()
