"""Checkpoints of `MergeTrainer`: everything that the next step depends on, as safetensors and JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..task_vectors.locks import held, remove_scratch
from ..task_vectors.sources import shortened
from ..whole_files import unfinished_name, write_whole

NAME, LOCK = "checkpoint", "checkpoint.lock"
TENSORS, STATE, HISTORY = "state.safetensors", "state.json", "history.json"


def save_checkpoint(output_dir: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write `output_dir/checkpoint`, which is exchanged as a whole.

    Raises:
        ValueError: something stands there that is no checkpoint of `MergeTrainer`.
    """
    folder = Path(output_dir) / NAME
    partial, old = folder.with_name(f"{NAME}.partial"), folder.with_name(f"{NAME}.old")
    check_run_place(output_dir)
    remove_scratch(partial)
    partial.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial / TENSORS)
    write_whole(partial / STATE, json.dumps(state))
    if not folder.exists():
        remove_scratch(old)
        partial.rename(folder)
        return
    remove_scratch(old)
    folder.rename(old)
    partial.rename(folder)
    remove_scratch(old)


@contextmanager
def run_folder(output_dir: str | None, accelerator: Accelerator) -> Iterator[None]:
    """Let one run at a time write into a folder. The main process holds the lock, and all hear of it if they may not go on.

    Args:
        output_dir: of the run; None writes nothing.
        accelerator: of the processes.

    Raises:
        ValueError: another run writes there, or something else has the name of a checkpoint.
    """
    if output_dir is None:
        yield
        return
    refused: Exception | None = None
    with ExitStack() as stack:
        if accelerator.is_main_process:
            try:
                check_run_place(output_dir)
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                stack.enter_context(held(Path(output_dir) / LOCK))
                check_run_place(output_dir)
            except (ValueError, OSError) as error:
                refused = error
        if accelerator.num_processes > 1:
            (refused,) = broadcast_object_list([refused])
        if refused is not None:
            raise refused
        yield


def check_run_place(output_dir: str) -> None:
    """See that a run replaces nothing in its folder but checkpoints and the history of `MergeTrainer`.

    Raises:
        ValueError: something else has one of their names.
    """
    for ending in ("", ".partial", ".old"):
        place = Path(output_dir) / f"{NAME}{ending}"
        if not os.path.lexists(place):
            continue
        names = os.listdir(place) if place.is_dir() and not place.is_symlink() else [place.name]
        others = sorted(name for name in names if (unfinished_name(name) or name) not in (TENSORS, STATE))
        if others:
            raise ValueError(
                f"{place}: holds {shortened(others)}, which is no checkpoint of MergeTrainer and would be replaced. Choose "
                f"another output_dir."
            )
    history = Path(output_dir) / HISTORY
    if os.path.lexists(history) and not _is_history(history):
        raise ValueError(f"{history}: is no history of MergeTrainer, and would be replaced. Choose another output_dir.")


def _is_history(path: Path) -> bool:
    try:
        looks = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(looks, list) and all(isinstance(look, dict) and "phase" in look for look in looks)


def load_checkpoint(output_dir: str | None, identity: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the checkpoint in a folder; None if there is none.

    Args:
        output_dir: of the run.
        identity: what the state's "arguments" must be.

    Raises:
        ValueError: no `output_dir`, or other arguments; names them with their values.
    """
    if output_dir is None:
        raise ValueError("resume=True needs `output_dir`, where the checkpoint is.")
    folder = Path(output_dir) / NAME
    if not folder.exists():
        folder = folder.with_name(f"{NAME}.old")  # the process ended between two renames
    if not folder.exists():
        return None
    state = json.loads((folder / STATE).read_text())
    before = state["arguments"]
    differ = [_difference(name, before.get(name), value) for name, value in identity.items() if before.get(name) != value]
    if differ:
        raise ValueError(
            f"The checkpoint in {folder} was written with other arguments: {', '.join(differ)}. Go on with those, or choose "
            f"another output_dir."
        )
    return load_file(folder / TENSORS), state


def _difference(name: str, before: Any, now: Any) -> str:
    """What differs, with both values where they are short."""
    return f"{name} ({before!r} there, {now!r} here)" if len(f"{before!r}{now!r}") <= 80 else name


def moments(optimizer: Any, trained: Sequence[Tensor], name: str) -> dict[str, Tensor]:
    """An optimizer's state of some tensors, by names."""
    states = optimizer.state
    return {f"{name}.{i}.{key}": value for i, t in enumerate(trained) for key, value in states.get(t, {}).items()}


def restore_moments(optimizer: Any, trained: Sequence[Tensor], tensors: dict[str, Tensor], name: str) -> None:
    """Put the state back."""
    for i, tensor in enumerate(trained):
        found = {key.rpartition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{name}.{i}.")}
        if found:
            optimizer.state[tensor] = {k: v if k == "step" else v.to(tensor.device) for k, v in found.items()}
