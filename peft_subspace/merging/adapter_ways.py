"""How adapters are merged into an adapter, and what headers tell about those that cannot be. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from ..task_vectors.deltas import LowRank
from ..task_vectors.errors import InputError, RecipeError
from ..task_vectors.models import Source, given_by
from ..task_vectors.sources import Checkpoint
from ..task_vectors.validate import is_adaptable
from .plan import Plan, TensorPlan
from .recipe import Recipe

Way = Literal["cat", "exact", "dense", "knots"]
SUMS = ("linear", "task_arithmetic")  # methods that are a weighted sum of the deltas


def check_way(plan: Plan) -> Way:
    """How a plan's adapters are merged; all that headers tell about what cannot be is said here.

    Raises:
        RecipeError: a model that is no adapter, a way to merge that does not fit the method, a rank that is missing.
        InputError: a tensor that LoRA has no layer for, a module of which only a part is changed, or nothing that is changed.
    """
    way, options = _way(plan), plan.recipe.subspace.adapter
    saved: set[str] = set()
    has_factors = False
    for tensor in plan.tensors:
        if tensor.action != "merge":
            saved.update([tensor.name] if is_brought(plan, tensor) else [])
            continue
        if any(model.values is not None for model in tensor.models):  # a module that an adapter has whole
            saved.add(tensor.name)
            continue
        if not any(model.headers for model in tensor.models):
            continue
        has_factors = True
        if not is_adaptable(tensor.name, tensor.shape):
            raise InputError(
                f"{tensor.name!r} {list(tensor.shape)} is changed, and LoRA has no layer for it. Use `output: model`."
            )
        if by_product(way, tensor) and not (options.rank or options.energy) and is_dense(tensor):
            raise _no_rank(tensor.name)
    _check_whole(plan, saved)
    if not has_factors:
        raise InputError("none of the models changes a weight, so there is no adapter to write.")
    return way


def _way(plan: Plan) -> Way:
    recipe = plan.recipe
    check_adapters(plan.names, plan.sources)
    asked = recipe.subspace.adapter.method
    merged = [tensor for tensor in plan.tensors if tensor.action == "merge"]
    sums = recipe.merge_method in SUMS and not any(
        float(model.get("density", 1.0)) < 1 for tensor in merged for model in tensor.per_model
    )
    sums = sums or (plan.learned is not None and all(t.learned is not None and t.learned.is_sum for t in merged))
    _check_asked(recipe, sums)
    full = next((tensor.name for tensor in plan.tensors if is_dense(tensor)), None)
    if asked in ("cat", "exact", "knots") and full is not None:
        raise _not_of_low_rank(asked, full)
    if asked in ("cat", "exact"):
        return "cat" if asked == "cat" else "exact"
    if recipe.merge_method == "knots" and asked != "dense" and full is None:
        return "knots"
    return "exact" if sums and asked is None and full is None else "dense"


def _check_asked(recipe: Recipe, sums: bool) -> None:
    options = recipe.subspace.adapter
    asked = options.method
    if asked == "cat" and (options.rank or options.energy):
        raise RecipeError(
            "subspace.adapter: `cat` keeps the ranks of all adapters side by side, and goes with no rank or energy. Use "
            "`exact` for a smaller rank."
        )
    if asked == "knots" and recipe.merge_method != "knots":
        raise RecipeError("subspace.adapter.method: knots goes with merge_method: knots.")
    if asked in ("cat", "exact") and not sums:
        raise RecipeError(
            f"subspace.adapter.method: {asked} is for weighted sums (linear, or task_arithmetic without density, or "
            f"coefficients by block). Use `dense` with {recipe.merge_method}."
        )


def _no_rank(name: str) -> RecipeError:
    return RecipeError(
        f"the update of {name!r} is dense, so that it has no rank of its own: set `subspace: {{adapter: {{rank: 16}}}}`, or an "
        f"energy."
    )


def _not_of_low_rank(asked: str, name: str) -> RecipeError:
    return RecipeError(
        f"subspace.adapter.method: {asked} is for updates of low rank, and that of {name!r} is dense (masked, of DoRA, of a "
        f"stack of experts or of a dense task vector). Use `dense`, with a rank or an energy."
    )


def check_learned_way(recipe: Recipe, base: Checkpoint, sources: Sequence[Source]) -> None:
    """The same of a recipe that has not learned yet, as far as it can be told: the plan of the replay tells the rest.

    Raises:
        RecipeError: a whole model, a way that does not fit what is learned, vectors without a rank and no rank in the recipe.
    """
    config, options = recipe.subspace.learn.config if recipe.subspace.learn else {}, recipe.subspace.adapter
    check_adapters((str(entry.model) for entry in recipe.merged_models), sources)
    one_number = config.get("granularity", "block") in ("block", "task") and not config.get("fused_splits")
    _check_asked(recipe, recipe.merge_method == "atlas" and one_number)
    given = [pair for source in sources for pair in given_by(source, base.tensors, config=base.config)[0].items()]
    deltas = [(name, delta) for name, one in given for delta in one.deltas if is_adaptable(name, base.tensors[name].shape)]
    if not deltas or any(isinstance(delta, LowRank) for _, delta in deltas):
        return  # some weights may be of low rank, and it is not known yet which are composed
    if options.method in ("cat", "exact"):
        raise _not_of_low_rank(options.method, deltas[0][0])
    if not (options.rank or options.energy):
        raise _no_rank(deltas[0][0])


def check_adapters(names: Iterable[str], sources: Iterable[Source]) -> None:
    """Raise a RecipeError for a whole model among those that are to be merged into an adapter."""
    for name, source in zip(names, sources, strict=True):
        if source.full is not None:
            raise RecipeError(
                f"subspace.output is adapter, and {name} is a whole model. Merge into a model, and make an adapter of it with "
                f"`peft-subspace extract`."
            )


def by_product(way: Way, tensor: TensorPlan) -> bool:
    """Whether an update is computed whole; KnOTS is defined on matrices."""
    return way == "dense" or (way == "knots" and len(tensor.shape) != 2)


def is_dense(tensor: TensorPlan) -> bool:
    """Whether one of the updates of a tensor has no factors, or loses them by a mask."""
    return tensor.mask is not None or any(not isinstance(delta, LowRank) for model in tensor.models for delta in model.deltas)


def is_brought(plan: Plan, tensor: TensorPlan) -> bool:
    """Whether a tensor that is not merged is no tensor of the base: a new head, or a module that was trained whole."""
    assert plan.reference.full is not None
    if tensor.base is None or tensor.base.values is None:
        return False
    return plan.reference.full.tensors.get(tensor.name) != tensor.base.values


def _check_whole(plan: Plan, saved: set[str]) -> None:
    """`modules_to_save` of PEFT are whole modules; a trained bias alone is none."""
    assert plan.reference.full is not None
    known = set(plan.reference.full.tensors)
    for name in sorted(saved & known):
        module = name.rpartition(".")[0] + "."
        lacks = sorted(other for other in known - saved if other.startswith(module))
        if lacks:
            raise InputError(
                f"{name!r} is changed and {lacks[0]!r} is not: LoRA has no layer for it, and PEFT saves modules as a whole. "
                f"Use `output: model`."
            )
