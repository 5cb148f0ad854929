"""From a recipe with a `learn` block to one that replays what was learned.

    OUT.learned/        the adapter; learning.json: recipe, data, loss and accuracies at the start and in the end; history.json

The adapter is trained by `MergeTrainer` on models that transformers makes; the merged model comes from the streaming engine by
the recipe that is returned, which can be merged again without the data.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .._version import __version__
from ..task_vectors.bundles import FOLDER as VECTORS
from ..task_vectors.errors import InputError, OutputError, RecipeError
from ..task_vectors.locks import remove_scratch
from ..task_vectors.models import open_source
from ..task_vectors.output_folder import OutputFolder, settle
from ..task_vectors.places import RECORD, check_place, write_record
from ..task_vectors.references import Reference
from ..task_vectors.sources import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..whole_files import write_whole
from .adapter_ways import check_way
from .early import check_before_learning, learned_path
from .learn_options import vector_names
from .recipe import Recipe

LEARNING = "learning.json"
CHECKPOINTS = ("checkpoint", "checkpoint.old", "checkpoint.partial")
LOCK = "checkpoint.lock"  # of `MergeTrainer`
FILES = (
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md", LEARNING, "history.json", RECORD, LOCK, f"{VECTORS}/",
    *(f"{name}/" for name in CHECKPOINTS),
)  # fmt: skip


def vectors_of(recipe: Recipe) -> dict[str, Reference]:
    """The task vectors by name; opens their headers, so that a typo is found before anything is learned.

    Raises:
        InputError: a model that is not there, or damaged.
    """
    models = [entry.model for entry in recipe.merged_models]
    for reference in models:
        open_source(reference)
    return dict(zip(vector_names(models), models, strict=True))


def learn(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    say: Callable[[str], None] = print,
) -> Recipe:
    """Learn what a recipe's `learn` block asks for, beside the result.

    Args:
        recipe: with a `learn` block.
        out: the result, which is not made here.
        resume: take what was learned by the same recipe already, or go on from the checkpoint of an interrupted learning.
        overwrite: replace what was learned before.
        device: where to compute.
        say: called with lines of the log.

    Returns:
        The recipe with `learned` in place of `learn`.

    Raises:
        RecipeError: columns, splits or labels that do not fit.
        InputError: a model, a head or data that cannot be read.
        OutputError: there is something already.

    Cost: steps x tasks forward and backward passes of the base; see `MergeTrainer`.
    """
    folder = learned_path(out)
    settle(folder)
    check_before_learning(recipe, out, device)
    replay = _replay(recipe, folder)
    if folder.exists() and resume and _record(folder).get("recipe") == recipe.to_yaml():
        _compare_rows(recipe, folder, say)
        say(f"Learned already: {folder}.")
        return replay
    if not folder.exists() and resume and not overwrite and out.is_dir() and any(out.iterdir()):
        raise OutputError(
            f"{out}: already exists, and {folder}, by which it was merged, does not: there is nothing to resume. Choose "
            f"another folder, or pass --overwrite to learn and merge anew."
        )
    check_place(folder, overwrite=overwrite)
    output = OutputFolder(folder, "learn", overwrite=overwrite)
    try:
        check_place(folder, overwrite=overwrite)  # once more: another process may just have ended
        if output.is_begun() and not resume and not overwrite:
            raise OutputError(
                f"{output.folder}: an unfinished learning is there. Pass --resume to go on, or --overwrite to start anew."
            )
        partial = output.begin(FILES, keep=resume)
        goes_on = _begun(partial)
        _learn_into(partial, recipe, _replay(recipe, partial), goes_on, device, say)
        for name in CHECKPOINTS:
            remove_scratch(partial / name)
        write_record(partial, "learn")
        output.place()
    except BaseException:
        if _begun(output.folder):
            output.leave()
        else:  # nothing was learned that one could go on from
            output.discard()
        raise
    return replay


def _begun(partial: Path) -> bool:
    return any((partial / name).exists() for name in ("checkpoint", "checkpoint.old"))


def _replay(recipe: Recipe, folder: Path) -> Recipe:
    given = recipe.subspace.model_copy(update={"learn": None, "learned": Reference(str(folder))})
    return recipe.model_copy(update={"subspace": given})


def _record(folder: Path) -> dict[str, Any]:
    path = folder / LEARNING
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{path}: cannot be read ({error}). Remove {folder}, or pass --overwrite to start anew.") from error


def _write_learning(folder: Path, record: dict[str, Any]) -> None:
    write_whole(folder / LEARNING, json.dumps(record, indent=1))


def _seed(recipe: Recipe) -> int:
    options = recipe.subspace.learn
    assert options is not None
    return recipe.subspace.seed if options.seed is None else options.seed


def _compare_rows(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> None:
    """What was learned already is taken if it was learned from these rows; it may be without the data."""
    from ..training.recipe_rows import Rows

    options, known = recipe.subspace.learn, _record(folder).get("data")
    assert options is not None
    for task in options.tasks:
        try:
            found = Rows.draw(task, _seed(recipe)).digest()
        except (InputError, RecipeError) as error:
            say(f"The rows of {task.name!r} were not compared with those that were learned from: {error}")
            continue
        if not isinstance(known, dict) or known.get(task.name) != found:
            raise OutputError(
                f"{folder}: was learned from other rows of the task {task.name!r}. Pass --overwrite to learn anew, or restore "
                f"the data."
            )


def _learn_into(folder: Path, recipe: Recipe, replay: Recipe, goes_on: bool, device: str, say: Callable[[str], None]) -> None:
    import torch
    from accelerate import Accelerator

    from ..training.merge_trainer import MergeArguments, MergeTrainer
    from ..training.recipe_tasks import Built
    from .planner import make_plan

    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    options = recipe.subspace.learn
    assert options is not None
    seed = _seed(recipe)
    accelerator = Accelerator(cpu=device == "cpu")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = Built(recipe, vectors_of(recipe), seed, accelerator.device)
        record = {"recipe": recipe.to_yaml(), "data": {name: rows.digest() for name, rows in built.rows.items()}}
        if goes_on:
            changed = [key for key, value in record.items() if _record(folder).get(key) != value]
            if changed:
                words = {"recipe": "another recipe", "data": "other data"}
                raise OutputError(
                    f"{folder}: was begun with {' and '.join(words[key] for key in changed)}. Pass --overwrite to start anew."
                )
        _write_learning(folder, record)
        if not goes_on:
            built.model.save_pretrained(folder)
            plan = make_plan(replay)  # what could not be merged afterwards is said now
            if recipe.subspace.output == "adapter":
                check_way(plan)
        given = MergeArguments(
            mask_steps=options.steps, mask_lr=options.mask_lr, inner_lr=options.inner_lr, coefficient_steps=options.steps,
            coefficient_lr=options.lr, accumulation=options.accumulation, eval_every=options.eval_every,
            eval_batches=options.eval_batches, patience=options.patience, select=options.select, output_dir=str(folder),
            save_every=options.eval_every, seed=seed,
        )  # fmt: skip
        trainer = MergeTrainer(
            built.model,
            built.tasks,
            given,
            evaluate=built.accuracies if built.looks else None,
            accelerator=accelerator,
            say=say,
        )
        history = trainer.train(resume=goes_on)
        first, kept = history[0], trainer.selected
    metrics = {f"{first.measure} at the start": first.mean, first.measure: kept.mean}
    for name, value in kept.metrics.items():
        metrics |= {f"{name} at the start": first.metrics[name], name: value}
    built.model.peft_config["default"].metrics = metrics
    built.model.save_pretrained(folder)
    singles = _compare_with_singles(built, first, kept)
    versions = {"peft_subspace": __version__, **{name: version(name) for name in ("torch", "transformers", "datasets")}}
    found = {**record, "start": asdict(first), "result": asdict(kept), **singles, "versions": versions}
    _write_learning(folder, found)


def _compare_with_singles(built: Any, first: Any, kept: Any) -> dict[str, Any]:
    """Warn where learning has not raised the accuracy (from below 1), with that of every model alone; for the record."""
    if sum(kept.metrics.values()) > sum(first.metrics.values()) or all(value == 1 for value in kept.metrics.values()):
        return {}
    singles = built.single_accuracies()
    before, after = (sum(look.metrics.values()) / len(look.metrics) for look in (first, kept))
    alone = "; ".join(f"{name}: {_numbers(metrics)}" for name, metrics in singles.items())
    warnings.warn(
        f"learning has not raised the accuracy on held-out rows: a mean of {before:.4f} at the start, {after:.4f} in the end "
        f"({_numbers(kept.metrics)}). The models alone: {alone}. More steps, another rate, `loss` or `init` may help; if not, "
        f"merge without `learn`.",
        stacklevel=2,
    )
    return {"singles": singles}


def _numbers(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
