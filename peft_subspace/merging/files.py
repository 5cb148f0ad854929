"""The files of a result while they are written: each tensor at its place, hashed from the front as they grow."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from ..task_vectors.disk import disk_error
from ..task_vectors.errors import OutputError
from .layout import Layout, Shard

PIECE = 2**22


class OutputFiles:
    """Open files of the weights, each of its final size from the start."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout
        self._shards = {shard.name: _Growing(folder / shard.name, shard) for shard in layout.shards}

    def place(self, name: str) -> tuple[int, int]:
        """The open file of a tensor, and its offset there."""
        file, offset = self.layout.places[name]
        return self._shards[file].file, offset

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write bytes of a tensor, `offset` bytes after its first.

        Raises:
            OutputError: no space, or the file cannot be written.
        """
        file, start = self.layout.places[name]
        view = memoryview(data).cast("B")
        try:
            _write_all(self._shards[file].file, view, start + offset)
        except OSError as error:
            raise disk_error(self.folder / file, error) from error
        self._shards[file].written(start + offset, view)

    def finished(self, name: str) -> None:
        """A tensor is whole: hash what is whole from the file's beginning."""
        file, _ = self.layout.places[name]
        self._shards[file].finished(name)

    def close(self) -> dict[str, str]:
        """Put everything on the disk; the SHA-256 of every file."""
        digests = {}
        for name, shard in self._shards.items():
            digests[name] = shard.close()
        return digests

    def abandon(self) -> None:
        """Close the files as they are."""
        for shard in self._shards.values():
            os.close(shard.file)


def _write_all(file: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):  # the system may take a part, as it does where the disk ends
        done += os.pwrite(file, data[done:], offset + done)


class _Growing:
    """One file, and the hash of its beginning."""

    def __init__(self, path: Path, shard: Shard) -> None:
        self.path, self.shard = path, shard
        names = list(shard.offsets)
        self._ends = dict(zip(names, [*(shard.offsets[name] for name in names[1:]), shard.size], strict=True))
        self._pending = names[::-1]  # from the front of the file, last first
        self._whole: set[str] = set()
        self._lock, self._hash_lock = threading.Lock(), threading.Lock()
        self._digest, self._hashed = hashlib.sha256(), 0
        try:
            self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise disk_error(path, error) from error
        try:
            os.ftruncate(self.file, shard.size)  # not fallocate: its blocks make each first write ten times dearer on ext4
            _write_all(self.file, memoryview(shard.header), 0)
            self.written(0, memoryview(shard.header))
        except OSError as error:
            os.close(self.file)
            raise disk_error(path, error) from error

    def written(self, offset: int, data: memoryview) -> None:
        """Hash what is written right behind what is hashed: it need not be read again."""
        if self._hash_lock.acquire(blocking=False):
            try:
                if offset == self._hashed:
                    self._digest.update(data)
                    self._hashed += len(data)
            finally:
                self._hash_lock.release()

    def finished(self, name: str) -> None:
        with self._lock:
            self._whole.add(name)
        while self._hash_lock.acquire(blocking=False):  # one thread hashes; the others go on with their tensors
            try:
                end = self._hashed
                with self._lock:
                    while self._pending and self._pending[-1] in self._whole:
                        end = self._ends[self._pending.pop()]
                if end <= self._hashed:
                    return
                self._hash(end)
            finally:
                self._hash_lock.release()

    def _hash(self, end: int) -> None:
        while self._hashed < end:
            data = os.pread(self.file, min(PIECE, end - self._hashed), self._hashed)
            if not data:
                raise OutputError(f"{self.path}: became shorter while it was written.")
            self._digest.update(data)
            self._hashed += len(data)

    def close(self) -> str:
        with self._hash_lock:
            self._hash(self.shard.size)
        try:
            os.fsync(self.file)
            if not os.path.samestat(os.fstat(self.file), os.lstat(self.path)):
                raise OutputError(f"{self.path}: was replaced while it was written. Start anew.")
        except FileNotFoundError:
            raise OutputError(f"{self.path}: was removed while it was written. Start anew.") from None
        except OSError as error:
            raise disk_error(self.path, error) from error
        finally:
            os.close(self.file)
        return self._digest.hexdigest()


def write_new(path: Path, content: bytes) -> None:
    """Write a small file of an unfinished result and put it on the disk; one of an earlier attempt goes first."""
    try:
        path.unlink(missing_ok=True)  # a link would be followed otherwise
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(path, error) from error
