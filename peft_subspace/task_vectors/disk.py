"""What the disk does not take, in words. Needs no torch."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from .errors import OutputError


def sync_folder(path: Path) -> None:
    """Put the names in a folder on the disk.

    Raises:
        OutputError: the disk does not take them.
    """
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        os.close(folder)


def disk_error(path: Path, error: OSError) -> OutputError:
    """What went wrong with a file that is written, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{path}: the disk is full. Free some space, then go on with --resume.")
    if error.errno == errno.EFBIG:
        return OutputError(f"{path}: the system allows no file of this size (ulimit -f). Set a smaller --shard-size.")
    return OutputError(f"{path}: cannot be written: {error.strerror or error}.")
