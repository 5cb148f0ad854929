"""Where results go: never in the place of what they are made from, and by one rename. Needs no torch."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

from .errors import OutputError
from .references import Reference
from .sources import ADAPTER_CONFIG, Checkpoint


def keep_inputs(out: Path, parts: Iterable[Checkpoint]) -> None:
    """A folder that is written must not take the place of a model that it is made from, nor lie inside of one."""
    for part in parts:
        _keep(out, part.name, part.path)


def keep_named(out: Path, references: Iterable[Reference]) -> None:
    """The same for models that are named and not opened; names that are no places here cannot be replaced."""
    for reference in references:
        for name in (reference.model, reference.lora):
            if name is not None and os.path.exists(os.path.expanduser(name)):
                _keep(out, name, Path(name).expanduser())


def _keep(out: Path, name: str, path: Path) -> None:
    place, folder = Path(os.path.realpath(out)), Path(os.path.realpath(path))
    if folder == place or place in folder.parents or folder in place.parents:
        raise OutputError(f"{out}: is, holds or lies in the model {name}. Choose another folder.")


def check_adapter_place(out: Path, overwrite: bool) -> None:
    """Check that an adapter may be written to a folder: what is replaced must be an adapter itself.

    Raises:
        OutputError: something is there, and `overwrite` does not allow to replace it, or it is no adapter.
    """
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise OutputError(f"{out}: is there already. Choose another folder, or pass --overwrite.")
    if not (out / ADAPTER_CONFIG).is_file():
        raise OutputError(
            f"{out}: --overwrite replaces adapters, and it is none: it has no {ADAPTER_CONFIG}. Choose another folder."
        )


def put_in_place(made: Path, out: Path, overwrite: bool) -> None:
    """Rename a finished folder to its final name; what is there goes only when it may, and only then.

    Raises:
        OutputError: something is there, or the folder cannot be renamed.
    """
    try:
        if out.exists() and overwrite and any(out.iterdir() if out.is_dir() else [out]):
            _replace(made, out)
        else:
            if out.exists():
                out.rmdir()
            os.rename(made, out)
        sync_folder(out.absolute().parent)
    except OSError as error:
        raise OutputError(f"{out}: cannot be put in place of {made}: {error.strerror or error}.") from error


def _replace(made: Path, out: Path) -> None:
    """Put what is there aside, under a name that nobody has; it comes back if the new folder cannot take its place.

    A kill between the two renames leaves it there, in OUT.replaced-...
    """
    aside = Path(tempfile.mkdtemp(prefix=f"{out.name}.replaced-", dir=out.absolute().parent))
    try:
        os.rename(out, aside / out.name)
        os.rename(made, out)
    except BaseException:
        if os.path.lexists(aside / out.name):
            os.rename(aside / out.name, out)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
    if aside.exists():
        warnings.warn(f"{aside}: what {out} was before could not be removed. Remove it.", stacklevel=3)


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
