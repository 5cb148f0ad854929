"""Where results go, and what may be replaced there: only what this package wrote. Needs no torch.

Every folder that this package writes says which files in it are its own, with their sizes and hashes: a merged one in its
manifest, any other in `peft_subspace.json`. A file that is not named there, or has changed since, is somebody else's, and a
folder that has one is not replaced.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from .._version import __version__
from ..whole_files import kind_of, write_whole
from .errors import OutputError
from .references import Reference
from .sources import Checkpoint, sha256_of, shortened

MANIFEST, RECORD = "merge_manifest.json", "peft_subspace.json"
HASHED = 64 * 2**20  # bytes; a file above is known by its size alone when it is replaced


# What may be replaced ----------------------------------------------------------------------------------------------------


def check_place(
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    parts: Iterable[Checkpoint] = (),
    references: Iterable[Reference] = (),
    recipe: Path | None = None,
) -> Path:
    """Decide whether a folder may be made at `out`. Every command and function that writes a folder asks here first.

    Args:
        out: the folder to make. A link to a folder stands for that folder.
        overwrite: replace a result of this package.
        parts: models that the result is made from.
        references: models by name, which are not opened; a name that is no place here cannot be replaced.
        recipe: the file of the recipe.

    Returns:
        Where the folder is really made.

    Raises:
        OutputError: `out` is no folder, or a folder that must stay, or holds something that this package did not write. It
            is, holds or lies in a model, or it is or holds the folder of the recipe. It is a result of this package, and
            `overwrite` is False.
    """
    out = Path(out)
    place = real_place(out)
    keep_inputs(out, parts, references)
    if recipe is not None and os.path.exists(recipe):
        folder, real = Path(os.path.realpath(recipe)).parent, Path(os.path.realpath(place))
        if real == folder or real in folder.parents:
            raise OutputError(f"{out}: is or holds the folder of the recipe {recipe}. Choose another folder.")
    if not place.exists():
        _check_parent(out, place)
        return place
    _refuse_lasting(out, place)
    others = foreign_files(place)
    if others:
        raise OutputError(
            f"{out}: already exists and holds {shortened(others)}, which peft_subspace did not write or which has changed "
            f"since. Nothing of others is ever replaced. Choose another folder, or move these files away."
        )
    if any(place.iterdir()) and not overwrite:
        raise OutputError(
            f"{out}: already exists ({_made(place)}). Choose another folder, or pass --overwrite (overwrite=True) to replace "
            f"it."
        )
    _check_parent(out, place)
    return place


def describe_place(out: str | os.PathLike[str], place: Path) -> str:
    """What stands at a place that `check_place` has let through with `overwrite`, and what becomes of it."""
    where = f"{out}, a link to {place}" if os.path.islink(out) else str(out)
    if not place.exists():
        return f"{where}: does not exist and will be made"
    if not any(place.iterdir()):
        return f"{where}: an empty folder, which will be filled"
    return f"{where}: {_made(place)}, which will be replaced"


def real_place(out: Path) -> Path:
    """`out` itself, or the folder that it is a link to.

    Raises:
        OutputError: it is no name for a folder, or something else than a folder has this name.
    """
    if out.name in ("", ".."):
        raise OutputError(f"{str(out)!r} is not a name for a new folder.")
    place = Path(os.path.realpath(out)) if out.is_symlink() else out
    try:
        mode = os.lstat(place).st_mode
    except FileNotFoundError:
        if out.is_symlink():
            raise OutputError(
                f"{out}: is a link to {place}, which does not exist. Make that folder, or remove the link."
            ) from None
        return place
    except NotADirectoryError:
        above = next(parent for parent in place.parents if parent.exists())
        raise OutputError(f"{out}: cannot be made, as {above} is {kind_of(os.lstat(above).st_mode)}.") from None
    except OSError as error:  # a name that is too long, a circle of links
        raise OutputError(f"{out}: is not a name for a new folder: {error.strerror}.") from error
    if not stat.S_ISDIR(mode):
        through = f" a link to {place}," if out.is_symlink() else ""
        raise OutputError(f"{out}: is{through} {kind_of(mode)}. Choose another name for the folder to make.")
    return place


def _refuse_lasting(out: Path, place: Path) -> None:
    """Some folders must stay, even if they are empty."""
    lasting = {Path("/"): "the root of the file system"}
    with suppress(FileNotFoundError):  # somebody has removed it
        lasting[Path(os.path.realpath(os.getcwd()))] = "the current folder"
    home = os.path.realpath(os.path.expanduser("~"))
    if os.path.isabs(home):
        lasting[Path(home)] = "the home folder"
    real = Path(os.path.realpath(place))
    for folder, name in lasting.items():
        if real == folder or real in folder.parents:
            raise OutputError(f"{out}: is or holds {name}. Choose another folder.")
    if os.path.ismount(place):
        raise OutputError(f"{out}: another file system is mounted there. Choose a folder in it, such as {out / 'result'}.")


def _check_parent(out: Path, place: Path) -> None:
    """See that the result, and its unfinished folder beside it, can be made."""
    parent = place.absolute().parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"{out}: cannot be made, as {parent} is a file.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{out}: cannot be made: there is no right to write in {parent}.")


def keep_inputs(out: Path, parts: Iterable[Checkpoint], references: Iterable[Reference] = ()) -> None:
    """What is written must not take the place of a model that it is made from, nor lie inside of one.

    Raises:
        OutputError: it does.
    """
    for part in parts:
        _keep(out, part.name, part.path)
    for reference in references:
        for name in (reference.model, reference.lora):
            if name is not None and os.path.exists(os.path.expanduser(name)):
                _keep(out, name, Path(name).expanduser())


def _keep(out: Path, name: str, path: Path) -> None:
    place, folder = Path(os.path.realpath(out)), Path(os.path.realpath(path))
    if folder == place or place in folder.parents or folder in place.parents:
        raise OutputError(f"{out}: is, holds or lies in the model {name}. Choose another folder.")


def check_file(path: str | os.PathLike[str], overwrite: bool, parts: Iterable[Checkpoint] = ()) -> Path:
    """Decide whether a task-vector file may be written at `path`.

    Returns:
        Where the file is really written; a link to a task-vector file stands for that file.

    Raises:
        OutputError: something stands there that is no task-vector file of this package, or one does and `overwrite` is
            False; the path is, holds or lies in a model.
    """
    from .headers import read_header
    from .sources import FORMAT_KEY, TASK_VECTOR

    path = Path(path)
    place = Path(os.path.realpath(path))
    keep_inputs(path, parts)
    if not os.path.lexists(place):
        if path.is_symlink():
            raise OutputError(f"{path}: is a link to {place}, which does not exist. Remove the link.")
        _check_parent(path, place)
        return place
    mode = os.lstat(place).st_mode
    try:
        ours = stat.S_ISREG(mode) and read_header(place).metadata.get(FORMAT_KEY) == TASK_VECTOR
    except (ValueError, OSError):
        ours = False
    if not ours:
        raise OutputError(f"{path}: is {kind_of(mode)}, and no task-vector file that could be replaced. Choose another name.")
    if not overwrite:
        raise OutputError(f"{path}: already exists. Choose another name, or pass --overwrite.")
    return place


# What was written --------------------------------------------------------------------------------------------------------


def written_files(folder: Path) -> dict[str, Mapping[str, Any]] | None:
    """The files that this package wrote into a folder: name, with / between folders -> bytes, sha256. None: it wrote none."""
    for name in (MANIFEST, RECORD):
        with suppress(OSError):
            if stat.S_ISREG(os.lstat(folder / name).st_mode) and (found := recorded_files(folder / name)) is not None:
                return found
    return None


def recorded_files(record: Path) -> dict[str, Mapping[str, Any]] | None:
    """The files that a record names, itself included: name -> bytes and sha256; None if it is none."""
    try:
        found = {**json.loads(record.read_bytes())["outputs"], record.name: {}}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if all(_is_plain(name) and isinstance(entry, dict) for name, entry in found.items()) else None


def _is_plain(name: Any) -> bool:
    """Whether a name leads to a file in the folder and nowhere else."""
    return isinstance(name, str) and name != "" and not PurePosixPath(name).is_absolute() and ".." not in name.split("/")


def foreign_files(folder: Path) -> list[str]:
    """What in a folder is not, or not any more, as this package wrote it."""
    ours = written_files(folder)
    if ours is None:  # perhaps a disk of a million files: its names are enough
        return sorted(f"{path.name}/" if path.is_dir() and not path.is_symlink() else path.name for path in folder.iterdir())
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        mode = os.lstat(path).st_mode
        if stat.S_ISDIR(mode):
            if not any(other.startswith(f"{name}/") for other in ours):
                found.append(f"{name}/")
        elif name not in ours or not stat.S_ISREG(mode) or not _is_unchanged(path, ours[name]):
            found.append(name)
    shown = {name for name in found if name.endswith("/")}  # a folder stands for all that it holds
    return [name for name in found if not any(name != one and name.startswith(one) for one in shown)]


def _is_unchanged(path: Path, entry: Mapping[str, Any]) -> bool:
    if not entry:  # the record itself
        return True
    size = path.stat().st_size
    return size == entry.get("bytes") and (size > HASHED or sha256_of(path) == entry.get("sha256"))


def write_record(folder: Path, made_by: str) -> None:
    """Note in a finished folder which files are its own."""
    outputs = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    table = {"format": 1, "made_by": made_by, "peft_subspace": __version__, "outputs": outputs}
    write_whole(folder / RECORD, json.dumps(table, indent=2, ensure_ascii=False) + "\n")


def _made(folder: Path) -> str:
    """By which command a folder was made."""
    count = len(written_files(folder) or ())
    if (folder / MANIFEST).is_file():
        return f"a result of `peft-subspace merge` with {count} files"
    try:
        return f"a result of {json.loads((folder / RECORD).read_bytes())['made_by']} with {count} files"
    except (OSError, ValueError, KeyError, TypeError):
        return f"a result of peft_subspace with {count} files"


def remove_written(folder: Path) -> list[str]:
    """Remove the files that this package wrote into a folder, and the folder if it is empty then; what is left."""
    others = set(foreign_files(folder))
    names = [name for name in written_files(folder) or {} if name not in others]
    return remove_files(folder, sorted(names, key=lambda name: name in (MANIFEST, RECORD)))  # the record goes last


def remove_files(folder: Path, names: Iterable[str]) -> list[str]:
    """Remove files of these names from a folder, and all folders that are empty then; what is left."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for inner in sorted((path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True):
        if not any(inner.iterdir()):
            inner.rmdir()
    left = sorted(os.listdir(folder))
    if not left:
        folder.rmdir()
    return left
