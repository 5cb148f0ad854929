"""Coefficients and differences belong to one base: is the model that an adapter is put on that base?"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..base.geometry import is_quantized
from ..base.targets import base_parameters
from ..task_vectors.compare import relative_norms, unlike_base
from ..task_vectors.errors import InputError
from ..task_vectors.pool import Entry
from ..task_vectors.provenance import same_value, value_of
from ..task_vectors.reading import Reader
from ..task_vectors.sources import shortened

if TYPE_CHECKING:
    from .blocks import OpenedPool

SAMPLES = 64  # values of a base that are kept or compared
LOOK = 2**12  # values of each tensor by which a whole model is compared with its base


def check_base(config: Any, model: nn.Module, opened: OpenedPool) -> None:
    """Coefficients belong to one base. Up to 64 of its values are kept; in another dtype they may differ by a rounding."""
    parameters = _comparable(model)
    names = sorted(opened.blocks & set(parameters))
    names = names[:: -(-len(names) // SAMPLES)] if names else []
    if any(parameters[name].is_meta for name in names):
        return
    found = {name: _sample(parameters[name]) for name in names}
    expected = config.provenance.get("base")
    if expected is None:
        dtypes = sorted({dtype for _, dtype in found.values()})
        config.provenance["base"] = {"values": {n: v for n, (v, _) in found.items()}, "dtypes": dtypes}
        return
    kept = expected["values"]
    wrong = [n for n, pair in found.items() if n in kept and not same_value(*pair, kept[n], expected["dtypes"])]
    if wrong:
        raise InputError(
            f"{type(model).__name__} is not the base that the coefficients were learned on: the values of {shortened(wrong)} "
            f"are others. Load the adapter onto its own base; to use its coefficients on this one, set "
            f"config.provenance['base'] = None."
        )


def check_pools_base(entries: list[Entry], model: nn.Module, looks: bool) -> None:
    """A difference from a base means something on that base.

    Args:
        entries: of the pool.
        model: that the adapter is put on.
        looks: whether whole models are compared with their base, too.

    Raises:
        InputError: one of up to 64 values of a vector's base is another in the model.

    Warns, as recipes do, of a whole model that is its base, and where half of its layers differ from the base by more than 0.7
    of its norm: fine-tuning changes some per cent, an unrelated model is at 1.4. Cost: up to 4,096 values of each tensor of the
    whole models are read.
    """
    parameters = _comparable(model)
    for entry in entries:
        names = [
            name
            for name, own in entry.names.items()
            if name in parameters and not parameters[name].is_meta and own in entry.vector.base
        ]
        for name in names[:: max(1, -(-len(names) // SAMPLES))]:
            header, (value, dtype) = entry.vector.base[entry.names[name]], _sample(parameters[name])
            kept, own = value_of(header)
            if header.count == parameters[name].numel() and not same_value(value, dtype, kept, [own]):
                raise InputError(
                    f"The task vector {entry.name!r} is a difference from {entry.vector.base_name}, and {name!r} is another "
                    f"in the model that the adapter is put on. Load the model from there, give the vector's own base, or set "
                    f"strict=False to compose it on this one all the same."
                )
        if looks and names:
            _look(entry, names)


def _look(entry: Entry, names: list[str]) -> None:
    """Compare a whole model with its base, by the first values of each tensor; not an adapter, which may change much."""
    vector, reader = entry.vector, Reader()
    whole = [own for own in (entry.names[name] for name in names) if vector.is_whole(own)]
    differences = {own: next(part for _, part in vector.parts(own, LOOK)) for own in whole}
    if differences and not any(bool(difference.any()) for difference in differences.values()):
        warnings.warn(
            f"The task vector {entry.name!r} is zero wherever it was looked at: is it {vector.base_name} itself?", stacklevel=2
        )
    found = relative_norms(
        (own, reader.stored(vector.base[own], 0, difference.numel(), 0), difference)
        for own, difference in differences.items()
        if len(vector.shapes[own]) > 1
    )
    if unlike := unlike_base(found, vector.base_name):
        warnings.warn(f"The task vector {entry.name!r} {unlike}. Check base.", stacklevel=2)


def _comparable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that have values of the base: all but quantised weights."""
    return {name: p for name, module, own, p in base_parameters(model) if own != "weight" or not is_quantized(module)}


def _sample(parameter: Tensor) -> tuple[float, str]:
    value = float(parameter.detach().reshape(-1)[parameter.numel() // 2])
    return value, str(parameter.dtype).removeprefix("torch.")
