"""Checkpoints of `MergeTrainer`: everything that the next step depends on, as safetensors and JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

NAME = "checkpoint"


def save_checkpoint(output_dir: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write `output_dir/checkpoint`, which is exchanged as a whole."""
    folder = Path(output_dir) / NAME
    partial, old = folder.with_name(f"{NAME}.partial"), folder.with_name(f"{NAME}.old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial / "state.safetensors")
    (partial / "state.json").write_text(json.dumps(state))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(output_dir: str | None, identity: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the checkpoint in a folder; None if there is none.

    Args:
        output_dir: of the run.
        identity: what the state's "arguments" must be.

    Raises:
        ValueError: no `output_dir`, or other arguments; names them.
    """
    if output_dir is None:
        raise ValueError("resume=True needs `output_dir`, where the checkpoint is.")
    folder = Path(output_dir) / NAME
    if not folder.exists():
        folder = folder.with_name(f"{NAME}.old")  # the process ended between two renames
    if not folder.exists():
        return None
    state = json.loads((folder / "state.json").read_text())
    differ = [name for name, value in identity.items() if state["arguments"].get(name) != value]
    if differ:
        raise ValueError(f"The checkpoint in {folder} was written with other arguments: {', '.join(differ)}.")
    return load_file(folder / "state.safetensors"), state


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
