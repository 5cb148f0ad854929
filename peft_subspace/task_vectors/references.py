"""How a recipe names a model: `path`, `owner/name`, `model@revision`, `model+lora`, `model@revision+lora@revision`."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError, RecipeError

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class Reference:
    """A model, at a revision if it comes from the Hub, and perhaps a LoRA on it."""

    model: str
    revision: str | None = None
    lora: str | None = None
    lora_revision: str | None = None

    def __str__(self) -> str:
        parts = [(self.model, self.revision), (self.lora, self.lora_revision)]
        return "+".join(f"{name}@{revision}" if revision else name for name, revision in parts if name)

    @classmethod
    def parse(cls, value: Any) -> Reference:
        """Read what mergekit reads: a text, or `{model: ..., lora: ...}` with texts or `{path: ..., revision: ...}` inside.

        Raises:
            RecipeError: it is neither; more than one `+`, more than one `@`, or nothing before one.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, dict):
            if set(value) <= {"path", "revision"}:
                value = {"model": value}
            if "model" not in value or not set(value) <= {"model", "lora"}:
                raise RecipeError(
                    f"{value!r} does not name a model. Accepted: a text, or model: and lora: with path: and revision:."
                )
            return cls(*_with_revision(value["model"]), *(_with_revision(value["lora"]) if value.get("lora") else (None, None)))
        if not isinstance(value, str) or not value.strip():
            raise RecipeError(f"{value!r} does not name a model: a folder, a .safetensors file or a Hub id is expected.")
        if _exists(value):  # a folder may have a + or an @ in its name
            return cls(value)
        parts = value.split("+")
        if len(parts) > 2 or not all(parts):
            raise RecipeError(
                f"{value!r}: a model is written as model, model@revision, model+lora or model@revision+lora@revision."
            )
        model, lora = _with_revision(parts[0]), _with_revision(parts[1]) if len(parts) > 1 else (None, None)
        return cls(*model, *lora)


def _with_revision(value: Any) -> tuple[str, str | None]:
    if isinstance(value, dict) and isinstance(value.get("path"), str) and set(value) <= {"path", "revision"}:
        return value["path"], None if value.get("revision") is None else str(value["revision"])
    if not isinstance(value, str) or not value:
        raise RecipeError(f"{value!r} does not name a model. Accepted: a text, or path: and revision:.")
    if "@" not in value or _exists(value):
        return value, None
    name, revision = value.rsplit("@", 1)
    if "@" in name or not name or not revision:
        raise RecipeError(f"{value!r}: a revision is written as model@revision, with one @.")
    return name, revision


def _exists(name: str) -> bool:
    try:
        return os.path.exists(os.path.expanduser(name))
    except ValueError:  # a NUL in the name
        return False


def _not_here(name: str) -> str:
    """There is nothing of that name on the disk; where it was looked for, and what is called alike there."""
    path = Path(name).expanduser()
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    missing = path.relative_to(parent).parts[0]
    try:
        near = difflib.get_close_matches(missing, sorted(os.listdir(parent)), n=3, cutoff=0.6)
    except OSError:
        near = []
    where = f" in {Path.cwd()}" if parent == Path() else f": {parent} has no {missing!r}"
    return f"there is no such folder or file{where}" + (f" (but {', '.join(map(repr, near))})" if near else "")


def _not_there(error: Exception) -> str:
    """Why the Hub did not give a model."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, LocalEntryNotFoundError):
        return "it is not in the Hub's cache, and the Hub cannot be reached, or was not to be asked (HF_HUB_OFFLINE)."
    if isinstance(error, GatedRepoError):
        return "the Hub gives it to those alone who have asked for access (`hf auth login`)."
    if isinstance(error, RevisionNotFoundError):
        return "the Hub's repository has no such revision."
    if isinstance(error, RepositoryNotFoundError):
        return "the Hub has no such repository, or it is private (`hf auth login`)."
    reason = str(error).strip().split("\n")[0]
    return f"the Hub did not give it: {reason[:160]}"


def locate(name: str, revision: str | None) -> tuple[Path, str | None]:
    """The folder or file of a model: as it is if it is there, else downloaded from the Hub into its cache.

    Within `remote.headers_only` the headers of its weights are all that is fetched of them, but of pickles, which have none:
    they are downloaded where they are allowed and there is nothing else.

    Returns:
        The path, and the Hub's commit, None for a local one.

    Raises:
        InputError: there is nothing of that name.
    """
    if _exists(name):
        if revision is not None:
            raise InputError(f"{name}@{revision}: a revision is for models on the Hub, and {name} is a local path.")
        return Path(name).expanduser(), None
    if not HUB_ID.fullmatch(name):
        raise InputError(f"{name!r}: {_not_here(name)}, and it is not a Hub id (owner/name).")
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from .pickles import are_allowed
    from .remote import header_folder

    try:
        headers = header_folder(name, revision, HUB_FILES)
        if headers is not None and not (are_allowed() and not any(headers[0].glob("*.safetensors"))):
            return headers
        path = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
        if are_allowed() and not any(path.glob("*.safetensors")):
            path = Path(snapshot_download(name, revision=revision, allow_patterns=[*HUB_FILES, "*.bin"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        asked = repr(name) if revision is None else f"{name!r} at revision {revision!r}"
        raise InputError(f"{asked}: {_not_here(name)}, and {_not_there(error)}") from error
    return path, path.name if re.fullmatch(r"[0-9a-f]{40}", path.name) else None
