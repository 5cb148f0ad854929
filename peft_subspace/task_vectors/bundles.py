"""Task vectors that travel with the adapter that was learned with them: `vectors/NAME.safetensors` beside its file.

Each is a task-vector file of the tensors that the adapter composes, in float32, low-rank ones as their factors. The adapter's
config has their hashes; a bundled vector stands for the one that it was made of. Opening needs no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from .errors import InputError, OutputError
from .provenance import part_record
from .sources import ADAPTER_CONFIG, open_checkpoint, shortened

if TYPE_CHECKING:
    from .task_vector import TaskVector

FOLDER, LONGEST = "vectors", 180


def file_of(record: Mapping[str, Any]) -> str | None:
    """Where a vector of an adapter is in the adapter's folder, `vectors/NAME.safetensors`; None if it is not bundled."""
    return f"{FOLDER}/{file_name(str(record['name']))}" if record.get("bundle") else None


def file_name(name: str) -> str:
    """The name of a file for the vector of any name: escaped where it must be.

    What has over 180 characters then ends in a hash instead: file systems have room for 255.
    """
    name = quote(name, safe=" ")
    if len(name) > LONGEST:
        name = f"{name[:LONGEST]}-{sha256(name.encode()).hexdigest()[:16]}"
    return f"{name}.safetensors"


def write_bundle(folder: str | os.PathLike[str], record: dict[str, Any], vector: TaskVector, names: Collection[str]) -> None:
    """Write a vector into an adapter's folder, unless it is there already, and note its hashes in the record.

    Args:
        folder: of the adapter.
        record: of the vector, in the config's provenance; gets the key `bundle`.
        vector: opened.
        names: of its tensors that the adapter composes.

    Cost: 4 bytes for each value of a dense tensor; one tensor in memory at a time.
    """
    record.setdefault("bundle", {})
    record["bundle"] = record["bundle"] or {"kind": "task_vector"}  # a name for the file, until it has been written
    path = Path(folder, str(file_of(record)))
    if path.is_file() and _is_bundle(path, record):
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot be made: {error.strerror or error}.") from error
    shapes = {name: shape for name, shape in vector.shapes.items() if name in names}
    base = vector.base_name or str(record.get("base", ""))  # one from a bundle is opened without its base: the same bytes
    replace(vector, shapes=shapes, base_name=base).save(path, recorded=_is_recorded(path))
    record["bundle"] = part_record(open_checkpoint(path))


def _is_recorded(path: Path) -> bool:
    """Whether the config that was saved into the folder before says that its adapter has a vector in this file."""
    try:
        saved = json.loads((path.parent.parent / ADAPTER_CONFIG).read_bytes())
        return any(file_of(record) == f"{FOLDER}/{path.name}" for record in saved["provenance"]["vectors"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_bundle(path: Path, record: Mapping[str, Any]) -> bool:
    try:
        return part_record(open_checkpoint(path)) == record["bundle"]
    except InputError:  # damaged: it is written anew
        return False


def without_bundle(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a vector that is not saved with its adapter."""
    return {key: value for key, value in record.items() if key != "bundle"}


def lost_files(records: Iterable[Mapping[str, Any]], found: Collection[str]) -> str:
    """A sentence about bundled vectors that are not in the adapter's folder; empty if all are there.

    Args:
        records: of an adapter's vectors.
        found: names of those that are there.
    """
    lost = [file for record in records if (file := file_of(record)) and record["name"] not in found]
    if not lost:
        return ""
    return (
        f" The adapter was saved with {shortened(lost)}, which was not found beside its config: get the whole folder again, "
        f"and read a config that you pass yourself with its own class."
    )


def check_bundle(path: Path, record: Mapping[str, Any]) -> None:
    """Compare a bundled vector with its record.

    Raises:
        InputError: its file is another one, or damaged.
    """
    found = part_record(open_checkpoint(path))
    if found != record["bundle"]:
        raise InputError(
            f"the task vector {record['name']!r}: {path} is not the file that was saved with the adapter: it has another size "
            f"or other hashes. Get the adapter's folder again, or delete the file to use {record['reference']}."
        )
