"""A pool of task vectors on one model: opened by their headers, matched by name, checked by hashes, read block by block."""

from __future__ import annotations

import copy
import math
import threading
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..functional.composition import Dense, LowRank, Vector
from .errors import InputError
from .joined import joined
from .models import Source, extra_saved, given_by, open_source, without_base
from .provenance import digest, identity, record_of
from .readers import read_adapter
from .reading import GivenReader, Reader
from .references import HUB_ID, Reference
from .renaming import names_in_memory, pieces_in_memory
from .sources import Checkpoint, counted, shortened
from .task_vector import TaskVector
from .ties import with_ties
from .validate import is_buffer, made_for_another, match_names

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_LOCAL = threading.local()
# Vectors that are in memory, for as long as an adapter uses them: adapters with one pool hold it once.
_SHARED: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Entry:
    """One task vector of a pool.

    Attributes:
        name: in the pool.
        vector: opened, not read.
        names: name of a parameter of the model -> name in the vector.
        record: what it is known by: reference, commit, fingerprints of its files and of its base's.
        places: of the very files.
        beside: parameters of the model that the source has and its base's file lacks, such as a head: it is no difference.
    """

    name: str
    vector: TaskVector = field(repr=False)
    names: dict[str, str] = field(repr=False)
    record: dict[str, Any] = field(repr=False)
    places: tuple[Any, ...] = field(default=(), repr=False)
    beside: tuple[str, ...] = field(default=(), repr=False)

    @property
    def digest(self) -> str:
        """Of what the record says about the values; where they lie is left out."""
        return digest(identity(self.record))


class Streamed:
    """tau of one tensor, read from its files whenever it is needed: memory does not grow with the number of vectors."""

    def __init__(self, vector: TaskVector, name: str, owner: str) -> None:
        self.vector, self.name, self.owner = vector, name, owner

    def part(self, start: int, stop: int, like: Tensor) -> Tensor:
        """Values [start, stop) of the flat tensor, in the dtype and on the device of `like`."""
        base, reader = self.vector.base, _reader()
        total, slot = torch.zeros(stop - start), 1
        for weight, given in self.vector.terms:
            if self.name not in given:
                continue
            one = GivenReader(given[self.name], torch.float32, reader, slot)
            slot += one.slots
            own = None if one.is_delta else reader.stored(base[self.name], start, stop, 0).float()
            values = one.part(start, stop, own).float()
            total += weight * (values if own is None else values - own)
        if not torch.isfinite(total).all():
            raise InputError(_not_finite(self.owner, self.name))
        return total.to(like.device, like.dtype)

    def __deepcopy__(self, memo: Any) -> Streamed:
        return self

    def __reduce__(self) -> Any:
        return Streamed, (self.vector, self.name, self.owner)


def _not_finite(owner: str, name: str) -> str:
    return f"The task vector {owner!r} has values in {name!r} that are not finite. Leave it out, or mend it."


def _reader() -> Reader:
    """One for all vectors of a thread: its buffers hold one part at a time."""
    if not hasattr(_LOCAL, "reader"):
        _LOCAL.reader = Reader()
    reader: Reader = _LOCAL.reader
    return reader


@dataclass
class Pool:
    """Task vectors in a fixed order, on one model.

    Attributes:
        entries: the vectors.
        dtype: in which dense vectors are kept; float16 has one float32 scale for each tensor.
        placement: "device" (on that of the weight), "cpu" (in the host's memory), "disk" (in the files).
    """

    entries: list[Entry]
    dtype: torch.dtype = torch.float32
    placement: str = "device"

    def __deepcopy__(self, memo: Any) -> Pool:
        return self

    @property
    def names(self) -> list[str]:
        """Of the vectors."""
        return [entry.name for entry in self.entries]

    def covers(self, name: str) -> bool:
        """Whether any vector has a tensor for a parameter of the model."""
        return any(name in entry.names for entry in self.entries)

    def nbytes(self, names: Sequence[str], selected: Mapping[str, Collection[str]] | None = None) -> int:
        """Bytes that the vectors of these parameters take in memory, by their headers; factors are kept in float32.

        Args:
            names: of the parameters.
            selected: parameter -> the vectors that are used for it; all, where it says nothing.
        """
        return sum(
            self._nbytes(entry, entry.names[name])
            for entry in self.entries
            for name in names
            if name in entry.names and entry.name in (selected or {}).get(name, self.names)
        )

    def _nbytes(self, entry: Entry, name: str) -> int:
        shape, rank = entry.vector.shapes[name], entry.vector.rank(name)
        if rank is not None:
            return rank * (shape[0] + math.prod(shape[1:])) * torch.float32.itemsize
        return 0 if self.placement == "disk" else math.prod(shape) * self.dtype.itemsize

    def vectors(self, name: str, selected: Collection[str] | None = None) -> list[Vector | None]:
        """Every tau of one parameter; None where a vector has none, only zeros, or is not selected.

        Args:
            name: of the parameter.
            selected: names of the vectors that are used for it; None for all. Others are not read.

        Raises:
            InputError: a value is not finite; names the vector and the tensor.
        """
        return list(self.each(name, selected))

    def each(self, name: str, selected: Collection[str] | None = None) -> Iterator[Vector | None]:
        """The same one after the other: a dense vector that is dropped before the next is asked for leaves its memory."""
        used = self.names if selected is None else selected
        for number, entry in enumerate(self.entries):
            yield self.one(name, number) if entry.name in used else None

    def one(self, name: str, number: int) -> Vector | None:
        """tau of one parameter and entry; see `vectors`."""
        entry = self.entries[number]
        return self._vector(entry, entry.names[name]) if name in entry.names else None

    def ranks(self, name: str) -> list[int]:
        """Of the vectors that have a tensor for a parameter; 0 for one that has no factors."""
        return [entry.vector.rank(entry.names[name]) or 0 for entry in self.entries if name in entry.names]

    def _vector(self, entry: Entry, name: str) -> Vector | None:
        if self.placement == "disk" and entry.vector.rank(name) is None:
            return Streamed(entry.vector, name, entry.name)
        key = (entry.digest, entry.places, name, self.dtype, self.placement)
        found = _SHARED.get(key)
        if found is None:
            found = self._read(entry, name)
            if found is not None:
                _SHARED[key] = found
        return found

    def _read(self, entry: Entry, name: str) -> Vector | None:
        factors = entry.vector.factors(name)
        values = [*factors] if factors is not None else [entry.vector[name].reshape(-1)]
        if not all(bool(torch.isfinite(value).all()) for value in values):
            raise InputError(_not_finite(entry.name, name))
        if factors is not None:
            return LowRank(*factors)
        dense = values[0]
        if not dense.any():
            return None
        follows = self.placement == "device"
        scale = float(dense.abs().max()) if self.dtype == torch.float16 else 1.0  # 1e-5 is a subnormal number there
        kept = (dense / scale if scale != 1.0 else dense).to(self.dtype)
        if self.placement == "cpu" and torch.cuda.is_available():
            kept = kept.pin_memory()  # else a part that is sent to the device is copied twice, and the host waits for it
        return Dense(kept, scale, follows)


def open_pool(
    sources: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    others: Collection[str] = (),
    base: str | None = None,
    config: Mapping[str, Any] | None = None,
    strict: bool = True,
) -> list[Entry]:
    """Open task vectors and match them with a model, by names and shapes; no value is read.

    Args:
        sources: name -> a reference (`Reference.parse`), or `{"path": ..., "revision": ..., "base": ...}`.
        shapes: parameter of the model -> its shape.
        others: names of the model that are not composed: running statistics, modules that are trained whole.
        base: the base of whole models among them.
        config: of the model, config.json, for architectures that are saved under older names.
        strict: refuse tensors that fit no parameter; else they are left out.

    Raises:
        InputError: a vector that is not there, is damaged, fits no parameter, or has another shape. Names the vector.
    """
    model = _Model(shapes, frozenset(others), base, config or {}, strict)
    return [_open(name, source, model) for name, source in sources.items()]


@dataclass(frozen=True)
class _Model:
    shapes: Mapping[str, tuple[int, ...]]
    others: frozenset[str]
    base: str | None
    config: Mapping[str, Any]
    strict: bool


def _open(name: str, given: Any, model: _Model) -> Entry:
    given = copy.deepcopy(given)
    own_base = given.pop("base", None) if isinstance(given, dict) else None
    try:
        source = open_source(given)
        needed = own_base or (model.base if source.full is not None or _needs_its_base(source) else None)
        if source.full is not None and needed is None:
            raise InputError(
                f"{source.reference} is a whole model, and its base is not known. Give `base`, or save the difference first: "
                f"`peft-subspace extract {source.reference} OUT --base BASE`."
            )
        base_source = None if needed is None else open_source(needed)
        vector = TaskVector.of_source(without_base(source, base_source), base_source)
        beside = _beside(source, base_source, model)
        vector, names = _matched(vector, model)
        for part in source.checkpoints if model.strict else ():
            if declared := made_for_another(part, str(own_base or model.base or "")):
                warnings.warn(
                    f"The task vector {name!r} says that it was made for {declared!r}, and the base here is "
                    f"{own_base or model.base!r}. Check that they are the same.",
                    stacklevel=2,
                )
    except InputError as error:
        raise InputError(f"The task vector {name!r}: {error}") from error
    parts = [*source.checkpoints, *(() if base_source is None else base_source.checkpoints)]
    return Entry(name, vector, names, record_of(name, source, base_source), _places(parts), beside)


def _beside(source: Source, base: Source | None, model: _Model) -> tuple[str, ...]:
    if base is None or base.full is None:
        return ()
    known, aliases = with_ties(base.full.tensors, base.full.config)
    _, _, extra = given_by(source, known, config=base.full.config, aliases=aliases)
    names = [name for name in (*extra, *extra_saved(source, known)) if not is_buffer(name)]
    return tuple(sorted({name for name in names if name in model.shapes}))


def _places(parts: Sequence[Checkpoint]) -> tuple[Any, ...]:
    """The very files, by which vectors in memory are known: two that look the same in their samples are two all the same."""
    return tuple((str(file.path.resolve()), file.stamp) for part in parts for file in part.files)


def _needs_its_base(source: Source) -> bool:
    """Whether an adapter's update is made of the base's own weights (SVFit, DoRA, PiSSA), or has whole modules (a head)."""
    adapters = [read_adapter(part) for part in source.checkpoints if part.kind == "adapter"]
    return any(adapter.saved or any(d.shape is None for d in adapter.deltas.values()) for adapter in adapters)


def _matched(vector: TaskVector, model: _Model) -> tuple[TaskVector, dict[str, str]]:
    """The vector, its pieces put together where the model has them fused; parameter of the model -> name in the vector."""
    known = {*model.shapes, *model.others}
    found = match_names(list(vector.shapes), known, vector.base_name or "it")
    lost = [name for name in vector.shapes if name not in found and not is_buffer(name)]
    if lost and model.config:
        renamed = {stored: new for new, stored in names_in_memory(vector.shapes, model.config).items() if new in known}
        found |= {stored: new for stored, new in renamed.items() if stored not in found}
        lost = [name for name in lost if name not in found]
    if lost and model.config:
        sizes = {name: header.shape for name, header in vector.base.items()} or dict(vector.shapes)
        pieces = {name: one for name, one in pieces_in_memory(sizes, model.config).items() if name in model.shapes}
        vector = joined(vector, pieces, model.shapes)
        found |= {name: name for name in pieces if name in vector.shapes}
        lost = [name for name in lost if name in vector.shapes]
    names = {ours: theirs for theirs, ours in found.items() if ours in model.shapes}
    if not names or (lost and model.strict):
        raise InputError(
            f"{len(lost)} of its {len(vector.shapes)} tensors {'is a parameter' if len(lost) == 1 else 'are parameters'} of no "
            f"layer of this model: {shortened(lost)}. "
            f"The vector was made on another model, or such tensors stand on the model itself, outside of its layers, where "
            f"they cannot be composed, or transformers makes other parameters of them on loading. strict=False leaves them out."
        )
    wrong = [name for name, theirs in names.items() if vector.shapes[theirs] != model.shapes[name]]
    if wrong:
        pairs = [f"{name!r} is {list(vector.shapes[names[name]])}, in the model {list(model.shapes[name])}" for name in wrong]
        others = counted(len(wrong), "tensor has another shape", "tensors have other shapes")
        raise InputError(f"{others} than in the model: {shortened(pairs)}.")
    return vector, names


def reference_text(source: Any) -> str:
    """A pool's source as a text for cards: Hub ids as they are, of a local path its last part."""
    given = {key: value for key, value in source.items() if key != "base"} if isinstance(source, dict) else source
    reference = Reference.parse(given)
    local = {name: name if HUB_ID.fullmatch(name) else Path(name).name for name in (reference.model, reference.lora) if name}
    return str(replace(reference, model=local[reference.model], lora=local.get(reference.lora or "")))
