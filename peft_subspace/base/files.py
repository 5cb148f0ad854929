"""Checks on adapter files before anything is built from them."""

from __future__ import annotations

import os
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open


def find_adapter_file(name: str, subfolder: str | None, download: dict[str, Any]) -> str | None:
    """Path of an adapter's weights, downloaded if `name` is a Hub id; None if there is no safetensors file."""
    return find_file(name, SAFETENSORS_WEIGHTS_NAME, subfolder, download)


def find_file(name: str, file: str, subfolder: str | None, download: dict[str, Any]) -> str | None:
    """Path of a file of an adapter, downloaded if `name` is a Hub id; None if there is none."""
    if os.path.isdir(name):
        path = os.path.join(name, subfolder or "", file)
        return path if os.path.isfile(path) else None
    try:
        return hf_hub_download(name, file, subfolder=subfolder, **download)
    except EntryNotFoundError:
        return None


def check_adapter_file(path: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file by key; raises if it is cut short or damaged. Reads only the header.

    Raises:
        ValueError: names the file, what is wrong with it, and the way out.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  # not a dict
    except Exception as error:  # safetensors' own error, and a KeyError for a type that it does not know
        raise ValueError(
            f"{path} ({os.path.getsize(path)} bytes) is not a whole safetensors file: it is cut short or damaged ({error}). "
            f"Save or download the adapter again; the model was not changed."
        ) from error
