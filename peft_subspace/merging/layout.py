"""Where every byte of the result will be, known before the first is computed. Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..task_vectors.headers import ITEM_SIZES, encode_header

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Shard:
    """One file: its name, its first bytes, where each tensor begins, in the order of the bytes, and its whole size."""

    name: str
    header: bytes
    offsets: dict[str, int]
    size: int


@dataclass(frozen=True)
class Layout:
    """The files of a result, and for each tensor the file and the offset there."""

    shards: tuple[Shard, ...]
    places: dict[str, tuple[str, int]]
    index: bytes | None

    @property
    def total(self) -> int:
        """Bytes of all files of weights."""
        return sum(shard.size for shard in self.shards)


def make_layout(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    shard_size: int,
    metadata: dict[str, str] | None = None,
    weights: str = WEIGHTS,
) -> Layout:
    """Divide tensors into files the way Hugging Face names them.

    Args:
        tensors: (name, dtype, shape), in the order in which they will be computed. A file keeps it, but for wider dtypes
            coming first, so that every value is aligned.
        shard_size: most bytes of values in a file; a larger tensor gets a file of its own.
        metadata: of every file.
        weights: name of the only file; the files of several are called after it.
    """
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * ITEM_SIZES[dtype]
        if groups[-1] and filled + size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append((name, dtype, shape))
        filled += size
    stem = weights.removesuffix(".safetensors")
    shards, places, weight_map, total = [], {}, {}, 0
    for number, group in enumerate(groups, 1):
        file = weights if len(groups) == 1 else f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
        group = sorted(group, key=lambda entry: -ITEM_SIZES[entry[1]])
        header, offsets = encode_header({name: (dtype, shape) for name, dtype, shape in group}, metadata or {"format": "pt"})
        values = sum(math.prod(shape) * ITEM_SIZES[dtype] for _, dtype, shape in group)
        shards.append(Shard(file, header, offsets, len(header) + values))
        places.update({name: (file, offset) for name, offset in offsets.items()})
        weight_map.update(dict.fromkeys(offsets, file))
        total += values
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return Layout(tuple(shards), places, json.dumps(index, indent=2).encode() + b"\n" if len(groups) > 1 else None)
