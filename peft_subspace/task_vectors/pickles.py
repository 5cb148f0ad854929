"""Weights in pickles (.bin), only if the user says so: rewritten as safetensors first, by torch's weights_only loader."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from .errors import InputError
from .headers import Stamp, refuse_pointer, stamp_of
from .locks import scratch_folder

# Where rewritten models are; None while pickles are refused. Each thread has its own: what one allows is refused in the others.
_scratch: ContextVar[Path | None] = ContextVar("pickles", default=None)


@contextmanager
def pickles_allowed(allowed: bool, beside: Path | None = None) -> Iterator[None]:
    """Let `open_checkpoint` read pickles within the block. Rewritten models lie in a folder that is removed at its end.

    Args:
        allowed: False changes nothing.
        beside: the folder to make it in; the system's for temporary files by default.
    """
    if not allowed:
        yield
        return
    with scratch_folder(beside if beside and beside.is_dir() else Path(tempfile.gettempdir()), ".pickles-") as folder:
        token = _scratch.set(folder)
        try:
            yield
        finally:
            _scratch.reset(token)


def are_allowed() -> bool:
    """Whether this is within `pickles_allowed`."""
    return _scratch.get() is not None


def rewritten(folder: Path, name: str = "pytorch_model.bin") -> Path | None:
    """A file of safetensors with all tensors of a folder's .bin files; None if pickles are not allowed or not there.

    Args:
        folder: of a model or an adapter.
        name: of the file of weights, if there is one file.

    Raises:
        InputError: a file holds something else than tensors, or cannot be read.
    """
    files, scratch = _pickles(folder, name), _scratch.get()
    if scratch is None or not files:
        return None
    target = scratch / f"{len(list(scratch.glob('*.safetensors')))}.safetensors"
    _rewrite(files, target)
    return target


def _pickles(folder: Path, name: str) -> list[Path]:
    index = folder / f"{name}.index.json"
    if (folder / name).is_file() or not index.is_file():  # the one file first, as transformers has it
        return [folder / name] if (folder / name).is_file() else []
    names = set(json.loads(index.read_bytes()).get("weight_map", {}).values())
    return sorted(folder / file for file in names if Path(file).name == file)


def _rewrite(files: list[Path], target: Path) -> None:
    import torch

    from .writing import CODES, entries_of, write_file

    tensors, stamps = {}, _stamps(files)
    for file in files:
        refuse_pointer(file)
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # pickle, zip and torch each have errors of their own
            raise InputError(f"{file}: cannot be read by torch's weights_only loader: {str(error).splitlines()[0]}") from error
        if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
            raise InputError(f"{file}: does not hold a plain table of tensors.")
        tensors.update(loaded)
    for name, tensor in tensors.items():
        if tensor.dtype not in CODES:
            raise InputError(f"{files[0].parent}: {name!r} has the dtype {tensor.dtype}, which is not supported.")
    write_file(target, entries_of(tensors), {"format": "pt"}, tensors.values())
    for file, stamp in _stamps(files).items():  # values are read from the disk when they are written
        if stamp != stamps[file]:
            raise InputError(f"{file}: was replaced or changed while it was read. Start again when the file is whole.")


def _stamps(files: list[Path]) -> dict[Path, Stamp]:
    """What files are known by, before and after they are read.

    Raises:
        InputError: one of them is gone.
    """
    found = {}
    for file in files:
        try:
            with open(file, "rb") as opened:
                found[file] = stamp_of(opened.fileno())
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror or error}.") from error
    return found
