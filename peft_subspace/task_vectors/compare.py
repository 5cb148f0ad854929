"""Task vectors side by side: norms, cosines, sign conflict, density, spectrum. One pass over the models, a part at a time."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .deltas import columns_of
from .errors import InputError
from .headers import TensorHeader
from .reading import read_tensor
from .task_vector import TaskVector, count_conflicts

LIMIT = 0.7  # norm of the difference over the norm of the base; two models that have nothing in common are at 1.4
_LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass
class Comparison:
    """What a few task vectors have in common.

    Attributes:
        names: of the models.
        blocks: block of the model -> dot products `[K, K]` of the task vectors there.
        base: block -> squared norm of the base there; empty without a base.
        conflicts: entries where signs differ, and entries where at least two vectors are not zero.
        nonzero: for each model, entries that are not zero.
        count: entries of all tensors.
        spectra: tensor -> singular values of each model's delta, if they were asked for.
    """

    names: list[str]
    blocks: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, float] = field(default_factory=dict)
    conflicts: tuple[int, int] = (0, 0)
    nonzero: list[int] = field(default_factory=list)
    count: int = 0
    spectra: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def dots(self) -> Tensor:
        """Dot products over all blocks, `[K, K]`."""
        return torch.stack(list(self.blocks.values())).sum(0)

    @property
    def norms(self) -> list[float]:
        """Norm of every task vector."""
        return [math.sqrt(float(value)) for value in self.dots.diagonal()]

    @property
    def cosines(self) -> Tensor:
        """`[K, K]`; 0 where a vector is zero."""
        return cosines_of(self.dots)

    @property
    def relative(self) -> list[float]:
        """Norm of every task vector over that of the base, 0 without one."""
        total = math.sqrt(math.fsum(self.base.values()))
        return [norm / total if total else 0.0 for norm in self.norms]

    @property
    def sign_conflict(self) -> float:
        """Share of the entries that at least two vectors change where they disagree about the sign."""
        return self.conflicts[0] / self.conflicts[1] if self.conflicts[1] else 0.0

    @property
    def density(self) -> list[float]:
        """Share of the entries that a model changes."""
        return [number / self.count if self.count else 0.0 for number in self.nonzero]


def cosines_of(dots: Tensor) -> Tensor:
    """Cosines from dot products."""
    norms = dots.diagonal().clamp_min(0).sqrt()
    product = norms[:, None] * norms
    return torch.where(product > 0, dots / product.where(product > 0, torch.ones(())), torch.zeros((), dtype=dots.dtype))


def block_of(name: str) -> str:
    """The layer of a tensor, such as `model.layers.3`; its first two parts outside of layers."""
    match = _LAYER.match(name)
    return match[1] if match else ".".join(name.split(".")[:2])


def relative_norms(tensors: Iterable[tuple[str, Tensor, Tensor]]) -> dict[str, float]:
    """Block -> norm of the difference over that of the base, of blocks where the base is not zero.

    Args:
        tensors: name, values of the base, and the difference from them; each is used before the next is asked for.
    """
    squares: dict[str, list[float]] = {}
    for name, base, difference in tensors:
        block = squares.setdefault(block_of(name), [0.0, 0.0])
        block[0] += float(base.double().square().sum())
        block[1] += float(difference.double().square().sum())
    return {block: math.sqrt(difference / base) for block, (base, difference) in squares.items() if base > 0}


def unlike_base(found: Mapping[str, float], base: object) -> str | None:
    """What to say of a model that is no fine-tuned version of its base; None if it looks like one.

    Args:
        found: block -> norm of the difference over that of the base. One alone, such as a trained head, says nothing, nor does
            one that is not finite: such values are damage, which is looked for elsewhere.
        base: what the base is called.
    """
    known = {block: norm for block, norm in found.items() if math.isfinite(norm)}
    if len(known) < 2 or (median := statistics.median(known.values())) <= LIMIT:
        return None
    worst = sorted(known, key=known.__getitem__, reverse=True)[:3]
    return (
        f"does not look like a fine-tuned {base}: the difference is {median:.2f} times as large as the base (worst: "
        f"{', '.join(f'{block} {known[block]:.2f}' for block in worst)})"
    )


def compare(
    vectors: Sequence[TaskVector],
    names: Sequence[str],
    *,
    spectrum: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Measure task vectors on one base; tensors that a vector lacks count as zero.

    Args:
        vectors: K of them.
        names: what they are called.
        spectrum: take the singular values of every matrix too, which needs it whole.
        progress: called with bytes that were looked at (4 per value of a tensor).

    Raises:
        InputError: with `spectrum`, a matrix with values that are NaN or infinite, which has no singular values.
    """
    found = Comparison(list(names), nonzero=[0] * len(vectors))
    shapes: dict[str, tuple[int, ...]] = {}
    for vector in vectors:
        shapes.update(vector.shapes)
    base = vectors[0].base
    for name, shape in shapes.items():
        block = found.blocks.setdefault(block_of(name), torch.zeros(len(vectors), len(vectors), dtype=torch.float64))
        for values in _parts(vectors, name, shape):
            stacked = torch.stack(values).double()
            block += stacked @ stacked.t()
            conflicts, shared = count_conflicts(values)
            found.conflicts = found.conflicts[0] + conflicts, found.conflicts[1] + shared
            found.nonzero = [before + int((one != 0).sum()) for before, one in zip(found.nonzero, values, strict=True)]
            if progress is not None:
                progress(4 * values[0].numel())
        found.count += math.prod(shape)
        if name in base:
            found.base[block_of(name)] = found.base.get(block_of(name), 0.0) + _squared_norm(base[name])
        if spectrum and len(shape) > 1:
            found.spectra[name] = [_singular_values(one, owner, name) for one, owner in zip(vectors, names, strict=True)]
    return found


def _parts(vectors: Sequence[TaskVector], name: str, shape: tuple[int, ...]) -> Iterator[list[Tensor]]:
    absent = [name not in vector.shapes for vector in vectors]
    for parts in zip(*(v.parts(name) for v, none in zip(vectors, absent, strict=True) if not none), strict=True):
        there = iter(values for _, values in parts)
        length = parts[0][1].numel()
        yield [torch.zeros(length) if none else next(there) for none in absent]


def _squared_norm(header: TensorHeader) -> float:
    return float(read_tensor(header).double().square().sum())


def _singular_values(vector: TaskVector, owner: str, name: str) -> Tensor:
    """Of a low-rank delta by QR of its factors, of another by an SVD of the whole."""
    if name not in vector.shapes:
        return torch.zeros(0)
    factors = vector.factors(name)
    matrices = (vector[name].reshape(-1, columns_of(vector.shapes[name])),) if factors is None else factors
    if not all(bool(matrix.isfinite().all()) for matrix in matrices):
        raise InputError(
            f"{owner}: {name!r} has values that are NaN or infinite, and so no singular values. Use an undamaged model, or "
            f"leave --spectrum out."
        )
    if factors is None:
        return torch.linalg.svdvals(matrices[0])
    left, right = torch.linalg.qr(factors[0].double())[1], torch.linalg.qr(factors[1].double().t())[1]
    return torch.linalg.svdvals(left @ right.t())
