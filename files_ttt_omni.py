# Copyright 2026 The TTT-Omni authors. Licensed under the Apache License, Version 2.0.
"""Files and folders that appear whole or not at all, whoever else writes to the same place."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# What is being made lies in a folder `.NAME.<16 hex digits>.tmp`, whose lock its maker holds while it lives. The
# system lets go of the lock of a process that was killed: who then gets it may remove the folder.
LONGEST_NAME = 200  # bytes of NAME, so that the whole stays below the 255 of file systems


@contextmanager
def new_file(path: str | os.PathLike) -> Iterator[Path]:
    """
    A file to write, which takes the name `path` when all went well, also of a file there, and disappears otherwise.

    What killed runs left of the same file is removed, where the system has locks that prove them dead.

    Args:
        path: of the file; a symbolic link is followed. A file there keeps its permissions.

    Yields:
        Where to write it: a path on the same file system, with the same name.

    Raises:
        FileNotFoundError: the folder does not exist.
        FileExistsError: `path` is a folder, or a device.
    """
    path = Path(path).resolve()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder {path.parent} does not exist.")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"The output {path} exists and is not a file.")
    with _workplace(path.parent, path.name) as folder:
        file = folder / path.name
        yield file
        if path.exists():
            shutil.copymode(path, file)
        os.replace(file, path)


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """
    A folder to fill, which takes the name `path` when all went well, and disappears otherwise.

    Where there is an empty folder already, which may be a mount point, or a symbolic link to one, it is made inside
    of that, and its content moved up at the end. What killed runs left is removed, as by [`new_file`].

    Raises:
        FileExistsError: `path` is a file, or a folder that is not empty, now or at the end.
    """
    path = Path(path).resolve()
    remove_leftovers(path, path.name)
    _require_empty(path)
    exists = path.is_dir()
    parents = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _workplace(path if exists else path.parent, path.name) as folder:
            _require_empty(path, but=folder.name)
            yield folder
            _require_empty(path, but=folder.name)
            if exists:
                _move_content(folder, path)
            else:
                os.replace(folder, path)
    except BaseException:
        for parent in parents:
            with suppress(OSError):  # not empty
                parent.rmdir()
        raise


def remove_leftovers(parent: Path, name: str) -> None:
    """Removes from the folder `parent` what runs that are dead left of a file or folder `name`."""
    pattern = re.escape(_beginning(name)) + r"[0-9a-f]{16}\.tmp"
    with suppress(OSError):
        for entry in os.listdir(parent):
            if re.fullmatch(pattern, entry) and (lock := _lock(parent / entry, wait=False)) is not None:
                shutil.rmtree(parent / entry, ignore_errors=True)
                os.close(lock)


@contextmanager
def _workplace(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in `parent` for what will be called `name`, locked while it is used."""
    remove_leftovers(parent, name)
    lock, folder = None, None
    while folder is None or not folder.is_dir():  # one not locked yet may have been removed as a leftover
        folder = parent / f"{_beginning(name)}{secrets.token_hex(8)}.tmp"
        folder.mkdir()
        lock = _lock(folder, wait=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _beginning(name: str) -> str:
    return f".{os.fsencode(name)[:LONGEST_NAME].decode(errors='ignore')}."


def _lock(folder: Path, wait: bool) -> int | None:
    """A descriptor that holds the lock of `folder` until it is closed; `None` if another has it, or there are none."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (OSError, AttributeError):  # held, or neither the file system nor the system has any
        os.close(descriptor)
        return None
    return descriptor


def _require_empty(path: Path, but: str | None = None) -> None:
    if path.is_dir() and set(os.listdir(path)) - {but}:
        raise FileExistsError(f"The output folder {path} exists and is not empty; choose another one or remove it.")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"The output {path} exists and is not a folder.")


def _move_content(source: Path, target: Path) -> None:
    names = os.listdir(source)
    try:
        for name in names:
            os.rename(source / name, target / name)
    except BaseException:
        for name in names:
            if not (source / name).exists():
                os.rename(target / name, source / name)
        raise


__all__ = ["new_file", "new_folder"]
