"""A LoRA adapter, or a task-vector file, out of a fine-tuned model and its base."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..whole_files import write_whole
from .deltas import columns_of
from .errors import InputError, RecipeError
from .lora_files import (
    json_bytes,
    lora_config,
    lora_tensors,
    modules_of,
    relative_error,
    safetensors_bytes,
    truncated,
    without_layer,
)
from .models import open_source, without_base
from .output_folder import new_folder
from .places import RECORD, check_place
from .sources import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .task_vector import TaskVector
from .validate import is_adaptable


@dataclass
class Extraction:
    """What an extracted adapter holds.

    Attributes:
        ranks: weight -> rank.
        errors: weight -> ||dW - B A|| / ||dW||.
        left_out: changed tensors that LoRA has no layer for (norms, biases) -> their share of the squared norm of all.
        error: ||tau - tau'|| / ||tau|| over all tensors, the ones left out included.
        parameters: values in the file.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, float] = field(default_factory=dict)
    error: float = 0.0
    parameters: int = 0


def extract_lora(
    model: str,
    base: str,
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Extraction:
    """Write the LoRA adapter nearest to what fine-tuning changed: a truncated SVD of every changed weight.

    Args:
        model: the fine-tuned model, as a recipe names it.
        base: the model that it was made from.
        out: folder of the adapter, which plain PEFT loads.
        rank: of every weight; an upper bound with `energy`.
        energy: the smallest rank that keeps this share of the squared norm of each weight. All weights are stored with the
            largest rank, filled with zeros.
        overwrite: replace a result of this package.
        progress: called with bytes of the deltas (4 a value).

    Raises:
        RecipeError: neither a rank nor an energy.
        InputError: models that do not fit together, or nothing has changed.
        OutputError: as `places.check_place` says, or it cannot be written.
    """
    if rank is None and energy is None:
        raise RecipeError("give --rank (such as 16), --energy (such as 0.9), or --task-vector.")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"--energy {energy} is a share of the squared norm: it must be above 0 and at most 1.")
    check_place(out, overwrite=overwrite)
    source = open_source(base)
    if source.full is None:
        raise InputError(f"{base} is an adapter or a task vector and no base.")
    tuned = open_source(model)
    place = check_place(out, overwrite=overwrite, parts=(*source.checkpoints, *tuned.checkpoints))
    vector = TaskVector.of_source(without_base(tuned, source), source)
    found = Extraction()
    names = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, RECORD)
    with new_folder(place, "extract", names, overwrite=overwrite) as folder, torch.inference_mode():
        named = [name for name, shape in vector.shapes.items() if is_adaptable(name, shape)]
        adapted = set(named) - without_layer(named, source.full.tensors, source.full.config)
        factors = _factors(vector, adapted, rank, energy, found, progress)
        if not factors:
            raise InputError(f"{model}: no weight that LoRA has a layer for differs from {base}.")
        tied = {alias: stored for alias, stored in vector.tied.items() if stored in factors}
        for alias, stored in tied.items():  # LoRA on one of them alone would leave the others as they are
            factors[alias] = factors[stored]
            found.ranks[alias], found.errors[alias] = found.ranks[stored], found.errors[stored]
        shapes = {**vector.shapes, **{alias: vector.shapes[stored] for alias, stored in tied.items()}}
        modules = modules_of(factors, source.full.tensors, source.full.config)
        tensors, largest = lora_tensors(factors, shapes, modules, source.full.config)
        found.parameters = sum(tensor.numel() for tensor in tensors.values())
        config = lora_config(modules, largest, source.full.tensors, source.full.config, base, [])
        write_whole(folder / ADAPTER_WEIGHTS, safetensors_bytes(tensors, {"format": "pt"}))
        write_whole(folder / ADAPTER_CONFIG, json_bytes(config))
    return found


def _factors(
    vector: TaskVector,
    adapted: Collection[str],
    rank: int | None,
    energy: float | None,
    found: Extraction,
    progress: Callable[[int], None] | None,
) -> dict[str, tuple[Tensor, Tensor]]:
    factors, squares, missed, left_out = {}, [], [], {}
    for name, shape in vector.shapes.items():
        delta = vector[name]
        square = float(delta.double().square().sum())
        if not math.isfinite(square):
            raise InputError(f"{name!r} has values that are NaN or infinite.")
        squares.append(square)
        if square > 0 and name in adapted:
            left, right, share = truncated(delta.reshape(-1, columns_of(shape)), rank, energy)
            factors[name] = (left, right)
            found.ranks[name], found.errors[name] = left.shape[1], math.sqrt(share)
            missed.append(share * square)
        elif square > 0:
            left_out[name] = square
        if progress is not None:
            progress(4 * delta.numel())
    total = math.fsum(squares)
    found.left_out = {name: square / total for name, square in left_out.items()}
    found.error = relative_error(math.fsum([*missed, *left_out.values()]), total)
    return factors
