"""Updates of parameters that a file has in pieces: stacks of experts, which transformers puts together on loading."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .deltas import Read
from .headers import TensorHeader

if TYPE_CHECKING:
    from torch import Tensor

    from .models import Given
    from .task_vector import TaskVector


@dataclass(frozen=True)
class Piece:
    """One tensor of the file.

    Attributes:
        given: what the model brings to it; None for nothing.
        base: the base's; None where it is not needed.
        rows: of it, as rows of the whole.
    """

    given: Given | None
    base: TensorHeader | None
    rows: int


@dataclass(frozen=True)
class JoinedDelta:
    """What a model adds to a parameter that is the tensors of its file one after the other."""

    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]

    @property
    def headers(self) -> tuple[TensorHeader, ...]:
        given = tuple(header for piece in self.pieces if piece.given is not None for header in piece.given.headers)
        return given + tuple(piece.base for piece in self.pieces if piece.base is not None)

    @property
    def columns(self) -> int:
        return self.shape[-1]

    def row_reader(self, read: Read) -> Callable[[int, int], Tensor]:
        """Function (first, stop) -> rows `[stop - first, columns]` in float32, of all pieces one after the other."""
        import torch

        from .reading import GivenReader, Reader

        reader = Reader()
        open_now: dict[int, GivenReader] = {}  # one piece at a time: factors of the others are not held

        def values(number: int, start: int, stop: int) -> Tensor:
            piece = self.pieces[number]
            if piece.given is None:
                return torch.zeros(stop - start)
            if number not in open_now:
                open_now.clear()
                open_now[number] = GivenReader(piece.given, torch.float32, reader, 1)
            one = open_now[number]
            if one.is_delta:
                return one.part(start, stop, None).to(torch.float32, copy=True)  # the reader's buffer is used again
            assert piece.base is not None  # whole models have one
            base = reader.stored(piece.base, start, stop, 0).float()
            return one.part(start, stop, base).float() - base

        def rows(first: int, stop: int) -> Tensor:
            found, before = [], 0
            for number, piece in enumerate(self.pieces):
                low, high = max(first - before, 0), min(stop - before, piece.rows)
                if low < high:
                    found.append(values(number, low * self.columns, high * self.columns).reshape(-1, self.columns))
                before += piece.rows
            return torch.cat(found)

        return rows


def joined(vector: TaskVector, layouts: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]]) -> TaskVector:
    """The same vector with parameters as they are in memory in place of their pieces.

    Args:
        vector: with the names of files.
        layouts: parameter -> the tensors that it consists of, in their order.
        shapes: parameter -> its shape in memory.

    Returns:
        The vector, without the parameters whose pieces do not fit.
    """
    sizes = {name: header.shape for name, header in vector.base.items()} or dict(vector.shapes)
    fitting = {
        name: pieces
        for name, pieces in layouts.items()
        if all(piece in sizes and sizes[piece][-1:] == shapes[name][-1:] for piece in pieces)
        and sum(_rows(sizes[piece], shapes[name][-1]) for piece in pieces) * shapes[name][-1] == _count(shapes[name])
        and any(piece in vector.shapes for piece in pieces)
    }
    gone = {piece for pieces in fitting.values() for piece in pieces}
    terms = []
    for weight, given in vector.terms:
        kept = {name: one for name, one in given.items() if name not in gone}
        for name, pieces in fitting.items():
            parts = tuple(Piece(given.get(p), vector.base.get(p), _rows(sizes[p], shapes[name][-1])) for p in pieces)
            if any(part.given is not None for part in parts):
                kept[name] = _given(JoinedDelta(parts, shapes[name]))
        terms.append((weight, kept))
    own = {name: shape for name, shape in vector.shapes.items() if name not in gone}
    return replace(vector, shapes=own | {name: shapes[name] for name in fitting}, terms=tuple(terms))


def _given(delta: JoinedDelta) -> Given:
    from .models import Given

    return Given(None, (delta,))


def _count(shape: tuple[int, ...]) -> int:
    return _rows(shape, 1)


def _rows(shape: tuple[int, ...], columns: int) -> int:
    count = 1
    for size in shape:
        count *= size
    return count // columns
