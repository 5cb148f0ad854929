"""Files that appear when they are whole, and are on the disk when they have their names. Needs no torch."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

NAMED = 80  # characters of a file's name that are in that of its unfinished one; a name has 255 bytes at most


@contextmanager
def whole_file(path: str | os.PathLike[str], mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a new file that takes the place of `path` when the block ends, and vanishes if the block fails.

    It is written beside its final place under a name that nobody can foresee, so no link that somebody put there is
    followed. A link at `path` is itself replaced; what it leads to stays as it is.

    Args:
        path: of the file.
        mode: "wb" or "w".

    Raises:
        OSError: the file cannot be written, or `path` is a folder, a device, a pipe or a socket.
    """
    path = Path(path)
    _refuse_special(path)
    partial = path.with_name(f".{path.name[:NAMED]}-{secrets.token_hex(8)}")
    # O_EXCL follows no link, and 0o666 leaves the rights to the umask
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(descriptor)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def unfinished_name(name: str) -> str | None:
    """The beginning of the name that a file was to get, if this is the name of one that a kill left unfinished."""
    match = re.fullmatch(r"\.(.+)-[0-9a-f]{16}", name)
    return match and match[1]


def write_whole(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a small file by `whole_file`."""
    with whole_file(path, "wb" if isinstance(content, bytes) else "w") as file:
        file.write(content)


def _refuse_special(path: Path) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise OSError(errno.EEXIST, f"is {kind_of(mode)}, which is not replaced", os.fspath(path))


def kind_of(mode: int) -> str:
    """What a place is, by its `st_mode`, with an article."""
    return next((name for test, name in _KINDS if test(mode)), "something that is neither a file nor a folder")


_KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a link"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
