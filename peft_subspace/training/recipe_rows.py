"""The data of a `learn` block: rows by the `datasets` library, and batches of them as a model takes them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..merging.learn_data import check_columns, text_columns
from ..merging.learn_fields import template_parts
from ..merging.learn_options import FILES, TaskOptions, data_place
from ..task_vectors.errors import InputError, RecipeError

LABELS = "labels"


def load_rows(task: TaskOptions) -> Any:
    """All rows of a task's data set; code that comes with a data set is never run.

    Raises:
        RecipeError: no `datasets`, no such split or column.
        InputError: the data cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise RecipeError("subspace.learn reads data with the datasets library: pip install 'peft-subspace[learn]'.") from error
    place, bars = data_place(task), not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        if os.path.isfile(task.data):
            kind = FILES[os.path.splitext(task.data)[1]]
            rows = datasets.load_dataset(kind, data_files=task.data, split="train")
        elif os.path.isdir(task.data) and any((Path(task.data) / n).is_file() for n in ("state.json", "dataset_dict.json")):
            rows = datasets.load_from_disk(task.data)
        else:
            rows = datasets.load_dataset(task.data, task.subset, split=task.split)
    except Exception as error:  # of a dozen kinds: pyarrow's, the Hub's, of datasets' builders
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"task {task.name!r}: the data {place} cannot be read: {reason[0]}") from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    if isinstance(rows, Mapping):
        if task.split not in rows:
            raise RecipeError(
                f"task {task.name!r}: {task.data} has no split {task.split!r}. Accepted: {', '.join(sorted(rows))}."
            )
        rows = rows[task.split]
    check_columns(task, rows.column_names)
    own = (column for column in (task.image, task.label) if column is not None)
    return rows.select_columns(sorted({*own, *text_columns(task)}))


@dataclass
class Rows:
    """Drawn rows of a task.

    Attributes:
        task: as the recipe has it.
        learned: rows to learn from.
        held_out: rows to look at.
    """

    task: TaskOptions
    learned: Any
    held_out: Any

    @classmethod
    def draw(cls, task: TaskOptions, seed: int) -> Rows:
        """The first `held_out` rows in the order of a seed, and of the others the first `rows`.

        Raises:
            RecipeError: too few rows.
            InputError: a text or a label that is missing.
        """
        found = load_rows(task)
        count = len(found)
        if count <= task.held_out:
            raise RecipeError(
                f"task {task.name!r}: {data_place(task)} has {count} rows, and {task.held_out} are held out: none is left to "
                f"learn from."
            )
        found = found.shuffle(seed=seed % 2**32)
        last = count if task.rows is None else min(count, task.held_out + task.rows)
        rows = cls(task, found.select(range(task.held_out, last)), found.select(range(task.held_out)))
        rows._check_values(found.select(range(last)), count, seed)
        return rows

    def _check_values(self, drawn: Any, count: int, seed: int) -> None:
        """A text that is missing would be learned as the word None."""
        for name in text_columns(self.task):
            place = next((n for n, value in enumerate(drawn[name]) if value is None), None)
            if place is not None:
                import datasets

                order = datasets.Dataset.from_dict({"row": range(count)}).shuffle(seed=seed % 2**32)  # as the rows were
                raise InputError(
                    f"task {self.task.name!r}: {data_place(self.task)} has no value in the column {name!r} (text) of row "
                    f"{order[place]['row'] + 1}. Fill it in, or leave the row out."
                )

    def digest(self) -> str:
        """SHA-256 of the columns of all rows that are learned from, in their order."""
        found = hashlib.sha256()
        for row in self.learned:
            for name in sorted(row):
                value = row[name]
                content = value.tobytes() if hasattr(value, "tobytes") else json.dumps(value, default=str).encode()
                found.update(name.encode() + b"\0" + content + b"\0")
        return found.hexdigest()


class Inputs:
    """Rows -> a batch of a model's arguments, and `labels` if they are asked for.

    Args:
        task: as the recipe has it.
        folder: of the base, with its tokenizer or image processor.
        name: of the base, for messages.
        config: of the base.
        takes_positions: whether the model takes `position_ids`.
        positions: most tokens that the model has positions for; None without a limit.

    Raises:
        InputError: the base has no tokenizer or no image processor.
    """

    def __init__(
        self,
        task: TaskOptions,
        folder: Path,
        name: str,
        config: Any,
        takes_positions: bool = False,
        positions: int | None = None,
    ) -> None:
        import transformers

        self.task, self.config, self.takes_positions = task, config, takes_positions
        self.classes: int | None = None
        self.class_names: list[str] = []
        cls = "AutoImageProcessor" if task.image is not None else "AutoTokenizer"
        try:
            self.process: Any = getattr(transformers, cls).from_pretrained(folder, trust_remote_code=False)
        except (ValueError, OSError, ImportError) as error:
            raise InputError(f"{name}: {cls} cannot load it: {str(error).splitlines()[0]}") from error
        if task.image is None and self.process.pad_token is None:
            self.process.pad_token = self.process.eos_token
        if task.image is None and self.process.pad_token is None:
            raise InputError(
                f"{name}: its tokenizer has no token to pad short texts with. Set one, and save it: tokenizer.pad_token = ..."
            )
        limits = [task.max_length, positions, None if task.image is not None else self.process.model_max_length]
        self.max_length = min(limit for limit in limits if limit)
        if task.answers is not None:
            self.process.padding_side = self.process.truncation_side = "left"  # the answer follows the last token

    @property
    def _pads_left(self) -> bool:
        return self.task.image is None and self.process.padding_side == "left"

    @property
    def pad(self) -> int | None:
        """The token that short texts are padded with: classifiers that answer at the last one have to know it."""
        return None if self.task.image is not None else self.process.pad_token_id

    def answer_tokens(self) -> list[int]:
        """First token of every answer.

        Raises:
            RecipeError: two answers begin alike.
        """
        answers = self.task.answers or []
        first = [(self.process(answer, add_special_tokens=False)["input_ids"] or [None])[0] for answer in answers]
        if None in first or len(set(first)) < len(first):
            raise RecipeError(
                f"task {self.task.name!r}: answers {', '.join(map(repr, answers))} are told apart by their first tokens, which "
                f"are {first}. Write others, with the space that stands before them."
            )
        return first

    def batch(self, rows: list[dict[str, Any]], labels: bool = False) -> dict[str, Tensor]:
        """The arguments for some rows.

        Args:
            rows: of the data set.
            labels: whether `labels` are wanted.
        """
        found = self._images(rows) if self.task.image is not None else self._texts(rows)
        if self.task.answers is not None and self.config.is_encoder_decoder:
            found["decoder_input_ids"] = torch.full((len(rows), 1), self.config.decoder_start_token_id)
        elif self.takes_positions and self._pads_left:  # the first token is at 0, whatever is padded before it
            found["position_ids"] = (found["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        if labels:
            found[LABELS] = torch.tensor([self._class(row[self.task.label or ""]) for row in rows])
        return found

    def _images(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        images = [row[self.task.image or ""] for row in rows]
        if not all(hasattr(image, "convert") for image in images):
            raise InputError(
                f"task {self.task.name!r}: the column {self.task.image!r} has no pictures but {type(images[0]).__name__}. Cast "
                f"it: `data.cast_column({self.task.image!r}, datasets.Image())`, and save it."
            )
        images = [image.convert("RGB") for image in images]
        return dict(self.process(images, return_tensors="pt"))

    def _texts(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        text = self.task.text
        if isinstance(text, list):
            columns = [[str(row[name]) for row in rows] for name in text]
        elif text is not None and "{" in text:
            parts = template_parts(text)
            columns = [["".join(a if name is None else f"{a}{row[name]}" for a, name in parts) for row in rows]]
        else:
            columns = [[str(row[text or ""]) for row in rows]]
        settings = {"truncation": True, "max_length": self.max_length, "padding": True, "return_tensors": "pt"}
        return dict(self.process(*columns, **settings))

    def _class(self, value: Any) -> int:
        """A label as the number of its class."""
        names = self.task.answers or self.class_names
        if isinstance(value, str):
            if value not in names:
                raise InputError(
                    f"task {self.task.name!r}: the label {value!r} is none of {names}. Write numbers, or the names of the "
                    f"classes in the config of the head's model."
                )
            return names.index(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < (self.classes or 0):
            raise InputError(
                f"task {self.task.name!r}: the label {value!r} is no number of a class: the head has {self.classes} classes, "
                f"from 0 on."
            )
        return value

    def check_labels(self, rows: Any) -> None:
        """Raise an InputError for a label that is no class."""
        for value in rows[self.task.label or ""]:
            self._class(value)

    def loader(self, rows: Any, size: int, *, labels: bool, shuffle: bool) -> DataLoader[Any]:
        """Batches of rows; the order is torch's global generator's."""
        return DataLoader(rows, size, shuffle=shuffle, collate_fn=lambda given: self.batch(given, labels))
