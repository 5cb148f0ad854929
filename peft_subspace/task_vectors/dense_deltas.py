"""Updates of LoRA adapters that have no low rank as a matrix: DoRA, and LoRA on stacks of experts. Computed by rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .deltas import Delta, LoraDelta, Read, columns_of
from .errors import InputError
from .headers import ITEM_SIZES, TensorHeader
from .lora_starts import ResidualDelta, oriented

if TYPE_CHECKING:
    from torch import Tensor

PASS = 2**20  # values that are read at a time for the norms of columns


@dataclass(frozen=True)
class DoraDelta:
    """diag(m / n) (W + s B A) - W, n the norm of each output's row of W + s B A: a DoRA adapter on one weight.

    Attributes:
        owner: the adapter and the layer, for errors.
        lora: s B A, less what it took out of W when it was initialised.
        magnitude: m, as many values as the layer has outputs (an embedding: values of a token).
        weight: W in the base's file; None until the base is known.

    Source: DoRA (arXiv:2402.09353), equation 5, and PEFT's `lora.dora`, which takes the norms of an embedding over its tokens.
    """

    owner: str
    lora: LoraDelta | ResidualDelta
    magnitude: TensorHeader
    weight: TensorHeader | None = None

    @property
    def shape(self) -> tuple[int, ...] | None:
        return None if self.weight is None else self.weight.shape

    @property
    def headers(self) -> tuple[TensorHeader, ...]:
        own = (*self.lora.headers, self.magnitude)
        return own if self.weight is None else (*own, self.weight)

    @property
    def columns(self) -> int:
        assert self.weight is not None
        return columns_of(self.weight.shape)

    def on(self, weight: TensorHeader) -> DoraDelta:
        """The same on this weight.

        Raises:
            InputError: the weight has another shape than the one that the adapter was trained on.
        """
        lora = self.lora.on(weight) if isinstance(self.lora, ResidualDelta) else oriented(self.lora, weight.shape)
        outputs = weight.shape[1 if lora and lora.transposed else 0] if len(weight.shape) > 1 else 0
        if lora is None or self.magnitude.count != outputs:
            raise InputError(
                f"{self.owner}: its delta {list(self.lora.shape or ())} and its magnitudes {list(self.magnitude.shape)} do not "
                f"fit the weight {list(weight.shape)}."
            )
        return replace(self, lora=lora, weight=weight)

    def row_reader(self, read: Read) -> Callable[[int, int], Tensor]:
        """Function (first, stop) -> rows `[stop - first, columns]` in float32.

        Cost: a read of W and 2 r rows columns flops; where the weight is stored as `[in, out]` both once more, for the norms.
        """
        import torch

        assert self.weight is not None
        weight = self.weight
        left, right = self.lora.factors(read)
        magnitude = read(self.magnitude).float().reshape(-1)

        def parts(first: int, stop: int) -> tuple[Tensor, Tensor]:
            own = read(rows_of(weight, first, stop)).float().flatten(1)
            return own, own + left[first:stop] @ right

        if not self.lora.transposed:

            def rows(first: int, stop: int) -> Tensor:
                own, changed = parts(first, min(stop, weight.shape[0]))
                factor = magnitude[first:stop] / torch.linalg.vector_norm(changed, dim=1)
                return changed * factor[:, None] - own

            return rows
        squares = torch.zeros(self.columns, dtype=torch.float64)
        step = max(1, PASS // self.columns)
        for first in range(0, weight.shape[0], step):
            squares += parts(first, min(first + step, weight.shape[0]))[1].double().square().sum(0)
        factors = magnitude / squares.sqrt().float()

        def scaled(first: int, stop: int) -> Tensor:
            own, changed = parts(first, min(stop, weight.shape[0]))
            return changed * factors - own

        return scaled


@dataclass(frozen=True)
class ParameterDelta:
    """LoRA on a bare parameter (`target_parameters`), before it is known which parameter it is and how that is stored.

    Attributes:
        owner: the adapter and the layer, for errors.
        down: A `[experts r, in]`.
        up: B `[out, r experts]`.
        r: rank of each expert's update.
        scale: lora_alpha / r, or lora_alpha / sqrt(r).
    """

    owner: str
    down: TensorHeader
    up: TensorHeader
    r: int
    scale: float

    @property
    def shape(self) -> None:
        return None

    @property
    def headers(self) -> tuple[TensorHeader, ...]:
        return self.down, self.up

    @property
    def experts(self) -> int:
        return self.down.shape[0] // self.r

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a parameter of this shape, `[out, in]`, `[experts, out, in]` or `[experts, in, out]`, may be meant."""
        pair = (self.up.shape[0], self.down.shape[1])
        return (self.experts == 1 and shape == pair) or (
            len(shape) == 3 and shape[0] == self.experts and shape[1:] in (pair, pair[::-1])
        )

    def on(self, weight: TensorHeader) -> Delta:
        """The update of this parameter.

        Raises:
            InputError: another shape, or a stack of square matrices: `[out, in]` and `[in, out]` look the same there.
        """
        if not self.fits(weight.shape):
            raise InputError(
                f"{self.owner}: A {list(self.down.shape)} and B {list(self.up.shape)} of rank {self.r} do not fit the "
                f"parameter {weight.name!r} {list(weight.shape)}."
            )
        if len(weight.shape) == 2:
            return LoraDelta(self.down, self.up, self.scale)
        if weight.shape[1] == weight.shape[2]:
            raise InputError(
                f"{self.owner}: {weight.name!r} {list(weight.shape)} is a stack of square matrices, and neither file says "
                f"whether they are [out, in] or [in, out]. Merge the adapter into its model first "
                f"(`model.merge_and_unload().save_pretrained(...)`) and give that model instead."
            )
        return ExpertsDelta(self.down, self.up, self.scale, weight.shape)


@dataclass(frozen=True)
class ExpertsDelta:
    """scale B_e A_e for each expert e of a stack `[experts, out, in]` or `[experts, in, out]`.

    A holds the experts one after the other; in B the experts change fastest, as in PEFT's `ParamWrapper`.
    """

    down: TensorHeader
    up: TensorHeader
    scale: float
    shape: tuple[int, ...]

    @property
    def headers(self) -> tuple[TensorHeader, ...]:
        return self.down, self.up

    @property
    def columns(self) -> int:
        return self.shape[2]

    def row_reader(self, read: Read) -> Callable[[int, int], Tensor]:
        """Function (first, stop) -> rows `[stop - first, columns]` in float32, of all experts' rows one after the other."""
        import torch

        experts, height, _ = self.shape
        down = read(self.down).float().reshape(experts, -1, self.down.shape[1])
        up = read(self.up).float().reshape(self.up.shape[0], -1, experts).permute(2, 0, 1) * self.scale
        left, right = (up, down) if self.up.shape[0] == height else (down.transpose(1, 2), up.transpose(1, 2))

        def rows(first: int, stop: int) -> Tensor:
            found = []
            for expert in range(first // height, -(-min(stop, experts * height) // height)):
                low, high = max(first - expert * height, 0), min(stop - expert * height, height)
                found.append(left[expert, low:high] @ right[expert])
            return torch.cat(found)

        return rows


def rows_of(header: TensorHeader, first: int, stop: int) -> TensorHeader:
    """Some rows of a stored tensor, as a tensor of its own."""
    width = math.prod(header.shape[1:])
    offset = header.offset + first * width * ITEM_SIZES[header.dtype]
    return replace(header, shape=(stop - first, *header.shape[1:]), offset=offset)
