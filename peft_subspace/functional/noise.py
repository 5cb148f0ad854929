"""Random numbers that belong to positions of a tensor: any part of them can be made again, in any order."""

from __future__ import annotations

import functools
import hashlib
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .groups import mix

_LOCAL = threading.local()  # one generator a thread, set to a state for each part: making one costs as much as 10,000 numbers


@functools.lru_cache(maxsize=4096)
def key_of(*stream: Any) -> bytes:
    """32 bytes that belong to a stream: SHA-256 of its parts."""
    return hashlib.sha256("\0".join(map(str, stream)).encode()).digest()


@functools.lru_cache(maxsize=4096)
def _state(*stream: Any) -> Any:
    return np.random.PCG64DXSM(int.from_bytes(key_of(*stream)[:16], "little")).state


def draws(stream: tuple[Any, ...], first: int, count: int) -> np.ndarray:
    """`[count]` uint64: the draws of a stream from number `first` on.

    The stream is numpy's PCG64DXSM, whose output numpy promises to keep, advanced to the position: nothing is stored, nothing
    depends on what was drawn before.
    """
    if not hasattr(_LOCAL, "generator"):
        _LOCAL.generator = np.random.PCG64DXSM(0)
    _LOCAL.generator.state = _state(*stream)
    _LOCAL.generator.advance(first)
    return _LOCAL.generator.random_raw(count).astype("<u8", copy=False)


def fingerprint(values: Tensor) -> Tensor:
    """A number of a tensor's bits, int64, no dimension: in practice another one after each step of an optimizer.

    The sum of its bits read as integers of 64 bits, plus what is left at the end as those of 8 (overflow wraps around). It is
    no hash: values that change places, or an even number of changed signs and nothing else, can leave it as it was. A sample
    would then have the noise of the one before; nothing else depends on it. Contiguous tensors only. Cost: one pass over the
    bits.
    """
    flat = values.reshape(-1)
    per = 8 // flat.element_size()
    whole = flat.numel() // per * per
    head, tail = flat[:whole], flat[whole:]
    if head.storage_offset() % per:
        head = head.clone()  # such integers begin at their own multiples
    return head.view(torch.int64).sum() + tail.view(torch.uint8).sum(dtype=torch.int64)


def uniform(stream: tuple[Any, ...], start: int, stop: int, device: torch.device, salt: Tensor | None = None) -> Tensor:
    """u, uniform in (0, 1), float32 `[stop - start]`.

    Args:
        stream: what the numbers belong to, such as (seed, name of the parameter).
        start: first position, a multiple of 4.
        stop: behind the last one.
        device: on which they are made.
        salt: a number on the device that they belong to besides, without the host's having to know it.

    u is (k + 1/2) / 2^16 for a uniform k of 16 bits: never 0 or 1, exact in float32, and fine enough for a mask, whose logistic
    variable ln(u / (1 - u)) reaches from -11.8 to 11.8. On a CPU k comes from `draws`: the same on every machine and for every
    cut. On an accelerator k is a hash of the position (see `groups.partition`), also the same for every cut; its numbers are
    others.

    Cost: under 1 ns a number on one core, most of it the generator; about 30 integer operations on an accelerator.
    """
    if device.type == "cpu":
        parts = stream if salt is None else (*stream, int(salt))
        bits = draws(parts, start // 4, (stop - start + 3) // 4).view("<u2")[: stop - start]
        found = torch.from_numpy(bits.astype(np.float32))
    else:
        found = hashed_bits(stream, start, stop, device, salt).float()
    return torch.add(found.new_tensor(2.0**-17), found, alpha=2.0**-16, out=found)


def hashed_bits(stream: tuple[Any, ...], start: int, stop: int, device: torch.device, salt: Tensor | None = None) -> Tensor:
    """Uniform numbers of 16 bits, int64 `[stop - start]`, by integer operations on the position alone."""
    keys = [int.from_bytes(key_of(*stream)[i : i + 4], "little") for i in (0, 4)]
    position = torch.arange(start, stop, device=device)
    inner = mix((position & 0xFFFFFFFF) ^ keys[0]) ^ (position >> 32) ^ keys[1]
    return mix(inner if salt is None else mix(inner ^ (salt & 0xFFFFFFFF)) ^ (salt >> 32 & 0xFFFFFFFF)) >> 16
