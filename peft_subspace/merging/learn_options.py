"""The `learn` block of a recipe: coefficients or masks are learned from data, then merged by. Needs no torch.

    subspace:
      learn:
        loss: entropy                      or information_maximization, without labels; cross_entropy with them
        tasks:
          - {name: trec, data: trec.jsonl, text: text}

Keys, ways to write data, and what is learned: docs/merging.md.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ..task_vectors.errors import InputError, RecipeError
from ..task_vectors.references import Reference
from .learn_fields import ELSEWHERE, check_fields, template_parts
from .strict import Strict

FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# Fields of the adapters' configs that a recipe may set. The pool and the base are the recipe's models.
_POOLED = (
    "granularity", "init", "target_modules", "exclude_modules", "target_parameters", "block_types", "vector_dtype", "placement",
    "max_vector_bytes", "strict", "bundle_vectors",
)  # fmt: skip
CONFIGS = {
    "atlas": (*_POOLED, "partition", "partition_seed", "tie_blocks", "fused_splits", "selected", "constraint"),
    "concrete": (
        *_POOLED, "temperature", "coefficients", "learn_coefficients", "clamp_coefficients", "rescale", "stochastic",
        "eval_mask", "save_mask",
    ),
}  # fmt: skip

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, BeforeValidator(lambda value: float(value) if type(value) is int else value), Field(gt=0)]


class TaskOptions(Strict):
    """One task: rows of data, and how the merged model answers them.

    Attributes:
        name: of the task; the model of that name has its head, unless `head` says another.
        data: a .jsonl, .json, .csv or .parquet file, a folder that `datasets` saved, or a data set of the Hub.
        subset: configuration of a data set of the Hub.
        split: of the data set.
        text: a column, two of them (a pair), or a text with `{column}` in it.
        image: a column with pictures, in place of `text`.
        label: a column with class numbers, names of classes or, with `answers`, those.
        answers: of a generative model: what it may say, by class number; told apart by their first tokens.
        head: a model, an adapter or a .safetensors file with the task's own head.
        max_length: most tokens of a text; fewer if the tokenizer or the base's positions allow no more.
        rows: most rows to learn from, drawn by the seed.
        held_out: rows, drawn by the seed, that are not learned from; the accuracy on them is shown. Needs `label`.
    """

    name: Annotated[str, Field(min_length=1)]
    data: Annotated[str, Field(min_length=1)]
    subset: str | None = None
    split: str = "train"
    text: str | list[str] | None = None
    image: str | None = None
    label: str | None = None
    answers: list[str] | None = None
    head: Annotated[Reference, BeforeValidator(Reference.parse)] | None = None
    max_length: Count = 128
    rows: Count | None = None
    held_out: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _goes_together(self) -> TaskOptions:
        if (self.text is None) == (self.image is None):
            raise ValueError(f"task {self.name!r}: one of `text` and `image` is expected, the column with the inputs")
        if isinstance(self.text, list) and not 1 <= len(self.text) <= 2:
            raise ValueError(f"task {self.name!r}: text has {len(self.text)} columns; one or two are expected")
        if isinstance(self.text, str) and "{" in self.text:
            try:
                template_parts(self.text)
            except ValueError as error:
                raise ValueError(f"task {self.name!r}: {error}") from error
        if self.held_out and self.label is None:
            raise ValueError(f"task {self.name!r}: held_out shows an accuracy and needs a `label` column")
        if self.answers is not None and (self.text is None or self.head is not None):
            raise ValueError(f"task {self.name!r}: `answers` are of a model that writes: with `text`, and without a `head`")
        if self.answers is not None and len(set(self.answers)) < max(2, len(self.answers)):
            raise ValueError(f"task {self.name!r}: answers: two or more different texts are expected, one for each class")
        return self

    @property
    def kind(self) -> str:
        """What the model does with a row: "image" or "text" (a class), or "answers"."""
        return "image" if self.image is not None else "text" if self.answers is None else "answers"


class LearnOptions(Strict):
    """What is learned, from what, and how long.

    Attributes:
        loss: "entropy" of the answers (AdaMerging; no labels), "information_maximization" (entropy less that of the mean
            answer; no labels), or "cross_entropy" with the labels.
        tasks: the tasks; the loss is the sum of theirs.
        config: fields of `AtlasConfig` or `ConcreteConfig`, such as `{granularity: block, init: 0.3}`.
        steps: of the coefficients, and of the mask.
        lr: rate of Adam for coefficients, which move by about that much in a step.
        mask_lr: rate of Adam for the logits of a mask.
        inner_lr: rate of the one step on the coefficients before each of the mask, if both are learned.
        batch_size: rows of each task for one step.
        accumulation: batches of each task for one step.
        eval_every: steps between looks at the loss and the accuracies.
        eval_batches: of each task, for the loss that is looked at.
        patience: looks without a better one after which it ends.
        select: keep the "best" look (the start is one of them), the one with the highest "metric" (mean accuracy on the
            held-out rows, which every task needs), or the "last".
        seed: of rows, batches and masks; the recipe's if it is left out.
    """

    loss: Literal["entropy", "information_maximization", "cross_entropy"]
    tasks: Annotated[list[TaskOptions], Field(min_length=1)]
    config: dict[str, Any] = Field(default_factory=dict)
    steps: Count = 200
    lr: Rate = 5e-3
    mask_lr: Rate = 1e-2
    inner_lr: Rate = 1.0
    batch_size: Count = 8
    accumulation: Count = 1
    eval_every: Count = 50
    eval_batches: Count = 4
    patience: Count | None = None
    select: Literal["best", "metric", "last"] = "best"
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    @field_validator("tasks")
    @classmethod
    def _tasks_differ(cls, value: list[TaskOptions]) -> list[TaskOptions]:
        twice = [name for name, count in Counter(task.name for task in value).items() if count > 1]
        if twice:
            raise ValueError(f"several tasks are called {twice[0]!r}; each needs a name of its own")
        kinds = sorted({task.kind for task in value})
        if len(kinds) > 1:
            raise ValueError(f"tasks of the kinds {' and '.join(kinds)}: one model does not answer both; learn them apart")
        return value

    @model_validator(mode="after")
    def _labels_are_there(self) -> LearnOptions:
        without = [task.name for task in self.tasks if task.label is None]
        if self.loss == "cross_entropy" and without:
            raise ValueError(f"loss: cross_entropy needs the `label` column of every task, and {without[0]!r} names none")
        if self.loss == "information_maximization" and self.batch_size < 2:
            raise ValueError("loss: information_maximization compares the answers of a batch: batch_size is 2 or more")
        blind = [task.name for task in self.tasks if not task.held_out]
        if self.select == "metric" and blind:
            raise ValueError(f"select: metric needs `held_out` rows of every task, and {blind[0]!r} has none")
        return self

    def table(self) -> dict[str, Any]:
        """As it would be written, without defaults."""
        table = self.model_dump(exclude_defaults=True)
        for entry, task in zip(table["tasks"], self.tasks, strict=True):
            if task.head is not None:
                entry["head"] = str(task.head)
        return table


def check_learning(learn: LearnOptions, method: str, base: Reference | None, models: list[Reference]) -> None:
    """What a learn block needs of the rest of its recipe.

    Raises:
        ValueError: no base or models; a field of `config` that the method does not have, with the nearest one, or that does not
            fit (`check_fields`).
    """
    if base is None or not models:
        raise ValueError("subspace.learn needs a base_model, and under `models` the task vectors that are combined")
    known = CONFIGS.get(method)
    if known is None:
        raise ValueError(f"subspace.learn learns {' and '.join(CONFIGS)}, not merge_method {method!r}; give it as `learned`")
    for name in learn.config:
        if name in ELSEWHERE:
            raise ValueError(f"subspace.learn.config: {name!r} is not written here: {ELSEWHERE[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"accepted: {', '.join(known)}"
            raise ValueError(f"subspace.learn.config: unknown key {name!r}; {hint}")
    check_fields(learn.config, method, vector_names(models))
    if method == "concrete" and learn.config.get("granularity") == "rank":
        raise ValueError(
            "subspace.learn.config: a mask of directions (granularity: rank) cannot be merged by; use element, row or column"
        )


def vector_names(models: list[Reference]) -> list[str]:
    """A name for each task vector: the last part of its adapter or model, with a number where two are alike."""
    found: list[str] = []
    for reference in models:
        place = os.path.normpath(reference.lora or reference.model)
        stem = os.path.basename(place).removesuffix(".safetensors")
        name, number = stem, 2
        while name in found:
            name, number = f"{stem}-{number}", number + 1
        found.append(name)
    return found


def data_place(task: TaskOptions) -> str:
    """Where the rows of a task are, for messages and logs.

    Raises:
        RecipeError: a file of another kind, or none.
        InputError: an empty file.
    """
    if not os.path.exists(task.data) and os.path.splitext(task.data)[1] in FILES:
        raise RecipeError(f"task {task.name!r}: data: there is no file {task.data}.")
    if os.path.isfile(task.data) and os.path.getsize(task.data) == 0:
        raise InputError(f"task {task.name!r}: data: {task.data} is empty; rows with the columns of the task are expected.")
    extra = "".join(f", {part}" for part in (task.subset, task.split) if part)
    if os.path.isfile(task.data) and os.path.splitext(task.data)[1] not in FILES:
        raise RecipeError(f"task {task.name!r}: data: {task.data} is a file, and {', '.join(FILES)} are read.")
    return f"{task.data} ({extra.removeprefix(', ')})" if not os.path.isfile(task.data) else task.data


def lines(learn: LearnOptions, method: str, models: Mapping[str, Reference]) -> list[str]:
    """The learning in words, for a dry run."""
    learns_numbers = method == "atlas" or learn.config.get("learn_coefficients") is not None
    rates = [f"rate {learn.lr:g} of coefficients"] if learns_numbers else []
    rates += [f"rate {learn.mask_lr:g} of the mask"] if method == "concrete" else []
    steps = f"{learn.steps} steps of {learn.batch_size * learn.accumulation} rows of each task"
    settings = ", ".join(f"{name} {value}" for name, value in learn.config.items()) or "defaults"
    found = [f"Learns   by {learn.loss.replace('cross_', 'cross-').replace('_', ' ')}, {steps}, {', '.join(rates)}; {settings}"]
    for task in learn.tasks:
        columns = " + ".join(task.text) if isinstance(task.text, list) else repr(task.text or task.image)
        own = models.get(task.name)
        head = task.head or own or "the base's"
        answers = f"; answers {', '.join(map(repr, task.answers))}" if task.answers else f"; head of {head}"
        label = f"; label {task.label!r}" if task.label else ""
        found.append(f"Task     {task.name}: {columns} of {data_place(task)}{label}{answers}")
    return found
