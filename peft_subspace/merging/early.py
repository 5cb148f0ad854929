"""What is refused before anything is learned or written. Needs no torch, but to look for a device."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..task_vectors.errors import InputError, OutputError, RecipeError, sentence
from ..task_vectors.models import Source, open_source, without_base
from ..task_vectors.places import keep_inputs, real_place
from ..task_vectors.readers import read_adapter
from ..task_vectors.sources import Checkpoint
from ..task_vectors.validate import is_buffer, match_names, tied_head
from .adapter_ways import check_learned_way, check_way
from .learn_data import check_data
from .learn_options import TaskOptions, data_place, vector_names
from .learned import no_heads
from .outputs import tokenizer_files
from .plan import Plan
from .recipe import Recipe


def learned_path(out: Path) -> Path:
    """Where the adapter of a result that learns is."""
    place = real_place(out)
    return place.with_name(place.name + ".learned")


def check_device(device: str) -> None:
    """Raise a RecipeError unless torch can compute there."""
    if device == "cpu":
        return
    import torch

    try:
        torch.zeros(1, device=device).item()  # a meta device makes tensors, and has no values
    except (RuntimeError, AssertionError) as error:  # no such device, or torch was built without it
        raise RecipeError(f"--device {device}: torch cannot use it here: {sentence(str(error).splitlines()[0])}") from error


# Before merging ----------------------------------------------------------------------------------------------------------


def check_before_merging(plan: Plan, device: str) -> None:
    """What can be told of a plan before anything is made, but for the files beside the weights (`outputs.side_files`).

    Args:
        plan: the merge.
        device: where to compute.

    Raises:
        RecipeError: a device that cannot be used; adapters that cannot be merged into one.
        InputError: tensors that an adapter cannot have.
    """
    if plan.recipe.subspace.output != "adapter":
        check_device(device)
        return
    if device != "cpu":
        raise RecipeError(f"--device {device}: adapters are small and merged on the CPU; leave it out.")
    check_way(plan)


# Before learning ---------------------------------------------------------------------------------------------------------


def check_before_learning(recipe: Recipe, out: Path | None, device: str) -> None:
    """Open all that a recipe with a `learn` block names, by its headers.

    Args:
        recipe: with a `learn` block.
        out: the result; None if it is not known yet.
        device: where to learn.

    Raises:
        RecipeError: a task without a head, a base that is no folder, a whole model for `output: adapter`, a device.
        InputError: a model, a head or data that are not there, or damaged.
        OutputError: `out`, or a folder beside it, is, holds or lies in a model, or has the data.
    """
    options = recipe.subspace.learn
    assert options is not None
    assert recipe.base_model is not None
    check_device(device)
    base = open_source(recipe.base_model)
    models = [entry.model for entry in recipe.merged_models]
    sources = [without_base(open_source(model), base) for model in models]
    if base.full is None or base.full.path.is_file() or len(base.checkpoints) > 1:
        raise RecipeError(
            f"base_model: {recipe.base_model} is not the folder or the Hub id of one model; the base to learn on needs its "
            f"config.json and its tokenizer too. Name the folder."
        )
    if recipe.subspace.output == "adapter":
        check_learned_way(recipe, base.full, sources)
    elif recipe.subspace.output == "model":
        tokenizer_files(recipe, base, sources)  # what the merge would refuse when all is learned
    names = vector_names(models)
    heads = [head for task in options.tasks if (head := _head(task, base.full, names)) is not None]
    for task in options.tasks:
        data_place(task)
    if out is None:
        return
    parts = [part for source in (base, *sources, *heads) for part in source.checkpoints]
    for place in (out, learned_path(out)):
        keep_inputs(place, parts)
        _keep_data(place, options.tasks)


def _keep_data(out: Path, tasks: Iterable[TaskOptions]) -> None:
    place = Path(os.path.realpath(out))
    for task in tasks:
        data = Path(os.path.realpath(task.data))
        if os.path.exists(task.data) and (data == place or place in data.parents):
            raise OutputError(f"{out}: is or holds the data of the task {task.name!r}. Choose another folder.")


def _head(task: TaskOptions, base: Checkpoint, names: list[str]) -> Source | None:
    """The model that a task's head is in, if the recipe names it for that alone."""
    if task.head is not None:
        try:
            return open_source(task.head)
        except InputError as error:
            raise InputError(f"task {task.name!r}: head: {error}") from error
    made_as = base.config.get("architectures") or ["Classification"]  # a config that does not say: the file is tried
    if task.answers is None and task.name not in names and not any("Classification" in str(name) for name in made_as):
        raise no_head(task, base.name, names)
    return None


def check_tasks(recipe: Recipe) -> None:
    """Look at data and heads of the tasks, for a dry run; learning itself sees all of them, and `--resume` may do without.

    Raises:
        RecipeError: a column that the data lack.
        InputError: a head in a model all of whose tensors are the base's, and the base is an encoder.
    """
    options, base = recipe.subspace.learn, recipe.base_model
    assert options is not None
    assert base is not None
    for task in options.tasks:
        check_data(task)
    encoder = open_source(base).full
    made_as = [] if encoder is None else encoder.config.get("architectures") or []
    if encoder is None or not made_as or any("Classification" in str(name) for name in made_as):
        return
    models = [entry.model for entry in recipe.merged_models]
    own = dict(zip(vector_names(models), models, strict=True))
    for task in options.tasks:
        reference = task.head or own.get(task.name)
        if task.answers is None and reference is not None and not _beside(encoder, open_source(reference)):
            raise InputError(
                f"task {task.name!r}: {reference} has no head: it has no tensors beside those of {encoder.name}. Write "
                f"`head: MODEL`, a model or a .safetensors file with one."
            )


def _beside(encoder: Checkpoint, source: Source) -> list[str]:
    """Tensors of a model that an encoder does not have."""
    found = []
    for part in source.checkpoints:
        tensors = read_adapter(part).saved if part.kind == "adapter" else part.tensors if part.kind == "model" else {}
        names = match_names(tensors, encoder.tensors, part.name)
        found += [name for name in tensors if name not in names and not is_buffer(name)]
    return found


def heads_left_out(recipe: Recipe) -> str | None:
    """What to say of heads that a result of learning will not have, before it is learned; None if it lacks none."""
    options = recipe.subspace.learn
    assert options is not None
    assert recipe.base_model is not None
    encoder = open_source(recipe.base_model).full
    if encoder is None or recipe.subspace.output == "task_vector" or all(task.answers for task in options.tasks):
        return None
    beside = [name for entry in recipe.merged_models for name in _beside(encoder, open_source(entry.model))]
    beside = [name for name in beside if not tied_head(name, encoder.tensors)]
    return no_heads(set(beside), encoder.name) if beside else None


def no_head(task: TaskOptions, base: str, names: Iterable[str]) -> RecipeError:
    """What to say about a task that nothing answers."""
    return RecipeError(
        f"task {task.name!r}: which head? {base} has none, and no model is called {task.name!r} (there are "
        f"{', '.join(names)}). Write `head: MODEL`."
    )
