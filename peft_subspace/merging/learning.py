"""From a recipe with a `learn` block to one that replays what was learned.

    OUT.learned/        the adapter; learning.json: recipe, data, loss and accuracies at the start and in the end; history.json

The adapter is trained by `MergeTrainer` on models that transformers makes; the merged model comes from the streaming engine by
the recipe that is returned, which can be merged again without the data.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .._version import __version__
from ..task_vectors.errors import OutputError, RecipeError
from ..task_vectors.models import open_source
from ..task_vectors.references import Reference, locate
from .files import disk_error
from .learn_options import TaskOptions, vector_names
from .recipe import Recipe

RECORD = "learning.json"


def learned_path(out: Path) -> Path:
    """Where the adapter of a result is."""
    return out.with_name(out.name + ".learned")


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
    partial = folder.with_name(folder.name + ".partial")
    replay = _replay(recipe, folder)
    if folder.exists():
        if resume and _record(folder).get("recipe") == recipe.to_yaml():
            say(f"Learned already: {folder}.")
            return replay
        if not overwrite or not (folder / RECORD).is_file():
            raise OutputError(f"{folder}: is there already. Choose another name for the result, or pass --overwrite.")
    if partial.exists() and not resume and not overwrite:
        raise OutputError(f"{partial}: an unfinished learning is there. Pass --resume to go on, or --overwrite to start anew.")
    try:
        if partial.exists() and not resume:
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(partial, error) from error
    goes_on = (partial / "checkpoint").exists() or (partial / "checkpoint.old").exists()
    try:
        _learn_into(partial, recipe, _replay(recipe, partial), goes_on, device, say)
    except ValueError:
        if not goes_on:  # it would fail again; a checkpoint is kept
            shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(partial / "checkpoint", ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    return replay


def _replay(recipe: Recipe, folder: Path) -> Recipe:
    given = recipe.subspace.model_copy(update={"learn": None, "learned": Reference(str(folder))})
    return recipe.model_copy(update={"subspace": given})


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _learn_into(folder: Path, recipe: Recipe, replay: Recipe, goes_on: bool, device: str, say: Callable[[str], None]) -> None:
    import torch
    from accelerate import Accelerator

    from ..training.merge_trainer import MergeArguments, MergeTrainer
    from .planner import make_plan
    from .run import check_device

    check_device(device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    options = recipe.subspace.learn
    assert options is not None
    seed = recipe.subspace.seed if options.seed is None else options.seed
    accelerator = Accelerator(cpu=device == "cpu")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = _Built(recipe, seed, accelerator.device)
        record = {"recipe": recipe.to_yaml(), "data": {name: rows.digest() for name, rows in built.rows.items()}}
        if goes_on:
            changed = [key for key, value in record.items() if _record(folder).get(key) != value]
            if changed:
                raise OutputError(
                    f"{folder}: was begun with another {' and other '.join(changed)}. Pass --overwrite to start anew."
                )
        (folder / RECORD).write_text(json.dumps(record))
        if not goes_on:
            built.model.save_pretrained(folder)
            make_plan(replay)  # what could not be merged afterwards is said now
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
    versions = {"peft_subspace": __version__, **{name: version(name) for name in ("torch", "transformers", "datasets")}}
    found = {**record, "start": asdict(first), "result": asdict(kept), "versions": versions}
    (folder / RECORD).write_text(json.dumps(found, indent=1))


class _Built:
    """Models, adapter and data of a recipe.

    Attributes:
        model: the PeftModel.
        tasks: for the trainer.
        rows: of every task.
        looks: those with held-out rows: name -> (answers, batches with labels).
    """

    def __init__(self, recipe: Recipe, seed: int, device: Any) -> None:
        from peft import get_peft_model

        from ..training.recipe_models import load_base
        from ..training.recipe_rows import Rows

        options, base = recipe.subspace.learn, recipe.base_model
        assert options is not None
        assert base is not None
        if base.lora is not None:
            raise RecipeError(f"base_model: {base} names two things; the base to learn on is a model.")
        vectors = vectors_of(recipe)
        config = _config(recipe, vectors)
        self.rows = {task.name: Rows.draw(task, seed) for task in options.tasks}
        self.options, self.base, self.vectors = options, base, vectors
        self.folder, _ = locate(base.model, base.revision)
        kind = options.tasks[0].kind
        model, self.answers_itself = load_base(self.folder, kind, str(base))
        model.name_or_path = base.model
        self.encoder = model if kind == "answers" or not self.answers_itself else model.base_model
        self.base_config = model.config
        self.model: Any = get_peft_model(model, config).to(device).eval()
        self.looks: dict[str, Any] = {}
        self.tasks = [self._task(task) for task in options.tasks]

    def _task(self, task: TaskOptions) -> Any:
        from ..training.recipe_models import head_logits, own_logits
        from ..training.recipe_rows import LABELS, Inputs
        from ..training.tasks import Task, token_logits

        inputs = Inputs(task, self.folder, str(self.base), self.base_config)
        head = task.head if self.answers_itself else task.head or self.vectors.get(task.name)
        if task.answers is not None:
            tokens = inputs.answer_tokens()
            logits, inputs.classes = token_logits(tokens, 0 if self.base_config.is_encoder_decoder else -1), len(tokens)
        elif head is not None:
            logits, inputs.classes, config = head_logits(self.encoder, task.kind, head, self.base_config, task.name)
            inputs.class_names = _names(config, inputs.classes)
        elif self.answers_itself:
            logits, inputs.classes = own_logits, self.base_config.num_labels
            inputs.class_names = _names(self.base_config, self.base_config.num_labels)
        else:
            raise RecipeError(
                f"task {task.name!r}: which head? {self.base} has none, and no model is called {task.name!r} (there are "
                f"{', '.join(self.vectors)}). Write `head: MODEL`."
            )
        rows, size = self.rows[task.name], self.options.batch_size
        if task.label is not None:
            inputs.check_labels(rows.held_out)
        if len(rows.held_out):
            self.looks[task.name] = (logits, inputs.loader(rows.held_out, 4 * size, labels=True, shuffle=False))
        labels = LABELS if self.options.loss == "cross_entropy" else None
        if labels:
            inputs.check_labels(rows.learned)
        loader = inputs.loader(rows.learned, size, labels=labels is not None, shuffle=True)
        return Task(task.name, loader, logits, labels)

    def accuracies(self, model: Any) -> Mapping[str, float]:
        """Task -> share of the held-out rows that are right."""
        from accelerate.utils import send_to_device

        found = {}
        for name, (logits, batches) in self.looks.items():
            right = total = 0
            for batch in batches:
                batch = dict(send_to_device(batch, next(model.parameters()).device))
                labels = batch.pop("labels")
                right += int((logits(model, batch).argmax(-1) == labels).sum())
                total += len(labels)
            found[f"accuracy on {name}"] = right / total
        return found


def _names(config: Any, classes: int) -> list[str]:
    names = getattr(config, "id2label", None) or {}
    return [str(names[number]) for number in range(classes)] if set(range(classes)) <= set(names) else []


def _config(recipe: Recipe, vectors: Mapping[str, Reference]) -> Any:
    """The adapter's config, with the recipe's models for a pool."""
    from ..adapters import AtlasConfig, ConcreteConfig

    options = recipe.subspace.learn
    assert options is not None
    base = str(recipe.base_model)
    pool = {name: {**_place(reference), "base": base} for name, reference in vectors.items()}
    own: dict[str, Any] = {"pool": pool, "base": base, **options.config}
    if recipe.merge_method == "concrete":
        own.setdefault("seed", recipe.subspace.seed if options.seed is None else options.seed)
    try:
        return (AtlasConfig if recipe.merge_method == "atlas" else ConcreteConfig)(**own)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"subspace.learn.config: {error}") from error


def _place(reference: Reference) -> dict[str, Any]:
    """A reference as a pool has it."""
    if reference.lora is None:
        return {"path": reference.model} | ({"revision": reference.revision} if reference.revision else {})
    table = {"model": (reference.model, reference.revision), "lora": (reference.lora, reference.lora_revision)}
    return {key: {"path": p} | ({"revision": r} if r else {}) for key, (p, r) in table.items()}
