"""A finished folder goes to the Hub."""

from __future__ import annotations

from pathlib import Path

from ..task_vectors.errors import OutputError, RecipeError
from ..task_vectors.references import HUB_ID


def check_repository(name: str) -> None:
    """Raise a RecipeError unless a name can be a repository's; asked before a merge, not after it."""
    if not HUB_ID.fullmatch(name):
        raise RecipeError(f"--push-to-hub {name!r}: a repository is written as owner/name.")


def upload(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a merged folder as one commit; the address of the repository.

    Raises:
        OutputError: the Hub refused, or is out of reach; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=url.repo_id, commit_message="Merge by peft-subspace")
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise OutputError(
            f"{repository}: the upload failed ({reason}). The result is in {folder}; push it again later."
        ) from error
    return str(url)
