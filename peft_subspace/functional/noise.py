"""Random numbers that belong to positions of a tensor: any part of them can be made again, in any order."""

from __future__ import annotations

import functools
import hashlib
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LOCAL = threading.local()  # one generator a thread, set to a state for each part: making one costs as much as 10,000 numbers


@functools.lru_cache(maxsize=4096)
def _key(*parts: Any) -> bytes:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()


@functools.lru_cache(maxsize=4096)
def _state(*parts: Any) -> Any:
    return np.random.PCG64DXSM(int.from_bytes(_key(*parts)[:16], "little")).state


def odds(stream: tuple[Any, ...], start: int, stop: int, device: torch.device) -> Tensor:
    """(1 - u) / u for u uniform in (0, 1), float32 `[stop - start]`: exp of minus a logistic variable.

    Args:
        stream: what the numbers belong to, such as (seed, name of the parameter, number of the draw).
        start: first position, a multiple of 4.
        stop: behind the last one.
        device: on which they are made.

    u is (k + 1/2) / 2^16 for a uniform k of 16 bits: never 0 or 1, and fine enough for a mask, whose logistic variable reaches
    from -11.8 to 11.8. On a CPU k comes from numpy's PCG64DXSM, whose output numpy promises to keep, advanced to the position:
    the same on every machine and for every cut. On an accelerator torch's generator of the device is seeded for the part, so
    there the cut matters, and the numbers are others.

    Cost: 1 ns a number on one core, half of it the generator.
    """
    if device.type == "cpu":
        if not hasattr(_LOCAL, "generator"):
            _LOCAL.generator = np.random.PCG64DXSM(0)
        _LOCAL.generator.state = _state(*stream)
        _LOCAL.generator.advance(start // 4)
        bits = _LOCAL.generator.random_raw((stop - start + 3) // 4).astype("<u8", copy=False).view("<u2")[: stop - start]
        found = torch.from_numpy(bits.astype(np.float32))
    else:
        generator = torch.Generator(device).manual_seed(int.from_bytes(_key(*stream, start)[:8], "little") >> 1)
        found = torch.randint(2**16, (stop - start,), generator=generator, device=device, dtype=torch.int32).float()
    return found.add_(0.5).reciprocal_().mul_(2.0**16).sub_(1.0)
