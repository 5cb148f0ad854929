"""Checks on adapter files before anything is built from them."""

from __future__ import annotations

import json
import os
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME


def find_adapter_file(name: str, subfolder: str | None, download: dict[str, Any]) -> str | None:
    """Path of an adapter's weights, downloaded if `name` is a Hub id; None if there is no safetensors file."""
    if os.path.isdir(name):
        path = os.path.join(name, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        return path if os.path.isfile(path) else None
    try:
        return hf_hub_download(name, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **download)
    except EntryNotFoundError:
        return None


def check_adapter_file(path: str) -> frozenset[str]:
    """Keys of a safetensors file; raises if it is cut short or its header is damaged.

    A safetensors file is 8 bytes of header length, a JSON header, and the tensors, each at stated offsets, the last of
    which must be the end of the file. Only the header is read.

    Raises:
        ValueError: names the file, what it is, and what it should be.
    """
    size = os.path.getsize(path)
    advice = "Save or download the adapter again; the model was not changed."
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{path} is not a whole safetensors file: it has {size} bytes, its header alone says {length}. {advice}"
            )
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
            end = max((stop for _, stop in tensors.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"The header of {path} cannot be read ({error}): the file is damaged. {advice}") from error
    if 8 + length + end != size:
        raise ValueError(
            f"{path} has {size} bytes where its header says {8 + length + end}: it is cut short or damaged. {advice}"
        )
    return frozenset(tensors)
