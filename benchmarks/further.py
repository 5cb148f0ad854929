"""Rows beside those of step.py: PELA, aTLAS and full fine-tuning, which change or read the weights themselves."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.step import PROVIDERS, Provider, Request
from peft_subspace import AtlasConfig, PelaConfig


def _write_pool(model: nn.Module, request: Request, folder: Path, vectors: int, rank: int | None) -> dict[str, str]:
    generator, pool = torch.Generator().manual_seed(7), {}
    for t in range(vectors):
        tensors: dict[str, Tensor] = {}
        for name in request.targets:
            rows, columns = model.get_submodule(name).weight.shape
            if rank is None:
                tensors[f"{name}.weight"] = 1e-3 * torch.randn(rows, columns, generator=generator)
            else:
                tensors[f"{name}.weight::A"] = 1e-2 * torch.randn(rank, columns, generator=generator)
                tensors[f"{name}.weight::B"] = 1e-2 * torch.randn(rows, rank, generator=generator)
        path = folder / f"v{t}.safetensors"
        save_file(tensors, path, metadata={"format": "pt", "peft_subspace": "task_vector"})
        pool[f"v{t}"] = str(path)
    return pool


def atlas(vectors: int, rank: int | None = None) -> Callable[[nn.Module, Request], nn.Module]:
    """An aTLAS adapter on random task vectors, dense or of low rank, that are read once and whose files are not kept."""

    def attach(model: nn.Module, request: Request) -> nn.Module:
        with tempfile.TemporaryDirectory() as folder:
            pool = _write_pool(model, request, Path(folder), vectors, rank)
            return peft.get_peft_model(model, AtlasConfig(pool=pool, target_modules=request.targets))

    return attach


def _pela(model: nn.Module, request: Request) -> nn.Module:
    return peft.get_peft_model(model, PelaConfig(compression=2.0, target_modules=request.targets))


def _full(model: nn.Module, request: Request) -> nn.Module:
    for name in request.targets:  # copies: the frozen parameters are shared with the other rows
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    return model


# A further method is one more row.
ALL = {
    **PROVIDERS,
    "pela": Provider(_pela, "PELA of this package, compression 2"),
    "atlas": Provider(atlas(4), "aTLAS of this package, 4 dense vectors in float32", conv=False),
    "atlas-lora": Provider(atlas(4, 16), "aTLAS of this package, 4 vectors of rank 16", conv=False),
    "full": Provider(_full, "full fine-tuning of the same weights"),
}
