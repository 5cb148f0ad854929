"""aTLAS: replay learned coefficients, sum_t lambda[t, pi(e)] tau_t[e]; `functional.composition` has the maths in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft_subspace.functional.choices import CONSTRAINTS, Constraint
from peft_subspace.merging.methods.registry import Inputs
from peft_subspace.task_vectors.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from peft_subspace.functional.groups import Groups
    from peft_subspace.merging.learned import Learned
    from peft_subspace.task_vectors.headers import TensorHeader


@dataclass(frozen=True)
class Coefficients:
    """lambda of one tensor.

    Args:
        values: `[T]`, or `[T, K]` with groups, float32.
        groups: pi, which of K coefficients an entry has.
    """

    values: Tensor
    groups: Groups | None = None

    @property
    def weights(self) -> list[float]:
        """The T coefficients, where there are no groups."""
        return self.values.tolist()


@dataclass(frozen=True)
class SavedCoefficients:
    """lambda of one tensor in an adapter's file.

    Args:
        header: where they are, `[T]` or `[T, K]`.
        shape: of the tensor that they compose, in the file's layout.
        groups: what the adapter's config says about pi; None for one coefficient a vector.
        constraint: of the adapter's config.
        unused: numbers of the vectors that the adapter does not compose this tensor of (`selected`); whatever the file has
            for them counts as zero, as in the adapter.
    """

    header: TensorHeader
    shape: tuple[int, ...]
    groups: Mapping[str, Any] | None
    constraint: Constraint | None
    unused: tuple[int, ...] = ()

    @property
    def headers(self) -> tuple[TensorHeader, ...]:
        """The one tensor that is read."""
        return (self.header,)

    @property
    def is_sum(self) -> bool:
        """Whether there is one coefficient a vector."""
        return self.groups is None

    def open(self) -> Coefficients:
        """Read them: T K numbers."""
        from peft_subspace.functional.composition import constrained
        from peft_subspace.functional.groups import groups_from
        from peft_subspace.task_vectors.reading import read_tensor

        values = read_tensor(self.header).float()
        values[list(self.unused)] = 0.0
        if not bool(values.isfinite().all()):
            raise InputError(f"{self.header.path}: {self.header.name!r} has coefficients that are not finite.")
        values = constrained(values, self.constraint)
        return Coefficients(values, None if self.groups is None else groups_from(self.groups, self.shape))


def saved_coefficients(learned: Learned, block: Mapping[str, Any], base: TensorHeader) -> SavedCoefficients:
    """Find and check the coefficients of one tensor; see `merging.learned`.

    Raises:
        InputError: coefficients of another shape, or a constraint that is not known here.
    """
    selected = (learned.config.get("selected") or {}).get(block["parameter"])
    unused = [n for n, record in enumerate(learned.records) if selected is not None and record["name"] not in selected]
    header, groups = learned.tensor(block["coefficients"]), block.get("groups")
    expected = (len(learned.records), *(() if groups is None else (groups["count"],)))
    if header.shape != expected:
        raise InputError(
            f"{learned.checkpoint.name}: {header.name!r} is {list(header.shape)}, and {list(expected)} is expected, "
            f"one row for each task vector. Save the adapter again."
        )
    return SavedCoefficients(header, base.shape, groups, _constraint(learned), tuple(unused))


def _constraint(learned: Learned) -> Constraint | None:
    """What the adapter's config says about its coefficients; a replay that left it out would be another model."""
    if learned.config.get("nonnegative"):
        raise InputError(
            f"{learned.checkpoint.name}: its config has nonnegative: true, of an older version. The field is now `constraint: "
            f'"nonnegative"`: write that in its place into adapter_config.json.'
        )
    constraint: Constraint | None = learned.config.get("constraint")
    if constraint not in (None, *CONSTRAINTS):
        raise InputError(
            f"{learned.checkpoint.name}: its config has constraint: {constraint!r}, which is not known. Accepted: null, "
            f"{', '.join(map(repr, CONSTRAINTS))}. A newer version may know it."
        )
    return constraint


def merge(inputs: Inputs) -> Tensor:
    """lambda_0 sum_t lambda[t, pi(e)] tau_t[e], with `lambda` of the recipe for lambda_0: 1 replays what was learned.

    Cost: 1 read, 2 flops for each entry of each vector; with groups a look-up for each entry and vector besides.
    Source: aTLAS (arXiv:2407.02880); `functional.composition.accumulate` sums in the same order, from the base on instead of
    from zero, so that both agree to a rounding of the sum.
    """
    learned, n = inputs.learned, inputs.tensors[0].numel()
    here = None
    if learned.groups is not None:
        here = learned.groups.at(inputs.start, inputs.start + n, inputs.tensors[0].device)
    total = inputs.tensors[0].new_zeros(n)
    for number, tensor in zip(learned.values.to(total.device, total.dtype), inputs.tensors, strict=True):
        total.addcmul_(tensor, number if here is None else here.spread(number))
    factor = inputs.options["lambda"]
    return total if factor == 1.0 else total.mul_(factor)
