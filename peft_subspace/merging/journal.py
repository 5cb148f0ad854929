"""What of a merge is done, so that it can go on after any kind of end. Needs no torch.

In the journal beside the folder `OUT.partial` stands which merge it is, then one line for each tensor whose bytes are written,
with their CRC. On resuming, the bytes of each tensor are read again and compared, so it does not matter if the machine lost
some.
"""

from __future__ import annotations

import os
import zlib

from ..task_vectors.errors import OutputError
from ..task_vectors.locks import Lines


class Journal:
    """The tensors that a merge has written."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def read(self, identity: dict[str, str]) -> dict[str, int]:
        """The tensors that are done, name -> CRC; nothing if the merge never got far enough to say what it is.

        Raises:
            OutputError: the journal is of another merge; says what differs.
        """
        found: dict[str, str] | None = None
        done: dict[str, int] = {}
        for line in self.lines.read():
            if isinstance(line.get("identity"), dict):
                found, done = line["identity"], {}
            elif isinstance(line.get("tensor"), str) and isinstance(line.get("crc32"), int):
                done[line["tensor"]] = line["crc32"]
        changed = [key for key in identity if found is not None and found.get(key) != identity[key]]
        if changed:
            differ = f"{' and '.join(changed)} {'differ' if len(changed) > 1 or changed[0].endswith('s') else 'differs'}"
            raise OutputError(
                f"{self.lines.path}: the merge to resume was another one: its {differ}. Start anew with --overwrite."
            )
        return done if found is not None else {}

    def start(self, identity: dict[str, str], done: dict[str, int]) -> None:
        """Say which merge it is, and what is known to be done."""
        self.lines.add({"identity": identity}, *({"tensor": name, "crc32": crc} for name, crc in done.items()))

    def add(self, name: str, crc: int) -> None:
        """Note that a tensor is written."""
        self.lines.add({"tensor": name, "crc32": crc})


def crc_of(file: int, offset: int, length: int, piece: int = 2**22) -> int | None:
    """CRC-32 of a range of an open file; None if the file is too short."""
    crc = 0
    for start in range(offset, offset + length, piece):
        data = os.pread(file, min(piece, offset + length - start), start)
        if len(data) < min(piece, offset + length - start):
            return None
        crc = zlib.crc32(data, crc)
    return crc
