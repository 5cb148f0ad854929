"""What a model adds to one weight of the base: known by its headers when a merge is planned, computed when it runs.

Every delta looks at the base's tensor as a matrix, `[rows, columns]` with rows = its first mode, and is a product
`left right` where it has low rank: nothing dense is made but the rows that are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from .headers import TensorHeader

if TYPE_CHECKING:
    from torch import Tensor

Read = Callable[[TensorHeader], "Tensor"]  # the values of a whole tensor, in its own dtype and shape


class Delta(Protocol):
    """What is added to a weight."""

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of the weight that it fits; None if any weight of as many values does."""

    @property
    def headers(self) -> tuple[TensorHeader, ...]:
        """The tensors that it is made of."""


@dataclass(frozen=True)
class StoredDelta:
    """theta_k - theta_0 as it is, in a task-vector file."""

    header: TensorHeader

    @property
    def shape(self) -> tuple[int, ...]:
        return self.header.shape

    @property
    def headers(self) -> tuple[TensorHeader, ...]:
        return (self.header,)


@dataclass(frozen=True)
class LoraDelta:
    """scale B A, of a LoRA adapter or of a low-rank task vector.

    Attributes:
        down: A, `[r, in]`, `[r, in, *kernel]` of a convolution, `[r, rows]` of an embedding.
        up: B, `[out, r]`, `[out, r, 1, ...]` of a convolution, `[dim, r]` of an embedding.
        scale: lora_alpha / r, or lora_alpha / sqrt(r).
        transposed: the weight is stored as `[in, out]` (GPT-2's Conv1D, an embedding).
    """

    down: TensorHeader
    up: TensorHeader
    scale: float
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = (self.up.shape[0], *self.down.shape[1:])
        return shape[::-1] if self.transposed else shape

    @property
    def headers(self) -> tuple[TensorHeader, ...]:
        return self.down, self.up

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def factors(self, read: Read) -> tuple[Tensor, Tensor]:
        """left `[rows, r]` and right `[r, columns]` in float32; the scale is inside of left."""
        down, up = read(self.down).float().flatten(1), read(self.up).float().flatten(1)
        left, right = (down.t(), up.t()) if self.transposed else (up, down)
        return left * self.scale, right


@dataclass(frozen=True)
class TuckerDelta:
    """scale * G x_n U_n, of a FLoRA adapter.

    Attributes:
        core: G `[r_0, ..., r_{N-1}]`.
        modes: U_n `[d_n, r_n]` for every mode, None where the core has its full size.
        scale: s.
        swapped: the weight is stored with its first two modes the other way round.
    """

    core: TensorHeader
    modes: tuple[TensorHeader | None, ...]
    scale: float
    swapped: bool = False

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        """`[out, in, *kernel]`."""
        pairs = zip(self.modes, self.core.shape, strict=True)
        return tuple(size if mode is None else mode.shape[0] for mode, size in pairs)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.canonical_shape
        return (shape[1], shape[0], *shape[2:]) if self.swapped else shape

    @property
    def headers(self) -> tuple[TensorHeader, ...]:
        return self.core, *(mode for mode in self.modes if mode is not None)

    @property
    def rank(self) -> int:
        return self.core.shape[1 if self.swapped else 0]

    def factors(self, read: Read) -> tuple[Tensor, Tensor]:
        """left `[rows, r]` and right `[r, columns]` in float32; the scale is inside of right."""
        import torch

        from ..functional.tucker import reconstruct

        core = read(self.core).double() * self.scale
        factors = [None if mode is None else read(mode).double() for mode in self.modes]
        if self.swapped:
            core, factors[:2] = core.transpose(0, 1), factors[1::-1]
        left = torch.eye(core.shape[0], dtype=core.dtype) if factors[0] is None else factors[0]
        return left.float(), reconstruct(core, [None, *factors[1:]]).reshape(core.shape[0], -1).float()


@runtime_checkable
class LowRank(Delta, Protocol):
    """A delta that is a product `left right`."""

    @property
    def rank(self) -> int:
        """Columns of left."""

    def factors(self, read: Read) -> tuple[Tensor, Tensor]:
        """left `[rows, r]` and right `[r, columns]` in float32."""


@runtime_checkable
class OnWeight(Protocol):
    """A delta that is made of the base's own weight, and complete when that is known."""

    def on(self, weight: TensorHeader) -> Delta:
        """The same on this weight; an InputError if it does not fit."""


@runtime_checkable
class ByRows(Delta, Protocol):
    """A dense delta of which any rows can be computed by themselves."""

    @property
    def columns(self) -> int:
        """Length of a row."""

    def row_reader(self, read: Read) -> Callable[[int, int], Tensor]:
        """Function (first, stop) -> rows `[stop - first, columns]` in float32; `stop` may be past the end."""


def columns_of(shape: tuple[int, ...]) -> int:
    """Columns of a weight that is looked at as a matrix of its first mode."""
    return math.prod(shape[1:])
