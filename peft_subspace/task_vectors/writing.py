"""Writing safetensors files: the same tensors give the same bytes, and a file appears when it is whole.

`safetensors.torch.save_file` writes metadata of more than one entry in another order every time; a file whose hash is kept
must not depend on that.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..whole_files import whole_file
from .errors import OutputError
from .headers import encode_header
from .places import check_file
from .reading import DTYPES

CODES = {dtype: code for code, dtype in DTYPES.items()}
Entries = dict[str, tuple[str, tuple[int, ...]]]


def entries_of(tensors: Mapping[str, Tensor]) -> Entries:
    """name -> (dtype as safetensors calls it, shape)."""
    return {name: (CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values; no copy if it is on the CPU and contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_file(
    path: str | os.PathLike[str],
    entries: Entries,
    metadata: dict[str, str],
    values: Iterable[Tensor],
    *,
    recorded: bool = False,
) -> None:
    """Write a file of tensors, one after the other; it is on the disk and whole when it has its name.

    Args:
        path: of the file; a task-vector file of this package that is there is replaced.
        entries: name -> (dtype, shape), in the order of the values.
        metadata: texts.
        values: the tensors, in that order; each is asked for when it is written.
        recorded: a record says that a file of this name is ours, so that it is replaced even if it is damaged.

    Raises:
        OutputError: the file cannot be written, or something else stands there.
    """
    header, _ = encode_header(entries, metadata)
    place = Path(path) if recorded else check_file(path, overwrite=True)
    try:
        with whole_file(place) as file:
            file.write(header)
            for tensor in values:
                file.write(raw(tensor))
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}.") from error
