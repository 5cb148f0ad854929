"""The one loop that runs a merge method over a tensor, in parts: its passes first, then the map.

The result has the same bytes however the tensor is cut: parts begin at whole blocks or rows, passes sum by block or row, and
random numbers belong to positions. Parts are small enough for a core's cache (`TILE`), whatever is read at a time (`chunk`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from peft_subspace.merging.methods.registry import BLOCK, Inputs, Kind, Method, Semantics

TILE = 32 * BLOCK  # 128 K elements: small enough for a core's caches, large enough that a call costs nothing beside its work
CHUNK = 32 * TILE  # 4 M elements


@dataclass(frozen=True)
class Part:
    """Elements [start, stop) of one tensor, flat, in any floating dtype, on any device.

    Args:
        base: Of the base model, or None.
        tensors: One for each model.
        are_deltas: Which of them are already theta_k - theta_0 (of a LoRA, of a task-vector file); empty for none.
        statistics: One for each model, or None. For "matrix" whole, in their own shape; else the same range.
    """

    base: Tensor | None
    tensors: Sequence[Tensor]
    are_deltas: Sequence[bool] = ()
    statistics: Sequence[Tensor] | None = None


@dataclass(frozen=True)
class Job:
    """A merge of one tensor.

    Args:
        method: The method.
        shape: Of the tensor.
        read: `read(start, stop)` returns the part of these flat elements; it is called in order, once a pass.
        weights: K factors; by default those in `per_model`, else ones.
        options: Global parameters; those that are missing have their defaults.
        per_model: K mappings of parameters of scope "model", likewise.
        name: Of the tensor.
        seed: Of the whole merge.
        semantics: Whose definition to follow.
        dtype: Of the computation; `float32` or `float64`.
        device: Of the computation.
        chunk: Elements to read at a time, rounded to whole blocks or rows. "matrix" methods read the whole tensor.
        as_delta: Give the merged delta, without the base.
        learned: What was learned for this tensor, for methods that merge by that.
        mask: `applied(deltas, start)` gives the masked tiles of all differences from element `start` on; None for no mask.
    """

    method: Method
    shape: tuple[int, ...]
    read: Callable[[int, int], Part]
    options: Mapping[str, Any] = field(default_factory=dict)
    per_model: Sequence[Mapping[str, Any]] = ()
    weights: Sequence[float] | None = None
    name: str = "weight"
    seed: int = 0
    semantics: Semantics = "mergekit"
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    chunk: int = CHUNK
    as_delta: bool = False
    learned: Any = None
    mask: Any = None

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Length of a row."""
        return self.method.row_length(self.shape, self.semantics)


def _steps(kind: Kind, job: Job) -> tuple[int, int]:
    """Elements to read at a time, and elements of a tile."""
    if kind == "matrix":
        return job.count, job.count
    unit = BLOCK if kind == "elementwise" else max(1, job.columns)
    tile = max(1, TILE // unit) * unit
    return max(1, job.chunk // tile) * tile, tile


class _Tiles:
    """Makes the tiles of one tensor, in the dtype of the computation, one after the other in the same memory.

    That memory stays in the core's caches; a new tensor for every tile, out of wherever the allocator has room, does not.
    """

    def __init__(self, job: Job, kind: Kind, settled: Inputs) -> None:
        self.job, self.kind, self.settled = job, kind, settled
        self.device = torch.device(job.device)
        self.shape = None if kind == "elementwise" else job.shape if kind == "matrix" else (-1, job.columns)
        self.buffers: dict[int, Tensor] = {}

    def inputs(self, part: Part, start: int, length: int, offset: int) -> Inputs:
        """One tile of a part, as what the method acts on; good until the next one is made."""
        wants_delta = self.job.method.acts_on == "delta"
        base, own_base = (None, True) if part.base is None else self._tile(part.base, 0, offset, length)
        are_deltas = part.are_deltas or [part.base is None and wants_delta] * len(part.tensors)
        tensors, own = [], True
        for k, (tensor, is_delta) in enumerate(zip(part.tensors, are_deltas, strict=True), 1):
            value, copied = self._tile(tensor, k, offset, length)
            if base is not None and wants_delta != is_delta:
                out = value if copied else self._buffer(k, length).view(value.shape)
                value, copied = (torch.sub if wants_delta else torch.add)(value, base, out=out), True
            own = own and copied
            tensors.append(value)
        if self.job.mask is not None:
            tensors, own = self.job.mask.applied(tensors, start), True
        statistics = part.statistics
        if statistics is not None and self.kind != "matrix":
            first = len(tensors) + 1
            statistics = [self._tile(each, n, offset, length)[0] for n, each in enumerate(statistics, first)]
        return replace(self.settled, base=base, tensors=tensors, start=start, statistics=statistics, own=own_base and own)

    def _tile(self, tensor: Tensor, slot: int, offset: int, length: int) -> tuple[Tensor, bool]:
        """Values of a part, and whether they are a copy."""
        flat = (tensor if tensor.dim() == 1 else tensor.reshape(-1))[offset : offset + length]
        copied = flat.dtype != self.job.dtype or flat.device != self.device
        if copied:
            flat = self._buffer(slot, length).copy_(flat)
        return flat if self.shape is None else flat.view(self.shape), copied

    def _buffer(self, slot: int, length: int) -> Tensor:
        buffer = self.buffers.get(slot)
        if buffer is None or buffer.numel() < length:
            buffer = self.buffers[slot] = torch.empty(length, dtype=self.job.dtype, device=self.device)
        return buffer if buffer.numel() == length else buffer[:length]


def _tiles(job: Job, kind: Kind, settled: Inputs) -> Iterator[Inputs]:
    """All tiles of a tensor in order; each is read when it is asked for, and then the one before is no more."""
    chunk, size = _steps(kind, job)
    tiles = _Tiles(job, kind, settled)
    for start in range(0, job.count, max(1, chunk)):
        stop = min(start + chunk, job.count)
        part = job.read(start, stop)
        for first in range(start, stop, size):
            yield tiles.inputs(part, first, min(size, stop - first), first - start)


def settle(job: Job) -> tuple[Kind, Inputs]:
    """Check a job's parameters; return the kind of its method under them, and its inputs without tensors."""
    method = job.method
    options = method.resolve("global", job.options)
    per_model = tuple(method.resolve("model", given) for given in job.per_model)
    weights = job.weights
    if weights is None:
        weights = [float(given.get("weight", 1.0)) for given in per_model]
    if method.check is not None:
        method.check(options, per_model, weights, job.semantics)
    inputs = Inputs(
        None, (), tuple(weights), options, per_model, job.name, job.shape, 0, job.seed, {}, job.semantics, learned=job.learned
    )
    return method.kind_for(options), inputs


def reduce_tensors(jobs: Sequence[Job]) -> dict[str, Any]:
    """Run a method's passes over some tensors as if they were one; return what the passes found, by name.

    Over one tensor, for almost everything. Over all tensors of a model where `Method.whole_model` says so: TIES in the
    paper's semantics trims by one threshold for the whole model.

    Args:
        jobs: Of one method, with the same parameters; tensors without entries are passed over.
    """
    reduced: dict[str, Any] = {}
    settled = [(job, *settle(job)) for job in jobs if job.count]
    if not settled:
        return reduced
    job, _, inputs = settled[0]
    count = sum(job.count for job, _, _ in settled)
    first: Inputs | None = None
    for each in job.method.passes(inputs.options, inputs.per_model, job.semantics):
        parts = (_tiles(job, kind, replace(inputs, reduced=reduced)) for job, kind, inputs in settled)
        tiles: Iterator[Inputs] = itertools.chain.from_iterable(parts)
        if first is None:
            first = next(tiles)
            tiles = itertools.chain([first], tiles)
        state = each.begin(count, replace(first, reduced=reduced))
        for tile in tiles if state is not None else ():
            if each.update(state, tile):
                break
        reduced = {**reduced, each.name: None if state is None else each.finish(state)}
    return reduced


def map_tensor(job: Job, reduced: Mapping[str, Any]) -> Iterator[tuple[int, Tensor]]:
    """Yield the merged tensor in parts, `(start, flat part)`, in order, in the dtype of the computation.

    A part is good until the next one is asked for.
    """
    kind, settled = settle(job)
    settled = replace(settled, reduced=reduced)
    kernel = job.method.merge
    for inputs in _tiles(job, kind, settled):
        merged = kernel(inputs)
        if job.method.acts_on == "delta" and inputs.base is not None and not job.as_delta:
            merged = torch.add(inputs.base, merged, out=inputs.base if inputs.own else None)
        elif job.method.acts_on == "model" and job.as_delta and inputs.base is not None:
            merged = merged - inputs.base
        yield inputs.start, merged.reshape(-1)


def reduce_and_map(job: Job) -> Iterator[tuple[int, Tensor]]:
    """Run a method's passes, then yield the merged tensor in parts, as `map_tensor` does."""
    yield from map_tensor(job, reduce_tensors([job]))
