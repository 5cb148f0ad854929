"""Low-rank updates as the files of a LoRA adapter that plain PEFT loads. Imports no PEFT."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..functional.stacked import rank_for_energy
from .adapters import CONV1D_MODELS, PEFT_PREFIX
from .blueprint import blueprint
from .headers import ITEM_SIZES, TensorHeader, encode_header
from .renaming import names_in_memory
from .validate import is_adaptable

_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "LMHeadModel": "CAUSAL_LM",
}
_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # PEFT wants a trained head in the files of these tasks
_EMBEDDING = re.compile(r"embed_tokens|word_embeddings|position_embeddings|token_type_embeddings|wte|wpe|shared|tok_embeddings")


def embeddings_among(modules: Iterable[str], config: Mapping[str, Any]) -> set[str]:
    """Modules whose weight `[rows, dim]` is looked up by row, as the model's class says; else seen from their names.

    Args:
        modules: names in memory.
        config: config.json of the model.
    """
    found = blueprint(config)
    if found is None:
        return {module for module in modules if _EMBEDDING.search(module.rpartition(".")[2])}
    return {module for module in modules if f"{module}.weight" in found.embeddings}


def modules_of(names: Iterable[str], base: Mapping[str, TensorHeader], config: Mapping[str, Any]) -> dict[str, str]:
    """Weight in the base's file -> name of its module in memory, which an adapter goes by."""
    stored = {stored: name for name, stored in names_in_memory(base, config).items()}
    return {name: stored.get(name, name).removesuffix(".weight") for name in names}


def without_layer(names: Iterable[str], base: Mapping[str, TensorHeader], config: Mapping[str, Any]) -> set[str]:
    """Weights for which PEFT's LoRA has no layer, as the model's class says; none if the class is not known.

    Args:
        names: of weights in the base's file.
        base: its tensors.
        config: its config.json.
    """
    found = blueprint(config)
    if found is None:
        return set()
    return {name for name, module in modules_of(names, base, config).items() if f"{module}.weight" not in found.layers}


def lora_tensors(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    modules: Mapping[str, str],
    config: Mapping[str, Any],
) -> tuple[dict[str, Tensor], int]:
    """Tensors of an adapter file with one rank, the largest: smaller ones are filled with zeros, as serving engines need.

    Args:
        factors: weight -> left `[rows, r]` and right `[r, columns]`.
        shapes: weight -> its shape in the base.
        modules: weight -> name of its module, see `modules_of`.
        config: of the base, config.json: GPT-2 and a few others store linear weights as `[in, out]`.
    """
    rank = max(left.shape[1] for left, _ in factors.values())
    tensors: dict[str, Tensor] = {}
    embeddings = embeddings_among(modules.values(), config)
    for name, (left, right) in factors.items():
        module, missing = PEFT_PREFIX + modules[name], rank - left.shape[1]
        left, right = torch.nn.functional.pad(left, (0, missing)), torch.nn.functional.pad(right, (0, 0, 0, missing))
        kernel = shapes[name][2:]
        if modules[name] in embeddings:
            tensors |= {f"{module}.lora_embedding_A": left.t(), f"{module}.lora_embedding_B": right.t()}
        elif is_transposed(name, config.get("model_type")) and not kernel:
            tensors |= {f"{module}.lora_A.weight": left.t(), f"{module}.lora_B.weight": right.t()}
        else:
            down = right.reshape(rank, *shapes[name][1:])
            tensors |= {
                f"{module}.lora_A.weight": down,
                f"{module}.lora_B.weight": left.reshape(*left.shape, *[1] * len(kernel)),
            }
    return tensors, rank


def is_transposed(name: str, model_type: str | None) -> bool:
    """Whether a linear weight is stored as `[in, out]`."""
    return model_type in CONV1D_MODELS and re.search(r"\.(h|blocks|layers)\.\d+\.", f".{name}") is not None


def lora_config(
    modules: Mapping[str, str],
    rank: int,
    base: Mapping[str, TensorHeader],
    base_config: Mapping[str, Any],
    base_name: str,
    saved: list[str],
) -> dict[str, Any]:
    """adapter_config.json of an adapter whose scale is in its factors (`lora_alpha = r`).

    `target_modules` has the last parts of the names if that hits the same layers, else the whole names.

    Args:
        modules: weight in the base's file -> name of its module.
        rank: of all of them.
        base: tensors of the base.
        base_config: its config.json.
        base_name: what PEFT loads.
        saved: modules that are in the file whole.
    """
    ends = sorted({module.rpartition(".")[2] for module in modules.values()})
    all_modules = modules_of((name for name, tensor in base.items() if is_adaptable(name, tensor.shape)), base, base_config)
    hit = {name for name in all_modules.values() if name.rpartition(".")[2] in ends}
    architecture = next(iter(base_config.get("architectures") or []), "")
    task = next((task for ending, task in _TASKS.items() if str(architecture).endswith(ending)), None)
    return {
        "peft_type": "LORA",
        "task_type": task if saved or task not in _WITH_HEADS else None,
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": base_config.get("model_type") in CONV1D_MODELS,
        "target_modules": ends if hit == set(modules.values()) else sorted(modules.values()),
        "modules_to_save": sorted(saved) or None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "inference_mode": True,
    }


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A whole safetensors file in memory; adapters are small."""
    from .reading import DTYPES

    codes = {dtype: code for code, dtype in DTYPES.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (-ITEM_SIZES[codes[item[1].dtype]], item[0])))
    header, _ = encode_header({name: (codes[t.dtype], tuple(t.shape)) for name, t in ordered.items()}, metadata)
    parts = [t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in ordered.values()]
    return b"".join([header, *parts])


def json_bytes(table: Mapping[str, Any]) -> bytes:
    """A table as a JSON file."""
    return json.dumps(table, indent=2, ensure_ascii=False, sort_keys=True).encode() + b"\n"


def truncated(matrix: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor, float]:
    """left `[rows, r]`, right `[r, columns]` nearest to a matrix, and the share of its squared norm that they miss.

    The singular values are divided evenly among both factors. Ranks far below the size are found by a randomised SVD with
    twice the rank and six power iterations, which is seeded; the error is that of the product, not an estimate.

    Args:
        matrix: `[rows, columns]`, float32.
        rank: the largest rank; None for no bound.
        energy: the smallest rank that keeps this share of the squared norm; None for none.
    """
    small = min(matrix.shape)
    bound = small if rank is None else min(rank, small)
    total = float(matrix.double().square().sum())
    if total == 0:
        return matrix.new_zeros(matrix.shape[0], 1), matrix.new_zeros(1, matrix.shape[1]), 0.0
    if energy is None and 8 * bound < small and small > 512:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=min(small, 2 * bound + 16), niter=6)
        vh = v.t()
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    if energy is not None:
        bound = min(bound, rank_for_energy(s, energy))
    root = s[:bound].clamp_min(0).sqrt()
    left, right = u[:, :bound] * root, root[:, None] * vh[:bound]
    return left, right, max(0.0, float((matrix - left @ right).double().square().sum()) / total)


def relative_error(discarded: float, total: float) -> float:
    """||dW - dW'|| / ||dW|| from squared norms."""
    return math.sqrt(discarded / total) if total else 0.0
