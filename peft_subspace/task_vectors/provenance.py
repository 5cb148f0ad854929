"""What task vectors are known by: hashes of their files and of what scales them, wherever they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import InputError
from .models import Source
from .sources import Checkpoint, fingerprint

# What of an adapter's config changes its dW.
SCALES = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "scale", "scale_pattern")


def record_of(name: str, source: Source, base: Source | None) -> dict[str, Any]:
    record = {"name": name, "reference": str(source.reference), "parts": [_part(part) for part in source.checkpoints]}
    if base is not None and (source.full is not None):
        record |= {"base": str(base.reference), "base_parts": [_part(part) for part in base.checkpoints]}
    return record


def _part(part: Checkpoint) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": part.kind, "commit": part.commit}
    found["files"] = [fingerprint(header) for header in sorted(part.files, key=lambda file: file.path.name)]
    if part.kind == "adapter":
        found["scales"] = {key: part.config[key] for key in SCALES if part.config.get(key) is not None}
    return found


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
