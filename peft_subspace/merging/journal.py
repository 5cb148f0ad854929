"""What of a merge is done, so that it can go on after any kind of end. Needs no torch.

Beside the folder `OUT.partial` lies `OUT.partial.journal`: one line of JSON that says which merge it is, then one line for each
tensor whose bytes are written, with their CRC. A line is one write to the end of the file; a line that was cut off counts for
nothing. On resuming, the bytes of each tensor are read again and compared, so it does not matter if the machine lost some.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from pathlib import Path
from typing import Any

from ..task_vectors.errors import OutputError
from ..task_vectors.places import disk_error


class Journal:
    """The journal of one running merge; it is locked against a second process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise OutputError(f"{path}: another process is writing this merge. Wait for it, or end it.") from None

    def read(self, identity: dict[str, str]) -> dict[str, int]:
        """The tensors that are done, name -> CRC; nothing if the merge never got far enough to say what it is.

        Raises:
            OutputError: the journal is of another merge; says what differs.
        """
        lines = [line for line in self._lines() if line is not None]
        if not lines or "identity" not in lines[0]:
            return {}
        found = lines[0]["identity"]
        changed = [key for key in identity if found.get(key) != identity[key]]
        if changed:
            differ = f"{', '.join(changed)} {'differ' if len(changed) > 1 else 'differs'}"
            raise OutputError(f"{self.path}: the merge to resume was another one: its {differ}. Start anew with --overwrite.")
        return {line["tensor"]: line["crc32"] for line in lines[1:] if "tensor" in line}

    def _lines(self) -> list[dict[str, Any] | None]:
        os.lseek(self._file, 0, os.SEEK_SET)
        with open(self._file, "rb", closefd=False) as file:
            return [_parse(line) for line in file.read().split(b"\n")]

    def start(self, identity: dict[str, str], done: dict[str, int]) -> None:
        """Write the journal anew: which merge it is, and what is known to be done."""
        os.ftruncate(self._file, 0)
        lines = [{"identity": identity}, *({"tensor": name, "crc32": crc} for name, crc in done.items())]
        self._append("".join(json.dumps(line) + "\n" for line in lines))

    def add(self, name: str, crc: int) -> None:
        """Note that a tensor is written."""
        self._append(json.dumps({"tensor": name, "crc32": crc}) + "\n")

    def _append(self, text: str) -> None:
        data = memoryview(text.encode())
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            raise disk_error(self.path, error) from error

    def close(self, remove: bool = False) -> None:
        """Let go of the lock, and take the file away if the merge is whole."""
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self._file)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def crc_of(file: int, offset: int, length: int, piece: int = 2**22) -> int | None:
    """CRC-32 of a range of an open file; None if the file is too short."""
    crc = 0
    for start in range(offset, offset + length, piece):
        data = os.pread(file, min(piece, offset + length - start), start)
        if len(data) < min(piece, offset + length - start):
            return None
        crc = zlib.crc32(data, crc)
    return crc
