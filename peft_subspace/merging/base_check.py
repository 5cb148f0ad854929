"""Is a model a fine-tuned version of the base? Seen from a sample of its values, before anything is written."""

from __future__ import annotations

import math
import warnings

from ..task_vectors.compare import block_of, unlike_base
from ..task_vectors.errors import InputError
from ..task_vectors.headers import TensorHeader
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
        found = _relative_norms(plan, number)
        if unlike := unlike_base(found, plan.recipe.base_model):
            text = f"{name}: {unlike}. Check base_model"
            if policy == "error":
                raise InputError(f"{text}, or write `subspace: {{base_check: off}}`.")
            warnings.warn(f"{text}.", stacklevel=2)


def _relative_norms(plan: Plan, number: int) -> dict[str, float]:
    reader, squares = Reader(), dict[str, list[float]]()
    for tensor in plan.tensors:
        if tensor.action != "merge" or len(tensor.shape) < 2 or tensor.base is None or tensor.base.values is None:
            continue
        values = tensor.models[number].values
        if values is not None:
            base, difference = _squares(reader, tensor.base.values, values)
            block = squares.setdefault(block_of(tensor.name), [0.0, 0.0])
            block[0] += base
            block[1] += difference
    return {block: math.sqrt(difference / base) for block, (base, difference) in squares.items() if base > 0}


def _squares(reader: Reader, base: TensorHeader, values: TensorHeader) -> tuple[float, float]:
    count = min(base.count, values.count, SAMPLE)
    ours, theirs = reader.stored(base, 0, count, 0).double(), reader.stored(values, 0, count, 1).double()
    return float(ours.square().sum()), float((theirs - ours).square().sum())
