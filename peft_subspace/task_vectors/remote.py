"""Headers of models on the Hub without their weights: what a dry run needs, by HTTP range requests. Needs no torch."""

from __future__ import annotations

import fnmatch
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Where folders with headers are; None while models are downloaded whole. Each thread has its own.
_scratch: ContextVar[Path | None] = ContextVar("headers", default=None)


@contextmanager
def headers_only(wanted: bool = True) -> Iterator[None]:
    """Let `references.locate` fetch no more than headers of weights within the block; False changes nothing.

    A model that is not in the cache becomes a folder of its small files and, for each file of weights, one of its size with
    nothing but the header in it. The disk gives no room to the rest of such a file. The folders go at the end of the block.
    """
    if not wanted:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="peft-subspace-headers-") as folder:
        token = _scratch.set(Path(folder))
        try:
            yield
        finally:
            _scratch.reset(token)


def header_folder(name: str, revision: str | None, patterns: Sequence[str]) -> tuple[Path, str] | None:
    """A folder with a model's small files and the headers of its weights, and its commit; None outside of `headers_only`.

    Files of weights that are in the cache are taken from there. Costs one or two requests for each of the others.

    Args:
        name: Hub id.
        revision: branch, tag or commit.
        patterns: names of the files to fetch.

    Raises:
        HfHubHTTPError, OSError, ValueError: as of `huggingface_hub`: no such model or revision, no access, a damaged header.
    """
    scratch = _scratch.get()
    if scratch is None:
        return None
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    api = HfApi()
    found = api.model_info(name, revision=revision)
    commit = str(found.sha)
    folder = scratch / f"{len(list(scratch.iterdir()))}" / commit
    folder.mkdir(parents=True)
    for file in (sibling.rfilename for sibling in found.siblings or []):
        if "/" in file or not any(fnmatch.fnmatch(file, pattern) for pattern in patterns):
            continue
        if not file.endswith(".safetensors"):
            os.symlink(os.path.realpath(hf_hub_download(name, file, revision=commit)), folder / file)
        elif isinstance(cached := try_to_load_from_cache(name, file, revision=commit), str):
            os.symlink(os.path.realpath(cached), folder / file)
        else:
            _write_header(api, name, file, commit, folder / file)
    return folder, commit


def has_values(path: Path) -> bool:
    """Whether a file is whole; False for one of which a dry run has the header alone."""
    scratch = _scratch.get()
    return scratch is None or scratch not in path.parents or path.is_symlink()


def _write_header(api: HfApi, name: str, file: str, commit: str, path: Path) -> None:
    """A file of weights as a hole behind its header."""
    header = api.parse_safetensors_file_metadata(name, file, revision=commit)
    table: dict[str, object] = {"__metadata__": dict(header.metadata)} if header.metadata else {}
    end = 0
    for key, tensor in header.tensors.items():
        table[key] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": list(tensor.data_offsets)}
        end = max(end, tensor.data_offsets[1])
    text = json.dumps(table).encode()
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)
