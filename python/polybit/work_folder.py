"""A folder that appears only when it is whole, on disk, and written by one process."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class TakenError(RuntimeError):
    """The folder is there already, or another process that is still alive is writing it."""


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, renamed to it when the block ends well, removed when it raises.

    Everything is written to disk before the rename. A killed process leaves the work folder and its lock file (hidden,
    named after the target) behind; the next run on the same target removes them. Files that make the folder usable
    should be written last.

    Raises:
        TakenError: `target` is there and is not an empty folder, or another run is writing it.
        OSError: the place cannot be written, the disk is full.
    """
    target = Path(os.path.abspath(target))
    made = _missing_parents(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / f".{target.name}.lock"):
            if target.exists() and (not target.is_dir() or any(target.iterdir())):
                raise TakenError("exists and is not an empty folder; remove it or choose another")
            work = target.parent / f".{target.name}.partial"
            if work.exists():
                shutil.rmtree(work)
            work.mkdir()
            try:
                yield work
                _sync(work)
                if target.exists():
                    target.rmdir()
                os.rename(work, target)
                _sync_folder(target.parent)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except BaseException:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise


def _missing_parents(target: Path) -> list[Path]:
    """The parents that have to be made, the innermost first."""
    return [parent for parent in target.parents if not parent.exists()]


def _sync(folder: Path) -> None:
    """Write every file and folder in it to disk."""
    for root, _, files in os.walk(folder):
        for name in files:
            with open(Path(root, name), "rb+") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":  # a folder cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock file; the system lets go of it when the process dies. The file is removed at the end."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock_or_raise(handle, path)
            # Whoever held it may have removed the file in between: then the lock is on nothing.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    try:
        yield
    finally:
        if sys.platform == "win32":  # an open file cannot be removed there
            os.close(handle)
            path.unlink(missing_ok=True)
        else:
            path.unlink(missing_ok=True)
            os.close(handle)


def _lock_or_raise(handle: int, path: Path) -> None:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise TakenError(f"another process is writing it (lock file {path})") from None
