"""Files that one process at a time works with: a journal of lines, and scratch folders. Needs no torch."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..whole_files import NAMED, unfinished_name
from .disk import disk_error
from .errors import OutputError


class Lines:
    """A file of lines of JSON that is locked while it is open. A line that was cut off counts for nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _locked(path)

    def read(self) -> list[dict[str, Any]]:
        """All whole lines."""
        os.lseek(self._file, 0, os.SEEK_SET)
        with open(self._file, "rb", closefd=False) as file:
            return [found for line in file.read().split(b"\n") if (found := _parse(line)) is not None]

    def add(self, *lines: dict[str, Any]) -> None:
        """Write lines to the end.

        Raises:
            OutputError: the disk does not take them.
        """
        # the line feed in front ends a line that was cut off
        data = memoryview("".join(f"\n{json.dumps(line)}" for line in lines).encode() + b"\n")
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            raise disk_error(self.path, error) from error

    def restart(self) -> None:
        """Forget all lines."""
        os.ftruncate(self._file, 0)

    def close(self, remove: bool = False) -> None:
        """Let go of the lock, and take the file away if nothing is left to tell."""
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self._file)


def _locked(path: Path) -> int:
    """Open and lock a file; one that another process has just removed is opened anew."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise OutputError(f"{path}: is no file, where the journal of the result would be. Remove it.") from error
            raise disk_error(path, error) from error
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OutputError(f"{path}: is no file, where the journal of the result would be. Remove it.")
            _lock(file, path)
            if _is_foreign(file):
                raise OutputError(f"{path}: is no journal of peft_subspace, and has its name. Move it away.")
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.lstat(path)):
                    return file
        except BlockingIOError:
            os.close(file)
            raise OutputError(f"{path}: another process is writing this result. Wait for it, or end it.") from None
        except OSError as error:
            os.close(file)
            raise disk_error(path, error) from error
        except OutputError:
            os.close(file)
            raise
        os.close(file)


def _lock(file: int, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        warnings.warn(
            f"{path}: this file system has no locks. See to it that no other process writes the same result.", stacklevel=2
        )


def _is_foreign(file: int) -> bool:
    """Whether a file has anything but lines that a journal has."""
    start = os.pread(file, 4096, 0).lstrip(b"\n")
    return not any(start.startswith(known) or known.startswith(start) for known in _STARTS)


_STARTS = (b'{"made_by"', b'{"placing"')  # of the first line; it may have been cut off


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock for the block: a file that goes at its end. One that a killed process left is taken over.

    Args:
        path: of the lock.

    Raises:
        OutputError: another process holds it, or it cannot be made.
    """
    file = _locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(file)


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Let one process at a time write a file by `whole_file`. What killed ones left of it goes now.

    Args:
        path: of the file.

    Raises:
        OutputError: another process writes it.
    """
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with held(path.with_name(f".{path.name}.lock")):
        for old in path.absolute().parent.iterdir():
            if (begun := unfinished_name(old.name)) and begun == path.name[:NAMED]:
                old.unlink(missing_ok=True)
        yield


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@contextmanager
def scratch_folder(beside: Path, prefix: str) -> Iterator[Path]:
    """A folder for this process alone that goes at the end of the block. Those that killed processes left go now.

    Args:
        beside: where it is made.
        prefix: of its name.
    """
    for old in beside.glob(f"{prefix}*"):
        with suppress(OutputError, OSError):
            if not old.is_symlink() and (old / _LOCK).is_file():
                os.close(_locked(old / _LOCK))
                remove_scratch(old)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=beside))
    lock = _locked(folder / _LOCK)
    try:
        yield folder
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


_LOCK = "peft_subspace.lock"


def remove_scratch(folder: Path) -> None:
    """Remove a folder inside of an unfinished result with all that is in it."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
