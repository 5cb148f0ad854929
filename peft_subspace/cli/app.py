"""Commands and their options. Everything heavy is imported inside of the commands."""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Optional

import typer

from .._version import __version__
from . import console

app = typer.Typer(
    name="peft-subspace",
    help="Merge models and adapters, extract and inspect task vectors. Exit codes: 0 done, 2 recipe or arguments, 3 a model or "
    "adapter, 4 the output or the disk, 5 verify found a difference, 130 interrupted, 1 a bug.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but warnings and errors.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read .bin weights too, with torch's weights_only loader.")]


def run(arguments: list[str]) -> int:
    """Run a command line; the exit code. Nothing that a user can cause ends in a traceback."""
    warnings.showwarning = lambda message, *_: console.warn(str(message))
    try:
        result = app(arguments, standalone_mode=True)
        return int(result or 0)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        if os.environ.get("PEFT_SUBSPACE_DEBUG"):
            raise
        console.fail(str(error))
        return getattr(error, "exit_code", 2)
    except OSError as error:
        if os.environ.get("PEFT_SUBSPACE_DEBUG"):
            raise
        console.fail(f"{error.filename or ''}: {error.strerror or error}.".removeprefix(": "))
        return 4
    except RuntimeError as error:
        if os.environ.get("PEFT_SUBSPACE_DEBUG") or not _is_of_lapack(error):
            raise
        console.fail(f"a matrix cannot be decomposed; a model has values that are NaN, infinite or too large: {error}")
        return 3
    except MemoryError:
        console.fail("not enough memory. Use fewer --threads; methods that work on matrices need the largest tensor whole.")
        return 4


def _is_of_lapack(error: RuntimeError) -> bool:
    torch = sys.modules.get("torch")  # a command that never imported it did not get it from there
    return torch is not None and isinstance(error, torch.linalg.LinAlgError)


def _version(show: bool) -> None:
    if show:
        print(f"peft_subspace {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """The options before a command."""


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(help="The recipe: YAML, as for mergekit.", show_default=False)],
    out: Annotated[Optional[Path], typer.Argument(help="The folder to make.", show_default=False)] = None,  # noqa: UP045
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done; reads headers only.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted merge.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    threads: Annotated[Optional[int], typer.Option(min=1, max=256, help="Tensors at a time [the cores, at most 6].")] = None,  # noqa: UP045
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")] = "cpu",
    shard_size: Annotated[Optional[str], typer.Option(help="Most bytes of one file, such as 5GB.")] = None,  # noqa: UP045
    hash_inputs: Annotated[
        bool, typer.Option("--hash-inputs", help="Note the SHA-256 of whole inputs, not of samples.")
    ] = False,
    allow_pickle: Pickle = False,
    push_to_hub: Annotated[Optional[str], typer.Option(help="Upload the result to this repository.")] = None,  # noqa: UP045
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    quiet: Quiet = False,
) -> None:
    """Merge models or adapters by a recipe."""
    from ..merging.early import check_before_merging
    from ..merging.outputs import side_files
    from ..merging.planner import make_plan
    from ..merging.recipe import load_recipe, with_shard_size
    from ..merging.run import describe_unfinished
    from ..merging.run import merge as merge_recipe
    from ..task_vectors.errors import RecipeError
    from ..task_vectors.output_folder import partial_path, settle
    from ..task_vectors.pickles import pickles_allowed
    from ..task_vectors.places import check_place, describe_place, real_place
    from ..task_vectors.remote import headers_only
    from .report import describe
    from .upload import check_name, check_repository, upload

    if push_to_hub is not None:
        check_name(push_to_hub)
    found = load_recipe(recipe)
    if shard_size is not None:
        found = with_shard_size(found, shard_size)
    if out is None and not dry_run:
        raise RecipeError("the folder to make is missing: peft-subspace merge RECIPE OUT, or --dry-run to see the plan.")
    old_files = [] if push_to_hub is None else check_repository(push_to_hub, overwrite or resume)
    with pickles_allowed(allow_pickle, None if out is None else out.parent), headers_only(dry_run):
        if found.subspace.learn is not None:
            from .learning import describe_learning, learn_first

            if dry_run:
                describe_learning(found, out, device, quiet, source=recipe, overwrite=overwrite)
                return
            assert out is not None
            found = learn_first(found, out, source=recipe, resume=resume, overwrite=overwrite, device=device, quiet=quiet)
            device = "cpu" if found.subspace.output == "adapter" else device  # it was for the learning
        plan = make_plan(found)
        for note in plan.notes:
            console.warn(note)
        from ..merging.run import default_threads

        workers = threads or default_threads()
        if dry_run:
            check_before_merging(plan, device)
            if found.subspace.output == "model":
                side_files(plan)
            if not quiet:
                describe(plan, workers)
            if out is not None:
                place = check_place(out, overwrite=overwrite, parts=plan.checkpoints, recipe=recipe)
                console.say(f"Place    {describe_place(out, place)}", quiet)
                if text := describe_unfinished(out, resume, overwrite):
                    console.say(f"Place    {text}", quiet)
            return
        assert out is not None
        settle(out)
        unfinished = partial_path(real_place(out))
        if resume and not unfinished.exists():
            state = f"{out} already exists" if out.exists() else f"there is no {unfinished}; starting anew"
            console.say(f"Nothing to resume: {state}.", quiet)
        started = time.monotonic()
        try:
            with console.progress("Merging", sum(tensor.nbytes for tensor in plan.tensors), quiet) as progress:
                merge_recipe(
                    found, out, resume=resume, overwrite=overwrite, threads=workers, device=device, hash_inputs=hash_inputs,
                    progress=progress, plan=plan, recipe_file=recipe,
                )  # fmt: skip
        except KeyboardInterrupt:
            console.fail(f"interrupted. Go on with --resume, or remove {unfinished}.")
            raise typer.Exit(130) from None
    took = time.monotonic() - started
    if found.subspace.output == "adapter":
        written = f"a LoRA adapter, {console.size(sum(file.stat().st_size for file in out.glob('*.safetensors')))}"
    else:
        written = f"{len(plan.tensors)} tensors, {console.size(plan.layout.total)}"
    console.say(f"{out}: {written}, in {console.duration(took)}.", quiet)
    if push_to_hub is not None:
        console.say(f"Uploaded to {upload(out, push_to_hub, private, old_files)}", quiet)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A merged folder.", show_default=False)],
    inputs: Annotated[bool, typer.Option("--inputs/--no-inputs", help="Look at the models too.")] = True,
    quiet: Quiet = False,
) -> None:
    """Check a merged folder, and the models it was made from, against its manifest."""
    from ..merging.manifest import verify as verify_folder

    found = verify_folder(folder, inputs)
    for name in found.not_found:
        console.warn(f"the input {name} is not there any more")
    text = f"{found.files} files ({console.size(found.bytes)}) are as they were written"
    console.say(f"{folder}: {text}" + (f", {found.inputs} files of the inputs as they were read." if inputs else "."), quiet)


@app.command()
def extract(
    model: Annotated[str, typer.Argument(help="The fine-tuned model: folder, Hub id, model@revision, model+lora.")],
    out: Annotated[Path, typer.Argument(help="Folder of the adapter, or the task-vector file.")],
    base: Annotated[str, typer.Option(help="The model that it was made from.")],
    rank: Annotated[Optional[int], typer.Option(min=1, help="Rank of the LoRA; the largest with --energy.")] = None,  # noqa: UP045
    energy: Annotated[Optional[float], typer.Option(help="Share of the squared norm to keep, such as 0.9.")] = None,  # noqa: UP045
    task_vector: Annotated[bool, typer.Option("--task-vector", help="Write the difference as it is.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    allow_pickle: Pickle = False,
    quiet: Quiet = False,
) -> None:
    """Make a LoRA adapter or a task-vector file out of a fine-tuned model and its base."""
    from ..task_vectors.errors import RecipeError
    from ..task_vectors.extract import extract_lora
    from ..task_vectors.locks import only_writer
    from ..task_vectors.models import open_source, without_base
    from ..task_vectors.pickles import pickles_allowed
    from ..task_vectors.places import check_file
    from ..task_vectors.sources import shortened
    from ..task_vectors.task_vector import TaskVector

    if task_vector and (rank is not None or energy is not None):
        raise RecipeError("--task-vector keeps everything; leave out --rank and --energy.")
    with pickles_allowed(allow_pickle, out.parent):
        if task_vector:
            if out.suffix != ".safetensors":
                raise RecipeError(f"{out}: a task vector is one file; give a name that ends in .safetensors.")
            check_file(out, overwrite)
            sources = open_source(model), open_source(base)
            place = check_file(out, overwrite, (part for source in sources for part in source.checkpoints))
            vector = TaskVector.of_source(without_base(*sources), sources[1])
            with only_writer(place):
                check_file(out, overwrite)  # once more: another process may just have ended
                vector.save(out)
            console.say(f"{out}: {len(vector)} tensors, {console.size(out.stat().st_size)}, norm {vector.norm():.4g}.", quiet)
            return
        found = extract_lora(model, base, out, rank=rank, energy=energy, overwrite=overwrite)
    ranks = sorted(set(found.ranks.values()))
    spread = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    console.say(f"{out}: {len(found.ranks)} weights, rank {spread}, {found.parameters:,} values.", quiet)
    console.say(f"Relative error of the whole difference: {found.error:.3g}", quiet)
    if found.left_out:
        share = sum(found.left_out.values())
        console.say(
            f"Left out, as LoRA has no layer for them: {len(found.left_out)} tensors, {share:.2%} of the squared norm "
            f"({shortened(sorted(found.left_out))}). --task-vector keeps all of them.",
            quiet,
        )


@app.command()
def inspect(
    models: Annotated[list[str], typer.Argument(help="Fine-tuned models, adapters or task-vector files.", show_default=False)],
    base: Annotated[Optional[str], typer.Option(help="The model that they were made from.")] = None,  # noqa: UP045
    spectrum: Annotated[bool, typer.Option("--spectrum", help="Singular values too; needs each matrix whole.")] = False,
    plot: Annotated[Optional[Path], typer.Option(help="Draw a picture into this file (.png, .svg, .pdf).")] = None,  # noqa: UP045
    allow_pickle: Pickle = False,
    quiet: Quiet = False,
) -> None:
    """Norms, cosines, sign conflict, density, spectrum of task vectors; with --spectrum and no base: spectrum of a model."""
    import torch

    from ..task_vectors.compare import compare
    from ..task_vectors.models import open_source, without_base
    from ..task_vectors.pickles import pickles_allowed
    from ..task_vectors.task_vector import TaskVector
    from .inspection import check_plot, draw, show

    if plot is not None:
        check_plot(plot)
    if spectrum and base is None and len(models) == 1 and (full := open_source(models[0]).full) is not None:
        from .spectra import show_weights

        show_weights(full, plot, quiet)
        if plot is not None:
            console.say(f"{plot}: drawn.", quiet)
        return
    with pickles_allowed(allow_pickle), torch.inference_mode():
        own = None if base is None else open_source(base)
        vectors = [TaskVector.of_source(without_base(open_source(model), own), own) for model in models]
        names = {name: 1 for vector in vectors for name in vector.shapes}
        shapes = {name: vector.shapes[name] for vector in vectors for name in vector.shapes}
        import math

        total = 4 * sum(math.prod(shapes[name]) for name in names)
        with console.progress("Reading", total, quiet) as progress:
            found = compare(vectors, models, spectrum=spectrum, progress=progress)
    if not quiet:
        show(found)
    if plot is not None:
        draw(found, plot)
        console.say(f"{plot}: drawn.", quiet)


@app.command()
def export(
    adapter: Annotated[str, typer.Argument(help="An adapter of this package: folder or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder of the LoRA adapter.")],
    base: Annotated[Optional[str], typer.Option(help="The base, if the adapter's config does not name it.")] = None,  # noqa: UP045
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    quiet: Quiet = False,
) -> None:
    """Turn an adapter of this package into plain LoRA, which serving engines read: the same update, no SVD."""
    from .exporting import export_lora

    export_lora(adapter, out, base, overwrite)
    console.say(f"{out}: a LoRA adapter for plain PEFT.", quiet)
