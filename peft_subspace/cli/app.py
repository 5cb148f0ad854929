"""Commands and their options. Everything heavy is imported inside of the commands."""

from __future__ import annotations

import os
import time
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
    try:
        result = app(arguments, standalone_mode=True)
        return int(result or 0)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        console.fail("interrupted.")
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
    except MemoryError:
        console.fail("not enough memory. Use fewer --threads; methods that work on matrices need the largest tensor whole.")
        return 4


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
    threads: Annotated[Optional[int], typer.Option(min=1, max=256, help="Tensors at a time [the cores, at most 8].")] = None,  # noqa: UP045
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
    from ..merging.plan import make_plan
    from ..merging.recipe import load_recipe, make_recipe
    from ..merging.run import merge as merge_recipe
    from ..task_vectors.errors import RecipeError
    from ..task_vectors.pickles import pickles_allowed
    from .report import describe

    found = load_recipe(recipe)
    if shard_size is not None:
        table = found.model_dump(exclude_unset=True)
        table["subspace"] = {**(table.get("subspace") or {}), "shard_size": shard_size}
        found = make_recipe(table, "--shard-size")
    if out is None and not dry_run:
        raise RecipeError("the folder to make is missing: peft-subspace merge RECIPE OUT, or --dry-run to see the plan.")
    with pickles_allowed(allow_pickle, None if out is None else out.parent):
        plan = make_plan(found)
        for note in plan.notes:
            console.warn(note)
        from ..merging.run import default_threads

        workers = threads or default_threads()
        if dry_run:
            describe(plan, workers)
            return
        assert out is not None
        started = time.monotonic()
        with console.progress("Merging", sum(tensor.nbytes for tensor in plan.tensors), quiet) as progress:
            merge_recipe(
                found, out, resume=resume, overwrite=overwrite, threads=workers, device=device, hash_inputs=hash_inputs,
                progress=progress, plan=plan,
            )  # fmt: skip
    took = time.monotonic() - started
    console.say(f"{out}: {len(plan.tensors)} tensors, {console.size(plan.layout.total)}, in {console.duration(took)}.", quiet)
    if push_to_hub is not None:
        from .upload import upload

        console.say(f"Uploaded to {upload(out, push_to_hub, private)}", quiet)


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
