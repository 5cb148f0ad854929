"""Is a model a fine-tuned version of the base? Seen from a sample of its values, before anything is written."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from torch import Tensor

from ..task_vectors.compare import relative_norms, unlike_base
from ..task_vectors.errors import InputError
from ..task_vectors.reading import Reader
from .plan import Plan

SAMPLE = 2**14  # values of a tensor that are looked at


def check_bases(plan: Plan) -> None:
    """Compare a sample of every matrix of whole models with the base's, for methods that add differences.

    The first values of each matrix are looked at, and the norms are taken by block. Fine-tuning changes a model by a few per
    cent; where the median block has changed by more than 70 %, the model was made from something else, or its neurons are in
    another order, and adding its difference to this base makes no sense.

    Raises:
        InputError: `base_check: error`, and there is such a model; says which blocks differ most.
    """
    policy = plan.recipe.subspace.base_check
    if policy == "off" or plan.base is None or plan.method.acts_on != "delta":
        return
    for number, name in enumerate(plan.names):
        if unlike := unlike_base(relative_norms(_samples(plan, number)), plan.recipe.base_model):
            text = f"{name}: {unlike}. Check base_model"
            if policy == "error":
                raise InputError(f"{text}, or write `subspace: {{base_check: off}}`.")
            warnings.warn(f"{text}.", stacklevel=2)


def _samples(plan: Plan, number: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, first values of the base and the model's difference from them, for each matrix of a whole model."""
    reader = Reader()
    for tensor in plan.tensors:
        if tensor.action != "merge" or len(tensor.shape) < 2 or tensor.base is None or tensor.base.values is None:
            continue
        values, before = tensor.models[number].values, tensor.base.values
        if values is not None:
            count = min(before.count, values.count, SAMPLE)
            base = reader.stored(before, 0, count, 0).double()
            yield tensor.name, base, reader.stored(values, 0, count, 1).double() - base
