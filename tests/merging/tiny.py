"""Small checkpoints on disk, with names like a Llama's, and recipes for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LAYERS, WIDTH, VOCABULARY = 3, 16, 40


def shapes(layers: int = LAYERS, width: int = WIDTH, vocabulary: int = VOCABULARY) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        found[f"model.layers.{layer}.self_attn.q_proj.weight"] = (width, width)
        found[f"model.layers.{layer}.mlp.up_proj.weight"] = (2 * width, width)
        found[f"model.layers.{layer}.mlp.down_proj.weight"] = (width, 2 * width)
        found[f"model.layers.{layer}.input_layernorm.weight"] = (width,)
    return {**found, "model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def random_tensors(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, **sizes: int) -> dict[str, Tensor]:
    """A model's tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (scale * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes(**sizes).items()}


def near(base: dict[str, Tensor], seed: int, scale: float = 0.1) -> dict[str, Tensor]:
    """A fine-tuned model: the base and something small."""
    generator = torch.Generator().manual_seed(seed)
    return {n: (t.float() + scale * torch.randn(t.shape, generator=generator)).to(t.dtype) for n, t in base.items()}


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None, files: int = 1) -> Path:
    """A checkpoint, in one file or in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False, **(config or {})}
    (folder / "config.json").write_text(json.dumps(settings))
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    names = list(tensors)
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::files]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def as_module(tensors: dict[str, Tensor]) -> nn.Module:
    """A model with these parameters, to put an adapter on; it cannot be run."""
    root = nn.Module()
    for name, values in tensors.items():
        *path, last, _ = name.split(".")
        inner = root
        for part in path:
            if not hasattr(inner, part):
                inner.add_module(part, nn.Module())
            inner = inner.get_submodule(part)
        layer = nn.Linear(*values.shape[::-1], bias=False) if values.ndim == 2 else nn.LayerNorm(values.shape, bias=False)
        layer.weight = nn.Parameter(values.clone())
        inner.add_module(last, layer)
    return root


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a result, by the safetensors library."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def trio(folder: Path, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, dict[str, Tensor]]:
    """A base and three models on disk: `base`, `a`, `b` (in three files), `c`; their tensors by name."""
    base = random_tensors(0, dtype, **sizes)
    models = {"base": base, "a": near(base, 1), "b": near(base, 2), "c": near(base, 3)}
    for name, tensors in models.items():
        write(folder / name, tensors, files=3 if name == "b" else 1)
    return models


def recipe(folder: Path, method: str = "task_arithmetic", models: Sequence[str] = "abc", **more: Any) -> dict[str, Any]:
    """A recipe for `trio`."""
    entries = [{"model": str(folder / name), "parameters": {"weight": 0.5 + 0.1 * n}} for n, name in enumerate(models)]
    return {"merge_method": method, "base_model": str(folder / "base"), "models": entries, **more}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
