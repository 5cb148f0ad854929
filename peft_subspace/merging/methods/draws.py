"""Random numbers that belong to positions: the same for any cut, order and thread, and on any machine."""

from __future__ import annotations

import hashlib

import numpy as np

from peft_subspace.merging.methods.registry import Inputs


def random_bits(inputs: Inputs, k: int) -> np.ndarray:
    """`[n]` int32, uniform over all of them: those of model k at the positions of this part.

    The stream is numpy's PCG64DXSM, whose output numpy promises to keep, keyed by sha256 of (seed, tensor name, k), and
    advanced to the position: nothing is stored, nothing depends on what was drawn before. One 64-bit draw serves two entries.
    """
    start, count = inputs.start, inputs.tensors[k].numel()
    digest = hashlib.sha256(f"{inputs.seed}\0{inputs.name}\0{k}".encode()).digest()
    generator = np.random.PCG64DXSM(int.from_bytes(digest[:16], "little"))
    generator.advance(start // 2)
    drawn = generator.random_raw((start + count + 1) // 2 - start // 2).astype("<u8", copy=False).view("<i4")
    return drawn[start % 2 :][:count]


def bernoulli(bits: np.ndarray, chance: float) -> np.ndarray:
    """Booleans that are true with this chance, to 2^-32; in torch this would take ten times as long."""
    return bits < round(chance * 2**32) - 2**31


def uniform(bits: np.ndarray) -> np.ndarray:
    """Uniform float32 in [0, 1) from the upper 24 of uniform int32."""
    unit = (bits >> 8).astype(np.float32)
    unit += np.float32(2.0**23)
    unit *= np.float32(2.0**-24)
    return unit
