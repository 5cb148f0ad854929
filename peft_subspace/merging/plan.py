"""From a recipe to what will be read, computed and written, from headers alone. Needs no torch: `--dry-run` ends here."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from .._version import __version__
from ..task_vectors.headers import ITEM_SIZES, TensorHeader
from ..task_vectors.models import Given, Source
from ..task_vectors.sources import Checkpoint, FileHeader, fingerprint
from .layout import Layout
from .learned import Learned, LearnedTensor
from .methods.registry import Method
from .recipe import Recipe

CHUNK = 2**19  # values that a worker reads at a time from each model
TORCH_MEMORY = 150 * 10**6  # private bytes of Python and torch before any work
READ_RATE, NS_PER_VALUE = 1e9, {"elementwise": 4.0, "rows": 25.0, "matrix": 200.0}  # for the estimate of the time


def held_bytes(threads: int) -> int:
    """Bytes of inputs that all workers together keep between the passes over a tensor, so that they are read once.

    The fewer there are, the less room their buffers take: one worker keeps a tensor of 2,048 x 5,504 of four models in bfloat16
    (90 MB), each of two the same of two models.
    """
    return max(48 * 10**6, 112 * 10**6 - 10 * 10**6 * threads)


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the result.

    Attributes:
        name: its name.
        shape: its shape.
        dtype: of the result, as the format spells it.
        base: what the base has; None if there is no base or it is not read.
        models: what each model gives.
        action: "merge" them; "copy" the bytes of the base (all must be equal if it is no float); "cast" the base.
        options: global parameters for this tensor.
        per_model: each model's parameters for this tensor.
        draws_as: the name that random numbers are drawn by: of the embedding, for a head that is tied to it.
        statistics: each model's statistics of this tensor, for the methods that need them.
        learned: what was learned for this tensor, for the methods that merge by that.
        mask: what every difference is multiplied by before it is merged.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    base: Given | None
    models: tuple[Given, ...]
    action: str = "merge"
    options: Mapping[str, Any] = field(default_factory=dict)
    per_model: tuple[Mapping[str, Any], ...] = ()
    draws_as: str = ""
    statistics: tuple[TensorHeader, ...] | None = None
    learned: LearnedTensor | None = None
    mask: LearnedTensor | None = None

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return self.count * ITEM_SIZES[self.dtype]

    @property
    def headers(self) -> list[TensorHeader]:
        """All that is read for it."""
        given = ([] if self.base is None else [self.base]) + list(self.models)
        learned = [one for one in (self.learned, self.mask) if one is not None]
        more = (*(self.statistics or ()), *(header for one in learned for header in one.headers))
        return [*(header for one in given for header in one.headers), *more]

    @property
    def bytes_read(self) -> int:
        """Bytes that are read for it, in one pass."""
        return sum(header.nbytes for header in self.headers)


@dataclass(frozen=True)
class Equal:
    """Two tensors of one model that must have the same values, since only one of them is kept."""

    first: TensorHeader
    second: TensorHeader
    message: str


@dataclass(frozen=True)
class Plan:
    """A merge that is ready to run.

    Attributes:
        recipe: what was asked for.
        base: the base, if there is one.
        sources: the models that are merged, without the base.
        names: of the sources, for messages.
        tensors: of the result, in the order of the base's file.
        layout: where they will be.
        equal: what has to be compared before anything is written.
        notes: what the user should know.
        untied: the result has an output head of its own, where the base shares it with the embedding.
        learned: the adapter that a learned method merges by.
        mask: the adapter whose mask is applied before.
    """

    recipe: Recipe
    base: Source | None
    sources: tuple[Source, ...]
    names: tuple[str, ...]
    tensors: tuple[TensorPlan, ...]
    layout: Layout
    equal: tuple[Equal, ...]
    notes: tuple[str, ...]
    untied: bool = False
    learned: Learned | None = None
    mask: Learned | None = None

    @property
    def method(self) -> Method:
        """The merge method."""
        return self.recipe.method

    @property
    def reference(self) -> Source:
        """The model whose names, config and tokenizer the result has."""
        return self.base or self.sources[0]

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Everything that is read: the base, the models, and the adapters of what was learned."""
        sources = [*(() if self.base is None else (self.base,)), *self.sources]
        adapters = (one.checkpoint for one in (self.learned, self.mask) if one is not None)
        return (*(part for source in sources for part in source.checkpoints), *adapters)

    @property
    def files(self) -> dict[str, FileHeader]:
        """All files that are read, by a name for the manifest: model, then file."""
        return {f"{part.name}: {header.path.name}": header for part in self.checkpoints for header in part.files}

    @property
    def bytes_read(self) -> int:
        """Bytes of one pass over the inputs."""
        return sum(tensor.bytes_read for tensor in self.tensors)

    def peak_memory(self, threads: int) -> int:
        """Private bytes, about: buffers of every worker, or the largest tensor whole for methods that work on matrices."""
        kinds = {self.method.kind_for(tensor.options) for tensor in self.tensors if tensor.action == "merge"} or {"elementwise"}
        models = len(self.sources) + (self.base is not None)
        chunk = CHUNK * (models * 4 + 16) * threads + held_bytes(threads)
        method, semantics = self.method, self.recipe.subspace.semantics
        if "rows" in kinds:  # a row is read whole
            row = max((method.row_length(tensor.shape, semantics) for tensor in self.tensors), default=0)
            chunk += max(0, row - CHUNK) * (models * 4 + 16) * threads
        if "matrix" in kinds:
            largest = max(tensor.count for tensor in self.tensors)
            chunk += largest * 4 * (models + 3)
        return TORCH_MEMORY + chunk

    def seconds(self, threads: int) -> float:
        """A rough guess: a disk of 1 GB/s, and nanoseconds per value that were measured on one core."""
        work = sum(
            tensor.count * len(tensor.models) * NS_PER_VALUE[self.method.kind_for(tensor.options)] * 1e-9
            for tensor in self.tensors
            if tensor.action == "merge"
        )
        return (self.bytes_read + self.layout.total) / READ_RATE + work / threads

    def identity(self) -> dict[str, str]:
        """What must be the same for a resumed merge to give the same bytes; no time, no machine, no number of threads."""
        inputs = {name: fingerprint(header) for name, header in self.files.items()}
        return {
            "recipe": _digest(self.recipe.to_yaml()),
            "inputs": _digest(json.dumps(inputs, sort_keys=True)),
            "layout": _digest(b"".join(shard.name.encode() + shard.header for shard in self.layout.shards)),
            "versions": f"peft_subspace {__version__}, torch {version('torch')}",
        }


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
