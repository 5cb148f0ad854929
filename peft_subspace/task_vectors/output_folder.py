"""A folder that is filled beside its final place, by one process at a time, and takes that place in one step.

    OUT.partial            the unfinished folder
    OUT.partial.journal    whose it is and which files it holds: the lock while a process works on it

A process that is killed leaves both. The next one finds out from the journal how far it came: it clears away what is named
there, and nothing else, or goes on with it. Needs no torch.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..whole_files import kind_of, unfinished_name
from .disk import disk_error, sync_folder
from .errors import OutputError
from .locks import Lines
from .places import (
    check_place,
    real_place,
    remove_files,
    remove_written,
    write_record,
    written_files,
)
from .sources import shortened


def partial_path(out: Path) -> Path:
    """Where a result is while it is not whole."""
    return _beside(out, ".partial")


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


class OutputFolder:
    """The unfinished folder of a result, locked against other processes.

    Attributes:
        out: the result's final place, with links followed.
        folder: OUT.partial, where it is written.
        journal: the lines that survive a kill.
    """

    def __init__(self, out: Path, made_by: str, *, overwrite: bool = False) -> None:
        """Take the lock and put right what a killed process left.

        Args:
            out: the folder to make.
            made_by: the command, in one word.
            overwrite: as `check_place` has it.

        Raises:
            OutputError: another process writes this result, or the place cannot be used.
        """
        self.out, self.made_by, self.overwrite = real_place(out), made_by, overwrite
        self.folder = partial_path(self.out)
        self._is_ours = False  # until this run makes the folder or goes on with it; a refusal leaves it to whoever began it
        try:
            self.out.absolute().parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(self.out.parent, error) from error
        self.journal = Lines(_beside(self.folder, ".journal"))
        try:
            self._recover()
        except BaseException:
            self.leave()
            raise

    def is_begun(self) -> bool:
        """Whether an unfinished folder is there.

        Raises:
            OutputError: something else has its name.
        """
        try:
            mode = os.lstat(self.folder).st_mode
        except FileNotFoundError:
            return False
        if not stat.S_ISDIR(mode):
            raise OutputError(f"{self.folder}: is {kind_of(mode)}, where the unfinished result would be. Remove it.")
        return True

    def begin(self, files: Collection[str], *, keep: bool = False) -> Path:
        """Make the folder.

        Args:
            files: names of all files that will be written into it; a name that ends in / is a folder of them.
            keep: go on with what is there.

        Raises:
            OutputError: the folder holds a file that no earlier run has named.
        """
        if self.is_begun():
            self.refuse_others()
            if not keep:
                self.clear()
        if not self.is_begun():
            self.journal.add({"made_by": self.made_by, "files": sorted(files)})
            try:
                self.folder.mkdir()
            except OSError as error:
                raise disk_error(self.folder, error) from error
        self._is_ours = True
        return self.folder

    def clear(self) -> None:
        """Remove the unfinished folder with all files that its journal names; another file stays, and the folder with it."""
        if self.is_begun():
            ours, _ = self._inside()
            remove_files(self.folder, ours)

    def _inside(self) -> tuple[list[str], list[str]]:
        """Names of the files in the unfinished folder: those that the journal has, and others."""
        named = {name for line in self.journal.read() for name in line.get("files", ())}
        inside = [path.relative_to(self.folder).as_posix() for path in sorted(self.folder.rglob("*")) if not _is_folder(path)]
        ours = [name for name in inside if _is_named(name, named)]
        return ours, [name for name in inside if name not in ours]

    def refuse_others(self) -> None:
        """Raise an OutputError if the unfinished folder holds a file that its journal does not name."""
        _, others = self._inside()
        if others:
            raise OutputError(
                f"{self.folder}: holds {shortened(others)}, which is no part of an unfinished result of peft_subspace. Move "
                f"the folder away."
            )

    def made_by_another(self) -> str | None:
        """The command that left the unfinished folder, if it is not this one."""
        names = [line["made_by"] for line in self.journal.read() if isinstance(line.get("made_by"), str)]
        return names[-1] if names and names[-1] != self.made_by else None

    def place(self) -> None:
        """Give the folder its final name. What stood there is exchanged in the same step, and only then removed.

        Raises:
            OutputError: a file that the folder should have is missing; something else has taken the place meanwhile.
        """
        self._check_whole()
        try:
            found = os.stat(self.folder)
            self.journal.add({"placing": [found.st_dev, found.st_ino]})
            if self.out.exists() and any(self.out.iterdir()):
                check_place(self.out, overwrite=self.overwrite)
                exchange(self.folder, self.out)
            else:
                os.rename(self.folder, self.out)  # takes the place of an empty folder, too
            sync_folder(self.out.absolute().parent)
        except OSError as error:
            raise OutputError(f"{self.out}: cannot be put in place of {self.folder}: {error.strerror or error}.") from error
        self._remove_old()
        self.journal.close(remove=True)

    def _check_whole(self) -> None:
        named = written_files(self.folder)
        lost = ["its record"] if named is None else [name for name in named if not (self.folder / name).is_file()]
        if lost:
            raise OutputError(f"{self.folder}: lacks {shortened(lost)}. Somebody removed it while it was written. Start anew.")

    def discard(self) -> None:
        """Give up: nothing is left of what this run has written."""
        if self._is_ours:
            with suppress(OutputError, OSError):
                self.clear()
        self.leave()

    def leave(self) -> None:
        """Stop here, so that a later run can go on."""
        self.journal.close(remove=not self.folder.exists() or not self.journal.read())

    def _recover(self) -> None:
        """End a replacement that was killed in the middle: its journal knows which folder is the new one."""
        placing = [line["placing"] for line in self.journal.read() if "placing" in line]
        if not placing:
            return
        old = _beside(self.folder, ".old")
        if not os.path.lexists(self.out) and old.is_dir() and self.is_begun():
            os.rename(old, self.out)  # killed between the two renames of `_exchange_in_two`
        if self.out.exists() and _identity(self.out) in placing:
            self._remove_old()
            self.journal.restart()

    def _remove_old(self) -> None:
        for old in (self.folder, _beside(self.folder, ".old")):
            if not _is_folder(old):
                continue
            if written_files(old) is not None or not any(old.iterdir()):
                left = remove_written(old)
                if left:
                    raise OutputError(
                        f"{old}: holds {shortened(left)}, which came into the old result while it was replaced. The new "
                        f"result is in {self.out}."
                    )


@contextmanager
def new_folder(out: str | os.PathLike[str], made_by: str, files: Collection[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill that takes its final place when the block ends, and vanishes if the block fails.

    Args:
        out: the final place, which `check_place` has let through.
        made_by: the command, in one word.
        files: names of all files that are written; a name that ends in / is a folder of them.
        overwrite: replace a result of this package.

    Raises:
        OutputError: another process writes this result; it cannot be written, or put in its place.
    """
    output = OutputFolder(Path(out), made_by, overwrite=overwrite)
    try:
        check_place(out, overwrite=overwrite)  # once more: another process may just have ended
        if output.is_begun() and (other := output.made_by_another()) and not overwrite:
            raise OutputError(
                f"{output.folder}: an unfinished result of `{other}` is there. Choose another folder, or pass --overwrite."
            )
        folder = output.begin(files)
        yield folder
        if written_files(folder) is None:
            write_record(folder, made_by)
        sync_folder(folder)
        output.place()
    except OSError as error:
        output.discard()
        raise disk_error(output.folder, error) from error
    except BaseException:
        output.discard()
        raise


def settle(out: str | os.PathLike[str]) -> None:
    """End a replacement that was killed in the middle, and hear of another process that writes the same result.

    Raises:
        OutputError: another process writes it.
    """
    place = real_place(Path(out))
    if os.path.lexists(_beside(partial_path(place), ".journal")):
        OutputFolder(place, "settle").leave()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_named(name: str, named: Collection[str]) -> bool:
    folder, slash, last = name.rpartition("/")
    begun = unfinished_name(last)
    return (
        name in named
        or any(one.endswith("/") and name.startswith(one) for one in named)
        or (begun is not None and any(one.startswith(f"{folder}{slash}{begun}") for one in named))
    )


def _identity(path: Path) -> list[int]:
    found = os.stat(path)
    return [found.st_dev, found.st_ino]


# Exchanging two folders --------------------------------------------------------------------------------------------------


def exchange(new: Path, old: Path) -> None:
    """Let two folders swap their names in one step, so that a kill at any time leaves one of them at `old`.

    Where the system has no such call (it is Linux's renameat2 and not on every file system), there are two renames; a kill
    between them is put right by the next run.

    Raises:
        OSError: the system refuses.
    """
    if not _exchange_at_once(new, old):
        _exchange_in_two(new, old)


def _exchange_at_once(new: Path, old: Path) -> bool:
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if call(here, os.fsencode(new), here, os.fsencode(old), swap) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), os.fspath(old))


def _exchange_in_two(new: Path, old: Path) -> None:
    aside = _beside(new, ".old")
    if os.path.lexists(aside):
        raise OutputError(f"{aside}: has the name that the old result would get for a moment. Move it away.")
    try:
        os.rename(old, aside)
        os.rename(new, old)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(old):
            os.rename(aside, old)
        raise
