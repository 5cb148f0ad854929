"""A task vector: tau = theta - theta_0, lazily, with its algebra."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .deltas import LowRank
from .errors import InputError
from .headers import TensorHeader, read_header
from .models import (
    A_SUFFIX,
    ALL,
    APART_KEY,
    B_SUFFIX,
    Given,
    Source,
    alone,
    given_by,
    open_source,
    task_vector_deltas,
    without_base,
)
from .readers import read_adapter
from .reading import GivenReader, Reader, read_tensor
from .references import Reference
from .sources import FORMAT_KEY, TASK_VECTOR, fingerprint, is_float
from .ties import with_ties
from .validate import other_architecture
from .writing import CODES, Entries, write_file

CHUNK = 2**20  # values that are in memory at a time


@dataclass(frozen=True)
class TaskVector:
    """tau = sum_i w_i tau_i, where each tau_i is what one model adds to the base. Nothing is read before it is asked for.

    Low-rank vectors stay of low rank: sums of LoRA adapters are kept, saved and measured by their factors.

        tau = TaskVector.open("me/llama-math", base="meta/llama") - 0.5 * TaskVector.open("me/llama-rude-lora")
        tau.save("math-not-rude.safetensors")
        mean = sum([first, second, third]) / 3

    Attributes:
        shapes: name of each tensor -> its shape.
        terms: (w_i, name -> what model i gives).
        base: tensors of the base; empty if all models are adapters or task-vector files.
        base_name: what the base is called in a saved file.
        tied: name of a tied tensor that has no entry of its own -> the one whose change is its change, too.
        apart: names of tensors that change alone: an adapter on an embedding leaves the output head that is tied to it as it
            is, while a whole model changes both.
    """

    shapes: Mapping[str, tuple[int, ...]]
    terms: tuple[tuple[float, Mapping[str, Given]], ...]
    base: Mapping[str, TensorHeader] = field(default_factory=dict, repr=False)
    base_name: str = ""
    tied: Mapping[str, str] = field(default_factory=dict, repr=False)
    apart: frozenset[str] = frozenset()

    __array_ufunc__ = None  # a number of numpy leaves the product to us, instead of looking for an array in here

    @classmethod
    def open(
        cls, model: str | os.PathLike[str] | Reference, base: str | os.PathLike[str] | Reference | None = None
    ) -> TaskVector:
        """Open a fine-tuned model, an adapter or a task-vector file, by its headers.

        Args:
            model: a folder, a file, a Hub id, `model@revision`, `model+lora`.
            base: the model that it was made from; needed for whole models, and for adapters with whole modules in them.

        Raises:
            InputError: something is damaged, or does not fit the base; says what differs.
        """
        own = None if base is None else open_source(_reference(base))
        return cls.of_source(without_base(open_source(_reference(model)), own), own)

    @classmethod
    def of_source(cls, source: Source, base: Source | None) -> TaskVector:
        """The task vector of an opened model; tensors that are no floats are left out."""
        if base is None:
            given = _alone(source)
            shapes = {name: _shape(one) for name, one in given.items()}
            return cls(shapes, ((1.0, given),), apart=alone(source, set(given)))
        if base.full is None:
            raise InputError(f"{base.reference} is an adapter or a task vector and no base.")
        known, aliases = with_ties(base.full.tensors, base.full.config)
        given, missing, extra = given_by(source, known, config=base.full.config, aliases=aliases)
        given = {name: one for name, one in given.items() if is_float(known[name])}
        if not given and source.full is not None:
            names = str(source.reference), source.full.config, base.full.name, base.full.config
            raise other_architecture(*names, 0, len(known))
        tied = {alias: stored for alias, stored in aliases.items() if given.get(alias) == given.get(stored)}
        given = {name: one for name, one in given.items() if name not in tied}
        if not given:
            raise InputError(f"{source.reference}: none of its {len(missing) + len(extra)} tensors is in {base.reference}.")
        shapes = {name: known[name].shape for name in known if name in given}
        tied = {alias: stored for alias, stored in tied.items() if stored in given}
        apart = alone(source, {*aliases, *aliases.values()} & given.keys()) - set(tied.values())
        return cls(shapes, ((1.0, given),), known, str(base.reference), tied, apart)

    def __add__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        pairs = {*self.tied.items(), *other.tied.items()}
        first, second = self._with_entries(pairs, other), other._with_entries(pairs, self)
        if (first, second) != (self, other):
            return first + second
        shapes = dict(self.shapes)
        for name, shape in other.shapes.items():
            if shapes.setdefault(name, shape) != shape:
                raise InputError(f"{name!r} is {list(shapes[name])} in one task vector and {list(shape)} in the other.")
        if self.base and other.base and not _same_base(self.base, other.base):
            raise InputError(
                f"these task vectors have two bases, {self.base_name!r} and {other.base_name!r}: they cannot be added."
            )
        base, name = self.base or other.base, self.base_name or other.base_name
        return TaskVector(shapes, self.terms + other.terms, base, name, {**self.tied, **other.tied}, self.apart | other.apart)

    def _with_entries(self, pairs: Iterable[tuple[str, str]], other: TaskVector) -> TaskVector:
        """The same vector with an entry of its own for each tied name that it changes and another vector does not change so."""
        found = {
            alias: name
            for pair in pairs
            for alias, name in (pair, pair[::-1])
            if alias not in self.shapes
            and self.changes_tied(name)
            and (alias in other.shapes or (name in other.shapes and not other.changes_tied(name)))
        }
        shapes = {**self.shapes, **{alias: self.shapes[name] for alias, name in found.items()}}
        terms = tuple(
            (weight, {**given, **{alias: given[name] for alias, name in found.items() if name in given}})
            for weight, given in self.terms
        )
        return replace(self, shapes=shapes, terms=terms, tied={k: v for k, v in self.tied.items() if k not in found})

    def changes_tied(self, name: str) -> bool:
        """Whether a tensor's change is that of all tensors that are tied to it and have no entry."""
        return name in self.shapes and name not in self.apart

    def __radd__(self, other: int) -> TaskVector:
        """0 + tau, with which `sum` begins."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            return NotImplemented
        return self + -1.0 * other

    def __mul__(self, factor: float) -> TaskVector:
        if isinstance(factor, bool) or not isinstance(factor, Real):  # numpy's numbers are some, too
            return NotImplemented
        return replace(self, terms=tuple((weight * float(factor), given) for weight, given in self.terms))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> TaskVector:
        if isinstance(divisor, bool) or not isinstance(divisor, Real):
            return NotImplemented
        return replace(self, terms=tuple((weight / float(divisor), given) for weight, given in self.terms))

    def __neg__(self) -> TaskVector:
        return -1.0 * self

    def is_whole(self, name: str) -> bool:
        """Whether a model gives a tensor's own values, not a change of them."""
        return any(name in given and given[name].values is not None for _, given in self.terms)

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, dense, in float32 and its own shape."""
        parts = [part for _, part in self.parts(name)]
        return torch.cat(parts).reshape(self.shapes[name]) if parts else torch.zeros(self.shapes[name])

    def parts(self, name: str, chunk: int = CHUNK) -> Iterator[tuple[int, Tensor]]:
        """One tensor in flat parts `(start, values)` in float32, which are good until the next."""
        reader, slot = Reader(), 1
        readers = []
        for weight, given in self.terms:
            if name in given:
                readers.append((weight, GivenReader(given[name], torch.float32, reader, slot)))
                slot += readers[-1][1].slots
        needs_base = any(not one.is_delta for _, one in readers)
        count = math.prod(self.shapes[name])
        for start in range(0, count, chunk):
            stop = min(start + chunk, count)
            base = reader.stored(self.base[name], start, stop, 0).float() if needs_base else None
            total = torch.zeros(stop - start)
            for weight, one in readers:
                values = one.part(start, stop, base).float()
                total += weight * (values if one.is_delta or base is None else values - base)
            yield start, total

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        """left `[rows, r]`, right `[r, columns]` of one tensor, a matrix of its first mode; None if it is dense."""
        left, right = [], []
        for weight, given in self.terms:
            one = given.get(name, Given())
            if one.values is not None or not all(isinstance(delta, LowRank) for delta in one.deltas):
                return None
            for delta in one.deltas:
                assert isinstance(delta, LowRank)
                up, down = delta.factors(read_tensor)
                left.append(up * weight)
                right.append(down)
        return (torch.cat(left, dim=1), torch.cat(right)) if left else None

    def rank(self, name: str) -> int | None:
        """Columns of the factors of one tensor; None if it is dense."""
        deltas = [delta for _, given in self.terms for delta in given.get(name, Given()).deltas]
        if any(name in given and given[name].values is not None for _, given in self.terms):
            return None
        if not deltas or not all(isinstance(delta, LowRank) for delta in deltas):
            return None
        return sum(delta.rank for delta in deltas if isinstance(delta, LowRank))

    def dot(self, other: TaskVector) -> float:
        """sum of tau * other over all tensors, in float64; by the factors where both have some."""
        return math.fsum(self._dot(other, name) for name in self.shapes if name in other.shapes)

    def _dot(self, other: TaskVector, name: str) -> float:
        mine, theirs = self.factors(name), other.factors(name)
        if mine is not None and theirs is not None:
            (left, right), (left2, right2) = ((a.double(), b.double()) for a, b in (mine, theirs))
            return float(((left.t() @ left2) * (right @ right2.t())).sum())
        pairs = zip(self.parts(name), other.parts(name), strict=True)
        return math.fsum(float(a.double() @ b.double()) for (_, a), (_, b) in pairs)

    def norm(self) -> float:
        """Square root of the sum of all squared values."""
        return math.sqrt(max(0.0, self.dot(self)))

    def cosine(self, other: TaskVector) -> float:
        """tau . other / (|tau| |other|); 0 if one of them is zero. Tensors that only one of them has count as zero."""
        norms = self.norm() * other.norm()
        return self.dot(other) / norms if norms else 0.0

    def sign_conflict(self, *others: TaskVector) -> float:
        """Share of the entries, among those where at least two vectors are not zero, where not all signs are equal."""
        conflicts, shared = 0, 0
        for name in self.shapes:
            vectors = [self, *(other for other in others if name in other.shapes)]
            for parts in zip(*(vector.parts(name) for vector in vectors), strict=True):
                found = count_conflicts([values for _, values in parts])
                conflicts, shared = conflicts + found[0], shared + found[1]
        return conflicts / shared if shared else 0.0

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, *, recorded: bool = False) -> None:
        """Write a task-vector file, which `open`, recipes and `inspect` read.

        Low-rank tensors are written as `name::A` `[r, ...]` and `name::B` `[rows, r]`, the others as they are. The file
        appears when it is whole; the same vector gives the same bytes.

        Args:
            path: of the file; a task-vector file that is there is replaced, and nothing else.
            dtype: of the values.
            recorded: replace a damaged file too, as a record says that it is one.

        Raises:
            OutputError: something else stands there, or the file cannot be written.
        """
        entries: Entries = {}
        for name, shape in self.shapes.items():
            rank = self.rank(name)
            if rank is None:
                entries[name] = (CODES[dtype], shape)
            else:
                entries[name + A_SUFFIX] = (CODES[dtype], (rank, *shape[1:]))
                entries[name + B_SUFFIX] = (CODES[dtype], (shape[0], rank))
        metadata = {"format": "pt", FORMAT_KEY: TASK_VECTOR, "base": self.base_name, "version": "1"}
        if self.apart:
            metadata[APART_KEY] = ALL if self.apart == self.shapes.keys() else json.dumps(sorted(self.apart))
        values = (values.to(dtype) for name in self.shapes for values in self._written(name))
        write_file(path, entries, metadata, values, recorded=recorded)

    def _written(self, name: str) -> Iterator[Tensor]:
        factors = self.factors(name)
        if factors is None:
            yield from (values for _, values in self.parts(name))
        else:
            yield from (factors[1], factors[0])


def count_conflicts(vectors: Sequence[Tensor]) -> tuple[int, int]:
    """Entries where signs differ, and entries where at least two vectors are not zero."""
    positive = sum(((values > 0).to(torch.int16) for values in vectors), torch.zeros((), dtype=torch.int16))
    negative = sum(((values < 0).to(torch.int16) for values in vectors), torch.zeros((), dtype=torch.int16))
    return int(((positive > 0) & (negative > 0)).sum()), int((positive + negative > 1).sum())


def _same_base(mine: Mapping[str, TensorHeader], theirs: Mapping[str, TensorHeader]) -> bool:
    """Whether two bases are one, whatever they are called: the same files, or copies of them by their fingerprints."""
    if mine.keys() != theirs.keys():
        return False
    pairs = [(one, theirs[name]) for name, one in mine.items()]
    if any((one.shape, one.dtype, one.offset) != (other.shape, other.dtype, other.offset) for one, other in pairs):
        return False
    files = {(one.path, other.path) for one, other in pairs if one.path != other.path}
    return all(one.samefile(other) or fingerprint(read_header(one)) == fingerprint(read_header(other)) for one, other in files)


def _reference(name: Any) -> Reference:
    return Reference.parse(os.fspath(name) if isinstance(name, os.PathLike) else name)


def _alone(source: Source) -> dict[str, Given]:
    """What an adapter or a task-vector file gives, by its own names."""
    (part,) = source.checkpoints
    if part.kind == "model":
        raise InputError(
            f"{part.name} is a whole model: name the base that it was made from (base, on the command line --base), to take "
            f"the difference."
        )
    if part.kind == "task_vector":
        return {name: Given(None, (delta,)) for name, delta in task_vector_deltas(part).items()}
    adapter = read_adapter(part)
    if adapter.saved:
        raise InputError(
            f"{part.name}: has whole modules ({', '.join(list(adapter.saved)[:3])}): name the base, to take the difference."
        )
    unbound = [name for name, delta in adapter.deltas.items() if delta.shape is None]
    if unbound:
        raise InputError(f"{part.name}: its update of {unbound[0]!r} is made of the base's own weight: name the base.")
    return {name: Given(None, (delta,)) for name, delta in adapter.deltas.items()}


def _shape(given: Given) -> tuple[int, ...]:
    shape = given.deltas[0].shape
    assert shape is not None
    return shape
