"""A merge from beginning to end: plan, work beside the final place, check, rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..task_vectors.disk import sync_folder
from ..task_vectors.errors import OutputError
from ..task_vectors.locks import remove_scratch
from ..task_vectors.output_folder import OutputFolder, partial_path, settle
from ..task_vectors.places import MANIFEST, check_place, real_place
from .ahead import Ahead
from .early import check_before_merging
from .files import OutputFiles, write_new
from .journal import Journal
from .manifest import make_manifest
from .outputs import RECIPE_FILE, card, side_files, write_side_files
from .plan import Plan
from .planner import make_plan
from .recipe import Recipe, load_recipe, make_recipe

SPARE = 64 * 2**20  # bytes for config, tokenizer and manifest
ALIGNED = ".aligned"  # a folder in the unfinished result: copies of the models with their neurons in one order


def merge(
    recipe: Recipe | dict[str, Any] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    hash_inputs: bool = False,
    progress: Callable[[int], None] | None = None,
    plan: Plan | None = None,
    recipe_file: Path | None = None,
) -> Path:
    """Merge models by a recipe, in bounded memory.

    Args:
        recipe: a file, a dictionary, or a `Recipe`; one with a `learn` block learns first (`merging.learning`).
        out: the folder to make. It appears when everything is written and on the disk; until then there is `out.partial`.
        resume: go on with a merge that was interrupted, at whatever point. The bytes are those of an uninterrupted one.
        overwrite: replace a finished or an unfinished result of this package; nothing else is ever replaced.
        threads: tensors that are worked on at a time; the cores of this process, at most 6, by default.
        device: where to compute.
        hash_inputs: note the SHA-256 of whole input files in the manifest, not of samples.
        progress: called with numbers of bytes of the result as they are done.
        plan: a plan of this very recipe, if it was made already.
        recipe_file: where the recipe was read from, if it was read already; its folder is not replaced.

    Returns:
        `out`.

    Raises:
        RecipeError: the recipe says something that is not accepted.
        InputError: a model is damaged or does not fit.
        OutputError: `out` cannot be written.
    """
    out = Path(out)
    settle(out)
    source = Path(recipe) if isinstance(recipe, (str, os.PathLike)) else recipe_file
    if plan is None:
        found = load_recipe(recipe) if isinstance(recipe, (str, os.PathLike)) else make_recipe(recipe)
        if found.subspace.learn is not None:
            from .learning import learn

            if not is_finished(out, resume):
                check_place(out, overwrite=overwrite, recipe=source)
            found = learn(found, out, resume=resume, overwrite=overwrite, device=device)
            device = "cpu" if found.subspace.output == "adapter" else device  # it was for the learning
        plan = make_plan(found)
    check_before_merging(plan, device)
    if is_finished(out, resume) and is_made_by(out, plan.recipe, overwrite):
        return out
    place = check_place(out, overwrite=overwrite, parts=plan.checkpoints, recipe=source)
    if plan.recipe.subspace.output == "adapter":
        from .adapters_out import merge_adapters

        merge_adapters(plan, place, overwrite=overwrite, hash_inputs=hash_inputs, progress=progress)
        return out
    _check_space(place, plan)
    output = OutputFolder(place, "merge", overwrite=overwrite)
    try:
        check_place(out, overwrite=overwrite)  # once more: another process may just have ended
        _begin(output, plan, resume, overwrite)
        if plan.recipe.subspace.align is not None:
            scratch = output.folder / ALIGNED
            remove_scratch(scratch)
            scratch.mkdir()
            plan = make_plan(plan.recipe, scratch)
        _merge_into(output, plan, resume, threads, device, hash_inputs, progress)
        output.place()
    except OutputError:
        output.leave()
        raise
    except ValueError:  # the recipe or a model: it would fail again
        output.discard()
        raise
    except BaseException:
        output.leave()
        raise
    return out


def default_threads() -> int:
    """As many as there are cores for this process, at most 6: then the disk or the memory is the limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(6, cores))


def is_finished(out: Path, resume: bool) -> bool:
    """Whether there is nothing to resume, because the whole result is there."""
    place = real_place(out)
    return resume and (place / MANIFEST).is_file() and not os.path.lexists(partial_path(place))


def is_made_by(out: Path, recipe: Recipe, overwrite: bool) -> bool:
    """Whether a finished result was made by a recipe.

    Raises:
        OutputError: another recipe's result is there, and `overwrite` is False.
    """
    made_by = out / RECIPE_FILE
    if made_by.is_file() and _resolved(load_recipe(made_by)) == _resolved(recipe):
        return True
    if overwrite:
        return False
    raise OutputError(
        f"{out}: already exists, and {RECIPE_FILE} in it is another recipe, so there is nothing to resume. Choose another "
        f"folder, or pass --overwrite."
    )


def _resolved(recipe: Recipe) -> Any:
    """What a recipe says, with the places that it names as they are, however they were written."""

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: resolved(one) for key, one in value.items()}
        if isinstance(value, list):
            return [resolved(one) for one in value]
        return os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value

    return resolved(recipe.model_dump(mode="json"))


def _begin(output: OutputFolder, plan: Plan, resume: bool, overwrite: bool) -> None:
    """Make the unfinished folder, or go on with the one that is there."""
    _check_unfinished(output, resume, overwrite)
    names = [shard.name for shard in plan.layout.shards]
    output.begin([*names, *_beside_weights(plan), MANIFEST, f"{ALIGNED}/"], keep=resume)


def describe_unfinished(out: Path, resume: bool, overwrite: bool) -> str | None:
    """What would become of an unfinished result that is there; None if there is none.

    Raises:
        OutputError: another process is writing it, or a merge would be refused for it.
    """
    settle(out)
    place = real_place(out)
    if not os.path.lexists(partial_path(place)):
        return None
    output = OutputFolder(place, "merge", overwrite=overwrite)
    try:
        _check_unfinished(output, resume, overwrite)
    finally:
        output.leave()
    return f"{output.folder}: unfinished; the merge would {'go on with it' if resume else 'start anew'}"


def _check_unfinished(output: OutputFolder, resume: bool, overwrite: bool) -> None:
    """See that an unfinished result that is there may be cleared, or gone on with.

    Raises:
        OutputError: it holds files of others, was begun by another command, or neither `resume` nor `overwrite` says what to
            do about it.
    """
    begun = output.is_begun()
    if begun:
        output.refuse_others()
    if begun and not resume and not overwrite:
        raise OutputError(
            f"{output.folder}: an unfinished result of `{output.made_by_another() or 'merge'}` is there. Pass --resume to go "
            f"on with it, or --overwrite to start anew."
        )
    if begun and resume and (other := output.made_by_another()):
        raise OutputError(
            f"{output.folder}: was begun by `{other}`, which cannot be resumed by a merge. Start anew with --overwrite."
        )


def _beside_weights(plan: Plan) -> dict[str, bytes]:
    kind = plan.recipe.subspace.output
    if kind == "model":
        return side_files(plan)
    return {RECIPE_FILE: plan.recipe.to_yaml().encode(), "README.md": card(plan, kind).encode()}


def _merge_into(
    output: OutputFolder,
    plan: Plan,
    resume: bool,
    threads: int | None,
    device: str,
    hash_inputs: bool,
    progress: Callable[[int], None] | None,
) -> None:
    folder, journal, files = output.folder, Journal(output.journal), _beside_weights(plan)
    identity = plan.identity()
    done = journal.read(identity) if resume else {}
    with Ahead([tensor for tensor in plan.tensors if tensor.name not in done]) as ahead:
        from .base_check import check_bases
        from .execute import Settings, execute, verify_done  # imports torch: everything above needs none

        check_bases(plan)
        settings = Settings(threads or default_threads(), device, taken=ahead.taken)
        outputs = OutputFiles(folder, plan.layout)
        try:
            done = verify_done(plan, outputs, done)
            journal.start(identity, done)
            if progress is not None:
                settings.progress = progress
                progress(sum(tensor.nbytes for tensor in plan.tensors if tensor.name in done))
            execute(plan, outputs, journal, done, settings)
        except BaseException:
            outputs.abandon()
            raise
    weights = outputs.close()
    remove_scratch(folder / ALIGNED)
    write_side_files(folder, files)
    manifest = make_manifest(plan, weights, folder, hash_inputs)
    write_new(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n")
    sync_folder(folder)


def _check_space(place: Path, plan: Plan) -> None:
    """See that there is room, before anything is made.

    Raises:
        OutputError: there is not.
    """
    unfinished, parent = partial_path(place), place.absolute().parent
    while not parent.exists():
        parent = parent.parent
    files = list(unfinished.iterdir()) if unfinished.is_dir() else []
    there = sum(512 * os.lstat(file).st_blocks for file in files)  # a file has its final size from the start, but no room
    free = shutil.disk_usage(parent).free + there
    if plan.layout.total + SPARE > free and plan.layout.total > free:
        raise OutputError(f"{place}: the result has {plan.layout.total:,} bytes, and {free:,} are free on this disk.")
