"""The columns of a data file, as far as they can be seen without the `datasets` library. Needs no torch."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Collection
from pathlib import Path

from ..task_vectors.errors import RecipeError
from .learn_fields import template_parts
from .learn_options import FILES, TaskOptions, data_place


def text_columns(task: TaskOptions) -> list[str]:
    """The columns that a task's texts are made of."""
    if isinstance(task.text, list):
        return task.text
    if task.text is None:
        return []
    return [name for _, name in template_parts(task.text) if name] if "{" in task.text else [task.text]


def check_columns(task: TaskOptions, columns: Collection[str]) -> None:
    """Raise a RecipeError for a column that a task names and its data do not have."""
    wanted = {key: column for key in ("image", "label") if (column := getattr(task, key)) is not None}
    for key, column in [*wanted.items(), *(("text", column) for column in text_columns(task))]:
        if column not in columns:
            raise RecipeError(
                f"task {task.name!r}: {data_place(task)} has no column {column!r} ({key}). Accepted: {', '.join(columns)}."
            )


def check_data(task: TaskOptions) -> None:
    """Raise a RecipeError for a column that a task's data lack, if that can be told before they are loaded."""
    try:
        columns = _columns(Path(task.data), {*text_columns(task), task.image, task.label} - {None})
    except (OSError, ValueError, RecursionError):  # the loader will say it better
        return
    if columns:
        check_columns(task, columns)


def _columns(path: Path, wanted: Collection[str | None]) -> list[str]:
    """Of a file or a saved data set, in their order, at least until all that are wanted are seen; none if one cannot tell."""
    if (path / "dataset_info.json").is_file():
        return list(json.loads((path / "dataset_info.json").read_bytes()).get("features") or {})
    if not path.is_file():
        return []
    kind = FILES[os.path.splitext(path)[1]]
    if kind == "csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            return next(csv.reader(file), [])
    if kind == "parquet":
        try:
            from pyarrow import parquet
        except ImportError:
            return []
        return list(parquet.read_schema(path).names)
    return _of_lines(path, wanted)


def _of_lines(path: Path, wanted: Collection[str | None]) -> list[str]:
    """The keys of a file with an object a line: a row may leave some out, so that all are read where one is not found."""
    found: dict[str, None] = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):  # a list of rows, or something else
                    return []
                found.update(dict.fromkeys(row))
                if all(name in found for name in wanted):
                    break
    return list(found)
