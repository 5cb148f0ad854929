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


def bernoulli_bits(inputs: Inputs, k: int, chance: float) -> np.ndarray:
    """`[ceil(n / 8)]` uint8 whose bits, the lowest first, are set with this chance, to 2^-40: of model k in this part.

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
        return np.full(-(-count // 8), 255 if upper else 0, np.uint8)
    skip = start % 64
    words = -(-(skip + count) // 64)
    spare = 0 if lower else (upper & -upper).bit_length() - 1  # trailing zeros of p: those bits of u do not matter
    planes = 8 - spare
    draws = _raw(inputs, k, start // 64 * planes, words * planes).reshape(words, planes)
    less, equal = _compared(draws, upper >> spare, bool(lower))
    if not lower and not skip:
        return less.view(np.uint8)[: -(-count // 8)]
    kept = _unpacked(less)[skip:][:count]
    if lower:
        edge = np.flatnonzero(_unpacked(equal)[skip:][:count])
        key = _stream(inputs.seed, inputs.name, k)[1]
        kept[edge] = _hash(edge.astype(np.uint64) + np.uint64(start), key) < lower
    return np.packbits(kept, bitorder="little")


def bernoulli(inputs: Inputs, k: int, chance: float) -> np.ndarray:
    """`[n]` booleans: the same as `bernoulli_bits`."""
    count = inputs.tensors[k].numel()
    return np.unpackbits(bernoulli_bits(inputs, k, chance), count=count, bitorder="little").view(bool)


def _compared(draws: np.ndarray, chance: int, edges: bool) -> tuple[np.ndarray, np.ndarray]:
    """Bits that say u < p and u == p, `[words]` uint64 each; the second is not made without `edges`."""
    less, equal = np.zeros(len(draws), "<u8"), ~np.zeros(len(draws), "<u8")
    for plane in range(draws.shape[1]):  # from the lowest bit up
        ones = draws[:, plane]
        below = ~ones
        if chance >> plane & 1:
            less |= below
        else:
            less &= below
        if edges:
            equal &= ones if chance >> plane & 1 else below
    return less, equal


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
