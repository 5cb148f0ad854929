"""Headers of safetensors files, checked before a single value is read. Needs no torch.

A file is 8 bytes (little endian: the length of the header), the header (JSON: name -> dtype, shape, [start, end) in what
follows), and the values. The library's own reader maps the file into memory and hands out whole tensors; the engine
reads any range of any tensor, and has to know where it is before torch is imported.

Values are read long after the header, and a file may be replaced or written in between. So a header keeps a stamp of its file,
and whoever reads values opens the file by `opened`, which compares it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError

MAX_HEADER = 100 * 2**20  # as in the safetensors library: a longer one is an attack or not a safetensors file
# Bytes of one value. Types below eight bits have no fixed size and hold quantised weights, which nobody can average.
ITEM_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
FLOAT_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}  # name in torch -> in a file
FLOATS = frozenset(FLOAT_DTYPES.values())

Stamp = tuple[int, int, int]  # inode, size, time of the last change in nanoseconds


class _Stamped:
    """A pickle may be read on another machine, where a stamp means nothing, so it stays behind."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stamp": None}


@dataclass(frozen=True)
class TensorHeader(_Stamped):
    """Where a tensor lies.

    Attributes:
        name: its name in the file.
        dtype: as the format spells it, such as "BF16".
        shape: its shape, `()` for a scalar.
        path: the file.
        offset: of the first byte, counted from the start of the file.
        stamp: of the file when the header was read; None is not compared.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    stamp: Stamp | None = field(default=None, compare=False, repr=False)

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.count * ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class FileHeader(_Stamped):
    """What a safetensors file says about itself: `tensors` in the order of their bytes, `metadata`, its size and its stamp."""

    path: Path
    tensors: dict[str, TensorHeader]
    metadata: dict[str, str]
    size: int
    stamp: Stamp | None = field(default=None, compare=False, repr=False)


def read_header(path: str | os.PathLike[str]) -> FileHeader:
    """Read and check the header of a safetensors file; the values are not touched.

    Raises:
        InputError: the file is cut short, or its header lies: too long, no JSON, a name twice, an unknown dtype, offsets that
            overlap, leave holes, lie outside of the file or do not fit the shape. Names the file and the tensor.
    """
    path = Path(path)
    refuse_pointer(path)
    try:
        with open(path, "rb") as file:
            stamp = stamp_of(file.fileno())
            _, size, _ = stamp
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise _damaged(path, f"its header should have {length:,} bytes, and the file has {size:,}")
            raw = file.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read: {error}") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is not a table")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its __metadata__ is not a table of texts")
    found = sorted((_tensor(path, name, entry, 8 + length, stamp) for name, entry in entries.items()), key=_position)
    end = 8 + length
    for tensor in found:  # every byte belongs to exactly one tensor, as the library demands too
        if tensor.offset != end:
            raise _damaged(
                path, f"tensor {tensor.name!r} starts at byte {tensor.offset:,}, where the one before ends at {end:,}"
            )
        end += tensor.nbytes
    if end != size:
        raise _damaged(path, f"its tensors end at byte {end:,}, and the file has {size:,}")
    return FileHeader(path, {tensor.name: tensor for tensor in found}, metadata, size, stamp)


def stamp_of(file: int) -> Stamp:
    """What an open file is known by: one that is put in its place by a rename, or written into, has another stamp."""
    found = os.fstat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def opened(header: TensorHeader | FileHeader) -> Iterator[int]:
    """Open the file that a header was read from, for its values.

    The path is opened anew each time, so that a model of hundreds of files keeps none of them open. The stamp is compared
    before the block and after it, so no value of another file, or of one that is being written, goes unnoticed.

    Raises:
        InputError: the file was replaced or changed after its header was read.
        OSError: it cannot be opened.
    """
    file = os.open(header.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check_unchanged(header, file)
        yield file
        _check_unchanged(header, file)
    finally:
        os.close(file)


def _check_unchanged(header: TensorHeader | FileHeader, file: int) -> None:
    found = stamp_of(file)
    if header.stamp is None or found == header.stamp:
        return
    what = "became shorter" if found[1] < header.stamp[1] else "was replaced or changed"
    at = f", at tensor {header.name!r}" if isinstance(header, TensorHeader) else ""
    raise InputError(
        f"{header.path}: {what} while it was read{at}. Start again when the file is whole; what was opened before has to be "
        f"opened anew."
    )


_POINTER = b"version https://git-lfs"


def refuse_pointer(path: Path) -> None:
    """Raise an InputError for a file that stands for another one, which git-lfs has not fetched. A missing file is none."""
    try:
        with open(path, "rb") as file:
            found = file.read(200)
    except OSError:
        return
    if found.startswith(_POINTER):
        size = re.search(rb"^size (\d+)$", found, re.MULTILINE)
        whole = f" of {int(size[1]):,} bytes" if size else ""
        raise InputError(
            f"{path} is a git-lfs pointer, which stands for a file{whole} that was not fetched. Run `git lfs pull` in its "
            f"folder, or download the model from the Hub (`hf download`)."
        )


def _position(tensor: TensorHeader) -> tuple[int, int]:
    return tensor.offset, tensor.nbytes  # tensors without values come before the one that starts at the same byte


def _tensor(path: Path, name: str, entry: Any, start: int, stamp: Stamp) -> TensorHeader:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise _damaged(path, f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise InputError(
            f"{path}: tensor {name!r} has the dtype {dtype!r}, which is not supported. Accepted: {', '.join(ITEM_SIZES)}. "
            f"Packed weights of fewer than eight bits have to be dequantised first."
        )
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise _damaged(path, f"tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}")
    if math.prod(shape) * ITEM_SIZES[dtype] != offsets[1] - offsets[0]:
        raise _damaged(path, f"tensor {name!r} of shape {shape} and dtype {dtype} does not fit its data_offsets {offsets}")
    return TensorHeader(name, dtype, tuple(shape), path, start + offsets[0], stamp)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return table


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path} is not a whole safetensors file: {what}. Download or save it again.")


def encode_header(entries: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file, and where each tensor will lie.

    Args:
        entries: name -> (dtype, shape), in the order of the values.
        metadata: texts.

    Returns:
        The length and the header, padded to a multiple of 8 so that the values are aligned, and name -> offset in the file.
    """
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    starts, end = {}, 0
    for name, (dtype, shape) in entries.items():
        starts[name], size = end, math.prod(shape) * ITEM_SIZES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + start for name, start in starts.items()}
