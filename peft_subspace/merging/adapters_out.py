"""Adapters merged into an adapter that plain PEFT loads: nothing of the model's size is computed where it can be avoided."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..functional.stacked import stack, truncate_sum
from ..task_vectors.adapters import PEFT_PREFIX
from ..task_vectors.deltas import LowRank
from ..task_vectors.errors import InputError, RecipeError
from ..task_vectors.lora_files import (
    json_bytes,
    lora_config,
    lora_tensors,
    modules_of,
    relative_error,
    safetensors_bytes,
    truncated,
)
from ..task_vectors.models import Given
from ..task_vectors.output_folder import new_folder
from ..task_vectors.places import MANIFEST
from ..task_vectors.reading import read_tensor
from ..task_vectors.sources import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .adapter_ways import Way, by_product, check_way, is_brought
from .execute import Settings, merged_tensor, whole_model_passes
from .files import write_new
from .inputs import decomposing, finite
from .manifest import make_manifest
from .methods.loop import Job, Part, settle
from .outputs import RECIPE_FILE, card
from .plan import Plan, TensorPlan

REPORT = "merge_report.json"
FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, RECIPE_FILE, "README.md", REPORT, MANIFEST)


@dataclass
class _Result:
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    report: dict[str, dict[str, float]] = field(default_factory=dict)
    reduced: dict[str, Any] | None = None


def merge_adapters(
    plan: Plan, out: Path, *, overwrite: bool = False, hash_inputs: bool = False, progress: Callable[[int], None] | None = None
) -> Path:
    """Merge the adapters of a plan into one LoRA adapter in `out`.

    With `linear` and `task_arithmetic` the result is `sum_k w_k dW_k` (over the sum of the weights, if normalised), exactly
    ("cat" and "exact" without a rank) or the nearest of a rank: the QR of the stacked factors and an SVD of a matrix of the
    summed ranks, no product of the weight's size. `knots` merges matrices in the space of the stacked factors, exactly
    without a rank. Other methods, and updates of no low rank, are merged as a whole; their leading singular vectors are kept.

    What a learned method composes with one coefficient for each vector and tensor is such a sum too.

    Raises:
        RecipeError: a model that is no adapter, a way to merge that does not fit the method.
        InputError: tensors that LoRA has no layer for.
        OutputError: another process writes `out`, or it cannot be written.
    """
    way = check_way(plan)
    result = _Result()
    with new_folder(out, "merge of adapters", FILES, overwrite=overwrite) as folder, torch.inference_mode():
        result.reduced = whole_model_passes(plan, Settings())
        for tensor in plan.tensors:
            if tensor.action == "merge":
                _one(plan, tensor, way, result)
            elif tensor.base is not None and is_brought(plan, tensor):
                assert tensor.base.values is not None
                result.saved[tensor.name] = read_tensor(tensor.base.values)
            if progress is not None:
                progress(tensor.nbytes)
        _write(plan, result, folder, hash_inputs)
    return out


def _one(plan: Plan, tensor: TensorPlan, way: Way, result: _Result) -> None:
    if not any(model.headers for model in tensor.models):
        return
    if any(model.values is not None for model in tensor.models):  # a module that an adapter has whole
        result.saved[tensor.name] = merged_tensor(plan, tensor, reduced=result.reduced).float()
        return
    with decomposing(tensor.name, f"the way {way}"):
        left, right, discarded = _factors(plan, tensor, way, result)
    if not finite(left) or not finite(right):
        raise _not_finite(tensor)
    result.factors[tensor.name] = (left, right)
    result.report[tensor.name] = {"rank": left.shape[1], "relative_error": relative_error(discarded, 1.0)}


def _not_finite(tensor: TensorPlan) -> InputError:
    return InputError(
        f"{tensor.name!r}: the merged update has values that are NaN or infinite, of which there are no factors. Use undamaged "
        f"models, or other weights."
    )


def _factors(plan: Plan, tensor: TensorPlan, way: Way, result: _Result) -> tuple[Tensor, Tensor, float]:
    """left, right of the merged update, and the share of its squared norm that they leave out."""
    options = plan.recipe.subspace.adapter
    if by_product(way, tensor):
        delta = merged_tensor(plan, tensor, True, result.reduced).reshape(tensor.shape[0], -1).float()
        rank = options.rank if options.rank or options.energy else max(_rank(model) for model in tensor.models)
        if not finite(delta):
            raise _not_finite(tensor)
        return truncated(delta, rank, options.energy)
    factors, weights = ([_knots(plan, tensor)], [1.0]) if way == "knots" else _stacked(plan, tensor)
    if not all(finite(factor) for pair in factors for factor in pair):
        raise _not_finite(tensor)
    if way == "cat" or (way == "knots" and not options.rank and not options.energy):
        return *stack(factors, weights), 0.0
    return truncate_sum(factors, weights, rank=options.rank, energy=options.energy)


def _rank(given: Given) -> int:
    return sum(delta.rank for delta in given.deltas if isinstance(delta, LowRank))


def _knots(plan: Plan, tensor: TensorPlan) -> tuple[Tensor, Tensor]:
    """The merged update of a matrix in the common basis, `[rows, q]` and `[q, columns]`: exact, q at most the summed ranks."""
    from .methods.knots import merge_factors

    factors = []
    for model in tensor.models:
        own = [delta.factors(read_tensor) for delta in model.deltas if isinstance(delta, LowRank)]
        own = own or [(torch.zeros(tensor.shape[0], 1), torch.zeros(1, tensor.shape[1]))]
        if not all(finite(factor) for pair in own for factor in pair):
            raise _not_finite(tensor)
        factors.append((torch.cat([left for left, _ in own], 1), torch.cat([right for _, right in own])))
    nothing = Part(None, ())  # factors are merged without the tensor
    semantics = plan.recipe.subspace.semantics
    job = Job(plan.method, tensor.shape, lambda *_: nothing, tensor.options, tensor.per_model, semantics=semantics)
    return merge_factors(factors, settle(job)[1])


def _stacked(plan: Plan, tensor: TensorPlan) -> tuple[list[tuple[Tensor, Tensor]], list[float]]:
    """All factors of a tensor, and what each is multiplied by."""
    weights = [float(model.get("weight", 1.0)) for model in tensor.per_model]
    if tensor.learned is not None:
        weights = tensor.learned.open().weights
    total = sum(weights)
    scale = float(tensor.options.get("lambda", 1.0))
    if tensor.options.get("normalize"):
        if abs(total) < 1e-8:
            raise RecipeError(
                f"the weights for {tensor.name!r} add up to {total:g}, by which the sum cannot be divided: normalize: false."
            )
        scale /= total
    factors, scales = [], []
    for weight, model in zip(weights, tensor.models, strict=True):
        for delta in model.deltas:
            assert isinstance(delta, LowRank)
            factors.append(delta.factors(read_tensor))
            scales.append(weight * scale)
    return factors, scales


def _write(plan: Plan, result: _Result, folder: Path, hash_inputs: bool) -> None:
    base = plan.reference.full
    assert base is not None
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    modules = modules_of(result.factors, base.tensors, base.config)
    tensors, rank = lora_tensors(result.factors, shapes, modules, base.config)
    whole = modules_of(result.saved, base.tensors, base.config)
    for name, values in result.saved.items():
        tensors[PEFT_PREFIX + (f"{whole[name]}.weight" if name.endswith(".weight") else whole[name])] = values
    saved = sorted({name.rpartition(".")[0] for name in result.saved})
    base_name = str(plan.recipe.base_model.model) if plan.recipe.base_model else ""
    config = lora_config(modules, rank, base.tensors, base.config, base_name, saved)
    write_new(folder / ADAPTER_WEIGHTS, safetensors_bytes(tensors, {"format": "pt"}))
    write_new(folder / ADAPTER_CONFIG, json_bytes(config))
    write_new(folder / RECIPE_FILE, plan.recipe.to_yaml().encode())
    write_new(folder / "README.md", card(plan, "adapter").encode())
    write_new(folder / REPORT, json_bytes(result.report))
    manifest = make_manifest(plan, {}, folder, hash_inputs)
    write_new(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n")
