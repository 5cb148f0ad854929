"""Merging of tensors and state dicts in memory, by the same loop as the engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_subspace.merging.methods.loop import CHUNK, Job, Part, map_tensor, reduce_tensors
from peft_subspace.merging.methods.registry import Method, Semantics, get


@dataclass(frozen=True)
class _Reader:
    """Reads parts of tensors in memory."""

    base: Tensor | None
    tensors: Sequence[Tensor]
    are_deltas: bool
    statistics: Sequence[Tensor] | None
    whole: bool

    def __call__(self, start: int, stop: int) -> Part:
        def cut(tensor: Tensor) -> Tensor:
            return tensor.detach().reshape(-1)[start:stop]

        found = self.statistics
        if found is not None and not self.whole:
            found = [cut(statistic) for statistic in found]
        flags = [True] * len(self.tensors) if self.are_deltas else ()
        return Part(None if self.base is None else cut(self.base), [cut(tensor) for tensor in self.tensors], flags, found)


def merge_tensors(
    method: Method | str,
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    per_model: Sequence[Mapping[str, Any]] | None = None,
    *,
    are_deltas: bool = False,
    as_delta: bool = False,
    statistics: Sequence[Tensor] | None = None,
    learned: Any = None,
    name: str = "weight",
    seed: int = 0,
    semantics: Semantics = "mergekit",
    dtype: torch.dtype = torch.float32,
    chunk: int = CHUNK,
) -> Tensor:
    """Merge K tensors in memory, by the same loop as the engine.

    Args:
        method: A method or its name.
        base: theta_0, or None for a merge without a base.
        tensors: K tensors of one shape: theta_k, or tau_k with `are_deltas`.
        weights: K factors, by default `weight` of `per_model`, else 1.
        options: Global parameters of the method.
        per_model: K mappings of its parameters of scope "model"; one value for all may stand in `options` instead.
        are_deltas: `tensors` are theta_k - theta_0.
        as_delta: Return the merged delta, not theta_0 + delta.
        statistics: K tensors, for the methods that need them.
        learned: What was learned for this tensor, for the methods that merge by that.
        name: Of the tensor; random methods draw by it.
        seed: Of random methods.
        semantics: Whose definition to follow where tools differ.
        dtype: Of the computation and of the result.
        chunk: Elements to work on at a time; the result does not depend on it.

    Returns:
        The merged tensor, a new one.

    Raises:
        ValueError: Unknown method or parameter, a value outside its range, a wrong number of tensors, or shapes that differ.
    """
    method = get(method) if isinstance(method, str) else method
    job = _job(
        method, base, tensors, weights, options, per_model, are_deltas=are_deltas, as_delta=as_delta, statistics=statistics,
        learned=learned, name=name, seed=seed, semantics=semantics, dtype=dtype, chunk=chunk,
    )  # fmt: skip
    return _run(job, reduce_tensors([job]))


def merge_state_dicts(
    method: Method | str,
    base: Mapping[str, Tensor] | None,
    models: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float] | None = None,
    options: Mapping[str, Any] | None = None,
    per_model: Sequence[Mapping[str, Any]] | None = None,
    *,
    names: Iterable[str] | None = None,
    statistics: Sequence[Mapping[str, Tensor]] | None = None,
    learned: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """Merge K state dicts in memory, tensor by tensor.

    Args:
        method: A method or its name.
        base: The base's state dict, or None.
        models: K state dicts.
        weights: K factors.
        options: Global parameters of the method.
        per_model: K mappings of its parameters of scope "model".
        names: The tensors to merge; by default all floating ones of the first model. All models must have them.
        statistics: K dicts, for the methods that need them; a tensor that is in none of them has none.
        learned: What was learned for each tensor, for the methods that merge by that.
        **settings: As for `merge_tensors`.

    Returns:
        The merged tensors by name.

    Raises:
        ValueError: As `merge_tensors`, or a tensor is missing in the base or a model.
    """
    method = get(method) if isinstance(method, str) else method
    chosen = list(names) if names is not None else [name for name, x in models[0].items() if x.is_floating_point()]
    for index, model in enumerate([*models, *([] if base is None else [base])]):
        missing = [name for name in chosen if name not in model]
        if missing:
            which = f"model {index}" if index < len(models) else "the base"
            raise ValueError(f"{which} has no tensor {missing[0]!r} (of {len(missing)} missing ones); see `names`")
    jobs = []
    for name in chosen:
        found = [given[name] for given in statistics] if statistics and all(name in given for given in statistics) else None
        origin = None if base is None else base[name]
        tensors = [model[name] for model in models]
        given = {"statistics": found, "learned": (learned or {}).get(name), "name": name, **settings}
        jobs.append(_job(method, origin, tensors, weights, options, per_model, demand=not statistics, **given))
    together = reduce_tensors(jobs) if jobs and jobs[0].semantics in method.whole_model else None
    return {job.name: _run(job, reduce_tensors([job]) if together is None else together) for job in jobs}


def _job(
    method: Method,
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float] | None,
    options: Mapping[str, Any] | None,
    per_model: Sequence[Mapping[str, Any]] | None,
    *,
    are_deltas: bool = False,
    as_delta: bool = False,
    statistics: Sequence[Tensor] | None = None,
    demand: bool = True,
    learned: Any = None,
    name: str = "weight",
    seed: int = 0,
    semantics: Semantics = "mergekit",
    dtype: torch.dtype = torch.float32,
    chunk: int = CHUNK,
) -> Job:
    """The merge of one tensor, checked."""
    _check(method, base, tensors, weights, statistics if demand else ())
    if method.learned and learned is None:
        raise ValueError(
            f"merge method {method.name!r} merges by what was learned: give `learned`, or a recipe with its adapter"
        )
    options, per_model = spread(method, options or {}, per_model, len(tensors))
    read = _Reader(base, tensors, are_deltas, statistics, method.kind == "matrix")
    shape, device = tuple(tensors[0].shape), tensors[0].device
    return Job(method, shape, read, options, per_model, weights, name, seed, semantics, dtype, device, chunk, as_delta, learned)


def _run(job: Job, reduced: Mapping[str, Any]) -> Tensor:
    out = torch.empty(job.count, dtype=job.dtype, device=job.device)
    for start, merged in map_tensor(job, reduced):
        out[start : start + merged.numel()] = merged
    return out.view(job.shape)


def spread(
    method: Method, options: Mapping[str, Any], per_model: Sequence[Mapping[str, Any]] | None, count: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Give each model the values of its parameters that stand in `options` for all of them; its own come first."""
    shared = {key: value for key, value in options.items() if method.parameter(key).scope == "model"}
    own = [{**shared, **given} for given in (per_model if per_model is not None else [{}] * count)]
    return {key: value for key, value in options.items() if key not in shared}, own


def _check(
    method: Method,
    base: Tensor | None,
    tensors: Sequence[Tensor],
    weights: Sequence[float] | None,
    statistics: Sequence[Tensor] | None,
) -> None:
    """Raise a ValueError unless the tensors are what the method takes."""
    most = math.inf if method.maximum is None else method.maximum
    if not max(1, method.minimum) <= len(tensors) <= most:
        accepted = f"{method.minimum}" if method.minimum == most else f"{method.minimum} or more"
        raise ValueError(f"merge method {method.name!r} takes {accepted} models beside the base, got {len(tensors)}")
    if method.needs_base and base is None:
        raise ValueError(f"merge method {method.name!r} needs a base model; give one, or merge with 'linear'")
    shapes = [tuple(tensor.shape) for tensor in ([] if base is None else [base]) + list(tensors)]
    if len(set(shapes)) > 1:
        raise ValueError(f"tensors to be merged must have one shape, got {', '.join(map(str, shapes))}")
    if weights is not None and len(weights) != len(tensors):
        raise ValueError(f"got {len(weights)} weights for {len(tensors)} models")
    if method.statistics and statistics is None:
        raise ValueError(f"merge method {method.name!r} needs statistics: {method.statistics}, for each model")
