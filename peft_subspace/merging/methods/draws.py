"""Random numbers that belong to positions: the same for any cut, order and thread, and on any machine."""

from __future__ import annotations

import functools
import hashlib
import threading
from typing import Any

import numpy as np

from peft_subspace.merging.methods.registry import Inputs

_LOCAL = threading.local()  # one generator a thread, set to a state for each part: making one costs as much as 10,000 numbers


@functools.lru_cache(maxsize=256)
def _stream(seed: int, name: str, k: int) -> tuple[Any, int]:
    """The generator's state at position 0 of model k in this tensor, and a key: from sha256 of (seed, tensor name, k)."""
    digest = hashlib.sha256(f"{seed}\0{name}\0{k}".encode()).digest()
    state = np.random.PCG64DXSM(int.from_bytes(digest[:16], "little")).state
    return state, int.from_bytes(digest[16:24], "little")


def _drawn(inputs: Inputs, k: int, kind: str) -> np.ndarray:
    """`[n]` integers of 2 or 4 bytes at the positions of this part, several out of one 64-bit draw."""
    if not hasattr(_LOCAL, "generator"):
        _LOCAL.generator = np.random.PCG64DXSM(0)
    start, count, share = inputs.start, inputs.tensors[k].numel(), 8 // np.dtype(kind).itemsize
    _LOCAL.generator.state = _stream(inputs.seed, inputs.name, k)[0]
    _LOCAL.generator.advance(start // share)
    raw = _LOCAL.generator.random_raw((start + count + share - 1) // share - start // share)
    return raw.astype("<u8", copy=False).view(kind)[start % share :][:count]


def random_bits(inputs: Inputs, k: int) -> np.ndarray:
    """`[n]` int32, uniform over all of them: those of model k at the positions of this part.

    The stream is numpy's PCG64DXSM, whose output numpy promises to keep, advanced to the position: nothing is stored,
    nothing depends on what was drawn before.
    """
    return _drawn(inputs, k, "<i4")


def bernoulli(inputs: Inputs, k: int, chance: float) -> np.ndarray:
    """`[n]` booleans, true with this chance, to 2^-48: those of model k at the positions of this part.

    16 bits decide nearly all of them, which halves the time; where they equal the chance's own, 32 bits of a hash of the
    position do.
    """
    bits = _drawn(inputs, k, "<u2")
    upper, lower = divmod(round(chance * 2**48), 2**32)
    kept = bits < upper  # in torch this would take ten times as long
    if lower:
        (edge,) = np.nonzero(bits == upper)
        key = _stream(inputs.seed, inputs.name, k)[1]
        kept[edge] = _hash(edge.astype(np.uint64) + np.uint64(inputs.start), key) < lower
    return kept


def _hash(x: np.ndarray, key: int) -> np.ndarray:
    """The upper 32 bits of the splitmix64 mix of each x + key."""
    x = x + np.uint64(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(32)


def uniform(bits: np.ndarray) -> np.ndarray:
    """Uniform float32 in [0, 1) from the upper 24 of uniform int32."""
    unit = (bits >> 8).astype(np.float32)
    unit += np.float32(2.0**23)
    unit *= np.float32(2.0**-24)
    return unit
