"""The plan of a merge in words. Needs no torch."""

from __future__ import annotations

from collections import Counter

from ..merging.parameters import uses
from ..merging.plan import Plan
from .console import duration, say, size


def describe(plan: Plan, threads: int) -> None:
    """Print what a merge would read, compute and write."""
    recipe = plan.recipe
    details = f"{recipe.subspace.semantics} semantics, seed {recipe.subspace.seed}"
    say(f"Method   {recipe.merge_method} ({plan.method.reference}), {details}")
    if plan.base is not None:
        say(f"Base     {recipe.base_model}")
    for name in plan.names:
        say(f"Model    {name}")
    merged = [tensor.name for tensor in plan.tensors if tensor.options or tensor.per_model]
    for use in uses(recipe, plan.method, merged):
        whose = "" if use.model is None else f" of {use.model}"
        say(f"Value    {use.parameter}{whose}: {use.text}, {use.tensors} tensors")
    if plan.learned is not None:
        say(f"Learned  {recipe.subspace.learned}")
    if plan.mask is not None:
        say(f"Mask     {recipe.subspace.mask}")
    actions = Counter(tensor.action for tensor in plan.tensors)
    values = sum(tensor.count for tensor in plan.tensors)
    parts = [f"{actions[action]} {words}" for action, words in _ACTIONS.items() if actions[action]]
    dtypes = ", ".join(sorted({tensor.dtype for tensor in plan.tensors}))
    say(f"Tensors  {len(plan.tensors)} ({', '.join(parts)}), {values:,} values, {dtypes}")
    if recipe.subspace.output == "adapter":
        say("Output   an adapter for plain PEFT")
    else:
        for shard in plan.layout.shards:
            say(f"Writes   {shard.name}, {len(shard.offsets)} tensors, {shard.size:,} bytes")
    say(f"Reads    {size(plan.bytes_read)} in one pass")
    say(f"Memory   about {size(plan.peak_memory(threads))} private, {threads} threads")
    say(f"Time     very roughly {duration(plan.seconds(threads))}")


_ACTIONS = {"merge": "merged", "copy": "copied as they are", "cast": "cast from the base"}
