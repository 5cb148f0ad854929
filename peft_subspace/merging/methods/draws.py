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


def _raw(inputs: Inputs, k: int, first: int, count: int) -> np.ndarray:
    """`[count]` uint64: the draws of model k in this tensor from number `first` on.

    The stream is numpy's PCG64DXSM, whose output numpy promises to keep, advanced to the position: nothing is stored,
    nothing depends on what was drawn before.
    """
    if not hasattr(_LOCAL, "generator"):
        _LOCAL.generator = np.random.PCG64DXSM(0)
    _LOCAL.generator.state = _stream(inputs.seed, inputs.name, k)[0]
    _LOCAL.generator.advance(first)
    return _LOCAL.generator.random_raw(count).astype("<u8", copy=False)


def random_bits(inputs: Inputs, k: int) -> np.ndarray:
    """`[n]` int32, uniform over all of them: those of model k at the positions of this part, two of one draw."""
    start, count = inputs.start, inputs.tensors[k].numel()
    raw = _raw(inputs, k, start // 2, (start + count + 1) // 2 - start // 2)
    return raw.view("<i4")[start % 2 :][:count]


def bernoulli(inputs: Inputs, k: int, chance: float) -> np.ndarray:
    """`[n]` booleans, true with this chance, to 2^-40: those of model k at the positions of this part.

    64 entries are drawn at once: bit j of 8 draws is a number u of 8 bits for entry j, and u < p is decided for all of them by
    a few operations on whole words. Where u equals the 8 leading bits of p, 32 bits of a hash of the position decide. If p
    has fewer bits, as 1/2 has, fewer draws do.

    Args:
        inputs: For the stream and the positions.
        k: Of the model.
        chance: p.
    """
    count, start = inputs.tensors[k].numel(), inputs.start
    upper, lower = divmod(round(chance * 2**40), 2**32)
    if upper == 256 or upper == lower == 0:
        return np.full(count, upper == 256)
    skip = start % 64
    spare = 0 if lower else (upper & -upper).bit_length() - 1  # trailing zeros of p: those bits of u do not matter
    planes = 8 - spare
    words = -(-(skip + count) // 64)
    draws = _raw(inputs, k, start // 64 * planes, words * planes).reshape(words, planes)
    less, equal = np.zeros(words, "<u8"), ~np.zeros(words, "<u8")
    for plane in range(planes):  # from the lowest bit up
        ones = draws[:, plane]
        if upper >> (plane + spare) & 1:
            less |= ~ones
            equal &= ones
        else:
            less &= ~ones
            equal &= ~ones
    kept = _unpacked(less)[skip:][:count]
    if lower:
        edge = np.flatnonzero(_unpacked(equal)[skip:][:count])
        key = _stream(inputs.seed, inputs.name, k)[1]
        kept[edge] = _hash(edge.astype(np.uint64) + np.uint64(start), key) < lower
    return kept


def _unpacked(words: np.ndarray) -> np.ndarray:
    """The bits of `[n]` uint64 as `[64 n]` booleans, the lowest first."""
    return np.unpackbits(words.view(np.uint8), bitorder="little").view(bool)


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
