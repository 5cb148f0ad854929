"""Every built-in method with options under which it does its work, and tensors for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peft_subspace.functional.concrete_mask import Mask, mean_scale
from peft_subspace.merging.methods.atlas import Coefficients
from peft_subspace.merging.methods.concrete import ReplayedMask
from peft_subspace.merging.methods.memory import merge_tensors
from peft_subspace.merging.methods.registry import get

CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("task_arithmetic", {"lambda": 0.7}),
    ("magnitude_prune", {"density": 0.3}),
    ("ties", {"density": 0.3}),
    ("dare_linear", {"density": 0.3}),
    ("dare_ties", {"density": 0.3}),
    ("breadcrumbs", {"density": 0.3, "gamma": 0.1}),
    ("breadcrumbs_ties", {"density": 0.3, "gamma": 0.1, "rescale": True}),
    ("della", {"density": 0.4, "epsilon": 0.3}),
    ("della_linear", {"density": 0.4, "epsilon": 0.3}),
    ("slerp", {"t": 0.3}),
    ("nuslerp", {}),
    ("nuslerp", {"nuslerp_flatten": False}),
    ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ("multislerp", {}),
    ("karcher", {}),
    ("model_stock", {}),
    ("model_stock", {"filter_wise": True}),
    ("sce", {}),
    ("sce", {"select_topk": 0.2}),
    ("emr", {}),
    ("tsv_m", {}),
    ("iso_c", {}),
    ("iso_cts", {}),
    ("knots", {"density": 0.5}),
    ("knots", {"inner": "task_arithmetic"}),
    ("atlas", {"lambda": 0.7}),
    ("concrete", {"lambda": 0.7}),
    ("regmean", {}),
    ("fisher", {}),
]


def name(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *(f"{key}={value}" for key, value in case[1].items())])


def count_for(method: str, wanted: int = 3) -> int:
    """Number of models that a method takes, near the wanted one."""
    most = get(method).maximum
    return max(get(method).minimum, wanted if most is None else min(wanted, most))


def models(count: int, shape: tuple[int, ...], scale: float = 0.1) -> tuple[Tensor, list[Tensor]]:
    base = torch.randn(shape)
    return base, [base + scale * torch.randn(shape) for _ in range(count)]


def statistics(method: str, count: int, shape: tuple[int, ...]) -> list[Tensor] | None:
    """Gram matrices for regmean, Fisher information for fisher."""
    if method == "regmean" and len(shape) == 2:
        inputs = torch.randn(count, 3 * shape[1], shape[1])
        return list(inputs.mT @ inputs)
    return [torch.rand(shape) + 0.1 for _ in range(count)] if get(method).statistics else None


def learned(method: str, count: int, size: int) -> Any:
    """What a learned method merges by, on a tensor of so many entries."""
    if not get(method).learned:
        return None
    numbers = torch.linspace(1.0, -0.5, count)
    if method == "atlas":
        return Coefficients(numbers)
    mask = Mask(torch.linspace(-2, 2, size), "sample", 0.5, (0, "w"), portable=True)
    return ReplayedMask(mask, None, None, mean_scale(mask), numbers)


def merge(method: str, options: dict[str, Any], base: Tensor, tensors: list[Tensor], *rest: Any, **settings: Any) -> Tensor:
    origin = None if get(method).base == "ignored" else base
    settings.setdefault("learned", learned(method, len(tensors), base.numel()))
    return merge_tensors(method, origin, tensors, *(rest or (None,)), options, **settings)
