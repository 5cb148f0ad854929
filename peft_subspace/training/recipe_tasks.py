"""What a `learn` block is made into: a model with an adapter on the recipe's task vectors, and tasks for `MergeTrainer`."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import get_peft_model

from ..adapters import AtlasConfig, ConcreteConfig
from ..merging.early import no_head
from ..merging.learn_data import text_columns
from ..merging.learn_options import TaskOptions
from ..merging.recipe import Recipe
from ..task_vectors.errors import InputError, RecipeError
from ..task_vectors.references import Reference, locate
from .objectives import UNLABELLED, entropy_loss
from .recipe_models import head_logits, load_base, own_logits, positions_of, set_pad
from .recipe_rows import LABELS, Inputs, Rows
from .tasks import Logits, Task, token_logits


class Built:
    """Models, adapter and data of a recipe.

    Attributes:
        model: the PeftModel.
        tasks: for the trainer.
        rows: of every task.
        looks: those with held-out rows: name -> (answers, batches with labels).

    Args:
        recipe: with a `learn` block.
        vectors: its task vectors by name.
        seed: of the rows that are drawn.
        device: where to compute.

    Raises:
        RecipeError, InputError: whatever does not fit, by the name of the task.
    """

    def __init__(self, recipe: Recipe, vectors: Mapping[str, Reference], seed: int, device: Any) -> None:
        options, base = recipe.subspace.learn, recipe.base_model
        assert options is not None
        assert base is not None
        config = _config(recipe, vectors)
        self.rows = {task.name: Rows.draw(task, seed) for task in options.tasks}
        self.recipe, self.options, self.base, self.vectors = recipe, options, base, vectors
        self.folder, _ = locate(base.model, base.revision)
        kind = options.tasks[0].kind
        model, self.answers_itself = load_base(self.folder, kind, str(base))
        model.name_or_path = base.model
        self.encoder = model if kind == "answers" or not self.answers_itself else model.base_model
        self.base_config = model.config
        self.positions = positions_of(model)
        self.takes_positions = "position_ids" in signature(type(model).forward).parameters
        try:
            self.model: Any = get_peft_model(model, config).to(device).eval()
        except InputError as error:
            own_heads = kind != "answers" and self.answers_itself
            hint = f" If the models have heads of other classes than {base}, name its encoder alone as base_model: "
            hint += "AutoModel.from_pretrained(BASE).save_pretrained(FOLDER)."
            raise InputError(f"{error}{hint if own_heads else ''}") from error
        self.looks: dict[str, Any] = {}
        self.tasks = [self._task(task) for task in options.tasks]

    def _task(self, task: TaskOptions) -> Task:
        inputs = Inputs(task, self.folder, str(self.base), self.base_config, self.takes_positions, self.positions)
        if task.kind == "text":
            set_pad(self.base_config, inputs.pad)
        head = task.head if self.answers_itself else task.head or self.vectors.get(task.name)
        if task.answers is not None:
            tokens = inputs.answer_tokens()
            logits, inputs.classes = token_logits(tokens, 0 if self.base_config.is_encoder_decoder else -1), len(tokens)
        elif head is not None:
            logits, inputs.classes, config = head_logits(self.encoder, task.kind, head, self.base_config, task.name, inputs.pad)
            inputs.class_names = _names(config, inputs.classes)
        elif self.answers_itself:
            logits, inputs.classes = own_logits, self.base_config.num_labels
            inputs.class_names = _names(self.base_config, self.base_config.num_labels)
        else:
            raise no_head(task, str(self.base), self.vectors)
        rows, size = self.rows[task.name], self.options.batch_size
        self._try(task, logits, inputs, rows)
        if task.label is not None:
            inputs.check_labels(rows.held_out)
        if len(rows.held_out):
            self.looks[task.name] = (logits, inputs.loader(rows.held_out, 4 * size, labels=True, shuffle=False))
        labels = LABELS if self.options.loss == "cross_entropy" else None
        if labels:
            inputs.check_labels(rows.learned)
        loader = inputs.loader(rows.learned, size, labels=labels is not None, shuffle=True)
        return Task(task.name, loader, logits, labels, UNLABELLED.get(self.options.loss, entropy_loss))

    @torch.no_grad()
    def _try(self, task: TaskOptions, logits: Logits, inputs: Inputs, rows: Rows) -> None:
        """Answer two rows, of different lengths if there are such: what does not run is said by name, before all else."""
        device = next(self.model.parameters()).device
        few = [rows.learned[number] for number in range(min(16, len(rows.learned)))]
        if task.image is None:
            few.sort(key=lambda row: sum(len(str(row[name])) for name in text_columns(task)))
        few = [few[0], few[-1]] if len(few) > 1 else few
        batch = send_to_device(inputs.batch(few), device)
        try:
            shape = tuple(logits(self.model, batch).shape)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise InputError(f"task {task.name!r}: its head does not run on the encoder of {self.base}: {error}") from error
        if shape != (len(few), inputs.classes):
            raise InputError(
                f"task {task.name!r}: answers are {list(shape)} for {len(few)} rows, and {inputs.classes} classes are expected."
            )

    @torch.no_grad()
    def accuracies(self, model: Any) -> Mapping[str, float]:
        """Task -> share of the held-out rows that are right."""
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

    def single_accuracies(self) -> dict[str, dict[str, float]]:
        """Task vector -> the accuracies of the base with that vector whole: of the model that it comes from.

        Cost: as many passes over the held-out rows as there are vectors.
        """
        found = {}
        for name in self.vectors:
            # another adapter of the same kind, which shares the vectors in memory
            self.model.add_adapter("single", _config(self.recipe, self.vectors, alone=name))
            self.model.set_adapter("single")
            try:
                found[name] = dict(self.accuracies(self.model))
            finally:
                self.model.set_adapter("default")
                self.model.delete_adapter("single")
        return found


def _names(config: Any, classes: int) -> list[str]:
    names = getattr(config, "id2label", None) or {}
    return [str(names[number]) for number in range(classes)] if set(range(classes)) <= set(names) else []


# Fields with which a config adds one vector whole and nothing else
_WHOLE: dict[str, dict[str, Any]] = {
    "atlas": {"granularity": "block", "partition": None, "constraint": None, "selected": None, "tie_blocks": None},
    "concrete": {"granularity": "row", "init": 40.0, "learn_coefficients": None, "eval_mask": "mean"},  # a mask of ones
}


def _config(recipe: Recipe, vectors: Mapping[str, Reference], alone: str | None = None) -> Any:
    """The adapter's config, with the recipe's models for a pool; if asked, one that adds a single vector whole."""
    options = recipe.subspace.learn
    assert options is not None
    base = str(recipe.base_model)
    pool = {name: {**_place(reference), "base": base} for name, reference in vectors.items()}
    own: dict[str, Any] = {"pool": pool, "base": base, **options.config}
    if recipe.merge_method == "concrete":
        own.setdefault("seed", recipe.subspace.seed if options.seed is None else options.seed)
    if alone is not None:
        start = "init" if recipe.merge_method == "atlas" else "coefficients"
        own |= {**_WHOLE[recipe.merge_method], "bundle_vectors": False, start: {alone: 1.0}}
        if recipe.merge_method == "atlas":
            own.pop("fused_splits", None)
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
