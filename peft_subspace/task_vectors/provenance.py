"""What task vectors are known by: hashes of their files and of what scales them, wherever they lie."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from .adapter_fields import changing
from .errors import InputError
from .headers import FLOAT_DTYPES, ITEM_SIZES, FileHeader, TensorHeader, opened
from .models import Source
from .sources import Checkpoint

WHOLE, PART = 2**16, 2**12  # bytes


def record_of(name: str, source: Source, base: Source | None) -> dict[str, Any]:
    record = {"name": name, "reference": str(source.reference), "parts": [part_record(part) for part in source.checkpoints]}
    if base is not None:
        record |= {"base": str(base.reference), "base_parts": [part_record(part) for part in base.checkpoints]}
    return record


def part_record(part: Checkpoint) -> dict[str, Any]:
    """Kind, commit and fingerprints of the files of one part of a source, and fields that an adapter's update depends on."""
    found: dict[str, Any] = {"kind": part.kind, "commit": part.commit}
    found["files"] = [tensor_fingerprint(header) for header in sorted(part.files, key=lambda file: file.path.name)]
    if part.kind == "adapter":
        found["scales"] = changing(part.config)
    return found


def tensor_fingerprint(header: FileHeader) -> dict[str, Any]:
    """A file's size, and the SHA-256 of its header and of every tensor: small ones whole, of others three parts of 4 KiB.

    Looking into every tensor tells models apart of which only biases or norms, or a single layer, were trained. Two that differ
    in a few rows of a large tensor alone may look the same.

    Raises:
        InputError: the file is another one than when its header was read.
    """
    with opened(header) as number, open(number, "rb", closefd=False) as file:
        start = min((tensor.offset for tensor in header.tensors.values()), default=header.size)
        found = hashlib.sha256(file.read(start))
        for tensor in sorted(header.tensors.values(), key=lambda one: one.offset):
            places = [0] if tensor.nbytes <= WHOLE else [0, tensor.nbytes // 2, tensor.nbytes - PART]
            for place in places:
                file.seek(tensor.offset + place)
                found.update(file.read(tensor.nbytes if tensor.nbytes <= WHOLE else PART))
    return {"bytes": header.size, "tensors_sha256": found.hexdigest()}


def identity(record: Mapping[str, Any]) -> list[Any]:
    """What of a record must be the same for the same values: sizes and hashes, not places, commits or names."""
    parts = [*record.get("parts", []), *record.get("base_parts", [])]
    return [{key: part.get(key) for key in ("kind", "files", "scales")} for part in parts]


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_records(expected: Sequence[Mapping[str, Any]], entries: Sequence[Any]) -> None:
    """Compare the vectors that coefficients were learned with and those that are there now; where they lie may differ.

    Raises:
        InputError: names the vector whose values are others.
    """
    found = {entry.name: entry for entry in entries}
    for record in expected:
        entry = found.get(str(record["name"]))
        if entry is None:
            raise InputError(f"the pool has no task vector {record['name']!r}, for which there are coefficients.")
        if digest(identity(record)) != entry.digest:
            raise InputError(
                f"the task vector {entry.name!r} at {entry.record['reference']} is not the one that the coefficients were "
                f"learned with ({record['reference']}): its files have other sizes or hashes. Give the place of the right one: "
                f"config.pool[{entry.name!r}] = PLACE; PeftModel.from_pretrained(model, adapter, config=config)."
            )


# Values of a base --------------------------------------------------------------------------------------------------------

EPSILON = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
}  # spacing of values at 1; 0.25 below 16 bits
TINY = 2.0**-14  # smallest normal number of float16


def value_of(header: TensorHeader) -> tuple[float, str]:
    """The value in the middle of a tensor in a file, and its dtype as torch calls it; needs no torch.

    Raises:
        InputError: the tensor is no float, or the file is another one than when its header was read.
    """
    dtype = next((name for name, code in FLOAT_DTYPES.items() if code == header.dtype), None)
    if dtype is None:
        raise InputError(f"{header.path}: {header.name!r} is {header.dtype}, and coefficients belong to a base of floats.")
    size = ITEM_SIZES[header.dtype]
    with opened(header) as file:
        raw = os.pread(file, size, header.offset + header.count // 2 * size)
    if dtype == "bfloat16":  # the upper half of a float32
        raw, dtype_format = b"\0\0" + raw, "<f"
    else:
        dtype_format = {"float16": "<e", "float32": "<f", "float64": "<d"}[dtype]
    return struct.unpack(dtype_format, raw)[0], dtype


def same_value(value: float, dtype: str, kept: float, dtypes: Sequence[str]) -> bool:
    """Whether a value of a base is the one that was kept; in another dtype they may differ by a rounding.

    Args:
        value: of the base that is there now.
        dtype: of it.
        kept: when coefficients were learned.
        dtypes: of that base.
    """
    if list(dtypes) == [dtype]:
        return value == kept
    return abs(value - kept) <= max(EPSILON.get(name, 0.25) for name in (*dtypes, dtype)) * abs(kept) + TINY
