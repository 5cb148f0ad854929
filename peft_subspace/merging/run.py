"""A merge from beginning to end: plan, work beside the final place, check, rename."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..task_vectors.errors import OutputError
from ..task_vectors.places import put_in_place, sync_folder
from .ahead import Ahead
from .early import check_before_merging, partial_path
from .files import OutputFiles, begin_folder, write_synced
from .journal import Journal
from .manifest import MANIFEST, make_manifest
from .outputs import RECIPE_FILE, card, side_files, write_side_files
from .plan import Plan
from .planner import make_plan
from .recipe import Recipe, load_recipe, make_recipe

SPARE = 64 * 2**20  # bytes for config, tokenizer and manifest


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
) -> Path:
    """Merge models by a recipe, in bounded memory.

    Args:
        recipe: a file, a dictionary, or a `Recipe`; one with a `learn` block learns first (`merging.learning`).
        out: the folder to make. It appears when everything is written and on the disk; until then there is `out.partial`.
        resume: go on with a merge that was interrupted, at whatever point. The bytes are those of an uninterrupted one.
        overwrite: replace what is there, a finished or a partial result.
        threads: tensors that are worked on at a time; the cores of this process, at most 6, by default.
        device: where to compute.
        hash_inputs: note the SHA-256 of whole input files in the manifest, not of samples.
        progress: called with numbers of bytes of the result as they are done.
        plan: a plan of this very recipe, if it was made already.

    Returns:
        `out`.

    Raises:
        RecipeError: the recipe says something that is not accepted.
        InputError: a model is damaged or does not fit.
        OutputError: `out` cannot be written.
    """
    out = Path(out)
    if plan is None:
        found = load_recipe(recipe) if isinstance(recipe, (str, os.PathLike)) else make_recipe(recipe)
        if found.subspace.learn is not None:
            from .learning import learn

            check_place(out, resume, overwrite)
            found = learn(found, out, resume=resume, overwrite=overwrite, device=device)
            device = "cpu" if found.subspace.output == "adapter" else device  # it was for the learning
        plan = make_plan(found)
    check_before_merging(plan, out, device)
    if plan.recipe.subspace.output == "adapter":
        from .adapters_out import merge_adapters

        return merge_adapters(plan, out, overwrite=overwrite, hash_inputs=hash_inputs, progress=progress)
    partial = _prepare(out, plan, resume, overwrite)
    if partial is None:
        return out
    journal = Journal(partial.with_name(partial.name + ".journal"))
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.aligned-", dir=partial.parent) as scratch:
            if plan.recipe.subspace.align is not None:
                plan = make_plan(plan.recipe, Path(scratch))
            _merge_into(partial, plan, journal, resume, threads, device, hash_inputs, progress)
        put_in_place(partial, out, overwrite)
    except BaseException as error:
        hopeless = isinstance(error, ValueError) and not isinstance(
            error, OutputError
        )  # the recipe or a model: it would fail again
        if hopeless:
            shutil.rmtree(partial, ignore_errors=True)
        journal.close(remove=hopeless)
        raise
    journal.close(remove=True)
    return out


def default_threads() -> int:
    """As many as there are cores for this process, at most 6: then the disk or the memory is the limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(6, cores))


def check_place(out: Path, resume: bool, overwrite: bool) -> bool:
    """Check that the result may be written; whether it is finished already.

    Raises:
        OutputError: something is there, and neither `resume` nor `overwrite` says what to do about it.
    """
    partial = partial_path(out)
    if out.exists() and not overwrite and not (out.is_dir() and not any(out.iterdir())):
        if resume and (out / MANIFEST).is_file() and not partial.exists():
            return True
        raise OutputError(f"{out}: is there already. Choose another folder, or pass --overwrite.")
    if partial.exists() and not resume and not overwrite:
        raise OutputError(
            f"{partial}: an unfinished merge is there. Pass --resume to go on with it, or --overwrite to start anew."
        )
    return False


def _prepare(out: Path, plan: Plan, resume: bool, overwrite: bool) -> Path | None:
    """The folder of the unfinished result, or None if it is finished already.

    Raises:
        OutputError: another recipe's result is there.
    """
    partial = partial_path(out)
    if check_place(out, resume, overwrite):
        made_by = out / RECIPE_FILE
        if not made_by.is_file() or _resolved(load_recipe(made_by)) != _resolved(plan.recipe):
            raise OutputError(
                f"{out}: is there already, and {RECIPE_FILE} in it is another recipe, so there is nothing to resume. Choose "
                f"another folder, or pass --overwrite."
            )
        partial.with_name(partial.name + ".journal").unlink(missing_ok=True)
        return None
    begin_folder(partial, keep=resume)
    return partial


def _resolved(recipe: Recipe) -> Any:
    """What a recipe says, with the places that it names as they are, however they were written."""

    def resolved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: resolved(one) for key, one in value.items()}
        if isinstance(value, list):
            return [resolved(one) for one in value]
        return os.path.realpath(value) if isinstance(value, str) and os.path.exists(value) else value

    return resolved(recipe.model_dump(mode="json"))


def _merge_into(
    folder: Path,
    plan: Plan,
    journal: Journal,
    resume: bool,
    threads: int | None,
    device: str,
    hash_inputs: bool,
    progress: Callable[[int], None] | None,
) -> None:
    kind = plan.recipe.subspace.output
    files = (
        side_files(plan)
        if kind == "model"
        else {RECIPE_FILE: plan.recipe.to_yaml().encode(), "README.md": card(plan, kind).encode()}
    )
    identity = plan.identity()
    done = journal.read(identity) if resume else {}
    _check_space(folder, plan)
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
    write_side_files(folder, files)
    manifest = make_manifest(plan, weights, folder, hash_inputs)
    write_synced(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False).encode() + b"\n")
    sync_folder(folder)


def _check_space(folder: Path, plan: Plan) -> None:
    there = sum(file.stat().st_size for file in folder.iterdir())
    free = shutil.disk_usage(folder).free + there
    if plan.layout.total + SPARE > free and plan.layout.total > free:
        raise OutputError(f"{folder}: the result has {plan.layout.total:,} bytes, and {free:,} are free on this disk.")
