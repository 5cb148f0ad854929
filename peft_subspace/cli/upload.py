"""A finished folder goes to the Hub, in the place of nothing but an earlier result."""

from __future__ import annotations

from pathlib import Path

from ..task_vectors.errors import OutputError, RecipeError
from ..task_vectors.places import MANIFEST, recorded_files
from ..task_vectors.references import HUB_ID
from ..task_vectors.sources import shortened

OF_THE_HUB = {".gitattributes"}  # every repository has it from the start


def check_name(name: str) -> None:
    """Raise a RecipeError unless a name can be a repository's."""
    if not HUB_ID.fullmatch(name):
        raise RecipeError(f"--push-to-hub {name!r}: a repository is written as owner/name.")


def check_repository(name: str, replace: bool) -> list[str]:
    """See, before anything is computed, that a result may be uploaded.

    Args:
        name: of the repository.
        replace: the files of an earlier result may be replaced.

    Returns:
        The files of the earlier result, which the upload takes away if the new one has no files of these names.

    Raises:
        RecipeError: no repository can have this name.
        OutputError: the repository holds files that no merge of this package wrote, or an earlier result and `replace` is
            False, or the Hub is out of reach.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    check_name(name)
    try:
        there = set(HfApi().list_repo_files(name)) - OF_THE_HUB
        ours = recorded_files(Path(hf_hub_download(name, MANIFEST))) if MANIFEST in there else {}
    except RepositoryNotFoundError:
        return []
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise OutputError(
            f"{name}: the Hub does not say what the repository holds ({reason}). Leave --push-to-hub out, and upload later."
        ) from error
    ours = ours or {}
    others = sorted(there - set(ours))
    if others:
        raise OutputError(
            f"{name}: the repository already holds {shortened(others)}, which no merge of peft_subspace wrote. Choose a new "
            f"repository, or remove these files there."
        )
    if there and not replace:
        raise OutputError(f"{name}: the repository already holds a merged model. Choose another, or pass --overwrite.")
    return sorted(ours)


def upload(folder: Path, repository: str, private: bool, old_files: list[str]) -> str:
    """Upload a merged folder as one commit; the address of the repository.

    Args:
        folder: the result.
        repository: its name on the Hub.
        private: make a new repository private.
        old_files: what `check_repository` found.

    Raises:
        OutputError: the Hub refused, or is out of reach; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=url.repo_id, commit_message="Merge by peft-subspace", delete_patterns=old_files or None
        )
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise OutputError(
            f"{repository}: the upload failed ({reason}). The result is in {folder}; push it again later."
        ) from error
    return str(url)
