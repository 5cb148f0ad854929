"""Pools of task vectors for pico models, written once into a folder of this process."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.pico import Pico


@functools.cache
def folder() -> Path:
    """Where the files are, until the process ends; or, with POOLS, a lasting folder for each process of a group."""
    if "POOLS" in os.environ:
        kept = Path(os.environ["POOLS"], os.environ.get("RANK", "0"))
        kept.mkdir(parents=True)
        return kept
    path = Path(tempfile.mkdtemp(prefix="pools"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def write_vector(path: Path, tensors: dict[str, Tensor]) -> str:
    """A task-vector file."""
    save_file(tensors, path, metadata={"format": "pt", "peft_subspace": "task_vector"})
    return str(path)


def vector_of(model: nn.Module, seed: int, rank: int | None = None, scale: float = 0.2) -> dict[str, Tensor]:
    """Random values for every parameter; of low rank for matrices, if a rank is given."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in model.named_parameters():
        if rank is None or parameter.ndim != 2:
            tensors[name] = scale * torch.randn(parameter.shape, generator=generator)
        else:
            tensors[f"{name}::A"] = scale * torch.randn(rank, parameter.shape[1], generator=generator)
            tensors[f"{name}::B"] = torch.randn(parameter.shape[0], rank, generator=generator)
    return tensors


def fine_tuned(pico: Pico, seed: int = 1) -> nn.Module:
    """The base of a pico model and a tenth of it, at random: a whole model as fine-tuning leaves it, only further away."""
    model, generator = pico.model(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 * parameter.norm() / noise.norm() + 0.01))
    return model


@functools.cache
def pool_of(pico: Pico, rank: int | None = None, count: int = 2) -> dict[str, str]:
    """Name -> file, for a pico model."""
    with torch.random.fork_rng():  # a test draws the same numbers, whether it is the first to ask or not
        model = pico.model()
    number = len(list(folder().iterdir()))
    vectors = [vector_of(model, seed, rank) for seed in range(count)]
    return {f"task{t}": write_vector(folder() / f"{number}-{t}.safetensors", vectors[t]) for t in range(count)}
