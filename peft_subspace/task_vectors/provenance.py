"""What task vectors are known by: hashes of their files and of what scales them, wherever they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import InputError
from .headers import FileHeader
from .models import Source
from .sources import Checkpoint

WHOLE, PART = 2**16, 2**12  # bytes

# What of an adapter's config changes its dW.
SCALES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "scale", "scale_pattern")


def record_of(name: str, source: Source, base: Source | None) -> dict[str, Any]:
    record = {"name": name, "reference": str(source.reference), "parts": [_part(part) for part in source.checkpoints]}
    if base is not None:
        record |= {"base": str(base.reference), "base_parts": [_part(part) for part in base.checkpoints]}
    return record


def _part(part: Checkpoint) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": part.kind, "commit": part.commit}
    found["files"] = [tensor_fingerprint(header) for header in sorted(part.files, key=lambda file: file.path.name)]
    if part.kind == "adapter":
        found["scales"] = {key: part.config[key] for key in SCALES if part.config.get(key) is not None}
    return found


def tensor_fingerprint(header: FileHeader) -> dict[str, Any]:
    """A file's size, and the SHA-256 of its header and of every tensor: small ones whole, of others three parts of 4 KiB.

    Looking into every tensor tells models apart of which only biases or norms, or a single layer, were trained. Two that differ
    in a few rows of a large tensor alone may look the same.
    """
    with open(header.path, "rb") as file:
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
