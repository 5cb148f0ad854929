"""Random numbers that belong to positions: the same for any cut, order and thread, and on any machine."""

from __future__ import annotations

import numpy as np

from peft_subspace.functional.noise import draws, key_of
from peft_subspace.merging.methods.registry import Inputs


def _stream(inputs: Inputs, k: int) -> tuple[int, str, int]:
    return inputs.seed, inputs.name, k


def random_bits(inputs: Inputs, k: int) -> np.ndarray:
    """`[n]` int32, uniform over all of them: those of model k at the positions of this part, two of one draw."""
    start, count = inputs.start, inputs.tensors[k].numel()
    raw = draws(_stream(inputs, k), start // 2, (start + count + 1) // 2 - start // 2)
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
    drawn = draws(_stream(inputs, k), start // 64 * planes, words * planes).reshape(words, planes)
    less, equal = _compared(drawn, upper >> spare, bool(lower))
    if not lower and not skip:
        return less.view(np.uint8)[: -(-count // 8)]
    kept = _unpacked(less)[skip:][:count]
    if lower:
        edge = np.flatnonzero(_unpacked(equal)[skip:][:count])
        key = int.from_bytes(key_of(*_stream(inputs, k))[16:24], "little")
        kept[edge] = _hash(edge.astype(np.uint64) + np.uint64(start), key) < lower
    return np.packbits(kept, bitorder="little")


def bernoulli(inputs: Inputs, k: int, chance: float) -> np.ndarray:
    """`[n]` booleans: the same as `bernoulli_bits`."""
    count = inputs.tensors[k].numel()
    return np.unpackbits(bernoulli_bits(inputs, k, chance), count=count, bitorder="little").view(bool)


def _compared(drawn: np.ndarray, chance: int, edges: bool) -> tuple[np.ndarray, np.ndarray]:
    """Bits that say u < p and u == p, `[words]` uint64 each; the second is not made without `edges`."""
    less, equal = np.zeros(len(drawn), "<u8"), ~np.zeros(len(drawn), "<u8")
    for plane in range(drawn.shape[1]):  # from the lowest bit up
        ones = drawn[:, plane]
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
