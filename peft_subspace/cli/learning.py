"""A recipe that learns: its dry run, and the learning before the merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from ..merging.early import learned_path
from ..merging.learning import learn, vectors_of
from ..merging.recipe import Recipe
from ..merging.run import is_finished
from ..task_vectors.output_folder import partial_path, settle
from ..task_vectors.places import check_place, describe_place
from . import console


def describe_learning(recipe: Recipe, out: Path | None, device: str, quiet: bool, *, source: Path, overwrite: bool) -> None:
    """Print what would be learned, and what would become of `out`. Needs no torch, but to look for a device."""
    from ..merging.early import check_before_learning, check_tasks, heads_left_out
    from ..merging.learn_options import lines
    from ..merging.parameters import check_parameters

    check_parameters(recipe, recipe.method)
    assert recipe.base_model is not None
    assert recipe.subspace.learn is not None
    check_before_learning(recipe, out, device)
    check_tasks(recipe)
    if text := heads_left_out(recipe):
        console.warn(text)
    vectors = vectors_of(recipe)
    texts = lines(recipe.subspace.learn, recipe.merge_method, vectors)
    console.say(f"Method   {recipe.merge_method} ({recipe.method.reference}), learned first", quiet)
    console.say(f"Base     {recipe.base_model}", quiet)
    for name, reference in vectors.items():
        console.say(f"Vector   {name}: {reference}", quiet)
    for text in texts:
        console.say(text, quiet)
    console.say("Output   OUT.learned (the adapter), then OUT by a merge that replays it", quiet)
    for place in () if out is None else (learned_path(out), out):
        console.say(f"Place    {describe_place(place, check_place(place, overwrite=overwrite, recipe=source))}", quiet)


def learn_first(recipe: Recipe, out: Path, *, source: Path, quiet: bool, **options: Any) -> Recipe:
    """Learn beside the result; the recipe that replays it."""
    settle(out)
    if not is_finished(out, options["resume"]):
        check_place(out, overwrite=options["overwrite"], recipe=source)
    try:
        found = learn(recipe, out, say=lambda text: console.say(text, quiet), **options)
    except KeyboardInterrupt:
        partial = partial_path(learned_path(out))
        way = f"Go on with --resume, or remove {partial}." if partial.exists() else "Nothing was learned yet."
        console.fail(f"interrupted. {way}")
        raise typer.Exit(130) from None
    console.say(f"{learned_path(out)}: what was learned.", quiet)
    return found
